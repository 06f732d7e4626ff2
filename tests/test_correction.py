"""Target pixel files: conventions on real cutouts, every kind of source."""

from __future__ import annotations

import types
import warnings

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from astropy.io import fits
from astropy.wcs import WCS, Sip
from test_evaluation import BIN, CADENCE, dataset, smooth

from tessbkg.ccd import INDEX_EPOCH
from tessbkg.correction import correct

SECTOR_1 = "tess-s0001-4-2_84.291190_-80.469170_6x6_astrocut.fits"
SECTOR_12 = "tesscut_s0012-2-1_1x1.fits"


def whole_ccd(time, *, sector, camera, ccd):
    """Light on all 128 x 128 bins of a real CCD."""
    row = np.arange(128) * BIN + 8.5
    column = row + 44
    light = smooth(row[None, :, None], column[None, None, :], time[:, None, None]).astype("f4")
    return xr.Dataset(
        {
            "scattered_light": (("time", "y", "x"), light, {"units": "electron s-1"}),
            "scattered_light_err": (("time", "y", "x"), np.full_like(light, 0.5)),
            "frame_status": ("time", np.zeros(len(time), "u1")),
        },
        coords={
            "time": time,
            "cadence": ("time", np.round((time - INDEX_EPOCH) / CADENCE - 0.5).astype("i4")),
            "row": ("y", row),
            "column": ("x", column),
        },
        attrs={"sector": sector, "camera": camera, "ccd": ccd, "bin": BIN},
    )


def catalog(shared, sector, camera, ccd):
    frames = pd.read_parquet(shared / "catalogs" / f"tess-s{sector:04d}-spoc-ffi-catalog.parquet")
    frames = frames[(frames["camera"] == camera) & (frames["ccd"] == ccd)]
    return frames.sort_values("start")


def tjd(utc):
    """TJD, TDB, of UTC since 2017."""
    days = (utc - np.datetime64("2000-01-01T12:00:00")) / np.timedelta64(86400, "s")
    return days + 2451545 - 2457000 + 69.184 / 86400


def test_the_corner_of_a_real_cutout_is_a_1_based_ffi_pixel(shared):
    """The sector's own WCS (tesswcs 1.9.3, data of 1-4-2) puts the cutout's first pixel at its corner."""
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN-SIP", "DEC--TAN-SIP"]
    wcs.wcs.crpix = [1045, 1001]
    wcs.wcs.crval = [88.95150680729168, -75.39109469853312]
    wcs.wcs.cd = [[0.003964850685692, 0.004207152229236446], [-0.00411644588046, 0.003862117828093997]]
    sip = []
    for terms in (
        {(0, 2): -2.908879448968e-06, (1, 1): 1.690382324729e-05, (2, 0): -1.9099878062793e-05}
        | {(0, 3): 2.328506847732e-10, (1, 2): -2.838114576689e-09, (2, 1): 1.145327974329e-10}
        | {(3, 0): -2.774885040628e-09, (0, 4): -1.08703135606e-13, (1, 3): 2.812048243594e-13}
        | {(2, 2): -4.069582669142e-13, (3, 1): 3.203490662544e-13, (4, 0): -2.658883662984e-13},
        {(0, 2): 1.966898674179e-05, (1, 1): -1.644918688514e-05, (2, 0): 3.021614680345e-06}
        | {(0, 3): -2.7233609852637e-09, (1, 2): 1.362979317588e-10, (2, 1): -2.87379583589e-09}
        | {(3, 0): 2.466314458105e-10, (0, 4): 1.906625158516e-13, (1, 3): -3.58972645048e-13}
        | {(2, 2): 4.687212039928e-13, (3, 1): -2.464417783152e-13, (4, 0): 8.393483068741e-14},
    ):
        matrix = np.zeros((5, 5))
        for place, value in terms.items():
            matrix[place] = value
        sip.append(matrix)
    wcs.sip = Sip(*sip, None, None, wcs.wcs.crpix)
    with fits.open(shared / SECTOR_1) as hdus, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cutout = WCS(hdus[2].header)
        for x, y in ((1, 1), (6, 6)):
            column, row = wcs.all_world2pix(*cutout.all_pix2world(x, y, 1), 1)
            assert abs(column - (hdus[1].header["1CRV5P"] + x - 1)) < 0.1
            assert abs(row - (hdus[1].header["2CRV5P"] + y - 1)) < 0.1


def test_a_real_cutout_finds_the_frames_it_was_cut_from(shared):
    frames = catalog(shared, 1, 4, 2).iloc[:60]
    header = fits.getheader(shared / SECTOR_1)
    # the catalog has whole seconds of barycentric time, called UTC
    start, stop = (tjd(frames[name].to_numpy("M8[s]")) for name in ("start", "stop"))
    time = (start + stop) / 2 - frames["barycorr"].to_numpy()
    with fits.open(shared / SECTOR_1) as hdus:
        table = hdus[1].data
        spacecraft = table["TIME"] - table["TIMECORR"].astype("f8")
        stamps = [name[:17] for name in table["FFI_FILE"]]  # row and file are the same exposure
    place = {path.split("/")[-1][:17]: i for i, path in enumerate(frames["path"])}
    at = np.array([place[stamp] for stamp in stamps])
    assert np.abs(spacecraft - time[at]).max() * 86400 < 1.5
    ds = whole_ccd(time, sector=1, camera=4, ccd=2)
    assert int(ds.cadence[at[0]]) == header["FFIINDEX"]
    clean = correct(str(shared / SECTOR_1), ds)
    assert (clean.kind == 0).all()
    assert np.array_equal(clean.row, np.arange(257, 263))
    assert np.array_equal(clean.column, np.arange(1628, 1634))
    row, column = np.arange(257, 263)[:, None], np.arange(1628, 1634)[None, :]
    assert np.allclose(clean.scattered_light, smooth(row, column, time[at][:, None, None]), rtol=1e-6)
    with fits.open(shared / SECTOR_1) as hdus:
        assert np.allclose(clean.flux + clean.scattered_light, hdus[1].data["FLUX"], rtol=1e-6)
    by_cadence = correct(shared / SECTOR_1, ds, cadence=4697 + np.arange(50), match="cadence")
    assert np.array_equal(by_cadence.flux, clean.flux)
    assert np.isfinite(by_cadence.flux).all()


def test_a_real_cutout_with_rounded_times_takes_its_frames(shared):
    """TIME of 2019 is a mean of two float32: it jitters by seconds."""
    with fits.open(shared / SECTOR_12) as hdus:
        table = hdus[1].data
        spacecraft = table["TIME"] - table["TIMECORR"].astype("f8")
        index = np.round((spacecraft - INDEX_EPOCH) / CADENCE - 0.5)
        assert hdus[0].header["FFIINDEX"] == index[0] == 19080
        start = tjd(np.datetime64("2019-05-21T10:59:32"))  # tess2019141105932: start of the exposure, UTC
        assert abs(spacecraft[0] - (start + CADENCE / 2)) * 86400 < 10
    true = INDEX_EPOCH + (index + 0.5) * CADENCE
    offset = (spacecraft - true) * 86400
    assert 5 < np.ptp(offset) < 10
    assert np.abs(offset).max() < 60
    ds = whole_ccd(true[np.isfinite(true)], sector=12, camera=2, ccd=1)
    clean = correct(str(shared / SECTOR_12), ds)
    assert (clean.kind == 0).all()
    assert clean.row.to_numpy().tolist() == [1458]
    assert clean.column.to_numpy().tolist() == [379]
    assert np.allclose(clean.scattered_light[:, 0, 0], smooth(1458, 379, true), rtol=1e-6)


def test_light_of_another_ccd_is_refused(shared):
    ds = whole_ccd(1325.3 + np.arange(60) * CADENCE, sector=1, camera=4, ccd=1)
    with pytest.raises(ValueError, match="the pixels are of ccd 2, the light of ccd 1"):
        correct(str(shared / SECTOR_1), ds)


# ------------------------------------------------------------------ made by hand


def table(ds, *, row=40, column=70, frames=slice(None), shift=0.004, background=0.0, **columns):
    """A target pixel file: constant stars and the light, barycentric times."""
    time = ds.time.to_numpy()[frames]
    light = smooth(row + np.arange(5)[:, None], column + np.arange(4), time[:, None, None])
    cube = (50 + light).astype("f4")
    made = {
        "TIME": ("D", time + shift),
        "TIMECORR": ("E", np.full(len(time), shift, "f4")),
        "CADENCENO": ("J", np.zeros(len(time), "i4")),
        "RAW_CNTS": ("20J", np.zeros_like(cube, "i4")),
        "FLUX": ("20E", cube),
        "FLUX_ERR": ("20E", np.ones_like(cube)),
        "FLUX_BKG": ("20E", np.full_like(cube, background)),
        "QUALITY": ("J", np.arange(len(time), dtype="i4")),
        **columns,
    }
    made = {name: one for name, one in made.items() if one is not None}
    hdu = fits.BinTableHDU.from_columns(
        [
            fits.Column(name, form, array=values, dim="(4,5)" if form.startswith("20") else None)
            for name, (form, values) in made.items()
        ]
    )
    number = list(made).index("FLUX") + 1
    hdu.header[f"1CRV{number}P"], hdu.header[f"2CRV{number}P"] = column, row
    primary = fits.PrimaryHDU()
    primary.header["SECTOR"], primary.header["CAMERA"], primary.header["CCD"] = 1, 4, 2
    return fits.HDUList([primary, hdu])


def as_lightkurve(hdus, keep):
    """An object with the attributes that lightkurve's has: masked where its table is not."""
    data = hdus[1].data[keep]
    quantity = types.SimpleNamespace
    return types.SimpleNamespace(
        flux=quantity(value=np.array(data["FLUX"]), unit="electron / s"),
        flux_err=quantity(value=np.array(data["FLUX_ERR"])),
        time=quantity(value=np.array(data["TIME"]), format="btjd"),
        quality=np.array(data["QUALITY"]),
        row=hdus[1].header["2CRV5P"],
        column=hdus[1].header["1CRV5P"],
        hdu=hdus,
        quality_mask=keep,
    )


@pytest.mark.parametrize("source", ["file", "memory", "hdus", "lightkurve", "array", "frames"])
def test_every_source_gives_the_stars(source, tmp_path):
    ds = dataset(30)
    hdus = table(ds, frames=slice(2, 20))
    given, more = hdus, {}
    if source == "file":
        hdus.writeto(tmp_path / "tpf.fits")
        given = tmp_path / "tpf.fits"
    elif source == "memory":
        import fsspec

        with fsspec.open("memory://tpf.fits", "wb") as file:
            hdus.writeto(file)
        given = "memory://tpf.fits"
    elif source == "lightkurve":
        keep = np.ones(18, bool)
        keep[[3, 9]] = False
        given = as_lightkurve(hdus, keep)
    elif source == "array":
        given = np.array(hdus[1].data["FLUX"])
        more = {"row": 40, "column": 70 + np.arange(4), "time": ds.time[2:20]}
    elif source == "frames":
        where = {"row": ("y", 40 + np.arange(5)), "column": ("x", 70 + np.arange(4)), "time": ds.time[2:20]}
        given = xr.DataArray(np.array(hdus[1].data["FLUX"]), where, ("time", "y", "x"))
    clean = correct(given, ds, **more)
    assert clean.flux.shape == (16 if source == "lightkurve" else 18, 5, 4)
    assert clean.flux.dims == ("time", "y", "x")
    assert np.allclose(clean.flux, 50, atol=1e-3)
    assert (clean.kind == 0).all()
    assert clean.spacecraft_time[0] == pytest.approx(float(ds.time[2]), abs=1e-8)
    if source not in {"array", "frames"}:
        assert np.allclose(clean.flux_err**2, 1 + clean.scattered_light_err**2)
        assert clean.attrs["sector"] == 1


@pytest.mark.filterwarnings("ignore")  # of lightkurve
def test_lightkurve_itself(tmp_path):
    lightkurve = pytest.importorskip("lightkurve")
    ds = dataset(30)
    hdus = table(ds)
    hdus[0].header["TELESCOP"] = "TESS"
    hdus.append(fits.ImageHDU(np.full((5, 4), 3, "i4"), name="APERTURE"))
    hdus.writeto(tmp_path / "tpf.fits")
    tpf = lightkurve.TessTargetPixelFile(tmp_path / "tpf.fits", quality_bitmask="none")
    light = correct(tpf, ds).scattered_light.to_numpy()
    assert np.allclose((tpf - light).flux.value, 50, atol=1e-3)
    assert np.array_equal(light, correct(tmp_path / "tpf.fits", ds).scattered_light)


def test_a_series_faster_than_the_frames_is_interpolated():
    ds = dataset(30)
    fast = np.linspace(1325.01, 1325.5, 200)
    cube = smooth(40 + np.arange(5)[:, None], 70 + np.arange(4), fast[:, None, None]) + 50
    clean = correct(cube, ds, time=fast, row=40, column=70)
    assert (clean.kind == 1).mean() > 0.9
    assert np.allclose(clean.flux, 50, atol=1e-3)


def test_ffiindex_is_used_where_there_is_such_a_column():
    ds = dataset(30)
    index = ds.cadence.to_numpy()
    wrong_times = table(ds, FFIINDEX=("J", index), TIME=("D", np.full(30, 1325.2)))
    assert np.allclose(correct(wrong_times, ds).flux, 50, atol=1e-3)
    with pytest.raises(ValueError, match="has no such column"):
        correct(table(ds), ds, match="cadence")
    assert (correct(wrong_times, ds, match="time").kind == 1).all()


def test_images_without_time_stay_nan():
    ds = dataset(30)
    time = ds.time.to_numpy() + 0.004
    time[5] = np.nan
    clean = correct(table(ds, TIME=("D", time)), ds)
    assert np.isnan(clean.flux[5]).all()
    assert not np.isnan(clean.flux[6]).any()
    assert clean.kind.to_numpy()[5] == 3


def test_a_background_already_gone_is_told():
    ds = dataset(30)
    with pytest.warns(UserWarning, match="background was already subtracted"):
        correct(table(ds, background=3.0), ds)
    with pytest.warns(UserWarning, match="background was already subtracted"):
        correct(as_lightkurve(table(ds, background=3.0), np.ones(30, bool)), ds)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda ds: correct(table(ds, TIMECORR=None), ds), "no spacecraft times"),
        (lambda ds: correct(np.zeros((3, 2, 2)), ds, row=1, column=45), "no spacecraft times"),
        (lambda ds: correct(np.zeros((3, 2, 2)), ds, time=[1325] * 3), "does not say where it is: give row"),
        (lambda ds: correct(np.zeros((3, 2)), ds), "must be (time, y, x)"),
        (lambda ds: correct(np.zeros((3, 2, 2)), ds, row=1, column=[45, 46, 47], cadence=[1] * 3), "(2,)"),
        (lambda ds: correct(np.zeros((3, 2, 2)), ds, row=1, column=45, time=[1325.1]), "there are 3 images"),
        (lambda ds: correct(object(), ds), "not something to correct"),
        (lambda ds: correct(table(ds), ds, match="file"), "match='file' is unknown"),
        (lambda ds: correct(fits.HDUList([fits.PrimaryHDU()]), ds), "not a target pixel file"),
        (lambda ds: correct(table(ds, column=3), ds), "FFI columns are 45 to 204"),
    ],
)
def test_wrong_sources_are_named(call, message):
    import re

    with pytest.raises(ValueError, match=re.escape(message)):
        call(dataset(30))
