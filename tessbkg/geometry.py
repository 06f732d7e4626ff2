"""Directions of pixels, the camera frame, and the angles of Earth, Moon and Sun.

Conventions, everywhere:

* *Camera frame*, the mission's own: z is the camera's boresight, x points away from the spacecraft's
  boresight, y is z cross x (spacecraft +Y for cameras 3 and 4, -Y for 1 and 2).
* *Angle* is the separation from a line of sight, 0 .. 180 degrees. *Azimuth* turns about it from the
  direction in which the camera's x axis projects, towards z cross x, 0 .. 360 degrees; on the boresight it is
  atan2(y, x), as in the mission's engineering files.
* *Elevation* and *spacecraft azimuth* are in the spacecraft's axes: elevation above its XY plane.
* Directions are geometric, or astrometric with ``light_time=True``; leaving light time out is wrong by at
  most 0.006 degrees.

The maps are a product of rank three: what is stored are the directions, and `angle_maps` makes any map of
them.
"""

from __future__ import annotations

import importlib
import math
import re
import warnings
from dataclasses import dataclass
from functools import cache as memoize
from importlib import resources
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np
import numpy.typing as npt

from tessbkg.ccd import CCD, FIRST_SCIENCE_COLUMN, SCIENCE_SHAPE
from tessbkg.ephemeris import (
    AU_KM,
    Ephemeris,
    Source,
    lines_of_sight,
    nominal_camera_frame,
    open_orbit,
    spacecraft_axes,
    subspacecraft_longitude,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TypeAlias

    import xarray as xr
    from astropy.io.fits import Header

    Wcs: TypeAlias = str | Header | Sequence[str | Header | None] | None

__all__ = [
    "ATTRS",
    "MAP_BITS",
    "MAX_MISFIT",
    "Pointing",
    "angle_maps",
    "angles",
    "boresight_angles",
    "camera_frame",
    "corner_directions",
    "geometry",
    "nominal_camera_frame",
    "pixel_directions",
    "point",
    "round_bits",
]

Floats = npt.NDArray[np.float64]

MAX_MISFIT: Final = 0.02
"""Degrees: a WCS whose corners lie farther from their places in the camera is not believed. Of 1,728 archived
ones 4 are worse; the median is 0.004."""

MAP_BITS: Final = 15
"""Mantissa bits kept in maps: a rounding error of at most 2**-8 = 0.0039 degrees for values of 256 .. 360
degrees, half of that from 128 to 256, and so on down."""

MAP_FRAMES: Final = 64
"""Frames in a lazy block of maps where the dataset has no blocks of its own: a shard."""

RADIUS_KM: Final = {"earth": 6378.137, "moon": 1737.4, "sun": 695700.0}
ALBEDO: Final = {"earth": 0.37, "moon": 0.12}
"""Geometric albedo in the Lambert formula; the irradiances scale with it."""

_LENS: Final = (0.2154, 0.7585)
"""r = tan(a) (1 + k1 tan(a)**2 + k2 tan(a)**4): the focal-plane radius of a ray at angle a.

Fitted to the WCS of eight sectors, all CCDs at once; with the corner table it places any pixel within
`LENS_ERROR` degrees (median 0.0015)."""
LENS_ERROR: Final = 0.006

_WCS_CARD: Final = re.compile(
    r"(CTYPE|CUNIT|CRPIX|CRVAL|CDELT)[12]|(CD|PC)[12]_[12]|LONPOLE|LATPOLE|RADESYS|EQUINOX|[AB]_(ORDER|\d_\d)"
)
_REGION: Final = ("SCCSA", "SCCED", "SCIROWS", "SCIROWE")


# ------------------------------------------------------------------ names of what is written


def _attrs() -> dict[str, dict[str, str]]:
    about = "camera frame: z boresight, x away from the spacecraft boresight, y = z cross x"
    rounded = f"mantissa rounded to {MAP_BITS} bits, error below 0.005"
    table = {
        "ra": ("degree", "right ascension of the bin centre", "ICRS"),
        "dec": ("degree", "declination of the bin centre", "ICRS"),
        "field_angle": ("degree", "angle of the bin centre from the camera boresight", ""),
        "pixel_direction": ("1", "unit vector of the line of sight of the bin centre", about),
        "subspacecraft_longitude": (
            "degree_east",
            "longitude on Earth below TESS",
            "-180 .. 180; turns with the clouds and continents that TESS sees, once a day",
        ),
    }
    for body in ("earth", "moon", "sun"):
        name = body.capitalize()
        table |= {
            f"{body}_direction": ("1", f"unit vector from TESS to the centre of the {name}", about),
            f"{body}_distance": ("km", f"distance from TESS to the centre of the {name}", ""),
            f"{body}_boresight_angle": (
                "degree",
                f"angle of the {name}'s centre from the camera boresight",
                "0 .. 180",
            ),
            f"{body}_boresight_azimuth": (
                "degree",
                f"azimuth of the {name} about the camera boresight",
                f"atan2(y, x), 0 .. 360; {about}",
            ),
            f"{body}_elevation": (
                "degree",
                f"elevation of the {name} above the spacecraft XY plane",
                "spacecraft frame: z between cameras 2 and 3, cameras fan out in XZ",
            ),
            f"{body}_spacecraft_azimuth": (
                "degree",
                f"azimuth of the {name} about the spacecraft Z axis",
                "atan2(y, x) in the spacecraft frame, 0 .. 360",
            ),
        }
        if body == "sun":
            continue
        table |= {
            f"{body}_angle": (
                "degree",
                f"angle of the {name}'s centre from the line of sight of the bin",
                f"0 .. 180; {rounded}",
            ),
            f"{body}_azimuth": (
                "degree",
                f"azimuth of the {name} about the line of sight of the bin",
                f"0 .. 360, from the projected camera x axis towards z cross x; {rounded}",
            ),
            f"{body}_angular_radius": (
                "degree",
                f"angular radius of the {name} seen from TESS",
                f"asin(R / distance), R = {RADIUS_KM[body]} km",
            ),
            f"{body}_phase_angle": (
                "degree",
                f"angle TESS - {name} - Sun",
                "0 = TESS sees the full disc, 180 = the night side",
            ),
            f"{body}_illuminated_fraction": (
                "1",
                f"sunlit part of the disc of the {name} seen from TESS",
                "(1 + cos phase) / 2",
            ),
            f"{body}_irradiance": (
                "1",
                f"sunlight reflected by the {name} onto TESS, as a fraction of sunlight at 1 au",
                f"Lambert sphere, geometric albedo {ALBEDO[body]}",
            ),
        }
    return {
        name: {"units": units, "long_name": long_name} | ({"comment": comment} if comment else {})
        for name, (units, long_name, comment) in table.items()
    }


ATTRS: Final = _attrs()
"""CF attributes of every variable that this module makes."""

_TIME_ATTRS: Final = {
    "units": "d",
    "long_name": "mid-exposure at the spacecraft, TJD (JD - 2457000), TDB",
}


# ------------------------------------------------------------------ pixels and cameras


def _read_header(wcs: str | Header) -> Header:
    """Header of a string (80-character cards, or one card a line) or of itself."""
    if not isinstance(wcs, str):
        return wcs
    from astropy.io.fits import Header  # noqa: PLC0415 (heavy)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cards out of order; those that are needed are checked
        return Header.fromstring(wcs, sep="\n" if "\n" in wcs else "")


def pixel_directions(header: str | Header, row: npt.ArrayLike, column: npt.ArrayLike) -> Floats:
    """Find where pixels look, by the header's own WCS.

    Parameters
    ----------
    header : str or astropy.io.fits.Header
        With an equatorial WCS (SIP distortion included); a string as of ``Header.tostring()``.
    row, column : array_like
        1-based FFI coordinates of the pixel centres, may be fractional; broadcast against each other.

    Returns
    -------
    (..., 3) float64
        Unit vectors, ICRS. NaN where the WCS has no answer.

    Raises
    ------
    ValueError
        If the header holds no equatorial WCS.
    """
    from astropy.io.fits import Header  # noqa: PLC0415 (heavy)
    from astropy.wcs import WCS  # noqa: PLC0415

    cards = [card for card in _read_header(header).cards if _WCS_CARD.fullmatch(card.keyword)]
    kinds = {card.keyword: str(card.value)[:3] for card in cards}
    if (kinds.get("CTYPE1"), kinds.get("CTYPE2")) != ("RA-", "DEC") or not {
        "CRVAL1",
        "CRVAL2",
    } <= kinds.keys():
        raise ValueError("the header holds no equatorial WCS (CTYPE1 = RA..., CTYPE2 = DEC..., CRVALn)")
    try:
        wcs = WCS(Header(cards), fix=False)  # the WCS alone: other cards only make astropy warn
        rows, columns = np.broadcast_arrays(
            np.asarray(row, dtype=np.float64), np.asarray(column, dtype=np.float64)
        )
        ra, dec = wcs.all_pix2world(columns.ravel(), rows.ravel(), 1)
    except Exception as error:  # wcslib has a dozen of its own
        raise ValueError(f"the WCS of the header cannot be used: {error}") from error
    return _unit_vectors(np.radians(ra), np.radians(dec)).reshape(*rows.shape, 3)


def _unit_vectors(ra: Floats, dec: Floats) -> Floats:
    return np.stack([np.cos(dec) * np.cos(ra), np.cos(dec) * np.sin(ra), np.sin(dec)], axis=-1)


@memoize
def _corner_table() -> dict[tuple[int, int], Floats]:
    """Columns (column, row, x, y) of the four corner pixels of each (camera, ccd), camera frame."""
    text = (resources.files("tessbkg") / "data" / "camera_corners.csv").read_text(encoding="utf-8")
    table: dict[tuple[int, int], list[list[float]]] = {}
    for line in text.splitlines():
        if line[:1].isdigit():
            camera, ccd, *values = line.split(",")
            table.setdefault((int(camera), int(ccd)), []).append([float(value) for value in values])
    return {key: np.array(rows) for key, rows in table.items()}


def _corners(camera: int, ccd: int) -> tuple[Floats, Floats, Floats]:
    """Which corner (0 or 1 along columns and along rows) and its direction (4, 3) in the camera frame."""
    table = _corner_table()[camera, ccd]
    right = (table[:, 0] > table[:, 0].mean()).astype(np.float64)
    top = (table[:, 1] > table[:, 1].mean()).astype(np.float64)
    x, y = table[:, 2:].T
    return right, top, np.stack([x, y, np.sqrt(1 - x**2 - y**2)], axis=-1)


def _region(header: Header) -> tuple[float, float, float, float]:
    """First and last science column and row, 1-based, from the keywords (NAXISn may be trimmed)."""
    missing = [key for key in _REGION if key not in header]
    if missing:
        raise ValueError(f"the header lacks the region keywords {', '.join(missing)}")
    first_column, last_column, first_row, last_row = (float(header[key]) for key in _REGION)
    return first_column, last_column, first_row, last_row


def camera_frame(
    header: str | Header, camera: int | None = None, ccd: int | None = None
) -> tuple[Floats, float]:
    """Find the axes of the camera from one CCD's WCS.

    The four corner science pixels have fixed places in the camera (``data/camera_corners.csv``, medians over
    108 sectors); the rotation that brings their directions there best is the camera's attitude (orthogonal
    Procrustes).

    Parameters
    ----------
    header : str or astropy.io.fits.Header
        With WCS and the region keywords SCCSA, SCCED, SCIROWS, SCIROWE.
    camera, ccd : int, optional
        The header's keywords CAMERA and CCD if left out.

    Returns
    -------
    frame : (3, 3) float64
        Rows are the camera's x, y, z axes in ICRS: ``frame @ v`` turns an ICRS vector into the camera frame.
    misfit : float
        Largest distance of a corner from its place, degrees. A good WCS gives 0.004; see `MAX_MISFIT`.

    Raises
    ------
    ValueError
        If the header lacks a WCS or keywords, or names another CCD.
    """
    cards = _read_header(header)
    numbers = []
    for key, given in (("CAMERA", camera), ("CCD", ccd)):
        said = cards.get(key, given)
        if said is None:
            raise ValueError(f"the header lacks {key}: give {key.lower()}")
        if given is not None and int(said) != given:
            raise ValueError(f"{key.lower()}={given}, but the header says {key} = {said}")
        numbers.append(int(said))
    right, top, places = _corners(*numbers)
    left, last_column, bottom, last_row = _region(cards)
    seen = pixel_directions(cards, bottom + top * (last_row - bottom), left + right * (last_column - left))
    if not np.isfinite(seen).all():
        return np.full((3, 3), np.nan), math.nan
    u, _, vt = np.linalg.svd(places.T @ seen)
    frame = u @ np.diag([1.0, 1.0, np.linalg.det(u @ vt)]) @ vt
    chord = np.linalg.norm(seen @ frame.T - places, axis=1)
    return frame, float(np.degrees(2 * np.arcsin(np.minimum(chord / 2, 1))).max())


def corner_directions(
    camera: int,
    ccd: int,
    row: npt.ArrayLike,
    column: npt.ArrayLike,
    region: tuple[float, float, float, float] | None = None,
) -> Floats:
    """Find where pixels look in the camera without any WCS: corner table, lens law and a projective map.

    Parameters
    ----------
    camera, ccd : int
    row, column : array_like
        1-based FFI coordinates, broadcast against each other.
    region : (first column, last column, first row, last row), optional
        Science pixels; those of a real CCD if left out.

    Returns
    -------
    (..., 3) float64
        Unit vectors in the camera frame, within 0.006 degrees of the WCS of archived FFIs (median 0.0015).
    """
    right, top, places = _corners(camera, ccd)
    height, width = SCIENCE_SHAPE
    first, last, bottom, upper = region or (
        float(FIRST_SCIENCE_COLUMN),
        float(FIRST_SCIENCE_COLUMN + width - 1),
        1.0,
        float(height),
    )
    rows, columns = np.broadcast_arrays(
        np.asarray(row, dtype=np.float64), np.asarray(column, dtype=np.float64)
    )
    plane = places[:, :2] / places[:, 2:]
    plane = plane * _lens((plane**2).sum(axis=1))[:, None]
    u, v = (columns.ravel() - first) / (last - first), (rows.ravel() - bottom) / (upper - bottom)
    projected = np.stack([u, v, np.ones_like(u)], axis=-1) @ _homography(right, top, plane).T
    plane = projected[:, :2] / projected[:, 2:]
    radius = np.hypot(*plane.T)
    tangent = radius.copy()
    for _ in range(12):  # converges by a factor of 7 or more each time
        tangent = radius / _lens(tangent**2)
    plane = plane * (tangent / np.maximum(radius, 1e-12))[:, None]
    vector = np.column_stack([plane, np.ones(len(plane))])
    vector /= np.linalg.norm(vector, axis=1, keepdims=True)
    return vector.reshape(*rows.shape, 3)


def _lens(tangent_squared: Floats) -> Floats:
    return 1 + _LENS[0] * tangent_squared + _LENS[1] * tangent_squared**2


def _homography(u: Floats, v: Floats, plane: Floats) -> Floats:
    """Projective map (3, 3) that takes four points (u, v, 1) to the plane."""
    one, zero = np.ones(4), np.zeros(4)
    x, y = plane.T
    equations = np.concatenate(
        [
            np.stack([u, v, one, zero, zero, zero, -x * u, -x * v, -x], axis=-1),
            np.stack([zero, zero, zero, u, v, one, -y * u, -y * v, -y], axis=-1),
        ]
    )
    return cast("Floats", np.linalg.svd(equations)[2][-1].reshape(3, 3))


@dataclass(frozen=True)
class Pointing:
    """How a camera pointed, and where bins look in it.

    Attributes
    ----------
    frame : (3, 3) float64
        Camera axes in ICRS, as rows.
    pixel : (y, x, 3) float64
        Unit vectors of the bins in the camera frame.
    misfit : float
        Misfit of the WCS in degrees: of the one used, or else of the best one rejected. NaN without any.
    offset : float
        Between the WCS's boresight and the sector's nominal one in degrees: about 0.004 (aberration) unless
        TESS pointed elsewhere; the misfit cannot tell. NaN if one of them is missing.
    source : str
        Where this came from, in words.
    """

    frame: Floats
    pixel: Floats
    misfit: float
    offset: float
    source: str


def point(
    wcs: Wcs,
    *,
    row: npt.ArrayLike,
    column: npt.ArrayLike,
    sector: int,
    camera: int,
    ccd: int,
    time: float | None = None,
) -> Pointing:
    """Find the camera's frame and the bins' directions from the first thing that can be believed.

    In this order: the WCS given, or the first of several whose corners fit within `MAX_MISFIT`; the sector's
    nominal pointing with the corner table.

    Parameters
    ----------
    wcs : str, Header, None, or a sequence of them
        Headers of good FFIs of this CCD, best first.
    row : (y,) array_like
        1-based FFI rows of the bin centres.
    column : (x,) array_like
        1-based FFI columns of the bin centres.
    sector, camera, ccd : int
    time : float, optional
        TJD, where a sector has several pointings.

    Returns
    -------
    Pointing

    Raises
    ------
    ValueError
        If no WCS can be believed and the sector is not in the pointing table.
    """
    from astropy.io.fits import VerifyError  # noqa: PLC0415 (heavy)

    ours, unknown = CCD(sector, camera, ccd), ""
    try:
        nominal = nominal_camera_frame(sector, camera, time=time)
    except ValueError as error:
        nominal, unknown = None, str(error)
    candidates = [wcs] if wcs is None or isinstance(wcs, str) or hasattr(wcs, "cards") else list(wcs)
    headers = [cast("str | Header", header) for header in candidates if header is not None and len(header)]
    rows, columns = np.asarray(row, dtype=np.float64)[:, None], np.asarray(column, dtype=np.float64)[None, :]
    reasons: list[str] = []
    misfits: list[float] = []
    region = None
    for number, header in enumerate(headers, start=1):
        name = "WCS of the FFI" if len(headers) == 1 else f"WCS of FFI {number} of {len(headers)}"
        try:
            region = region or _region(_read_header(header))
            frame, misfit = camera_frame(header, camera, ccd)
        except (ValueError, TypeError, KeyError, VerifyError) as error:
            reasons.append(f"{name}: {error}")
            continue
        misfits.append(misfit)
        if misfit <= MAX_MISFIT:
            pixel = pixel_directions(header, rows, columns) @ frame.T
            apart = math.nan if nominal is None else float(np.linalg.norm(frame[2] - nominal[2]))
            offset = math.degrees(2 * math.asin(apart / 2))
            return Pointing(frame, pixel, misfit, offset, "; ".join([name, *reasons]))
        reasons.append(f"{name} misfits the camera by {misfit:.3f} degrees")
    if nominal is None:
        raise ValueError(f"the pointing of {ours} is not known: {'; '.join([*reasons, unknown])}")
    reasons = reasons or ["no WCS"]
    pixel = corner_directions(camera, ccd, rows, columns, region)
    finite = [misfit for misfit in misfits if math.isfinite(misfit)]
    return Pointing(
        nominal,
        pixel,
        min(finite) if finite else math.nan,
        math.nan,
        f"nominal pointing of the sector (0.01 degrees) and corner table ({LENS_ERROR} degrees); "
        + "; ".join(reasons),
    )


# ------------------------------------------------------------------ maps


def round_bits(
    values: npt.NDArray[np.float32], bits: int = MAP_BITS, *, period: float | None = None
) -> npt.NDArray[np.float32]:
    """Round float32 in place to fewer mantissa bits, ties to even: zeros in the tail that compress away.

    The same as numcodecs' BitRound, but NaN and infinity stay what they are.

    Parameters
    ----------
    values : float32 array
        Contiguous; changed in place.
    bits : int
        Mantissa bits to keep, 1 to 23. The relative error is at most 2**-(bits + 1).
    period : float, optional
        Values rounded up to it become 0, as for azimuths.

    Returns
    -------
    float32 array
        ``values``.

    Raises
    ------
    ValueError
        If ``values`` is not float32 or ``bits`` is not 1 to 23.

    Examples
    --------
    >>> import numpy as np
    >>> round_bits(np.array([123.456, 359.9999], dtype=np.float32), period=360.0)
    array([123.45508,   0.     ], dtype=float32)
    """
    if values.dtype != np.float32:
        raise ValueError(f"values are {values.dtype}, not float32")
    if not 1 <= bits <= 23:
        raise ValueError(f"bits={bits} is out of range: allowed are 1 to 23")
    drop = 23 - bits
    if drop:
        odd = ~np.isfinite(values)
        saved = values[odd] if odd.any() else None
        raw = values.view(np.uint32)
        even = raw >> np.uint32(drop)
        even &= np.uint32(1)
        even += np.uint32((1 << (drop - 1)) - 1)
        raw += even
        raw &= np.uint32((0xFFFFFFFF << drop) & 0xFFFFFFFF)
        if saved is not None:
            values[odd] = saved
    if period is not None:
        values[values >= period] = 0
    return values


def angle_maps(
    body: npt.ArrayLike, pixel: npt.ArrayLike, *, exact: bool = False
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Make maps of the angle and the azimuth of a body seen from each line of sight.

    Memory beyond the answer is a few megabytes. 1,281 frames of 128 x 128 take half a second.

    Parameters
    ----------
    body : (t, 3) array_like
        Vectors to the body in the camera frame, of any length. NaN gives NaN.
    pixel : (y, x, 3) array_like
        Unit vectors of the lines of sight in the camera frame.
    exact : bool
        Compute in float64 and do not round: twice as slow.

    Returns
    -------
    angle : (t, y, x) float32 (float64 if exact)
        Separation, degrees, 0 .. 180, rounded to `MAP_BITS` mantissa bits: within 0.005 degrees.
    azimuth : (t, y, x) float32 (float64 if exact)
        Azimuth about the line of sight, degrees, 0 <= azimuth < 360, likewise (where the angle is above 0.1
        degrees).

    Examples
    --------
    >>> import numpy as np
    >>> angle, azimuth = angle_maps([[0, 2, 2]], np.array([[[0, 0, 1]]]))
    >>> float(angle[0, 0, 0]), float(azimuth[0, 0, 0])
    (45.0, 90.0)
    """
    dtype = np.dtype(np.float64 if exact else np.float32)
    e = np.asarray(body, dtype=np.float64)
    e = (e / np.linalg.norm(e, axis=-1, keepdims=True)).astype(dtype)
    n = np.asarray(pixel, dtype=np.float64)
    shape = n.shape[:-1]
    n = n.reshape(-1, 3)
    basis = _tangent_basis(n).astype(dtype)  # (3, 3, pixels): n, p, q; their components; pixels
    angle = np.empty((len(e), len(n)), dtype=dtype)
    azimuth = np.empty_like(angle)
    wide = 1 << 14  # elements of a block: it stays in the cache
    for first in range(0, len(n), wide):
        columns = slice(first, first + wide)
        block = np.ascontiguousarray(basis[:, :, columns])
        deep = max(1, wide // block.shape[2])
        for start in range(0, len(e), deep):
            rows = slice(start, start + deep)
            along, across_p, across_q = np.matmul(e[rows], block)
            turn = np.arctan2(across_q, across_p)
            across_p *= across_p
            across_q *= across_q
            across_p += across_q
            np.sqrt(across_p, out=across_p)
            far = np.arctan2(across_p, along, out=along)
            far *= dtype.type(180 / np.pi)
            turn *= dtype.type(180 / np.pi)
            turn[turn < 0] += 360
            turn[turn >= 360] = 0  # a tiny negative number plus 360
            if not exact:
                round_bits(far)
                round_bits(turn, period=360.0)
            angle[rows, columns] = far
            azimuth[rows, columns] = turn
    return angle.reshape(len(e), *shape), azimuth.reshape(len(e), *shape)


def _tangent_basis(n: Floats) -> Floats:
    """Stack n, p, q, each (3, pixels): p is the camera's x axis projected on the tangent plane, q = n x p."""
    x, y, z = n.T
    length = np.hypot(y, z)
    p = np.stack([length, -x * y / length, -x * z / length])
    q = np.stack([np.zeros_like(x), z / length, -y / length])
    return np.stack([n.T, p, q])


def _map_block(body: Floats, pixel: Floats) -> npt.NDArray[np.float32]:
    """One lazy block: angle and azimuth stacked."""
    return np.stack(angle_maps(body, pixel))


def _lazy_maps(body: Floats, pixel: Floats, chunks: Sequence[Any]) -> Any:
    """Dask array (2, t, y, x) of angle and azimuth in these chunks."""
    from dask.base import tokenize  # noqa: PLC0415 (heavy)

    da: Any = importlib.import_module("dask.array")  # heavy, and without types
    time, y, x = chunks
    token = tokenize(body, pixel, chunks)
    return da.blockwise(
        _map_block,
        "ctyx",
        da.from_array(body, chunks=(time, 3), name=f"direction-{token}"),
        "tk",
        da.from_array(pixel, chunks=(y, x, 3), name=f"pixel-{token}"),
        "yxk",
        new_axes={"c": 2},
        concatenate=True,
        dtype=np.float32,
        meta=np.empty((0, 0, 0, 0), dtype=np.float32),
        name=f"angle-maps-{token}",
    )


# ------------------------------------------------------------------ per time


def boresight_angles(
    time: npt.ArrayLike,
    *,
    sector: int,
    camera: int,
    ephemeris: Ephemeris | Source = "table",
    light_time: bool = False,
) -> xr.Dataset:
    """Tell where Earth, Moon and Sun stood, seen from a camera's boresight. No FFI is needed.

    Parameters
    ----------
    time : (n,) array_like
        TJD (JD - 2457000), TDB, at the spacecraft. NaN gives NaN.
    sector, camera : int
        The nominal pointing of the sector gives the camera frame, within 0.01 degrees.
    ephemeris : str, path(s) or Ephemeris
        Where TESS was; see `tessbkg.ephemeris`.
    light_time : bool
        Astrometric directions instead of geometric ones.

    Returns
    -------
    xarray.Dataset
        On ``time``: distance, angular radius, angle, azimuth, elevation, phase, irradiance ... of ``earth_``,
        ``moon_`` and ``sun_``, ``subspacecraft_longitude``, and the directions (time, xyz) in the camera
        frame.

    Raises
    ------
    EphemerisRangeError
        If a time lies outside the ephemeris.
    ValueError
        If the sector is not in the pointing table, or an argument is wrong.

    Examples
    --------
    >>> sky = boresight_angles([1325.3228], sector=1, camera=4)
    >>> sky.earth_boresight_angle.round(2).values
    array([56.75])
    """
    tjd = _times(time)
    CCD(sector, camera, 1)
    middle = float(np.nanmedian(tjd)) if np.isfinite(tjd).any() else None
    frame = nominal_camera_frame(sector, camera, time=middle)
    sky = _per_time(tjd, frame, camera, ephemeris, light_time=light_time)
    return sky.assign_attrs(
        sector=sector, camera=camera, pointing_source="nominal pointing of the sector (0.01 degrees)"
    )


def _times(time: npt.ArrayLike) -> Floats:
    tjd = np.asarray(time)
    if tjd.ndim != 1 or tjd.dtype.kind not in "fiu":
        raise ValueError(
            f"time is {tjd.ndim}-dimensional {tjd.dtype}: it must be a list of TJD (JD - 2457000), TDB"
        )
    return tjd.astype(np.float64)


def _per_time(
    tjd: Floats, frame: Floats, camera: int, ephemeris: Ephemeris | Source, *, light_time: bool
) -> xr.Dataset:
    """All variables on time, with attributes."""
    import xarray as xr  # noqa: PLC0415 (heavy)

    where = ephemeris if isinstance(ephemeris, Ephemeris) else Ephemeris(tess=ephemeris)
    orbit = open_orbit(where, tjd)
    tess = orbit.position(tjd)
    sight = lines_of_sight(tjd, tess, bodies=where.bodies, light_time=light_time)
    spacecraft = spacecraft_axes(frame, camera)
    values: dict[str, Floats] = {}
    vectors: dict[str, Floats] = {}
    for body, vector in sight.items():
        distance = np.linalg.norm(vector, axis=1)
        unit = vector / distance[:, None]
        vectors[f"{body}_direction"] = unit @ frame.T
        x, y, z = vectors[f"{body}_direction"].T
        sx, sy, sz = spacecraft @ unit.T
        values |= {
            f"{body}_distance": distance,
            f"{body}_boresight_angle": np.degrees(np.arctan2(np.hypot(x, y), z)),
            f"{body}_boresight_azimuth": _turn(y, x),
            f"{body}_elevation": np.degrees(np.arctan2(sz, np.hypot(sx, sy))),
            f"{body}_spacecraft_azimuth": _turn(sy, sx),
        }
        if body != "sun":
            values |= _light(body, vector, sight["sun"])
    values["subspacecraft_longitude"] = subspacecraft_longitude(tjd, tess)
    data: dict[str, Any] = {name: ("time", value, ATTRS[name]) for name, value in values.items()}
    data |= {name: (("time", "xyz"), value, ATTRS[name]) for name, value in vectors.items()}
    coords = {"time": ("time", tjd, _TIME_ATTRS), "xyz": ["x", "y", "z"]}
    attrs = orbit.attrs(tjd) | {
        "ephemeris_bodies": where.bodies,
        "directions": "astrometric" if light_time else "geometric",
    }
    return xr.Dataset(data, coords, attrs)


def _turn(y: Floats, x: Floats) -> Floats:
    """Azimuth in degrees, 0 <= azimuth < 360."""
    out = np.degrees(np.arctan2(y, x))
    out[out < 0] += 360
    out[out >= 360] = 0
    return out


def _light(body: str, vector: Floats, sun: Floats) -> dict[str, Floats]:
    """Disc and light of the Earth or the Moon."""
    distance = np.linalg.norm(vector, axis=1)
    sunward = sun - vector
    far = np.linalg.norm(sunward, axis=1)
    phase = np.arctan2(
        np.linalg.norm(np.cross(-vector, sunward), axis=1), np.einsum("ti,ti->t", -vector, sunward)
    )
    lambert = (np.sin(phase) + (np.pi - phase) * np.cos(phase)) / np.pi
    radius = RADIUS_KM[body] / distance
    return {
        f"{body}_angular_radius": np.degrees(np.arcsin(radius)),
        f"{body}_phase_angle": np.degrees(phase),
        f"{body}_illuminated_fraction": (1 + np.cos(phase)) / 2,
        f"{body}_irradiance": ALBEDO[body] * lambert * radius**2 * (AU_KM / far) ** 2,
    }


# ------------------------------------------------------------------ per dataset


def geometry(
    time: npt.ArrayLike,
    *,
    wcs: Wcs,
    row: npt.ArrayLike,
    column: npt.ArrayLike,
    sector: int,
    camera: int,
    ccd: int,
    ephemeris: Ephemeris | Source = "table",
    light_time: bool = False,
) -> xr.Dataset:
    """Compute everything about the sky of a CCD but the maps: a second for a sector, a few megabytes.

    The maps of any frames are then ``angle_maps(sky.earth_direction[a:b], sky.pixel_direction)``.

    Parameters
    ----------
    time : (n,) array_like
        TJD (JD - 2457000), TDB, mid-exposure at the spacecraft. NaN gives NaN.
    wcs : str, Header, None, or a sequence of them
        Headers of good FFIs of this CCD, best first: WCS, region keywords, CAMERA and CCD.
    row : (y,) array_like
        1-based FFI rows of the bin centres.
    column : (x,) array_like
        1-based FFI columns of the bin centres.
    sector, camera, ccd : int
    ephemeris : str, path(s) or Ephemeris
        Where TESS was; see `tessbkg.ephemeris`.
    light_time : bool
        Astrometric directions instead of geometric ones.

    Returns
    -------
    xarray.Dataset
        On ``time`` as `boresight_angles`; on ``(y, x)`` the coordinates ``ra`` and ``dec``, ``field_angle``
        and ``pixel_direction`` (y, x, xyz) in the camera frame. Attributes name the sources of the ephemeris
        and of the pointing, the misfit of the WCS and its offset from the nominal pointing.

    Raises
    ------
    EphemerisRangeError
        If a time lies outside the ephemeris.
    ValueError
        If no pointing can be found, or an argument is wrong.
    """
    tjd = _times(time)
    middle = float(np.nanmedian(tjd)) if np.isfinite(tjd).any() else None
    pointing = point(wcs, row=row, column=column, sector=sector, camera=camera, ccd=ccd, time=middle)
    sky = _per_time(tjd, pointing.frame, camera, ephemeris, light_time=light_time)
    x, y, z = np.moveaxis(pointing.pixel, -1, 0)
    rx, ry, rz = np.moveaxis(pointing.pixel @ pointing.frame, -1, 0)
    field = np.degrees(np.arctan2(np.hypot(x, y), z))
    sky = sky.assign(
        field_angle=(("y", "x"), field.astype(np.float32), ATTRS["field_angle"]),
        pixel_direction=(("y", "x", "xyz"), pointing.pixel, ATTRS["pixel_direction"]),
    )
    sky = sky.assign_coords(
        ra=(("y", "x"), np.degrees(np.arctan2(ry, rx)) % 360, ATTRS["ra"]),
        dec=(("y", "x"), np.degrees(np.arctan2(rz, np.hypot(rx, ry))), ATTRS["dec"]),
    )
    return sky.assign_attrs(
        pointing_source=pointing.source,
        wcs_misfit_deg=pointing.misfit,
        wcs_offset_deg=pointing.offset,
        sector=sector,
        camera=camera,
        ccd=ccd,
    )


def angles(
    ds: xr.Dataset, *, ephemeris: Ephemeris | Source = "table", light_time: bool = False
) -> xr.Dataset:
    """Add the angles of Earth, Moon and Sun to a dataset of one CCD.

    Parameters
    ----------
    ds : xarray.Dataset
        With ``time`` (TJD, TDB, mid-exposure at the spacecraft), ``row`` (y) and ``column`` (x) (1-based FFI
        coordinates of the bin centres), attributes ``sector``, ``camera``, ``ccd`` and ``wcs``
        (``Header.tostring()`` of a good FFI or a list of them; without it the nominal pointing is used).
    ephemeris : str, path(s) or Ephemeris
        Where TESS was; see `tessbkg.ephemeris`.
    light_time : bool
        Astrometric directions instead of geometric ones.

    Returns
    -------
    xarray.Dataset
        ``ds`` with the variables of `geometry` and the maps ``earth_angle``, ``earth_azimuth``,
        ``moon_angle``, ``moon_azimuth`` (time, y, x) float32. The maps are lazy when ``ds`` is or when they
        would be larger than 256 MB; then they follow its chunks, or else `MAP_FRAMES` frames a chunk.

    Raises
    ------
    EphemerisRangeError
        If a time lies outside the ephemeris.
    ValueError
        If ``ds`` lacks what is needed, or no pointing can be found.

    Examples
    --------
    >>> import xarray as xr
    >>> grid = {"time": [1340.0], "row": ("y", [1.0, 2048.0]), "column": ("x", [45.0, 2092.0])}
    >>> ds = angles(xr.Dataset(coords=grid, attrs={"sector": 1, "camera": 1, "ccd": 4}))
    >>> ds.earth_angle.shape, ds.earth_angle.units
    ((1, 2, 2), 'degree')
    """
    missing = [name for name in ("time", "row", "column") if name not in ds.variables]
    missing += [f"attribute {name}" for name in ("sector", "camera", "ccd") if name not in ds.attrs]
    if missing:
        raise ValueError(f"the dataset lacks {', '.join(missing)}")
    for name, dim in (("time", "time"), ("row", "y"), ("column", "x")):
        if ds[name].dims != (dim,):
            raise ValueError(f"{name} has dimensions {ds[name].dims}, not ({dim!r},)")
    sky = geometry(
        ds["time"].to_numpy(),
        wcs=ds.attrs.get("wcs"),
        row=ds["row"].to_numpy(),
        column=ds["column"].to_numpy(),
        sector=int(ds.attrs["sector"]),
        camera=int(ds.attrs["camera"]),
        ccd=int(ds.attrs["ccd"]),
        ephemeris=ephemeris,
        light_time=light_time,
    )
    pixel = sky["pixel_direction"].to_numpy()
    shape = (ds.sizes["time"], ds.sizes["y"], ds.sizes["x"])
    lazy = bool(ds.chunks) or 4 * 4 * math.prod(shape) > 1 << 28
    blocks = [
        ds.chunks.get(dim) or _even_chunks(size, limit)
        for dim, size, limit in zip(("time", "y", "x"), shape, (MAP_FRAMES, 512, 512), strict=True)
    ]
    maps = {}
    for body in ("earth", "moon"):
        direction = sky[f"{body}_direction"].to_numpy()
        angle, azimuth = _lazy_maps(direction, pixel, blocks) if lazy else angle_maps(direction, pixel)
        for name, value in ((f"{body}_angle", angle), (f"{body}_azimuth", azimuth)):
            maps[name] = (("time", "y", "x"), value, ATTRS[name])
    sky = sky.drop_vars("time").assign(maps)
    return ds.assign_coords(sky.coords).assign(sky.data_vars).assign_attrs(sky.attrs)


def _even_chunks(size: int, limit: int) -> tuple[int, ...]:
    return tuple(min(limit, size - start) for start in range(0, size, limit))
