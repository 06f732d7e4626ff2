"""Light at any pixel and time: the numbers, the spans, the gaps, the laziness."""

from __future__ import annotations

import dask
import dask.array as da
import numpy as np
import pytest
import xarray as xr
from scipy.interpolate import RectBivariateSpline

import tessbkg
from tessbkg.evaluation import evaluate, make_operator
from tessbkg.ffi import FrameStatus

CADENCE = 1800 / 86400
ROWS, COLUMNS = 12, 10
BIN = 16


def smooth(row, column, time):
    """Light that any cubic spline gets right, linear in time."""
    return 100 + 0.2 * row + 0.1 * column + 1e-3 * row * column + 30 * (time - 1325)


def dataset(frames=20, *, lazy=False, status=None, times=None, rng=None):
    time = 1325 + np.arange(frames) * CADENCE if times is None else np.asarray(times)
    frames = len(time)
    row, column = np.arange(ROWS) * BIN + 8.5, np.arange(COLUMNS) * BIN + 8.5 + 44
    light = smooth(row[None, :, None], column[None, None, :], time[:, None, None])
    if rng is not None:
        light = rng.normal(size=light.shape)
    light = light.astype("f4")
    error = np.full_like(light, 0.5)
    status = np.zeros(frames, "u1") if status is None else np.asarray(status, "u1")
    light[status != 0] = np.nan
    error[status != 0] = np.nan
    if lazy:
        light, error = (da.from_array(one, chunks=(8, -1, -1)) for one in (light, error))
    return xr.Dataset(
        {
            "scattered_light": (("time", "y", "x"), light, {"units": "electron s-1"}),
            "scattered_light_err": (("time", "y", "x"), error, {"units": "electron s-1"}),
            "frame_status": ("time", status),
        },
        coords={
            "time": time,
            "cadence": ("time", np.round((time - 1325) / CADENCE).astype("i4") + 4697),
            "row": ("y", row),
            "column": ("x", column),
        },
        attrs={"sector": 1, "camera": 4, "ccd": 2, "bin": BIN},
    )


@pytest.mark.parametrize("method", ["cubic", "linear"])
def test_a_plane_comes_back_anywhere_up_to_the_border(method):
    ds = dataset()
    rng = np.random.default_rng(1)
    row, column = rng.uniform(0.5, 192.5, 300), rng.uniform(44.5, 204.5, 300)
    row[:2], column[:2] = (1, 192), (45, 204)
    time = rng.uniform(1325, 1325 + 19 * CADENCE, 7)
    found = evaluate(ds, row=row, column=column, time=time, method=method).scattered_light
    expected = smooth(row, column, time[:, None])
    assert found.dims == ("time", "pixel")
    assert np.allclose(found, expected, rtol=3e-6)


def test_a_smooth_field_is_followed_by_the_spline_and_not_by_lines():
    ds = dataset(2)
    row, column = ds.row.to_numpy(), ds.column.to_numpy()

    def field(r, c):
        return 100 * np.sin(r / 30) * np.cos(c / 40)

    ds["scattered_light"][:] = field(row[:, None], column[None, :])
    r, c = np.arange(40, 150)[:, None], np.arange(80, 170)[None, :]
    worst = {
        method: np.abs(
            evaluate(ds, row=r, column=c, time=ds.time, method=method).scattered_light[0] - field(r, c)
        ).max()
        for method in ("cubic", "linear")
    }
    assert worst["cubic"] < 0.1 * worst["linear"]
    assert worst["cubic"] < 0.3


def test_the_spline_is_that_of_scipy_inside():
    rng = np.random.default_rng(2)
    ds = dataset(3, rng=rng)
    row, column = rng.uniform(70, 120, 50), rng.uniform(100, 140, 50)
    found = evaluate(ds, row=row, column=column, time=ds.time).scattered_light
    spline = RectBivariateSpline(ds.row, ds.column, ds.scattered_light[1].to_numpy(), s=0)
    # another condition at the border: its influence falls by 0.27 a bin
    assert np.allclose(found[1], spline.ev(row, column), atol=0.05)


def test_bins_have_their_own_values_and_errors():
    ds = dataset(4, rng=np.random.default_rng(3))
    found = evaluate(ds, row=ds.row.to_numpy()[:, None], column=ds.column.to_numpy()[None, :], time=ds.time)
    assert np.allclose(found.scattered_light, ds.scattered_light, atol=1e-5)
    assert np.allclose(found.scattered_light_err, 0.5, rtol=1e-5)
    assert (found.kind == 0).all()


@pytest.mark.parametrize("method", ["cubic", "linear"])
def test_errors_are_those_of_a_monte_carlo(method):
    rng = np.random.default_rng(4)
    ds = dataset(4000, times=1325 + np.arange(4000) * CADENCE, rng=rng)
    ds["scattered_light_err"][:] = 1
    row, column = np.array([96.0, 100.5, 2, 190, 90]), np.array([120.0, 131, 46, 203, 46])
    found = evaluate(ds, row=row, column=column, time=ds.time, method=method)
    assert np.allclose(found.scattered_light.std("time"), found.scattered_light_err[0], rtol=0.05)
    half = evaluate(ds, row=row, column=column, time=ds.time[:-1] + CADENCE / 2, method=method)
    assert np.allclose(half.scattered_light.std("time"), half.scattered_light_err[0], rtol=0.05)


@pytest.mark.parametrize("lazy", [False, True])
def test_the_error_of_the_scene_is_the_same_between_frames(lazy):
    ds = dataset(10, lazy=lazy)
    scene = np.full(ds.scattered_light.shape[1:], 0.3, "f4")
    ds = ds.assign(scene_err=(("y", "x"), scene))
    middle = ds.time[:2].to_numpy() + np.array([0, CADENCE / 2])
    found = evaluate(ds, row=ds.row[5:6].to_numpy(), column=ds.column[5:6].to_numpy(), time=middle)
    expected = [0.5, np.sqrt((0.5**2 - 0.3**2) / 2 + 0.3**2)]
    assert np.allclose(found.scattered_light_err[:, 0], expected, rtol=1e-5)


def test_shapes_broadcast_and_dataarrays_keep_their_names():
    ds = dataset()
    corner = np.array([[10, 60], [100, 150], [20, 70]])
    row, column = corner[:, :1, None] + np.arange(5)[None, :, None], corner[:, 1:, None] + np.arange(4)
    cube = evaluate(ds, row=row, column=column, time=ds.time[:6])
    assert cube.scattered_light.dims == ("time", "target", "pixel_y", "pixel_x")
    assert cube.scattered_light.shape == (6, 3, 5, 4)
    assert cube.row.shape == (3, 5, 4)
    one = evaluate(ds, row=float(row[1, 2, 0]), column=float(column[1, 0, 3]), time=ds.time[:6])
    assert one.scattered_light.dims == ("time",)
    assert np.allclose(one.scattered_light, cube.scattered_light[:, 1, 2, 3], rtol=1e-6)
    named = evaluate(
        ds,
        row=xr.DataArray(row[..., 0], dims=("star", "j")),
        column=xr.DataArray(column[:, 0], dims=("star", "i")),
        time=ds.time[:6],
    )
    assert named.scattered_light.dims == ("time", "star", "j", "i")
    assert np.allclose(named.scattered_light, cube.scattered_light.to_numpy(), rtol=1e-6)
    assert evaluate(ds, row=[20], column=[60], time=[]).scattered_light.shape == (0, 1)


@pytest.mark.parametrize("when", ["time", "cadence"])
def test_frames_not_good_are_skipped_and_gaps_are_not_crossed(when):
    status = np.zeros(30, "u1")
    status[4] = FrameStatus.MISSING
    status[[10, 11]] = FrameStatus.REJECTED
    status[16:22] = FrameStatus.UNREADABLE
    ds = dataset(30, status=status)
    found = evaluate(ds, row=[50.0], column=[100.0], **{when: ds[when]})
    expected = smooth(50.0, 100.0, ds.time.to_numpy())
    kind = np.zeros(30, int)
    kind[[4, 10, 11]] = 1
    kind[16:22] = 2
    assert found.kind.to_numpy().tolist() == kind.tolist()
    assert np.isnan(found.scattered_light[:, 0]).to_numpy().tolist() == (kind == 2).tolist()
    assert np.isnan(found.scattered_light_err[:, 0]).to_numpy().tolist() == (kind == 2).tolist()
    assert np.allclose(found.scattered_light[kind < 2, 0], expected[kind < 2], rtol=1e-6)
    assert found.scattered_light_err[4, 0] < found.scattered_light_err[3, 0]
    with pytest.raises(ValueError, match="6 times lie in gaps of the data, the first at"):
        evaluate(ds, row=[50.0], column=[100.0], gaps="raise", **{when: ds[when]})
    wide = evaluate(ds, row=[50.0], column=[100.0], max_gap=7, **{when: ds[when]})
    assert np.allclose(wide.scattered_light[:, 0], expected, rtol=1e-6)


def test_a_downlink_gap_keeps_its_edges():
    times = np.concatenate([1325 + np.arange(10) * CADENCE, 1327 + np.arange(10) * CADENCE])
    ds = dataset(times=times)
    edge = times[9]
    found = evaluate(
        ds,
        row=[50.0],
        column=[100.0],
        time=[edge, edge + 0.4 * CADENCE, edge + 0.6 * CADENCE, 1326.5, 1327 - 0.4 * CADENCE, np.nan],
    )
    assert found.kind.to_numpy().tolist() == [0, 1, 2, 2, 1, 3]
    value = found.scattered_light[:, 0].to_numpy()
    assert np.isnan(value).tolist() == [False, False, True, True, False, True]
    assert value[1] == value[0]
    assert value[4] == pytest.approx(smooth(50, 100, 1327), rel=1e-6)


def test_half_an_exposure_beyond_the_ends_is_in_the_first_and_last_frame():
    ds = dataset()
    found = evaluate(
        ds, row=[50.0], column=[100.0], time=[1325 - 0.4 * CADENCE, 1325 + 19.4 * CADENCE]
    ).scattered_light[:, 0]
    assert np.allclose(found, smooth(50, 100, np.array([1325, 1325 + 19 * CADENCE])), rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"time": [1324.9]}, "time spans 1324.9 to 1324.9, outside the data: 1325.00000 to 1325.39583"),
        ({"time": [2458325.1]}, "looks like a Julian date: subtract 2457000"),
        ({"cadence": [4600], "time": None}, "cadence spans 4600 to 4600, outside the data"),
        ({"row": [0.0]}, "row spans 0 to 0, outside the CCD: 1-based FFI rows are 1 to 192"),
        ({"column": [44.0]}, "outside the CCD: 1-based FFI columns are 45 to 204"),
        ({"column": [np.nan]}, "column is NaN, outside"),
        ({"row": [1.0, 2], "column": [50.0, 51, 52]}, "do not match"),
        ({"time": None}, "either time or cadence"),
        ({"cadence": [4700]}, "either time or cadence"),
        ({"method": "nearest"}, "method='nearest' is unknown"),
        ({"gaps": "ignore"}, "gaps='ignore' is unknown"),
        ({"max_gap": 0}, "max_gap=0"),
        ({"time": [["1325"]]}, "it must be a list of numbers"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        evaluate(dataset(), **{"row": [50.0], "column": [100.0], "time": [1325.1], **change})


def test_other_datasets_are_refused():
    with pytest.raises(ValueError, match="no scattered_light"):
        evaluate(dataset().drop_vars("scattered_light"), row=1, column=45, time=1325)
    with pytest.raises(ValueError, match="no good frame"):
        evaluate(dataset(3, status=[1, 1, 1]), row=1, column=45, time=1325)
    with pytest.raises(ValueError, match="no cadence numbers"):
        evaluate(dataset().drop_vars("cadence"), row=1, column=45, cadence=[4700])


def test_lazy_equals_eager_in_any_order_of_times():
    rng = np.random.default_rng(5)
    status = np.zeros(100, "u1")
    status[[7, 50]] = 1
    status[60:70] = 1
    eager = dataset(100, status=status)
    lazy = dataset(100, status=status, lazy=True)
    time = rng.uniform(1325, 1325 + 99 * CADENCE, 150)
    time[3] = np.nan
    row, column = rng.uniform(1, 192, 20), rng.uniform(45, 204, 20)
    a = evaluate(eager, row=row, column=column, time=time)
    b = evaluate(lazy, row=row, column=column, time=time)
    assert isinstance(b.scattered_light.data, da.Array)
    xr.testing.assert_identical(a, b.compute(scheduler="sync"))


def test_blocks_read_only_their_frames(monkeypatch):
    ds = dataset(100, lazy=True)
    seen = []

    def note(block, block_info=None):
        seen.append(block_info[0]["array-location"][0])
        return block

    ds["scattered_light"].data = ds["scattered_light"].data.map_blocks(note, dtype="f4")
    found = evaluate(ds, row=[20.0], column=[60.0], time=ds.time)
    seen.clear()
    found.scattered_light[:3].compute(scheduler="sync")
    assert max(last for _, last in seen) <= 64
    monkeypatch.setattr("tessbkg.evaluation.BLOCK_BYTES", 4 * 10)
    small = evaluate(ds, row=[20.0], column=[60.0], time=ds.time)
    assert small.scattered_light.chunks[0] == (10,) * 10
    with dask.config.set(scheduler="sync"):
        assert np.array_equal(small.scattered_light, found.scattered_light)


def test_missing_bins_stay_missing_and_spoil_nothing_else():
    ds = dataset(3)
    full = evaluate(ds, row=np.arange(1, 193)[:, None], column=np.arange(45, 205)[None, :], time=ds.time)
    ds["scattered_light"][1, 5, 5] = np.nan
    ds["scattered_light_err"][1, 5, 5] = np.nan
    found = evaluate(ds, row=np.arange(1, 193)[:, None], column=np.arange(45, 205)[None, :], time=ds.time)
    missing = np.isnan(found.scattered_light[1])
    assert missing.sum() == 32 * 32
    assert missing[89, 89]
    assert not np.isnan(found.scattered_light[[0, 2]]).any()
    good = ~missing.to_numpy()
    assert np.abs((found.scattered_light - full.scattered_light).to_numpy()[1][good]).max() < 8


def test_few_bins_are_interpolated_linearly_and_one_bin_is_constant():
    ds = dataset().isel(y=slice(0, 1), x=slice(0, 3))
    found = evaluate(ds, row=[1.0, 16], column=[60.0, 60], time=[1325.0]).scattered_light[0]
    assert found[0] == found[1]
    grid = np.array([8.5]), np.array([1.0, 2, 3])
    assert make_operator(grid, np.ones(1), np.ones(1), "cubic").prefilter is None


def test_light_of_a_built_store_is_that_of_the_truth(tmp_path):
    from tessbkg.simulate import light, simulate

    truth = simulate(str(tmp_path / "sky"), frames=24, shape=(512, 512), kind="smooth")
    store = str(tmp_path / "bkg.zarr")
    tessbkg.build(store, sector=1, camera=1, ccd=4, root=str(tmp_path / "sky"), dark_frames=4)
    ds = tessbkg.open_background(store, sector=1, camera=1, ccd=4)
    row, column = np.arange(100, 111)[:, None], np.arange(200, 211)[None, :]
    good = np.flatnonzero((ds.frame_status == 0).to_numpy())
    found = evaluate(ds, row=row, column=column, time=ds.time[good]).compute()
    dark = set(ds.attrs["dark_frames"].split())
    floor = [i for i in good if str(ds.ffi.to_numpy()[i]) in dark]
    brightest = int(found.scattered_light.mean(("pixel_y", "pixel_x")).to_numpy().argmax())
    true = light(truth, int(good[brightest]))[99:110, 155:166]
    base = np.median([light(truth, int(i))[99:110, 155:166] for i in floor], axis=0)
    expected = true - base
    assert expected.mean() > 100
    assert np.allclose(found.scattered_light[brightest], expected, rtol=0.01)
