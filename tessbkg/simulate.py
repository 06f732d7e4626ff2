"""A synthetic sector of real-format calibrated FFIs whose scattered light is known exactly.

The files have the headers, key layout, image extensions and traps of the mission's own. The sky is invented:
the orbit below is a Kepler ellipse placed so that the Earth sweeps past camera 1 at the end of each orbit,
NOT the mission's ephemeris, and stars stand at random places.

What a pixel of frame ``i`` holds, before noise, in electron s-1::

    stars moved by the pointing offset of i + strap(column) * (zodiacal light + corner glow + light_i)

``scene`` in the truth is the same with no light and no pointing offset; ``light`` is the scattered light
alone, without the factor of the straps. Above the full well charge bleeds or is lost.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from importlib import resources
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import xarray as xr
import zarr
from scipy.ndimage import gaussian_filter  # type: ignore[import-untyped,unused-ignore]

from tessbkg.ccd import CCD, INDEX_EPOCH, LIVE_FRACTION, SCIENCE_SHAPE, STRAP_COLUMNS, Quality
from tessbkg.ephemeris import lines_of_sight, nominal_pointing, tess_position
from tessbkg.storage import check_options, filesystem

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

FAULTS: Final = {
    "zero": "all science pixels are zero",
    "nan": "all science pixels are NaN",
    "saturated": "the whole CCD is saturated: bits 12 and 15, no WCS",
    "dump": "a momentum dump: bit 6, large jitter, no WCS",
    "truncated": "the file ends after 40 per cent of its bytes",
    "empty": "the file has no bytes",
    "garbage": "the file is not FITS",
    "missing": "there is no file",
    "duplicate": "an older processing, 1 s earlier and 1 electron s-1 brighter, stands beside the file",
    "no_wcs": "header of 4 blocks without WCS",
    "no_index": "no FFIINDEX",
    "offset": "header of 7 to 10 blocks",
    "wrong_camera": "the header names another camera than the file name",
    "wrong_naxis": "the images have half their columns while the region keywords are unchanged",
}
"""What can be wrong with a frame, for the argument `faults` of `simulate`."""

LEADING: Final = 44
TRAILING: Final = 44
EXTRA_ROWS: Final = 30
BLOCK: Final = 4
"""Science pixels a side of one pixel of the truth's ``light``."""

SENTINELS: Final = {"leading": 1e4, "trailing": 2e4, "buffer": 3e4, "smear": 4e4, "virtual": 5e4}
"""Values of the pixels that are not science pixels; UNCERT has the same."""

FULL_WELL: Final = 1.0e5  # electron s-1, plateau of saturated stars (facts: lkdata target pixel files)
BLOWN: Final = 1500.0  # electron s-1, above which background counts as saturated (tess-backdrop)
ORBIT: Final = 13.7  # d
PERIGEE: Final = -0.55  # d after the first frame of a sector
SCIENCE: Final = 12.6  # d of each orbit with data; the rest is the downlink at perigee
EARTH_RADIUS: Final = 6378.137  # km
# sigma^2 = A F + B of a 1800-s cadence (electron s-1)^2, from real target pixel files (lkdata)
NOISE_A: Final = 7.445e-4
NOISE_B: Final = 0.0197
UTC_TO_TDB: Final = 69.184  # s since 2017: 37 leap seconds + 32.184


@dataclass(frozen=True)
class Model:
    """How much of everything there is; the kinds in `KINDS` are instances.

    Parameters
    ----------
    earth, moon : float
        Light in electron s-1 with the Earth 30 deg (Moon 25 deg) from the boresight.
    glint, glint_edge : float
        Brightness of the arc in electron s-1, width of its edge in pixels.
    arcs : int
        Number of arcs; one straight ray comes with them.
    moon_in_field : bool
        Let the Moon cross this CCD around 27 % of the run.
    dark_frames : int
        If not 0, light of some 10 electron s-1 never goes away but in that number of frames.
    density : float
        Stars relative to a field with 12 stars brighter than Tmag 10 a square degree.
    zodi, glow : float
        Factors of zodiacal light and corner glow.
    strap : float
        Extra response of strap columns; their neighbours have 7/17 of it.
    drift, jitter : float
        Pointing drift over a sector, rms jitter of a frame, in pixels.
    dump_days : float
        Days between momentum dumps.
    cosmic_rays : float
        Hits a pixel a frame that survive the mitigation.
    noise : bool
        Add noise.
    """

    earth: float = 1800.0
    moon: float = 60.0
    glint: float = 200.0
    glint_edge: float = 3.0
    arcs: int = 1
    moon_in_field: bool = False
    dark_frames: int = 0
    density: float = 1.0
    zodi: float = 1.0
    glow: float = 1.0
    strap: float = 0.017
    drift: float = 0.3
    jitter: float = 0.02
    dump_days: float = 2.5
    cosmic_rays: float = 5e-6
    noise: bool = True


KINDS: Final[Mapping[str, Model]] = {
    "orbit": Model(),
    "smooth": Model(glint=0.0),
    "glint": Model(glint=800.0, glint_edge=2.0, arcs=3),
    "crowded": Model(density=8.0),
    "moon": Model(moon_in_field=True),
    "drift": Model(drift=0.8, jitter=0.06),
    "few_dark": Model(dark_frames=3),
}
"""Settings for studies of accuracy, by name."""


@dataclass(frozen=True)
class Simulation:
    """One CCD of a synthetic sector; the arguments are those of `simulate`.

    Examples
    --------
    >>> from tessbkg.simulate import Simulation, light
    >>> light(Simulation(frames=4, shape=(64, 64)), 2).shape
    (64, 64)
    """

    sector: int = 1
    camera: int = 1
    ccd: int = 4
    frames: int = 24
    start: float | None = None
    cadence: float | None = None
    step: int | None = None
    shape: tuple[int, int] = SCIENCE_SHAPE
    seed: int = 0
    model: Model = KINDS["orbit"]
    pointing: tuple[float, float, float] | None = None
    orbit: str = "synthetic"

    def __post_init__(self) -> None:
        CCD(self.sector, self.camera, self.ccd)
        _whole("frames", self.frames, 1)
        _whole("seed", self.seed, 0)
        if self.step is not None:
            _whole("step", self.step, 1)
        object.__setattr__(self, "shape", tuple(self.shape))
        if len(self.shape) != 2 or any(n % BLOCK or not 16 <= n <= SCIENCE_SHAPE[0] for n in self.shape):
            raise ValueError(f"shape={self.shape!r}: allowed are two multiples of {BLOCK} from 16 to 2048")
        if self.cadence is not None and (self.cadence < 20 or self.cadence % 20):
            raise ValueError(f"cadence={self.cadence!r} s: allowed are multiples of 20 s")
        if self.start is not None and not 1000 < self.start < 20000:
            raise ValueError(f"start={self.start!r}: a TJD (JD - 2457000) between 1000 and 20000 is wanted")
        if self.orbit not in {"synthetic", "mission"}:
            raise ValueError(f"orbit={self.orbit!r} is unknown: allowed are 'synthetic' and 'mission'")
        if self.pointing is not None and (len(self.pointing) != 3 or not -90 <= self.pointing[1] <= 90):
            raise ValueError(f"pointing={self.pointing!r}: (ra, dec, roll) in degrees are wanted")


class _Frames(NamedTuple):
    """What is known of each frame before a pixel is made; every array has one entry a frame."""

    ffiindex: npt.NDArray[np.int64]
    start: F64  # TJD of TSTART
    mid: F64
    barycorr: F64
    earth: F64  # (frames, 3), camera frame
    moon: F64
    earth_km: F64
    moon_km: F64
    row_offset: F64  # of the stars, pixels
    column_offset: F64
    turn: F64  # pixels at the edge of the CCD
    dump: npt.NDArray[np.bool_]


class _Static(NamedTuple):
    """What all frames of a CCD share."""

    stars: tuple[F32, ...]  # image and derivatives by row, column, row row, row column, column column
    sky: F32  # zodiacal light and glow with straps
    strap: F32  # (columns,)
    frame: npt.NDArray[Any]  # big-endian whole frame full of sentinels
    scatter: tuple[F32, F32]  # rows, columns: scatter of UNCERT


class _Case(NamedTuple):
    """What is particular about one file."""

    fault: str
    quality: int
    scid: int
    ffiindex: bool
    old: bool = False  # the earlier processing of a duplicate


# ---- arguments


def _whole(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < low:
        raise ValueError(f"{name}={value!r}: an integer of at least {low} is wanted")


def _model(kind: str | Model) -> Model:
    if isinstance(kind, Model):
        return kind
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: allowed are {', '.join(KINDS)} or a Model")
    return KINDS[kind]


def _faults(faults: Mapping[int, str] | Iterable[tuple[int, str]], frames: int) -> dict[int, str]:
    chosen = dict(faults)
    for i, fault in chosen.items():
        if fault not in FAULTS:
            raise ValueError(f"faults: {fault!r} at frame {i!r}: allowed are {', '.join(FAULTS)}")
        if not isinstance(i, int | np.integer) or not 0 <= i < frames:
            raise ValueError(f"faults: frame {i!r} ({fault}): allowed are 0 to {frames - 1}")
    return chosen


# ---- times, orbit, pointing


def _cadence(sim: Simulation) -> float:
    """Give the cadence in seconds: 1800 s in sectors 1-26, 600 s in 27-55, 200 s from 56 on."""
    if sim.cadence is not None:
        return float(sim.cadence)
    return 1800.0 if sim.sector <= 26 else 600.0 if sim.sector <= 55 else 200.0


def _start(sim: Simulation) -> float:
    """Give the nominal TJD of the first frame: sectors are 27.3 d apart to within a few days.

    Numbers from 1000 on are special (1751: comet 3I/ATLAS) and follow no rule; they get January 2026.
    """
    if sim.start is not None:
        return float(sim.start)
    return 1325.313 + 27.3 * (sim.sector - 1) if sim.sector < 1000 else 4055.5


def _pointing(sim: Simulation) -> tuple[float, float, float]:
    """Give ra, dec and roll of the spacecraft in degrees: the real one for sector 1, else a sensible one."""
    if sim.pointing is not None:
        return sim.pointing
    if sim.sector == 1:
        return 352.6844, -64.8531, 222.153
    if sim.orbit == "mission":
        return nominal_pointing(sim.sector)
    year, n = divmod(sim.sector - 1, 13)
    return (352.68 + 27.7 * n) % 360.0, -54.0 if year % 2 == 0 else 54.0, 222.153


def _axes(pointing: tuple[float, float, float], camera: int) -> F64:
    """Give the rows x, y, z (boresight) of the camera frame in ICRS.

    C = T Ry(alpha) Rz(roll + 180) Ry(90 - dec) Rz(ra), alpha and T as in `_mount`: the mission's nominal
    mounting, checked against its own angles of Earth and Moon.
    """
    ra, dec, roll = pointing
    return np.asarray(_mount(camera) @ _about_z(roll + 180) @ _about_y(90 - dec) @ _about_z(ra))


def _mount(camera: int) -> F64:
    """Turn spacecraft to camera frame: by -36, -12, 12, 36 deg about y, cameras 1 and 2 upside down."""
    turn = np.diag([-1.0, -1.0, 1.0]) if camera <= 2 else np.eye(3)
    return np.asarray(turn @ _about_y(24.0 * camera - 60.0))


def _about_z(degree: float) -> F64:
    c, s = np.cos(np.radians(degree)), np.sin(np.radians(degree))
    return np.array([[c, s, 0], [-s, c, 0], [0, 0, 1.0]])


def _about_y(degree: float) -> F64:
    c, s = np.cos(np.radians(degree)), np.sin(np.radians(degree))
    return np.array([[c, 0, -s], [0, 1.0, 0], [s, 0, c]])


def _sky(sim: Simulation, days: F64, mid: F64) -> tuple[F64, F64, F64, F64]:
    """Give the unit vectors of Earth and Moon in the camera frame and their distances in km.

    Synthetic: TESS on an ellipse of 17 to 59 Earth radii, the Moon on a circle. In the spacecraft frame the
    orbit's plane is set so that the Earth passes some 25 deg outside camera 1 at the end of each orbit.

    Parameters
    ----------
    sim : Simulation
    days : numpy.ndarray
        Days after the nominal start of the sector.
    mid : numpy.ndarray
        TJD of the same moments; where TESS really was then is taken with ``orbit="mission"``.
    """
    if sim.orbit == "mission":
        axes = _axes(_pointing(sim), sim.camera)
        sight = lines_of_sight(mid, tess_position(mid))
        (earth, earth_km), (moon, moon_km) = (
            (vector @ axes.T / length[:, None], length)
            for vector in (sight["earth"], sight["moon"])
            for length in [np.linalg.norm(vector, axis=1)]
        )
        return earth, moon, earth_km, moon_km
    a, e = 38.0, 0.553
    mean = 2 * np.pi * (days - PERIGEE) / ORBIT
    ecc = mean.copy()
    for _ in range(12):
        ecc -= (ecc - e * np.sin(ecc) - mean) / (1 - e * np.cos(ecc))
    nu = 2 * np.arctan2(np.sqrt(1 + e) * np.sin(ecc / 2), np.sqrt(1 - e) * np.cos(ecc / 2))
    alpha = np.radians(-62.0)  # 26 deg outside camera 1, which looks along -36
    nearest = np.array([np.sin(alpha), 0.0, np.cos(alpha)])
    tip = np.radians(35.0)  # so that every camera looks away from the Earth somewhere in the orbit
    along = np.array([np.sin(tip) * np.cos(alpha), np.cos(tip), -np.sin(tip) * np.sin(alpha)])
    plane = np.stack([nearest, along, np.cross(nearest, along)])
    seen = nu + np.radians(98.0)  # the Earth is nearest to camera 1 some two days before perigee
    tess = -(a * (1 - e * np.cos(ecc)))[:, None] * (
        np.stack([np.cos(seen), np.sin(seen), 0 * seen], 1) @ plane
    )
    lunar = 2 * np.pi * days / 27.32 + np.radians(100.0)
    tilt = np.radians(25.0)
    circle = np.stack([np.cos(lunar), np.sin(lunar) * np.cos(tilt), np.sin(lunar) * np.sin(tilt)], 1)
    body = 60.3 * (circle @ plane)
    vectors = np.stack([-tess, body - tess])
    distance = np.linalg.norm(vectors, axis=2)
    earth, moon = vectors / distance[..., None] @ _mount(sim.camera).T
    if sim.model.moon_in_field:
        first, last = days[0], days[-1]
        shift = 0.2 * (days - first - 0.27 * (last - first) - 0.2) / 3.0  # about 4 deg a day
        u, v = (float(edge.mean()) for edge in _field(sim))
        moon = np.stack([u + 0.02 + 0.3 * shift, v - 0.03 + shift, np.ones_like(days)], 1)
        moon /= np.linalg.norm(moon, axis=1)[:, None]
    return earth, moon, distance[0] * EARTH_RADIUS, distance[1] * EARTH_RADIUS


def _barycorr(direction: F64, tjd: F64) -> F64:
    """Give the light time in days from the Earth to the barycentre along a direction (low-precision Sun)."""
    d = tjd + 2457000.0 - 2451545.0
    g = np.radians(357.529 + 0.98560028 * d)
    lon = np.radians(280.459 + 0.98564736 * d + 1.915 * np.sin(g) + 0.020 * np.sin(2 * g))
    au = 1.00014 - 0.01671 * np.cos(g) - 0.00014 * np.cos(2 * g)
    tilt = np.radians(23.439)
    earth = -au * np.stack([np.cos(lon), np.sin(lon) * np.cos(tilt), np.sin(lon) * np.sin(tilt)])
    return np.asarray(np.round(499.004784 / 86400.0 * (direction @ earth), 10))


@lru_cache(maxsize=4)
def _table(sim: Simulation) -> _Frames:
    """Give times, geometry and pointing of all frames."""
    day = _cadence(sim) / 86400.0
    a_orbit = int(np.ceil(SCIENCE / day))
    step = sim.step or max(1, 2 * a_orbit // sim.frames)
    orbit, within = np.divmod(np.arange(sim.frames) * step, a_orbit)
    slot = np.ceil(orbit * ORBIT / day).astype(np.int64) + within
    index = round((_start(sim) - INDEX_EPOCH) / day) + slot
    start: F64 = (
        INDEX_EPOCH + 0.000334 + index.astype(np.float64) * day
    )  # 29 s: the phase of the real sector 1
    mid = start + day / 2
    days: F64 = slot.astype(np.float64) * day
    earth, moon, earth_km, moon_km = _sky(sim, days, mid)
    centre = (
        _axes(_pointing(sim), sim.camera).T
        @ _directions(sim.camera, sim.ccd, *map(np.atleast_1d, (0.5, 0.5)))[0]
    )
    dump = np.diff(np.floor((np.stack([days - day, days]) + 1.25) / sim.model.dump_days), axis=0)[0] > 0
    jitter = np.array(
        [np.random.default_rng((sim.seed, sim.sector, int(i))).standard_normal(3) for i in index]
    )
    jitter *= sim.model.jitter * np.where(dump, 10.0, 1.0)[:, None]
    slow = (days - ORBIT) / (2 * ORBIT)
    wobble = 0.1 * np.sin(2 * np.pi * days / ORBIT)
    angle = np.radians(90.0 * sim.ccd + 20.0 * sim.camera)
    return _Frames(
        index, start, mid, _barycorr(centre, mid), earth, moon, earth_km, moon_km,
        sim.model.drift * (np.sin(angle) * slow + wobble) + jitter[:, 0],
        sim.model.drift * (np.cos(angle) * slow - wobble) + jitter[:, 1],
        0.3 * sim.model.drift * slow + 0.3 * jitter[:, 2],
        dump,
    )  # fmt: skip


# ---- where pixels look


@lru_cache(maxsize=1)
def _corners() -> dict[tuple[int, int], F64]:
    """Read x, y of the corner pixels in the camera frame: (row end, column end, 2) by camera and CCD."""
    text = resources.files("tessbkg").joinpath("data/camera_corners.csv").read_text()
    rows = np.array([line.split(",") for line in text.splitlines() if line[:1].isdigit()], dtype=float)
    table = rows.reshape(4, 4, 2, 2, 6)  # camera, ccd, row end, column end
    return {(c + 1, k + 1): table[c, k, :, :, 4:] for c in range(4) for k in range(4)}


def _stretch(tangent: F64) -> F64:
    """Give focal-plane radius over tan(field angle): the shape of the camera's radial distortion.

    Coefficients of camera 1 in tess-point's focal-plane model; only the shape matters, since the corners are
    tied to the table.
    """
    q = np.asarray((tangent**2).sum(axis=-1))
    return np.asarray(1.0 + q * (0.24778 + q * (-0.22681 + q * (10.78243 + q * -34.97817))))


def _directions(camera: int, ccd: int, row: F64, column: F64) -> F64:
    """Give unit vectors in the camera frame.

    Parameters
    ----------
    camera, ccd : int
    row, column : numpy.ndarray
        Place between the first (0) and the last (1) science pixel centre.
    """
    xy = _corners()[camera, ccd]
    tangent = xy / np.sqrt(1 - (xy**2).sum(axis=-1, keepdims=True))
    focal = tangent * _stretch(tangent)[..., None]
    r, c = row[..., None], column[..., None]
    place = (1 - r) * ((1 - c) * focal[0, 0] + c * focal[0, 1]) + r * (
        (1 - c) * focal[1, 0] + c * focal[1, 1]
    )
    tangent = place
    for _ in range(30):
        tangent = place / _stretch(tangent)[..., None]
    vector = np.concatenate([tangent, np.ones_like(r)], axis=-1)
    return np.asarray(vector / np.linalg.norm(vector, axis=-1, keepdims=True))


def _field(sim: Simulation) -> tuple[F64, F64]:
    """Give camera-plane coordinates of rows and columns, which run along x and along y in every CCD."""
    xy = _corners()[sim.camera, sim.ccd]
    x, y = xy[..., 0].mean(axis=1), xy[..., 1].mean(axis=0)
    return np.linspace(x[0], x[1], sim.shape[0]), np.linspace(y[0], y[1], sim.shape[1])


def _wcs(sim: Simulation) -> dict[str, str]:
    """Fit a TAN-SIP solution of order 4 to the camera model; cards by keyword."""
    rows, columns = sim.shape
    axes = _axes(_pointing(sim), sim.camera)
    crpix = np.round(np.array([1000 / 2047 * (columns - 1) + LEADING + 1, 1000 / 2047 * (rows - 1) + 1]))
    row, column = (
        g.ravel() for g in np.meshgrid(np.linspace(0, 1, 33), np.linspace(0, 1, 33), indexing="ij")
    )
    here = (crpix - [LEADING + 1, 1]) / [columns - 1, rows - 1]
    n = _directions(sim.camera, sim.ccd, np.append(row, here[1]), np.append(column, here[0])) @ axes
    n, centre = n[:-1], n[-1]
    east = np.cross([0, 0, 1.0], centre)
    east /= np.linalg.norm(east)
    plane = np.degrees(np.stack([n @ east, n @ np.cross(centre, east)], 1) / (n @ centre)[:, None])
    uv = np.stack([column * (columns - 1) + LEADING + 1, row * (rows - 1) + 1], 1) - crpix
    size = np.array([columns, rows], float)
    powers = [(p, q) for total in range(1, 5) for p in range(total, -1, -1) for q in (total - p,)]

    def fit(x: F64, y: F64, scale: F64) -> F64:
        terms = np.stack([(x[:, 0] / scale[0]) ** p * (x[:, 1] / scale[1]) ** q for p, q in powers], 1)
        unit = np.array([scale[0] ** p * scale[1] ** q for p, q in powers])
        return np.asarray(np.linalg.lstsq(terms, y, rcond=None)[0] / unit[:, None])

    cd = fit(uv, plane, size)[:2].T
    straight = plane @ np.linalg.inv(cd).T
    forward, backward = fit(uv, straight - uv, size), fit(straight, uv - straight, size)
    cards = {
        "CRVAL1": f"{np.degrees(np.arctan2(centre[1], centre[0])) % 360:.15f}",
        "CRVAL2": f"{np.degrees(np.arcsin(centre[2])):.15f}",
        "CRPIX1": f"{crpix[0]:.1f}", "CRPIX2": f"{crpix[1]:.1f}",
        "A_DMAX": f"{np.abs(straight - uv)[:, 0].max():.12f}",
        "B_DMAX": f"{np.abs(straight - uv)[:, 1].max():.12f}",
    }  # fmt: skip
    cards |= {f"CD{i + 1}_{j + 1}": f"{cd[i, j]:.12E}" for i in (0, 1) for j in (0, 1)}
    for k, (p, q) in enumerate(powers):
        for axis, name in enumerate("AB"):
            cards[f"{name}P_{p}_{q}"] = f"{backward[k, axis]:.12E}"
            if p + q > 1:
                cards[f"{name}_{p}_{q}"] = f"{forward[k, axis]:.12E}"
    return cards


# ---- scattered light


def _polar(vector: F64) -> tuple[F64, F64]:
    """Give the angle from the boresight and the azimuth about it, from x to y, in degrees."""
    x, y, z = np.moveaxis(vector, -1, 0)
    return np.degrees(np.arctan2(np.hypot(x, y), z)), np.degrees(np.arctan2(y, x)) % 360


def _dark(sim: Simulation) -> frozenset[int]:
    """Frames without the light that never goes away (kind few_dark)."""
    return frozenset(
        int(sim.frames * (0.05 + 0.5 * (k % 2) + 0.05 * (k // 2))) for k in range(sim.model.dark_frames)
    )


def _amplitudes(sim: Simulation, i: int) -> tuple[float, float]:
    """Give the level of the Earth's and the Moon's light on the camera in electron s-1."""
    t, m = _table(sim), sim.model
    earth = m.earth * (18 * EARTH_RADIUS / t.earth_km[i]) ** 2 * np.exp((30 - _polar(t.earth[i])[0]) / 10)
    earth /= 1 + earth / 3000
    earth *= 1 + 0.1 * np.sin(2 * np.pi * t.mid[i] / 0.9973)  # clouds and land turn under TESS
    moon = (
        m.moon
        * (45 * EARTH_RADIUS / t.moon_km[i]) ** 2
        * np.exp((25 - max(float(_polar(t.moon[i])[0]), 15)) / 7)
    )
    if m.dark_frames and i not in _dark(sim):
        earth += 10 + 6 * np.sin(2 * np.pi * t.mid[i] / 3.1)
    return float(earth), float(moon)


def _smooth(u: F64, v: F64, azimuth: float, phase: float) -> tuple[F64, F64]:
    """Give rows (n, rows) and columns (n, columns) whose outer products add up to a mean of about 1."""
    c, s = np.cos(azimuth), np.sin(azimuth)
    rows = [
        0.3 * np.exp(1.2 * u * c), 0.01 * np.exp(3.5 * u * c),
        0.3 * np.exp(-(((u - 0.6 * c) / 0.55) ** 2)),
        0.1 * (1 + np.cos(7 * u + phase)), 0.06 * (1 + np.sin(11 * u - 2 * phase)),
    ]  # fmt: skip
    columns = [
        np.exp(1.2 * v * s), np.exp(3.5 * v * s), np.exp(-(((v - 0.6 * s) / 0.55) ** 2)),
        1 + np.cos(6 * v + 1 + azimuth), 1 + np.sin(9 * v + azimuth),
    ]  # fmt: skip
    return np.array(rows), np.array(columns)


def _ramp(distance: F32, width: float) -> F32:
    """Give 1 inside, 0 outside and a smooth edge of some width (pixels) around distance 0."""
    t = np.clip(np.float32(0.5) - distance / np.float32(width), 0, 1)
    return np.asarray(t * t * (np.float32(3) - 2 * t))


def _glints(sim: Simulation, level: float, azimuth: float, day: float) -> Iterator[F32]:
    """Give arcs and a ray with sharp edges which move with time and with the direction of the Earth."""
    rows, columns = sim.shape
    r = np.linspace(-1, 1, rows, dtype=np.float32)[:, None]
    c = np.linspace(-1, 1, columns, dtype=np.float32)
    pixels = rows / 2
    for k in range(sim.model.arcs):
        turn = azimuth + 0.7 + 1.9 * k
        radius = 1.5 + 0.35 * np.sin(2 * np.pi * day / (0.7 + 0.3 * k) + k)
        distance = np.hypot(r - np.float32(1.6 * np.cos(turn)), c - np.float32(1.6 * np.sin(turn)))
        distance = (distance - np.float32(radius)) * np.float32(pixels)
        fade = 1 / (1 + (distance / np.float32(0.12 * rows)) ** 2)
        yield np.float32(level / (1 + 0.5 * k)) * _ramp(distance, sim.model.glint_edge) * fade
    turn = azimuth - 0.5 + 0.8 * np.sin(2 * np.pi * day / 1.3)
    across = r * np.float32(np.cos(turn)) + c * np.float32(np.sin(turn)) - np.float32(0.3)
    along = c * np.float32(np.cos(turn)) - r * np.float32(np.sin(turn))
    band = np.abs(across) * np.float32(pixels) - np.float32(rows / 80)
    yield np.float32(0.4 * level) * _ramp(band, sim.model.glint_edge) / (1 + (along - 1) ** 2)


def _moon_image(sim: Simulation, moon: F64) -> F32 | None:
    """Give disc and halo of a Moon in or near the field, or None."""
    if moon[2] < 0.85:
        return None
    u, v = _field(sim)
    scale = np.float32(2048 / sim.shape[0])
    row = np.float32((moon[0] - u[0]) / (u[-1] - u[0]) * (sim.shape[0] - 1))
    column = np.float32((moon[1] - v[0]) / (v[-1] - v[0]) * (sim.shape[1] - 1))
    r = (np.arange(sim.shape[0], dtype=np.float32)[:, None] - row) * scale
    c = (np.arange(sim.shape[1], dtype=np.float32) - column) * np.float32(2048 / sim.shape[1])
    square = r * r + c * c
    q = 1 / (1 + square / np.float32(50**2))
    # 0.26 deg is 45 pixels; 1e6 is far above saturation
    return np.asarray(
        np.float32(2e5) * q * q + np.float32(1e6) * _ramp(np.sqrt(square) - np.float32(45), 3.0)
    )


def light(source: Simulation | xr.Dataset, i: int) -> F32:
    """Compute the exact scattered light of one frame at full resolution.

    Parameters
    ----------
    source : Simulation or xarray.Dataset
        A truth as returned by `simulate` (also when opened again from disk), or what it was made from.
    i : int
        Frame number, 0-based.

    Returns
    -------
    numpy.ndarray
        (rows, columns) float32, science pixels, electron s-1, without noise and without the strap factor.

    Raises
    ------
    ValueError
        If there is no such frame.

    Examples
    --------
    >>> from tessbkg.simulate import Simulation, light
    >>> sim = Simulation(frames=24, shape=(32, 32))
    >>> bool(light(sim, 1).max() < 0.02 < 100 < light(sim, 12).mean())
    True
    """
    sim = source if isinstance(source, Simulation) else _from_truth(source)
    if not 0 <= i < sim.frames:
        raise ValueError(f"i={i}: allowed are 0 to {sim.frames - 1}")
    t = _table(sim)
    u, v = (edge / 0.21 for edge in _field(sim))  # -1 to 1 over the camera
    total = np.zeros(sim.shape, np.float32)
    day = float(t.mid[i])
    earth, moon = _amplitudes(sim, i)
    for level, vector, phase in ((earth, t.earth[i], day), (moon, t.moon[i], 0.5 * day)):
        azimuth = float(np.arctan2(vector[1], vector[0]))
        rows, columns = _smooth(u, v, azimuth, phase)
        total += (level * rows.T).astype(np.float32) @ columns.astype(np.float32)
    fraction = earth / (earth + 60) * min(1.0, earth)  # none in dark frames
    if sim.model.glint * fraction > 0.01:
        azimuth = float(np.arctan2(t.earth[i, 1], t.earth[i, 0]))
        for glint in _glints(sim, sim.model.glint * fraction, azimuth, day):
            total += glint
    if sim.model.moon_in_field and (image := _moon_image(sim, t.moon[i])) is not None:
        total += image
    return total


def _blocks(image: F32) -> F32:
    rows, columns = (n // BLOCK for n in image.shape)
    return np.asarray(image.reshape(rows, BLOCK, columns, BLOCK).mean(axis=(1, 3)))


# ---- static sky


def _stamp(images: list[F32], stars: tuple[F64, F64, F64], *, sigma: float, half: int, pad: int) -> None:
    """Add Gaussian stars and their derivatives by position to six padded images."""
    row, column, flux = stars
    width = images[0].shape[1]
    o = np.arange(-half, half + 1)
    axes = []
    for place in (row, column):
        pixel = np.floor(place + 0.5).astype(np.int64)
        d = (pixel[:, None] + o - place[:, None]) / sigma
        g = np.exp(-0.5 * d * d) / (np.sqrt(2 * np.pi) * sigma)
        axes.append((pixel[:, None] + o + pad, (g, g * d / sigma, g * (d * d - 1) / sigma**2)))
    (rows, y), (columns, x) = axes
    where = (rows[:, :, None] * width + columns[:, None, :]).ravel()
    for image, (a, b) in zip(images, ((0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (0, 2)), strict=True):
        values = (flux[:, None] * y[a])[:, :, None] * x[b][:, None, :]
        np.add(image, np.bincount(where, values.ravel(), image.size).reshape(image.shape), out=image)


def _stars(sim: Simulation) -> tuple[F32, ...]:
    """Draw a star field: Tmag 3 to 17, counts growing by 10**0.36 a magnitude.

    Tmag 10 gives 15,000 electron s-1 (TESS Science Support Center).
    """
    rng = np.random.default_rng((sim.seed, sim.sector, sim.camera, sim.ccd))
    rows, columns = sim.shape
    pad, margin = 24, 12  # stars stand up to `margin` outside and their stamps fit into `pad`
    area = (rows + 2 * margin) * (columns + 2 * margin) / SCIENCE_SHAPE[0] ** 2
    number = max(1, round(5e5 * sim.model.density * area))
    magnitude = np.maximum(17 + np.log10(1 - rng.random(number)) / 0.36, 3.0)
    row = rng.uniform(-margin, rows + margin - 1, number)
    column = rng.uniform(-margin, columns + margin - 1, number)
    # one star saturates on the smallest of detectors
    magnitude[0], row[0], column[0] = 5.0, 0.61 * rows + 0.2, 0.37 * columns + 0.4
    flux = 15000 * 10 ** (0.4 * (10 - magnitude))
    faint = magnitude > 13
    padded = (rows + 2 * pad, columns + 2 * pad)
    whole = np.round(row[faint]).astype(np.int64) + pad, np.round(column[faint]).astype(np.int64) + pad
    delta = np.bincount(np.ravel_multi_index(whole, padded), flux[faint], padded[0] * padded[1])
    delta = delta.reshape(padded).astype(np.float32)
    orders = ((0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (0, 2))
    # moving a star is moving the image the other way: odd derivatives change sign
    images: list[F32] = [
        np.asarray((-1) ** sum(order) * gaussian_filter(delta, 1.0, order=order, mode="constant"))
        for order in orders
    ]
    bright = np.flatnonzero(~faint)
    for chunk in np.array_split(bright, len(bright) // 20000 + 1):
        for share, sigma, half in ((0.85, 0.9, 5), (0.15, 2.0, 8)):
            stars = row[chunk], column[chunk], share * flux[chunk]
            _stamp(images, stars, sigma=sigma, half=half, pad=pad)
    for k in np.flatnonzero(magnitude < 8):  # halo of 2 % of the light
        half = 60 if magnitude[k] < 6 else 25
        middle = round(float(row[k])) + pad, round(float(column[k])) + pad
        window = tuple(slice(max(m - half, 0), m + half + 1) for m in middle)
        y, x = (np.arange(n)[w] - pad for n, w in zip(padded, window, strict=True))
        dy, dx = (y - row[k])[:, None], x - column[k]
        u, level = 1 + (dy**2 + dx**2) / 9, 0.02 * flux[k] / (2 * np.pi * 9)
        first, second = level / 3 * u**-2.5, level * 5 / 27 * u**-3.5
        shapes = (
            level * u**-1.5, dy * first, dx * first,
            dy**2 * second - first, dy * dx * second, dx**2 * second - first,
        )  # fmt: skip
        for derivative, shape in zip(images, shapes, strict=True):
            derivative[window] += shape.astype(np.float32)
    images = [image[pad:-pad, pad:-pad] for image in images]
    bled = _bleed(images[0].astype(np.float64))
    still = (images[0] > 0.5 * FULL_WELL) | (bled > 0.99 * FULL_WELL)
    return (bled.astype(np.float32), *(np.where(still, np.float32(0), d) for d in images[1:]))


def _bleed(image: F64) -> F64:
    """Move charge above the full well along its column, half up and half down."""
    out = np.minimum(image, FULL_WELL)
    columns = np.flatnonzero((image > FULL_WELL).any(axis=0))
    half = (image[:, columns] - out[:, columns]) / 2
    filled = out[:, columns]
    for order in (range(len(image)), range(len(image) - 1, -1, -1)):
        carry = np.zeros(len(columns))
        for r in order:
            charge = filled[r] + half[r] + carry
            filled[r] = np.minimum(charge, FULL_WELL)
            carry = charge - filled[r]
    out[:, columns] = filled
    return out


def _strap(sim: Simulation) -> F32:
    """Give the response of each science column to diffuse light; small detectors have the straps that fit."""
    factor = np.ones(sim.shape[1], np.float32)
    columns = STRAP_COLUMNS[sim.shape[1] > STRAP_COLUMNS + 1]
    for shift in (-1, 1):
        factor[columns + shift] = 1 + sim.model.strap * 7 / 17
    factor[columns] = 1 + sim.model.strap
    return factor


@lru_cache(maxsize=1)
def _static(sim: Simulation) -> _Static:
    """Make what all frames of a CCD share."""
    rows, columns = sim.shape
    u, v = (edge / 0.21 for edge in _field(sim))
    # ecliptic latitude grows from camera 1 to 4; surface brightness by latitude as in SPyFFI
    outward = 1.0 if sim.camera > 2 else -1.0
    latitude = np.abs((sim.camera - 1) * 24 + 18 + outward * 12 * u)
    zodi = np.interp(np.minimum(latitude, 180 - latitude), [0, 10, 30, 60, 90], [137, 110, 76, 54, 48])
    sky = sim.model.zodi * 1.1 * zodi[:, None] * (1 + 0.06 * v)
    radius = 2048 * np.hypot(u[:, None], v)
    sky += sim.model.glow * 8 * np.maximum((radius - 2400) / 500, 0) ** 2
    strap = _strap(sim)
    frame = np.empty((rows + EXTRA_ROWS, columns + LEADING + TRAILING), ">f4")
    frame[:, :LEADING], frame[:, LEADING + columns :] = SENTINELS["leading"], SENTINELS["trailing"]
    for k, name in enumerate(("buffer", "smear", "virtual")):
        frame[rows + 10 * k : rows + 10 * k + 10] = SENTINELS[name]
    rng = np.random.default_rng((sim.seed, 1))
    scatter = tuple((1 + 0.006 * rng.standard_normal(n)).astype(np.float32) for n in sim.shape)
    return _Static(_stars(sim), (strap * sky).astype(np.float32), strap, frame, (scatter[0], scatter[1]))


def scene(source: Simulation | xr.Dataset) -> F32:
    """Compute the static sky as a frame without light, noise and pointing offset would show it.

    Parameters
    ----------
    source : Simulation or xarray.Dataset
        As for `light`.

    Returns
    -------
    numpy.ndarray
        (rows, columns) float32, electron s-1.
    """
    static = _static(source if isinstance(source, Simulation) else _from_truth(source))
    return static.stars[0] + static.sky


# ---- one frame


def _pixels(sim: Simulation, i: int, total: F32, out: npt.NDArray[Any], error: npt.NDArray[Any]) -> None:
    """Write flux and uncertainty of one frame into big-endian science regions, a band of rows at a time."""
    static, t = _static(sim), _table(sim)
    rows, columns = sim.shape
    rng = np.random.default_rng((sim.seed, sim.sector, sim.camera, sim.ccd, int(t.ffiindex[i])))
    per_second = np.float32(1800 / _cadence(sim))
    a, b = np.float32(NOISE_A) * per_second, np.float32(NOISE_B) * per_second
    dy = (t.row_offset[i] + t.turn[i] * np.linspace(-1, 1, columns)).astype(np.float32)
    dx = (t.column_offset[i] - t.turn[i] * np.linspace(-1, 1, rows)).astype(np.float32)[:, None]
    image, sy, sx, syy, sxy, sxx = static.stars
    overflow = sim.model.moon_in_field and bool((total > FULL_WELL).any())
    full = _bleed((image + static.strap * total).astype(np.float64)).astype(np.float32) if overflow else None
    band = max(1, 131072 // columns)
    noise = np.empty((min(band, rows), columns), np.float32)
    for r in range(0, rows, band):
        s = slice(r, min(r + band, rows))
        x = dx[s]
        flux = static.strap * total[s] + image[s] if full is None else full[s].copy()
        flux += static.sky[s]
        flux += dy * (sy[s] + np.float32(0.5) * dy * syy[s] + x * sxy[s])
        flux += x * (sx[s] + np.float32(0.5) * x * sxx[s])
        np.clip(flux, 0, 1.05 * FULL_WELL, out=flux)
        sigma = np.sqrt(a * flux + b)
        error[s] = sigma * static.scatter[0][s, None] * static.scatter[1]
        if sim.model.noise:
            sigma *= rng.standard_normal(dtype=np.float32, out=noise[: s.stop - r])
            flux += sigma
        out[s] = flux
    hits = rng.poisson(sim.model.cosmic_rays * rows * columns)
    where = rng.integers(0, rows, hits), rng.integers(0, columns, hits)
    out[where] = out[where] + rng.exponential(150.0, hits)


def _quality(sim: Simulation, i: int, blocks: F32, fault: str) -> int:
    """Give DQUALITY: bit 12 with the Earth within 35 deg (Moon 25), 15 when blown out, 6 in dumps."""
    t = _table(sim)
    stray = _polar(t.earth[i])[0] < 35 or _polar(t.moon[i])[0] < 25
    blown = fault == "saturated" or float((blocks > BLOWN).mean()) > 0.05
    bits = Quality.STRAY_LIGHT * (stray or blown) | Quality.BAD_CALIBRATION * blown
    return int(bits | Quality.DESATURATION * bool(t.dump[i] or fault == "dump"))


# ---- headers


@lru_cache(maxsize=1)
def _template() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Read the cards of a real FFI (sector 1, camera 1, CCD 4; NASA, public domain), primary and image."""
    cards = resources.files("tessbkg").joinpath("data/ffi_header.txt").read_text().splitlines()
    end = cards.index("END")
    return tuple(cards[:end]), tuple(cards[end + 1 : -1])


def _card(card: str, value: str) -> str:
    """Put another value into a card, keeping keyword and comment."""
    comment = card.partition(" / ")[2]
    text = value.ljust(20) if value.startswith("'") else value.rjust(20)
    return f"{card[:8]}= {text}{' / ' + comment if comment else ''}"[:80]


def _text(value: str) -> str:
    return f"'{value:<8}'"


def _utc(tjd: float) -> datetime:
    """Give UTC of a TDB time; no leap second was announced since 2017."""
    return datetime(2014, 12, 8, 12) + timedelta(days=tjd, seconds=-UTC_TO_TDB)  # noqa: DTZ001 (TJD 0, naive UTC)


def _stamps(start: float, stop: float) -> dict[str, str]:
    times = {"DATE-OBS": start, "DATE-END": stop}
    return {k: _text(_utc(t).isoformat(timespec="milliseconds") + "Z") for k, t in times.items()}


def _regions(sim: Simulation) -> dict[str, str]:
    rows, columns = sim.shape
    quarter = columns // 4
    values = {
        "NAXIS1": columns + LEADING + TRAILING,
        "NAXIS2": rows + EXTRA_ROWS,
        "SCIROWS": 1,
        "SCIROWE": rows,
    }
    for k, output in enumerate("ABCD"):
        first = LEADING + quarter * k
        values |= {f"LVCS{output}": 11 * k + 1, f"LVCE{output}": 11 * k + 11}
        values |= {f"SCCS{output}": first + 1, f"SCCE{output}": first + quarter}
        trail = LEADING + columns + 11 * k
        values |= {f"TVCS{output}": trail + 1, f"TVCE{output}": trail + 11}
    for k, name in enumerate(("BF", "SM", "V")):
        values |= {f"{name}ROWS": rows + 10 * k + 1, f"{name}ROWE": rows + 10 * k + 10}
    out = {key: str(value) for key, value in values.items()}
    return out | {"BTC_PIX1": f"{LEADING + columns / 2:.1f}", "BTC_PIX2": f"{rows / 2:.1f}"}


@lru_cache(maxsize=2)
def _cards(sim: Simulation) -> tuple[dict[str, str], dict[str, str]]:
    """Make the cards that all frames of a CCD share, by keyword, primary and image."""
    primary, image = ({card[:8].strip(): card for card in cards} for cards in _template())
    day = _cadence(sim) / 86400.0
    ra, dec, roll = _pointing(sim)
    reads = round(_cadence(sim) / 2)
    delay = (0.0, 1.5, 0.5, 1.0)[sim.camera - 1] + 0.02 * (sim.ccd - 1)
    image["TMOFST14"] = f"TMOFST{sim.camera}{sim.ccd}" + image["TMOFST14"][8:].replace(
        "camera 1 and ccd 4", f"camera {sim.camera} and ccd {sim.ccd}"
    )
    values = _regions(sim) | _wcs(sim) | {
        "SIMDATA": "T", "CAMERA": str(sim.camera), "CCD": str(sim.ccd), "TMOFST14": f"{delay:.5f}",
        "EXPOSURE": f"{day * LIVE_FRACTION:.12f}", "TELAPSE": f"{day:.12f}",
        "LIVETIME": f"{day * LIVE_FRACTION:.16f}", "TIMEDEL": f"{day:.18f}", "NUM_FRM": str(reads),
        "NREADOUT": str(round(0.8 * reads)), "RA_NOM": f"{ra:.13f}", "DEC_NOM": f"{dec:.13f}",
        "ROLL_NOM": f"{(roll + 180) % 360 - 180:.13f}",
    }  # fmt: skip
    image = {key: _card(card, values[key]) if key in values else card for key, card in image.items()}
    primary["SIMDATA"] = _card(primary["SIMDATA"], "T")
    primary["FFIINDEX"] = "FFIINDEX=                    0 / number of FFI cadence interval"
    return primary, image


def _blocked(cards: Iterable[str], blocks: int) -> bytes:
    """Join cards to a header of a number of 2880-byte blocks, filled up with COMMENT cards if need be."""
    filled = [*cards]
    filled += ["COMMENT synthetic: this card only makes the header longer"] * (
        36 * (blocks - 1) - len(filled)
    )
    text = "".join(f"{card:<80}" for card in [*filled, "END"]).encode("ascii")
    return text + b" " * (-len(text) % 2880)


def _headers(sim: Simulation, i: int, case: _Case) -> tuple[bytes, bytes, bytes]:
    """Make the three headers of one frame."""
    t = _table(sim)
    primary, image = (dict(cards) for cards in _cards(sim))
    start = float(t.start[i]) - (1 / 86400 if case.old else 0.0)
    stop = start + _cadence(sim) / 86400
    start, stop, late = round(start, 12), round(stop, 12), float(t.barycorr[i])
    made = _utc(start) + timedelta(days=20 if case.old else 400)
    new = {
        "TSTART": f"{start:.12f}", "TSTOP": f"{stop:.12f}", "DATE": _text(f"{made:%Y-%m-%d}"),
        "DATA_REL": str(sim.sector + (0 if case.old else 40)), "SCCONFIG": str(case.scid),
        "FFIINDEX": str(t.ffiindex[i]), **_stamps(start, stop),
    }  # fmt: skip
    primary |= {key: _card(primary[key], value) for key, value in new.items()}
    if not case.ffiindex or case.fault == "no_index":
        del primary["FFIINDEX"]
    camera = sim.camera % 4 + 1 if case.fault == "wrong_camera" else sim.camera
    new = {
        "TSTART": f"{start + late:.12f}", "TSTOP": f"{stop + late:.12f}", "BARYCORR": f"{late:.7E}",
        "DQUALITY": str(case.quality), "CAMERA": str(camera), **_stamps(start + late, stop + late),
    }  # fmt: skip
    if case.fault == "wrong_naxis":
        new["NAXIS1"] = str((sim.shape[1] + LEADING + TRAILING) // 2)
    blocks = {"offset": 7 + i % 4}.get(case.fault, 1)
    if case.fault in ("no_wcs", "dump", "saturated") or case.quality & (
        Quality.DESATURATION | Quality.BAD_CALIBRATION
    ):
        keys = list(image)
        for key in keys[keys.index("WCSAXES") : keys.index("B_DMAX") + 1]:
            del image[key]
    out = []
    for name in ("cal", "uncert"):
        new |= {"EXTNAME": _text(f"CAMERA.CCD {camera}.{sim.ccd} {name}"), "IMAGTYPE": _text(name)}
        image |= {key: _card(image[key], value) for key, value in new.items()}
        out.append(_blocked(image.values(), blocks))
    return _blocked(primary.values(), 1), out[0], out[1]


def _file(sim: Simulation, i: int, case: _Case, total: F32) -> bytearray:
    """Make the bytes of one FFI."""
    rows, columns = sim.shape
    frame = _static(sim).frame
    heads = _headers(sim, i, case)
    images = frame.copy(), frame.copy()
    science = tuple(image[:rows, LEADING : LEADING + columns] for image in images)
    if case.fault == "saturated":
        science[0][:], science[1][:] = 1.05 * FULL_WELL, np.sqrt(NOISE_A * FULL_WELL)
    elif case.fault in ("zero", "nan"):
        science[0][:] = science[1][:] = 0.0 if case.fault == "zero" else np.nan
    else:
        _pixels(sim, i, total, *science)
    if case.old:
        science[0][:] += 1.0
    out = bytearray(heads[0])
    for head, image in zip(heads[1:], images, strict=True):
        kept = np.ascontiguousarray(image[:, : image.shape[1] // 2]) if case.fault == "wrong_naxis" else image
        out += head
        out += kept.view(np.uint8).data
        out += bytes(-len(out) % 2880)
    if case.fault == "truncated":
        del out[int(0.4 * len(out)) :]
    return out


# ---- a whole CCD


def ffi_key(sim: Simulation, i: int, scid: int, *, old: bool = False) -> str:
    """Give the key of a frame below the root URL.

    Examples
    --------
    >>> from tessbkg.simulate import Simulation, ffi_key
    >>> ffi_key(Simulation(), 0, 120)
    'ffi/s0001/2018/206/1-4/tess2018206192942-s0001-1-4-0120-s_ffic.fits'
    """
    when = _utc(float(_table(sim).start[i]) - (1 / 86400 if old else 0.0))
    folder = f"ffi/s{sim.sector:04d}/{when:%Y/%j}/{sim.camera}-{sim.ccd}"
    return f"{folder}/tess{when:%Y%j%H%M%S}-s{sim.sector:04d}-{sim.camera}-{sim.ccd}-{scid:04d}-s_ffic.fits"


def _from_truth(truth: xr.Dataset) -> Simulation:
    """Read back what a truth was made from."""
    stored = json.loads(truth.attrs["simulation"])
    for name in ("shape", "pointing"):
        stored[name] = None if stored[name] is None else tuple(stored[name])
    return Simulation(**stored | {"model": Model(**stored["model"])})


def _truth(sim: Simulation, names: list[str], quality: list[int], faults: Mapping[int, str]) -> xr.Dataset:
    """Make everything of the truth but the light."""
    t, static = _table(sim), _static(sim)
    text = np.dtypes.StringDType()
    per_frame: dict[str, tuple[Any, str, str]] = {
        "btjd": (t.mid + t.barycorr, "d", "mid-exposure at the barycentre, BTJD (TDB)"),
        "barycorr": (t.barycorr, "d", "barycentric correction at the centre of the CCD"),
        "cadence": (t.ffiindex.astype(np.int32), "1", "FFIINDEX"),
        "quality": (np.array(quality, np.int32), "1", "DQUALITY"),
        "ffi": (np.array(names, dtype=text), "1", "file name"),
        "fault": (np.array([faults.get(i, "") for i in range(sim.frames)], dtype=text), "1", "what is wrong"),
        "row_offset": (t.row_offset, "pixel", "stars moved along rows, at the centre"),
        "column_offset": (t.column_offset, "pixel", "stars moved along columns, at the centre"),
        "turn": (t.turn, "pixel", "stars moved by the turn of the field, at the edge of the CCD"),
    }
    for body, place, km in (("earth", t.earth, t.earth_km), ("moon", t.moon, t.moon_km)):
        note = f"{body.title()}, synthetic orbit, camera frame"
        per_frame[f"{body}_angle"] = _polar(place)[0], "degree", note
        per_frame[f"{body}_azimuth"] = _polar(place)[1], "degree", note
        per_frame[f"{body}_distance"] = km, "km", note
    rows, columns = sim.shape
    middle = {k: np.arange(n // BLOCK) * BLOCK + (BLOCK - 1) / 2 for k, n in (("y", rows), ("x", columns))}
    pixel = {"units": "pixel", "long_name": "0-based science pixel"}
    return xr.Dataset(
        {
            **{k: ("time", v, {"units": u, "long_name": name}) for k, (v, u, name) in per_frame.items()},
            "scene": (("row", "column"), static.stars[0] + static.sky, {"units": "electron s-1"}),
            "strap": ("column", static.strap, {"units": "1", "long_name": "response to diffuse light"}),
        },
        {
            "time": ("time", t.mid, {"units": "d", "long_name": "mid-exposure at the spacecraft, TJD (TDB)"}),
            **{k: (k, v, pixel) for k, v in middle.items()},
            "row": ("row", np.arange(rows), pixel),
            "column": ("column", np.arange(columns), pixel),
        },
        {"title": "truth of simulated TESS FFIs", "simulation": json.dumps(asdict(sim), default=int)},
    )  # fmt: skip


def simulate(
    url: str,
    *,
    sector: int = 1,
    camera: int = 1,
    ccd: int = 4,
    frames: int = 24,
    start: float | None = None,
    cadence: float | None = None,
    step: int | None = None,
    shape: tuple[int, int] = SCIENCE_SHAPE,
    seed: int = 0,
    kind: str | Model = "orbit",
    pointing: tuple[float, float, float] | None = None,
    orbit: str = "synthetic",
    faults: Mapping[int, str] | Iterable[tuple[int, str]] = (),
    ffiindex: bool = True,
    ffir: bool = True,
    scid_change: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> xr.Dataset:
    """Write the FFIs of one CCD and their truth.

    A full-size frame takes a quarter of a second and 35.5 MB; memory does not grow with the number of frames.
    A frame depends on the seed and its cadence number only, not on how many are written (kinds ``moon`` and
    ``few_dark`` place events relative to the run).

    Parameters
    ----------
    url : str
        Root that holds ``ffi/``, any fsspec URL or local path. The truth goes to
        ``{url}/truth/s0001/cam1/ccd4.zarr``. Other files that are there stay.
    sector, camera, ccd : int
        Which CCD. Call again for another; all CCDs of a sector share times and pointing.
    frames : int
        Number of frames.
    start : float, optional
        Spacecraft TJD of the first TSTART, moved to the nearest nominal cadence; the synthetic orbit begins
        there. By default 1325.313 + 27.3 (sector - 1).
    cadence : float, optional
        Seconds; by default that of the sector: 1800 (1-26), 600 (27-55), 200.
    step : int, optional
        Every how many cadences a frame is written. By default `frames` span the two orbits of the sector,
        12.6 d each with a gap of 1.1 d between them.
    shape : tuple of int
        Science rows and columns, multiples of 4. A smaller detector sees the same sky in larger pixels.
    seed : int
        Of everything random.
    kind : str or Model
        One of `KINDS`, or a `Model` of your own.
    pointing : tuple of float, optional
        Right ascension, declination and roll of the spacecraft in degrees.
    orbit : {"synthetic", "mission"}
        Where the Earth and the Moon are: on an orbit that gives every run dark and bright frames, or where
        they really were, with the sector's real pointing, so that light and angles belong together.
    faults : mapping of int to str, or pairs
        Which frames get which of `FAULTS`.
    ffiindex : bool
        Write FFIINDEX, which early releases lack.
    ffir : bool
        Put a (fake) raw FFI beside every file, as the archive does.
    scid_change : bool
        Change the configuration number in the names in mid-sector, as in sectors 26 and 55.
    storage_options : mapping, optional
        For fsspec.

    Returns
    -------
    xarray.Dataset
        The truth, lazily opened: ``light(time, y, x)`` is the mean scattered light of blocks of 4 x 4 science
        pixels in electron s-1 (`light` gives every pixel), ``scene(row, column)`` the static sky,
        ``strap(column)`` the column response, and by frame ``time``, ``btjd``, ``barycorr``, ``cadence``,
        ``quality``, ``ffi``, ``fault``, pointing offsets and the places of Earth and Moon.

    Raises
    ------
    ValueError
        If an argument is out of range.

    Examples
    --------
    >>> import tessbkg.simulate
    >>> truth = tessbkg.simulate.simulate("memory://sky", frames=3, shape=(32, 32))
    >>> truth.light.shape, str(truth.ffi.values[0])
    ((3, 8, 8), 'tess2018206192942-s0001-1-4-0120-s_ffic.fits')
    """
    sim = Simulation(
        sector, camera, ccd, frames, start, cadence, step, shape, seed, _model(kind), pointing, orbit
    )
    chosen = _faults(faults, frames)
    options = check_options(storage_options)
    fs, root = filesystem(url, options)
    local = "file" in np.atleast_1d(fs.protocol)
    truth_url = f"{root if local else url.rstrip('/')}/truth/{CCD(sector, camera, ccd).group}.zarr"
    zarr_options = None if local else options
    group = zarr.open_group(truth_url, mode="w", zarr_format=3, storage_options=zarr_options)
    small = (shape[0] // BLOCK, shape[1] // BLOCK)
    together = max(1, min(frames, 2**22 // (small[0] * small[1])))
    target = group.create_array(
        "light", shape=(frames, *small), chunks=(together, *small), dtype="float32", fill_value=np.nan,
        dimension_names=("time", "y", "x"),
        attributes={"units": "electron s-1", "long_name": "mean scattered light over 4 x 4 science pixels"},
    )  # fmt: skip
    buffer = np.empty((together, *small), np.float32)
    names, quality, folders = [], [], set()
    for i in range(frames):
        fault = chosen.get(i, "")
        scid = min(119 + sector, 9998) + (2 if scid_change and i >= frames / 2 else 0)
        total = light(sim, i)
        buffer[i % together] = _blocks(total)
        quality.append(_quality(sim, i, buffer[i % together], fault))
        if (i + 1) % together == 0 or i == frames - 1:
            first = i - i % together
            target[first : i + 1] = buffer[: i + 1 - first]
        case = _Case(fault, quality[-1], scid, ffiindex)
        key = ffi_key(sim, i, scid)
        names.append(key.rpartition("/")[2])
        files: dict[str, bytes] = (
            {key.replace("_ffic", "_ffir"): b"raw FFIs are not simulated"} if ffir else {}
        )
        if fault in ("empty", "garbage"):
            files[key] = b"" if fault == "empty" else np.random.default_rng(i).bytes(20000)
        elif fault != "missing":
            files[key] = bytes(_file(sim, i, case, total))
        if fault == "duplicate":
            old = _file(sim, i, case._replace(old=True), total)
            files[ffi_key(sim, i, scid, old=True)] = bytes(old)
        for name, content in files.items():
            path = f"{root}/{name}"
            if local and (folder := path.rpartition("/")[0]) not in folders:
                fs.makedirs(folder, exist_ok=True)
                folders.add(folder)
            fs.pipe_file(path, content)
    truth = _truth(sim, names, quality, chosen)
    truth.to_zarr(truth_url, mode="a", zarr_format=3, consolidated=False, storage_options=zarr_options)
    _static.cache_clear()  # 200 MB at full size
    opened: xr.Dataset = xr.open_zarr(
        truth_url, consolidated=False, chunks=None, storage_options=zarr_options
    )
    return opened
