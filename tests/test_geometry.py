"""Angles of Earth and Moon: against the mission's files, astropy's own spheres, and events on record."""

import importlib
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from tessbkg.ephemeris import Ephemeris, lines_of_sight, read_tessvectors, tess_position
from tessbkg.errors import EphemerisRangeError
from tessbkg.geometry import (
    ATTRS,
    MAP_BITS,
    angle_maps,
    angles,
    boresight_angles,
    camera_frame,
    corner_directions,
    geometry,
    nominal_camera_frame,
    pixel_directions,
    point,
    round_bits,
)

DATA = Path(__file__).parent / "data"
CCDS = [(camera, ccd) for camera in (1, 2, 3, 4) for ccd in (1, 2, 3, 4)]
BAD = (2, 1)  # the archived solution of sector 1 camera 2 CCD 1 is wrong by up to 88 pixels
ROW = 8.5 + 256.0 * np.arange(8)
COLUMN = 52.5 + 256.0 * np.arange(8)
TIME = np.linspace(1325.4, 1353.0, 150)


def header(camera, ccd, *, scale=1.0, **cards):
    """FITS header of a CCD in sector 1: archived WCS, region keywords, CAMERA and CCD."""
    from astropy.io.fits import Header

    wcs = json.loads((DATA / "wcs_s0001.json").read_text())[f"{camera}-{ccd}"]
    out = Header()
    out["SIMPLE"] = True
    out["BITPIX"] = -32
    out["CAMERA"], out["CCD"] = camera, ccd
    out["SCCSA"], out["SCCED"], out["SCIROWS"], out["SCIROWE"] = 45, 2092, 1, 2048
    out["CTYPE1"], out["CTYPE2"], out["RADESYS"] = "RA---TAN-SIP", "DEC--TAN-SIP", "ICRS"
    for i in (1, 2):
        out[f"CRPIX{i}"], out[f"CRVAL{i}"] = wcs["CRPIX"][i - 1], wcs["CRVAL"][i - 1]
        for j in (1, 2):
            out[f"CD{i}_{j}"] = wcs["CD"][i - 1][j - 1] * scale
    for name in "AB":
        out[f"{name}_ORDER"] = len(wcs[name]) - 1
        for i, line in enumerate(wcs[name]):
            for j, value in enumerate(line):
                if value:
                    out[f"{name}_{i}_{j}"] = value
    out.update(cards)
    return out


def dataset(camera=1, ccd=4, time=TIME, **attrs):
    attrs = {"sector": 1, "camera": camera, "ccd": ccd, "wcs": header(camera, ccd).tostring()} | attrs
    return xr.Dataset(
        {"light": (("time", "y", "x"), np.zeros((len(time), len(ROW), len(COLUMN)), dtype=np.float32))},
        {"time": time, "row": ("y", ROW), "column": ("x", COLUMN)},
        attrs,
    )


def apart(a, b):
    """Angle between vectors, degrees."""
    return np.degrees(np.arctan2(np.linalg.norm(np.cross(a, b), axis=-1), np.sum(a * b, axis=-1)))


def around(a, b):
    """Difference of azimuths, degrees, -180 .. 180."""
    return (np.asarray(a) - np.asarray(b) + 180) % 360 - 180


# ---------------------------------------------------------------- against the mission


@pytest.mark.parametrize(("lag", "limit"), [(60.0, 0.02), (0.0, 0.1)])
def test_tessvectors_of_sector_1_camera_4(shared, lag, limit):
    rows = read_tessvectors(shared / "TessVectors_S001_C4_FFI.csv", lag=lag)
    sky = boresight_angles(rows.time, sector=1, camera=4)
    for body, truth in (("earth", rows.earth), ("moon", rows.moon)):
        distance = np.linalg.norm(truth, axis=1)
        angle = np.degrees(np.arccos(truth[:, 2] / distance))
        azimuth = np.degrees(np.arctan2(truth[:, 1], truth[:, 0]))
        assert np.abs(sky[f"{body}_boresight_angle"] - angle).max() < limit
        across = around(sky[f"{body}_boresight_azimuth"], azimuth) * np.sin(np.radians(angle))
        assert np.abs(across).max() < limit
        if lag:
            assert np.abs(sky[f"{body}_distance"] / distance - 1).max() < 2e-4
        assert apart(sky[f"{body}_direction"].values, truth).max() < limit


def test_spacecraft_angles_of_tessvectors(shared):
    import csv

    lines = (shared / "TessVectors_S001_C4_FFI.csv").read_text().splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith(",Cadence"))
    table = [row for row in csv.DictReader(lines[head:]) if float(row["Earth_Distance"]) > 0]
    column = {
        name: np.array([float(row[name]) for row in table]) for name in table[0] if "Spacecraft" in name
    }
    sky = boresight_angles(
        np.array([float(row["MidTime"]) for row in table]) - 60 / 86400, sector=1, camera=4
    )
    assert np.abs(sky["earth_elevation"] - column["Earth_Spacecraft_Angle"]).max() < 0.02
    assert np.abs(sky["moon_elevation"] - column["Moon_Spacecraft_Angle"]).max() < 0.02
    assert np.abs(around(sky["earth_spacecraft_azimuth"], column["Earth_Spacecraft_Azimuth"])).max() < 0.02
    # the Moon's spacecraft azimuth of the file is a copy of the Earth's; ours is the Moon's
    np.testing.assert_array_equal(column["Moon_Spacecraft_Azimuth"], column["Earth_Spacecraft_Azimuth"])
    assert np.abs(around(sky["moon_spacecraft_azimuth"], column["Moon_Spacecraft_Azimuth"])).max() > 90


def test_sector_1_moon_near_camera_1_on_the_last_day():
    sky = boresight_angles(np.linspace(1325.3, 1353.16, 1282), sector=1, camera=1)
    moon = sky["moon_boresight_angle"]
    assert float(moon[-1]) == pytest.approx(24.9, abs=0.2)
    assert np.all(moon[sky["time"] > 1352.7] < 30)
    assert not np.any(moon[(sky["time"] > 1331.8) & (sky["time"] < 1352.6)] < 30)


def test_sector_4_camera_1_is_flagged_exactly_when_earth_is_29_to_35_degrees_away(shared):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    frames = pandas.read_parquet(shared / "catalogs" / "tess-s0004-spoc-ffi-catalog.parquet")
    frames = frames[(frames.camera == 1) & (frames.ccd == 1)]
    day = [(pandas.to_datetime(frames[c]) - pandas.Timestamp("2000-01-01T12:00")) for c in ("start", "stop")]
    flagged = (frames.quality.to_numpy() & 2048) > 0
    assert flagged.sum() == 26

    def earth(days):  # barycentric UTC after J2000
        time = (days - 5455.0 + 69.184 / 86400 - frames.barycorr).to_numpy()
        return boresight_angles(time, sector=4, camera=1)["earth_boresight_angle"].values

    start, stop = (d.dt.total_seconds() / 86400 for d in day)
    at_start, at_middle = earth(start), earth((start + stop) / 2)
    assert at_start[flagged].min() > 28.9
    assert at_start[flagged].max() < 35.0
    assert at_start[~flagged].min() > 35.0  # exact: an exposure is flagged if it starts below 35 degrees
    assert at_middle[flagged].max() < 35.5
    assert at_middle[~flagged].min() > 34.6


def test_sector_5_camera_1_sees_earth_from_11_utc_on_2018_12_11():
    midnight = 2458463.5 - 2457000 + 69.184 / 86400  # 2018-12-11 00:00 UTC
    time = midnight + np.arange(0, 18 * 60) / 1440
    sky = boresight_angles(time, sector=5, camera=1)
    below = np.flatnonzero(sky["earth_boresight_angle"].values < 35)
    assert below[0] / 60 == pytest.approx(11.0, abs=0.25)
    assert np.all(np.diff(below) == 1)
    assert np.all(sky["earth_boresight_angle"].values[: below[0]] > 35)


def test_sun_is_behind_the_spacecraft_in_sector_1():
    sky = boresight_angles(np.linspace(1325.4, 1353.1, 100), sector=1, camera=1)
    assert np.all((sky["sun_elevation"] > -37) & (sky["sun_elevation"] < -34))
    assert np.abs(sky["sun_distance"] / 149597870.7 - 1.012).max() < 0.008


# ---------------------------------------------------------------- pixels and cameras


@pytest.mark.parametrize(("camera", "ccd"), CCDS)
def test_camera_frame_of_a_wcs_is_the_nominal_one(camera, ccd):
    frame, misfit = camera_frame(header(camera, ccd))
    np.testing.assert_allclose(frame @ frame.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(frame) == pytest.approx(1)
    nominal = nominal_camera_frame(1, camera)
    if (camera, ccd) == BAD:
        assert misfit == pytest.approx(0.405, abs=0.005)
        assert apart(frame[2], nominal[2]) > 0.1
    else:
        assert misfit < 0.012
        assert apart(frame[2], nominal[2]) < 0.012
        assert apart(frame[0], nominal[0]) < 0.02


@pytest.mark.parametrize(("camera", "ccd"), CCDS)
def test_maps_agree_with_astropy_on_every_ccd(camera, ccd):
    """By separations and position angles of SkyCoord; the camera's x axis is a point of the sky."""
    from astropy.coordinates import SkyCoord, UnitSphericalRepresentation
    from astropy.wcs import WCS

    cards = header(camera, ccd)
    frame, _ = camera_frame(cards)
    row, column = np.meshgrid(ROW, COLUMN, indexing="ij")
    bins = WCS(cards).pixel_to_world(column - 1, row - 1)

    def sky(vectors):
        return SkyCoord(*(np.asarray(vectors).T), representation_type="cartesian", frame="icrs").represent_as(
            UnitSphericalRepresentation
        )

    time = TIME[::15]
    tess = tess_position(time)
    pixel = pixel_directions(cards, ROW[:, None], COLUMN[None, :]) @ frame.T
    x_axis = SkyCoord(sky(frame[0]))
    for body, vectors in lines_of_sight(time, tess).items():
        angle, azimuth = angle_maps(vectors @ frame.T, pixel, exact=True)
        there = SkyCoord(sky(vectors))[:, None, None]
        assert np.abs(angle - bins.separation(there).deg).max() < 1e-6, body
        turn = bins.position_angle(x_axis) - bins.position_angle(there)
        assert np.abs(around(azimuth, turn.deg)).max() < 1e-6, body


@pytest.mark.parametrize(("camera", "ccd"), [pair for pair in CCDS if pair != BAD])
def test_boresight_lies_beyond_the_inner_corner(camera, ccd):
    from astropy.wcs import WCS

    cards = header(camera, ccd)
    x, y, z = nominal_camera_frame(1, camera)[2]
    column, row = WCS(cards).all_world2pix(
        [[np.degrees(np.arctan2(y, x)) % 360, np.degrees(np.arcsin(z))]], 1, tolerance=1e-3
    )[0]
    assert 2080 < row < 2125  # beyond the top of every CCD
    if ccd in (1, 3):
        assert 2130 < column < 2175
    else:
        assert -40 < column < 10


def test_orientation_is_the_same_in_all_cameras():
    """The centre of CCD 1, 2, 3, 4 lies at azimuth 135, 225, 315, 45 degrees, 8.85 from the boresight."""
    for camera, ccd in CCDS:
        if (camera, ccd) == BAD:
            continue
        frame, _ = camera_frame(header(camera, ccd))
        x, y, z = frame @ pixel_directions(header(camera, ccd), 1024.5, 1068.5)
        assert np.degrees(np.arctan2(np.hypot(x, y), z)) == pytest.approx(8.85, abs=0.1)
        azimuth = np.degrees(np.arctan2(y, x)) % 360
        assert azimuth == pytest.approx({1: 135, 2: 225, 3: 315, 4: 45}[ccd], abs=1.5)


def test_angles_run_smoothly_from_ccd_to_ccd():
    """Extrapolated to the boresight, the maps of the four CCDs of a camera meet."""
    for camera in (1, 2, 3, 4):
        frame = nominal_camera_frame(1, camera)
        earth = boresight_angles([1340.0], sector=1, camera=camera)
        for ccd in (1, 2, 3, 4):
            if (camera, ccd) == BAD:
                continue
            inner = 2092 if ccd in (1, 3) else 45
            pixel = pixel_directions(header(camera, ccd), [[2048]], [[inner]]) @ frame.T
            angle, azimuth = angle_maps(earth["earth_direction"].values, pixel)
            assert float(angle[0, 0, 0]) == pytest.approx(float(earth["earth_boresight_angle"][0]), abs=0.55)
            assert abs(around(azimuth[0, 0, 0], earth["earth_boresight_azimuth"][0])) < 1


@pytest.mark.parametrize(("camera", "ccd"), [pair for pair in CCDS if pair != BAD])
def test_corner_model_against_the_wcs(camera, ccd):
    row, column = np.linspace(1, 2048, 30)[:, None], np.linspace(45, 2092, 30)[None, :]
    frame, _ = camera_frame(header(camera, ccd))
    truth = pixel_directions(header(camera, ccd), row, column) @ frame.T
    error = apart(corner_directions(camera, ccd, row, column), truth)
    assert error.max() < 0.015  # with the misfit of one sector's solution
    assert np.median(error) < 0.006


def test_region_keywords_count_not_the_size_of_the_array():
    trimmed = header(1, 4, NAXIS=2, NAXIS1=173, NAXIS2=128)
    frame, misfit = camera_frame(trimmed)
    np.testing.assert_array_equal(frame, camera_frame(header(1, 4))[0])
    assert misfit < 0.01


def test_a_small_simulated_detector_covers_the_same_sky():
    small = header(1, 4)
    step = 2047 / 255
    for name in ("A", "B"):
        for key in [key for key in small if key.startswith(f"{name}_") and key[2].isdigit()]:
            power = int(key[2]) + int(key[4])
            small[key] *= step ** (power - 1)
    for key in ("CD1_1", "CD1_2", "CD2_1", "CD2_2"):
        small[key] *= step
    small["CRPIX1"], small["CRPIX2"] = 45 + (1045 - 45) / step, 1 + (1001 - 1) / step
    small["SCCED"], small["SCIROWE"] = 45 + 255, 256
    frame, misfit = camera_frame(small)
    assert misfit < 0.01
    np.testing.assert_allclose(frame, camera_frame(header(1, 4))[0], atol=1e-7)
    found = point(None, row=[1, 256], column=[45, 300], sector=1, camera=1, ccd=4)
    assert found.pixel.shape == (2, 2, 3)
    bad = small.copy()
    bad["CD1_1"] *= 1.1
    model = point(bad, row=[1, 256], column=[45, 300], sector=1, camera=1, ccd=4)
    truth = pixel_directions(small, [[1], [256]], [[45, 300]]) @ model.frame.T
    assert apart(model.pixel, truth).max() < 0.02


def test_a_header_of_a_real_ffi(shared):
    from astropy.io import fits

    path = shared / "tess2018206192942-s0001-1-4-0120-s_ffic.fits"
    with fits.open(path) as hdus:
        cards = hdus[1].header.copy()
        pointing = {name: hdus[1].header[f"{name}_NOM"] for name in ("RA", "DEC", "ROLL")}
    frame, misfit = camera_frame(cards)
    assert misfit < 0.01
    assert apart(frame[2], nominal_camera_frame(1, 1)[2]) < 0.012
    assert pointing["RA"] == pytest.approx(352.6844, abs=1e-3)
    for text in (cards.tostring(), cards.tostring(sep="\n", endcard=False), cards):
        np.testing.assert_array_equal(camera_frame(text)[0], frame)


def test_what_camera_frame_refuses():
    with pytest.raises(ValueError, match="camera=2, but the header says CAMERA = 1"):
        camera_frame(header(1, 4), 2, 4)
    cards = header(1, 4)
    del cards["CAMERA"], cards["SCCED"]
    with pytest.raises(ValueError, match="lacks CAMERA"):
        camera_frame(cards)
    with pytest.raises(ValueError, match="region keywords SCCED"):
        camera_frame(cards, camera=1)
    cards = header(1, 4)
    del cards["CTYPE1"]
    with pytest.raises(ValueError, match="no equatorial WCS"):
        camera_frame(cards)
    with pytest.raises(ValueError, match="no equatorial WCS"):
        camera_frame(header(1, 4, CTYPE1="GLON-TAN-SIP", CTYPE2="GLAT-TAN-SIP"))


# ---------------------------------------------------------------- which pointing is believed


def where(wcs, camera=1, ccd=4, sector=1):
    return point(wcs, row=ROW, column=COLUMN, sector=sector, camera=camera, ccd=ccd)


def test_a_good_wcs_is_used():
    found = where(header(1, 4).tostring())
    assert found.source == "WCS of the FFI"
    assert found.misfit < 0.01
    assert found.offset < 0.012
    np.testing.assert_allclose(np.linalg.norm(found.pixel, axis=-1), 1, atol=1e-12)


def test_the_bad_wcs_of_sector_1_falls_back_to_the_table():
    found = where(header(*BAD), *BAD)
    assert found.source.startswith("nominal pointing")
    assert "0.405" in found.source
    assert found.misfit == pytest.approx(0.405, abs=0.005)
    np.testing.assert_array_equal(found.frame, nominal_camera_frame(1, 2))
    np.testing.assert_allclose(found.pixel, corner_directions(*BAD, ROW[:, None], COLUMN[None, :]))


def test_another_good_frame_comes_before_the_table():
    bad = header(1, 4, scale=1.01)
    found = where([bad, None, "", header(1, 4)])
    assert found.source.startswith("WCS of FFI 2 of 2; WCS of FFI 1 of 2 misfits")
    np.testing.assert_array_equal(found.frame, camera_frame(header(1, 4))[0])


@pytest.mark.parametrize("wcs", [None, "", [], [None, ""]])
def test_without_a_wcs_the_table_is_used(wcs):
    found = where(wcs)
    assert found.source.endswith("no WCS")
    assert np.isnan(found.misfit)
    good = where(header(1, 4))
    assert apart(found.pixel @ found.frame, good.pixel @ good.frame).max() < 0.02


def test_headers_that_cannot_be_read_are_passed_over():
    broken = header(1, 4)
    broken["CRVAL1"] = "nonsense"
    other = header(2, 4)
    empty = header(1, 4)
    for key in [key for key in empty if key.startswith(("CTYPE", "CRVAL", "CD1", "CD2"))]:
        del empty[key]
    nan = header(1, 4).tostring().replace("CD1_1   =", "CD1_1   = 'NaN'  /", 1)
    found = where([broken, other, empty, nan, "garbage"])
    assert found.source.startswith("nominal pointing")
    for reason in ("FFI 2 of 5: camera=1, but the header says CAMERA = 2", "FFI 3 of 5: the header holds no"):
        assert reason in found.source
    assert where([broken, other, empty, nan, "garbage", header(1, 4)]).source.startswith("WCS of FFI 6 of 6")


def test_an_unknown_sector_needs_a_wcs():
    assert where(header(1, 4), sector=999).source == "WCS of the FFI"
    assert np.isnan(where(header(1, 4), sector=999).offset)
    with pytest.raises(
        ValueError, match=r"sector 999 camera 1 CCD 4 is not known: .*misfits.*not in the pointing"
    ):
        where(header(1, 4, scale=1.01), sector=999)
    with pytest.raises(ValueError, match="sector=999"):
        boresight_angles([1400.0], sector=999, camera=1)


# ---------------------------------------------------------------- maps


def slow_maps(body, pixel):
    """One vector at a time, as the formula is written."""
    x_axis = np.array([1.0, 0.0, 0.0])
    angle, azimuth = np.empty((2, len(body), *pixel.shape[:2]))
    for t, vector in enumerate(body):
        e = vector / np.linalg.norm(vector)
        for i, j in np.ndindex(pixel.shape[:2]):
            n = pixel[i, j]
            p = x_axis - (x_axis @ n) * n
            p /= np.linalg.norm(p)
            q = np.cross(n, p)
            angle[t, i, j] = np.degrees(np.arctan2(np.hypot(e @ p, e @ q), e @ n))
            azimuth[t, i, j] = np.degrees(np.arctan2(e @ q, e @ p)) % 360
    return angle, azimuth


@pytest.fixture(scope="module")
def vectors():
    rng = np.random.default_rng(3)
    return rng.normal(size=(40, 3)) * 1e5, corner_directions(3, 2, ROW[:, None], COLUMN[None, :])


def test_maps_against_the_plain_formula(vectors):
    body, pixel = vectors
    angle, azimuth = slow_maps(body, pixel)
    exact = angle_maps(body, pixel, exact=True)
    assert exact[0].dtype == np.float64
    assert np.abs(exact[0] - angle).max() < 1e-10
    assert np.abs(around(exact[1], azimuth)).max() < 1e-9
    quick = angle_maps(body, pixel)
    assert quick[0].dtype == quick[1].dtype == np.float32
    assert np.abs(quick[0] - angle).max() < 0.005
    assert np.abs(around(quick[1], azimuth)).max() < 0.005
    assert quick[1].min() >= 0
    assert quick[1].max() < 360


def test_maps_do_not_depend_on_their_blocks(vectors):
    body, _ = vectors
    pixel = corner_directions(3, 2, np.arange(1, 2048, 9.0)[:, None], np.arange(45, 2092, 11.0)[None, :])
    whole = angle_maps(body, pixel)
    parts = [angle_maps(body[i : i + 7], pixel[:100]) for i in range(0, len(body), 7)]
    np.testing.assert_allclose(whole[0][:, :100], np.concatenate([part[0] for part in parts]), atol=0.004)
    truth = angle_maps(body, pixel, exact=True)
    assert np.abs(whole[0] - truth[0]).max() < 0.005
    assert np.abs(around(whole[1], truth[1])).max() < 0.005


def test_special_places():
    z = np.array([[[0.0, 0.0, 1.0]]])
    angle, azimuth = angle_maps([[0, 0, 5], [0, 0, -5], [1, 0, 0], [0, -1, 0], [np.nan, 0, 1]], z)
    np.testing.assert_array_equal(angle.ravel()[:4], [0, 180, 90, 90])
    np.testing.assert_array_equal(azimuth.ravel()[2:4], [0, 270])
    assert np.isnan(angle[4]).all()
    assert np.isnan(azimuth[4]).all()
    tiny = angle_maps([[1.0, -1e-9, 0.0], [1.0, -1e-30, 0.0]], z)[1]
    np.testing.assert_array_equal(tiny.ravel(), [0, 0])  # not 360
    assert angle_maps(np.empty((0, 3)), z)[0].shape == (0, 1, 1)


def test_azimuth_of_the_boresight_is_that_of_the_mission(vectors):
    body, _ = vectors
    _, azimuth = angle_maps(body, np.array([[[0.0, 0.0, 1.0]]]), exact=True)
    assert np.abs(around(azimuth.ravel(), np.degrees(np.arctan2(body[:, 1], body[:, 0])))).max() < 1e-12


def test_memory_is_bounded_by_the_answer():
    pixel = corner_directions(1, 4, np.linspace(1, 2048, 128)[:, None], np.linspace(45, 2092, 128)[None, :])
    body = np.random.default_rng(0).normal(size=(64, 3))
    tracemalloc.start()
    try:
        answer = angle_maps(body, pixel)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < sum(part.nbytes for part in answer) + 8e6


# ---------------------------------------------------------------- rounding


@given(st.lists(st.floats(0, 359.9999694824219, width=32), min_size=1, max_size=50))
@settings(deadline=None)
def test_rounding_is_within_its_bound(values):
    values = np.array(values, dtype=np.float32)
    rounded = round_bits(values.copy(), period=360.0)
    assert np.abs(around(rounded.astype(float), values.astype(float))).max() < 0.005
    assert rounded.min() >= 0
    assert rounded.max() < 360
    np.testing.assert_array_equal(rounded, round_bits(rounded.copy(), period=360.0))
    assert not np.any(rounded.view(np.uint32) & np.uint32((1 << (23 - MAP_BITS)) - 1))


@pytest.mark.parametrize("bits", [1, 7, 15, 22, 23])
def test_rounding_is_that_of_numcodecs(bits):
    numcodecs = pytest.importorskip("numcodecs")
    values = np.random.default_rng(1).uniform(-400, 400, 5000).astype(np.float32)
    values[:4] = [1.0, 1.00390625, 0.0, 1e-30]
    codec = numcodecs.BitRound(keepbits=bits)
    np.testing.assert_array_equal(round_bits(values.copy(), bits), codec.decode(codec.encode(values)))


def test_rounding_leaves_nan_and_infinity():
    values = np.array([np.nan, np.inf, -np.inf, 359.99999, 1.0], dtype=np.float32)
    values[:1] = np.array([0x7FFFFFFF], dtype=np.uint32).view(np.float32)
    rounded = round_bits(values, 15, period=None)
    assert np.isnan(rounded[0])
    np.testing.assert_array_equal(rounded[1:], np.array([np.inf, -np.inf, 360.0, 1.0], dtype=np.float32))
    with pytest.raises(ValueError, match="float64"):
        round_bits(np.zeros(3))
    with pytest.raises(ValueError, match="bits=24"):
        round_bits(np.zeros(3, dtype=np.float32), 24)


# ---------------------------------------------------------------- variables


def test_every_variable_is_there_with_units():
    sky = boresight_angles(TIME, sector=1, camera=2)
    place = {
        "distance",
        "boresight_angle",
        "boresight_azimuth",
        "elevation",
        "spacecraft_azimuth",
        "direction",
    }
    light = {"angular_radius", "phase_angle", "illuminated_fraction", "irradiance"}
    expected = {f"{body}_{what}" for body in ("earth", "moon", "sun") for what in place}
    expected |= {f"{body}_{what}" for body in ("earth", "moon") for what in light} | {
        "subspacecraft_longitude"
    }
    assert set(sky.data_vars) == expected
    assert set(sky.data_vars) < set(ATTRS)
    for variable in sky.data_vars.values():
        assert {"units", "long_name"} <= set(variable.attrs)
        assert np.isfinite(variable).all()
    assert "camera frame" in sky["earth_boresight_azimuth"].attrs["comment"]
    assert list(sky["xyz"].values) == ["x", "y", "z"]
    assert sky.attrs["ephemeris_source"].startswith("JPL Horizons")
    assert sky.attrs["directions"] == "geometric"


def test_relations_between_variables():
    sky = boresight_angles(TIME, sector=1, camera=1)
    for body, radius in (("earth", 6378.137), ("moon", 1737.4)):
        x, y, z = sky[f"{body}_direction"].values.T
        np.testing.assert_allclose(x**2 + y**2 + z**2, 1, atol=1e-12)
        np.testing.assert_allclose(np.cos(np.radians(sky[f"{body}_boresight_angle"])), z, atol=1e-12)
        np.testing.assert_allclose(
            np.sin(np.radians(sky[f"{body}_angular_radius"])), radius / sky[f"{body}_distance"], atol=1e-12
        )
        phase = np.radians(sky[f"{body}_phase_angle"])
        np.testing.assert_allclose(sky[f"{body}_illuminated_fraction"], np.cos(phase / 2) ** 2, atol=1e-12)
    assert float(sky["earth_angular_radius"].max()) == pytest.approx(3.0, abs=0.4)
    assert 0.1 < float(sky["moon_angular_radius"].min()) < float(sky["moon_angular_radius"].max()) < 0.6
    # the same body from another camera: the spacecraft's angles do not change, the camera's do
    other = boresight_angles(TIME, sector=1, camera=4)
    np.testing.assert_allclose(sky["earth_elevation"], other["earth_elevation"], atol=1e-9)
    np.testing.assert_allclose(sky["earth_spacecraft_azimuth"], other["earth_spacecraft_azimuth"], atol=1e-9)
    assert float(np.abs(sky["earth_boresight_angle"] - other["earth_boresight_angle"]).max()) > 20


def test_light_of_a_full_and_a_new_earth():
    """Lambert's sphere: full it gives A (R/d)^2 of sunlight, from behind nothing."""
    sun = np.array([[1.495978707e8, 0.0, 0.0]] * 3)
    vector = np.array(
        [[-2e5, 0.0, 0.0], [2e5, 0.0, 0.0], [0.0, 2e5, 0.0]]
    )  # Earth away from the Sun, towards, aside
    light = importlib.import_module("tessbkg.geometry")._light("earth", vector, sun)
    ratio = 0.37 * (6378.137 / 2e5) ** 2
    np.testing.assert_allclose(light["earth_irradiance"] / ratio, [1, 0, 1 / np.pi], rtol=3e-3, atol=1e-9)
    np.testing.assert_allclose(light["earth_phase_angle"], [0, 180, 90], atol=0.1)
    np.testing.assert_allclose(light["earth_illuminated_fraction"], [1, 0, 0.5], atol=1e-3)


def test_range_of_phase_and_light_in_sector_4():
    sky = boresight_angles(np.linspace(1401.4, 1439.9, 2000), sector=4, camera=1)
    assert float(sky["earth_phase_angle"].min()) == pytest.approx(7, abs=0.5)
    assert float(sky["earth_phase_angle"].max()) == pytest.approx(175, abs=0.5)
    assert float(sky["earth_irradiance"].min()) == pytest.approx(2e-8, rel=0.2)
    assert float(sky["earth_irradiance"].max()) == pytest.approx(1.3e-3, rel=0.05)
    assert float(sky["moon_irradiance"].max()) == pytest.approx(3e-6, rel=0.05)


def test_longitude_turns_once_a_day():
    sky = boresight_angles(1330 + np.arange(0, 48) / 24, sector=1, camera=1)
    turn = np.unwrap(np.radians(sky["subspacecraft_longitude"].values))
    assert -np.degrees(turn[-1] - turn[0]) == pytest.approx(2 * 360 * 47 / 48, abs=40)


def test_light_time_is_an_option():
    plain = boresight_angles(TIME, sector=1, camera=1)
    late = boresight_angles(TIME, sector=1, camera=1, light_time=True)
    shift = apart(plain["earth_direction"].values, late["earth_direction"].values) * 3600
    assert 5 < shift.max() < 22
    assert late.attrs["directions"] == "astrometric"


def test_times_that_are_missing_or_wrong():
    sky = boresight_angles([1400.0, np.nan], sector=4, camera=1)
    for name, variable in sky.data_vars.items():
        assert np.isnan(variable.values[1]).all(), name
    with pytest.raises(ValueError, match="TJD"):
        boresight_angles(np.array(["2018-08-01"], dtype="datetime64[s]"), sector=1, camera=1)
    with pytest.raises(ValueError, match="2-dimensional"):
        boresight_angles([[1400.0]], sector=1, camera=1)
    with pytest.raises(EphemerisRangeError):
        boresight_angles([5000.0], sector=1, camera=1)


# ---------------------------------------------------------------- datasets


def test_geometry_has_no_maps_and_gives_them():
    sky = geometry(TIME, wcs=header(1, 4), row=ROW, column=COLUMN, sector=1, camera=1, ccd=4)
    assert not [name for name, variable in sky.data_vars.items() if variable.dims == ("time", "y", "x")]
    assert sky["pixel_direction"].dims == ("y", "x", "xyz")
    assert sky.attrs["pointing_source"] == "WCS of the FFI"
    assert sky.attrs["wcs_misfit_deg"] < 0.01
    shard = angle_maps(sky["earth_direction"][64:128], sky["pixel_direction"])
    whole = angles(dataset())
    np.testing.assert_array_equal(shard[0], whole["earth_angle"][64:128])
    np.testing.assert_array_equal(shard[1], whole["earth_azimuth"][64:128])


def test_angles_adds_everything_to_a_dataset():
    ds = dataset()
    out = angles(ds)
    assert set(ds.data_vars) == {"light"}  # the input is left alone
    for name in ("earth_angle", "earth_azimuth", "moon_angle", "moon_azimuth"):
        assert out[name].dims == ("time", "y", "x")
        assert out[name].dtype == np.float32
        assert out[name].attrs["units"] == "degree"
        assert isinstance(out[name].data, np.ndarray)
    assert {"ra", "dec"} <= set(out.coords)
    assert out["field_angle"].dims == ("y", "x")
    assert out.attrs["sector"] == 1
    assert "ephemeris_span" in out.attrs
    xr.testing.assert_identical(out["light"].reset_coords(drop=True), ds["light"].reset_coords(drop=True))
    truth = header(1, 4)
    np.testing.assert_allclose(
        np.stack([out["ra"], out["dec"]], axis=-1),
        np.stack(_radec(pixel_directions(truth, ROW[:, None], COLUMN[None, :])), axis=-1),
        atol=1e-9,
    )


def _radec(vectors):
    x, y, z = np.moveaxis(vectors, -1, 0)
    return np.degrees(np.arctan2(y, x)) % 360, np.degrees(np.arcsin(z))


def test_maps_are_lazy_where_the_dataset_is():
    import dask.array as da

    ds = dataset().chunk({"time": 40, "y": 8, "x": 4})
    out = angles(ds)
    assert isinstance(out["earth_angle"].data, da.Array)
    assert out["earth_angle"].chunks == ds["light"].chunks
    eager = angles(dataset())
    for name in ("earth_angle", "earth_azimuth", "moon_angle", "moon_azimuth"):
        np.testing.assert_allclose(out[name].compute(), eager[name], atol=0.004)
        assert out[name].dtype == out[name].compute().dtype == np.float32
    assert angles(ds)["earth_angle"].data.name == out["earth_angle"].data.name


def test_maps_are_lazy_where_they_are_large():
    rows, columns = np.arange(1.0, 2049), np.arange(45.0, 2093)
    ds = xr.Dataset(
        coords={"time": TIME, "row": ("y", rows), "column": ("x", columns)},
        attrs={"sector": 1, "camera": 1, "ccd": 4, "wcs": header(1, 4).tostring()},
    )
    out = angles(ds)
    assert out["moon_azimuth"].chunks == ((64, 64, 22), (512,) * 4, (512,) * 4)
    corner = out["moon_angle"][70, 2040:, :5].compute()
    direct, _ = angle_maps(out["moon_direction"][70:71].values, out["pixel_direction"][2040:, :5].values)
    np.testing.assert_allclose(corner, direct[0], atol=0.004)


def test_angles_without_a_wcs_and_with_another_ephemeris():
    ds = dataset(wcs="")
    out = angles(ds, ephemeris=Ephemeris("table", bodies="builtin"), light_time=True)
    assert out.attrs["pointing_source"].startswith("nominal pointing")
    del ds.attrs["wcs"]
    again = angles(ds, light_time=True)
    np.testing.assert_array_equal(out["earth_angle"], again["earth_angle"])
    assert np.abs(again["earth_angle"] - angles(dataset())["earth_angle"]).max() < 0.03


def test_attributes_can_be_written_to_zarr_json():
    for name, value in angles(dataset(wcs="")).attrs.items():
        assert isinstance(value, str | int | float), name


def test_what_angles_refuses():
    ds = dataset().drop_vars("row")
    del ds.attrs["camera"]
    with pytest.raises(ValueError, match="lacks row, attribute camera"):
        angles(ds)
    with pytest.raises(ValueError, match="row has dimensions"):
        angles(dataset().assign_coords(row=(("y", "x"), np.zeros((8, 8)))))
    with pytest.raises(ValueError, match="ccd=5"):
        angles(dataset(ccd=4).assign_attrs(ccd=5))
    with pytest.raises(EphemerisRangeError, match=r"4071\.5"):
        angles(dataset(time=TIME + 4000))
