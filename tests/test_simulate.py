"""The simulated FFIs are what they say: format, sky, noise, faults."""

from __future__ import annotations

import dataclasses
import io

import fsspec
import numpy as np
import pytest
import xarray as xr
from astropy.io import fits
from astropy.wcs import WCS
from scipy.ndimage import binary_dilation

from tessbkg import simulate as sim_module
from tessbkg.ccd import CCD, INDEX_EPOCH, Quality
from tessbkg.simulate import KINDS, Model, Simulation, light, scene, simulate

SMALL = (64, 96)
QUIET = dataclasses.replace(KINDS["orbit"], noise=False, drift=0.0, jitter=0.0, cosmic_rays=0.0)


def listing(root):
    fs, path = fsspec.core.url_to_fs(str(root))
    return fs, sorted(name for name in fs.find(path + "/ffi") if name.endswith("ffic.fits"))


def science(hdul, extension=1):
    h = hdul[extension].header
    return hdul[extension].data[h["SCIROWS"] - 1 : h["SCIROWE"], h["SCCSA"] - 1 : h["SCCED"]].astype("f8")


def opened(content):
    return fits.open(io.BytesIO(content), memmap=False)


@pytest.fixture(scope="module")
def sector(tmp_path_factory):
    root = tmp_path_factory.mktemp("sector")
    truth = simulate(str(root), frames=24, shape=SMALL)
    return root, truth, listing(root)[1]


@pytest.mark.filterwarnings("ignore::astropy.wcs.FITSFixedWarning")
def test_headers_are_those_of_the_mission(sector):
    _, truth, files = sector
    assert len(files) == 24
    assert files[0].endswith("ffi/s0001/2018/206/1-4/tess2018206192942-s0001-1-4-0120-s_ffic.fits")
    for i in (0, 5, 12):
        with fits.open(files[i], memmap=False) as hdul:
            hdul.verify("exception")
            assert [hdu.name for hdu in hdul] == ["PRIMARY", "CAMERA.CCD 1.4 cal", "CAMERA.CCD 1.4 uncert"]
            primary, image = hdul[0].header, hdul[1].header
            assert hdul[1].data.shape == (64 + 30, 96 + 88)
            assert hdul[1].data.dtype == ">f4"
            one = truth.isel(time=i)
            assert (primary["TSTART"] + primary["TSTOP"]) / 2 == pytest.approx(float(one.time), abs=1e-9)
            for key in ("TSTART", "TSTOP"):
                assert image[key] - primary[key] == pytest.approx(image["BARYCORR"], abs=3e-13)
            assert float(one.btjd - one.time) == pytest.approx(image["BARYCORR"], abs=1e-9)
            assert primary["FFIINDEX"] == int(one.cadence)
            assert round((primary["TSTART"] - INDEX_EPOCH) * 48) == primary["FFIINDEX"]
            assert image["DQUALITY"] == int(one.quality)
            assert primary["SCCONFIG"] == 120
            assert image["NUM_FRM"] == 900
            assert image["NREADOUT"] == 720
            assert image["EXPOSURE"] * 86400 == pytest.approx(1425.6)
            assert (image["SCCSB"], image["SCCEB"], image["VROWE"], image["TVCED"]) == (69, 92, 94, 184)
            assert hdul[2].header["IMAGTYPE"] == "uncert"


def test_the_first_header_has_the_keywords_of_the_real_one(sector):
    with fits.open(sector[2][0]) as hdul:
        for hdu, cards in zip(hdul, sim_module._template(), strict=False):
            real = fits.Header([fits.Card.fromstring(card) for card in cards])
            assert set(hdu.header) - {"FFIINDEX"} == set(real)
            assert all(type(hdu.header[key]) is type(real[key]) for key in real)
            same = ("INSTRUME", "TIMEREF", "GAINA", "DEADC", "CTYPE1", "BUNIT")
            assert all(hdu.header[key] == real[key] for key in same if key in real)


def test_full_size_bytes_are_the_mission_s():
    sim = Simulation(frames=2)
    case = sim_module._Case("", 0, 120, ffiindex=True)
    heads = sim_module._headers(sim, 0, case)
    assert [len(head) for head in heads] == [2880, 17280, 17280]
    header = fits.Header.fromstring(heads[1].decode())
    assert (header["NAXIS1"], header["NAXIS2"]) == (2136, 2078)
    real = fits.Header([fits.Card.fromstring(card) for card in sim_module._template()[1]])
    regions = ("LVC", "TVC", "SCC", "SCI", "VRO", "SMR", "BFR", "BTC", "CRPIX")
    assert all(header[key] == real[key] for key in real if key.startswith(regions))
    assert header["CRVAL1"] == pytest.approx(real["CRVAL1"], abs=0.01)
    assert header["CRVAL2"] == pytest.approx(real["CRVAL2"], abs=0.01)
    for key in ("CD1_1", "CD1_2", "CD2_1", "CD2_2", "A_2_0", "B_1_1"):
        assert header[key] == pytest.approx(real[key], rel=0.1)
    assert header["BARYCORR"] == pytest.approx(real["BARYCORR"], abs=1e-4)
    no_wcs = sim_module._headers(sim, 0, case._replace(fault="no_wcs"))
    assert len(no_wcs[0]) + len(no_wcs[1]) == 14400


def test_science_region_and_sentinels(sector):
    sentinels = sim_module.SENTINELS
    with fits.open(sector[2][3], memmap=False) as hdul:
        for hdu in hdul[1:]:
            data = hdu.data
            assert (data[:64, :44] == sentinels["leading"]).all()
            assert (data[:64, 44 + 96 :] == sentinels["trailing"]).all()
            assert [float(np.unique(data[r]).item()) for r in (64, 74, 84)] == [3e4, 4e4, 5e4]
            assert np.isfinite(data).all()
        assert np.median(data[:64, 44 : 44 + 96]) < 1


def test_noise_follows_the_measured_law():
    model = dataclasses.replace(QUIET, noise=True)
    noisy, quiet = (Simulation(shape=(256, 256), model=m) for m in (model, QUIET))
    case = sim_module._Case("", 0, 120, ffiindex=True)
    for i in (2, 11):
        flux, clean = (opened(sim_module._file(s, i, case, light(s, i))) for s in (noisy, quiet))
        f, sigma = science(clean), np.sqrt(7.445e-4 * science(clean) + 0.0197)
        z = (science(flux) - f) / sigma
        assert z.std() == pytest.approx(1, abs=0.02)
        assert abs(z.mean()) < 0.02
        ratio = science(flux, 2) / sigma
        assert ratio.mean() == pytest.approx(1, abs=0.003)
        assert 0.002 < ratio.std() < 0.015
    assert np.corrcoef(z.ravel()[:-1], z.ravel()[1:])[0, 1] == pytest.approx(0, abs=0.02)
    short = Simulation(shape=(256, 256), model=model, sector=60)
    first, second = (
        opened(sim_module._file(short, 2, case._replace(old=o), light(short, 2))) for o in (0, 1)
    )
    assert science(second).mean() - science(first).mean() == pytest.approx(1)
    assert np.median(science(first, 2)) == pytest.approx(3 * np.median(science(flux, 2) * 0 + 0.345), rel=0.2)


def test_pixels_are_scene_plus_straps_times_light():
    sim = Simulation(shape=(128, 128), model=QUIET)
    factor = sim_module._strap(sim)
    assert factor[[76, 77]].tolist() == pytest.approx([1.017, 1.017])  # columns 77 and 78 of the table
    assert factor[[75, 78, 70]].tolist() == pytest.approx([1.007, 1.007, 1.0])
    case = sim_module._Case("", 0, 120, ffiindex=True)
    for i in (1, 10, 12):
        with opened(sim_module._file(sim, i, case, light(sim, i))) as hdul:
            left = science(hdul) - scene(sim) - factor * light(sim, i)
        assert abs(left[scene(sim) < 9e4]).max() < 0.02


def test_truth_is_beside_the_files_and_is_the_block_mean(sector):
    root, truth, files = sector
    again = xr.open_zarr(root / "truth" / f"{CCD(1, 1, 4).group}.zarr", consolidated=False, chunks=None)
    xr.testing.assert_identical(again.load(), truth.load())
    sim = Simulation(shape=SMALL)
    for i in (1, 12):
        expected = light(sim, i).reshape(16, 4, 24, 4).mean(axis=(1, 3))
        np.testing.assert_allclose(truth.light[i], expected, rtol=1e-6)
        np.testing.assert_array_equal(light(truth, i), light(sim, i))
    np.testing.assert_array_equal(truth.scene, scene(truth))
    assert [name.rpartition("/")[2] for name in files] == list(truth.ffi.values)
    assert truth.y.values[0] == 1.5
    with pytest.raises(ValueError, match="allowed are 0 to 23"):
        light(truth, 24)


def test_the_light_comes_and_goes(sector):
    level = sector[1].light.mean(("y", "x")).values
    assert (sector[1].light.max(("y", "x")).values < 0.02).sum() >= 3
    assert (level > 100).sum() >= 2
    assert level.max() < 1000
    stray = (sector[1].quality.values & int(Quality.STRAY_LIGHT)) != 0
    np.testing.assert_array_equal(stray, (sector[1].earth_angle < 35) | (sector[1].moon_angle < 25))
    assert 0 < stray.sum() < 5
    assert np.ptp(sector[1].time.values) > 22
    assert np.diff(sector[1].time.values).max() > 1.8  # the downlink


def test_glints_have_sharp_edges_and_move():
    sim = Simulation(shape=(512, 512))
    smooth = Simulation(shape=(512, 512), model=KINDS["smooth"])
    glints = [light(sim, i) - light(smooth, i) for i in (10, 11)]
    for glint in glints:
        assert max(abs(np.diff(glint, axis=axis)).max() for axis in (0, 1)) > 0.2 * glint.max() > 5
    assert np.corrcoef(glints[0].ravel(), glints[1].ravel())[0, 1] < 0.7
    steps = abs(np.diff(light(smooth, 11), axis=0)).max()
    assert steps < 0.02 * light(smooth, 11).max()


@pytest.mark.filterwarnings("ignore::astropy.wcs.FITSFixedWarning")
@pytest.mark.parametrize("shape", [(2048, 2048), (64, 96)])
def test_every_ccd_looks_where_the_table_says(shape):
    worst = back = 0.0
    rows, columns = np.array([1, 1, shape[0], shape[0]]), np.array([45, 44 + shape[1]] * 2)
    for camera in range(1, 5):
        for ccd in range(1, 5):
            sim = Simulation(camera=camera, ccd=ccd, frames=1, shape=shape)
            head = sim_module._headers(sim, 0, sim_module._Case("", 0, 120, ffiindex=True))[1]
            header = fits.Header.fromstring(head.decode())
            wcs = WCS(header)
            sky = wcs.all_pix2world(columns, rows, 1)
            ra, dec = np.radians(sky)
            n = np.stack([np.cos(dec) * np.cos(ra), np.cos(dec) * np.sin(ra), np.sin(dec)], axis=1)
            n = n @ sim_module._axes((352.6844, -64.8531, 222.153), camera).T
            xy = sim_module._corners()[camera, ccd].reshape(4, 2)
            table = np.column_stack([xy, np.sqrt(1 - (xy**2).sum(axis=1))])
            worst = max(worst, np.degrees(np.linalg.norm(np.cross(n, table), axis=1)).max())
            crpix = np.array([header["CRPIX1"], header["CRPIX2"]])
            u, v = (wcs.wcs_world2pix(np.transpose(sky), 1) - crpix).T
            powers = [(p, q) for p in range(5) for q in range(5 - p) if p + q]
            inverse = [sum(header[f"{n}P_{p}_{q}"] * u**p * v**q for p, q in powers) for n in "AB"]
            pixels = np.stack([u, v], 1) + np.stack(inverse, 1) + crpix
            back = max(back, abs(pixels - np.stack([columns, rows], axis=1)).max())
            assert np.linalg.det(wcs.wcs.cd) > 0
    assert worst < 0.005
    assert back < 0.3


def test_faults(tmp_path):
    faults = {i: name for i, name in enumerate(sim_module.FAULTS, start=1)}  # noqa: C416
    where = {name: i for i, name in faults.items()}
    truth = simulate(str(tmp_path), frames=18, shape=SMALL, faults=faults)
    assert list(truth.fault.values) == ["", *sim_module.FAULTS, "", "", ""]
    fs, files = listing(tmp_path)
    content = {name.rpartition("/")[2]: fs.cat(name) for name in files}
    by = {name: content.get(str(truth.ffi.values[i])) for name, i in where.items()}
    size = len(content[str(truth.ffi.values[0])])
    assert len(content) == 18 - 1 + 1  # one missing, one duplicate
    assert by["missing"] is None
    assert np.isfinite(truth.light.values).all()
    assert len(by["empty"]) == 0
    assert len(by["truncated"]) == int(0.4 * size)
    assert not by["garbage"].startswith(b"SIMPLE")
    assert (science(opened(by["zero"])) == 0).all()
    assert np.isnan(science(opened(by["nan"]))).all()
    assert (science(opened(by["saturated"])) > 1e5).all()
    assert int(truth.quality[where["saturated"]]) == Quality.STRAY_LIGHT | Quality.BAD_CALIBRATION
    assert int(truth.quality[where["dump"]]) & Quality.DESATURATION
    assert "CRVAL1" not in opened(by["no_wcs"])[1].header
    assert "FFIINDEX" not in opened(by["no_index"])[0].header
    assert opened(by["wrong_camera"])[1].header["CAMERA"] == 2
    narrow = opened(by["wrong_naxis"])[1]
    assert (narrow.data.shape[1], narrow.header["SCCED"]) == ((96 + 88) // 2, 140)
    for name, head in (("zero", 17280), ("no_wcs", 11520), ("dump", 11520), ("saturated", 11520)):
        assert opened(by[name])[1].fileinfo()["datLoc"] == head + 2880
    offset = opened(by["offset"])[1].fileinfo()["datLoc"]
    assert offset in (23040, 25920, 28800, 31680)
    new = str(truth.ffi.values[where["duplicate"]])
    old = f"tess{int(new[4:17]) - 1:013d}{new[17:]}"
    first, second = opened(content[old]), opened(content[new])
    assert first[0].header["DATA_REL"] < second[0].header["DATA_REL"]
    assert first[0].header["DATE"] < second[0].header["DATE"]
    assert (science(first) - science(second)).mean() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("index", range(4))
def test_offsets(index):
    head = sim_module._headers(Simulation(frames=8), index, sim_module._Case("offset", 0, 120, ffiindex=True))
    assert len(head[0]) + len(head[1]) == (28800, 31680, 23040, 25920)[index - 2]


def test_a_frame_depends_on_seed_and_cadence_only():
    few, many = "memory://determinism/few", "memory://determinism/many"
    simulate(few, frames=3, step=7, shape=SMALL, seed=5, sector=30, camera=3, ccd=2, ffir=False)
    simulate(many, frames=6, step=7, shape=SMALL, seed=5, sector=30, camera=3, ccd=2)
    simulate("memory://determinism/other", frames=1, shape=SMALL, seed=6, sector=30, camera=3, ccd=2)
    fs, a = listing(few)
    b, c = listing(many)[1], listing("memory://determinism/other")[1]
    assert [fs.cat(x) for x in a] == [fs.cat(x) for x in b[:3]]
    assert fs.cat(a[0]) != fs.cat(c[0])
    assert len(fs.find(few + "/ffi")) == 3
    assert len(fs.find(many + "/ffi")) == 12
    one, two = (science(opened(fs.cat(x))) for x in a[:2])
    assert one.std() != two.std()


@pytest.mark.parametrize(
    ("sector", "cadence", "reads"), [(26, 1800, 900), (27, 600, 300), (56, 200, 100), (1751, 200, 100)]
)
def test_eras(sector, cadence, reads):
    truth = simulate("memory://eras", sector=sector, frames=3, step=1, shape=(16, 16), scid_change=True)
    np.testing.assert_allclose(np.diff(truth.time), cadence / 86400, rtol=1e-6)
    assert np.diff(truth.cadence).tolist() == [1, 1]
    assert all(name[17:24] == f"-s{sector:04d}-" or f"-s{sector:04d}-" in name for name in truth.ffi.values)
    numbers = {name.split("-")[4] for name in truth.ffi.values}
    assert len(numbers) == 2
    fs, files = listing("memory://eras")
    with opened(fs.cat(next(name for name in files if truth.ffi.values[0] in name))) as hdul:
        assert hdul[1].header["NUM_FRM"] == reads
        assert hdul[1].header["TIMEDEL"] * 86400 == pytest.approx(cadence)


def test_barycorr_differs_between_ccds():
    corrections = [
        float(sim_module._table(Simulation(camera=camera, ccd=4, frames=1)).barycorr[0])
        for camera in range(1, 5)
    ]
    assert corrections[0] == pytest.approx(
        0.00568, abs=1e-4
    )  # real: 0.00568 in camera 1, -0.00077 in camera 4
    assert corrections[3] == pytest.approx(-0.00077, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind):
    truth = simulate(f"memory://kinds/{kind}", frames=24, shape=SMALL, kind=kind)
    level = truth.light.mean(("y", "x")).values
    assert level.max() > 100
    if kind == "few_dark":
        assert (level < 0.05).sum() == 3
    if kind == "moon":
        assert (truth.light.values.max(axis=(1, 2)) > 1e5).sum() >= 2
    if kind == "drift":
        assert np.ptp(truth.row_offset.values) + np.ptp(truth.column_offset.values) > 0.6


def test_derivatives_move_a_star():
    row, column, flux = np.array([20.3]), np.array([15.7]), np.array([1000.0])
    images, moved = ([np.zeros((64, 64), np.float32) for _ in range(6)] for _ in range(2))
    sim_module._stamp(images, (row, column, flux), sigma=0.9, half=6, pad=12)
    dy, dx = 0.12, -0.2
    sim_module._stamp(moved, (row + dy, column + dx, flux), sigma=0.9, half=6, pad=12)
    image, sy, sx, syy, sxy, sxx = images
    expanded = image + dy * sy + dx * sx + dy * dy / 2 * syy + dx * dy * sxy + dx * dx / 2 * sxx
    assert image.sum() == pytest.approx(1000, rel=1e-3)
    assert abs(moved[0] - image).max() > 0.1 * image.max()
    assert abs(expanded - moved[0]).max() < 0.01 * image.max()


def test_stars_move_by_the_offsets():
    model = dataclasses.replace(QUIET, drift=0.3)
    sim = Simulation(shape=(256, 256), model=model)
    image, table = scene(sim), sim_module._table(sim)
    case = sim_module._Case("", 0, 120, ffiindex=True)
    good = ~binary_dilation(image > 2e4, iterations=8)[1:-1, 1:-1]  # saturated stars stand still
    for i in (1, 22):
        with opened(sim_module._file(sim, i, case, light(sim, i))) as hdul:
            left = science(hdul) - image - sim_module._strap(sim) * light(sim, i)
        slopes = [-g[1:-1, 1:-1][good] for g in np.gradient(image)]
        found = np.linalg.lstsq(np.stack(slopes, axis=1), left[1:-1, 1:-1][good], rcond=None)[0]
        expected = [table.row_offset[i], table.column_offset[i]]
        assert max(map(abs, expected)) > 0.1
        # central differences of so sharp an image are a third too small
        np.testing.assert_allclose(found, 1.35 * np.array(expected), rtol=0.25, atol=0.02)


def test_bleeding_keeps_the_charge():
    image = np.full((200, 5), 100.0)
    image[100, 2] = 2.05e6
    bled = sim_module._bleed(image)
    assert bled.sum() == pytest.approx(image.sum())
    assert bled.max() == sim_module.FULL_WELL
    assert (bled[:, 2] == sim_module.FULL_WELL).sum() in (19, 20, 21)
    assert (bled[:, [0, 1, 3, 4]] == 100).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"sector": 0}, "sector=0"),
        ({"camera": 5}, "camera=5"),
        ({"frames": 0}, "frames=0"),
        ({"frames": 2.5}, "frames=2.5"),
        ({"step": 0}, "step=0"),
        ({"seed": -1}, "seed=-1"),
        ({"shape": (64, 63)}, r"shape=\(64, 63\)"),
        ({"shape": (64,)}, "shape="),
        ({"cadence": 7}, "cadence=7"),
        ({"start": 2458000.0}, "start=2458000.0"),
        ({"pointing": (10.0, 95.0, 0.0)}, "pointing="),
        ({"kind": "storm"}, "kind='storm': allowed are orbit"),
        ({"faults": {1: "odd"}}, "'odd' at frame 1: allowed are zero"),
        ({"faults": [(30, "zero")]}, "frame 30"),
    ],
)
def test_arguments_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        simulate("memory://refused", **{"shape": SMALL, **arguments})


def test_own_model_and_pointing():
    model = Model(earth=0.0, moon=0.0, glint=0.0, noise=False)
    truth = simulate(
        "memory://own",
        frames=2,
        shape=SMALL,
        kind=model,
        pointing=(10.0, 20.0, 30.0),
        start=2000.0,
        cadence=120,
    )
    assert float(truth.light.max()) == 0
    assert float(truth.time[0]) == pytest.approx(2000.0, abs=0.002)
    np.testing.assert_array_equal(light(truth, 1), 0)
    fs, files = listing("memory://own")
    header = opened(fs.cat(files[0]))[1].header
    assert (header["RA_NOM"], header["DEC_NOM"], header["ROLL_NOM"]) == (10.0, 20.0, 30.0)
