"""The kernel: one frame in, one frame of bins out. Arrays only; no dask, no xarray, no input or output.

What does not change from frame to frame (masks, counts, scene terms of the error, the filling solve) is
prepared once in a :class:`Plan`; :func:`reduce_frame` then costs little more than one pass over memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal, get_args

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.sparse.linalg import splu

from tessbkg.motion import (
    TERMS,
    Motion,
    Response,
    bins_of,
    displacement,
    distance_of,
    expand,
    expansion_error,
    measure_response,
    place,
    prepare_motion,
    scene_terms,
)
from tessbkg.rolling import (
    Halving,
    mean_of_windows,
    overlapping,
    prepare_rolling,
    reduce_rolling,
    rolling_factor,
)
from tessbkg.whole import Whole, mean_of_used, prepare_whole, reduce_whole

Floats = npt.NDArray[np.float32]
Statistic = Literal["whole", "median", "mean", "clipped", "rolling", "sparse"]
STATISTICS: Final[tuple[str, ...]] = get_args(Statistic)

CLIP_SIGMA: Final = 3.0
"""`clipped` leaves out pixels further than this from the bin's median, in sigmas of the bin."""

NOISE: Final = (7.445e-4, 0.0197)
"""Noise law of sector 1, electron s-1 and (electron s-1)^2: weighs pixels where a plan has no law of its
own."""

CEILING: Final = 4e4
"""Light, electron s-1, from which on a pixel is saturated: `whole` gives no value of its bin then, and no
statistic one as large."""

RESPONSE_SHARE: Final = {"median": 0.23, "clipped": 0.2, "rolling": 0.4}
"""Error of what moved stars add to statistics that are no means, as a share of it; measured on simulated
frames."""

LEAST_MEDIAN: Final = 4
"""Medians of smaller bins follow moved stars like means."""

STRUCTURE_SIZES: Final = (4, 8, 16, 32, 64)

STRUCTURE: Final[dict[str, tuple[npt.ArrayLike, npt.ArrayLike]]] = {
    "whole": ((0.05, 0.05, 0.025, 0.0125, 0.0034), (0.56, 0.56, 0.28, 0.14, 0.038)),
    "mean": ((0.31, 0.072, 0.042, 0.028, 0.022), 0.2),
    "median": ((0.078, 0.108, 0.126, 0.084, 0.044), 0.2),
    "clipped": ((0.078, 0.108, 0.126, 0.056, 0.022), 0.2),
    "rolling": ((0.465, 0.216, 0.1, 0.056, 0.044), 0.2),
    "sparse": (1.0, 0.0),
}
"""Error of a bin where light has structure, as a share of its second differences from bin to bin: a constant,
and what comes with the share of masked pixels, at STRUCTURE_SIZES or the same at all. Fitted to simulated
frames with and without glints, with many and with few dark ones."""

SKEW: Final = {"median": (0.7, 4.0), "clipped": (0.5, 8.0), "rolling": (1.0, 12.0)}
"""Error of what is no mean, as a share of its difference to the mean of the same pixels (for `rolling`, of
what the first halving gives), and from how many variances of the bin on the square of that counts: the light
of such a bin is uneven, and the mean is what is wanted. Fitted to the same frames."""

ROLLING_SHARE: Final = 0.03
"""Error of medians of medians of unevenly masked windows, as a share of the change of the light from bin to
bin."""

AGREEMENT: Final = 4.0
"""Squared differences of the two values of a bin count for more than the errors of both from this many times
their sum on; the stars are to blame then."""

NOTICED: Final = 80.0
"""Squared second differences count from this many variances of a bin on; 12 is what noise makes."""


@dataclass(frozen=True, eq=False)
class Plan:
    """What a reduction of one CCD needs for every frame; made by :func:`plan_reduction`.

    Parameters
    ----------
    size : int
        Pixels along the side of a bin.
    statistic : str
    shape : tuple of (int, int)
        Bins along rows and columns. Pixels beyond the last whole bin are left out.
    subtract : (rows, columns) float32
        Scene; where masked, minus infinity for statistics that sort, so that subtracting it sorts masked
        pixels last, and what :func:`tessbkg.rolling.prepare_rolling` has for `rolling`.
    gain : (columns,) float32
        What pixels of each column are multiplied by.
    n_pixels : (ny, nx) int
        Unmasked pixels in each bin.
    pixel : (ny, nx) int
        Flat index of the unmasked pixel nearest the centre of each bin (`sparse` reads it).
    factor : (ny, nx) float32
        Error of the statistic over the error of a pixel.
    still, rise : (ny, nx) float32
        Variance of a frame's bin without light, and its growth with the light; NaN without a noise law.
    scene_error : (ny, nx) float32
        The part of the error that is common to all frames: that of the scene.
    noise : (float, float)
        Noise law that weighs pixels.
    whole : Whole or None
        For `whole` and `mean`.
    halvings : list of Halving
        For `rolling`.
    structure : tuple of (ny, nx) float32
        Variance of a bin over the squared second differences of the light; for `whole` with spare pixels
        a second one for them.
    lopsided : (2, ny, nx) float32 or None
        Rows and columns, in bins, by which the pixels of a bin lie off its centre on average; None for
        `whole` and `sparse`, which have no such error.
    motion : Motion
        Tracers of moving stars.
    terms : (5, ny, nx) float32
        What moved stars add to the mean of unmasked pixels; `whole` has its own.
    blur : (ny, nx) float32
        Noise that stars leave per pixel of motion, times the error of its terms.
    star_response : Response or None
        For statistics that do not follow the expansion, which is that of the mean.
    fill : Filling
        Fills bins that no pixel says anything of in an image of bins, in place.
    """

    size: int
    statistic: str
    shape: tuple[int, int]
    subtract: Floats
    gain: Floats
    n_pixels: npt.NDArray[np.intp]
    pixel: npt.NDArray[np.intp]
    factor: Floats
    still: Floats
    rise: Floats
    scene_error: Floats
    noise: tuple[float, float]
    whole: Whole | None
    halvings: list[Halving]
    structure: tuple[Floats, ...]
    lopsided: Floats | None
    motion: Motion
    terms: Floats
    blur: Floats
    star_response: Response | None
    fill: Filling


def plan_reduction(  # noqa: C901, PLR0915 (one plan, many parts)
    scene: Floats,
    mask: npt.NDArray[np.bool_],
    *,
    bin: int,  # noqa: A002 (the public name of this option)
    statistic: str = "whole",
    scene_err: Floats | None = None,
    noise: tuple[float, float] | None = None,
    terms: Floats | None = None,
    response: Floats | None = None,
    spare: npt.NDArray[np.bool_] | None = None,
) -> Plan:
    """Prepare the reduction of the frames of one CCD.

    Parameters
    ----------
    scene : (rows, columns) float32, electron s-1
        Static sky to subtract from every frame.
    mask : (rows, columns) bool
        True where pixels are left out of every frame.
    bin : int
        Pixels along the side of a bin.
    statistic : {"whole", "median", "mean", "clipped", "rolling", "sparse"}
        `whole` (:mod:`tessbkg.whole`) is the mean light of all pixels of a bin, masked ones interpolated,
        free of outliers. The others are of the unmasked pixels: `median`; `mean`; `clipped`, the mean within
        3 sigmas of the median; `rolling`, halving the image by medians of overlapping 4 x 4 windows;
        `sparse`, the one pixel nearest the centre. What moved stars add is taken off all of them.
    scene_err : (rows, columns) float32, optional
        One sigma of the scene.
    noise : (float, float), optional
        a and b of the noise law, for errors without the uncertainty image.
    terms : (5, rows, columns) float32, optional
        What stars that move add, as :class:`tessbkg.scene.Scene` has it; by default by the scene's spline.
    response : (columns,) float32, optional
        Response of each column to light; 1 by default.
    spare : (rows, columns) bool, optional
        Masked pixels that show the light, but not as well: stars that are not too steep. `whole` makes use
        of them where the light has structure.

    Raises
    ------
    ValueError
        If an option is unknown or a bin is larger than the image.
    """
    if statistic not in STATISTICS:
        raise ValueError(f"statistic={statistic!r} is unknown: allowed are {', '.join(STATISTICS)}")
    rows, columns = scene.shape
    if not 1 <= bin <= min(rows, columns):
        raise ValueError(f"bin={bin} is out of range: the image has {rows} x {columns} pixels")
    if statistic == "rolling" and bin & (bin - 1):
        raise ValueError(f"bin={bin} is not allowed with statistic='rolling': it must be a power of two")
    valid = ~mask & np.isfinite(scene)
    gain = np.ones(columns, dtype=np.float32) if response is None else (1 / response).astype(np.float32)
    counts = _blocks(valid, bin).sum(axis=2)
    pixel = _central_pixel(valid, bin)
    if terms is None:
        terms = scene_terms(scene)
    motion = prepare_motion(scene, terms, noise or NOISE)
    moving = np.zeros((TERMS, *counts.shape), dtype=np.float32)
    blur = np.zeros(counts.shape, dtype=np.float32)
    whole = None
    if statistic in {"whole", "mean"}:
        whole = prepare_whole(
            scene,
            valid,
            size=bin,
            gain=gain,
            terms=terms,
            noise=noise or NOISE,
            ceiling=CEILING,
            spare=spare if statistic == "whole" else None,
        )
    subtract = np.where(valid, scene, np.float32(-np.inf)) if whole is None else whole.scene
    halvings: list[Halving] = []
    if statistic == "rolling" and bin > 1:
        subtract, halvings = prepare_rolling(scene, valid, bin)

    def take(image: Floats) -> Floats:
        """Bins of an image, as the statistic has them."""
        if statistic == "sparse":
            return np.asarray(image.reshape(-1)[np.maximum(pixel, 0)])
        if halvings:
            return mean_of_windows(image, valid, bin)
        return _mean(np.where(valid, image, 0), counts, bin)

    def spread(square: Floats) -> Floats:
        """Variance of bins by that of pixels."""
        if whole is not None and statistic == "whole":
            return whole.strict.weigh(square, squared=True)
        return np.asarray(take(square) * factor**2)

    if whole is not None and statistic == "whole":
        filled = ~whole.strict.reached
        factor = np.where(filled, np.float32(np.nan), np.sqrt(spread(np.ones_like(scene))))
    else:
        filled = counts == 0
        factor = rolling_factor(subtract, halvings) if halvings else _error_factor(counts, statistic)
        moving = np.nan_to_num(np.stack([take(term) for term in terms]))
        slope = np.hypot(terms[0], terms[1])
        slope *= slope
        blur = np.sqrt(np.nan_to_num(spread(slope)))
        del slope
    a, b = noise or (np.nan, np.nan)
    lopsided = None if statistic in {"whole", "sparse"} else _lopsided(valid, bin, statistic)
    variance = np.maximum(np.where(valid, scene, 0), 0)
    variance *= np.float32(a)
    variance += np.float32(b)
    still = spread(variance)
    del variance
    used = [counts]
    if whole is not None and whole.lenient is not None:
        used.append(whole.lenient.n_used)
    fill = Filling(filled)
    scene_error = np.zeros(counts.shape, dtype=np.float32)
    if scene_err is not None:
        scene_error = np.sqrt(spread(np.square(np.where(np.isfinite(scene_err), scene_err, 0))))
    scene_error[filled] = np.nan
    fill.errors(scene_error)
    plan = Plan(
        size=bin,
        statistic=statistic,
        shape=(counts.shape[0], counts.shape[1]),
        subtract=subtract,
        gain=gain,
        n_pixels=counts,
        pixel=pixel,
        factor=factor,
        still=still,
        rise=np.asarray(a * factor**2, dtype=np.float32),
        scene_error=scene_error,
        noise=noise or NOISE,
        whole=whole,
        halvings=halvings,
        structure=tuple(_structure(statistic, bin, n) for n in used),
        lopsided=lopsided,
        motion=motion,
        terms=moving,
        blur=blur,
        star_response=None,
        fill=fill,
    )
    if statistic not in RESPONSE_SHARE or bin < LEAST_MEDIAN or not motion.pixel.size or filled.all():
        return plan
    measured = measure_response(
        scene,
        terms,
        plan.noise,
        share=RESPONSE_SHARE[statistic],
        kernel=lambda image: _statistic(image, plan)[0],
        spread=spread,
    )
    return replace(plan, star_response=measured)


def reduce_frame(flux: Floats, plan: Plan, flux_err: Floats | None = None) -> tuple[Floats, Floats]:
    """Reduce one frame.

    Parameters
    ----------
    flux : (rows, columns) float32, electron s-1
        NaN pixels are left out. Best in native byte order: else it is copied.
    plan : Plan
    flux_err : (rows, columns) float32, optional
        One sigma of each pixel. Without it errors follow the noise law of the plan, and are NaN if the
        plan has none.

    Returns
    -------
    value : (ny, nx) float32, electron s-1
        Scattered light. Bins that no unmasked pixel says anything of are filled from their neighbours; bins
        that are empty in this frame only, or saturated, are NaN.
    error : (ny, nx) float32, electron s-1
        One sigma of `value`: noise of the frame and of the scene, and what moved stars and structure in the
        light leave. A filled bin has the error that its neighbours' errors are filled with.

    Raises
    ------
    ValueError
        If the frame has another shape than the plan's scene.
    """
    if flux.shape != plan.subtract.shape:
        raise ValueError(f"frame of shape {flux.shape} does not fit a scene of shape {plan.subtract.shape}")
    flux = np.ascontiguousarray(flux, dtype=flux.dtype.newbyteorder("="))
    others: list[tuple[Floats, Floats]] = []
    skew = None
    if plan.statistic == "whole" and plan.whole is not None:
        (value, moved), *others = reduce_whole(flux, plan.whole, plan.motion)
    else:
        value, mean = _statistic(flux, plan)
        with np.errstate(invalid="ignore"):
            skew = None if mean is None else value - mean
        value[value >= CEILING] = np.nan
        moved = _take_motion_off(value, flux, plan)
    variance = plan.still + plan.rise * np.maximum(value, 0)
    if flux_err is not None:
        told = _pixel_variance(flux, flux_err, plan) * plan.factor**2
        # Bins of interpolated pixels only have no pixels to ask.
        variance = np.where(np.isfinite(told), told, variance)
    with np.errstate(invalid="ignore"):
        variance += np.square(plan.scene_error)
        plan.fill(value)
        # Structure is to be seen beside bins that are empty or saturated, too.
        light = _with_saturated(value, flux, plan.size)
        quiet = variance + np.square(moved)
        bend = np.maximum(_second(light) - NOTICED * quiet, 0)
        uncertain = np.square(moved) + plan.structure[0] * bend
        if skew is not None:
            uncertain += _skewed(skew, quiet, *SKEW[plan.statistic])
        if plan.lopsided is not None:
            uncertain += _uneven(light, plan.lopsided, ROLLING_SHARE if plan.statistic == "rolling" else 0)
        for other, other_moved in others:
            _blend(value, uncertain, other, np.square(other_moved) + plan.structure[1] * bend)
        error = np.sqrt(variance + uncertain)
    error[np.isnan(value)] = np.nan
    if others:
        plan.fill(value)
    plan.fill.errors(error)
    return value, error


def _take_motion_off(value: Floats, flux: Floats, plan: Plan) -> Floats:
    """Take what moved stars add off `value`, in place; give the error that they leave."""
    at = bins_of(plan.motion.pixel, flux.shape[1], plan.size, plan.shape)
    moved = plan.motion.fit(flux, value.reshape(-1)[at], plan.noise)
    y, x = (np.arange(n) * plan.size + (plan.size - 1) / 2 for n in plan.shape)
    y, x = place(y, flux.shape[0])[:, None], place(x, flux.shape[1])
    left = np.float32(expansion_error(distance_of(moved))) * plan.blur
    if plan.star_response is None:
        value -= expand(moved, plan.terms, y, x)
        return left
    added, variance = plan.star_response.at(*displacement(moved.astype(np.float32), y, x))
    value -= added
    return np.asarray(np.hypot(left, np.sqrt(variance)))


def _with_saturated(value: Floats, flux: Floats, size: int) -> Floats:
    """Values, with CEILING where there is none because a pixel is saturated; `value` itself if nowhere."""
    row, column = np.nonzero(np.isnan(value))
    ny, nx = value.shape
    pixels = flux[: ny * size, : nx * size].reshape(ny, size, nx, size)[row, :, column]
    saturated = (pixels >= CEILING).any(axis=(1, 2))
    if not saturated.any():
        return value
    light = value.copy()
    light[row[saturated], column[saturated]] = CEILING
    return light


def _skewed(skew: Floats, variance: Floats, share: float, least: float) -> Floats:
    """Variance of bins by their difference to the mean, where two of the eight around have as much.

    Light that is uneven goes on in the next bins; a cosmic ray or an asteroid does not, but at a corner.
    """
    square = np.square(np.clip(np.nan_to_num(skew), -CEILING, CEILING))
    around = np.pad(square, 1, mode="reflect")
    most, second = np.zeros((2, *square.shape), dtype=np.float32)
    for y, x in np.ndindex(3, 3):
        if (y, x) != (1, 1):
            one = around[y : y + len(square), x : x + square.shape[1]]
            np.maximum(second, np.minimum(most, one), out=second)
            np.maximum(most, one, out=most)
    np.minimum(square, second, out=square)
    return np.asarray(np.float32(share**2) * np.maximum(square - least * variance, 0))


def _second(value: Floats) -> Floats:
    """Squared second differences from bin to bin; 0 for what is not known."""
    second = np.zeros_like(value)
    for image, out in ((value, second), (value.T, second.T)):
        if len(image) > 2:
            out[1:-1] += np.nan_to_num(np.square(image[2:] + image[:-2] - 2 * image[1:-1]))
    return second


def _structure(statistic: str, size: int, used: npt.NDArray[np.intp]) -> Floats:
    """Variance of bins where light has structure, over its squared second differences."""
    sizes = np.log2(STRUCTURE_SIZES)
    constant, masked = (
        np.float32(np.interp(np.log2(size), sizes, np.broadcast_to(part, sizes.shape)))
        for part in STRUCTURE[statistic]
    )
    share = constant + masked * (1 - used / np.float32(size**2))
    return np.asarray(np.square(share), dtype=np.float32)


def _lopsided(valid: npt.NDArray[np.bool_], size: int, statistic: str) -> Floats:
    """Rows and columns, in bins, by which the pixels that a statistic is of lie off the centres of bins."""
    ny, nx = (n // size for n in valid.shape)
    off = np.empty((2, ny, nx), dtype=np.float32)
    overlap = statistic == "rolling"
    for axis, n in enumerate((ny, nx)):
        there: npt.NDArray[np.floating] = valid[: ny * size, : nx * size].astype(np.float32)
        along = (-1, 1) if axis == 0 else (1, -1)
        place: npt.NDArray[np.floating] = there * np.arange(n * size, dtype=np.float32).reshape(along)
        for _ in range(size.bit_length() - 1 if overlap else 1):
            # A window counts as one pixel for the next, whatever it is of.
            number, total = (
                overlapping(image) if overlap else _block_sums(image, size) for image in (there, place)
            )
            there = (number > 0).astype(np.float64)
            place = total / np.maximum(number, 1)
        centre = (np.arange(n) * size + (size - 1) / 2).reshape(along)
        off[axis] = np.where(there > 0, (place - centre) / size, 0)
    return off


def _block_sums(image: npt.NDArray[np.floating], size: int) -> npt.NDArray[np.float64]:
    """Sum over bins."""
    ny, nx = (n // size for n in image.shape)
    inner = image[: ny * size, : nx * size].reshape(ny, size, nx, size)
    return np.asarray(inner.sum(axis=(1, 3), dtype=np.float64))


def _uneven(value: Floats, lopsided: Floats, share: float) -> Floats:
    """Variance of bins whose pixels lie off the centre by `lopsided` bins, where the light has slopes."""
    slopes = [
        np.nan_to_num(np.gradient(value, axis=axis)) if n > 1 else np.zeros_like(value)
        for axis, n in enumerate(value.shape)
    ]
    change = slopes[0] * lopsided[0] + slopes[1] * lopsided[1]
    return np.asarray(change**2 + np.float32(share**2) * (slopes[0] ** 2 + slopes[1] ** 2))


def _blend(value: Floats, variance: Floats, other: Floats, other_variance: Floats) -> None:
    """Weigh two values of each bin that differ by what stars and structure do to them, in place.

    Where they differ by more than both variances allow, `other` counts less.
    """
    difference = np.nan_to_num(other - value)
    other_variance = np.maximum(other_variance, difference**2 / AGREEMENT - variance)
    total = variance + other_variance
    share = np.where(np.isfinite(other) & (total > 0), variance / np.maximum(total, 1e-30), 0)
    value += share * difference
    variance += share * (share * total - 2 * variance)  # (1 - share)^2 variance + share^2 other_variance


def _statistic(flux: Floats, plan: Plan) -> tuple[Floats, Floats | None]:
    """Values of bins, and the mean of the same pixels where values are something else."""
    if plan.statistic == "sparse":
        return _sparse(flux, plan), None
    if plan.whole is not None:
        return mean_of_used(flux, plan.whole), None
    if plan.halvings:
        return reduce_rolling(flux, plan.subtract, plan.gain, plan.halvings)
    return _blockwise(flux, plan)


def _pixel_variance(flux: Floats, flux_err: Floats, plan: Plan) -> Floats:
    """Mean variance of the pixels of each bin by their uncertainties."""
    variance = np.square(flux_err)
    if plan.statistic == "sparse":
        return variance.reshape(-1)[np.maximum(plan.pixel, 0)]
    used = np.isfinite(plan.subtract) & np.isfinite(variance) & np.isfinite(flux)
    if plan.whole is not None:
        rows, columns = plan.whole.strict.used.shape
        used[:rows, :columns] &= plan.whole.strict.used
    counts = _blocks(used, plan.size).sum(axis=2)
    return _mean(np.where(used, variance, 0), counts, plan.size)


def _blockwise(flux: Floats, plan: Plan) -> tuple[Floats, Floats]:
    """Statistics and means of bins, one row of bins at a time: the buffer stays in the processor's cache."""
    size, (ny, nx) = plan.size, plan.shape
    strip = np.empty((size, nx * size), dtype=np.float32)
    buffer = np.zeros(nx * size * size + 1, dtype=np.float32)  # one more, where the last bin ends
    flat = buffer[:-1].reshape(nx, size * size)
    value, mean = np.empty((2, ny, nx), dtype=np.float32)
    statistic = _median if plan.statistic == "median" else _clipped
    first = np.arange(nx) * size * size
    for j in range(ny):
        rows = slice(j * size, (j + 1) * size)
        np.subtract(flux[rows, : nx * size], plan.subtract[rows, : nx * size], out=strip)
        strip *= plan.gain[: nx * size]
        flat.reshape(nx, size, size)[...] = strip.reshape(size, nx, size).transpose(1, 0, 2)
        # A full sort: NumPy's is vectorised and beats selection of the two middle values.
        flat.sort(axis=1)  # finite values, then masked pixels (infinite), then NaN
        counts = plan.n_pixels[j]
        if np.isnan(flat[:, -1]).any():
            counts = np.isfinite(flat).sum(axis=1)
        value[j] = statistic(flat, counts)
        ends = np.stack([first, first + counts], axis=1).reshape(-1)
        with np.errstate(invalid="ignore", over="ignore"):  # infinities
            mean[j] = np.add.reduceat(buffer, ends)[::2] / np.maximum(counts, 1)
    return value, mean


def _median(flat: Floats, counts: npt.NDArray[np.intp]) -> Floats:
    """Median of the first `counts` values of each row, which are in order; NaN where there are none."""
    low, high = np.maximum((counts - 1) // 2, 0), counts // 2
    row = np.arange(len(flat))
    middle: Floats = (flat[row, low] + flat[row, np.minimum(high, flat.shape[1] - 1)]) / 2
    middle[counts == 0] = np.nan
    return middle


def _clipped(flat: Floats, counts: npt.NDArray[np.intp]) -> Floats:
    """Mean within CLIP_SIGMA of the median; sigma from the quartiles (interquartile range / 1.349)."""
    centre = _median(flat, counts)
    counts = np.isfinite(flat).sum(axis=1)
    row = np.arange(len(flat))
    last = np.maximum(counts - 1, 0)
    with np.errstate(invalid="ignore"):  # empty bins hold infinities only
        spread = flat[row, (3 * last) // 4] - flat[row, last // 4]
        reach = CLIP_SIGMA * np.where(counts > 3, spread / 1.349, np.inf)
        kept = np.abs(flat - centre[:, None]) <= reach[:, None]
    kept &= np.isfinite(flat)
    number = kept.sum(axis=1)
    total = np.where(kept, flat, 0).sum(axis=1, dtype=np.float64)
    return np.where(number > 0, total / np.maximum(number, 1), np.nan).astype(np.float32)


def _sparse(flux: Floats, plan: Plan) -> Floats:
    """Value of one pixel a bin."""
    index = np.maximum(plan.pixel, 0)
    value: Floats = flux.reshape(-1)[index] - plan.subtract.reshape(-1)[index]
    value *= plan.gain[index % flux.shape[1]]
    value[~np.isfinite(value)] = np.nan
    return value


def _blocks(image: npt.NDArray[np.generic], size: int) -> npt.NDArray[np.generic]:
    """View an image as (ny, nx, pixels of a bin); a copy."""
    ny, nx = (n // size for n in image.shape)
    whole = image[: ny * size, : nx * size].reshape(ny, size, nx, size)
    return whole.transpose(0, 2, 1, 3).reshape(ny, nx, size * size)


def _mean(image: npt.NDArray[np.floating], counts: npt.NDArray[np.intp], size: int) -> Floats:
    """Sum over bins divided by `counts`; NaN where that is zero."""
    return np.where(counts > 0, _block_sums(image, size) / np.maximum(counts, 1), np.nan).astype(np.float32)


def _central_pixel(valid: npt.NDArray[np.bool_], size: int) -> npt.NDArray[np.intp]:
    """Flat index of the valid pixel nearest the centre of each bin; -1 where there is none."""
    offset = np.arange(size) - (size - 1) / 2
    distance = np.add.outer(offset**2, offset**2).ravel()
    order = np.argsort(distance, kind="stable")
    blocks = _blocks(valid, size)[:, :, order]
    first = order[blocks.argmax(axis=2)]
    ny, nx = first.shape
    row = np.arange(ny)[:, None] * size + first // size
    column = np.arange(nx)[None, :] * size + first % size
    return np.where(blocks.any(axis=2), row * valid.shape[1] + column, -1)


def median_variance(count: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Variance of the median of `count` normal values of variance 1.

    pi / (2 (n + c)) with c = 0.47 for odd and 1.30 for even n, which is within 2 % of the exact value from
    n = 3 on (n = 3: 0.449, 4: 0.298, 5: 0.287); 1 and 1/2 exactly for n = 1 and 2.
    """
    n = np.asarray(count, dtype=np.float64)
    variance = np.pi / 2 / (n + np.where(n % 2 == 1, 0.47, 1.30))
    return np.select([n == 0, n == 1, n == 2], [np.nan, 1.0, 0.5], variance)


def _error_factor(counts: npt.NDArray[np.intp], statistic: str) -> Floats:
    """Give the standard error of a statistic for pixels of unit variance."""
    n = np.where(counts > 0, counts, np.nan)
    if statistic == "sparse":
        factor = np.where(counts > 0, 1.0, np.nan)
    elif statistic == "mean":
        factor = 1 / np.sqrt(n)
    elif statistic == "clipped":
        factor = np.sqrt(CLIPPED_VARIANCE / n)
    else:
        factor = np.sqrt(median_variance(counts))
    return factor.astype(np.float32)


CLIPPED_VARIANCE: Final = 1.02
"""Variance of the mean of n normal values clipped at 3 sigma of the quartiles, times n; by simulation."""


class Filling:
    """Fill the `empty` bins of images smoothly, in place.

    The filled values minimise the summed squares of second differences along rows and columns (and, to
    pin what those leave free, a thousandth of the first differences). The masks are the same for all
    frames, so the sparse normal equations are factored once.
    """

    def __init__(self, empty: npt.NDArray[np.bool_]) -> None:
        self.empty = empty
        self._unknown = np.flatnonzero(empty.ravel())
        self._known = np.flatnonzero(~empty.ravel())
        if not self._unknown.size or not self._known.size:
            return
        matrix = _differences(*empty.shape)
        left = matrix[:, self._unknown]
        self._right = sparse.csr_array(left.T @ matrix[:, self._known])
        self._solve = splu(sparse.csc_matrix(left.T @ left)).solve

    def __reduce__(self) -> tuple[type[Filling], tuple[npt.NDArray[np.bool_]]]:
        return Filling, (self.empty,)

    def __call__(self, image: Floats) -> None:
        """Fill one image of shape (ny, nx)."""
        if not self._unknown.size or not self._known.size:
            return
        values = image[~self.empty].astype(np.float64)
        missing = ~np.isfinite(values)
        if missing.all():
            return
        if missing.any():  # bins lost in this frame only must not spread: the mean stands in for them
            values[missing] = values[~missing].mean()
        image[self.empty] = self._solve(-(self._right @ values))

    def errors(self, image: Floats) -> None:
        """Fill one image of errors: none is less than the least there is."""
        known = image[~self.empty]
        known = known[np.isfinite(known)]
        self(image)
        if known.size:
            np.maximum(image, known.min(), out=image)


def _differences(ny: int, nx: int) -> sparse.csc_array:
    """Second differences, and a little of the first, of an image of (ny, nx) along both axes."""
    operators = []
    for order, stencil in ((2, [1.0, -2.0, 1.0]), (1, [-1e-3, 1e-3])):
        for axis, n in enumerate((ny, nx)):
            if n > order:
                difference = sparse.diags_array(stencil, offsets=list(range(order + 1)), shape=(n - order, n))
                identity = sparse.eye_array((nx, ny)[axis])
                pair = (difference, identity) if axis == 0 else (identity, difference)
                operators.append(sparse.kron(*pair))
    return sparse.csc_array(sparse.vstack(operators))
