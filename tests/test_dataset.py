"""The lazy path is the job, frame for frame and bit for bit."""

from __future__ import annotations

import json

import dask
import numpy as np
import pytest
import xarray as xr
from frames import CCD1, counted, memory_root, simulated
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import tessbkg
from tessbkg import MaskOptions, Options, build, open_background, open_ffis, scattered_light
from tessbkg.ccd import DROP_QUALITY
from tessbkg.dataset import digest, expected_noise, reduce_or_blank
from tessbkg.ffi import SCIENCE_END, FrameStatus
from tessbkg.geometry import MAP_BITS
from tessbkg.reduce import STATISTICS
from tessbkg.simulate import NOISE_A, NOISE_B

N = 20
BAD = {3: "garbage", 6: "zero", 10: "nan", 11: "no_wcs", 12: "dump", 15: "wrong_camera"}


@pytest.fixture(scope="module")
def sky():
    return simulated(N, shape=(64, 64), faults=BAD)


@pytest.fixture(scope="module")
def ffis(sky) -> xr.Dataset:
    return open_ffis(root=sky[0], **CCD1)


def built(root: str, **options) -> xr.Dataset:
    store = f"{memory_root()}/a.zarr"
    build(store, root=root, **CCD1, **options)
    return open_background(store, **CCD1)


def same(lazy: xr.Dataset, job: xr.Dataset) -> None:
    """Compare everything that both have; only values that passes over the wire twice differ in name."""
    for name in ("scattered_light", "scattered_light_err", "frame_status", "n_pixels", "filled"):
        np.testing.assert_array_equal(lazy[name], job[name], err_msg=name)
        assert lazy[name].dtype == job[name].dtype
        assert lazy[name].dims == job[name].dims
        for key, value in lazy[name].attrs.items():
            np.testing.assert_array_equal(value, job[name].attrs[key])
    for name in ("time", "btjd", "barycorr", "cadence", "quality", "ffi", "y", "x", "row", "column"):
        np.testing.assert_array_equal(lazy[name], job[name], err_msg=name)
    for name in ("title", "options", "dark_frames", "bin", "statistic", "wcs", "angles", "Conventions"):
        assert lazy.attrs[name] == job.attrs[name]


@settings(max_examples=8, deadline=None, phases=[Phase.explicit, Phase.generate])  # shrinking takes long
@given(data=st.data())
def test_lazy_is_job(sky, ffis, data):
    options = {
        "bin": data.draw(st.sampled_from([4, 8, 16, 32, 64])),
        "statistic": data.draw(st.sampled_from(STATISTICS)),
        "errors": data.draw(st.sampled_from(["model", "uncert"])),
        "dark_frames": data.draw(st.integers(1, 8)),
        "drop_quality": data.draw(st.sampled_from([0, DROP_QUALITY])),
        "mask": data.draw(st.sampled_from([None, MaskOptions()])),
        "angles": False,
    }
    job = {name: value for name, value in options.items() if value is not None}
    shard_frames = data.draw(st.integers(1, N + 3))
    with dask.config.set(scheduler=data.draw(st.sampled_from(["synchronous", "threads"]))):
        lazy = scattered_light(ffis, **options).compute()
    same(lazy, built(sky[0], shard_frames=shard_frames, **job))


@pytest.mark.parametrize("statistic", STATISTICS)
def test_every_statistic_and_the_angles(sky, ffis, statistic):
    lazy = scattered_light(ffis, bin=16, statistic=statistic, dark_frames=4).compute()
    job = built(sky[0], bin=16, statistic=statistic, dark_frames=4, shard_frames=8)
    same(lazy, job)
    extra = {name for name in lazy.variables if name.startswith(("earth", "moon", "sun"))}
    assert {name for name in job.variables if name.startswith(("earth", "moon", "sun"))} == extra
    for name in extra:
        # Of maps the last bit that is kept may be another: a product of matrices of another shape.
        rtol = 1.01 * 2.0**-MAP_BITS if lazy[name].dims == ("time", "y", "x") else 1e-6
        np.testing.assert_allclose(lazy[name], job[name], rtol=rtol, err_msg=name)


def test_frames_by_status(sky, ffis):
    lazy = scattered_light(ffis, dark_frames=4, angles=False).compute()
    status = lazy["frame_status"].to_numpy()
    assert {i: int(status[i]) for i in BAD} == {3: 3, 6: 5, 10: 5, 11: 0, 12: 4, 15: 3}
    empty = np.isnan(lazy["scattered_light"]).all(("y", "x")).to_numpy()
    assert (empty == (status != FrameStatus.GOOD)).all()
    good = lazy.isel(time=status == FrameStatus.GOOD)
    assert np.isfinite(good["scattered_light"]).all()
    assert (good["scattered_light_err"] > 0).all()


def test_light_is_that_of_the_truth(sky, ffis):
    light = scattered_light(ffis, bin=16, statistic="median", dark_frames=4, angles=False).compute()
    truth = sky[1]["light"].coarsen(y=4, x=4).mean()
    good = light["frame_status"].to_numpy() == FrameStatus.GOOD
    assert good.sum() >= 10
    assert np.median(np.abs(light["scattered_light"] - truth.to_numpy())[good]) < 1
    assert np.corrcoef(
        light["scattered_light"].to_numpy()[good].ravel(), truth.to_numpy()[good].ravel()
    )[0, 1] > 0.995  # fmt: skip


# --- laziness ----------------------------------------------------------------------------------------------


def test_what_is_read_and_when(sky, ffis):
    with counted() as log:
        light = scattered_light(ffis, dark_frames=3, angles=False)
        opening = len(log)
        good = int((ffis["frame_status"] == FrameStatus.GOOD).sum())
        assert opening <= 4 * (good + 5) + 3 + 3 * 4
        log.clear()
        light.isel(time=slice(4, 5))["scattered_light"].compute()
        assert [path.rpartition("/")[2] for path, *_ in log] == [str(ffis["ffi"].to_numpy()[4])]
        log.clear()
        light.compute()  # value and error of a frame come from one read
        names = [path.rpartition("/")[2] for path, *_ in log]
    assert len(names) == len(set(names)) <= good


def test_full_frames_cost_three_per_cent_and_the_dark_frames():
    root, _ = simulated(3, shape=(2048, 2048))
    ffis = open_ffis(root=root, **CCD1)
    with counted() as log:
        scattered_light(ffis, dark_frames=1, angles=False)
    large = [nbytes for *_, nbytes in log if nbytes > 1e6]
    small = [nbytes for *_, nbytes in log if nbytes <= 1e6]
    assert sum(small) <= 0.03 * 3 * SCIENCE_END
    assert len(large) <= 1 + 2 * 4


def test_a_scene_is_used_again(ffis):
    from tessbkg.dataset import _scene_of, _survey_of
    from tessbkg.survey import reject

    options = Options(dark_frames=4)
    scene = _scene_of(ffis, reject(_survey_of(ffis), DROP_QUALITY), options)
    with counted() as log:
        light = scattered_light(ffis.isel(time=slice(0, 2)), scene=scene, angles=False)
    assert log == []
    whole = scattered_light(ffis, dark_frames=4, angles=False)
    np.testing.assert_array_equal(light["scattered_light"], whole["scattered_light"][:2])


def test_selections_and_own_arrays():
    rng = np.random.default_rng(0)
    flux = rng.normal(100, 1, (6, 32, 32)).astype("f4")
    flux[3:] += np.linspace(0, 30, 3, dtype="f4")[:, None, None]
    ds = xr.Dataset({"flux": (("time", "y", "x"), flux)}, coords={"time": np.arange(6) / 48})
    light = scattered_light(ds, bin=8, dark_frames=2, statistic="mean").compute()
    assert light["scattered_light"].shape == (6, 4, 4)
    levels = light["scattered_light"].mean(("y", "x"))
    np.testing.assert_allclose(levels[5] - levels[0], 30, atol=1)
    assert "sector" not in light.attrs


def test_wrong_arguments(ffis):
    with pytest.raises(ValueError, match="no variable flux"):
        scattered_light(ffis.drop_vars("flux"))
    with pytest.raises(ValueError, match="no variable flux"):
        scattered_light(ffis.transpose("y", "x", "time"))
    with pytest.raises(ValueError, match="bin=3 is not allowed"):
        scattered_light(ffis, bin=3)


# --- options -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("bin", 3, "bin=3 is not allowed: it must divide 2048"),
        ("bin", 0, "bin=0 is not allowed"),
        ("bin", 4096, "bin=4096 is not allowed"),
        ("bin", 16.0, "bin=16.0 is not allowed"),
        ("bin", True, "bin=True is not allowed"),
        ("statistic", "mode", "statistic='mode' is unknown: allowed are .*median"),
        ("errors", "none", "errors='none' is unknown: allowed are 'model' and 'uncert'"),
        ("dark_frames", 0, "dark_frames=0 is out of range: allowed are 1 to 32"),
        ("dark_frames", 33, "dark_frames=33 is out of range"),
        ("drop_quality", -1, "drop_quality=-1 is out of range"),
        ("drop_quality", 65536, "drop_quality=65536 is out of range"),
    ],
)
def test_options_are_checked(name, value, match):
    with pytest.raises(ValueError, match=match):
        Options(**{name: value})


def test_options_are_plain_and_have_a_digest():
    options = Options(bin=np.int64(8))
    plain = options.as_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["bin"] == 8
    assert set(plain["mask"]) == set(MaskOptions.__dataclass_fields__)
    assert hash(options) == hash(Options(bin=8))
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": np.int64(1)})
    assert digest({"a": 1}) != digest({"a": 2})


def test_expected_noise_is_the_measured_law_at_thirty_minutes():
    assert expected_noise(1800 / 86400) == pytest.approx((NOISE_A, NOISE_B))
    assert expected_noise(200 / 86400) == pytest.approx((9 * NOISE_A, 9 * NOISE_B))


@pytest.mark.parametrize("fill", [0.0, np.nan])
def test_blank_frames_are_found(ffis, fill):
    from tessbkg.dataset import _scene_of, _survey_of, plan_of
    from tessbkg.survey import reject

    options = Options(dark_frames=4)
    plan = plan_of(_scene_of(ffis, reject(_survey_of(ffis), DROP_QUALITY), options), options)
    flux = np.full((64, 64), fill, dtype="f4")
    status, both = reduce_or_blank(flux, plan)
    assert status is FrameStatus.BLANK
    assert np.isnan(both).all()
    flux[13, 17] = -1  # a single pixel, not among those that are looked at first
    assert reduce_or_blank(flux, plan)[0] is FrameStatus.GOOD


def test_public_names():
    assert set(tessbkg.__all__) <= set(dir(tessbkg))
    for name in tessbkg.__all__:
        assert getattr(tessbkg, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = tessbkg.nothing
