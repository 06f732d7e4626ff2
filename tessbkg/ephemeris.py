"""Where TESS, the Earth, the Moon and the Sun are at a time, and how TESS points in a sector.

Times are TJD (JD - 2457000), TDB, at the spacecraft. Positions are km along ICRF axes, geocentric unless a
function says otherwise. Nothing is downloaded unless the source is asked for by name.

Sources of TESS's position (``source=``):

``"table"``
    Embedded: every hour from 2018-06-01 to 2026-01-31 (``data/make_ephemeris.py`` tells how it was made).
    Interpolating costs 0.001 km (median; 20 km where trajectories were joined before they were tabulated).
    What it tabulates was reconstructed from tracking for 2018-06 .. 2019-11, 2022-12 .. 2023-01-15 and
    2023-12 .. 2024-12-05: there the Earth's direction is within 0.0005 degrees (median; 0.02 at most) of the
    SPICE kernel of sector 4. The rest was predicted up to 14 months ahead: tables made a year apart differ by
    0.06 .. 0.17 degrees (median), and by up to 1.4 degrees near perigee.
``"horizons"``
    JPL Horizons over https, one small request: the best that is known when it is asked.
path of one or more SPICE kernels, ``*.bsp``
    Read with spiceypy (``pip install tessbkg[spice]``); MAST has them in
    archive.stsci.edu/missions/tess/models.
path or URL of a TESSVectors file, ``*.csv``
    For cross-checks: within 20 km, 0.005 degrees.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cache as memoize
from importlib import resources
from pathlib import Path
from typing import Any, Final, Literal, cast

import numpy as np
import numpy.typing as npt

from tessbkg.errors import EphemerisRangeError, TessbkgError

__all__ = [
    "Ephemeris",
    "Orbit",
    "TESSVectors",
    "body_position",
    "horizons_url",
    "lines_of_sight",
    "nominal_camera_frame",
    "open_orbit",
    "parse_horizons",
    "read_tessvectors",
    "spacecraft_axes",
    "subspacecraft_longitude",
    "tess_position",
]

Floats = npt.NDArray[np.float64]
Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
Body = Literal["earth", "moon", "sun"]

TJD_ZERO: Final = 2457000.0
AU_KM: Final = 149597870.7
LIGHT_KM_S: Final = 299792.458
_DAY: Final = 86400.0
_TT_MINUS_UTC: Final = 69.184
"""TT - UTC in seconds since 2017-01-01: 32.184 + 37 leap seconds. UT1 is UTC within 0.9 s, 0.004 degrees."""

HORIZONS: Final = "https://ssd.jpl.nasa.gov/api/horizons.api"
TESSVECTORS_KM: Final = 6394.573
"""Unit of TESSVectors' distances, measured against DE440 (Earth radii, its documents say: 6378.137 km)."""
TESSVECTORS_LAG: Final = 60.0
"""A TESSVectors row is the geometry of this many seconds before its MidTime (measured in sector 1)."""

_MORE: Final = (
    "ask JPL Horizons (ephemeris='horizons', needs the network) or give SPICE kernels of TESS "
    "(*.bsp from archive.stsci.edu/missions/tess/models)"
)
_POINTS: Final = 6
"""Rows that an interpolation goes through: of hourly rows, 0.1 km at the closest perigee, metres else."""
_SPICE_LOCK: Final = threading.Lock()  # CSPICE keeps one pool of kernels for the process


@dataclass(frozen=True)
class Ephemeris:
    """Which sources of positions to use.

    Parameters
    ----------
    tess : str, path or sequence of paths
        ``"table"``, ``"horizons"``, SPICE kernels or a TESSVectors file, as the head of this module
        describes.
    bodies : str
        Earth, Moon and Sun: ``"builtin"`` (ERFA's epv00 and moon98, the builtin ephemeris of astropy; no
        download; Moon within 11 arcsec and Sun within 0.02 arcsec of DE440), or any other ephemeris that
        `astropy.coordinates.solar_system_ephemeris` takes, such as ``"de440"`` or the path of a JPL kernel.
        Names of JPL ephemerides are downloaded by astropy (100 MB) when they are not in its cache.
    cache : str or path, optional
        Folder for answers of Horizons: none is kept without it.
    """

    tess: Source = "table"
    bodies: str = "builtin"
    cache: str | os.PathLike[str] | None = None


@dataclass(frozen=True)
class Orbit:
    """TESS's geocentric positions from one source.

    Parameters
    ----------
    source : str
        What to call it in attributes.
    pieces : tuple of (float, float)
        Spans without gaps, TJD.
    predicted : tuple of (float, float)
        Spans that were predictions when the source was made, as far as is known.
    more : str
        What to do about times outside.
    interpolate : callable
        TJD (n,) inside the pieces -> km (n, 3).
    """

    source: str
    pieces: tuple[tuple[float, float], ...]
    interpolate: Callable[[Floats], Floats] = field(repr=False)
    predicted: tuple[tuple[float, float], ...] = ()
    more: str = _MORE

    def position(self, time: npt.ArrayLike) -> Floats:
        """Interpolate TESS's geocentric position.

        Parameters
        ----------
        time : array_like
            TJD, TDB. NaN gives NaN.

        Returns
        -------
        (..., 3) float64
            km, ICRF axes.

        Raises
        ------
        EphemerisRangeError
            If a time lies outside the source's span.
        """
        tjd = np.asarray(time, dtype=np.float64)
        flat = tjd.ravel()
        finite = np.isfinite(flat)
        inside = np.zeros(flat.shape, dtype=bool)
        for start, stop in self.pieces:
            inside |= (flat >= start) & (flat <= stop)
        bad = flat[finite & ~inside]
        if bad.size:
            spans = ", ".join(f"{_span(*piece)}" for piece in self.pieces)
            raise EphemerisRangeError(
                f"{bad.size} of {flat.size} times lie outside the ephemeris of TESS, the first at "
                f"{_moment(bad[0])}; {self.source} covers {spans}; {self.more}"
            )
        out = np.full((flat.size, 3), np.nan)
        if finite.any():
            out[finite] = self.interpolate(flat[finite])
        return out.reshape(*tjd.shape, 3)

    def attrs(self, time: npt.ArrayLike) -> dict[str, str]:
        """Tell, as attributes, where these positions came from: source, span, share of predictions."""
        tjd = np.asarray(time, dtype=np.float64).ravel()
        predicted = np.zeros(tjd.shape, dtype=bool)
        for start, stop in self.predicted:
            predicted |= (tjd >= start) & (tjd <= stop)
        attrs = {
            "ephemeris_source": self.source,
            "ephemeris_span": ", ".join(f"{_span(*piece)}" for piece in self.pieces),
        }
        if self.predicted:
            share = predicted.sum() / max(np.isfinite(tjd).sum(), 1)
            attrs["ephemeris_predicted"] = f"{100 * share:.0f} % of the times"
        return attrs


def tess_position(
    time: npt.ArrayLike, *, source: Source = "table", cache: str | os.PathLike[str] | None = None
) -> Floats:
    """Find where TESS is.

    Parameters
    ----------
    time : array_like
        TJD (JD - 2457000), TDB, at the spacecraft. NaN gives NaN.
    source : str, path or sequence of paths
        ``"table"``, ``"horizons"``, SPICE kernels (``*.bsp``) or a TESSVectors file (``*.csv``).
    cache : path, optional
        Folder for answers of Horizons.

    Returns
    -------
    (..., 3) float64
        Geocentric position, km, ICRF axes.

    Raises
    ------
    EphemerisRangeError
        If a time lies outside the source's span; the message says the span and how to get more.
    ValueError
        If the source is none of these.

    Examples
    --------
    >>> import numpy as np
    >>> x = tess_position([1325.3])
    >>> round(float(np.linalg.norm(x) / 6378.137), 1)
    20.2
    """
    return open_orbit(Ephemeris(tess=source, cache=cache), time).position(time)


def open_orbit(ephemeris: Ephemeris | Source, time: npt.ArrayLike) -> Orbit:
    """Open a source of TESS's positions for times known beforehand (Horizons is asked for these only).

    Parameters
    ----------
    ephemeris : Ephemeris, str, path or sequence of paths
        The source; see `Ephemeris`.
    time : array_like
        TJD, TDB.

    Raises
    ------
    EphemerisRangeError
        If Horizons or the kernels hold nothing of TESS for these times.
    ImportError
        If kernels are given and spiceypy is not installed.
    ValueError
        If the source is not one of those of `Ephemeris`.
    """
    if not isinstance(ephemeris, Ephemeris):
        ephemeris = Ephemeris(tess=ephemeris)
    source = ephemeris.tess
    if isinstance(source, str) and source == "table":
        return _table_orbit()
    if isinstance(source, str) and source == "horizons":
        return _horizons_orbit(np.asarray(time, dtype=np.float64), ephemeris.cache)
    paths = [os.fspath(p) for p in ([source] if isinstance(source, str | os.PathLike) else source)]
    if paths and all(path.lower().endswith(".bsp") for path in paths):
        return _spice_orbit(paths)
    if len(paths) == 1 and paths[0].lower().endswith(".csv"):
        return _tessvectors_orbit(paths[0])
    raise ValueError(
        f"ephemeris={source!r} is not a source of TESS's position: allowed are 'table', 'horizons', "
        "one or more SPICE kernels '*.bsp', or one TESSVectors file '*.csv'"
    )


# ------------------------------------------------------------------ the embedded table


@memoize
def _table_orbit() -> Orbit:
    """Open the table that ships with the package."""
    folder = resources.files("tessbkg") / "data"
    about = json.loads((folder / "tess_ephemeris.json").read_text(encoding="utf-8"))
    metres = np.load(io.BytesIO((folder / "tess_ephemeris.npy").read_bytes()), allow_pickle=False)
    step = about["step_hours"] / 24
    segments = about["segments"]
    ends = np.cumsum([segment["count"] for segment in segments])
    starts = np.array([segment["start"] for segment in segments])
    blocks = [
        (start + step * np.arange(len(x)), x)
        for start, x in zip(starts, np.split(metres, ends[:-1]), strict=True)
    ]

    def interpolate(tjd: Floats) -> Floats:
        which = np.clip(np.searchsorted(starts, tjd, side="right") - 1, 0, None)
        out = np.empty((tjd.size, 3))
        for index in np.unique(which):
            here = which == index
            nodes, table = blocks[index]
            out[here] = _lagrange(nodes, table, tjd[here]) / 1000  # m -> km
        return out

    return Orbit(
        source=f"{about['source']}; tables made {segments[0]['made']} to {segments[-1]['made']}",
        pieces=((segments[0]["start"], segments[-1]["stop"]),),
        predicted=tuple((s["predicted_from"], s["stop"]) for s in segments),
        interpolate=interpolate,
    )


def _lagrange(nodes: Floats, table: npt.NDArray[Any], time: Floats) -> Floats:
    """Interpolate rows (n, 3) at ascending nodes (n,) through the `_POINTS` nearest ones."""
    points = np.arange(min(_POINTS, len(nodes)))
    first = np.searchsorted(nodes, time, side="right") - len(points) // 2
    near = np.clip(first, 0, len(nodes) - len(points))[:, None] + points
    here = nodes[near]
    weight = np.ones(near.shape)
    for k in points:
        for j in points[points != k]:
            weight[:, k] *= (time - here[:, j]) / (here[:, k] - here[:, j])
    out: Floats = np.einsum("tk,tkx->tx", weight, table[near].astype(np.float64))
    return out


# ------------------------------------------------------------------ JPL Horizons


def horizons_url(start: float, stop: float) -> str:
    """Write the request for TESS's geocentric positions every hour.

    Parameters
    ----------
    start, stop : float
        TJD, TDB; rounded outwards to whole minutes.

    Returns
    -------
    str
        An https URL of the Horizons API, https://ssd-api.jpl.nasa.gov/doc/horizons.html.
    """
    question = {
        "COMMAND": "-95",
        "OBJ_DATA": "NO",
        "MAKE_EPHEM": "YES",
        "EPHEM_TYPE": "VECTORS",
        "CENTER": "500@399",
        "START_TIME": _calendar(math.floor(start * 1440) / 1440),
        "STOP_TIME": _calendar(math.ceil(stop * 1440) / 1440),
        "STEP_SIZE": "60m",
        "TIME_TYPE": "TDB",
        "REF_PLANE": "FRAME",
        "REF_SYSTEM": "ICRF",
        "OUT_UNITS": "KM-S",
        "VEC_TABLE": "1",
        "VEC_CORR": "NONE",
        "VEC_LABELS": "NO",
        "CSV_FORMAT": "YES",
    }
    quoted = {key: f"'{value}'" for key, value in question.items()}
    return f"{HORIZONS}?format=text&" + urllib.parse.urlencode(quoted, quote_via=urllib.parse.quote)


def parse_horizons(text: str) -> tuple[Floats, Floats]:
    """Read an answer of Horizons: a vector table in CSV form.

    Parameters
    ----------
    text : str
        The whole answer.

    Returns
    -------
    time : (n,) float64
        TJD, TDB.
    position : (n, 3) float64
        Geocentric, km, ICRF axes.

    Raises
    ------
    EphemerisRangeError
        If Horizons says that it has no trajectory for these times.
    TessbkgError
        If the answer is not the table that was asked for; the message quotes it.
    """
    if "$$SOE" not in text or "$$EOE" not in text:
        said = " ".join(line.strip() for line in text.splitlines() if line.strip(" *"))[-400:]
        if "No ephemeris for target" in text:
            raise EphemerisRangeError(f"JPL Horizons has no orbit of TESS for these times: {said}; {_MORE}")
        raise TessbkgError(f"JPL Horizons did not send a table: {said}")
    head, _, rest = text.partition("$$SOE")
    flat = re.sub(r"[ \t]+", " ", head)
    for label, wanted in (
        ("Target body name", "(-95)"),
        ("Center body name", "(399)"),
        ("Output units", "KM-S"),
        ("Reference frame", "ICRF"),
        ("Start time", "TDB"),
    ):
        line = re.search(rf"{label} ?: ?([^\n]*)", flat)
        if line is None or wanted not in line[1]:
            raise TessbkgError(f"JPL Horizons sent another table than asked: {label} is not {wanted}")
    try:
        rows = [
            [float(cells[0]), *(float(cell) for cell in cells[2:5])]
            for cells in csv.reader(rest.partition("$$EOE")[0].strip().splitlines())
        ]
        table = np.array(rows, dtype=np.float64).reshape(-1, 4)
    except (ValueError, IndexError) as error:
        raise TessbkgError(f"a row of the Horizons table cannot be read: {error}") from error
    return table[:, 0] - TJD_ZERO, table[:, 1:]


def _horizons_orbit(time: Floats, cache: str | os.PathLike[str] | None) -> Orbit:
    """Ask Horizons for whole days around the times, so that all CCDs of a sector share one answer."""
    finite = time[np.isfinite(time)]
    if not finite.size:
        raise ValueError("ephemeris='horizons' needs at least one finite time")
    start, stop = (
        math.floor(finite.min() + 0.5 - 0.25) - 0.5,
        math.ceil(finite.max() + 0.5 + 0.25) - 0.5,
    )  # midnights
    kept = None if cache is None else Path(cache) / f"tess-horizons-{start:.1f}-{stop:.1f}.txt"
    if kept is not None and kept.exists():
        tjd, position = parse_horizons(kept.read_text(encoding="utf-8"))
    else:
        text = _download(horizons_url(start, stop))
        tjd, position = parse_horizons(text)
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            part = kept.with_suffix(f".{os.getpid()}.part")
            part.write_text(text, encoding="utf-8")
            part.replace(kept)
    if len(tjd) < _POINTS or not np.allclose(np.diff(tjd), 1 / 24, atol=1e-6):
        raise TessbkgError("JPL Horizons sent another step than the hour that was asked for")
    return Orbit(
        source="JPL Horizons TESS (-95), geocentric",
        pieces=((float(tjd[0]), float(tjd[-1])),),
        interpolate=lambda t: _lagrange(tjd, position, t),
    )


def _download(url: str, *, timeout: float = 60.0, limit: int = 1 << 26) -> str:
    """Fetch a small text. Only https, and no redirection to anything else."""
    if not url.startswith("https://"):
        raise ValueError(f"{url!r} is not an https URL")
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    try:
        with opener.open(url, timeout=timeout) as answer:
            data = cast("bytes", answer.read(limit + 1))
    except (urllib.error.URLError, TimeoutError, OSError) as error:
        raise TessbkgError(f"{url.partition('?')[0]} did not answer: {error}") from error
    if len(data) > limit:
        raise TessbkgError(f"{url.partition('?')[0]} sent more than {limit} bytes")
    return data.decode("utf-8", errors="replace")


# ------------------------------------------------------------------ SPICE kernels


def _spice_orbit(paths: Sequence[str]) -> Orbit:
    """Positions from kernels; they are loaded only while they are read."""
    try:
        import spiceypy  # noqa: PLC0415 (an optional extra)
    except ImportError as error:
        raise ImportError("SPICE kernels need spiceypy: pip install tessbkg[spice]") from error
    for path in paths:
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no SPICE kernel {path!r}")
    names = ", ".join(Path(path).name for path in paths)
    try:
        with _SPICE_LOCK:
            cover = spiceypy.cell_double(20000)
            for path in paths:
                spiceypy.spkcov(path, -95, cover)  # adds to the window
            bounds = [spiceypy.wnfetd(cover, k) for k in range(spiceypy.wncard(cover))]
    except spiceypy.utils.exceptions.SpiceyError as error:
        raise TessbkgError(f"SPICE cannot read {names}: {error}") from error
    if not bounds:
        raise EphemerisRangeError(f"{names} holds nothing of TESS (body -95); {_MORE}")
    return Orbit(
        source=f"SPICE {names}",
        pieces=tuple((_tjd(start), _tjd(stop)) for start, stop in bounds),
        interpolate=lambda tjd: _spice_states(spiceypy, paths, bounds, tjd),
    )


def _spice_states(
    spiceypy: Any, paths: Sequence[str], bounds: Sequence[tuple[float, float]], tjd: Floats
) -> Floats:
    """Geocentric positions (n, 3), km, at times inside the bounds (ephemeris times)."""
    seconds = (tjd + (TJD_ZERO - 2451545.0)) * _DAY
    for start, stop in bounds:  # a time at the very edge must not leave the window by rounding
        edge = (seconds > start - 1e-3) & (seconds < stop + 1e-3)
        seconds[edge] = np.clip(seconds[edge], start, stop)
    with _SPICE_LOCK:
        try:
            for path in paths:
                spiceypy.furnsh(path)
            return np.array([spiceypy.spkgps(-95, et, "J2000", 399)[0] for et in seconds])
        except spiceypy.utils.exceptions.SpiceyError as error:
            raise TessbkgError(f"SPICE cannot give TESS relative to the Earth: {error}") from error
        finally:
            for path in paths:
                spiceypy.unload(path)


def _tjd(et: float) -> float:
    """SPICE ephemeris time (TDB seconds after J2000) as TJD."""
    return et / _DAY + 2451545.0 - TJD_ZERO


# ------------------------------------------------------------------ TESSVectors


@dataclass(frozen=True)
class TESSVectors:
    """Rows of one TESSVectors file that hold something.

    Attributes
    ----------
    sector, camera : int
    mid_time : (n,) float64
        As in the file: mid-exposure at the spacecraft, TJD, TDB.
    time : (n,) float64
        When the vectors are true: ``mid_time`` less the lag.
    earth, moon : (n, 3) float64
        From TESS, km, in the camera frame (z = boresight, azimuth from x to y).
    """

    sector: int
    camera: int
    mid_time: Floats
    time: Floats
    earth: Floats
    moon: Floats


def read_tessvectors(path: str | os.PathLike[str], *, lag: float = TESSVECTORS_LAG) -> TESSVectors:
    """Read a TESSVectors CSV file defensively.

    Rows of zeros (the last one) are dropped; the preamble may hold lines without ``#``; the Moon's spacecraft
    azimuth is never used (it is a copy of the Earth's); distances are turned to km with the unit that was
    measured.

    Parameters
    ----------
    path : str or path
        Local file, https URL, or any URL that fsspec opens.
    lag : float
        Seconds by which the rows lag their time.

    Returns
    -------
    TESSVectors

    Raises
    ------
    ValueError
        If the file is not a TESSVectors file.
    """
    name = os.fspath(path)
    lines = _read_text(name).splitlines()
    known = {"MidTime", "Earth_Camera_Angle"}
    head = next((i for i, line in enumerate(lines) if known <= set(line.split(","))), None)
    if head is None:
        raise ValueError(f"{name!r} is not a TESSVectors file: no line names the columns")
    preamble = "\n".join(lines[:head])
    numbers = []
    for word, pattern in (("Sector", r"[Ss](\d{3,4})"), ("Camera", r"[Cc](\d)_")):
        found = re.search(rf"{word}:\s*(\d+)", preamble) or re.search(rf"_{pattern}", Path(name).name)
        if found is None:
            raise ValueError(f"{name!r} does not say its {word.lower()}")
        numbers.append(int(found[1]))
    columns = {column: i for i, column in enumerate(lines[head].split(","))}
    needed = ("Distance", "Camera_Angle", "Camera_Azimuth")
    wanted = ["MidTime", *(f"{body}_{what}" for body in ("Earth", "Moon") for what in needed)]
    if missing := [column for column in wanted if column not in columns]:
        raise ValueError(f"{name!r} lacks the columns {missing}")
    rows = [cells for cells in csv.reader(lines[head + 1 :]) if len(cells) == len(columns)]
    table = np.array([[_number(row[columns[c]]) for c in wanted] for row in rows]).reshape(-1, 7)
    table = table[np.isfinite(table).all(axis=1) & (table[:, 1] > 0) & (table[:, 4] > 0)]
    table = table[np.argsort(table[:, 0], kind="stable")]
    vectors = []
    for distance, angle, azimuth in (table[:, 1:4].T, table[:, 4:7].T):
        theta, phi = np.radians(angle), np.radians(azimuth)
        unit = np.stack([np.sin(theta) * np.cos(phi), np.sin(theta) * np.sin(phi), np.cos(theta)], axis=-1)
        vectors.append(unit * distance[:, None] * TESSVECTORS_KM)
    return TESSVectors(numbers[0], numbers[1], table[:, 0], table[:, 0] - lag / _DAY, vectors[0], vectors[1])


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return math.nan


def _read_text(name: str) -> str:
    """Text of a local file or of a URL."""
    if name.startswith("https://"):
        return _download(name)
    if name.startswith("http://"):
        raise ValueError(f"{name!r} is not encrypted: use https")
    if "://" in name:
        import fsspec  # noqa: PLC0415 (heavy)

        with fsspec.open(name, "rt", encoding="utf-8") as file:
            return str(file.read())
    return Path(name).read_text(encoding="utf-8")


def _tessvectors_orbit(path: str) -> Orbit:
    """TESS from the Earth's vector in the nominal camera frame; nothing is interpolated across a gap."""
    rows = read_tessvectors(path)
    time, keep = np.unique(rows.time, return_index=True)
    frame = nominal_camera_frame(rows.sector, rows.camera, time=float(np.median(time)) if time.size else None)
    position = -rows.earth[keep] @ frame
    steps = np.diff(time)
    gaps = np.flatnonzero(steps > 3.5 * np.median(steps)) + 1 if steps.size else np.array([], dtype=np.intp)
    runs = [
        (t, x)
        for t, x in zip(np.split(time, gaps), np.split(position, gaps), strict=True)
        if len(t) >= _POINTS
    ]
    if not runs:
        raise EphemerisRangeError(f"{path} holds no run of {_POINTS} rows; {_MORE}")

    def interpolate(tjd: Floats) -> Floats:
        out = np.empty((tjd.size, 3))
        for t, x in runs:
            inside = (tjd >= t[0]) & (tjd <= t[-1])
            out[inside] = _lagrange(t, x, tjd[inside])
        return out

    return Orbit(
        source=f"TESSVectors {Path(path).name}, lag {TESSVECTORS_LAG:.0f} s, nominal attitude",
        pieces=tuple((float(t[0]), float(t[-1])) for t, _ in runs),
        interpolate=interpolate,
    )


# ------------------------------------------------------------------ Earth, Moon, Sun


def body_position(body: Body, time: npt.ArrayLike, *, bodies: str = "builtin") -> Floats:
    """Find the Earth relative to the solar-system barycentre, or the Moon or the Sun relative to the Earth.

    Parameters
    ----------
    body : {"earth", "moon", "sun"}
    time : array_like
        TJD, TDB. NaN gives NaN.
    bodies : str
        Ephemeris, see `Ephemeris`.

    Returns
    -------
    (..., 3) float64
        km, ICRF axes.
    """
    tjd = np.asarray(time, dtype=np.float64)
    out = np.full((tjd.size, 3), np.nan)
    finite = np.isfinite(tjd.ravel())
    if finite.any():
        known = tjd.ravel()[finite]
        out[finite] = _builtin(body, known) if bodies == "builtin" else _astropy(body, known, bodies)
    return out.reshape(*tjd.shape, 3)


def _builtin(body: str, tjd: Floats) -> Floats:
    # What astropy's "builtin" does, but without its Time, which looks for leap seconds, at worst online.
    import erfa  # type: ignore[import-untyped]  # noqa: PLC0415 (40 ms)

    if body == "moon":  # moon98 wants TT, which is TDB within 2 ms
        return cast("Floats", np.asarray(erfa.moon98(TJD_ZERO, tjd)["p"])) * AU_KM
    heliocentric, barycentric = erfa.epv00(TJD_ZERO, tjd)
    vector = -np.asarray(heliocentric["p"]) if body == "sun" else np.asarray(barycentric["p"])
    return cast("Floats", vector) * AU_KM


def _astropy(body: str, tjd: Floats, bodies: str) -> Floats:
    from astropy.coordinates import get_body_barycentric  # noqa: PLC0415 (heavy)
    from astropy.time import Time  # noqa: PLC0415
    from astropy.utils import iers  # noqa: PLC0415

    with iers.conf.set_temp("auto_download", False):
        when = Time(TJD_ZERO, tjd, format="jd", scale="tdb")
        earth = get_body_barycentric("earth", when, ephemeris=bodies)
        vector = earth if body == "earth" else get_body_barycentric(body, when, ephemeris=bodies) - earth
        return cast("Floats", vector.xyz.to_value("km").T)


def lines_of_sight(
    time: npt.ArrayLike, tess: npt.ArrayLike, *, bodies: str = "builtin", light_time: bool = False
) -> dict[str, Floats]:
    """Find the vectors from TESS to the Earth, the Moon and the Sun.

    Parameters
    ----------
    time : (n,) array_like
        TJD, TDB, at the spacecraft.
    tess : (n, 3) array_like
        Geocentric position of TESS, km.
    bodies : str
        Ephemeris, see `Ephemeris`.
    light_time : bool
        Where the light that arrives now left the body, as an astrometric position (aberration stays out, as
        it does in a WCS fitted to stars): it moves the Earth and the Moon by up to 21 arcsec.

    Returns
    -------
    dict of (n, 3) float64
        ``earth``, ``moon``, ``sun``: km, ICRF axes.
    """
    tjd = np.asarray(time, dtype=np.float64)
    observer = np.asarray(tess, dtype=np.float64)
    offsets: dict[str, Callable[[Floats], Floats]] = {
        "earth": lambda t: np.zeros((*t.shape, 3)),
        "moon": lambda t: body_position("moon", t, bodies=bodies),
        "sun": lambda t: body_position("sun", t, bodies=bodies),
    }
    sight = {name: offset(tjd) - observer for name, offset in offsets.items()}
    if light_time:
        here = body_position("earth", tjd, bodies=bodies) + observer
        for name, offset in offsets.items():
            for _ in range(2):  # 30 km/s against light: the second step is below a metre
                then = tjd - np.linalg.norm(sight[name], axis=-1) / LIGHT_KM_S / _DAY
                sight[name] = body_position("earth", then, bodies=bodies) + offset(then) - here
    return sight


def subspacecraft_longitude(time: npt.ArrayLike, tess: npt.ArrayLike) -> Floats:
    """Find the longitude on Earth below TESS: what turns once a day under the scattered light.

    Parameters
    ----------
    time : (n,) array_like
        TJD, TDB. UT1 is taken as TT - 69.184 s, within a second and 0.004 degrees since 2017.
    tess : (n, 3) array_like
        Geocentric position of TESS, km.

    Returns
    -------
    (n,) float64
        Degrees east of Greenwich, -180 .. 180, by ERFA's c2t00b (precession, nutation and Earth rotation
        angle).
    """
    import erfa  # noqa: PLC0415 (40 ms)

    tjd = np.asarray(time, dtype=np.float64)
    out = np.full(tjd.shape, np.nan)
    finite = np.isfinite(tjd)
    t = tjd[finite]
    if t.size:
        turn = erfa.c2t00b(TJD_ZERO, t, TJD_ZERO, t - _TT_MINUS_UTC / _DAY, 0.0, 0.0)
        x, y, _ = np.einsum("tij,tj->it", turn, np.asarray(tess, dtype=np.float64)[finite])
        out[finite] = np.degrees(np.arctan2(y, x))
    return out


# ------------------------------------------------------------------ attitude


_CAMERA_TILT: Final = {1: -36.0, 2: -12.0, 3: 12.0, 4: 36.0}
"""Degrees from the spacecraft's +Z axis to the boresight, in its XZ plane."""


@memoize
def _pointings() -> tuple[tuple[float, ...], ...]:
    """Rows (sector, ra, dec, roll, start, stop) of the shipped table."""
    text = (resources.files("tessbkg") / "data" / "pointings.csv").read_text(encoding="utf-8")
    rows = csv.reader(line for line in text.splitlines() if line[:1].isdigit())
    return tuple(tuple(float(cell) for cell in row) for row in rows)


def _turn_z(degrees: float) -> Floats:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[c, s, 0.0], [-s, c, 0.0], [0.0, 0.0, 1.0]])


def _turn_y(degrees: float) -> Floats:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[c, 0.0, -s], [0.0, 1.0, 0.0], [s, 0.0, c]])


def camera_from_spacecraft(camera: int) -> Floats:
    """Turn from the spacecraft's axes to the camera's: z the boresight, x away from the spacecraft's."""
    if camera not in _CAMERA_TILT:
        raise ValueError(f"camera={camera!r} is out of range: allowed are 1 to 4")
    tilt = _turn_y(_CAMERA_TILT[camera])
    return np.diag([-1.0, -1.0, 1.0]) @ tilt if camera <= 2 else tilt


def nominal_pointing(sector: int, *, time: float | None = None) -> tuple[float, float, float]:
    """Look up right ascension, declination and roll of the spacecraft in degrees.

    Raises
    ------
    ValueError
        As :func:`nominal_camera_frame`.
    """
    rows = [row[1:] for row in _pointings() if row[0] == sector]
    if len(rows) > 1 and time is not None:
        rows = [row for row in rows if row[3] <= time < row[4]]
    if not rows:
        raise ValueError(
            f"sector={sector!r} is not in the pointing table (1 to {_last_sector()} and some special ones)"
            + ("" if time is None else f" at {_moment(time)}")
        )
    if len(rows) > 1:
        raise ValueError(f"sector={sector} has {len(rows)} pointings: give time")
    ra, dec, roll = rows[0][:3]
    return ra, dec, roll


def nominal_camera_frame(sector: int, camera: int, *, time: float | None = None) -> Floats:
    """Find the axes of a camera from the sector's nominal pointing.

    The shipped table (``data/pointings.csv``) agrees with the WCS of the FFIs within 0.01 degrees, the annual
    aberration.

    Parameters
    ----------
    sector, camera : int
    time : float, optional
        TJD, where a sector has more than one pointing.

    Returns
    -------
    (3, 3) float64
        Rows are the x, y, z axes of the camera in ICRS: z is the boresight, x points away from the spacecraft
        boresight. It turns an ICRS vector v into the camera frame as ``frame @ v``.

    Raises
    ------
    ValueError
        If the sector is not in the table, has several pointings and no time says which, or the camera is
        none.

    Examples
    --------
    >>> nominal_camera_frame(1, 4)[2].round(3)
    array([-0.   ,  0.398, -0.918])
    """
    turn = camera_from_spacecraft(camera)
    ra, dec, roll = nominal_pointing(sector, time=time)
    return turn @ _turn_z(roll + 180) @ _turn_y(90 - dec) @ _turn_z(ra)


def _last_sector() -> int:
    return int(max(row[0] for row in _pointings() if row[0] < 1000))


def spacecraft_axes(camera_frame: npt.ArrayLike, camera: int) -> Floats:
    """Find the spacecraft's axes from a camera's.

    Parameters
    ----------
    camera_frame : (3, 3) array_like
        Axes of the camera in ICRS, as rows.
    camera : int

    Returns
    -------
    (3, 3) float64
        Rows are the spacecraft's X, Y, Z in ICRS: Z between cameras 2 and 3, the cameras fan out in XZ.
    """
    return camera_from_spacecraft(camera).T @ np.asarray(camera_frame, dtype=np.float64)


# ------------------------------------------------------------------ dates in words


def _calendar(tjd: float) -> str:
    when = datetime(2000, 1, 1, 12) + timedelta(minutes=round((tjd + 5455.0) * 1440))  # noqa: DTZ001 (TDB has no zone)
    return f"{when:%Y-%m-%d %H:%M}"


def _moment(tjd: float) -> str:
    return f"TJD {tjd:.4f} ({_calendar(tjd)} TDB)"


def _span(start: float, stop: float) -> str:
    return f"TJD {start:.4f} to {stop:.4f} ({_calendar(start)[:10]} to {_calendar(stop)[:10]})"
