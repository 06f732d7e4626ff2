"""Other formats: what goes in comes back, under the names of tess-backml."""

from __future__ import annotations

import importlib.util
import sys
import types

import numpy as np
import pytest
import xarray as xr
from astropy.io import fits
from click.testing import CliRunner
from test_evaluation import CADENCE, dataset, smooth
from test_timebins import sky

import tessbkg
from tessbkg.cli import main
from tessbkg.exports import export
from tessbkg.timebins import bin_time


def full(frames=30, **options):
    """A dataset with everything a store has."""
    status = np.zeros(frames, "u1")
    status[[3, 4]] = 1
    ds = sky(dataset(frames, status=status, **options))
    shape = ds.scattered_light.shape[1:]
    ds = ds.assign(
        n_pixels=(("y", "x"), np.full(shape, 200, "u2"), {"long_name": "unmasked pixels in the bin"}),
        earth_angular_radius=("time", np.linspace(1, 2, frames)),
        moon_angular_radius=("time", np.linspace(0.2, 0.3, frames)),
    )
    ds["frame_status"].attrs = {"flag_values": np.array([0, 1], "u1"), "flag_meanings": "good missing"}
    ds = ds.assign_coords(btjd=("time", ds.time.to_numpy() + 0.003))
    return ds.assign_attrs(statistic="median", fields='{"a": 1}', complete=1, noise=[0.1, 0.2])


@pytest.fixture(params=["numpy", "lazy"])
def source(request):
    ds = full()
    return ds if request.param == "numpy" else ds.chunk({"time": 8})


def test_npz_has_the_keys_of_the_prior_art_and_right_values(source, tmp_path):
    export(source, tmp_path / "light.npz", format="npz")
    good = np.flatnonzero(source.frame_status == 0)
    with np.load(tmp_path / "light.npz", allow_pickle=False) as found:
        prior = ["scatter_cube", "time", "cadenceno"] + [
            f"{body}_{what}{end}"
            for body in ("earth", "moon")
            for what in ("alt", "az", "dist")
            for end in ("", "_map")
        ]
        assert set(prior) <= set(found)
        assert np.array_equal(found["scatter_cube"], source.scattered_light[good])
        assert np.allclose(found["time"], source.btjd[good] + 2457000, rtol=0, atol=1e-9)
        assert np.allclose(found["time_spacecraft"], source.time[good] + 2457000, rtol=0, atol=1e-9)
        assert np.array_equal(found["cadenceno"], source.cadence[good])
        assert np.array_equal(found["moon_az_map"], source.moon_azimuth[good])
        assert np.array_equal(found["moon_alt"], source.moon_boresight_angle[good])
        assert not np.array_equal(found["moon_alt"], found["earth_alt"])
        assert np.allclose(found["earth_dist"], 2 * source.earth_angular_radius[good])
        assert found["earth_dist_map"].shape == found["scatter_cube"].shape
        assert "not an altitude" in str(found["comment"])


def test_npz_leaves_out_what_is_not_there(tmp_path):
    export(dataset(), tmp_path / "light.npz", format="npz")
    with np.load(tmp_path / "light.npz") as found:
        assert "earth_alt" not in found
        assert np.allclose(found["time"], 2457000 + dataset().time)


def test_fits_has_the_layout_of_the_prior_art(source, tmp_path):
    path = tmp_path / "cube.fits"
    export(source, path, format="fits")
    good = np.flatnonzero(source.frame_status == 0)
    with fits.open(path, checksum=True) as hdus:
        hdus.verify("exception")
        assert [hdu.name for hdu in hdus] == ["PRIMARY", "SCATTER LIGHT CUBE", "PIXEL COUNTS", "TIME"]
        assert np.array_equal(hdus[1].data.T[0], source.scattered_light[good])
        assert np.array_equal(hdus[1].data.T[1], source.scattered_light_err[good])
        header = hdus[0].header
        assert (header["SECTOR"], header["CAMERA"], header["CCD"], header["PIXBIN"]) == (1, 4, 2, 16)
        assert (header["TIMSIZE"], header["IMGSIZEX"], header["IMGSIZEY"]) == hdus[1].data.T[0].shape
        assert np.allclose(hdus[3].data["time"], source.btjd[good] + 2457000, rtol=0, atol=1e-9)
        assert hdus[3].header["BINNED"] is False
        assert header["TSTART"] + 2457000 < hdus[3].data["time"][0]
        assert header["ROW1"] == 8.5
    export(bin_time(source, hours=2), path, format="fits")
    assert fits.getheader(path, 3)["BINNED"] is True


@pytest.mark.parametrize("engine", ["h5netcdf", "scipy"])
def test_netcdf_brings_everything_back(engine, source, tmp_path, monkeypatch):
    if engine == "h5netcdf":
        pytest.importorskip("h5netcdf")
        pytest.importorskip("h5py")
    else:
        real = importlib.util.find_spec
        monkeypatch.setattr(
            "importlib.util.find_spec",
            lambda name, *more: None if name in {"h5py", "netCDF4"} else real(name, *more),
        )
    path = tmp_path / "light.nc"
    export(source, path, format="netcdf")
    with xr.open_dataset(path, engine=engine, decode_times=False) as found:
        found.load()
        assert set(found.variables) == set(source.variables)
        for name in source.variables:
            mine, back = source[name].to_numpy(), found[name].to_numpy()
            assert mine.shape == back.shape
            if mine.dtype.kind == "O":
                assert mine.tolist() == back.astype(object).tolist()
            else:
                assert np.array_equal(mine, back, equal_nan=True)
            if engine == "h5netcdf" and mine.dtype.kind == "f":
                assert mine.dtype == back.dtype
        assert found.attrs["sector"] == 1
        assert found.attrs["fields"] == '{"a": 1}'
        assert np.allclose(found.attrs["noise"], [0.1, 0.2])
        assert np.asarray(found.frame_status.attrs["flag_values"]).tolist() == [0, 1]


def test_a_store_is_exported_from_the_command_line(tmp_path):
    from tessbkg.simulate import simulate

    simulate(str(tmp_path / "sky"), frames=8, step=1, shape=(128, 128))
    store = str(tmp_path / "bkg.zarr")
    tessbkg.build(store, sector=1, camera=1, ccd=4, root=str(tmp_path / "sky"), dark_frames=2)
    ds = tessbkg.open_background(store, sector=1, camera=1, ccd=4)
    for form, name in (("npz", "a.npz"), ("fits", "a.fits"), ("netcdf", "a.nc")):
        arguments = ["export", store, str(tmp_path / name), "--sector", "1", "--camera", "1", "--ccd", "4"]
        result = CliRunner().invoke(main, [*arguments, "--format", form])
        assert result.exit_code == 0, result.output
        assert str(tmp_path / name) in result.output
    with np.load(tmp_path / "a.npz") as found:
        assert np.array_equal(found["scatter_cube"], ds.scattered_light)
    assert np.array_equal(fits.getdata(tmp_path / "a.fits", 1).T[0], ds.scattered_light)
    with xr.open_dataset(tmp_path / "a.nc") as back:
        assert np.array_equal(back.scattered_light, ds.scattered_light)
        assert back.ffi.to_numpy().tolist() == ds.ffi.to_numpy().tolist()
    # the format follows from the name
    arguments[2] = str(tmp_path / "b.fits")
    assert CliRunner().invoke(main, arguments).exit_code == 0
    assert np.array_equal(fits.getdata(tmp_path / "b.fits", 1), fits.getdata(tmp_path / "a.fits", 1))
    arguments[2] = str(tmp_path / "b.what")
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "--format" in result.output
    assert not list(tmp_path.glob(".tessbkg-*"))


def test_a_url_is_written_and_old_files_are_replaced(tmp_path):
    import fsspec

    export(dataset(), "memory://exports/a.npz", format="npz")
    with fsspec.open("memory://exports/a.npz", "rb") as file, np.load(file) as found:
        assert found["scatter_cube"].shape == (20, 12, 10)
    (tmp_path / "a.npz").write_bytes(b"old")
    export(dataset(), tmp_path / "a.npz", format="npz")
    assert (tmp_path / "a.npz").stat().st_size > 1000


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (dataset(), {"format": "csv"}, "format='csv' is unknown"),
        ("store.zarr", {"format": "npz"}, "give sector, camera and ccd"),
        (dataset(2, status=[1, 1]), {"format": "npz"}, "no good frame"),
        (dataset().drop_vars("scattered_light"), {"format": "npz"}, "no scattered_light"),
        (dataset().drop_attrs(), {"format": "fits"}, "no attribute 'sector'"),
    ],
)
def test_wrong_arguments_are_named(source, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export(source, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        export(dataset(), tmp_path / "no" / "out.npz", format="npz")


@pytest.mark.filterwarnings("ignore")  # it never closes the file
def test_the_corrector_of_the_prior_art_opens_our_cube(tmp_path, monkeypatch):
    if importlib.util.find_spec("tess_backml") is None:
        pytest.skip("tess-backml is not installed")
    # tesscube asks the network for kernels when it is imported; the corrector needs none of it
    stand_in = types.ModuleType("tesscube")
    stand_in.TESSCube = None
    monkeypatch.setitem(sys.modules, "tesscube", stand_in)
    from tess_backml.corrector import ScatterLightCorrector

    ds = dataset(96)
    ds = ds.assign_coords(btjd=("time", ds.time.to_numpy() + 0.003))
    path = tmp_path / "cube.fits"
    export(bin_time(ds, hours=2), path, format="fits")
    corrector = ScatterLightCorrector(1, 4, 2, fname=str(path))
    row, column = np.arange(60.0, 71), np.arange(100.0, 111)
    time = ds.btjd.to_numpy()[20:60] + CADENCE / 3
    light, _ = corrector.evaluate_scatterlight_model(row, column, time + 2457000)
    assert light.shape == (40, 11, 11)
    # its grid of bin centres lies half a pixel beside the true one, along both axes
    true = smooth(row[:, None] + 0.5, column - 0.5, (time - 0.003)[:, None, None])
    assert np.allclose(light, true, rtol=1e-6)
