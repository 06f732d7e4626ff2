"""Seconds until something is there: import, help, the first frame of `open_ffis`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from data import sky
from timing import measure, median, ms, spread, table

FIRST = """
import tessbkg
ffis = tessbkg.open_ffis(sector=1, camera=1, ccd=4, root={root!r})
assert ffis.flux[1].to_numpy().shape == (2048, 2048)
"""
BACKGROUND = """
import xarray, zarr, dask.array
"""


def run(cache: Path, *, repeats: int, quick: bool):
    root, _ = sky(cache, "orbit", 12 if quick else 24)

    def python(*arguments):
        return lambda: subprocess.run([sys.executable, *arguments], check=True, capture_output=True)

    calls = {
        "python alone": (python("-c", "pass"), None),
        "import tessbkg": (python("-c", "import tessbkg"), 0.3),
        "tessbkg --help": (python("-m", "tessbkg.cli", "--help"), 0.5),
        "tessbkg build --help": (python("-m", "tessbkg.cli", "build", "--help"), 0.5),
        "import xarray, zarr, dask.array": (python("-c", BACKGROUND), None),
        "open_ffis and its first frame (24 frames on disk)": (
            python("-c", FIRST.format(root=str(root))),
            None,
        ),
    }
    script = Path(sys.executable).with_name("tessbkg")
    if script.exists():
        for name, arguments in (
            ("tessbkg --help", ["--help"]),
            ("tessbkg build --help", ["build", "--help"]),
        ):
            command = [str(script), *arguments]
            calls[name] = (
                lambda command=command: subprocess.run(command, check=True, capture_output=True),
                0.5,
            )
    seconds = measure({name: call for name, (call, _) in calls.items()}, repeats=max(5, repeats))
    figures = {name: spread(values) for name, values in seconds.items()}
    rows = [
        (
            name,
            ms(median(seconds[name])),
            ms(min(seconds[name])),
            f"{1e3 * bar:.0f}" if bar else "",
            ("yes" if median(seconds[name]) < bar else "NO") if bar else "",
        )
        for name, (_, bar) in calls.items()
    ]
    return figures, [
        table("Start-up, a new process each time", ("", "ms, median", "ms, best", "bar", "met"), rows)
    ]
