"""The mission's own data, which lies beside the repository where it is at hand."""

from __future__ import annotations

import fsspec
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from astropy.io import fits
from astropy.wcs import WCS
from click.testing import CliRunner
from frames import memory_root
from test_catalog import touch

import tessbkg
from tessbkg.catalog import stamp_to_tjd
from tessbkg.ccd import INDEX_EPOCH
from tessbkg.cli import main

NAME = "tess2018206192942-s0001-1-4-0120-s_ffic.fits"
CCD1 = {"sector": 1, "camera": 1, "ccd": 4}


@pytest.fixture(scope="module")
def root(shared, tmp_path_factory):
    """Lay the trimmed FFI out as the bucket does."""
    root = tmp_path_factory.mktemp("real")
    folder = root / "ffi" / "s0001" / "2018" / "206" / "1-4"
    folder.mkdir(parents=True)
    (folder / NAME).write_bytes((shared / NAME).read_bytes())
    return str(root)


@pytest.fixture(scope="module")
def hdus(shared):
    with fits.open(shared / NAME, memmap=False) as opened:
        yield opened


def test_list(root):
    [row] = tessbkg.list_ffis(root=root, **CCD1).to_dict("records")
    assert row["ffi"] == NAME
    assert row["start"] == pytest.approx(1325.3131, abs=2 / 86400)


def test_read(root, hdus):
    url = tessbkg.list_ffis(root=root, **CCD1)["url"][0]
    frame = tessbkg.read_ffi(url, errors=True)
    assert frame.flux.shape == (128, 129)
    np.testing.assert_array_equal(frame.flux, hdus[1].data[0:128, 44:173])
    np.testing.assert_array_equal(frame.flux_err[:, :84], hdus[2].data[:128, 44:128])
    assert np.isnan(frame.flux_err[:, 84:]).all()
    assert frame.flux.dtype == np.float32
    # The sky begins at 0-based column 44: what lies left of it is half as bright.
    assert np.median(frame.flux[:, 0]) > 1.4 * np.median(hdus[1].data[:, 43])


def test_header(root, hdus):
    header = tessbkg.read_ffi(tessbkg.list_ffis(root=root, **CCD1)["url"][0]).header
    primary, image = hdus[0].header, hdus[1].header
    assert header.time == pytest.approx((primary["TSTART"] + primary["TSTOP"]) / 2, abs=1e-9)
    assert header.time + header.barycorr == pytest.approx((image["TSTART"] + image["TSTOP"]) / 2, abs=1e-12)
    assert header.barycorr == image["BARYCORR"] == pytest.approx(0.005678, abs=1e-6)
    assert header.quality == 0
    assert header.offset == 20160
    assert header.crval == (image["CRVAL1"], image["CRVAL2"])
    assert "FFIINDEX" not in primary
    assert header.cadence == 4697 == round((primary["TSTART"] - INDEX_EPOCH) * 48)
    assert header.science == (0, 128, 44, 173)


@pytest.mark.filterwarnings("ignore::astropy.wcs.FITSFixedWarning")
def test_open(root, hdus):
    ffis = tessbkg.open_ffis(root=root, **CCD1)
    assert dict(ffis.sizes) == {"time": 1, "y": 128, "x": 129}
    np.testing.assert_array_equal(ffis["flux"][0], hdus[1].data[:, 44:173])
    primary, image = hdus[0].header, hdus[1].header
    assert float(ffis["time"][0]) == pytest.approx((primary["TSTART"] + primary["TSTOP"]) / 2, abs=1e-9)
    assert float(ffis["btjd"][0]) == pytest.approx((image["TSTART"] + image["TSTOP"]) / 2, abs=1e-9)
    assert int(ffis["quality"][0]) == image["DQUALITY"]
    assert (int(ffis["row"][0]), int(ffis["column"][0])) == (1, 45)
    wcs = WCS(fits.Header.fromstring(ffis.attrs["wcs"]))
    ra, dec = wcs.all_pix2world(image["CRPIX1"], image["CRPIX2"], 1)
    assert (float(ra), float(dec)) == pytest.approx((image["CRVAL1"], image["CRVAL2"]), abs=1e-7)


def test_reduce_and_build(root, hdus, tmp_path):
    """One frame is its own scene: what is left of it is no light at all."""
    ffis = tessbkg.open_ffis(root=root, **CCD1)
    light = tessbkg.scattered_light(ffis, bin=16, dark_frames=1).compute()
    assert light["scattered_light"].shape == (1, 8, 8)  # the 129th column is no whole bin
    store = str(tmp_path / "a.zarr")
    report = tessbkg.build(store, root=root, bin=16, dark_frames=1, **CCD1)
    assert report.counts == {"good": 1}
    with xr.open_zarr(store, group="s0001/cam1/ccd4", consolidated=False) as ds:
        for name in ("scattered_light", "scattered_light_err", "n_pixels", "frame_status"):
            np.testing.assert_array_equal(ds[name], light[name])
        assert np.isfinite(ds["scattered_light"]).all()
        assert np.median(np.abs(ds["scattered_light"].to_numpy())) < 5
        assert ds["row"].to_numpy().tolist() == (8.5 + 16 * np.arange(8)).tolist()
        assert ds["column"].to_numpy().tolist() == (52.5 + 16 * np.arange(8)).tolist()
        assert ds["ffi"].to_numpy().tolist() == [NAME]


def test_reduction_equals_slicing_by_hand(root, hdus):
    from tessbkg import MaskOptions, Options
    from tessbkg.dataset import plan_of, reduce_or_blank
    from tessbkg.scene import Scene

    flux = hdus[1].data[:, 44:172].astype("f4")
    nothing = np.zeros_like(flux)
    scene = Scene(nothing, nothing, np.zeros(flux.shape, "u1"), (7.4e-4, 0.02), ())
    plan = plan_of(scene, Options(bin=16, statistic="median", mask=MaskOptions()))
    _, (value, _) = reduce_or_blank(flux, plan)
    blocks = flux.reshape(8, 16, 8, 16).transpose(0, 2, 1, 3).reshape(8, 8, 256)
    ordered = np.sort(blocks, axis=-1)
    assert (value >= ordered[..., 127]).all()
    assert (value <= ordered[..., 128]).all()


def test_times_of_many_frames_agree_with_the_names(shared):
    names = pd.read_parquet(shared / "catalogs" / "tess-s0001-spoc-ffi-catalog.parquet")
    names = names[(names["camera"] == 2) & (names["ccd"] == 2)]
    stamps = np.sort(stamp_to_tjd([path.rpartition("/")[2][4:17] for path in names["path"]]))
    start = np.sort(pd.read_csv(shared / "sector1_2_2_medians.csv").iloc[:, 0].to_numpy())
    assert len(start) == len(stamps) == 1282
    assert np.abs(start - stamps).max() * 86400 < 3


def test_real_cutout(shared):
    """The cadence numbers that the mission gave are those that are computed for files without them."""
    with fits.open(shared / "tess-s0001-4-2_84.291190_-80.469170_6x6_astrocut.fits") as hdus:
        table = hdus[1].data
        start = table["TIME"] - table["TIMECORR"] - 900 / 86400
        index = np.round((start - INDEX_EPOCH) * 48).astype(int)
        assert index.tolist() == list(range(hdus[1].header["FFIINDEX"], hdus[1].header["FFIINDEX"] + 50))


@pytest.mark.parametrize(("sector", "frames"), [(1, 1282), (2, 1245)])
def test_plan_of_a_real_sector_by_its_names(shared, sector, frames):
    names = pd.read_parquet(shared / "catalogs" / f"tess-s{sector:04d}-spoc-ffi-catalog.parquet")
    names = names[(names["camera"] == 1) & (names["ccd"] == 4)]
    root = memory_root()
    touch(root, names["path"].tolist())
    words = ["plan", "memory://out.zarr", "--sector", str(sector), "--camera", "1", "--ccd", "4"]
    result = CliRunner().invoke(main, [*words, "--root", root])
    assert result.exit_code == 0, result.output
    assert f"sector {sector} camera 1 CCD 4" in result.output
    assert f"{frames:,} from TJD" in result.output
    shards = -(-frames // 64)
    assert f"0 of {shards} shards" in result.output
    assert not fsspec.filesystem("memory").exists("/out.zarr")
