"""The light at any pixel and time, and target pixel files freed of it.

A frame is a grid of bins; between their centres it is a cubic spline (or bilinear). Both are linear in the
values of the bins, so a frame is evaluated at all pixels of all targets by one sparse matrix. Between two
good frames the light goes linearly in time.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import numpy.typing as npt
import xarray as xr
from scipy.interpolate import BSpline, make_interp_spline
from scipy.ndimage import distance_transform_edt
from scipy.sparse import csr_array

from tessbkg.ffi import FrameStatus

if TYPE_CHECKING:
    from collections.abc import Iterator

Floats = npt.NDArray[np.float64]
Method = Literal["cubic", "linear"]
Gaps = Literal["nan", "raise"]

MAX_GAP: Final = 3.0
"""Frame spacings over which light is interpolated in time: two frames may be missing in a row."""

BLOCK_BYTES: Final = 1 << 26
"""Values of one block of the answer; its errors are as many again."""

BLOCK_FRAMES: Final = 64
"""Times of one block of the answer at most: a shard."""

_KIND: Final = {0: "frame", 1: "between_frames", 2: "gap", 3: "no_time"}


@dataclass(frozen=True, eq=False)
class Operator:
    """Pixels as sums over bins.

    Parameters
    ----------
    prefilter : pair of (n + 2, n) float32, or None
        Spline coefficients from values, along y and x.
    weights : (pixels, coefficients) sparse float32
        Values from coefficients.
    linear : (pixels, bins) sparse float32
        Bilinear weights: for variances, and to see where values are missing.
    noise : (pixels,) float32
        Sum of the squares of the weights that a pixel gives to the values of bins: what it makes of the
        variance of the bins around it, taken as equal.
    """

    prefilter: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]] | None
    weights: csr_array
    linear: csr_array
    noise: npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Axis:
    """Times placed between frames.

    Parameters
    ----------
    first, second : (t,) int
        Frame before and after each time, as indices along the dataset's time.
    weight : (t,) float64
        Of `second`; NaN in a gap.
    kind : (t,) uint8
        0 a frame as it is, 1 between two frames, 2 in a gap, 3 no time.
    """

    first: npt.NDArray[np.intp]
    second: npt.NDArray[np.intp]
    weight: Floats
    kind: npt.NDArray[np.uint8]


def evaluate(
    ds: xr.Dataset,
    *,
    row: npt.ArrayLike,
    column: npt.ArrayLike,
    time: npt.ArrayLike | None = None,
    cadence: npt.ArrayLike | None = None,
    method: Method = "cubic",
    gaps: Gaps = "nan",
    max_gap: float = MAX_GAP,
) -> xr.Dataset:
    """Evaluate the scattered light at any pixels and times.

    Lazy when `ds` is: then nothing is read before something is computed, and memory holds a few blocks of
    `BLOCK_BYTES` and one shard, however many targets there are, and what is kept of the answer. 1,000 cutouts
    of 11 x 11 pixels in 1,200 frames of 128 x 128 bins take 7 s on one core and 2.6 GB, of which 1.2 GB are
    the answer; averaged before ``compute()``, 4 s and 0.5 GB. Ask for all targets at once: each frame is read
    and prepared once. Pixels cost 200 bytes each besides.

    Parameters
    ----------
    ds : xarray.Dataset
        From :func:`tessbkg.open_background`, :func:`tessbkg.scattered_light` or :func:`tessbkg.bin_time`.
    row, column : array_like
        1-based FFI coordinates as in FITS headers (pixel centres are whole numbers, science columns begin at
        45), may be fractional. They broadcast against each other to the shape of the pixels, any number of
        dimensions: ``row[:, :, None], column[:, None, :]`` with shapes (target, y, 1) and (target, 1, x) is a
        stack of cutouts. DataArrays keep the names of their dimensions.
    time : (t,) array_like
        TJD (JD - 2457000, TDB) at the spacecraft; every pixel is evaluated at every time. Barycentric times
        are up to 8 minutes off: subtract their correction. NaN gives NaN.
    cadence : (t,) array_like of int
        Instead of `time`: cadence numbers (FFIINDEX).
    method : {"cubic", "linear"}
        Between bin centres: natural cubic spline through them, or bilinear. In the half bin along the border
        both go on straight.
    gaps : {"nan", "raise"}
        What a time in a gap of the data gives: NaN with ``kind`` 2, or an error.
    max_gap : float
        A gap is a distance between good frames above this many frame spacings. Frames that are not good are
        skipped as if they were not there.

    Returns
    -------
    xarray.Dataset
        `scattered_light`, `scattered_light_err` : (time, ...) float32, electron s-1; `kind` : (time,) uint8
        with CF flags: 0 a frame as it is, 1 between two frames, 2 in a gap, 3 no time; coordinates `time` or
        `cadence`, `row`, `column`.

        The error is that of the bins' values, carried through the interpolation. Pixels of one bin share it:
        over an aperture add errors, not their squares. What a bin cannot resolve is not in it.

    Raises
    ------
    ValueError
        If a pixel lies outside the CCD or a time outside the data (the message names the span), if a time is
        in a gap and `gaps` is "raise", if there is no good frame, or if an argument is wrong.

    Examples
    --------
    >>> import tessbkg, tessbkg.simulate
    >>> _ = tessbkg.simulate.simulate("memory://ev", frames=6, step=1, shape=(64, 64))
    >>> _ = tessbkg.build("memory://ev.zarr", sector=1, camera=1, ccd=4, root="memory://ev", dark_frames=2)
    >>> ds = tessbkg.open_background("memory://ev.zarr", sector=1, camera=1, ccd=4)
    >>> light = evaluate(ds, row=[10, 20], column=[50, 60], time=ds.time[1:4])
    >>> light.scattered_light.dims, light.scattered_light.shape
    (('time', 'pixel'), (3, 2))
    """
    if method not in {"cubic", "linear"}:
        raise ValueError(f"method={method!r} is unknown: allowed are 'cubic' and 'linear'")
    if gaps not in {"nan", "raise"}:
        raise ValueError(f"gaps={gaps!r} is unknown: allowed are 'nan' and 'raise'")
    if not max_gap >= 1:
        raise ValueError(f"max_gap={max_gap!r} is out of range: it must be at least 1 frame spacing")
    _check_dataset(ds)
    rows, columns = _pixels(row, column)
    axis, along = _axis(ds, time, cadence, max_gap)
    if gaps == "raise" and (axis.kind == 2).any():
        inside = np.asarray(along)[axis.kind == 2]
        raise ValueError(f"{len(inside)} times lie in gaps of the data, the first at {inside[0]}")
    grid = tuple(ds[name].to_numpy().astype(np.float64) for name in ("row", "column"))
    _check_pixels(ds, rows.to_numpy(), columns.to_numpy(), grid)
    pixels = rows.to_numpy().ravel(), columns.to_numpy().ravel()
    light, error = _values(ds, axis, grid, pixels, method)
    dims = ("time", *(str(dim) for dim in rows.dims))
    shape = (len(axis.kind), *rows.shape)
    names = [_KIND[kind] for kind in _KIND]
    result = xr.Dataset(
        {
            "scattered_light": (dims, light.reshape(shape), _attrs(ds, "scattered_light")),
            "scattered_light_err": (dims, error.reshape(shape), _attrs(ds, "scattered_light_err")),
            "kind": (
                "time",
                axis.kind,
                {
                    "long_name": "where the time lies",
                    "flag_values": np.array(list(_KIND), dtype="u1"),
                    "flag_meanings": " ".join(names),
                },
            ),
        },
        coords={
            "row": rows.variable,
            "column": columns.variable,
            "time" if cadence is None else "cadence": along,
        },
        attrs={name: ds.attrs[name] for name in ("sector", "camera", "ccd", "bin") if name in ds.attrs},
    )
    result["row"].attrs = {"units": "pixel", "long_name": "FFI row, 1-based as in the FITS header"}
    result["column"].attrs = {"units": "pixel", "long_name": "FFI column, 1-based as in the FITS header"}
    return result


def _attrs(ds: xr.Dataset, name: str) -> dict[str, Any]:
    return {key: ds[name].attrs[key] for key in ("units", "long_name") if key in ds[name].attrs}


def _check_dataset(ds: xr.Dataset) -> None:
    """Refuse what is not a dataset of light."""
    for name, dims in (
        ("scattered_light", ("time", "y", "x")),
        ("scattered_light_err", ("time", "y", "x")),
        ("time", ("time",)),
        ("row", ("y",)),
        ("column", ("x",)),
    ):
        if name not in ds.variables or ds[name].dims != dims:
            raise ValueError(f"the dataset has no {name}({', '.join(dims)}): open one with open_background")


def _pixels(row: npt.ArrayLike, column: npt.ArrayLike) -> tuple[xr.DataArray, xr.DataArray]:
    """Rows and columns as arrays of one shape and set of dimensions."""
    if isinstance(row, xr.DataArray) and isinstance(column, xr.DataArray):
        bare = (one.drop_vars(list(one.coords)).astype(np.float64) for one in (row, column))
        rows, columns = xr.broadcast(*bare)
        if "time" in rows.dims:
            raise ValueError("row and column have a dimension 'time': pixels that move are not supported")
        return rows, columns
    try:
        both = np.broadcast_arrays(np.asarray(row, dtype=np.float64), np.asarray(column, dtype=np.float64))
    except ValueError:
        shapes = np.shape(row), np.shape(column)
        raise ValueError(f"row of shape {shapes[0]} and column of shape {shapes[1]} do not match") from None
    names = {0: (), 1: ("pixel",), 2: ("pixel_y", "pixel_x"), 3: ("target", "pixel_y", "pixel_x")}
    dims = names.get(both[0].ndim, tuple(f"pixel_{i}" for i in range(both[0].ndim)))
    return xr.DataArray(both[0], dims=dims), xr.DataArray(both[1], dims=dims)


def _check_pixels(ds: xr.Dataset, rows: Floats, columns: Floats, grid: tuple[Floats, ...]) -> None:
    """Refuse pixels outside the CCD."""
    for name, values, centres in (("row", rows, grid[0]), ("column", columns, grid[1])):
        half = _spacing(centres, ds) / 2
        low, high = centres[0] - half, centres[-1] + half
        if values.size and not (low <= values.min() <= values.max() <= high):
            found = "is NaN" if np.isnan(values).any() else f"spans {values.min():g} to {values.max():g}"
            raise ValueError(
                f"{name} {found}, outside the CCD: 1-based FFI {name}s are {low + 0.5:g} to {high - 0.5:g}"
            )


def _spacing(centres: Floats, ds: xr.Dataset) -> float:
    return float(centres[1] - centres[0]) if len(centres) > 1 else float(ds.attrs.get("bin", 1))


def good_frames(ds: xr.Dataset) -> npt.NDArray[np.bool_]:
    """Frames that hold light: status good, or all that have a time where there is no status."""
    good: npt.NDArray[np.bool_] = np.isfinite(ds["time"].to_numpy())
    if "frame_status" in ds:
        good &= ds["frame_status"].to_numpy() == FrameStatus.GOOD
    return good


def _axis(
    ds: xr.Dataset, time: npt.ArrayLike | None, cadence: npt.ArrayLike | None, max_gap: float
) -> tuple[Axis, xr.Variable]:
    """Place times or cadence numbers between the good frames."""
    if (time is None) == (cadence is None):
        raise ValueError("give either time or cadence")
    name, given = ("time", time) if cadence is None else ("cadence", cadence)
    if name not in ds.variables:
        raise ValueError("the dataset has no cadence numbers: give time")
    wanted = np.asarray(given)
    if wanted.ndim > 1 or wanted.dtype.kind not in "fiu":
        raise ValueError(f"{name} is {wanted.ndim}-dimensional {wanted.dtype}: it must be a list of numbers")
    wanted = np.atleast_1d(wanted).astype(np.float64)
    along = xr.Variable("time", wanted, {k: v for k, v in ds[name].attrs.items() if k != "axis"})
    every = ds[name].to_numpy().astype(np.float64)
    frames = np.flatnonzero(good_frames(ds) & np.isfinite(every) & ((every >= 0) | (name == "time")))
    if not len(frames):
        raise ValueError("the dataset has no good frame")
    at = every[frames]
    if (np.diff(at) <= 0).any():
        order = np.argsort(at, kind="stable")
        frames, at = frames[order], at[order]
        distinct = np.append(np.diff(at) > 0, True)
        frames, at = frames[distinct], at[distinct]
    finite = np.sort(every[np.isfinite(every)])
    step = frame_spacing(finite)
    known = np.isfinite(wanted)
    low, high = finite[0] - step / 2, finite[-1] + step / 2
    if known.any() and not (low <= wanted[known].min() and wanted[known].max() <= high):
        hint = ""
        if wanted[known].min() > 2400000:
            hint = "; it looks like a Julian date: subtract 2457000"
        raise ValueError(
            f"{name} spans {wanted[known].min():.6g} to {wanted[known].max():.6g}, outside the data: "
            f"{finite[0]:.5f} to {finite[-1]:.5f}, half a frame more on either side{hint}"
        )
    safe = np.where(known, wanted, at[0])
    after = np.searchsorted(at, safe)
    second, first = np.clip(after, 0, len(at) - 1), np.clip(after - 1, 0, len(at) - 1)
    first = np.where(at[second] == safe, second, first)
    apart = at[second] - at[first]
    weight = np.divide(safe - at[first], apart, out=np.zeros_like(safe), where=apart > 0)
    reach = np.where(apart > 0, apart, 2 * np.abs(safe - at[first]))  # beyond the ends: half a frame
    kind = np.where(safe == at[first], 0, 1)
    near = np.minimum(np.abs(safe - at[first]), np.abs(safe - at[second])) <= step / 2
    kind = np.where((apart > max_gap * step * (1 + 1e-6)) & ~near, 2, kind)
    kind = np.where((apart == 0) & (reach > step * (1 + 1e-6)), 2, kind)
    # in a gap, but within the exposure of the frame at its edge: that frame
    edge = (apart > max_gap * step * (1 + 1e-6)) & near
    weight = np.where(edge, np.round(weight), weight)
    kind = np.where(known, kind, 3).astype(np.uint8)
    weight = np.where(kind >= 2, np.nan, weight)
    return Axis(frames[first], frames[second], weight, kind), along


def frame_spacing(times: Floats) -> float:
    """Usual distance between neighbours of a sorted list; half an hour for a single frame."""
    return float(np.median(np.diff(times))) if len(times) > 1 else 1800 / 86400


# ------------------------------------------------------------------ kernel


def make_operator(grid: tuple[Floats, ...], rows: Floats, columns: Floats, method: Method) -> Operator:
    """Prepare the evaluation of pixels on a grid of bins.

    Parameters
    ----------
    grid : pair of 1-d arrays
        Rows and columns of the bin centres, evenly spaced.
    rows, columns : (pixels,) float64
    method : {"cubic", "linear"}
    """
    cubic = method == "cubic" and min(map(len, grid)) >= 4
    (ly, wy, ny, my), (lx, wx, nx, mx) = (
        _weights(centres, places, cubic=cubic) for centres, places in zip(grid, (rows, columns), strict=True)
    )
    shape = (len(grid[0]), len(grid[1]))
    linear = _product(ly, lx, shape)
    weights = _product(wy, wx, (shape[0] + 2, shape[1] + 2)) if cubic else linear
    return Operator((my, mx) if cubic else None, weights, linear, (ny * nx).astype(np.float32))


def _weights(centres: Floats, places: Floats, *, cubic: bool) -> tuple[Any, Any, Floats, Any]:
    """Weights of places along one axis.

    Returns
    -------
    linear, spline : pair of (n, taps) arrays
        Index and weight.
    noise : (n,) float64
        Sum of the squares of the weights of the values.
    prefilter : (bins, bins) float32
    """
    n = len(centres)
    if n == 1:
        one = (np.zeros((len(places), 1), dtype=np.int32), np.ones((len(places), 1)))
        return one, one, np.ones(len(places)), None
    unique, inverse = np.unique((places - centres[0]) / (centres[1] - centres[0]), return_inverse=True)
    cell = np.clip(np.floor(unique), 0, n - 2).astype(np.int32)
    part = unique - cell
    if not cubic:
        straight = np.stack([1 - part, part], axis=1)
        both = (np.stack([cell, cell + 1], axis=1)[inverse], straight[inverse])
        return both, both, (straight**2).sum(axis=1)[inverse], None
    inside = np.clip(part, 0, 1)
    linear = (np.stack([cell, cell + 1], axis=1)[inverse], np.stack([1 - inside, inside], axis=1)[inverse])
    spline = make_interp_spline(np.arange(n, dtype=np.float64), np.eye(n), k=3, bc_type="natural")
    basis = BSpline(spline.t, np.eye(len(spline.c)), 3)
    taps = cell[:, None] + np.arange(4, dtype=np.int32)
    values, noise = np.empty(taps.shape), np.empty(len(unique))
    for start in range(0, len(unique), 4096):  # bounds the memory of pixels at places all different
        part_of = slice(start, start + 4096)
        ends = np.clip(unique[part_of], 0, n - 1)
        # in the half bin along the border the spline goes on straight
        design = basis(ends) + (unique[part_of] - ends)[:, None] * basis(ends, nu=1)
        values[part_of] = np.take_along_axis(design, taps[part_of], axis=1)
        noise[part_of] = ((design @ spline.c) ** 2).sum(axis=1)
    prefilter = np.ascontiguousarray(spline.c, dtype=np.float32)
    return linear, (taps[inverse], values[inverse]), noise[inverse], prefilter


def _product(along_y: Any, along_x: Any, shape: tuple[int, int]) -> csr_array:
    """Sparse matrix of the products of weights along y and x."""
    (iy, wy), (ix, wx) = along_y, along_x
    n, taps = len(iy), iy.shape[1] * ix.shape[1]
    index = (iy[:, :, None] * np.int32(shape[1]) + ix[:, None, :]).reshape(-1)
    value = (wy[:, :, None] * wx[:, None, :]).astype(np.float32).reshape(-1)
    starts = np.arange(0, n * taps + 1, taps, dtype=np.int32 if n * taps < 1 << 31 else np.int64)
    return csr_array((value, index.astype(starts.dtype), starts), shape=(n, shape[0] * shape[1]))


def evaluate_frames(
    light: npt.NDArray[np.float32],
    error: npt.NDArray[np.float32],
    operator: Operator,
    within: tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], Floats],
    common: npt.NDArray[np.float32] | None = None,
) -> npt.NDArray[np.float32]:
    """Evaluate frames at pixels and times.

    Parameters
    ----------
    light, error : (n, ny, nx) float32
        Consecutive frames.
    operator : Operator
    within : first (t,) int, second (t,) int, weight (t,) float64
        Frames before and after each time, as indices into `light`, and the weight of the second; NaN gives
        NaN.
    common : (ny, nx) float32, optional
        Part of the error that all frames share: it is the same between two frames.

    Returns
    -------
    (2, t, pixels) float32
        Value and error.
    """
    first, second, weight = within
    out = np.empty((2, len(first), operator.linear.shape[0]), dtype=np.float32)
    known = np.isfinite(weight)
    w = np.where(known, weight, 0).astype(np.float32)[:, None, None]
    mixed = light[first]
    between = np.flatnonzero(w[:, 0, 0] > 0)
    mixed[between] += w[between] * (light[second[between]] - mixed[between])
    missing = np.isnan(mixed)
    missing[~known] = False
    if missing.any():
        for i in np.flatnonzero(missing.any(axis=(1, 2)) & known):
            nearest = distance_transform_edt(missing[i], return_distances=False, return_indices=True)
            mixed[i] = mixed[i][tuple(nearest)]
    if operator.prefilter is not None:
        along_y, along_x = operator.prefilter
        mixed = np.matmul(np.matmul(along_y, mixed), along_x.T, dtype=np.float32)
    out[0] = (operator.weights @ np.ascontiguousarray(mixed.reshape(len(first), -1).T)).T
    variance = np.square(error[first])
    if len(between):
        shared = np.float32(0) if common is None else np.square(common)
        own = (np.maximum(variance[between] - shared, 0), np.square(error[second[between]]) - shared)
        part = w[between]
        variance[between] = own[0] * (1 - part) ** 2 + np.maximum(own[1], 0) * part**2 + shared
    carried = operator.linear @ np.ascontiguousarray(variance.reshape(len(first), -1).T)
    carried *= operator.noise[:, None]
    np.sqrt(carried.T, out=out[1])
    if missing.any():
        touched = operator.linear @ missing.reshape(len(first), -1).T.astype(np.float32)
        out[:, touched.T > 0] = np.nan
    out[:, ~known] = np.nan
    return out


def _blocks(axis: Axis, pixels: int) -> Iterator[tuple[slice, int, int]]:
    """Cut times into blocks: times of a block, first and last (exclusive) frame that it needs."""
    size = int(np.clip(BLOCK_BYTES // (4 * max(pixels, 1)), 1, BLOCK_FRAMES))
    for start in range(0, len(axis.kind), size):
        part = slice(start, min(start + size, len(axis.kind)))
        used = axis.kind[part] < 2
        frames = np.concatenate([axis.first[part][used], axis.second[part][used]])
        yield part, *((int(frames.min()), int(frames.max()) + 1) if len(frames) else (0, 1))


def _values(
    ds: xr.Dataset, axis: Axis, grid: tuple[Floats, ...], pixels: tuple[Floats, Floats], method: Method
) -> tuple[Any, Any]:
    """Values and errors (t, pixels): NumPy arrays, or dask arrays where the dataset is lazy."""
    order = np.argsort(axis.first, kind="stable")
    back = None
    if (np.diff(order) < 0).any():  # times in any order: evaluated in order of the frames
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        axis = Axis(axis.first[order], axis.second[order], axis.weight[order], axis.kind[order])
    light, error = ds["scattered_light"], ds["scattered_light_err"]
    parts = list(_blocks(axis, len(pixels[0])))
    out: Any
    if not parts:
        out = np.empty((2, 0, len(pixels[0])), dtype=np.float32)
    elif light.chunks is None and error.chunks is None:
        operator = make_operator(grid, *pixels, method)
        out = np.empty((2, len(axis.kind), len(pixels[0])), dtype=np.float32)
        for part, low, high in parts:
            out[:, part] = evaluate_frames(
                light[low:high].to_numpy(),
                error[low:high].to_numpy(),
                operator,
                _within(axis, part, low, high),
                scene_error(ds),
            )
    else:
        out = _lazy_values(ds, axis, parts, (grid, *pixels, method))
    if back is not None:
        out = out[:, back]
    return out[0], out[1]


def scene_error(ds: xr.Dataset) -> npt.NDArray[np.float32] | None:
    """Part of the errors that the scene brings, (y, x), the same in all frames; None if it is not known."""
    if "scene_err" not in ds or ds["scene_err"].dims != ("y", "x"):
        return None
    return np.asarray(ds["scene_err"].to_numpy(), dtype=np.float32)


def _lazy_values(
    ds: xr.Dataset, axis: Axis, parts: list[tuple[slice, int, int]], operator: tuple[Any, ...]
) -> Any:
    """Dask array (2, t, pixels): each block asks for its own frames; the operator is made once."""
    dask: Any = importlib.import_module("dask")  # without types
    da: Any = importlib.import_module("dask.array")
    light, error = ds["scattered_light"], ds["scattered_light_err"]
    token = dask.base.tokenize(light.data, error.data, axis.first, axis.second, axis.weight, operator)
    made = dask.delayed(make_operator, pure=True)(*operator)
    return da.concatenate(
        [
            da.map_blocks(
                evaluate_frames,
                da.asarray(light.data[low:high]).rechunk(-1),
                da.asarray(error.data[low:high]).rechunk(-1),
                made,
                _within(axis, part, low, high),
                common=scene_error(ds),
                dtype=np.float32,
                meta=np.empty((0, 0, 0), dtype=np.float32),
                chunks=((2,), (part.stop - part.start,), (len(operator[1]),)),
                name=f"evaluate-{token}-{part.start}",
            )
            for part, low, high in parts
        ],
        axis=1,
    )


def _within(axis: Axis, part: slice, low: int, high: int) -> tuple[Any, Any, Any]:
    """Place of the times of a block within its frames."""
    first, second = (np.clip(one[part] - low, 0, high - low - 1) for one in (axis.first, axis.second))
    return first, second, axis.weight[part]
