"""Plans, tasks, bytes of a graph, memory, workers, and a sector on paper."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
from data import CCD1, servers, sky, survey_and_scene
from timing import measure, median, ratio, table

SECTOR_FRAMES = 11_700


def names(n, *, sector=95, camera=1, ccd=4, cadence=200):
    """Give `n` names as the mission gives them, `cadence` seconds apart."""
    start = datetime(2025, 7, 25, 12, 0, 0)  # noqa: DTZ001 (names have no zone)
    keys = []
    for i in range(n):
        when = start + timedelta(seconds=i * cadence)
        folder = f"ffi/s{sector:04d}/{when:%Y/%j}/{camera}-{ccd}"
        name = f"tess{when:%Y%j%H%M%S}-s{sector:04d}-{camera}-{ccd}-{288:04d}-s_ffic.fits"
        keys.append(f"{folder}/{name}")
    return keys


def linked(root: Path, frames, n):
    """Fill `root` with `n` frames in order of time that are links to `frames`, again and again."""
    for i, key in enumerate(names(n, sector=1, cadence=1800)):
        path = root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(frames[i % len(frames)])


def graph_bytes(plan):
    """Pickle the arguments of every task that a cluster would get."""
    from tessbkg import plan as planning
    from tessbkg import tasks as work

    calls = [
        (work.survey_part, (plan.job, plan.frames.iloc[part]))
        for part in planning.survey_parts(len(plan.frames))
    ]
    calls.append((work.make_scene_group, (plan.job,)))
    calls += [(work.reduce_shard, (plan.job, first, last)) for first, last in plan.missing]
    return sum(len(pickle.dumps(call)) for call in calls), len(calls)


# One process does one step; its own high water after each task is its last line.
_MEMORY = """
import json, sys
from pathlib import Path
from tessbkg import jobs
from tessbkg import plan as planning
from tessbkg import tasks as work
from tessbkg.store import create_group, write_template
def high_water():
    # not ru_maxrss, which begins with that of the process that started this one
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

step, root, store = sys.argv[1:]
plan = planning.plan_build(store, root=root, sector=1, camera=1, ccd=4, dark_frames=12)
marks = []
if step == "prepare":
    create_group(plan.job.group, plan.fields)
    survey = jobs._survey_step(plan.job, plan.frames, None, lambda *_: None)
    work.make_scene_group(plan.job)
    write_template(plan.job.group, work.make_template(plan.job, survey), plan.job.shard_frames)
    marks.append(high_water())
else:
    for first, last in plan.missing:
        work.reduce_shard(plan.job, first, last)
        marks.append(high_water())
print(json.dumps(marks))
"""


def peak_memory(root, frames, folder):
    """Peak bytes of a process that makes survey and scene, and of one that then reduces shard after shard."""
    from tessbkg.jobs import WORKER_ENVIRONMENT

    store = f"{folder}/memory-{frames}.zarr"
    environment = os.environ | {name: str(value) for name, value in WORKER_ENVIRONMENT.items()}
    peaks = {}
    for step in ("prepare", "reduce"):
        command = [sys.executable, "-c", _MEMORY, step, str(root), store]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        peaks[step] = json.loads(done.stdout.splitlines()[-1])
    return peaks


def compute_bound(seconds_of_work, frames_of_work):
    """Reduce one simulated frame over and over: a task without input."""
    from tessbkg.reduce import plan_reduction, reduce_frame

    random = np.random.default_rng(0)
    flux = random.normal(100, 1, (2048, 2048)).astype(np.float32)
    plan = plan_reduction(np.zeros_like(flux), random.random(flux.shape) < 0.1, bin=16, noise=(1e-3, 0.02))
    for _ in range(frames_of_work):
        reduce_frame(flux, plan)
    return seconds_of_work


def frames_of_build(root, n, folder, client=None):
    """Seconds of the shards of a build of `n` frames."""
    import tessbkg

    marks = []

    def progress(step, done, total):
        if step == "reduce":
            marks.append(time.perf_counter())

    out = f"{folder}/linear-{n}-{time.monotonic_ns()}.zarr"
    cpu = time.process_time()
    tessbkg.build(
        out, root=str(root), frames=slice(0, n), dark_frames=4, progress=progress, client=client, **CCD1
    )
    return marks[-1] - marks[0], time.process_time() - cpu


def sector_study(
    *, frame_cpu, frame_bytes=17.5e6, survey_share=0.025, frames=SECTOR_FRAMES, ccds=16, workers=50
):
    """Cost of a whole sector of 200-s data on a cluster, from the seconds of one core a frame.

    Parameters
    ----------
    frame_cpu : dict of str to float
        Seconds of one core a frame by name of what is done.

    Returns
    -------
    rows : list of tuple
        Name, seconds of the kernel, seconds of the network at some rates, what binds.
    """
    total_bytes = frames * ccds * frame_bytes * (1 + survey_share)
    rows = []
    for name, seconds in frame_cpu.items():
        compute = frames * ccds * seconds / workers
        for rate in (25e6, 100e6, 300e6):  # bytes a second and worker: a busy, a usual and a fast instance
            network = total_bytes / workers / rate
            wall = max(compute, network)
            rows.append(
                (
                    f"{name}, {rate / 1e6:.0f} MB/s a worker",
                    f"{compute / 60:.1f}",
                    f"{network / 60:.1f}",
                    f"{wall / 60:.0f}",
                    "network" if network > compute else "processor",
                    f"{wall * workers / 3600:.1f}",
                )
            )
    return rows, total_bytes


def study_table(frame_cpu, **study):
    """Print the sector on paper."""
    rows, total = sector_study(frame_cpu=frame_cpu, **study)
    return table(
        f"On paper: 16 CCDs x {SECTOR_FRAMES:,} frames of 200 s = {total / 1e12:.2f} TB, on 50 workers",
        ("", "processor, min", "network, min", "wall, min", "what binds", "core hours"),
        rows,
        "Computed, not run: seconds of one core a frame (reading from S3, decoding, reducing) as measured "
        "here, "
        "bytes as counted here, all workers busy "
        "(183 shards a CCD, 2,928 tasks in all: "
        "at most 2 % of the time is lost at the end). "
        "A scheduler hands out a task in about 1 ms: 3 s in all.",
    )


def run(cache: Path, *, repeats: int, quick: bool):
    from tessbkg import jobs
    from tessbkg import plan as planning
    from tessbkg import tasks as work
    from tessbkg.dataset import Options, plan_of
    from tessbkg.ffi import SCIENCE_END, decode, parse_header
    from tessbkg.reduce import reduce_frame

    figures, rows = {}, []

    def row(what, value, bar, good):
        rows.append((what, value, bar, "yes" if good else "NO"))

    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="tessbkg-bench-", dir=cache))
        urls = [f"s3://stpubdata/tess/public/{key}" for key in names(SECTOR_FRAMES)]
        seconds = measure(
            {"plan": lambda: planning.plan_build(f"{folder}/plan.zarr", files=urls)}, repeats=max(3, repeats)
        )["plan"]
        plan = planning.plan_build(f"{folder}/plan.zarr", files=urls)
        nbytes, tasks = graph_bytes(plan)
        figures["plan"] = {"seconds": median(seconds), "tasks": tasks, "graph bytes": nbytes}
        row(f"plan_build of {SECTOR_FRAMES:,} frames", f"{median(seconds):.2f} s", "2 s", median(seconds) < 2)
        row("tasks", tasks, "200", tasks < 200 and tasks == plan.tasks)
        row("arguments of all tasks, pickled", f"{nbytes / 1e6:.2f} MB", "5 MB", nbytes < 5e6)

        full, _ = sky(cache, "orbit", 12 if quick else 24)
        files = sorted((full / "ffi").rglob("*_ffic.fits"))
        counts = (64, 128) if quick else (64, 1024)
        peaks = {}
        for n in counts:
            root = Path(folder) / f"full-{n}"
            linked(root, files, n)
            peaks[n] = peak_memory(root, n, folder)
        figures["peak memory, full frames"] = peaks
        for step in ("prepare", "reduce"):
            values = [peaks[n][step][-1] for n in counts]
            what = "survey, scene, template" if step == "prepare" else "all shards"
            row(
                f"peak memory, {what}: {counts[0]} / {counts[1]:,} frames of 2048 x 2048",
                " / ".join(f"{v / 1e6:.0f}" for v in values) + " MB",
                "700 MB",
                max(values) < 700e6,
            )
        marks = peaks[counts[1]]["reduce"]  # one process: two differ by 15 MB, however many frames they do
        grown = marks[-1] / marks[0] - 1
        row(
            f"growth of a worker's memory from its first shard of 64 frames to {counts[1]:,} frames",
            f"{100 * grown:+.2f} %",
            "1 %",
            grown < 0.01,
        )

        small, _ = sky(cache, "smooth", 64, (64, 64))
        tiny = sorted((small / "ffi").rglob("*_ffic.fits"))
        linear = Path(folder) / "linear"
        sizes = (64, 128, 256) if quick else (64, 256, 1024)
        linked(linear, tiny, sizes[-1])
        frames_of_build(linear, 64, folder)
        measured = {
            n: min(frames_of_build(linear, n, folder)[0] for _ in range(2 if quick else 3)) for n in sizes
        }
        exponent = float(np.polyfit(np.log(list(measured)), np.log(list(measured.values())), 1)[0])
        figures["time of the shards by frames"] = {"seconds": measured, "exponent": exponent}
        row(
            f"time ~ frames ^ p, {sizes[0]} to {sizes[-1]:,} small frames",
            f"p = {exponent:.2f}",
            "1.05",
            exponent < 1.05,
        )

        with jobs.local_cluster(2) as client:
            workers = list(client.scheduler_info()["workers"])
            size = 5 if quick else 12

            def work(number):
                calls = [
                    client.submit(compute_bound, i, size, workers=workers[i % number], pure=False)
                    for i in range(8)
                ]
                client.gather(calls)

            times = measure({1: lambda: work(1), 2: lambda: work(2)}, repeats=max(3, repeats))
        walls = {number: median(values) for number, values in times.items()}
        figures["compute-bound seconds by workers"] = walls
        row(
            "1 -> 2 workers of one thread, compute-bound",
            ratio(walls[1] / walls[2]),
            "1.7 x",
            walls[1] / walls[2] >= 1.7,
        )

    figures["survey share of bytes"] = planning.SURVEY_SHARE
    url = files[len(files) // 2]
    data = url.read_bytes()
    header = parse_header(data, str(url))
    scene = survey_and_scene(full, Options(dark_frames=4))[2]
    cpu = {}
    for statistic in dict.fromkeys((Options().statistic, "rolling")):
        reduction = plan_of(scene, Options(statistic=statistic))

        def frame(reduction=reduction):
            reduce_frame(decode(data, parse_header(data, ""), header.science[:2], 0), reduction)

        cpu[f"{statistic}, kernel only"] = processor_seconds(frame, max(5, repeats))
    read = read_cpu(files[:8])
    figures["seconds of one core a frame"] = {**cpu, "reading from S3": read}
    study = {name.replace(", kernel only", ""): seconds + read for name, seconds in cpu.items()}
    tables = [
        table("Scale", ("", "measured", "bar", "met"), rows),
        study_table(study, frame_bytes=SCIENCE_END, survey_share=planning.SURVEY_SHARE),
    ]
    figures["sector on 50 workers"] = [list(r) for r in sector_study(frame_cpu=study)[0]]
    return figures, tables


def processor_seconds(call, repeats):
    """Seconds of processor, which do not mind what else runs."""
    seconds = []
    for _ in range(repeats + 1):
        began = time.process_time()
        call()
        seconds.append(time.process_time() - began)
    return median(seconds[1:])


def read_cpu(files):
    """Seconds of processor that the bytes of one frame take, from an S3 server on loopback."""
    from tessbkg.ffi import SCIENCE_END
    from tessbkg.storage import filesystem, read_range, source_options

    with tempfile.TemporaryDirectory() as tmp, servers(Path(tmp), ("ministack",)) as running:
        server = running["ministack"]
        url = server.bucket("cpu", public_read=True)
        writer = server.filesystem()
        for i, path in enumerate(files):
            writer.pipe_file(f"{url}/{i}", path.read_bytes())
        fs, path = filesystem(url, source_options(url, server.options(anon=True)))
        read_range(fs, f"{path}/0", 0, SCIENCE_END)
        began = time.process_time()
        for i in range(len(files)):
            read_range(fs, f"{path}/{i}", 0, SCIENCE_END)
        return (time.process_time() - began) / len(files)
