"""What a build costs, counted: requests, bytes, tasks, memory. Nothing here looks at a clock."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest
from frames import CCD1

import tessbkg
from tessbkg import jobs
from tessbkg import plan as planning
from tessbkg import tasks as work
from tessbkg.dataset import Options, plan_of
from tessbkg.simulate import simulate
from tessbkg.store import create_group, read_child
from tessbkg.survey import survey_frames

SECTOR = 11_700


def keys(n: int, *, sector: int, cadence: int) -> list[str]:
    """Name `n` frames as the mission does."""
    times = [datetime(2025, 7, 25, tzinfo=UTC) + timedelta(seconds=i * cadence) for i in range(n)]
    return [
        f"ffi/s{sector:04d}/{t:%Y/%j}/1-4/tess{t:%Y%j%H%M%S}-s{sector:04d}-1-4-0288-s_ffic.fits"
        for t in times
    ]


def planned(tmp_path, n: int) -> planning.BuildPlan:
    urls = [f"s3://stpubdata/tess/public/{key}" for key in keys(n, sector=95, cadence=200)]
    return planning.plan_build(str(tmp_path / "plan.zarr"), files=urls)


def calls(plan: planning.BuildPlan):
    """Arguments of all tasks of a build."""
    survey = [
        (work.survey_part, plan.job, plan.frames.iloc[p]) for p in planning.survey_parts(len(plan.frames))
    ]
    shards = [(work.reduce_shard, plan.job, first, last) for first, last in plan.missing]
    return [*survey, (work.make_scene_group, plan.job), *shards]


def test_sector_of_200_s_frames_is_few_small_tasks(tmp_path):
    plan = planned(tmp_path, SECTOR)
    tasks = calls(plan)
    assert len(tasks) == plan.tasks < 200
    assert sum(len(pickle.dumps(task)) for task in tasks) < 5e6
    assert max(len(pickle.dumps(task)) for task in tasks[-len(plan.missing) :]) < 2000


@pytest.mark.parametrize("n", [1, 64, 65, 1000, 5000])
def test_tasks_grow_linearly(tmp_path, n):
    plan = planned(tmp_path, n)
    assert len(plan.missing) == -(-n // 64)
    assert plan.tasks - len(plan.missing) <= 1 + planning.SURVEY_TASKS
    covered = [i for first, last in plan.missing for i in range(first, last)]
    assert covered == list(range(n))


@pytest.fixture(scope="module")
def sky(tmp_path_factory):
    """Eight small frames on disk."""
    root = tmp_path_factory.mktemp("sky")
    simulate(str(root), frames=8, shape=(64, 64), ffir=False, **CCD1)
    return root


def test_every_frame_is_read_once(ministack, proxy, sky, tmp_path):
    bucket = ministack.bucket(public_read=True)
    fs = ministack.filesystem()
    files = sorted(sky.glob("ffi/**/*_ffic.fits"))
    for path in files:
        fs.pipe_file(f"{bucket}/{path.relative_to(sky)}", path.read_bytes())
    counter = proxy(ministack)
    options = counter.options(anon=True)
    dark, n = 3, len(files)
    job = planning.plan_build(
        str(tmp_path / "s.zarr"), root=bucket, storage_options=options, dark_frames=dark, **CCD1
    )
    assert not counter.reads("ffic")  # planning lists

    create_group(job.job.group, job.fields)
    counter.clear()
    survey = jobs._survey_step(job.job, job.frames, None, lambda *_: None)
    assert len(counter.reads("ffic")) == 4 * n  # header, three bands

    counter.clear()
    work.make_scene_group(job.job)
    assert len(counter.reads("ffic")) <= dark + 2 * planning.NOISE_FRAMES + 2  # and two full of light

    scene = work.scene_of_dataset(read_child(job.job.group, "scene"))
    counter.clear()
    work.reduce_frames(job.job, survey, plan_of(scene, Options(dark_frames=dark)))
    good = survey[survey["status"] == 0]
    assert len(counter.reads("ffic")) == len(good)
    assert counter.bytes_read("ffic") == good["end"].sum()


def test_survey_reads_a_few_per_cent(ministack, proxy):
    bucket = ministack.bucket(public_read=True)
    root = f"{bucket}/full"
    simulate(root, frames=1, ffir=False, storage_options=ministack.options(), **CCD1)
    counter = proxy(ministack)
    frames = tessbkg.list_ffis(root=root, storage_options=counter.options(anon=True), **CCD1)
    counter.clear()
    survey = survey_frames(frames, storage_options=counter.options(anon=True))
    assert counter.bytes_read("ffic") <= 0.03 * survey["end"].iloc[0]
    assert counter.bytes_read("ffic") <= 1.01 * planning.SURVEY_SHARE * survey["end"].iloc[0]


def links(root, files, n):
    """Fill `root` with `n` frames in order of time that are links to a few."""
    for i, key in enumerate(keys(n, sector=1, cadence=1800)):
        path = root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(files[i % len(files)])


PROCESS = """
import json, sys
from pathlib import Path
from tessbkg import jobs
from tessbkg import plan as planning
from tessbkg import tasks as work
from tessbkg.store import create_group, write_template

def peak():
    # not ru_maxrss, which begins with that of the process that started this one
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

root, store, dark, statistic = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
plan = planning.plan_build(
    store, root=root, sector=1, camera=1, ccd=4, dark_frames=dark, statistic=statistic
)
create_group(plan.job.group, plan.fields)
survey = jobs._survey_step(plan.job, plan.frames, None, lambda *_: None)
work.make_scene_group(plan.job)
scene = peak()
write_template(plan.job.group, work.make_template(plan.job, survey), plan.job.shard_frames)
peaks = []
for first, last in plan.missing:
    work.reduce_shard(plan.job, first, last)
    peaks.append(peak())
print(json.dumps([scene, *peaks]))
"""


def peaks(root, store, dark: int, statistic: str = "whole") -> list[int]:
    """Peak memory of a process after the scene and after each shard."""
    done = subprocess.run(
        [sys.executable, "-c", PROCESS, str(root), str(store), str(dark), statistic],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {name: str(value) for name, value in jobs.WORKER_ENVIRONMENT.items()},
    )
    return json.loads(done.stdout.splitlines()[-1])


linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc and malloc as in glibc")


@linux
@pytest.mark.slow
@pytest.mark.parametrize("statistic", ["whole", "rolling"])
def test_worker_stays_below_700_mb(tmp_path, statistic):
    made = tmp_path / "made"
    simulate(str(made), frames=4, ffir=False, **CCD1)
    links(tmp_path / "sky", sorted(made.glob("ffi/**/*_ffic.fits")), 24)
    scene, shard = peaks(tmp_path / "sky", tmp_path / "out.zarr", Options().dark_frames, statistic)
    assert scene < 700e6, scene
    assert shard < 700e6, shard


@linux
@pytest.mark.slow
def test_memory_does_not_grow_with_frames(sky, tmp_path):
    files = sorted(sky.glob("ffi/**/*_ffic.fits"))
    found = {}
    for n in (64, 1024):
        links(tmp_path / f"sky-{n}", files, n)
        found[n] = peaks(tmp_path / f"sky-{n}", tmp_path / f"{n}.zarr", 4)
    few, many = found[64], found[1024]
    assert len(few) == 2
    assert len(many) == 17
    assert many[-1] - many[1] < 7e6  # 1 % of the 700 MB that a worker of full frames may have
    assert many[-1] - few[-1] < 25e6  # survey and table of frames, in the same process here
