"""The light at 1,000 cutouts of 11 x 11 pixels in 1,200 frames: seconds and memory, against tess-backml.

Ours evaluates all targets in one call, lazily, from a Zarr store. The corrector of tess-backml reads the FITS
file that `tessbkg.export` writes of the same light in averages of two hours (it interpolates in time only
where there are such) and takes one target a call. Each runs in a process of its own, on one core, whose
highest memory is given.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

FRAMES, TARGETS, SIDE = 1200, 1000, 11
THEIR_TARGETS = 10

OURS = """
import json, sys, time
import numpy as np
import tessbkg
from targets import SIDE, dataset, peak

ds, targets, what = dataset(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
corner = np.random.default_rng(0).integers((1, 45), (2038, 2082), (targets, 2))
before = peak()
began, cpu = time.perf_counter(), time.process_time()
light = tessbkg.evaluate(
    ds,
    row=corner[:, :1, None] + np.arange(SIDE)[:, None],
    column=corner[:, 1:, None] + np.arange(SIDE),
    time=ds.time.values,
)[["scattered_light", "scattered_light_err"]]
asked = time.perf_counter() - began
if what == "mean":
    light = light.mean(("pixel_y", "pixel_x"))
light = light.compute(scheduler="single-threaded")
seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
assert np.isfinite(light.scattered_light).all()
print(json.dumps({"seconds": seconds, "cpu": cpu, "asked": asked, "MB": peak(), "MB before": before}))
"""

THEIRS = """
import contextlib, io, json, sys, time, types
import numpy as np
sys.path.insert(0, ".")
from targets import peak

stub = types.ModuleType("tesscube")  # it asks the network when it is imported; the corrector needs none of it
stub.TESSCube = None
sys.modules["tesscube"] = stub
with contextlib.redirect_stderr(io.StringIO()):
    from tess_backml.corrector import ScatterLightCorrector

corrector, times = ScatterLightCorrector(1, 1, 4, fname=sys.argv[1]), np.load(sys.argv[2])
targets, side = int(sys.argv[3]), int(sys.argv[4])
corner = np.random.default_rng(0).integers((100, 145), (1900, 1900), (targets, 2))
before = peak()
began, cpu = time.perf_counter(), time.process_time()
for row, column in corner:
    light, _ = corrector.evaluate_scatterlight_model(row + np.arange(side), column + np.arange(side), times)
seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
assert light.shape == (len(times), side, side), light.shape
print(json.dumps({"seconds": seconds, "cpu": cpu, "MB": peak(), "MB before": before}))
"""


def peak() -> float:
    """Give the highest memory of this process yet, in MB (its children would inherit what getrusage says)."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6


def dataset(store: str):
    """Open light of real size: its frames are small, here they get the rows and columns of bins of 16."""
    import numpy as np
    from data import CCD1

    import tessbkg

    ds = tessbkg.open_background(store, **CCD1)
    ds = ds.isel(time=np.flatnonzero(ds["frame_status"].values == 0)[:FRAMES])
    bins = np.arange(ds.sizes["y"]) * 16
    return ds.assign_coords(row=("y", bins + 8.5), column=("x", bins + 52.5)).assign_attrs(bin=16)


def run(cache: Path, *, repeats: int, quick: bool, prior):
    import numpy as np
    from reads import make_store
    from timing import median, spread, table

    import tessbkg

    store = make_store(cache, 320 if quick else 1300)
    ds = dataset(str(store))
    here = Path(__file__).parent

    def ask(python, script, *arguments):
        command = [python, "-c", script, *map(str, arguments)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=here)
        return json.loads(done.stdout.splitlines()[-1])

    calls = {
        f"evaluate, {TARGETS:,} targets, all values": (sys.executable, OURS, store, TARGETS, "all"),
        f"evaluate, {TARGETS:,} targets, mean of each cutout": (sys.executable, OURS, store, TARGETS, "mean"),
        f"evaluate, {THEIR_TARGETS} targets, all values": (sys.executable, OURS, store, THEIR_TARGETS, "all"),
    }
    if prior:
        cube, times = cache / "targets.fits", cache / "targets-times.npy"
        tessbkg.export(tessbkg.bin_time(ds, hours=2), cube, format="fits")
        np.save(times, ds["btjd"].values + 2457000)
        name = f"tess-backml, {THEIR_TARGETS} targets, one after the other"
        calls[name] = (prior, THEIRS, cube, times, THEIR_TARGETS, SIDE)
    answers = {name: [] for name in calls}
    for _ in range(max(2, repeats // 3)):
        for name, call in calls.items():
            answers[name].append(ask(*call))
    figures, rows = {}, []
    for name, found in answers.items():
        figures[name] = {key: spread([one[key] for one in found]) for key in found[0]}
        seconds, cpu = (median([one[key] for one in found]) for key in ("seconds", "cpu"))
        memory = [f"{median([one[key] for one in found]):,.0f}" for key in ("MB before", "MB")]
        targets = TARGETS if f"{TARGETS:,}" in name else THEIR_TARGETS
        rows.append((name, f"{seconds:.2f}", f"{cpu:.2f}", f"{1e3 * cpu / targets:.1f}", *memory))
    frames = ds.sizes["time"]
    title = f"The light at cutouts of {SIDE} x {SIDE} pixels in {frames:,} frames of 128 x 128 bins, one core"
    head = ("", "seconds", "of the processor", "ms of it a target", "MB before", "MB at most")
    return figures, [table(title, head, rows)]
