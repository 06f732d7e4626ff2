"""The simulated frames and servers that the sections share."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

CCD1 = {"sector": 1, "camera": 1, "ccd": 4}
DARK_FRAMES = 10


def environment():
    """Keep the benchmarks apart from the user's accounts and proxies."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "FSSPEC_")) or name.lower().endswith("_proxy"):
            del os.environ[name]
    os.environ.update(
        AWS_ACCESS_KEY_ID="test",
        AWS_SECRET_ACCESS_KEY="test",
        AWS_DEFAULT_REGION="us-east-1",
        AWS_EC2_METADATA_DISABLED="true",
        AWS_CONFIG_FILE=os.devnull,
        AWS_SHARED_CREDENTIALS_FILE=os.devnull,
        NO_PROXY="*",
    )


def sky(cache: Path, kind: str, frames: int, shape=(2048, 2048)):
    """Simulate once and keep; return the root folder and the truth."""
    import xarray as xr

    from tessbkg.ccd import CCD
    from tessbkg.simulate import simulate

    root = cache / f"{kind}-{frames}-{shape[0]}"
    truth = f"{root}/truth/{CCD(**CCD1).group}.zarr"
    if not (root / "complete").exists():
        print(f"  simulating {frames} frames of {shape[0]} x {shape[1]}, {kind} ...", flush=True)
        simulate(str(root), frames=frames, shape=shape, kind=kind, seed=7, ffir=False, **CCD1)
        (root / "complete").touch()
    return root, xr.open_zarr(truth, consolidated=False, chunks=None)


def survey_and_scene(root: Path, options):
    """Do the survey and the scene as a build does; return the job, the survey and the scene."""
    import tempfile

    from tessbkg import jobs
    from tessbkg import plan as planning
    from tessbkg import tasks as work
    from tessbkg.store import create_group, read_child

    with tempfile.TemporaryDirectory(prefix="tessbkg-bench-") as folder:
        plan = planning.plan_build(f"{folder}/s.zarr", root=str(root), options=options, **CCD1)
        create_group(plan.job.group, plan.fields)
        survey = jobs._survey_step(plan.job, plan.frames, None, lambda *_: None)
        work.make_scene_group(plan.job)
        scene = work.scene_of_dataset(read_child(plan.job.group, "scene"))
    return plan.job, survey, scene


def binned_truth(truth, i, size):
    """Mean light of bins of `size` pixels of frame `i`."""
    light = truth["light"][i].to_numpy().astype(np.float64)
    n = size // 4
    return light.reshape(light.shape[0] // n, n, light.shape[1] // n, n).mean(axis=(1, 3))


@contextlib.contextmanager
def servers(tmp: Path, wanted=("ministack", "ceph")):
    """Run S3 servers on loopback; yield name to server, without those that cannot run here."""
    from servers import ceph_missing, run_ceph, run_ministack

    with contextlib.ExitStack() as stack:
        running = {}
        if "ministack" in wanted:
            (tmp / "ministack").mkdir()
            running["ministack"] = stack.enter_context(run_ministack(tmp / "ministack"))
        if "ceph" in wanted:
            if missing := ceph_missing():
                print(f"  {missing}")
            else:
                (tmp / "ceph").mkdir()
                running["ceph"] = stack.enter_context(run_ceph(tmp / "ceph"))
        yield running


def upload(server, root: Path, bucket: str):
    """Copy a simulated sector into a public bucket; return its URL."""
    url = server.bucket(bucket, public_read=True)
    fs = server.filesystem()
    for path in sorted((root / "ffi").rglob("*_ffic.fits")):
        fs.pipe_file(f"{url}/{path.relative_to(root)}", path.read_bytes())
    return url


def write_json(path: Path, content) -> None:
    path.write_text(json.dumps(content, indent=1, default=float) + "\n")
