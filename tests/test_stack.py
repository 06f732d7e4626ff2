"""Opening FFIs reads headers, indexing reads the frames asked for, and every pixel is the right one."""

from __future__ import annotations

import dask
import fsspec
import numpy as np
import pytest
import xarray as xr
from astropy.io.fits import Header
from astropy.wcs import WCS
from frames import CCD1, SHAPE, contents, counted, encode_all, encoded, listed, simulated
from hypothesis import given, settings
from hypothesis import strategies as st

from tessbkg import open_ffis, read_ffi
from tessbkg.errors import CatalogError, FFIReadError
from tessbkg.ffi import HEADER_BYTES, SCIENCE_END, FrameStatus

N = 7


@pytest.fixture(scope="module")
def sky():
    root, truth = simulated(N)
    encode_all(root)
    return root, truth


@pytest.fixture(scope="module")
def ffis(sky) -> xr.Dataset:
    return open_ffis(root=sky[0], **CCD1)


# --- pixels ------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_slice_gives_the_right_pixels(ffis, data):
    def pick(n):
        index = st.integers(-n, n - 1)
        step = st.sampled_from([None, 1, 2, 5, -1, -3])
        edge = st.none() | index
        return data.draw(
            index | st.builds(slice, edge, edge, step) | st.lists(index, max_size=4, unique=True)
        )

    expected = np.stack([encoded(i) for i in range(N)])
    where = {"time": pick(N), "y": pick(SHAPE[0]), "x": pick(SHAPE[1])}
    for dim, index in where.items():
        expected = np.take(
            expected.swapaxes(0, {"time": 0, "y": 1, "x": 2}[dim]),
            np.arange(expected.shape[{"time": 0, "y": 1, "x": 2}[dim]])[index]
            if not isinstance(index, int)
            else [index],
            axis=0,
        ).swapaxes(0, {"time": 0, "y": 1, "x": 2}[dim])
    kept = {dim: [index] if isinstance(index, int) else index for dim, index in where.items()}
    with dask.config.set(scheduler="synchronous"):
        part = ffis[["flux", "flux_err"]].isel(kept).compute()
    np.testing.assert_array_equal(part["flux"], expected)
    np.testing.assert_array_equal(part["flux_err"], -expected)
    np.testing.assert_array_equal(part["row"], part["y"] + 1)
    np.testing.assert_array_equal(part["column"], part["x"] + 45)


def test_types(ffis):
    for name in ("flux", "flux_err"):
        assert ffis[name].dims == ("time", "y", "x")
        assert ffis[name].shape == (N, *SHAPE)
        assert ffis[name].dtype == np.float32
        assert ffis[name].chunks == ((1,) * N, SHAPE[:1], SHAPE[1:])
        assert ffis[name].attrs["units"] == "electron s-1"
    assert ffis["flux"].mean("time").compute().dtype == np.float32


# --- what is read, and when --------------------------------------------------------------------------------


def test_opening_reads_headers_and_indexing_reads_frames(sky):
    with counted() as log:
        ffis = open_ffis(root=sky[0], **CCD1)
        assert len(log) == N + 1  # and the header with the WCS
        assert all(end <= HEADER_BYTES for _, _, end, _ in log)
        log.clear()
        part = ffis["flux"].isel(time=[2]).sum(("y", "x")) * 2
        repr(ffis)
        assert log == []
        assert part.compute().item() == 2 * encoded(2).sum(dtype="f8").astype("f4")
        [(path, start, end, nbytes)] = log
        assert start == 0
        assert path.endswith(str(ffis["ffi"][2].item()))
        assert end == 20160 + SHAPE[0] * (SHAPE[1] + 88) * 4 == nbytes
        log.clear()
        ffis["flux_err"].isel(time=2).compute()
        assert len(log) == 2


def test_full_frames_over_s3(hadro, proxy):
    bucket, folder = hadro.bucket()
    simulated(2, shape=(2048, 2048), root=str(folder))
    front = proxy(hadro)
    ffis = open_ffis(root=bucket, storage_options=front.options(anon=True), **CCD1)
    assert front.bytes_read() <= 3 * HEADER_BYTES
    assert len(front.reads()) == 3
    front.clear()
    flux = ffis["flux"].isel(time=1).compute().to_numpy()
    [exchange] = front.log
    assert exchange.request.method == "GET"
    assert exchange.sent <= SCIENCE_END
    assert exchange.sent == 20160 + 2048 * 2136 * 4
    local = open_ffis(root=str(folder), **CCD1)
    np.testing.assert_array_equal(flux, read_ffi(local["url"].to_numpy()[1]).flux)


def test_cache_is_used_while_the_files_are_the_same(sky, tmp_path):
    root = sky[0]
    for cache in (str(tmp_path / "frames.csv"), f"{root}/cache/frames.csv"):
        plain = open_ffis(root=root, **CCD1)
        first = open_ffis(root=root, cache=cache, **CCD1)
        with counted() as log:
            again = open_ffis(root=root, cache=cache, **CCD1)
        assert len(log) == 1  # the header with the WCS
        for ds in (first, again):
            xr.testing.assert_identical(
                ds.drop_vars(["flux", "flux_err"]), plain.drop_vars(["flux", "flux_err"])
            )
        np.testing.assert_array_equal(again["flux"][3], encoded(3))
        other = open_ffis(listed(root).iloc[:3], cache=cache)
        assert other.sizes["time"] == 3


def test_cache_keeps_broken_frames(tmp_path):
    root, _ = simulated(4, faults={1: "garbage", 2: "empty"})
    cache = str(tmp_path / "frames.csv")
    first, again = (open_ffis(root=root, cache=cache, **CCD1) for _ in range(2))
    xr.testing.assert_identical(first.drop_vars(["flux", "flux_err"]), again.drop_vars(["flux", "flux_err"]))
    assert again["frame_status"].to_numpy().tolist() == [0, 3, 2, 0]


# --- coordinates -------------------------------------------------------------------------------------------


def test_coordinates_are_those_of_the_truth(sky, ffis):
    truth = sky[1]
    for name in ("time", "btjd", "barycorr"):
        np.testing.assert_allclose(ffis[name], truth[name], atol=1e-9, rtol=0)
        assert ffis[name].dtype == np.float64
        assert ffis[name].attrs["units"] == "d"
    for name in ("cadence", "quality", "ffi"):
        assert ffis[name].to_numpy().tolist() == truth[name].to_numpy().tolist()
    assert ffis["frame_status"].to_numpy().tolist() == [0] * N
    assert ffis["y"].to_numpy().tolist() == list(range(SHAPE[0]))
    assert ffis["row"].to_numpy().tolist() == list(range(1, SHAPE[0] + 1))
    assert ffis["column"].to_numpy().tolist() == list(range(45, 45 + SHAPE[1]))
    assert {name: ffis.attrs[name] for name in CCD1} == CCD1
    assert "since" not in ffis["time"].attrs["units"]


@pytest.mark.filterwarnings("ignore::astropy.wcs.FITSFixedWarning")
def test_wcs_is_that_of_a_frame(ffis):
    header = Header.fromstring(ffis.attrs["wcs"])
    wcs = WCS(header)
    ra, dec = wcs.all_pix2world(header["CRPIX1"], header["CRPIX2"], 1)
    assert (float(ra), float(dec)) == pytest.approx((header["CRVAL1"], header["CRVAL2"]), abs=1e-6)


def test_frames_are_in_order_of_time(sky):
    frames = listed(sky[0])
    ffis = open_ffis(frames.iloc[[5, 1, 3, 0]])
    assert (np.diff(ffis["time"]) > 0).all()
    assert ffis["ffi"].to_numpy().tolist() == frames["ffi"][[0, 1, 3, 5]].tolist()
    np.testing.assert_array_equal(ffis["flux"].isel(time=2), encoded(3))
    np.testing.assert_array_equal(open_ffis(frames["url"][4])["flux"][0], encoded(4))


# --- what is wrong -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def faulty():
    root, _ = simulated(
        9,
        faults={
            0: "zero",
            1: "nan",
            2: "garbage",
            3: "empty",
            4: "no_wcs",
            5: "wrong_camera",
            6: "wrong_naxis",
        },
    )
    return root


def test_broken_frames_keep_their_place(faulty, caplog):
    ffis = open_ffis(root=faulty, **CCD1)
    assert ffis["frame_status"].to_numpy().tolist() == [0, 0, 3, 2, 0, 3, 3, 0, 0]
    with counted() as log:
        flux = ffis["flux"].compute().to_numpy()
    assert len(log) == 5  # what is known to be broken is not read
    assert np.isnan(flux).all(axis=(1, 2)).tolist() == [n in {1, 2, 3, 5, 6} for n in range(9)]
    assert not flux[0].any()
    assert np.isnan(ffis["flux_err"].isel(time=3)).all()


def test_a_frame_that_breaks_later_is_nan_or_stops(sky, caplog):
    root, _ = simulated(3)
    flag, stop = (open_ffis(root=root, on_error=on_error, **CCD1) for on_error in ("flag", "raise"))
    url = flag["url"].to_numpy()[1]
    fsspec.filesystem("memory").pipe_file(url, contents(url)[:30_000])
    assert np.isnan(flag["flux"].isel(time=1)).all()
    assert "truncated" in caplog.text
    assert np.isfinite(flag["flux"].isel(time=[0, 2])).all()
    with pytest.raises(FFIReadError, match="truncated"):
        stop["flux"].isel(time=1).compute()
    assert np.isfinite(stop["flux"].isel(time=2)).all()


def test_on_error_raise_names_the_frame(faulty):
    with pytest.raises(FFIReadError, match=r"s_ffic.fits: no FITS header"):
        open_ffis(root=faulty, on_error="raise", **CCD1)
    with pytest.raises(ValueError, match="on_error='ignore' is unknown: allowed are 'flag' and 'raise'"):
        open_ffis(root=faulty, on_error="ignore", **CCD1)


def test_wrong_arguments(sky):
    root = sky[0]
    simulated(1, root=f"{root}/two")
    simulated(1, root=f"{root}/two", ccd=1)
    with pytest.raises(ValueError, match="frames are of 2 CCDs"):
        open_ffis(root=f"{root}/two", sector=1)
    with pytest.raises(ValueError, match="sector is missing"):
        open_ffis(root=root)
    with pytest.raises(CatalogError):
        open_ffis(root=root, sector=2, camera=1, ccd=4)
    with pytest.raises(ValueError, match="storage_options holds 'secret'"):
        open_ffis(root=root, storage_options={"secret": "x"}, **CCD1)


def test_status_values_have_meanings(ffis):
    attrs = ffis["frame_status"].attrs
    meanings = dict(zip(attrs["flag_values"].tolist(), attrs["flag_meanings"].split(), strict=True))
    assert meanings == {s.value: s.name.lower() for s in FrameStatus if s is not FrameStatus.NOT_WRITTEN}
    assert len(ffis["quality"].attrs["flag_masks"]) == len(ffis["quality"].attrs["flag_meanings"].split())
