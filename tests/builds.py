"""Builds as processes of their own, for tests that kill them, and comparison of their stores."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import zarr
from frames import CCD1

import tessbkg

TESSBKG = str(Path(sys.executable).with_name("tessbkg"))
DASK = str(Path(sys.executable).with_name("dask"))
REDUCTION = {"dark_frames": 4, "shard_frames": 4, "bin": 16}
ARGUMENTS = "--sector 1 --camera 1 --ccd 4 --dark-frames 4 --shard-frames 4 --bin 16".split()


def arrays_of(store: str, path: str = "s0001/cam1/ccd4", options=None) -> dict[str, np.ndarray]:
    """Every array of a CCD's group and its child groups, read by plain zarr."""
    root = zarr.open_group(store, path=path, mode="r", storage_options=options)
    found = {}
    for name, array in root.arrays():
        found[name] = array[...]
    for child in ("survey", "scene"):
        found |= {f"{child}/{name}": array[...] for name, array in root[child].arrays()}
    return found


def assert_equal(store: str, clean: str, *, apart=()) -> None:
    """Assert that two stores are equal, variable by variable, bit by bit, and in what they report."""
    ours, theirs = arrays_of(store), arrays_of(clean)
    assert ours.keys() == theirs.keys()
    for name in ours.keys() - set(apart):
        one, other = ours[name], theirs[name]
        assert one.dtype == other.dtype
        same = one.tolist() == other.tolist() if one.dtype.kind in "OT" else one.tobytes() == other.tobytes()
        assert same, name
    columns = ["ffi", "status", "reason"]
    reports = [tessbkg.read_report(url, **CCD1)[columns] for url in (store, clean)]
    assert reports[0].equals(reports[1])


def some(values, *chosen):
    """Parameters of a test, all but the chosen ones being slow: what they show is shown by others too."""
    assert set(chosen) <= set(values)
    rows = [(value, value if isinstance(value, tuple) else (value,)) for value in values]
    return [pytest.param(*row, marks=() if value in chosen else pytest.mark.slow) for value, row in rows]


class Build:
    """`tessbkg build` as a process, the leader of its own session."""

    def __init__(self, out, *arguments: str, env=None) -> None:
        self.command = [TESSBKG, "build", str(out), *ARGUMENTS, *arguments]
        self.log = Path(f"{out}.{time.monotonic_ns()}.log")
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(
                self.command,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **(env or {})},
            )

    @property
    def said(self) -> str:
        return self.log.read_text()

    def wait_for(self, text: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.said:
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.02)

    def workers(self) -> list[psutil.Process]:
        """Worker processes of Dask, without multiprocessing's tracker."""
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(self.process.pid).children(recursive=True)
            return [one for one in children if "spawn_main" in " ".join(_command(one))]
        return []

    def signal(self, number: int, *, group: bool = False) -> None:
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.process.pid, number)

    def end(self, seconds: float = 120) -> int:
        """Wait for the end; return the exit code."""
        try:
            return self.process.wait(seconds)
        finally:
            self.signal(signal.SIGKILL, group=True)
            self.process.wait()


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def gone(processes: list[psutil.Process], seconds: float = 15) -> bool:
    """Whether processes end in time, zombies being gone."""
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return not [one for one in alive if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
