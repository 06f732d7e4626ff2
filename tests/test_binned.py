"""Averages in time beside a CCD's frames: equal to those made of the finished store, and kept up to date."""

from __future__ import annotations

from pathlib import Path

import pytest
import xarray as xr
from frames import CCD1, simulated

import tessbkg
from tessbkg.check import check
from tessbkg.errors import StoreError
from tessbkg.jobs import local_cluster, run_build

FRAMES = 40
OPTIONS = {"dark_frames": 2, "shard_frames": 8}


@pytest.fixture(scope="module")
def sky(tmp_path_factory) -> str:
    root = str(tmp_path_factory.mktemp("sky"))
    simulated(FRAMES, shape=(64, 64), step=1, root=root, faults={3: "garbage", 9: "nan"})
    return root


@pytest.fixture
def store(tmp_path) -> str:
    return str(tmp_path / "s.zarr")


def assert_binned(store: str, hours: float) -> None:
    """Assert that a store holds the averages of its frames, and that nothing is wrong with it."""
    want = tessbkg.bin_time(tessbkg.open_background(store, **CCD1), hours=hours)
    xr.testing.assert_identical(tessbkg.open_background(store, **CCD1, binned=True).compute(), want.compute())
    assert check(store) == []


def test_a_build_writes_averages_in_time(sky, store):
    tessbkg.build(store, **CCD1, root=sky, bin_hours=2, **OPTIONS)
    assert_binned(store, 2)
    group = "s0001/cam1/ccd4/binned"
    with xr.open_zarr(store, group=group, consolidated=False, chunks=None) as plain:
        assert plain.scattered_light.dims == ("time_bin", "y", "x")
    with xr.open_datatree(store, engine="zarr", consolidated=False) as tree:
        assert tree[group].ds.sizes["time_bin"] == 10


def test_a_cluster_writes_the_same_averages(sky, store):
    with local_cluster(2) as client:
        tessbkg.build(store, **CCD1, root=sky, bin_hours=1, client=client, **OPTIONS)
    assert_binned(store, 1)


def test_averages_come_later_change_and_stay(sky, store):
    tessbkg.build(store, **CCD1, root=sky, **OPTIONS)
    with pytest.raises(StoreError, match=r"ccd4/binned is not there: build it with bin_hours"):
        tessbkg.open_background(store, **CCD1, binned=True)
    for hours in (2, 4.0):
        report = tessbkg.build(store, **CCD1, root=sky, bin_hours=hours, **OPTIONS)
        assert report.shards_done == 0
        assert_binned(store, hours)
    tessbkg.build(store, **CCD1, root=sky, **OPTIONS)
    assert_binned(store, 4)
    tessbkg.build(store, **CCD1, root=sky, overwrite=True, **OPTIONS)
    assert not Path(store, "s0001/cam1/ccd4/binned").exists()


def test_averages_follow_a_shard_that_is_mended(sky, store):
    tessbkg.build(store, **CCD1, root=sky, bin_hours=2, **OPTIONS)
    Path(store, "s0001/cam1/ccd4/frame_status/c/1").unlink()
    ffi = Path(tessbkg.list_ffis(**CCD1, root=sky)["url"][11].removeprefix("file://"))
    before = ffi.read_bytes()
    ffi.write_bytes(b"")
    tessbkg.build(store, **CCD1, root=sky, **OPTIONS)
    ffi.write_bytes(before)
    assert_binned(store, 2)
    assert tessbkg.open_background(store, **CCD1, binned=True).n_skipped.to_numpy().sum() == 3


@pytest.mark.parametrize("after", [0, 1, 4, 5])
def test_a_build_cut_off_while_averaging_goes_on(sky, store, after):
    plan = tessbkg.plan_build(store, **CCD1, root=sky, bin_hours=1, **OPTIONS | {"shard_frames": 4})

    def stop(step, done, total):
        if step == "bin" and done == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_build(plan, progress=stop)
    assert ["end of the build" in one.what for one in check(store)] == [True]
    seen = []
    run_build(plan, progress=lambda step, done, total: seen.append((step, done, total)))
    assert next(one for one in seen if one[0] == "bin") == ("bin", 0, 5 - after)
    assert_binned(store, 1)


@pytest.mark.parametrize("hours", [0, -1, 0.5, float("nan"), float("inf")])
def test_lengths_that_cannot_be_are_refused_at_once(sky, store, hours):
    with pytest.raises(ValueError, match=r"bin_hours=.* is not allowed: .* 0\.5 hours"):
        tessbkg.build(store, **CCD1, root=sky, bin_hours=hours, **OPTIONS)
    assert not Path(store).exists()
