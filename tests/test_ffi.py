"""One FFI is read right, with the fewest bytes and requests, or fails with a typed error."""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import warnings

import fsspec
import numpy as np
import pytest
from astropy.io import fits
from frames import (
    SHAPE,
    contents,
    counted,
    edited,
    encoded,
    listed,
    memory_root,
    put,
    simulated,
    units,
    with_pixels,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import Fault

import tessbkg
from tessbkg import storage
from tessbkg.ccd import CCD
from tessbkg.errors import FFIFormatError, FFIMissingError, FFIReadError
from tessbkg.ffi import (
    _WANTED,
    BLOCK,
    HEADER_BYTES,
    SCIENCE_END,
    FrameStatus,
    error_status,
    parse_header,
    read_cards,
    read_errors_from,
    read_ffi,
    read_ffi_from,
    read_header_text,
)
from tessbkg.simulate import SENTINELS

OFFSETS = (14400, 17280, 20160, 23040, 25920, 28800, 31680)


@pytest.fixture(scope="module")
def one() -> bytes:
    """Return the bytes of a small FFI."""
    root, _ = simulated(1)
    return contents(listed(root)["url"][0])


@pytest.fixture(scope="module")
def full() -> str:
    """Return the URL of a full-size FFI whose every pixel says where it is."""
    root, _ = simulated(1, shape=(2048, 2048))
    data = contents(listed(root)["url"][0])
    image = np.arange(2078 * 2136, dtype="f4").reshape(2078, 2136)
    return put(with_pixels(with_pixels(data, image), -image, 2))


def memory(url):
    return fsspec.filesystem("memory"), fsspec.core.strip_protocol(url)


# --- pixels ------------------------------------------------------------------------------------------------


def test_science_pixels_of_a_full_frame_are_0_2048_44_2092(full):
    frame = read_ffi(full, errors=True)
    with fits.open(io.BytesIO(contents(full))) as hdus:
        assert hdus[1].data.shape == (2078, 2136)
        np.testing.assert_array_equal(frame.flux, hdus[1].data[0:2048, 44:2092])
        np.testing.assert_array_equal(frame.flux_err, hdus[2].data[0:2048, 44:2092])
    assert frame.flux[0, 0] == 44
    assert frame.flux[-1, -1] == 2047 * 2136 + 2091
    assert frame.header.science == (0, 2048, 44, 2092)
    assert frame.header.region == (1, 2048, 45, 2092)


def test_sentinels_of_other_columns_and_rows_never_leak(one):
    with fits.open(io.BytesIO(one)) as hdus:
        assert set(SENTINELS.values()) <= set(hdus[1].data.ravel())
        image = np.where(np.isin(hdus[1].data, list(SENTINELS.values())), 7e7, 1).astype("f4")
    frame = read_ffi(put(with_pixels(with_pixels(one, image), image, 2)), errors=True)
    assert (frame.flux == 1).all()
    assert (frame.flux_err == 1).all()


def test_pixels_are_native_float32_and_contiguous(one):
    frame = read_ffi(put(one), errors=True)
    for image in (frame.flux, frame.flux_err):
        assert image.shape == SHAPE
        assert image.dtype == np.dtype("f4")
        assert image.dtype.isnative
        assert image.flags.c_contiguous
        assert image.flags.writeable
    assert read_ffi(put(one)).flux_err is None


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_region_follows_the_header(one, data):
    rows, columns = (SHAPE[0] + 30, SHAPE[1] + 88)
    row0 = data.draw(st.integers(1, rows))
    row1 = data.draw(st.integers(row0, rows + 5))
    column0 = data.draw(st.integers(1, columns))
    column1 = data.draw(st.integers(column0, columns + 5))
    image = np.arange(rows * columns, dtype="f4").reshape(rows, columns)
    url = put(
        edited(
            with_pixels(with_pixels(one, image), -image, 2),
            SCIROWS=row0, SCIROWE=row1, SCCSA=column0, SCCED=column1,
        )
    )  # fmt: skip
    frame = read_ffi(url, errors=True)
    np.testing.assert_array_equal(frame.flux, image[row0 - 1 : row1, column0 - 1 : column1])
    np.testing.assert_array_equal(frame.flux_err, -image[row0 - 1 : row1, column0 - 1 : column1])


def test_special_pixels_come_through(one):
    image = np.zeros((SHAPE[0] + 30, SHAPE[1] + 88), dtype="f4")
    assert not read_ffi(put(with_pixels(one, image))).flux.any()
    image[:] = np.nan
    assert np.isnan(read_ffi(put(with_pixels(one, image))).flux).all()
    image[3, 50] = np.inf
    image[4, 50] = -1e-38
    flux = read_ffi(put(with_pixels(one, image))).flux
    assert flux[3, 6] == np.inf
    assert flux[4, 6] == np.float32(-1e-38)


# --- header ------------------------------------------------------------------------------------------------


def parsed_by_astropy(unit: bytes):
    header = fits.Header.fromstring(unit.decode("latin-1"))
    return {name: header[name] for name in _WANTED if name in header}


def test_own_parser_equals_astropy_on_simulated_headers():
    root, _ = simulated(
        5, faults={0: "no_wcs", 1: "offset", 2: "no_index", 3: "dump"}, sector=60, camera=3, ccd=2
    )
    urls = tessbkg.list_ffis(sector=60, root=root)["url"]
    assert len(urls) == 5
    for url in urls:
        data = contents(url)
        places = units(data)
        for first, last in ((0, places[1]), (places[1], places[2]), (places[3], places[4])):
            cards, end = read_cards(data, first, url)
            assert end == last
            assert cards == parsed_by_astropy(data[first:last])


def test_own_parser_equals_astropy_on_real_headers(shared):
    text = (shared / "ffic_headers_verbatim.txt").read_text()
    headers = [part.split("\n", 1)[1] for part in text.split("=====")[1:] if "\n" in part]
    wanted = 0
    for header in headers:
        lines = [line.ljust(80)[:80] for line in header.splitlines() if line.strip()]
        lines = [line for line in lines if not line.startswith("END ")]
        unit = "".join([*lines, "END".ljust(80)])
        unit = unit.ljust(-(-len(unit) // BLOCK) * BLOCK).encode("latin-1")
        cards, end = read_cards(unit, 0, "verbatim")
        assert end == len(unit)
        assert cards == parsed_by_astropy(unit)
        wanted += len(cards)
    assert len(headers) == 3
    assert wanted > 50


TEXT = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40).filter(
    lambda text: re.search(r"'\s*/", text) is None  # astropy 7 takes the rest of these for a comment
)
VALUES = st.one_of(
    st.integers(-(10**15), 10**15),
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
    TEXT.filter(lambda text: len(text.replace("'", "''")) < 60),
)


def unit_of(card: str) -> bytes:
    return "".join(
        [f"{'SIMPLE':8}= {'T':>20}".ljust(80), card.ljust(80), "END".ljust(80)]
    ).ljust(BLOCK).encode("ascii")  # fmt: skip


@given(value=VALUES, comment=st.text("abc /=0", max_size=20))
def test_own_parser_equals_astropy_on_cards_that_astropy_writes(value, comment):
    with warnings.catch_warnings():  # astropy cuts a comment that is too long
        warnings.simplefilter("ignore", fits.verify.VerifyWarning)
        card = fits.Card("TSTART", value, comment).image
    cards, _ = read_cards(unit_of(card), 0, "x")
    read_back = fits.Card.fromstring(card).value
    assert cards["TSTART"] == read_back
    assert type(cards["TSTART"]) is type(read_back)
    assert read_back == (value.rstrip() if isinstance(value, str) else pytest.approx(value, rel=1e-9))


@given(
    number=st.from_regex(r"[+-]?[0-9]{1,6}(\.[0-9]{0,8})?([ED][+-]?[0-9]{1,2})?", fullmatch=True),
    before=st.integers(0, 20),
    after=st.sampled_from(["", " ", " / comment", "/ it's 5 / 6"]),
)
def test_own_parser_equals_astropy_on_free_format(number, before, after):
    card = f"TSTART  = {' ' * before}{number}{after}"
    value = fits.Card.fromstring(card).value
    assert read_cards(unit_of(card), 0, "x")[0]["TSTART"] == value


@pytest.mark.parametrize("text", ["", "   ", "/ nothing", "(1, 2)", "'open", "1.2.3", "T F"])
def test_values_that_are_none_are_missing(text, one):
    assert read_cards(unit_of(f"TSTART  = {text}"), 0, "x")[0].get("TSTART") is None
    with pytest.raises(FFIFormatError, match="TSTART is missing"):
        read_ffi(put(edited(one, TSTART=text)))


def test_times_index_quality_wcs(one):
    header = parse_header(one, "x")
    with fits.open(io.BytesIO(one)) as hdus:
        primary, image = hdus[0].header, hdus[1].header
        assert header.time == pytest.approx((primary["TSTART"] + primary["TSTOP"]) / 2, abs=1e-9)
        assert header.barycorr == image["BARYCORR"]
        assert header.exposure == pytest.approx(1800 / 86400, abs=1e-9)
        assert header.cadence == primary["FFIINDEX"]
        assert header.crval == (image["CRVAL1"], image["CRVAL2"])
        assert header.release == (primary["DATA_REL"], primary["DATE"])
        assert (header.camera, header.ccd) == (1, 4)
    assert parse_header(edited(one, DQUALITY=4128), "x").quality == 4128


@pytest.mark.parametrize(("sector", "cadence"), [(1, 1800), (30, 600), (60, 200)])
def test_missing_index_is_computed(sector, cadence):
    with_index, truth = simulated(3, sector=sector)
    without, _ = simulated(3, sector=sector, ffiindex=False)
    for url, index in zip(listed(without, sector=sector)["url"], truth["cadence"].to_numpy(), strict=True):
        assert b"FFIINDEX" not in contents(url)[:BLOCK]
        header = read_ffi(url).header
        assert header.cadence == index
        assert header.exposure * 86400 == pytest.approx(cadence, abs=1e-4)
    assert [read_ffi(url).header.cadence for url in listed(with_index, sector=sector)["url"]] == list(
        truth["cadence"]
    )


def test_frame_without_wcs_is_normal():
    root, _ = simulated(1, faults={0: "no_wcs"})
    frame = read_ffi(listed(root)["url"][0])
    assert frame.header.crval is None
    assert frame.header.offset == 14400
    assert np.isfinite(frame.flux).all()


def test_header_text_is_that_of_the_flux(one):
    text = read_header_text(*memory(put(one)))
    with fits.open(io.BytesIO(one)) as hdus:
        assert fits.Header.fromstring(text) == hdus[1].header


# --- requests ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", OFFSETS)
def test_one_get_whatever_the_offset(one, offset):
    blocks = (offset - 2880) // BLOCK
    wcs = [f"{name}_{i}_{j}" for name in ("A", "B", "AP", "BP") for i in range(5) for j in range(5)]
    remove = wcs if offset < 20160 else ()
    data = edited(edited(one, 1, remove=remove, blocks=blocks), 2, remove=remove, blocks=blocks)
    assert units(data)[2] == offset
    url = put(data)
    with counted() as log:
        frame = read_ffi(url)
    assert len(log) == 1
    np.testing.assert_array_equal(frame.flux, read_ffi(put(one)).flux)
    assert frame.header.offset == offset
    np.testing.assert_array_equal(
        read_ffi(url, errors=True).flux_err, read_ffi(put(one), errors=True).flux_err
    )


def test_full_frame_is_one_get_of_half_the_file(full):
    with counted() as log:
        frame = read_ffi(full)
    [(_, start, end, nbytes)] = log
    assert (start, end) == (0, SCIENCE_END)
    assert nbytes == frame.nbytes == 31_680 + 17_498_112
    with counted() as log:
        end = frame.header.flux_end
        assert read_ffi_from(*memory(full), end=end).flux.shape == (2048, 2048)
    assert [(start, end) for _, start, end, _ in log] == [(0, 20160 + 17_498_112)]
    with counted() as log:
        frame = read_ffi(full, errors=True)
    assert len(log) == 2
    assert sum(nbytes for *_, nbytes in log) == frame.nbytes < 35.1e6
    with counted() as log:
        read_errors_from(*memory(full))
    assert [nbytes < limit for (*_, nbytes), limit in zip(log, (31_681, 17.6e6), strict=True)] == [True, True]


def test_second_get_only_when_the_header_says_so(one):
    data = edited(one, blocks=14)
    url = put(data)
    science = units(data)[2] + SHAPE[0] * (SHAPE[1] + 88) * 4
    for end, gets in ((science, 1), (science - 1, 2), (units(data)[2], 2), (HEADER_BYTES, 2)):
        with counted() as log:
            frame = read_ffi_from(*memory(url), end=end)
        assert len(log) == gets
        ends = [0, *itertools.accumulate(nbytes for *_, nbytes in log)]
        assert [start for _, start, *_ in log] == ends[:-1]  # no byte is read twice
        np.testing.assert_array_equal(frame.flux, read_ffi(put(one)).flux)


@pytest.mark.parametrize("protocol", ["file", "memory", "http", "s3"])
def test_every_protocol_gives_the_same(one, protocol, hadro, proxy, tmp_path):
    bucket, folder = hadro.bucket()
    name = "tess2018206192942-s0001-1-4-0120-s_ffic.fits"
    (folder / name).write_bytes(one)
    front = proxy(hadro)
    url, options = {
        "file": (str(folder / name), None),
        "memory": (put(one), None),
        "http": (f"{front.endpoint_url}/{bucket[5:]}/{name}", None),
        "s3": (f"{bucket}/{name}", front.options(anon=True)),
    }[protocol]
    frame = read_ffi(url, errors=True, storage_options=options)
    expected = read_ffi(put(one), errors=True)
    np.testing.assert_array_equal(frame.flux, expected.flux)
    np.testing.assert_array_equal(frame.flux_err, expected.flux_err)
    assert frame.header == expected.header
    if protocol in {"http", "s3"}:
        # The file is smaller than the first GET, so its uncertainties are all that is read again.
        assert len(front.log) == len(front.reads()) == 2
        assert not any(exchange.request.signed for exchange in front.log)


@pytest.mark.parametrize("kind", ["wrong_length", "truncate", "reset"])
def test_a_short_answer_is_read_on(one, hadro, proxy, kind, monkeypatch):
    monkeypatch.setattr(storage, "BACKOFF_SECONDS", 0.001)
    bucket, folder = hadro.bucket()
    (folder / "a_ffic.fits").write_bytes(one)
    expected = read_ffi(put(one), errors=True)
    for after, broken in itertools.product((1, 5000, 40_000), (0, 1)):
        front = proxy(hadro)
        left = iter(range(2))
        front.fault = lambda _, left=left, broken=broken, after=after: (
            Fault(kind, after=after) if next(left, None) == broken else None
        )
        frame = read_ffi(f"{bucket}/a_ffic.fits", errors=True, storage_options=front.options(anon=True))
        np.testing.assert_array_equal(frame.flux, expected.flux)
        np.testing.assert_array_equal(frame.flux_err, expected.flux_err)
        assert len(front.reads()) == 3


# --- what is wrong with a file -----------------------------------------------------------------------------


def fails(url, kind, match, status, **options):
    with pytest.raises(FFIReadError, match=match) as caught:
        read_ffi(url, **options)
    assert type(caught.value) is kind
    assert error_status(caught.value) is status
    assert url.rpartition("/")[2] in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value


def test_missing_file():
    error = fails(f"{memory_root()}/none_ffic.fits", FFIMissingError, "not found", FrameStatus.MISSING)
    assert isinstance(error, FileNotFoundError)


def test_empty_file():
    fails(put(b""), FFIReadError, "the file is empty", FrameStatus.UNREADABLE)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"\0" * 5000, "no FITS header at byte 0"),
        (b"<html>" * 1000, "no FITS header at byte 0"),
        (b"SIMPLE  =".ljust(80) + b"END".ljust(2800) + b"x" * 5000, "no FITS header at byte 2880"),
    ],
    ids=["zeros", "html", "no extension"],
)
def test_garbage(data, match):
    fails(put(data), FFIFormatError, match, FrameStatus.BAD_HEADER)


def test_folder_in_place_of_a_file(tmp_path):
    (tmp_path / "x_ffic.fits").mkdir()
    fails(str(tmp_path / "x_ffic.fits"), FFIReadError, "is a folder", FrameStatus.UNREADABLE)


def cuts(data):
    primary, flux, errors_header, errors = units(data)[1:]
    science = flux + SHAPE[0] * (SHAPE[1] + 88) * 4
    edges = (1, 9, 80, primary, primary + 1, primary + 80, flux, science)
    inner = sorted({*(edge + d for edge in edges for d in (-1, 0)), *range(100, science, science // 40)})
    return [cut for cut in inner if 0 < cut < science], science, (errors_header, errors)


def test_truncated_anywhere(one):
    places, science, _ = cuts(one)
    assert len(places) > 40
    for cut in places:
        fails(put(one[:cut]), FFIReadError, f"truncated.*{cut}", FrameStatus.UNREADABLE)
    assert read_ffi(put(one[:science])).flux.shape == SHAPE


def test_truncated_uncertainties_do_not_hurt_the_flux(one):
    _, science, (header, errors) = cuts(one)
    last = errors + SHAPE[0] * (SHAPE[1] + 88) * 4
    for cut in (science, header, header + 5, errors - 1, errors, errors + 1000, last - 1):
        url = put(one[:cut])
        assert read_ffi(url).flux.shape == SHAPE
        fails(url, FFIReadError, "truncated", FrameStatus.UNREADABLE, errors=True)
    assert read_ffi(put(one[:last]), errors=True).flux_err.shape == SHAPE


@pytest.mark.parametrize(
    ("cards", "match"),
    [
        ({"NAXIS": 3}, "not a float32 image"),
        ({"BITPIX": 16}, "not a float32 image"),
        ({"BITPIX": -64}, "not a float32 image"),
        ({"NAXIS1": 10**9}, "impossible image"),
        ({"NAXIS2": 10**9}, "impossible image"),
        ({"NAXIS1": 0}, "impossible image"),
        ({"NAXIS2": -5}, "impossible image"),
        ({"NAXIS1": "'many'"}, "NAXIS1 is 'many'"),
        ({"NAXIS1": "T"}, "NAXIS1 is True"),
        ({"BSCALE": 2.0}, "scaled"),
        ({"BZERO": 32768}, "scaled"),
        ({"TSTART": "NaN"}, "TSTART is nan"),
        ({"TSTOP": "1.0"}, "impossible exposure"),
        ({"SCIROWS": 0}, "no science pixels"),
        ({"SCCSA": 5000}, "no science pixels"),
        ({"SCIROWE": 0}, "no science pixels"),
    ],
    ids=str,
)
def test_wrong_values(one, cards, match):
    fails(put(edited(one, **cards)), FFIFormatError, match, FrameStatus.BAD_HEADER)


@pytest.mark.parametrize(
    "name",
    ["NAXIS1", "TSTART", "TSTOP", "BARYCORR", "DQUALITY", "CAMERA", "CCD", "SCIROWS", "SCCSA", "SCCED"],
)
def test_missing_keywords(one, name):
    fails(put(edited(one, remove=[name])), FFIFormatError, f"{name} is missing", FrameStatus.BAD_HEADER)


def test_header_without_end(one):
    for unit, size in ((0, 1 << 20), (1, 1 << 20), (0, 3000), (1, 200_000)):
        places = units(one)
        first, last = (0, places[1]) if unit == 0 else (places[1], places[2])
        header = one[first:last].replace(b"END" + b" " * 77, b"COMMENT".ljust(80))
        data = one[:first] + header + b"COMMENT".ljust(80) * (size // 80)
        kind, status = (
            (FFIFormatError, FrameStatus.BAD_HEADER)
            if size == 1 << 20
            else (FFIReadError, FrameStatus.UNREADABLE)
        )
        fails(put(data), kind, "no END card|ends in its header", status)


def test_promise_of_a_large_image_reads_no_more_than_there_is(one):
    url = put(edited(one, NAXIS1=4000, NAXIS2=4000, SCIROWE=4000))
    with counted() as log:
        fails(url, FFIReadError, "truncated", FrameStatus.UNREADABLE)
    assert sum(nbytes for *_, nbytes in log) <= len(one)


def test_wrong_camera_is_refused_when_it_is_known(one):
    url = put(edited(one, CAMERA=2))
    assert read_ffi(url).header.camera == 2
    with pytest.raises(FFIFormatError, match="header says camera 2 CCD 4, not camera 1 CCD 4"):
        read_ffi_from(*memory(url), ccd=CCD(1, 1, 4))
    with pytest.raises(FFIFormatError):
        read_errors_from(*memory(url), ccd=CCD(1, 1, 4))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_damage_escapes_its_type(one, data):
    """Whatever bytes are damaged: pixels come back, or a typed error."""
    damaged = bytearray(one[: data.draw(st.integers(0, len(one)))])
    places = units(one)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, places[2] + 100))
        piece = data.draw(st.binary(min_size=1, max_size=90) | st.sampled_from([b"END     ", b"=" * 90]))
        damaged[place : place + len(piece)] = piece
    url = put(bytes(damaged))
    with contextlib.suppress(FFIReadError):
        frame = read_ffi(url, errors=True)
        assert frame.flux.shape == frame.flux_err.shape == frame.header.science_shape
        assert frame.flux.dtype == np.float32


def test_errors_travel_between_processes():
    import pickle

    for error in (FFIReadError("k", "r"), FFIMissingError("k", "r"), FFIFormatError("k", "r")):
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error)
        assert (str(copy), copy.key, copy.reason) == ("k: r", "k", "r")


def test_encoded_frames_are_what_the_other_tests_think(one):
    assert encoded(3)[2, 5] == 3 * 64 * 96 + 2 * 96 + 5
    assert edited(one) == one
