"""The job: what it plans, reads, writes, reports, and how it goes on after a failure."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import numpy as np
import pandas as pd
import pytest
import xarray as xr
import zarr
from frames import CCD1, contents, counted, listed, memory_root, simulated
from hypothesis import given
from hypothesis import strategies as st

import tessbkg
from tessbkg import build, open_background, plan_build
from tessbkg.errors import CatalogError, FFIReadError, StoreMismatchError
from tessbkg.ffi import SCIENCE_END, FrameStatus
from tessbkg.jobs import local_cluster, run_build, spread
from tessbkg.store import NOT_WRITTEN, Group
from tessbkg.tasks import Job

N = 20
FEW = {"dark_frames": 4, "shard_frames": 8, **CCD1}
PLAIN = {**FEW, "angles": False}
FAULTS = {
    2: "garbage",
    4: "empty",
    7: "zero",
    8: "no_wcs",
    10: "nan",
    11: "wrong_camera",
    12: "wrong_naxis",
    13: "dump",
    14: "missing",
    15: "saturated",
    16: "duplicate",
    17: "no_index",
    18: "offset",
}


@pytest.fixture(scope="module")
def sky():
    return simulated(N, shape=(64, 64))[0]


@pytest.fixture(scope="module")
def reference(sky) -> xr.Dataset:
    store = f"{memory_root()}/a.zarr"
    build(store, root=sky, **FEW)
    return open_background(store, chunks=None, **CCD1).load()


def new() -> str:
    return f"{memory_root()}/a.zarr"


def plain(store: str, options=None, ccd=CCD1) -> xr.Dataset:
    """Open with xarray alone."""
    with xr.open_zarr(
        store,
        group=f"s{ccd['sector']:04d}/cam{ccd['camera']}/ccd{ccd['ccd']}",
        consolidated=False,
        storage_options=options,
    ) as ds:
        return ds.load()


def same(one: xr.Dataset, other: xr.Dataset) -> None:
    xr.testing.assert_identical(one.drop_attrs(deep=False), other.drop_attrs(deep=False))
    assert set(one.attrs) == set(other.attrs)
    for name, value in one.attrs.items():
        np.testing.assert_array_equal(value, other.attrs[name], err_msg=name)


# --- plan --------------------------------------------------------------------------------------------------


def test_a_plan_reads_nothing_and_says_what_there_is_to_do(sky):
    store = new()
    with counted() as log:
        plan = plan_build(store, root=sky, **FEW)
    assert log == []
    assert plan.missing == [(0, 8), (8, 16), (16, 20)]
    assert plan.steps == ("survey", "scene", "template")
    assert plan.tasks == 1 + 1 + 3
    assert plan.frames_to_read == N
    text = plan.explain()
    for part in ("sector 1 camera 1 CCD 4", store, "20 from TJD 1325.313", "bin 16", "0 of 3 shards"):
        assert part in text
    run_build(plan)
    plan = plan_build(store, root=sky, **FEW)
    assert (plan.missing, plan.steps, plan.tasks, plan.bytes_to_read) == ([], (), 0, 0)
    assert "3 of 3 shards" in plan.explain()


def test_a_plan_of_real_size_is_quick(monkeypatch):
    n = 11_775
    frames = pd.DataFrame(
        {
            "ffi": [f"tess{i:013d}-s0056-1-1-0243-s_ffic.fits" for i in range(n)],
            "url": [f"s3://stpubdata/tess/public/ffi/{i}" for i in range(n)],
            "sector": 56,
            "camera": 1,
            "ccd": 1,
            "start": 2825 + np.arange(n) * 200 / 86400,
            "size": 35_547_840,
        }
    )
    began = time.process_time()
    plan = plan_build(new(), files=frames)
    text = plan.explain()
    assert time.process_time() - began < 5
    assert len(plan.missing) == 184
    assert plan.tasks < 200
    assert 206e9 < plan.bytes_to_read < 215e9
    assert "11,775 from TJD" in text
    [gigabytes] = [float(line.split()[-2]) for line in text.splitlines() if line.startswith("over the wire")]
    assert gigabytes == pytest.approx(plan.bytes_to_read / 1e9, abs=0.01)
    doubled = plan_build(new(), files=frames, errors="uncert")
    assert doubled.bytes_to_read > 1.9 * plan.bytes_to_read


@given(st.integers(0, 300))
def test_spread_is_a_permutation_that_separates_neighbours(n):
    parts = [(i, i + 1) for i in range(n)]
    assert sorted(spread(parts)) == parts
    if n > 8:
        first = [a for a, _ in spread(parts)[:4]]
        assert np.diff(sorted(first)).min() >= n // 8


def test_frames_can_be_chosen(sky):
    names = listed(sky)["ffi"].tolist()
    for chosen in (slice(3, 9), slice(None, None, 7), slice(-4, None)):
        store = new()
        report = build(store, root=sky, frames=chosen, **PLAIN)
        assert report.frames["ffi"].tolist() == names[chosen]
        assert plain(store)["ffi"].to_numpy().tolist() == names[chosen]
    with pytest.raises(ValueError, match=r"frames=50:60:? selects none of 20 frames"):
        plan_build(new(), root=sky, frames=slice(50, 60), **FEW)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"shard_frames": 0}, "shard_frames=0 is out of range: allowed are 1 to 4096"),
        ({"shard_frames": 8.0}, "shard_frames=8.0"),
        ({"on_error": "skip"}, "on_error='skip' is unknown"),
        ({"bins": 16}, r"unknown option 'bins': did you mean 'bin'\? allowed are bin, statistic"),
        ({"bin": 15}, "bin=15 is not allowed"),
        ({"options": tessbkg.Options(), "bin": 8}, "options and 'bin' are both given"),
        ({"storage_options": {"key": "x"}}, "storage_options holds 'key'"),
        ({"store_options": {"client_kwargs": {"aws_secret_access_key": "x"}}}, "store_options holds"),
        ({"sector": None}, "sector is missing"),
        ({"camera": 9}, "camera=9 is out of range"),
        ({"camera": None, "ccd": None}, "frames are of 2 CCDs"),
    ],
    ids=str,
)
def test_wrong_arguments(arguments, match):
    root = "memory://wrong"
    if not fsspec.filesystem("memory").exists("/wrong"):
        simulated(1, root=root, shape=(16, 16))
        simulated(1, root=root, shape=(16, 16), ccd=1)
    with pytest.raises(ValueError, match=match):
        plan_build(new(), **{**CCD1, "root": root, **arguments})


def test_nothing_there():
    with pytest.raises(CatalogError, match="sector 3"):
        build(new(), sector=3, camera=1, ccd=1, root="memory://nothing")


def test_a_job_is_small_and_travels(sky):
    import pickle

    job = plan_build(new(), root=sky, storage_options={"client_kwargs": {"a": 1}}, **FEW).job
    assert isinstance(job, Job)
    assert pickle.loads(pickle.dumps(job)) == job
    assert hash(job)
    assert len(pickle.dumps(job)) < 2000


# --- store -------------------------------------------------------------------------------------------------


def test_golden_template(sky, reference):
    """A change of what a store holds is made here on purpose."""
    store = new()
    build(store, root=sky, **FEW)
    group = zarr.open_group(store, path="s0001/cam1/ccd4", mode="r", zarr_format=3)
    ny = nx = 4
    cube = ("float32", (N, ny, nx), (8, ny, nx), (8, ny, nx), ["time", "y", "x"])
    flat = ("float32", (N,), (N,), None, ["time"])
    golden = {
        "scattered_light": cube,
        "scattered_light_err": cube,
        "earth_angle": cube,
        "earth_azimuth": cube,
        "moon_angle": cube,
        "moon_azimuth": cube,
        "frame_status": ("uint8", (N,), (8,), None, ["time"]),
        "n_pixels": ("uint16", (ny, nx), (ny, nx), None, ["y", "x"]),
        "scene_err": ("float32", (ny, nx), (ny, nx), None, ["y", "x"]),
        "filled": ("uint8", (ny, nx), (ny, nx), None, ["y", "x"]),
        "time": ("float64", *flat[1:]),
        "btjd": ("float64", *flat[1:]),
        "barycorr": ("float64", *flat[1:]),
        "cadence": ("int32", *flat[1:]),
        "quality": ("int32", *flat[1:]),
        "level": flat,
        "ffi": ("StringDType()", *flat[1:]),
        "y": ("float64", (ny,), (ny,), None, ["y"]),
        "x": ("float64", (nx,), (nx,), None, ["x"]),
        "row": ("float64", (ny,), (ny,), None, ["y"]),
        "column": ("float64", (nx,), (nx,), None, ["x"]),
    }
    found = {
        name: (str(a.dtype), a.shape, a.chunks, a.shards, list(a.metadata.dimension_names))
        for name, a in group.arrays()
    }
    assert {name: found.get(name) for name in golden} == golden
    place = "distance boresight_angle boresight_azimuth elevation spacecraft_azimuth direction".split()
    light = "angular_radius phase_angle illuminated_fraction irradiance".split()
    about = {f"{body}_{what}" for body in ("earth", "moon", "sun") for what in place}
    about |= {f"{body}_{what}" for body in ("earth", "moon") for what in light}
    about |= {"subspacecraft_longitude", "field_angle", "pixel_direction", "ra", "dec", "xyz"}
    assert found.keys() == golden.keys() | about
    for name in ("scattered_light", "scattered_light_err", "earth_angle"):
        assert np.isnan(group[name].fill_value)
    assert group["frame_status"].fill_value == NOT_WRITTEN
    assert {
        "title", "sector", "camera", "ccd", "wcs", "bin", "statistic", "options", "dark_frames", "mask_bits",
        "source", "Conventions", "angles", "layout", "fields", "template", "complete",
    } <= set(group.attrs)  # fmt: skip
    json.dumps(dict(group.attrs), allow_nan=False)
    assert {"survey", "scene", "report"} <= set(group.group_keys())
    for name in reference.variables:
        if name not in {"ffi", "xyz"}:
            assert "long_name" in reference[name].attrs, name


def test_the_same_on_disk_as_in_memory(sky, reference, tmp_path):
    store = str(tmp_path / "a.zarr")
    assert build(store, root=sky, **FEW).shards_done == 3
    same(plain(store), reference)
    same(open_background(store, chunks=None, **CCD1).load(), reference)


def test_the_same_from_a_public_server_into_a_store_on_another(hadro, ministack, proxy):
    bucket, folder = hadro.bucket()
    root, _ = simulated(N, shape=(64, 64), root=str(folder))
    expected = new()
    build(expected, root=root, **PLAIN)
    expected = plain(expected)
    source, target = proxy(hadro), proxy(ministack)
    store = f"{ministack.bucket()}/a.zarr"
    places = {"storage_options": source.options(anon=True), "store_options": target.options()}
    build(store, root=bucket, **places, **PLAIN)
    same(plain(store, ministack.options()), expected)
    same(open_background(store, store_options=ministack.options(), **CCD1).load(), expected)
    assert source.reads()
    assert not any(exchange.request.signed for exchange in source.log)
    assert target.writes()
    assert all(exchange.request.signed for exchange in target.log)
    assert not any("_ffic" in exchange.request.path for exchange in target.log)
    # Headers, three bands, the frame; a few frames more for the scene, the noise and the WCS.
    good = int((expected["frame_status"] == FrameStatus.GOOD).sum())
    assert len(source.reads()) <= 4 * N + good + 4 + 3 * 4 + 1
    source.clear()
    target.clear()
    assert build(store, root=bucket, **places, **PLAIN).shards_done == 0
    assert source.reads() == target.writes() == []


def test_full_frames_cost_one_get_each():
    root, _ = simulated(3, shape=(2048, 2048), step=4)
    store = new()
    with counted() as log:
        report = build(store, root=root, dark_frames=1, angles=False, **CCD1)
    good = report.counts["good"]
    whole = [nbytes for _, start, _, nbytes in log if start == 0 and nbytes > 1e6]
    assert len(whole) <= good + 1 + 4 + 4  # dark and bright frames, and those the noise law is fitted to
    assert all(nbytes <= SCIENCE_END for nbytes in whole)
    assert report.nbytes <= good * SCIENCE_END


def test_several_ccds_in_one_store():
    root, _ = simulated(4, shape=(32, 32))
    simulated(3, root=root, shape=(32, 32), camera=2, ccd=1)
    simulated(2, root=root, shape=(32, 32), sector=2)
    store = new()
    ccds = [CCD1, {"sector": 1, "camera": 2, "ccd": 1}, {**CCD1, "sector": 2}]
    for ccd in ccds[::-1]:
        build(store, root=root, dark_frames=2, angles=False, **ccd)
    assert [plain(store, ccd=ccd).sizes["time"] for ccd in ccds] == [4, 3, 2]
    before = plain(store)
    build(store, root=root, dark_frames=1, angles=False, overwrite=True, **ccds[1])
    same(plain(store), before)


def test_two_processes_build_two_ccds_of_one_store_at_the_same_time(tmp_path):
    root, _ = simulated(8, shape=(32, 32), root=str(tmp_path / "sky"))
    simulated(8, shape=(32, 32), root=root, ccd=2)
    store = str(tmp_path / "a.zarr")
    script = (
        "import sys, tessbkg; tessbkg.build(sys.argv[1], root=sys.argv[2], sector=1, camera=1, "
        "ccd=int(sys.argv[3]), dark_frames=2, shard_frames=2, angles=False)"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", script, store, root, ccd], stderr=subprocess.PIPE
        )
        for ccd in ("4", "2")
    ]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
    for ccd in (4, 2):
        alone = new()
        build(alone, root=root, dark_frames=2, shard_frames=2, angles=False, sector=1, camera=1, ccd=ccd)
        place = {"sector": 1, "camera": 1, "ccd": ccd}
        same(plain(store, ccd=place), plain(alone, ccd=place))


# --- going on ----------------------------------------------------------------------------------------------


def test_a_finished_build_reads_no_pixel(sky, reference):
    store = new()
    first = build(store, root=sky, **FEW)
    with counted() as log:
        again = build(store, root=sky, **FEW)
    assert log == []
    assert (again.shards_done, again.nbytes) == (0, 0)
    pd.testing.assert_frame_equal(again.frames, first.frames)
    assert "everything was there already" in again.summary()
    same(plain(store), reference)


@pytest.mark.parametrize("step", ["survey", "scene", "template", "shard 0", "shard 1", "shard 2", "report"])
def test_going_on_after_a_failure_at_any_step(sky, reference, step, monkeypatch):
    from tessbkg import jobs, tasks

    class CrashError(Exception):
        pass

    count = iter(range(99))
    name = {"survey": "write_child", "scene": "make_scene", "template": "write_template"}.get(
        step, "write_shard"
    )
    name = "sizes_and_digests" if step == "report" else name
    module = tasks if name in {"make_scene", "write_shard"} else jobs
    original = getattr(module, name)

    def crash(*arguments, **options):
        if not step.startswith("shard") or next(count) == int(step[-1]):
            raise CrashError
        return original(*arguments, **options)

    store = new()
    monkeypatch.setattr(module, name, crash)
    with pytest.raises(CrashError):
        build(store, root=sky, **FEW)
    monkeypatch.undo()
    left = len(plan_build(store, root=sky, **FEW).missing)
    with counted() as log:
        report = build(store, root=sky, **FEW)
    assert report.shards_done == left
    assert len(report.frames) == N
    same(plain(store), reference)
    if step.startswith("shard"):  # neither the survey nor the scene is made again
        assert left == 3 - int(step[-1])
        assert len(log) <= 8 * left


@pytest.mark.parametrize("length", [None, 30])
def test_a_shard_without_status_is_written_again_torn_or_not(sky, reference, length):
    store = new()
    build(store, root=sky, **FEW)
    fs, root = fsspec.core.url_to_fs(f"{store}/s0001/cam1/ccd4")
    fs.rm_file(f"{root}/frame_status/c/1")
    for name in ("scattered_light", "earth_angle"):
        key = f"{root}/{name}/c/1/0/0"
        if length is None:
            fs.rm_file(key)
        else:
            fs.pipe_file(key, fs.cat_file(key)[:length])
    assert plan_build(store, root=sky, **FEW).missing == [(8, 16)]
    report = build(store, root=sky, **FEW)
    assert report.shards_done == 1
    assert len(report.frames) == N
    assert report.frames["ffi"].tolist() == reference["ffi"].to_numpy().tolist()
    same(plain(store), reference)


def test_other_parameters_are_refused_by_name_and_overwrite_helps(sky):
    store = new()
    build(store, root=sky, **PLAIN)
    before = plain(store)
    for other, match in (
        ({"bin": 8}, "bin: 16 there, 8 asked"),
        ({"dark_frames": 5}, "dark_frames: 4 there, 5 asked"),
        ({"shard_frames": 4}, "shard_frames: 8 there, 4 asked"),
        ({"frames": slice(0, 19)}, "frames: 20 there, 19 asked"),
    ):
        for call in (plan_build, build):
            with pytest.raises(StoreMismatchError, match=match):
                call(store, root=sky, **{**PLAIN, **other})
    same(plain(store), before)
    report = build(store, root=sky, overwrite=True, **{**PLAIN, "bin": 8})
    assert report.shards_done == 3
    assert plain(store)["scattered_light"].shape == (N, 8, 8)


# --- frames that are wrong ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def faulty():
    root, truth = simulated(24, shape=(128, 128), faults=FAULTS)
    urls = listed(root)["url"]
    fs = fsspec.filesystem("memory")
    fs.pipe_file(urls[0], contents(urls[0])[:100_000])  # the survey sees it
    fs.pipe_file(urls[1], contents(urls[1])[:130_000])  # only the reader sees it
    store = new()
    report = build(store, root=root, **FEW)
    return root, truth, store, report


def test_every_fault_has_its_status(faulty):
    _, truth, store, report = faulty
    ds = plain(store)
    names = truth["ffi"].to_numpy().tolist()
    kept = [i for i in range(24) if i != 14]  # what is missing from the listing is not known
    assert ds["ffi"].to_numpy().tolist() == [names[i] for i in kept]
    status = dict(zip(kept, ds["frame_status"].to_numpy().tolist(), strict=True))
    expected = {0: 2, 1: 2, 2: 3, 4: 2, 7: 5, 8: 0, 10: 5, 11: 3, 12: 3, 13: 4, 15: 4, 16: 0, 17: 0, 18: 0}
    assert {i: status[i] for i in expected} == expected
    empty = np.isnan(ds["scattered_light"]).all(("y", "x")).to_numpy()
    assert (empty == (ds["frame_status"] != FrameStatus.GOOD).to_numpy()).all()
    assert (np.isnan(ds["scattered_light_err"]).all(("y", "x")).to_numpy() == empty).all()
    assert report.frames["status"].tolist() == ds["frame_status"].to_numpy().tolist()


def test_the_report_says_why(faulty):
    *_, report = faulty
    bad = report.bad.set_index("ffi")["reason"]
    assert len(bad) == 8
    assert (bad.str.len() > 5).all()
    text = report.summary()
    for part in (
        "23 frames",
        "truncated",
        "no FITS header",
        "the file is empty",
        "camera 2 CCD 4",
        "nothing but",
    ):
        assert part in text
    assert sum(report.counts.values()) == 23
    assert report.counts["good"] == int((report.frames["status"] == 0).sum())


def test_times_stay_in_order(faulty):
    _, truth, store, _ = faulty
    ds = plain(store)
    assert (np.diff(ds["time"]) > 0).all()
    expected = np.delete(truth["time"].to_numpy(), 14)
    np.testing.assert_allclose(ds["time"], expected, atol=2 / 86400)


def test_dark_frames_are_good_ones(faulty):
    _, _, store, report = faulty
    dark = plain(store).attrs["dark_frames"].split()
    assert len(dark) in {3, 4}  # one is cut short where only its reader sees it
    status = report.frames.set_index("ffi")["status"]
    assert (status[dark] == 0).all()


@pytest.mark.parametrize("fault", ["garbage", "empty", "late"])
def test_on_error_raise_stops_and_names_the_frame(fault):
    root, truth = simulated(9, shape=(32, 32), faults={} if fault == "late" else {4: fault})
    name = str(truth["ffi"].to_numpy()[4])
    if fault == "late":
        url = listed(root)["url"][4]
        science = 20160 + 32 * 120 * 4
        fsspec.filesystem("memory").pipe_file(url, contents(url)[: science - 5])
    store = new()
    with pytest.raises(FFIReadError, match=name):
        build(store, root=root, on_error="raise", **{**PLAIN, "dark_frames": 1, "shard_frames": 2})
    with pytest.raises(tessbkg.errors.StoreError):
        open_background(store, **CCD1)
    report = build(store, root=root, **{**PLAIN, "dark_frames": 1, "shard_frames": 2})
    assert report.bad["ffi"].tolist() == [name]


def test_no_angles_says_why():
    root, _ = simulated(3, shape=(32, 32), faults=dict.fromkeys(range(3), "no_wcs"))
    report = build(new(), root=root, dark_frames=1, **CCD1)
    assert report.counts["good"] == 3
    assert isinstance(report.summary(), str)


def test_beyond_the_ephemeris_light_is_built_and_says_so():
    root, _ = simulated(3, shape=(32, 32), start=4100.0)
    store = new()
    report = build(store, root=root, dark_frames=1, **CCD1)
    assert report.counts["good"] == 3
    assert "no angles" in report.summary()
    assert "TJD 1270.5" in report.summary()  # the span, and below how to get more
    assert "horizons" in report.summary()
    ds = plain(store)
    assert "earth_angle" not in ds
    assert np.isfinite(ds["scattered_light"]).all()


def test_progress_counts_every_step(sky):
    seen = []
    build(new(), root=sky, progress=lambda *step: seen.append(step), **PLAIN)
    for step, total in (("survey", 1), ("scene", 1), ("reduce", 3)):
        counts = [done for name, done, of in seen if name == step and of == total]
        assert counts == list(range(total + 1))


# --- cluster -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client():
    with local_cluster(2) as client:
        yield client


def test_a_cluster_makes_the_same_store(client, reference, tmp_path):
    root, _ = simulated(N, shape=(64, 64), root=str(tmp_path))
    store = str(tmp_path / "a.zarr")
    report = build(store, root=root, client=client, **FEW)
    assert report.shards_done == 3
    same(plain(store), reference)
    assert all(
        worker["nthreads"] == 1 and "127.0.0.1" in address
        for address, worker in client.scheduler_info(n_workers=-1)["workers"].items()
    )
    again = build(store, root=root, client=client, **FEW)
    assert again.shards_done == 0


def test_a_cluster_is_not_given_the_memory_of_this_process(client, tmp_path):
    root, _ = simulated(3, shape=(64, 64))
    for store, source in (("memory://s.zarr", str(tmp_path)), (str(tmp_path / "s.zarr"), root)):
        if source != root:
            simulated(3, shape=(64, 64), root=source)
        with pytest.raises(ValueError, match="memory of this process"):
            tessbkg.build(store, **CCD1, root=source, client=client)


def test_the_memory_of_this_process_is_not_read_as_nan_on_a_cluster(client):
    root, _ = simulated(3, shape=(64, 64))
    tessbkg.build(f"{root}.zarr", **CCD1, root=root, dark_frames=2)
    light = open_background(f"{root}.zarr", **CCD1)["scattered_light"]
    with pytest.raises(Exception, match=r"memory:// is in the memory of one process"):
        light.compute()
    assert np.isfinite(light.compute(scheduler="synchronous")).all()


def test_an_error_on_a_cluster_arrives_as_itself(client, tmp_path):
    root, _ = simulated(6, shape=(32, 32), root=str(tmp_path), faults={2: "garbage"})
    with pytest.raises(FFIReadError, match="no FITS header"):
        build(str(tmp_path / "a.zarr"), root=root, client=client, on_error="raise", **PLAIN)


def test_groups_of_a_job_are_where_they_should_be(sky, tmp_path):
    store = tmp_path / "a.zarr"
    build(str(store), root=sky, **PLAIN)
    assert Path(store, "s0001", "cam1", "ccd4", "zarr.json").is_file()
    assert Group.of(str(store), tessbkg.CCD(**CCD1), None).name == f"{store}/s0001/cam1/ccd4"
