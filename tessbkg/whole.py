"""The mean light of whole bins: the kernel of the statistic `whole`.

The mean is over all pixels of a bin; where a pixel is masked, light is interpolated linearly between the
nearest pixels that are not, along its row and its column. So a bin's value is a weighted sum of pixels, in
and just beyond the bin, whose weights never change: planes are reproduced exactly, an edge of the light that
cuts a bin hardly matters, the error of the sum follows from the noise law, and what moved stars add to the
sum is five static images of bins (:mod:`tessbkg.motion`). Only outliers, such as cosmic rays, need a look
at pixels.

A second value of every bin lets stars in that are not too steep. It suffers more from their motion, but sees
edges of the light where they stand: :func:`tessbkg.reduce.reduce_frame` takes of each value what it is worth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy import sparse

from tessbkg.motion import (
    TERMS,
    Motion,
    bins_of,
    displacement,
    distance_of,
    even_part,
    expansion_error,
    odd_part,
    place,
)

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]

SEGMENT: Final = 16
"""Rows of a strip, where the size of bins allows it. A pixel is an outlier among those of its strip."""

AT_ONCE: Final = 4
"""Strips that are summed at once, where their number allows it: fewer calls, within the processor's cache."""

OUTLIER_SIGMA: Final = 6.0
"""A pixel is an outlier when it stands out by this many sigmas, beyond slopes and moved stars."""

RING_SIGMA: Final = 4.0
"""and by this many above the highest of the 16 pixels around its neighbours: edges of the light do not."""

ONE_SIDED: Final = 4.0
"""A gap that is open at the edge of the image counts as this much wider."""

EVEN_SHARE: Final = 0.15
"""Error of what motion adds whether forth or back, as a share of it: all pixels of a bin have it in common.
Measured on simulated frames whose stars move, sparse and crowded."""

_RING: Final = np.array([(r, c) for r in range(-2, 3) for c in range(-2, 3) if max(abs(r), abs(c)) == 2])


@dataclass(frozen=True, eq=False)
class Selection:
    """Which pixels count, and how the others are interpolated from them.

    Parameters
    ----------
    size : int
        Pixels along the side of a bin.
    gain : (columns,) float32
        What a pixel of each column is multiplied by: the inverse of its response.
    used : (rows, columns) bool
        Pixels that count, of whole bins only.
    masked : list of int arrays
        For every few strips that are summed at once the flat indices of pixels that do not.
    n_used : (ny, nx) int
    donors : (n,) int
        Flat indices of the pixels that others are interpolated from.
    weights : sparse (bins, n) float32
        What each donor adds to a bin beside its share in the plain sum.
    offset : (ny, nx) float32
        `weights` applied to the scene.
    terms : (5, ny, nx) float32
        What moved stars add (:mod:`tessbkg.motion`).
    blur : (ny, nx) float32
        Weighted root sum of squares of the slopes of the scene: what a badly told motion does to a bin.
    """

    size: int
    gain: Floats
    used: Bools
    masked: list[npt.NDArray[np.intp]]
    n_used: npt.NDArray[np.intp]
    donors: npt.NDArray[np.intp]
    weights: sparse.csr_array
    offset: Floats
    terms: Floats
    blur: Floats

    @property
    def reached(self) -> Bools:
        """(ny, nx) bins whose value any pixel says something of."""
        donated = np.diff(self.weights.indptr).reshape(self.n_used.shape) > 0
        return np.asarray((self.n_used > 0) | donated)

    def weigh(self, image: Floats, *, squared: bool = False) -> Floats:
        """Sum an image with the weights of every bin, or with their squares."""
        (ny, nx), size = self.n_used.shape, self.size
        share = self.gain[: nx * size] / np.float32(size * size)
        weights = self.weights
        if squared:
            entries = weights.tocoo()
            column = self.donors % image.shape[1]
            home = bins_of(self.donors, image.shape[1], size, (ny, nx))
            inside = np.where(home[entries.col] == entries.row, share[column[entries.col]], 0)
            data = entries.data * (entries.data + 2 * inside)
            weights = sparse.csr_array((data, (entries.row, entries.col)), shape=entries.shape)
            share = share**2
        inner = np.where(self.used, image[: ny * size, : nx * size] * share, 0)
        total = inner.reshape(ny, size, nx, size).sum(axis=(1, 3), dtype=np.float64)
        total += (weights @ image.reshape(-1)[self.donors]).reshape(ny, nx)
        return np.asarray(total, dtype=np.float32)


@dataclass(frozen=True, eq=False)
class Whole:
    """What is static; made by :func:`prepare_whole`.

    Parameters
    ----------
    size : int
        Pixels along the side of a bin.
    shape : tuple of (int, int)
        Bins along rows and columns.
    segment : int
        Rows of a strip.
    scene : (rows, columns) float32, electron s-1
        0 where it is not known.
    gain : (columns,) float32
        What a pixel of each column is multiplied by: the inverse of its response.
    n_segment : (strips, columns) float32
        Unmasked pixels of each column of each strip.
    variance : (strips, columns) float32
        Largest variance of an unmasked pixel without light.
    slope : (strips, columns) float32
        Largest slope of the scene at an unmasked pixel, electron s-1 per pixel.
    noise : (float, float)
        a and b of the noise law.
    ceiling : float
        Pixels this far above the scene are saturated, electron s-1.
    strict : Selection
        Pixels that are not masked.
    lenient : Selection or None
        And the spare ones; None if there are none.
    """

    size: int
    shape: tuple[int, int]
    segment: int
    scene: Floats
    gain: Floats
    n_segment: Floats
    variance: Floats
    slope: Floats
    noise: tuple[float, float]
    ceiling: float
    strict: Selection
    lenient: Selection | None

    def bins(self, pixel: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
        """Flat indices of the bins (the nearest ones) of flat indices of pixels."""
        return bins_of(pixel, self.scene.shape[1], self.size, self.shape)

    def columns(self, pixel: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
        """Columns of flat indices of pixels."""
        return np.asarray(pixel % self.scene.shape[1])


def prepare_whole(
    scene: Floats,
    used: Bools,
    *,
    size: int,
    gain: Floats,
    terms: Floats,
    noise: tuple[float, float],
    ceiling: float,
    spare: Bools | None = None,
) -> Whole:
    """Prepare the kernel.

    Parameters
    ----------
    scene : (rows, columns) float32, electron s-1
    used : (rows, columns) bool
    size : int
    gain : (columns,) float32
    terms : (5, rows, columns) float32
        From :func:`tessbkg.motion.scene_terms`.
    noise : (float, float)
        a and b of the noise law.
    ceiling : float
        Pixels this far above the scene are saturated, electron s-1.
    spare : (rows, columns) bool, optional
        Pixels that count where the light has structure.
    """
    ny, nx = (n // size for n in scene.shape)
    rows, columns = ny * size, nx * size
    scene = np.where(np.isfinite(scene), scene, 0).astype(np.float32)
    segment = _segment(size, rows)
    lenient = None
    if spare is not None and (spare & ~used).any():
        lenient = _select(scene, used | spare, size=size, segment=segment, gain=gain, terms=terms)
    strict = _select(scene, used, size=size, segment=segment, gain=gain, terms=terms)
    strips = strict.used.reshape(-1, segment, columns)
    variance = noise[0] * np.maximum(scene[:rows, :columns], 0) + noise[1]
    slope = np.hypot(*terms[:2, :rows, :columns])
    return Whole(
        size=size,
        shape=(ny, nx),
        segment=segment,
        scene=scene,
        gain=gain,
        n_segment=strips.sum(axis=1).astype(np.float32),
        variance=np.where(strips, variance.reshape(strips.shape), 0).max(axis=1),
        slope=np.where(strips, slope.reshape(strips.shape), 0).max(axis=1),
        noise=noise,
        ceiling=ceiling,
        strict=strict,
        lenient=lenient,
    )


def _select(scene: Floats, used: Bools, *, size: int, segment: int, gain: Floats, terms: Floats) -> Selection:
    ny, nx = (n // size for n in scene.shape)
    rows, columns = ny * size, nx * size
    used = used[:rows, :columns]
    donors, weights = _interpolation(used, size, gain)
    row, column = np.divmod(donors, columns)
    at_once = _at_once(rows // segment)
    selection = Selection(
        size=size,
        gain=gain,
        used=used,
        masked=[np.flatnonzero(~some) for some in used.reshape(-1, at_once * segment, columns)],
        n_used=used.reshape(ny, size, nx, size).sum(axis=(1, 3)),
        donors=row * scene.shape[1] + column,
        weights=weights,
        offset=(weights @ scene[row, column]).reshape(ny, nx),
        terms=np.empty((TERMS, ny, nx), dtype=np.float32),
        blur=np.empty((ny, nx), dtype=np.float32),
    )
    for k in range(TERMS):
        selection.terms[k] = selection.weigh(terms[k])
    selection.blur[...] = np.sqrt(selection.weigh(terms[0] ** 2 + terms[1] ** 2, squared=True))
    return selection


def _at_once(strips: int) -> int:
    """Give the number of strips that are summed at once: AT_ONCE or less, and none is left over."""
    return math.gcd(strips, AT_ONCE)


def _segment(size: int, rows: int) -> int:
    """Rows of a strip: whole bins or a whole part of one, SEGMENT if possible."""
    if size <= SEGMENT:
        best = size * (SEGMENT // size)
        return best if rows % best == 0 else size
    return SEGMENT if size % SEGMENT == 0 else size


def _interpolation(used: Bools, size: int, gain: Floats) -> tuple[npt.NDArray[np.intp], sparse.csr_array]:
    """Donors, and the weights by which they stand in for the masked pixels of every bin."""
    rows, columns = used.shape
    sides = [*_nearest(used), *(side.T for side in _nearest(used.T))]
    # A row of bins at a time: there are millions of entries before those of one donor are summed.
    weights = sparse.vstack(
        [
            _weights(used, [side[first : first + size] for side in sides], first, gain)
            for first in range(0, rows, size)
        ],
        format="csr",
    )
    donor = np.zeros(rows * columns, dtype=np.bool_)
    donor[weights.indices] = True
    number = np.cumsum(donor, dtype=np.int32) - 1
    donors = np.flatnonzero(donor)
    weights = sparse.csr_array(
        (weights.data, number[weights.indices], weights.indptr), shape=(weights.shape[0], len(donors))
    )
    return donors, weights


def _weights(used: Bools, sides: list[npt.NDArray[np.int16]], first: int, gain: Floats) -> sparse.csr_array:
    """Weights of all pixels for the bins of one row of them, which begins with row `first`.

    Parameters
    ----------
    used : (rows, columns) bool
    sides : list of (size, columns) int16
        Columns of the nearest used pixels to the left and right, rows of those above and below; -1 if none.
    first : int
    gain : (columns,) float32
    """
    size, columns = sides[0].shape
    masked = ~used[first : first + size]
    row, column = (axis.astype(np.int32) for axis in np.nonzero(masked))
    row += first
    found = [side[masked].astype(np.int32) for side in sides]
    gap = [
        np.where(side >= 0, np.abs(side - here), 0).astype(np.float32)
        for side, here in zip(found, (column, column, row, row), strict=True)
    ]
    share, squares = [], []
    for low, high in ((0, 1), (2, 3)):
        both = (found[low] >= 0) & (found[high] >= 0)
        width = gap[low] + gap[high]
        with np.errstate(invalid="ignore", divide="ignore"):
            share += [
                np.where(both, gap[high] / width, found[low] >= 0),
                np.where(both, gap[low] / width, found[high] >= 0),
            ]
            width = np.where(both, width, ONE_SIDED * width)
            squares.append(np.where(width > 0, 1 / width**2, np.float32(0)))
    total = np.maximum(squares[0] + squares[1], np.float32(1e-30))
    pixel = [row * columns + side for side in found[:2]] + [side * columns + column for side in found[2:]]
    weight = [each * squares[k // 2] / total for k, each in enumerate(share)]
    keep = [each > 0 for each in weight]
    pixels = np.concatenate([each[k] for each, k in zip(pixel, keep, strict=True)])
    values = np.concatenate([each[k] for each, k in zip(weight, keep, strict=True)])
    home = np.concatenate([(column // size)[k] for k in keep])
    values *= (gain / np.float32(size**2))[pixels % columns]
    weights = sparse.csr_array((values, (home, pixels)), shape=(columns // size, used.size))
    weights.sum_duplicates()
    return weights


def _nearest(used: Bools) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int16]]:
    """Find the columns of the nearest used pixels to the left and right of every pixel; -1 if none."""
    n = used.shape[1]
    column = np.arange(n, dtype=np.int16)  # a CCD has 2048
    left = np.maximum.accumulate(np.where(used, column, np.int16(-1)), axis=1)
    right = np.minimum.accumulate(np.where(used, column, np.int16(n))[:, ::-1], axis=1)[:, ::-1]
    return left, np.where(right == n, np.int16(-1), right)


def reduce_whole(flux: Floats, plan: Whole, motion: Motion) -> list[tuple[Floats, Floats]]:
    """Reduce one frame.

    Parameters
    ----------
    flux : (rows, columns) float32, electron s-1
    plan : Whole
    motion : Motion
        Tracers of the scene.

    Returns
    -------
    list of (value, error), each (ny, nx) float32, electron s-1
        Of the strict selection and, if there is one, the lenient one. Values are NaN where no pixel says
        anything and where an unmasked pixel is saturated; errors are of what moved stars add, which is taken
        off the values.
    """
    size, (rows, columns) = plan.size, flux.shape
    sums, more, highest, lost = _sum_strips(flux, plan)
    mean = _mean(sums, lost, plan.strict)
    moved = motion.fit(flux, mean.reshape(-1)[plan.bins(motion.pixel)], plan.noise)
    outliers = _outliers(flux, plan, sums, highest, moved)
    y, x = (np.arange(n) * size + (size - 1) / 2 for n in plan.shape)
    y, x = place(y, rows)[:, None], place(x, columns)
    dy, dx = displacement(moved.astype(np.float32), y, x)
    apart = np.float32(expansion_error(distance_of(moved)))
    means = [(plan.strict, mean)]
    if plan.lenient is not None and more is not None:
        means.append((plan.lenient, _mean(more, None, plan.lenient)))
    found = []
    for selection, mean in means:
        donated = flux.reshape(-1)[selection.donors]
        if lost is not None and selection is plan.strict:
            _replace_lost(donated, mean, plan)
        value = _interpolated(mean, donated, plan, selection, outliers)
        together = even_part(dy, dx, selection.terms)
        value -= odd_part(dy, dx, selection.terms) + together
        found.append((value, np.hypot(apart * selection.blur, np.float32(EVEN_SHARE) * together)))
    return found


def mean_of_used(flux: Floats, plan: Whole) -> Floats:
    """Mean of the unmasked pixels of each bin, as they are."""
    sums, _, _, lost = _sum_strips(flux, plan)
    return _mean(sums, lost, plan.strict)


def _mean(sums: Floats, lost: Floats | None, selection: Selection) -> Floats:
    """Mean of the pixels that count; NaN where there are none."""
    (ny, nx), size = selection.n_used.shape, selection.size
    fold = (ny, -1, nx, size)
    total = np.einsum("ypxs,xs->yx", sums.reshape(fold), selection.gain[: nx * size].reshape(nx, size))
    number = selection.n_used.astype(np.float32)
    if lost is not None:
        number -= lost.reshape(fold).sum(axis=(1, 3))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(number > 0, total / number, np.float32(np.nan))


def _interpolated(
    mean: Floats,
    donated: Floats,
    plan: Whole,
    selection: Selection,
    outliers: tuple[npt.NDArray[np.intp], Floats],
) -> Floats:
    """Mean over all pixels of each bin, those that do not count interpolated and outliers changed."""
    area = np.float32(plan.size**2)
    value = np.where(selection.n_used > 0, mean * (selection.n_used / area), 0) - selection.offset
    value = value.astype(np.float32)
    outlier, change = outliers
    if outlier.size:
        np.add.at(value.reshape(-1), plan.bins(outlier), change * plan.gain[plan.columns(outlier)] / area)
        if selection.donors.size:
            at = np.minimum(np.searchsorted(selection.donors, outlier), len(selection.donors) - 1)
            hit = selection.donors[at] == outlier
            donated[at[hit]] += change[hit]
    value += (selection.weights @ donated).reshape(plan.shape)
    value[~selection.reached] = np.nan
    return value


def _sum_strips(flux: Floats, plan: Whole) -> tuple[Floats, Floats | None, Floats, Floats | None]:
    """Give strict and lenient sums, highest pixels and (unless none is lost) numbers of lost, by columns.

    Sums and numbers are of parts of strips that are no longer than a bin, highest pixels of whole strips.
    Lenient sums are NaN where a pixel is lost.
    """
    segment, (rows, columns) = plan.segment, plan.strict.used.shape
    strips = rows // segment
    at_once = _at_once(strips)
    some = np.empty((at_once, segment, columns), dtype=np.float32)
    flat, parts = some.reshape(-1), some.reshape(at_once, -1, min(segment, plan.size), columns)
    shape = strips // at_once, *parts.shape[:2], columns
    sums = np.empty(shape, dtype=np.float32)
    more = None if plan.lenient is None else np.empty(shape, dtype=np.float32)
    highest = np.empty((shape[0], at_once, columns), dtype=np.float32)
    lost = None
    for j, masked in enumerate(plan.strict.masked):
        here = np.s_[j * at_once * segment : (j + 1) * at_once * segment, :columns]
        np.subtract(flux[here], plan.scene[here], out=some.reshape(-1, columns))
        if more is not None and plan.lenient is not None:
            flat[plan.lenient.masked[j]] = 0
            np.add.reduce(parts, axis=2, out=more[j])
        flat[masked] = 0
        np.maximum.reduce(some, axis=1, out=highest[j])
        if not highest[j].max() < plan.ceiling:
            if lost is None:
                lost = np.zeros(shape, dtype=np.float32)
            bad = np.isnan(some)
            lost[j] = bad.reshape(parts.shape).sum(axis=2)
            some[bad] = 0
            np.maximum.reduce(some, axis=1, out=highest[j])
            some[some >= plan.ceiling] = np.nan
        np.add.reduce(parts, axis=2, out=sums[j])
    by_strips = strips, len(parts[0]), columns
    return (
        sums.reshape(by_strips),
        None if more is None else more.reshape(by_strips),
        highest.reshape(strips, columns),
        None if lost is None else lost.reshape(by_strips),
    )


def _replace_lost(donated: Floats, mean: Floats, plan: Whole) -> None:
    """Put the mean of their bin in the place of donors that are NaN, and NaN where they are saturated."""
    donated[donated - plan.scene.reshape(-1)[plan.strict.donors] >= plan.ceiling] = np.inf
    bad = np.flatnonzero(np.isnan(donated))
    if bad.size:
        pixel = plan.strict.donors[bad]
        light = mean.reshape(-1)[plan.bins(pixel)] / plan.gain[plan.columns(pixel)]
        donated[bad] = plan.scene.reshape(-1)[pixel] + light
    donated[np.isinf(donated)] = np.nan


def _outliers(
    flux: Floats, plan: Whole, sums: Floats, highest: Floats, moved: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.intp], Floats]:
    """Flat indices of outliers and what is to be added to them to make them like the pixels around."""
    segment, columns = plan.segment, plan.strict.used.shape[1]
    a, b = plan.noise
    mean = (sums[:, 0] if sums.shape[1] == 1 else sums.sum(axis=1)) / np.maximum(plan.n_segment, 1)
    above = highest - mean
    reach = plan.variance + np.float32(a) * np.maximum(mean, 0)
    np.sqrt(reach, out=reach)
    reach *= np.float32(OUTLIER_SIGMA)
    furthest = np.abs(displacement(moved, *np.meshgrid([-1.0, 1.0], [-1.0, 1.0]))).max(axis=(1, 2))
    reach += np.float32(np.hypot(*furthest)) * plan.slope
    step = np.abs(np.diff(mean, axis=0))
    reach[1:] += step
    reach[:-1] += step
    j, column = np.divmod(np.flatnonzero((above > reach) & (plan.n_segment > 0)), columns)
    nothing = np.empty(0, dtype=np.intp), np.empty(0, dtype=np.float32)
    if not j.size:
        return nothing
    row = j[:, None] * segment + np.arange(segment)
    across = np.broadcast_to(column[:, None], row.shape)
    rest = np.where(plan.strict.used[row, across], flux[row, across] - plan.scene[row, across], -np.inf)
    level = (mean + reach)[j, column][:, None]
    hit = (rest > level) & (rest < plan.ceiling)
    row, column, rest = row[hit], across[hit], rest[hit]
    if not row.size:
        return nothing
    r, c = row[:, None] + _RING[:, 0], column[:, None] + _RING[:, 1]
    inside = (r >= 0) & (r < plan.strict.used.shape[0]) & (c >= 0) & (c < columns)
    r, c = np.where(inside, r, row[:, None]), np.where(inside, c, column[:, None])
    around = flux[r, c] - plan.scene[r, c]
    around[~(inside & plan.strict.used[r, c] & np.isfinite(around))] = np.inf
    around.sort(axis=1)
    number = np.isfinite(around).sum(axis=1)
    top = around[np.arange(len(row)), np.maximum(number - 1, 0)]
    middle = around[np.arange(len(row)), number // 2 - (number > 0) * (number % 2 == 0)]
    sigma = np.sqrt(a * np.maximum(flux[row, column], 0) + b)
    isolated = (number >= 4) & (rest - top > RING_SIGMA * sigma)
    pixel = row * plan.scene.shape[1] + column
    return pixel[isolated], (middle - rest)[isolated].astype(np.float32)
