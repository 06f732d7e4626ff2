"""The whole job on full-size frames: S3 to S3 and S3 to disk, against a truth that the simulator knows."""

import numpy as np
import pytest
import xarray as xr

import tessbkg
from tessbkg.ccd import CCD
from tessbkg.demo import residual
from tessbkg.simulate import simulate

SKY = CCD(1, 1, 4)
IDENTITY = {"sector": 1, "camera": 1, "ccd": 4}


@pytest.fixture(scope="module")
def sky(tmp_path_factory):
    """Simulate 24 full-size frames with a momentum dump among them."""
    folder = tmp_path_factory.mktemp("sky")
    truth = simulate(str(folder), frames=24, kind="smooth", **IDENTITY)
    return folder, truth


@pytest.fixture(scope="module", params=["ministack", pytest.param("ceph", marks=pytest.mark.ceph)])
def server(request):
    return request.getfixturevalue(request.param)


@pytest.mark.slow
def test_a_sector_on_s3_builds_to_s3_and_to_disk(sky, server, tmp_path):
    folder, truth = sky
    public, own = server.bucket(public_read=True), server.bucket()
    server.filesystem().put(f"{folder}/ffi", f"{public}/ffi", recursive=True)
    source = {"root": public, "storage_options": server.options(anon=True)}
    target = {"store_options": server.options()}

    there = tessbkg.build(f"{own}/bkg.zarr", shard_frames=8, dark_frames=8, **target, **source, **IDENTITY)
    here = tessbkg.build(f"{tmp_path}/bkg.zarr", shard_frames=8, dark_frames=8, **source, **IDENTITY)
    assert there.counts == here.counts == {"good": 23, "rejected": 1}
    # One GET of header and science rows a frame, and not a byte more.
    assert set(there.frames["nbytes"]) == {0, 20_160 + 2048 * 2136 * 4}

    remote = tessbkg.open_background(f"{own}/bkg.zarr", **target, **IDENTITY).load()
    local = tessbkg.open_background(f"{tmp_path}/bkg.zarr", **IDENTITY).load()
    xr.testing.assert_identical(remote, local)
    plain = xr.open_zarr(
        f"{own}/bkg.zarr", group=SKY.group, consolidated=False, storage_options=server.options()
    )
    np.testing.assert_array_equal(plain["scattered_light"], local["scattered_light"])

    difference = residual(local, truth).to_numpy()
    error = local["scattered_light_err"].to_numpy()[local["frame_status"] == 0]
    assert np.median(np.abs(difference)) < 1.2 * np.median(error)
    assert np.abs(np.median(difference)) < 0.02
