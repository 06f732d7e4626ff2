"""The static sky below the scattered light, and the masks of pixels that cannot show the light.

The scene is a robust mean of the darkest frames: stars, zodiacal light and whatever light never goes away.
The scattered light of a frame is what the frame has above it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntFlag
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from tessbkg.ccd import STRAP_COLUMNS
from tessbkg.geometry import round_bits
from tessbkg.motion import (
    bins_of,
    displacement,
    distance_of,
    expand,
    expansion_error,
    place,
    prepare_motion,
    refine_terms,
    scene_terms,
)
from tessbkg.reduce import plan_reduction, reduce_frame

Floats = npt.NDArray[np.float32]

LIGHT_BIN: Final = 32
"""Side of the bins on which the light in dark frames is measured before they are combined."""

STRIP_ROWS: Final = 128
"""Rows combined at once, which bounds memory."""

CLIP_SIGMA: Final = 4.0

EXCESS_SIGMA: Final = 4.0
"""Scatter between dark frames counts as more than noise from this many sigmas on."""

SAME_LEVEL: Final = 0.01
"""Dark frames as dark as the darkest to within this, electron s-1, together are the zero of the light."""

MUCH_LIGHT: Final = 2.0
"""A dark frame with this much more light somewhere, electron s-1, is not used if there are three with less:
light with sharp edges does not go away on bins of 32 pixels."""

KEPT_BITS: Final = 8
"""Bits of the mantissa of terms and errors of the scene that are kept, 0.2 per cent, far less than they are
good to: a scene of full size compresses to 59 MB instead of 100, and every worker reads it."""

SCENE_SHARE: Final = 0.7
"""Error of the scene where stars moved, over that of a frame whose stars moved like those of the dark
frames."""

STRAP_REFERENCE: Final = 4
"""Columns on either side that tell the light on a strap."""

STRAP_ROWS: Final = 64
"""Rows of a block of which a strap's response is measured once."""

STEEP: Final = 20.0
"""Where the scene is steeper, electron s-1 per pixel, pixels do not tell the light of dark frames, nor the
response of straps: stars move."""

STRAP_LIGHT: Final = 1.0
"""Light, electron s-1, below which a block of rows does not tell a response."""


SPARE_SLOPE: Final = 1000.0
"""Pixels of stars where the scene is steeper, electron s-1 per pixel, never show the light."""


class Mask(IntFlag):
    """Bits of the scene's mask."""

    STAR = 1
    SATURATED = 2
    STRAP = 4
    BAD = 8


@dataclass(frozen=True)
class MaskOptions:
    """What is masked.

    Parameters
    ----------
    star_level : float
        Mask pixels whose scene is this far above the sky around them, electron s-1. The scene takes fainter
        stars away well enough.
    star_gradient : float
        Mask pixels where the scene changes by more than this from one pixel to the next, electron s-1:
        there the smallest motion of the spacecraft leaves residuals.
    star_dilation : int
        Pixels by which the star mask grows.
    saturation : float
        Mask pixels above this, electron s-1, and grow that by 3 pixels and by `bleed` along columns. Full
        wells bleed from about 1e5.
    bleed : int
        Pixels by which saturated columns grow up and down.
    straps : bool
        Mask columns over straps, which are 1-2 % brighter. Without, their response is measured in bright
        frames and divided out.
    strap_dilation : int
        Columns by which straps grow; the neighbours are 0.7 % brighter.
    """

    star_level: float = 200.0
    star_gradient: float = 120.0
    star_dilation: int = 1
    saturation: float = 4e4
    bleed: int = 8
    straps: bool = False
    strap_dilation: int = 1


@dataclass(frozen=True, eq=False)
class Scene:
    """The static sky of one CCD.

    Parameters
    ----------
    flux : (rows, columns) float32, electron s-1
    error : (rows, columns) float32, electron s-1
        One sigma of `flux`.
    mask : (rows, columns) uint8
        Bits of :class:`Mask`; 0 where a pixel is used.
    noise : tuple of (float, float)
        a and b of the noise law of a frame: variance of a pixel = a * flux + b.
    dark_frames : tuple of str
        File names of the frames it was made of.
    terms : (5, rows, columns) float32, electron s-1, optional
        What a pixel gains when the stars move (:mod:`tessbkg.motion`).
    response : (columns,) float32, optional
        Response of each column to light: over straps it is 1-2 % more than 1.
    """

    flux: Floats
    error: Floats
    mask: npt.NDArray[np.uint8]
    noise: tuple[float, float]
    dark_frames: tuple[str, ...] = ()
    terms: Floats | None = None
    response: Floats | None = None

    @property
    def spare(self) -> npt.NDArray[np.bool_] | None:
        """(rows, columns) masked pixels that show the light, if not as well: stars that are not too steep."""
        if self.terms is None:
            return None
        steep = np.hypot(self.terms[0], self.terms[1]) > SPARE_SLOPE
        return np.asarray((self.mask == Mask.STAR) & ~steep)


def fit_noise(flux: Floats, flux_err: Floats) -> tuple[float, float]:
    """Fit the noise law variance = a * flux + b to pixels and their uncertainties.

    On real FFIs UNCERT squared follows it to 1-2 % on one CCD: photon noise of the effective exposure plus
    read noise.

    Parameters
    ----------
    flux, flux_err : float32, any shape, electron s-1

    Returns
    -------
    a : float, electron s-1
    b : float, (electron s-1)^2

    Raises
    ------
    ValueError
        If fewer than 100 pixels have both values.
    """
    flux, variance = flux.ravel().astype(np.float64), np.square(flux_err.ravel(), dtype=np.float64)
    usable = np.isfinite(flux) & np.isfinite(variance) & (variance > 0) & (flux > 0) & (flux < 1e4)
    if usable.sum() < 100:
        raise ValueError(f"only {int(usable.sum())} pixels have a flux and an uncertainty")
    flux, variance = flux[usable], variance[usable]
    # Relative residuals count, so that bright pixels do not decide alone; twice without the outliers.
    for _ in range(3):
        design = np.stack([flux, np.ones_like(flux)], axis=1) / variance[:, None]
        (a, b), *_ = np.linalg.lstsq(design, np.ones(len(flux)), rcond=None)
        residual = np.abs((a * flux + b) / variance - 1)
        kept = residual <= max(5 * float(np.median(residual)), 1e-6)
        flux, variance = flux[kept], variance[kept]
    if a <= 0:  # no spread in flux: all noise is photon noise
        a, b = float(np.median(variance / flux)), 0.0
    return float(a), float(max(b, 0.0))


def make_scene(
    dark: Floats,
    noise: tuple[float, float],
    *,
    options: MaskOptions | None = None,
    first_column: int = 0,
    dark_frames: tuple[str, ...] = (),
) -> Scene:
    """Combine dark frames into the static sky and mask it.

    The smooth light that dark frames still differ by is measured on bins of 32 pixels and taken out first,
    down to that of the darkest; frames with much light are not used if there are three without. What the
    motion of the stars adds to each frame is taken out too (:mod:`tessbkg.motion`), which also shows the
    slopes of the scene. Then every pixel is the mean over frames of what lies within four sigmas of the
    median.

    Parameters
    ----------
    dark : (n, rows, columns) float32, electron s-1
        Dark frames; changed in place. NaN is left out.
    noise : tuple of (float, float)
        a and b of the noise law (:func:`fit_noise`).
    options : MaskOptions, optional
    first_column : int
        0-based science column of the first pixel (0 but for trimmed files), for the straps.
    dark_frames : tuple of str
        Names to record.

    Raises
    ------
    ValueError
        If there is no frame.
    """
    if dark.ndim != 3 or len(dark) == 0:
        raise ValueError(f"dark has shape {dark.shape}: one frame or more of (rows, columns) are needed")
    options = options or MaskOptions()
    used = _remove_light(dark, noise) if len(dark) > 1 else np.ones(1, dtype=bool)
    if len(dark_frames) == len(dark):
        dark_frames = tuple(name for name, kept in zip(dark_frames, used, strict=True) if kept)
    frames = [frame for frame, kept in zip(dark, used, strict=True) if kept]
    flux, error, terms = _combine_moving(frames, noise)
    mask = make_mask(flux, options, first_column=first_column)
    response = np.ones(flux.shape[1], dtype=np.float32)
    return Scene(flux, error, mask, noise, dark_frames, terms, response)


def with_response(
    scene: Scene, bright: Sequence[Floats], *, options: MaskOptions | None = None, first_column: int = 0
) -> Scene:
    """Give a scene the response of its columns over straps, which frames full of light show.

    Parameters
    ----------
    scene : Scene
        From :func:`make_scene`, which takes the response for 1.
    bright : sequence of (rows, columns) float32, electron s-1
        Without any, or where straps are masked, the response stays 1.
    options : MaskOptions, optional
    first_column : int
        0-based science column of the first pixel.
    """
    options = options or MaskOptions()
    if not len(bright) or options.straps or scene.terms is None:
        return scene
    columns = _strap_columns(scene.flux.shape[1], first_column, options.strap_dilation)
    steep = np.hypot(scene.terms[0], scene.terms[1]) > STEEP
    response = strap_response(bright, scene.flux, steep | (scene.mask != 0), columns)
    return replace(scene, response=response)


def _combine_moving(frames: list[Floats], noise: tuple[float, float]) -> tuple[Floats, Floats, Floats]:
    """Mean, error and terms (:mod:`tessbkg.motion`) of frames whose stars stand apart."""
    shape = frames[0].shape
    flux, error = np.empty(shape, dtype=np.float32), np.empty(shape, dtype=np.float32)
    for rows in _strips(shape[0]):
        flux[rows], error[rows] = _combine(np.stack([frame[rows] for frame in frames]), noise)
    terms = scene_terms(flux)
    if len(frames) < 3:
        return flux, error, terms
    y, x = _places(shape)
    for turn in range(2):
        tracers = prepare_motion(flux, terms, noise)
        if not tracers.pixel.size:
            break
        moved = np.array([tracers.fit(frame, np.zeros(1, dtype=np.float32), noise) for frame in frames])
        moved = (moved - moved.mean(axis=0)).astype(np.float32)
        for rows in _strips(shape[0]):
            strip = np.stack(
                [
                    frame[rows] - expand(motion, terms[:, rows], y[rows], x)
                    for frame, motion in zip(frames, moved, strict=True)
                ]
            )
            if turn:
                flux[rows] = _middle(np.sort(strip, axis=0))
                strip += _refine(
                    strip - flux[rows], moved, terms[:, rows], flux=flux[rows], noise=noise, y=y[rows], x=x
                )
            flux[rows], error[rows] = _combine(strip, noise)
        if not turn:
            del terms
            terms = scene_terms(flux)
        else:
            typical = float(np.sqrt(np.mean([distance_of(motion) ** 2 for motion in moved])))
            error = np.hypot(
                error, np.float32(SCENE_SHARE * expansion_error(typical)) * np.hypot(terms[0], terms[1])
            )
    for image in (error, *terms):
        round_bits(image, KEPT_BITS)
    return flux, error, terms


def _refine(
    residual: Floats,
    moved: Floats,
    terms: Floats,
    *,
    flux: Floats,
    noise: tuple[float, float],
    y: Floats,
    x: Floats,
) -> Floats:
    """Refine the terms of a strip, in place, block by block; what that takes off the frames."""
    change = np.empty_like(residual)
    for first in range(0, flux.shape[1], STRIP_ROWS):
        block = np.s_[:, first : first + STRIP_ROWS]
        every = np.s_[:, *block]
        here = np.array([displacement(m, y.mean(), x[block[1]].mean()) for m in moved], dtype=np.float32)
        before = terms[every].copy()
        variance = noise[0] * np.maximum(flux[block], 0) + noise[1]
        refine_terms(residual[every], here, terms[every], np.asarray(variance, dtype=np.float32))
        before -= terms[every]
        for target, motion in zip(change, moved, strict=True):
            target[block] = expand(motion, before, y, x[block[1]])
    return change


def _places(shape: tuple[int, ...]) -> tuple[Floats, Floats]:
    """Places of the rows and of the columns of an image, from -1 to 1."""
    return place(np.arange(shape[0]), shape[0])[:, None], place(np.arange(shape[1]), shape[1])


def _strips(rows: int) -> list[slice]:
    return [slice(first, min(first + STRIP_ROWS, rows)) for first in range(0, rows, STRIP_ROWS)]


def _light_maps(dark: Floats, noise: tuple[float, float], size: int) -> Floats:
    """Measure the smooth light of each dark frame, in bins of `size` pixels."""
    reference = np.empty(dark.shape[1:], dtype=np.float32)
    for rows in _strips(dark.shape[1]):
        reference[rows] = _middle(np.sort(dark[:, rows], axis=0))
    terms = scene_terms(reference)
    steep = np.hypot(terms[0], terms[1]) > STEEP
    # Not the median: pixels whose reference is the frame's own would hold it at zero.
    still = np.broadcast_to(np.float32(0), terms.shape)
    plan = plan_reduction(reference, steep, bin=size, statistic="clipped", terms=still)
    tracers = prepare_motion(reference, terms, noise)
    y, x = _places(reference.shape)
    at = bins_of(tracers.pixel, dark.shape[2], size, plan.shape)
    unmoved, maps = np.empty_like(reference), []
    for frame in dark:
        light = reduce_frame(frame, plan)[0]
        motion = tracers.fit(frame, light.reshape(-1)[at], noise)
        if motion.any():
            for rows in _strips(len(reference)):
                np.subtract(frame[rows], expand(motion, terms[:, rows], y[rows], x), out=unmoved[rows])
            light = reduce_frame(unmoved, plan)[0]
        maps.append(ndimage.gaussian_filter(light, 1.0))
    return np.stack(maps).astype(np.float32)


def _remove_light(dark: Floats, noise: tuple[float, float]) -> npt.NDArray[np.bool_]:
    """Take the smooth light of each dark frame away, down to that of the darkest; which frames to use."""
    size = min(LIGHT_BIN, *dark.shape[1:])
    light = _light_maps(dark, noise, size)
    usable = np.asarray(np.isfinite(light).all(axis=(1, 2)))
    if not usable.any():
        return np.ones(len(dark), dtype=bool)
    level = np.where(usable, light.mean(axis=(1, 2)), np.inf)
    light -= light[level <= level.min() + SAME_LEVEL].mean(axis=0)
    rows, columns = (
        np.clip((np.arange(n) + 0.5) / size - 0.5, 0, m - 1)
        for n, m in zip(dark.shape[1:], light.shape[1:], strict=True)
    )
    for i in np.flatnonzero(usable):
        dark[i] -= _bilinear(light[i], rows, columns)
    clean = usable & (np.percentile(np.abs(light), 99, axis=(1, 2)) < MUCH_LIGHT)
    return np.asarray(clean if clean.sum() >= 3 else usable)


def strap_response(
    bright: Sequence[Floats], flux: Floats, masked: npt.NDArray[np.bool_], columns: npt.NDArray[np.intp]
) -> Floats:
    """Measure how much more light columns over straps show than their neighbours.

    Parameters
    ----------
    bright : sequence of (rows, columns) float32, electron s-1
        Frames with light.
    flux : (rows, columns) float32, electron s-1
        The scene.
    masked : (rows, columns) bool
    columns : (k,) int
        Columns over straps and those next to them.

    Returns
    -------
    (columns,) float32
        Response to light, 1 for all but `columns`: the median over blocks of rows of the light over that
        interpolated, row by row, between the nearest STRAP_REFERENCE columns to the left and the right.
    """
    n_columns = flux.shape[1]
    response = np.ones(n_columns, dtype=np.float32)
    special = np.zeros(n_columns, dtype=bool)
    special[columns] = True
    plain = np.flatnonzero(~special)
    if plain.size < 2 * STRAP_REFERENCE or not columns.size:
        return response
    blocks = max(flux.shape[0] // STRAP_ROWS, 1)
    rows = flux.shape[0] // blocks * blocks
    for column in columns:
        at = np.searchsorted(plain, column)
        left, right = plain[max(at - STRAP_REFERENCE, 0) : at], plain[at : at + STRAP_REFERENCE]
        if not len(left) or not len(right):
            continue
        over, level = [], []
        for frame in bright:
            near = [_light(frame, flux, masked, side, rows) for side in (left, right)]
            here, _ = _light(frame, flux, masked, np.array([column]), rows)
            (low, low_at), (high, high_at) = near
            with np.errstate(invalid="ignore", divide="ignore"):
                between = low + (high - low) * (column - low_at) / (high_at - low_at)
            good = np.isfinite(here) & np.isfinite(between)
            over.append(np.where(good, here, 0).reshape(blocks, -1).sum(axis=1))
            level.append(np.where(good, between, 0).reshape(blocks, -1).sum(axis=1))
        bright_enough = np.concatenate(level) > STRAP_LIGHT * (rows // blocks)
        if bright_enough.sum() >= 4:
            ratio = np.concatenate(over)[bright_enough] / np.concatenate(level)[bright_enough]
            response[column] = np.median(ratio)
    return response


def _light(
    frame: Floats, flux: Floats, masked: npt.NDArray[np.bool_], columns: npt.NDArray[np.intp], rows: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Mean light of every row's unmasked pixels in some columns, and their mean column; NaN if none."""
    light = frame[:rows, columns] - flux[:rows, columns]
    good = ~masked[:rows, columns] & np.isfinite(light)
    number = good.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        place_of = (good * columns).sum(axis=1) / number
        return np.asarray(np.where(good, light, 0).sum(axis=1) / number), np.asarray(place_of)


def _strap_columns(n: int, first_column: int, dilation: int) -> npt.NDArray[np.intp]:
    """Columns over straps, grown, among `n` from a 0-based science column on."""
    columns = np.unique(STRAP_COLUMNS[:, None] + np.arange(-dilation, dilation + 1)) - first_column
    return np.asarray(columns[(columns >= 0) & (columns < n)])


def _bilinear(image: Floats, rows: npt.NDArray[np.float64], columns: npt.NDArray[np.float64]) -> Floats:
    """Interpolate an image on the grid of fractional `rows` and `columns`."""

    def along(values: Floats, position: npt.NDArray[np.float64]) -> Floats:
        low = np.minimum(position.astype(np.intp), max(len(values) - 2, 0))
        high = np.minimum(low + 1, len(values) - 1)
        share = (position - low).astype(np.float32)[:, None]
        between, upper = values[low], values[high]
        between *= 1 - share
        upper *= share
        between += upper
        return between

    return along(along(image, rows).T, columns).T


def _middle(ordered: Floats) -> Floats:
    """Median along the first axis of what is sorted along it, NaN last; NaN where all are."""
    last = np.maximum(np.isfinite(ordered).sum(axis=0) - 1, 0)[None]
    low, high = (np.take_along_axis(ordered, k // 2, axis=0)[0] for k in (last, last + 1))
    return np.asarray((low + high) / 2, dtype=np.float32)


def _combine(frames: Floats, noise: tuple[float, float]) -> tuple[Floats, Floats]:
    """Clipped mean over frames and its standard error, by the noise or by the scatter if larger."""
    values = np.sort(frames, axis=0)  # NaN last
    n = len(values)
    last = np.maximum(np.isfinite(values).sum(axis=0) - 1, 0)[None]
    low, high = (np.take_along_axis(values, k * last // 4, axis=0)[0] for k in (1, 3))
    middle = _middle(values)
    sigma = np.sqrt(noise[0] * np.maximum(middle, 0) + noise[1])
    # Stars that vary, or whose motion is not told well, scatter more than the noise.
    wide = np.maximum(sigma, (high - low) / 1.349 if n > 3 else 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        kept = np.abs(values - middle) <= CLIP_SIGMA * wide
        number = kept.sum(axis=0)
        flux = np.where(kept, values, 0).sum(axis=0, dtype=np.float64) / number
        square = np.where(kept, values - middle, 0)
        scatter = np.square(square, out=square).sum(axis=0) / np.maximum(number - 1, 1)
        excess = scatter > sigma**2 * (1 + EXCESS_SIGMA * np.sqrt(2 / np.maximum(number - 1, 1)))
        variance = np.where(excess, scatter, sigma**2) / number
    return flux.astype(np.float32), np.sqrt(variance).astype(np.float32)


def make_mask(flux: Floats, options: MaskOptions, *, first_column: int = 0) -> npt.NDArray[np.uint8]:
    """Mask stars, saturated columns, straps and bad pixels of a scene.

    Parameters
    ----------
    flux : (rows, columns) float32, electron s-1
    options : MaskOptions
    first_column : int
        0-based science column of the first pixel.

    Returns
    -------
    (rows, columns) uint8
        Bits of :class:`Mask`.
    """
    bad = ~np.isfinite(flux) | (flux == 0)
    filled = flux
    if bad.any():
        filled = np.where(bad, np.float32(0 if bad.all() else np.median(flux[~bad])), flux)
    star = filled - local_sky(filled) > options.star_level
    if min(flux.shape) > 1:
        steep = np.square(np.gradient(filled, axis=0))
        steep += np.square(np.gradient(filled, axis=1))
        star |= steep > options.star_gradient**2
    if options.star_dilation:
        star = ndimage.binary_dilation(star, ndimage.generate_binary_structure(2, 2), options.star_dilation)
    saturated = filled > options.saturation
    saturated = ndimage.binary_dilation(saturated, np.ones((7, 7), dtype=bool))
    saturated = ndimage.binary_dilation(saturated, np.ones((2 * options.bleed + 1, 1), dtype=bool))
    mask = np.zeros(flux.shape, dtype=np.uint8)
    mask[star] |= np.uint8(Mask.STAR)
    mask[saturated] |= np.uint8(Mask.SATURATED)
    mask[bad] |= np.uint8(Mask.BAD)
    if options.straps:
        columns = _strap_columns(flux.shape[1], first_column, options.strap_dilation)
        mask[:, columns] |= np.uint8(Mask.STRAP)
    return mask


def local_sky(flux: Floats, size: int = 32) -> Floats:
    """Sky around each pixel: lower-half medians of blocks, interpolated."""
    size = min(size, *flux.shape)
    ny, nx = (n // size for n in flux.shape)
    blocks = flux[: ny * size, : nx * size].reshape(ny, size, nx, size).transpose(0, 2, 1, 3)
    sky = np.percentile(blocks.reshape(ny, nx, -1), 30, axis=2).astype(np.float32)
    sky = ndimage.median_filter(sky, size=3, mode="nearest")
    rows, columns = (
        np.clip((np.arange(n) + 0.5) / size - 0.5, 0, m - 1)
        for n, m in zip(flux.shape, sky.shape, strict=True)
    )
    return _bilinear(sky, rows, columns)
