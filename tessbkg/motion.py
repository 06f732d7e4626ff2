"""How far the stars of a frame stand from where the scene has them, and what that adds to a frame.

Over a sector stars move by some tenths of a pixel: pointing drift, jitter, roll, differential aberration.
A frame shows the scene S moved by d = (dy, dx)::

    S(p - d) = S - d . grad S + (dy^2 S_yy + 2 dy dx S_xy + dx^2 S_xx) / 2 + ...

Slopes and curvatures are those of the cubic spline through the pixels. d is linear in row and column: six
numbers a frame, fitted to the bright stars. What is static is prepared once.

TESS undersamples its stars: the spline's terms are some 12 % off. Where dark frames that stand apart show
better, :func:`refine_terms` corrects them pixel by pixel.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Floats = npt.NDArray[np.float32]

TERMS: Final = 5
"""Terms of the expansion above, of second order: -S_y, -S_x, S_yy / 2, S_xy, S_xx / 2."""

TRACERS: Final = 20000
"""Pixels that d is fitted to, at most."""

CELL: Final = 16
"""Tracers are the best pixels of cells of this side, so that they stand all over the CCD."""

MIN_SIGNIFICANCE: Final = 20.0
"""A tracer changes by this many sigmas of its noise when the stars move by one pixel, at least."""

BRIGHT: Final = 2e4
"""Pixels above this, electron s-1, and those within EDGE pixels, are no tracers: they saturate or bleed."""

EDGE: Final = 8
TRACER_ERROR: Final = 0.02
"""The expansion is this far off at tracers, in pixels times gradient, beside the noise."""

SHAPE_ERROR: Final = 0.05
CUBIC_ERROR: Final = 0.4
"""Error of the expansion as a share of its linear part: the first, and the second times the square of the
distance (the third order that is left out); measured on simulated frames, stars of 2 pixels FWHM."""

RESPONSE_DISTANCES: Final = (0.05, 0.25, 0.6)
"""Motions, in pixels, at which the response of medians to moved stars is measured."""

RESPONSE_NOISE: Final = 4
"""Images of noise that it is measured on."""

TERM_ERRORS: Final = np.array([0.12, 0.12, 0.1, 0.3, 0.1], dtype=np.float32)
"""Errors of the spline's terms as a share of slope and curvature, on stars of 2 pixels FWHM."""


@dataclass(frozen=True, eq=False)
class Motion:
    """Tracers of one scene; made by :func:`prepare_motion`.

    Parameters
    ----------
    shape : tuple of (int, int)
        Rows and columns of the scene.
    pixel : (n,) int
        Flat indices of the tracers; none if the scene has no stars.
    flux : (n,) float32, electron s-1
        The scene there.
    terms : (5, n) float32
        Terms of the expansion there.
    """

    shape: tuple[int, int]
    pixel: npt.NDArray[np.intp]
    flux: Floats
    terms: Floats

    def fit(self, flux: Floats, light: Floats, noise: tuple[float, float]) -> npt.NDArray[np.float64]:
        """Fit the motion of a frame.

        Parameters
        ----------
        flux : (rows, columns) float32, electron s-1
        light : (n,) float32, electron s-1
            Scattered light at the tracers; NaN where it is not known.
        noise : (float, float)
            a and b of the noise law.

        Returns
        -------
        (6,) float64
            dy = c0 + c1 y + c2 x and dx = c3 + c4 y + c5 x in pixels, y and x running from -1 to 1 over the
            frame. Zero when there are too few tracers.
        """
        still = np.zeros(6)
        if not self.pixel.size:
            return still
        seen = flux.reshape(-1)[self.pixel]
        rest = seen - self.flux - light
        good = np.isfinite(rest)
        number = int(good.sum())
        if number < 50:
            return still
        y, x = self._places
        _, _, yy, xy, xx = self.terms
        base = self._base
        seen = np.where(good, seen, 0)
        variance = noise[0] * np.maximum(seen, 0) + noise[1] + self._tracer_variance
        weight = np.where(good, 1 / variance, 0).astype(np.float32)
        rest = np.where(good, rest, 0)
        sigma = np.sqrt(weight)
        middle = good.size - number + number // 2  # of the good ones: the others are off by 0
        found, huber = still, np.float32(1)
        for _ in range(4):
            dy, dx = displacement(found.astype(np.float32), y, x)
            target = rest - (dy * dy * yy + dy * dx * xy + dx * dx * xx)
            weighted = base * (weight * huber)
            found = np.linalg.lstsq(
                (weighted @ base.T).astype(np.float64), (weighted @ target).astype(np.float64), rcond=1e-6
            )[0]
            off = np.abs(target - found.astype(np.float32) @ base) * sigma
            typical = np.float32(3 * np.partition(off, middle)[middle] + 1e-6)
            huber = np.minimum(typical / np.maximum(off, typical), 1)
        return np.asarray(found)

    @functools.cached_property
    def _places(self) -> tuple[Floats, Floats]:
        """Y and x of the tracers, from -1 to 1."""
        row, column = np.divmod(self.pixel, self.shape[1])
        return place(row, self.shape[0]), place(column, self.shape[1])

    @functools.cached_property
    def _base(self) -> Floats:
        """(6, n) what each number of a motion adds, to first order, electron s-1."""
        y, x = self._places
        gy, gx = self.terms[:2]
        return np.stack([gy, gy * y, gy * x, gx, gx * y, gx * x])

    @functools.cached_property
    def _tracer_variance(self) -> Floats:
        """(n,) variance beside that of the noise, (electron s-1)^2."""
        return np.asarray(np.float32(TRACER_ERROR**2) * np.square(self.terms[:2]).sum(axis=0))


def place(position: npt.NDArray[np.number[Any]], n: int) -> Floats:
    """Scale pixel positions along an axis of `n` pixels to -1 to 1."""
    return np.asarray(position * (2 / max(n - 1, 1)) - 1, dtype=np.float32)


def bins_of(
    pixel: npt.NDArray[np.integer[Any]], columns: int, size: int, shape: tuple[int, int]
) -> npt.NDArray[np.intp]:
    """Give flat indices, in (ny, nx) bins of `size` pixels, of the bins (the nearest ones) of pixels.

    Parameters
    ----------
    pixel : (n,) int
        Flat indices in a frame of `columns` columns.
    columns, size : int
    shape : tuple of (int, int)
        ny and nx.
    """
    row, column = np.divmod(pixel, columns)
    return np.asarray(
        np.minimum(row // size, shape[0] - 1) * shape[1] + np.minimum(column // size, shape[1] - 1)
    )


def displacement(motion: npt.NDArray[np.floating], y: Floats, x: Floats) -> tuple[Floats, Floats]:
    """Give dy and dx of a motion at y and x, in pixels."""
    return motion[0] + motion[1] * y + motion[2] * x, motion[3] + motion[4] * y + motion[5] * x


def expand(motion: npt.NDArray[np.floating], terms: Floats, y: Floats, x: Floats) -> Floats:
    """Compute what a motion adds to pixels or bins with `terms` (5, ...) at y and x, electron s-1."""
    dy, dx = displacement(motion.astype(np.float32), y, x)
    added = odd_part(dy, dx, terms)
    added += even_part(dy, dx, terms)
    return added


def odd_part(dy: Floats, dx: Floats, terms: Floats) -> Floats:
    """Compute what motion by dy and dx adds with the sign of the motion, electron s-1."""
    odd: Floats = dy * terms[0] + dx * terms[1]
    return odd


def even_part(dy: Floats, dx: Floats, terms: Floats) -> Floats:
    """Compute what motion by dy and dx adds whether forth or back, electron s-1."""
    even: Floats = dy * (dy * terms[2] + dx * terms[3])
    even += dx * dx * terms[4]
    return even


def expansion_error(distance: float) -> float:
    """Error of the expansion for stars that moved by a distance, in pixels: times the slope of the scene."""
    return float(distance * np.hypot(SHAPE_ERROR, CUBIC_ERROR * distance**2))


def distance_of(motion: npt.NDArray[np.floating]) -> float:
    """Root mean square distance, over the frame, that stars moved, in pixels."""
    return float(np.sqrt(motion**2 @ np.array([1, 1 / 3, 1 / 3, 1, 1 / 3, 1 / 3])))


def scene_terms(scene: Floats) -> Floats:
    """Terms of the expansion of a scene.

    Parameters
    ----------
    scene : (rows, columns) float32, electron s-1
        NaN pixels are taken for the median.

    Returns
    -------
    (5, rows, columns) float32
        -S_y, -S_x, S_yy / 2, S_xy, S_xx / 2 in electron s-1 per pixel (squared). Slopes are held to 1.5
        times the larger step to the two neighbours, lest the spline ring at saturated pixels.
    """
    terms = np.zeros((TERMS, *scene.shape), dtype=np.float32)
    if min(scene.shape) < 6:
        return terms
    if not np.isfinite(scene).all():
        scene = np.where(np.isfinite(scene), scene, np.nanmedian(scene))
    # In strips: the splines run along one axis at a time, and memory is what scenes are short of.
    for part in _strips(scene.shape[1]):
        terms[0][:, part], terms[2][:, part] = _slope(scene[:, part]), _bend(scene[:, part])
    for part in _strips(scene.shape[0]):
        across = scene[part].T
        terms[1][part], terms[4][part] = _slope(across).T, _bend(across).T
        limit = 4 * np.maximum(np.abs(terms[2][part]), np.abs(terms[4][part]))
        terms[3][part] = np.clip(_slope(terms[0][part].T).T, -limit, limit)
    return terms


def _strips(n: int, size: int = 256) -> list[slice]:
    return [slice(first, first + size) for first in range(0, n, size)]


def _slope(image: Floats) -> Floats:
    """Minus the derivative along rows of the cubic spline."""
    spline = ndimage.spline_filter1d(image, 3, axis=0, output=np.float32, mode="mirror")
    limit = np.float32(1.5) * _step(image)
    return np.asarray(np.clip(-np.gradient(spline, axis=0), -limit, limit))


def _bend(image: Floats) -> Floats:
    """Half the second derivative along rows of the quintic spline."""
    spline = ndimage.spline_filter1d(image, 5, axis=0, output=np.float32, mode="mirror")
    bend = np.zeros_like(image)
    near, far = spline[1:-3] + spline[3:-1], spline[:-4] + spline[4:]
    bend[2:-2] = near / 6 + far / 12 - spline[2:-2] / 2
    limit = np.float32(1.5) * _step(image)
    return np.asarray(np.clip(bend, -limit, limit))


def _step(image: Floats) -> Floats:
    """Larger of the steps to the two neighbours along rows."""
    step = np.pad(np.abs(np.diff(image, axis=0)), [(1, 1), (0, 0)], mode="edge")
    return np.asarray(np.maximum(step[1:], step[:-1]))


def prepare_motion(scene: Floats, terms: Floats, noise: tuple[float, float]) -> Motion:
    """Choose the tracers of a scene.

    Parameters
    ----------
    scene : (rows, columns) float32, electron s-1
    terms : (5, rows, columns) float32
        From :func:`scene_terms`.
    noise : (float, float)
        a and b of the noise law.
    """
    rows, columns = scene.shape
    near = (~(scene <= BRIGHT)).astype(np.uint8)  # NaN too
    for axis in (0, 1):
        near = ndimage.maximum_filter1d(near, 2 * EDGE + 1, axis=axis)
    near[:EDGE], near[-EDGE:], near[:, :EDGE], near[:, -EDGE:] = 1, 1, 1, 1
    ny, nx = -(-rows // CELL), -(-columns // CELL)
    found = [_best_of_cells(scene, terms, noise, near, first=j * CELL, cells=nx) for j in range(ny)]
    row, column, score = (np.concatenate(parts) for parts in zip(*found, strict=True))
    best = np.argsort(-score, kind="stable")[:TRACERS]
    best = best[score[best] > MIN_SIGNIFICANCE]
    pixel = np.sort(row[best] * columns + column[best])
    return Motion((rows, columns), pixel, scene.reshape(-1)[pixel], terms.reshape(TERMS, -1)[:, pixel].copy())


def _best_of_cells(
    scene: Floats,
    terms: Floats,
    noise: tuple[float, float],
    near: npt.NDArray[np.uint8],
    *,
    first: int,
    cells: int,
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], Floats]:
    """Rows, columns and significance of the two best pixels of each cell of one row of cells."""
    strip = np.s_[first : first + CELL]
    with np.errstate(invalid="ignore"):
        sigma = np.sqrt(noise[0] * np.maximum(scene[strip], 0) + noise[1])
        score = np.hypot(terms[0][strip], terms[1][strip]) / np.maximum(sigma, 1e-6)
    padded = np.zeros((CELL, cells * CELL), dtype=np.float32)
    padded[: len(score), : scene.shape[1]] = np.where(near[strip] == 0, score, 0)
    flat = padded.reshape(CELL, cells, CELL).transpose(1, 0, 2).reshape(cells, CELL * CELL)
    inside = np.argpartition(flat, -2, axis=1)[:, -2:]
    column = np.arange(cells)[:, None] * CELL + inside % CELL
    return (
        (first + inside // CELL).ravel(),
        column.ravel(),
        np.take_along_axis(flat, inside, axis=1).ravel(),
    )


@dataclass(frozen=True, eq=False)
class Response:
    """What moved stars do to medians and the like; from :func:`measure_response`.

    Parameters
    ----------
    added : (distances, 2, ny, nx) float32, electron s-1
        What motion along rows (columns) by RESPONSE_DISTANCES adds, per pixel of motion.
    even : (distances, 2, ny, nx) float32, electron s-1
        What it adds besides, whether forth or back, per square of the motion.
    noise : (distances, 2, ny, nx) float32, (electron s-1)^2
        Variance that comes with it, per square of the motion.
    share : float
        Error of what is added, as a share of it.
    """

    added: Floats
    even: Floats
    noise: Floats
    share: float

    def at(self, dy: Floats, dx: Floats) -> tuple[Floats, Floats]:
        """Give what is added and the variance that is left when that is taken off, by bins.

        Parameters
        ----------
        dy, dx : float32, pixels
            Broadcast against (ny, nx).
        """
        added, variance = np.zeros((2, *self.added.shape[2:]), dtype=np.float32)
        for axis, distance in enumerate((dy, dx)):
            here, even, noise = (image[0, axis].copy() for image in (self.added, self.even, self.noise))
            for k, (near, far) in enumerate(itertools.pairwise(RESPONSE_DISTANCES)):
                share = np.clip((np.abs(distance) - near) / np.float32(far - near), 0, 1)
                here += share * (self.added[k + 1, axis] - self.added[k, axis])
                even += share * (self.even[k + 1, axis] - self.even[k, axis])
                noise += share * (self.noise[k + 1, axis] - self.noise[k, axis])
            even *= distance
            added += distance * (here + even)
            variance += distance**2 * (noise + np.float32(self.share**2) * (here**2 + even**2))
        return added, variance


def measure_response(
    scene: Floats,
    terms: Floats,
    noise: tuple[float, float],
    *,
    share: float,
    kernel: Callable[[Floats], Floats],
    spread: Callable[[Floats], Floats],
) -> Response:
    """Put moved scenes, with noise, through a kernel.

    Half the difference of forth and back is odd in the motion, half their sum, beyond what stars that stand
    still give, even; for the smallest motion only the mean of that over the CCD is told, and shared out among
    the bins as that of the next. Stars that move also are noise to a median: how much more its values scatter
    between images of noise, over the whole CCD, is shared out among the bins by their slopes.

    Parameters
    ----------
    scene : (rows, columns) float32, electron s-1
    terms : (5, rows, columns) float32
    noise : (float, float)
        a and b of the noise law.
    share : float
        Error of what is added, as a share of it.
    kernel : function
        Of an image; gives (ny, nx).
    spread : function
        Of variances of pixels; gives those of bins, roughly.
    """
    variance = np.maximum(np.nan_to_num(scene), 0)
    variance *= np.float32(noise[0])
    variance += np.float32(noise[1])
    random = np.random.default_rng(0)
    other = np.empty_like(scene)  # workers are short of memory here
    still: list[Floats] = []
    forth: list[Floats] = []
    back: list[Floats] = []
    moves = [(distance, axis) for distance in RESPONSE_DISTANCES for axis in (0, 1)]
    for _ in range(RESPONSE_NOISE):
        image = random.standard_normal(scene.shape, dtype=np.float32)
        image *= np.sqrt(variance, out=other)
        image += scene
        still.append(kernel(image))
        for distance, axis in moves:
            for side, found in ((1, forth), (-1, back)):
                np.multiply(terms[axis], np.float32(side * distance), out=other)
                other += np.float32(distance**2) * terms[2 + 2 * axis]
                other += image
                found.append(kernel(other))
    shape = still[0].shape
    both = np.array([forth, back]).reshape(2, RESPONSE_NOISE, len(moves), *shape)
    quiet = np.nanmean(np.var(still, axis=0, ddof=1))
    more = np.nanmean(both.var(axis=1, ddof=1), axis=(0, 2, 3)) - quiet
    added = (both[0] - both[1]).mean(axis=0) / 2
    even = both.mean(axis=(0, 1)) - np.mean(still, axis=0)
    scatter = np.empty_like(added)
    for k, (distance, axis) in enumerate(moves):
        square = np.square(np.float32(distance) * terms[axis])
        of_bins = spread(square * variance / (square + variance))  # beyond its noise, more is the same
        typical = max(float(np.nanmean(of_bins)), 1e-12)
        scatter[k] = of_bins * max(float(more[k]), 0) / typical / distance**2
        added[k] /= distance
        even[k] /= distance**2
    least, less = even[:2], even[2:4]
    with np.errstate(invalid="ignore", divide="ignore"):  # nothing where no star moves a bin
        ratio = np.nanmean(least, axis=(1, 2)) / np.nanmean(less, axis=(1, 2))
    least[...] = less * np.clip(ratio, 0, 1)[:, None, None]
    parts = len(RESPONSE_DISTANCES), 2, *shape
    added, even, scatter = (np.nan_to_num(image).reshape(parts) for image in (added, even, scatter))
    return Response(added, even, scatter, share)


def refine_terms(residual: Floats, moved: Floats, terms: Floats, variance: Floats) -> None:
    """Correct the terms of a part of a scene by what frames that stand apart show there, in place.

    Ridge regression of each pixel's residuals on the motions; the prior are the spline's terms with errors of
    TERM_ERRORS of the slope and curvature there.

    Parameters
    ----------
    residual : (n, rows, columns) float32, electron s-1
        Frames minus scene minus expansion; NaN is left out.
    moved : (n, 2) float32
        dy and dx of the frames in pixels, here.
    terms : (5, rows, columns) float32
        Changed.
    variance : (rows, columns) float32
        Noise of a frame.
    """
    size = np.maximum(np.abs(terms[2]) + np.abs(terms[4]), np.hypot(terms[0], terms[1])) + np.float32(1e-3)
    rest = np.nan_to_num(residual, nan=0.0)
    # Cosmic rays and the like do not tell of slopes.
    limit = 5 * (np.sqrt(variance) + TERM_ERRORS[0] * size * np.hypot(*moved.T).max())
    rest[np.abs(rest) > limit] = 0
    dy, dx = moved.T
    design = np.stack([dy, dx, dy * dy, dy * dx, dx * dx], axis=1) * TERM_ERRORS
    u, s, v = np.linalg.svd(design.astype(np.float64), full_matrices=False)
    along = (u.T.astype(np.float32) @ rest.reshape(len(rest), -1)).reshape(-1, *size.shape)
    s = s.astype(np.float32)[:, None, None]
    along *= s / (s * s + variance / size**2)
    change = v.T.astype(np.float32) @ along.reshape(len(along), -1)
    terms += TERM_ERRORS[:, None, None] * change.reshape(terms.shape)
