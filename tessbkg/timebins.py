"""Averages in time that lose nothing: no frame, no flag, no gap, no turn of an azimuth."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import xarray as xr

from tessbkg.evaluation import MAX_GAP, frame_spacing, good_frames, scene_error
from tessbkg.geometry import angle_maps

if TYPE_CHECKING:
    from collections.abc import Iterator

Floats = npt.NDArray[np.float64]

GAP_HOURS: Final = 1.0
"""The shortest pause that ends a bin (and at least `MAX_GAP` frame spacings): downlinks take hours."""

BLOCK_FRAMES: Final = 256
"""Frames that one lazy block averages, about."""

_PAIRS: Final = (
    ("boresight_angle", "boresight_azimuth", "angle"),
    ("elevation", "spacecraft_azimuth", "elevation"),
)
"""Two numbers that are one direction: both change when either is averaged."""


@dataclass(frozen=True, eq=False)
class Bins:
    """Which frames make which bin.

    Parameters
    ----------
    start : (bins + 1,) int
        First frame of every bin, and the number of frames.
    use : (frames,) bool
        Frames that are averaged: the good ones of a bin, or all where none is good.
    good : (bins,) bool
        Bins with a good frame.
    """

    start: npt.NDArray[np.intp]
    use: npt.NDArray[np.bool_]
    good: npt.NDArray[np.bool_]

    @property
    def count(self) -> npt.NDArray[np.intp]:
        """Frames that are averaged, of every bin."""
        counts: npt.NDArray[np.intp] = np.add.reduceat(self.use.astype(np.intp), self.start[:-1])
        return counts

    @property
    def first(self) -> npt.NDArray[np.intp]:
        """First frame that is averaged, of every bin."""
        used = np.flatnonzero(self.use)
        return used[np.searchsorted(used, self.start[:-1])]

    def part(self, low: int, high: int) -> Bins:
        """Bins from `low` to `high` (exclusive) alone."""
        frames = slice(int(self.start[low]), int(self.start[high]))
        return Bins(self.start[low : high + 1] - self.start[low], self.use[frames], self.good[low:high])

    def sum(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Sum what is averaged, per bin: (frames, ...) to (bins, ...) float64."""
        used = np.asarray(values)[self.use]
        ends = np.concatenate([[0], np.cumsum(self.count)[:-1]])
        total: npt.NDArray[Any] = np.add.reduceat(used, ends, axis=0, dtype=np.float64)
        return total

    def mean(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Average, leaving out NaN; NaN where nothing is left."""
        values = np.asarray(values)
        known = np.isfinite(values)
        if known.all():
            counts: Any = self.count.reshape(-1, *(1,) * (values.ndim - 1))
        else:
            values, counts = np.where(known, values, 0), self.sum(known)
        with np.errstate(invalid="ignore", divide="ignore"):
            average: npt.NDArray[Any] = self.sum(values) / counts
        return average


def bin_time(ds: xr.Dataset, *, hours: float | None = None, cadences: int | None = None) -> xr.Dataset:
    """Average frames in time. Lazy when `ds` is.

    A bin never reaches across a pause of the data (a downlink; at least an hour and three frame spacings):
    bins start anew after it, the last one before it is short. Every frame belongs to exactly one bin; only
    good frames are averaged. ``n_frames + n_skipped`` sums to the frames of `ds`.

    Parameters
    ----------
    ds : xarray.Dataset
        In order of time, not binned before.
    hours : float
        Length of a bin; not less than a frame spacing.
    cadences : int
        Or: cadence numbers in a bin, missing frames included.

    Returns
    -------
    xarray.Dataset
        The variables of `ds`, of fewer times:

        * `scattered_light`: the mean of the good frames. `scattered_light_err`: their errors combined; the
          part that the scene brings (`scene_err`, where `ds` has it) is common to all frames and stays.
        * `time`, distances and other plain numbers: means of the same frames; so is `cadence`, now a float.
        * directions: averaged as vectors and made unit vectors; angle maps, azimuths, elevations and
          longitudes follow from averaged vectors, never from averaged angles.
        * `quality`: flags of the averaged frames, OR-ed. `frame_status`: good with at least one good frame,
          else that of the bin's first frame, with light NaN. `ffi`: the first averaged frame's.
        * `n_frames`, `n_skipped`: frames that were averaged, and not, for want of being good.

    Raises
    ------
    ValueError
        If not exactly one of `hours` and `cadences` is given or it is too small, or if `ds` is not in order
        of time or already binned.

    Examples
    --------
    >>> import numpy as np, xarray as xr
    >>> light = xr.Variable(("time", "y", "x"), np.arange(8.0).reshape(8, 1, 1))
    >>> ds = xr.Dataset(
    ...     {"scattered_light": light, "scattered_light_err": 0 * light + 1},
    ...     {"time": 1325 + np.arange(8) / 48},
    ... )
    >>> two_hours = bin_time(ds, hours=2)
    >>> two_hours.scattered_light.values.ravel(), two_hours.scattered_light_err.values.ravel()
    (array([1.5, 5.5]), array([0.5, 0.5]))
    """
    bins = _make_bins(ds, hours, cadences)
    made: dict[str, Any] = {}
    for name, variable in ds.variables.items():
        if "time" in variable.dims and str(name) not in made:
            made |= _average(ds, str(name), bins)
    total = np.diff(bins.start)
    used = np.where(bins.good, bins.count, 0)
    made["n_frames"] = xr.Variable("time", used.astype("u2"), {"long_name": "frames averaged"})
    made["n_skipped"] = xr.Variable(
        "time", (total - used).astype("u2"), {"long_name": "frames not averaged: not good"}
    )
    kept = [name for name in ds.variables if "time" not in ds[name].dims]
    result = xr.Dataset(
        {name: ds[name].variable if name in kept else made[str(name)] for name in ds.data_vars}
        | {name: made[name] for name in ("n_frames", "n_skipped")},
        coords={name: ds[name].variable if name in kept else made[str(name)] for name in ds.coords},
        attrs=ds.attrs,
    )
    length = {"time_bin_hours": float(hours)} if hours is not None else {"time_bin_cadences": cadences}
    return result.assign_attrs(length)


# ------------------------------------------------------------------ which frames


def _make_bins(ds: xr.Dataset, hours: float | None, cadences: int | None) -> Bins:
    """Cut the frames into bins."""
    if (hours is None) == (cadences is None):
        raise ValueError("give either hours or cadences")
    if "time" not in ds.variables or ds["time"].dims != ("time",):
        raise ValueError("the dataset has no time(time)")
    if "n_frames" in ds:
        raise ValueError("the dataset is binned in time already: bin the one with all frames")
    time = _filled(ds["time"].to_numpy().astype(np.float64))
    if not len(time):
        raise ValueError("the dataset has no frame")
    if (np.diff(time) < 0).any():
        raise ValueError("the dataset is not in order of time: use ds.sortby('time')")
    step = frame_spacing(time)
    if hours is not None and not (hours * (1 + 1e-6) >= step * 24 and np.isfinite(hours)):
        raise ValueError(f"hours={hours!r} is too small: frames are {step * 24:.3g} hours apart")
    if cadences is not None and not (isinstance(cadences, int | np.integer) and cadences >= 1):
        raise ValueError(f"cadences={cadences!r} is not allowed: it must be a whole number above zero")
    new = np.diff(time, prepend=time[0]) > max(MAX_GAP * step * (1 + 1e-6), GAP_HOURS / 24)
    segment = np.cumsum(new)
    origin = time[np.concatenate([[0], np.flatnonzero(new)])][segment]
    if hours is not None:
        place = np.floor((time - origin + step / 2) / (hours / 24) + 1e-9)
    else:
        place = _count(ds, time, origin, step) // int(cadences or 1)
    change = (np.diff(place, prepend=place[0]) != 0) | new
    start = np.concatenate([[0], np.flatnonzero(change), [len(time)]])
    start = np.unique(start).astype(np.intp)
    use = good_frames(ds)
    good = np.add.reduceat(use.astype(np.intp), start[:-1]) > 0
    return Bins(start, use | ~np.repeat(good, np.diff(start)), good)


def _filled(time: Floats) -> Floats:
    """Put the time before (or else after) in the place of NaN."""
    known = np.flatnonzero(np.isfinite(time))
    if not len(known):
        return np.zeros_like(time)
    before = np.searchsorted(known, np.arange(len(time)), side="right") - 1
    return time[known[np.maximum(before, 0)]]


def _count(ds: xr.Dataset, time: Floats, origin: Floats, step: float) -> npt.NDArray[Any]:
    """Cadence numbers since the beginning of each frame's segment."""
    number = np.round((time - origin) / step)
    if "cadence" in ds.variables:
        cadence = ds["cadence"].to_numpy().astype(np.float64)
        starts = np.searchsorted(origin, origin)  # first frame of the segment
        counted = cadence - cadence[starts]
        if (cadence > 0).all() and (np.diff(cadence) > 0).all():
            number = counted
    return number


# ------------------------------------------------------------------ how each variable


def _average(ds: xr.Dataset, name: str, bins: Bins) -> dict[str, xr.Variable]:
    """Average one variable, and those that can only be averaged with it."""
    variable = ds[name].variable
    body, _, rest = name.partition("_")
    if name == "scattered_light_err":
        return {name: _err(ds, bins)}
    if rest in {"angle", "azimuth"} and {f"{body}_angle", f"{body}_azimuth"} <= set(ds.variables):
        return _maps(ds, body, bins)
    for first, second, kind in _PAIRS:
        if rest in {first, second} and {f"{body}_{first}", f"{body}_{second}"} <= set(ds.variables):
            pair = (f"{body}_{first}", f"{body}_{second}")
            return dict(zip(pair, _pair(ds, pair, bins, kind), strict=True))
    if name == "frame_status":
        status = np.asarray(variable)[bins.start[:-1]]
        return {name: _like(variable, np.where(bins.good, 0, status).astype(variable.dtype))}
    if name == "scattered_light":
        return {name: _blockwise(variable, bins, _mean_light)}
    return {name: _blockwise(variable, bins, _kernel(name, variable))}


def _kernel(name: str, variable: xr.Variable) -> Any:
    """Choose how a variable is averaged on its own."""
    if "flag_masks" in variable.attrs or name == "quality":
        return _or
    if variable.dtype.kind not in "fiu" or "flag_values" in variable.attrs:
        return _first
    if name.endswith("_direction"):
        return _unit
    return _circular if name.endswith(("_azimuth", "_longitude")) else _mean


def _like(variable: xr.Variable, values: Any, **attrs: str) -> xr.Variable:
    return xr.Variable(variable.dims, values, {**variable.attrs, **attrs})


def _mean(bins: Bins, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    mean: npt.NDArray[Any] = bins.mean(values).astype(
        values.dtype if values.dtype.kind == "f" else np.float64
    )
    return mean


def _mean_light(bins: Bins, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    out = _mean(bins, values)
    out[~bins.good] = np.nan
    return out


def _first(bins: Bins, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return values[bins.first]


def _or(bins: Bins, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    flags = np.where(bins.use, values, 0).astype(values.dtype)
    joined: npt.NDArray[Any] = np.bitwise_or.reduceat(flags, bins.start[:-1])
    return joined


def _unit(bins: Bins, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Mean vector, of length 1; NaN where vectors cancel."""
    mean = bins.mean(values)
    length = np.linalg.norm(mean, axis=-1, keepdims=True)
    out: npt.NDArray[Any] = np.full_like(mean, np.nan)
    np.divide(mean, length, out=out, where=length > 1e-9)
    return np.asarray(out, dtype=values.dtype)


def _circular(bins: Bins, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Mean direction of angles in degrees, in the range that the values have: 0 .. 360 or -180 .. 180."""
    radians = np.radians(values.astype(np.float64))
    turn = np.degrees(np.arctan2(bins.mean(np.sin(radians)), bins.mean(np.cos(radians))))
    if not (values < 0).any():
        turn = _turn(turn)
    return np.asarray(turn, dtype=values.dtype)


def _turn(degrees: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Degrees from 0 up to 360, 360 itself excluded in float32 too."""
    out = np.where(degrees < 0, degrees + 360, degrees)
    return np.where(out >= 359.99999, 0.0, out)


def _err(ds: xr.Dataset, bins: Bins) -> xr.Variable:
    """Errors of the means."""
    scene = scene_error(ds)
    common = np.float32(0) if scene is None else np.square(scene)
    return _blockwise(ds["scattered_light_err"].variable, bins, _combine, common)


def _combine(bins: Bins, errors: npt.NDArray[Any], common: Any = 0) -> npt.NDArray[Any]:
    """Combine errors of frames: independent but for the variance `common` that all of them contain."""
    own = np.maximum(np.square(errors, dtype=np.float64) - common, 0)
    known = np.isfinite(own)
    counts = bins.sum(known)
    with np.errstate(invalid="ignore", divide="ignore"):
        variance = bins.sum(np.where(known, own, 0)) / np.square(counts) + common
    variance[(counts == 0) | ~bins.good.reshape(-1, *(1,) * (errors.ndim - 1))] = np.nan
    out: npt.NDArray[Any] = np.sqrt(variance).astype(errors.dtype)
    return out


def _vector(first: Any, azimuth: Any, kind: str) -> npt.NDArray[Any]:
    """Make unit vectors (..., 3) of angles from the axis, or elevations above the plane, and azimuths."""
    polar = np.radians(np.asarray(first, dtype=np.float64))
    along, across = (np.cos(polar), np.sin(polar)) if kind == "angle" else (np.sin(polar), np.cos(polar))
    turn = np.radians(np.asarray(azimuth, dtype=np.float64))
    return np.stack([across * np.cos(turn), across * np.sin(turn), along], axis=-1)


def _angles(vector: npt.NDArray[Any], kind: str) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Undo `_vector`, for vectors of any length."""
    x, y, z = np.moveaxis(vector, -1, 0)
    flat = np.hypot(x, y)
    first = np.degrees(np.arctan2(flat, z) if kind == "angle" else np.arctan2(z, flat))
    return first, _turn(np.degrees(np.arctan2(y, x)))


def _mean_pair(bins: Bins, both: npt.NDArray[Any], kind: str) -> npt.NDArray[Any]:
    """Average two stacked angles (frames, ..., 2) as a vector."""
    mean = bins.mean(_vector(both[..., 0], both[..., 1], kind))
    return np.stack(_angles(mean, kind), axis=-1).astype(both.dtype)


def _pair(ds: xr.Dataset, names: tuple[str, str], bins: Bins, kind: str) -> tuple[xr.Variable, xr.Variable]:
    """Average two variables that are one direction."""
    first, second = (ds[name].variable for name in names)
    lazy = first.chunks is not None or second.chunks is not None
    stack: Any = importlib.import_module("dask.array" if lazy else "numpy")
    both = xr.Variable((*first.dims, "pair"), stack.stack([first.data, second.data], axis=-1))
    mean = _blockwise(both, bins, _mean_pair, kind)
    return _like(first, mean.data[..., 0]), _like(second, mean.data[..., 1])


def _maps(ds: xr.Dataset, body: str, bins: Bins) -> dict[str, xr.Variable]:
    """Angle maps of a bin: of the mean direction where there is one, else of the mean of the maps' vectors.

    Both are the same: a pixel's angle and azimuth are the direction in the pixel's own axes.
    """
    names = (f"{body}_angle", f"{body}_azimuth")
    direction = f"{body}_direction"
    if not {direction, "pixel_direction"} <= set(ds.variables):
        return dict(zip(names, _pair(ds, names, bins, "angle"), strict=True))
    vectors = _unit(bins, ds[direction].to_numpy())
    pixel = ds["pixel_direction"].to_numpy()
    if ds[names[0]].chunks is None:
        maps = angle_maps(vectors, pixel)
    else:
        da: Any = importlib.import_module("dask.array")
        both = da.map_blocks(
            _map_block,
            da.from_array(vectors, chunks=(BLOCK_FRAMES, 3))[:, :, None, None],
            pixel=pixel,
            dtype=np.float32,
            chunks=(tuple(_even(len(vectors))), (2,), (pixel.shape[0],), (pixel.shape[1],)),
            meta=np.empty((0, 0, 0, 0), dtype=np.float32),
        )
        maps = both[:, 0], both[:, 1]
    return {name: _like(ds[name].variable, one) for name, one in zip(names, maps, strict=True)}


def _even(size: int) -> Iterator[int]:
    return (min(BLOCK_FRAMES, size - start) for start in range(0, size, BLOCK_FRAMES))


def _map_block(vectors: npt.NDArray[Any], pixel: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.stack(angle_maps(vectors[:, :, 0, 0], pixel), axis=1)


def _blockwise(variable: xr.Variable, bins: Bins, kernel: Any, *more: Any) -> xr.Variable:
    """Apply a kernel to a variable: at once, or block by block where it is lazy."""
    if variable.dims[0] != "time":
        order = ("time", *(dim for dim in variable.dims if dim != "time"))
        return _blockwise(variable.transpose(*order), bins, kernel, *more).transpose(*variable.dims)
    if variable.chunks is None:
        return _like(variable, kernel(bins, np.asarray(variable), *more))
    da: Any = importlib.import_module("dask.array")
    dtype = variable.dtype
    pieces = []
    for low, high in _runs(bins):
        frames = variable.data[int(bins.start[low]) : int(bins.start[high])]
        whole = [0, *(i for i, dim in enumerate(variable.dims) if dim in {"pair", "xyz"})]
        frames = frames.rechunk(dict.fromkeys(whole, -1))
        pieces.append(
            da.map_blocks(
                _apply,
                frames,
                bins=bins.part(low, high),
                kernel=kernel,
                more=more,
                dtype=dtype,
                meta=np.empty((0,) * variable.ndim, dtype=dtype),
                chunks=((high - low,), *frames.chunks[1:]),
            )
        )
    return _like(variable, da.concatenate(pieces, axis=0))


def _apply(values: npt.NDArray[Any], *, bins: Bins, kernel: Any, more: tuple[Any, ...]) -> npt.NDArray[Any]:
    """Apply a kernel to one block."""
    made: npt.NDArray[Any] = kernel(bins, values, *more)
    return made


def _runs(bins: Bins) -> Iterator[tuple[int, int]]:
    """First and last (exclusive) bin of blocks of about `BLOCK_FRAMES` frames."""
    low, n = 0, len(bins.good)
    while low < n:
        high = int(np.searchsorted(bins.start, bins.start[low] + BLOCK_FRAMES, side="right")) - 1
        high = min(max(high, low + 1), n)
        yield low, high
        low = high
