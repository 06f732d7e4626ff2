"""Time binning: no frame lost, no gap crossed, vectors instead of angles."""

from __future__ import annotations

import dask.array as da
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from test_evaluation import CADENCE, dataset

from tessbkg.evaluation import evaluate
from tessbkg.ffi import FrameStatus
from tessbkg.timebins import bin_time


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def sky(ds, *, maps=True, seed=0):
    """Add bodies that sweep through azimuth 0 / 360, and what goes with them."""
    n, (ny, nx) = ds.sizes["time"], ds.scattered_light.shape[1:]
    turn = np.radians(350 + np.arange(n) * 2.0)
    y, x = np.meshgrid(np.linspace(-0.1, 0.1, ny), np.linspace(-0.1, 0.1, nx), indexing="ij")
    pixel = unit(np.stack([x + 0.2, y + 0.2, np.ones_like(x)], axis=-1))
    new = {"pixel_direction": (("y", "x", "xyz"), pixel)}
    for body, tilt in (("earth", 0.5), ("moon", 1.2)):
        direction = unit(
            np.stack([np.sin(tilt) * np.cos(turn), np.sin(tilt) * np.sin(turn), 0 * turn + np.cos(tilt)], -1)
        )
        new[f"{body}_direction"] = (("time", "xyz"), direction)
        new[f"{body}_boresight_angle"] = ("time", np.degrees(np.arccos(direction[:, 2])))
        new[f"{body}_boresight_azimuth"] = (
            "time",
            np.degrees(np.arctan2(direction[:, 1], direction[:, 0])) % 360,
        )
        new[f"{body}_elevation"] = ("time", 40 + 30 * np.sin(turn))
        new[f"{body}_spacecraft_azimuth"] = ("time", (355 + np.arange(n) * 3.0) % 360)
        new[f"{body}_distance"] = ("time", 1e5 + np.arange(n))
        if maps:
            angle, azimuth = slow_maps(direction, pixel)
            new[f"{body}_angle"] = (("time", "y", "x"), angle.astype("f4"), {"units": "degree"})
            new[f"{body}_azimuth"] = (("time", "y", "x"), azimuth.astype("f4"), {"units": "degree"})
    new["subspacecraft_longitude"] = ("time", (175 + np.arange(n) * 7.5 + 180) % 360 - 180)
    new["quality"] = ("time", (1 << np.arange(n) % 13).astype("i4"), {"flag_masks": np.array([1, 2])})
    new["ffi"] = ("time", np.array([f"frame {i}" for i in range(n)], dtype=object))
    return ds.assign(
        {name: value for name, value in new.items() if "y" in value[0] or "xyz" in value[0]}
    ).assign({name: value for name, value in new.items() if not ("y" in value[0] or "xyz" in value[0])})


def slow_maps(direction, pixel):
    """Angle and azimuth about each line of sight, from the camera's x axis towards z cross x."""
    n = pixel[None]
    x = np.array([1.0, 0, 0])
    p = unit(x - (n @ x)[..., None] * n)
    q = np.cross(n, p)
    e = direction[:, None, None, :]
    along, px, qx = (e * n).sum(-1), (e * p).sum(-1), (e * q).sum(-1)
    return np.degrees(np.arctan2(np.hypot(px, qx), along)), np.degrees(np.arctan2(qx, px)) % 360


def vector_mean(elevation, azimuth):
    """Azimuth of the mean of unit vectors."""
    length, turn = np.cos(np.radians(elevation)), np.radians(azimuth)
    return float(np.degrees(np.arctan2((length * np.sin(turn)).mean(), (length * np.cos(turn)).mean())) % 360)


times_of_frames = st.lists(st.sampled_from([1, 1, 1, 1, 2, 3, 4, 10, 60]), min_size=1, max_size=60).map(
    lambda steps: 1325 + CADENCE * np.cumsum(steps)
)


@settings(deadline=None, max_examples=100)
@given(
    time=times_of_frames,
    length=st.one_of(
        st.fixed_dictionaries({"hours": st.floats(0.5, 24)}),
        st.fixed_dictionaries({"cadences": st.integers(1, 30)}),
    ),
    data=st.data(),
)
def test_no_frame_is_lost_and_no_gap_is_crossed(time, length, data):
    status = data.draw(
        st.lists(st.sampled_from([0, 0, 0, 1, 4, 255]), min_size=len(time), max_size=len(time))
    )
    light = np.arange(len(time), dtype="f4").reshape(-1, 1, 1)
    number = xr.Variable("time", 1 << np.arange(len(time), dtype="i8"), {"flag_masks": [1]})
    ds = xr.Dataset(
        {
            "scattered_light": (
                ("time", "y", "x"),
                np.where(np.array(status) == 0, 1, np.nan)[:, None, None] * light,
            ),
            "scattered_light_err": (("time", "y", "x"), np.ones_like(light)),
            "frame_status": ("time", np.array(status, "u1")),
            "who": number,
        },
        {"time": time, "cadence": ("time", np.round((time - 1325) / CADENCE).astype("i4"))},
    )
    step = np.median(np.diff(time)) if len(time) > 1 else CADENCE
    if length.get("hours", 99) * (1 + 1e-6) < step * 24:
        with pytest.raises(ValueError, match="too small"):
            bin_time(ds, **length)
        return
    binned = bin_time(ds, **length)
    assert int(binned.n_frames.sum()) == status.count(0)
    assert int((binned.n_frames + binned.n_skipped).sum()) == len(time)
    members = [[i for i in range(len(time)) if int(who) >> i & 1] for who in binned.who.to_numpy()]
    assert [i for group in members for i in group if status[i] == 0] == np.flatnonzero(
        np.array(status) == 0
    ).tolist()
    limit = max(3 * step, 1 / 24) * (1 + 1e-5)
    for group, one in zip(members, range(binned.sizes["time"]), strict=True):
        inside = np.diff(time[group[0] : group[-1] + 1])
        assert not len(inside) or inside.max() <= limit
        width = length["hours"] / 24 if "hours" in length else length["cadences"] * CADENCE
        assert time[group[-1]] - time[group[0]] <= width * (1 + 1e-5)
        assert float(binned.time[one]) == pytest.approx(time[group].mean(), abs=1e-9)
        assert float(binned.cadence[one]) == pytest.approx(ds.cadence.to_numpy()[group].mean())
        if binned.frame_status[one] == 0:
            assert float(binned.scattered_light[one, 0, 0]) == pytest.approx(np.mean(group), rel=1e-6)
            assert float(binned.scattered_light_err[one, 0, 0]) == pytest.approx(len(group) ** -0.5, rel=1e-6)
            assert all(status[i] == 0 for i in group)
        else:
            assert np.isnan(binned.scattered_light[one, 0, 0])
            assert int(binned.frame_status[one]) == status[group[0]]
    assert (np.diff(binned.time) > 0).all()


def test_bins_of_hours_hold_whole_frames():
    ds = dataset(30)
    binned = bin_time(ds, hours=2)
    assert binned.n_frames.to_numpy().tolist() == [4] * 7 + [2]
    assert np.allclose(binned.scattered_light[0], ds.scattered_light[:4].mean("time"), rtol=1e-6)
    assert binned.scattered_light.dtype == np.float32
    assert np.allclose(binned.scattered_light_err[0], 0.25)
    assert binned.attrs["time_bin_hours"] == 2
    assert binned.scattered_light.attrs == ds.scattered_light.attrs
    assert bin_time(ds, cadences=4).n_frames.to_numpy().tolist() == [4] * 7 + [2]


def test_the_error_of_the_scene_does_not_average_down():
    ds = dataset(32)
    scene = np.full(ds.scattered_light.shape[1:], 0.3, "f4")
    ds = ds.assign(scene_err=(("y", "x"), scene))
    binned = bin_time(ds, cadences=16)
    assert np.allclose(binned.scattered_light_err, np.sqrt((0.5**2 - 0.3**2) / 16 + 0.3**2), rtol=1e-6)
    assert np.array_equal(binned.scene_err, scene)


def test_flags_are_joined_and_names_are_the_first():
    status = np.zeros(8, "u1")
    status[[0, 5]] = FrameStatus.REJECTED
    binned = bin_time(sky(dataset(8, status=status)), cadences=4)
    assert binned.quality.to_numpy().tolist() == [2 + 4 + 8, 16 + 64 + 128]
    assert binned.ffi.to_numpy().tolist() == ["frame 1", "frame 4"]
    assert binned.frame_status.to_numpy().tolist() == [0, 0]
    assert binned.n_skipped.to_numpy().tolist() == [1, 1]
    assert binned.earth_distance.to_numpy().tolist() == [1e5 + 2, 1e5 + (4 + 6 + 7) / 3]
    assert binned.time.to_numpy()[0] == pytest.approx(1325 + 2 * CADENCE)


def test_bins_without_a_good_frame_keep_their_place():
    status = np.zeros(12, "u1")
    status[4:8] = [FrameStatus.MISSING, 4, 4, 4]
    binned = bin_time(sky(dataset(12, status=status)), cadences=4)
    assert binned.frame_status.to_numpy().tolist() == [0, FrameStatus.MISSING, 0]
    assert binned.n_frames.to_numpy().tolist() == [4, 0, 4]
    assert np.isnan(binned.scattered_light[1]).all()
    assert np.isnan(binned.scattered_light_err[1]).all()
    assert np.isfinite(binned.earth_angle[1]).all()
    assert binned.time.to_numpy()[1] == pytest.approx(1325 + 5.5 * CADENCE)


def test_directions_are_averaged_and_angles_follow():
    ds = sky(dataset(10))
    binned = bin_time(ds, cadences=10)
    mean = unit(ds.earth_direction.mean("time").to_numpy())
    assert np.allclose(binned.earth_direction[0], mean)
    assert np.linalg.norm(binned.moon_direction[0]) == pytest.approx(1)
    angle, azimuth = slow_maps(mean[None], ds.pixel_direction.to_numpy())
    assert np.allclose(binned.earth_angle, angle, atol=0.005)
    assert np.allclose((binned.earth_azimuth - azimuth + 180) % 360, 180, atol=0.005)
    assert float(binned.earth_boresight_azimuth[0]) == pytest.approx(359, abs=1e-6)
    assert float(binned.earth_boresight_angle[0]) == pytest.approx(np.degrees(np.arccos(mean[2])), abs=1e-6)
    # 175, 182.5 ... 242.5: over the date line, in -180 .. 180
    assert float(binned.subspacecraft_longitude[0]) == pytest.approx(208.75 - 360, abs=1e-6)
    assert float(binned.earth_spacecraft_azimuth[0]) == pytest.approx(
        vector_mean(ds.earth_elevation, ds.earth_spacecraft_azimuth), abs=1e-6
    )
    assert ((binned.earth_azimuth >= 0) & (binned.earth_azimuth < 360)).all()


def test_maps_are_the_same_with_and_without_directions():
    ds = sky(dataset(40))
    with_directions = bin_time(ds, hours=3)
    without = bin_time(ds.drop_vars(["earth_direction", "moon_direction"]), hours=3)
    for body in ("earth", "moon"):
        assert np.allclose(with_directions[f"{body}_angle"], without[f"{body}_angle"], atol=0.005)
        apart = (with_directions[f"{body}_azimuth"] - without[f"{body}_azimuth"] + 180) % 360 - 180
        assert np.abs(apart * np.sin(np.radians(without[f"{body}_angle"]))).max() < 0.005


def test_lazy_equals_eager(monkeypatch):
    monkeypatch.setattr("tessbkg.timebins.BLOCK_FRAMES", 10)
    status = np.zeros(45, "u1")
    status[[3, 20, 21, 22, 23]] = 1
    eager = sky(dataset(45, status=status))
    lazy = eager.chunk({"time": 8})
    lazy = lazy.assign_coords({name: eager[name] for name in eager.coords})
    a, b = bin_time(eager, hours=2), bin_time(lazy, hours=2)
    assert isinstance(b.scattered_light.data, da.Array)
    assert isinstance(b.earth_angle.data, da.Array)
    xr.testing.assert_allclose(a, b.compute(scheduler="sync"), atol=1e-5)
    dropped = ["earth_direction", "moon_direction"]
    c, d = bin_time(eager.drop_vars(dropped), hours=2), bin_time(lazy.drop_vars(dropped), hours=2)
    xr.testing.assert_allclose(c, d.compute(scheduler="sync"), atol=1e-5)


def test_binned_light_can_be_evaluated():
    ds = dataset(32)
    binned = bin_time(ds, cadences=4)
    a = evaluate(ds, row=[60.0], column=[100.0], time=ds.time[2:29]).scattered_light
    b = evaluate(binned, row=[60.0], column=[100.0], time=ds.time[2:29]).scattered_light
    c = evaluate(binned, row=[60.0], column=[100.0], cadence=ds.cadence[2:29]).scattered_light
    assert np.allclose(a, b, rtol=1e-5)
    assert np.allclose(a, c, rtol=1e-5)


def test_a_built_store_can_be_binned(tmp_path):
    import tessbkg
    from tessbkg.simulate import simulate

    simulate(str(tmp_path / "sky"), frames=12, step=1, shape=(64, 64))
    store = str(tmp_path / "bkg.zarr")
    tessbkg.build(store, sector=1, camera=1, ccd=4, root=str(tmp_path / "sky"), dark_frames=2)
    ds = tessbkg.open_background(store, sector=1, camera=1, ccd=4)
    binned = tessbkg.bin_time(ds, hours=2).compute()
    assert binned.sizes["time"] == 3
    assert set(ds.variables) <= set(binned.variables)
    assert np.allclose(binned.btjd - binned.time, binned.barycorr)
    assert binned.ffi.to_numpy()[0] == ds.ffi.to_numpy()[0]


@pytest.mark.parametrize(
    ("change", "length", "message"),
    [
        (lambda ds: ds, {}, "either hours or cadences"),
        (lambda ds: ds, {"hours": 2, "cadences": 4}, "either hours or cadences"),
        (lambda ds: ds, {"hours": 0.2}, "hours=0.2 is too small: frames are 0.5 hours apart"),
        (lambda ds: ds, {"cadences": 0}, "cadences=0 is not allowed"),
        (lambda ds: ds.isel(time=slice(None, None, -1)), {"hours": 2}, "not in order of time"),
        (lambda ds: ds.isel(time=slice(0, 0)), {"hours": 2}, "no frame"),
        (lambda ds: bin_time(ds, hours=2), {"hours": 4}, "binned in time already"),
        (lambda ds: ds.drop_vars("time"), {"hours": 4}, "no time"),
    ],
)
def test_wrong_arguments_are_named(change, length, message):
    with pytest.raises(ValueError, match=message):
        bin_time(change(dataset(8)), **length)


def test_frames_without_a_time_go_with_the_one_before():
    time = 1325 + np.arange(8) * CADENCE
    time[[0, 5]] = np.nan
    status = np.zeros(8, "u1")
    status[[0, 5]] = FrameStatus.BAD_HEADER
    ds = dataset(8)
    ds = ds.assign_coords(time=time).assign(frame_status=("time", status))
    binned = bin_time(ds.drop_vars("cadence"), hours=2)
    assert int((binned.n_frames + binned.n_skipped).sum()) == 8
    assert np.isfinite(binned.time).all()
