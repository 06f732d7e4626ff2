"""The static sky below the scattered light, and the masks of pixels that cannot show the light.

The scene is a robust mean of the darkest frames: stars, zodiacal light and whatever light never goes away.
The scattered light of a frame is what the frame has above it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from tessbkg.ccd import STRAP_COLUMNS
from tessbkg.reduce import plan_reduction, reduce_frame

Floats = npt.NDArray[np.float32]

LIGHT_BIN: Final = 32
"""Side of the bins on which the light in dark frames is measured before they are combined."""

STRIP_ROWS: Final = 128
"""Rows combined at once, which bounds memory."""

CLIP_SIGMA: Final = 4.0


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
        Mask columns over straps, which are 1-2 % brighter.
    strap_dilation : int
        Columns by which the strap mask grows; the neighbours are 0.7 % brighter.
    """

    star_level: float = 100.0
    star_gradient: float = 60.0
    star_dilation: int = 1
    saturation: float = 4e4
    bleed: int = 8
    straps: bool = True
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
    """

    flux: Floats
    error: Floats
    mask: npt.NDArray[np.uint8]
    noise: tuple[float, float]
    dark_frames: tuple[str, ...] = ()


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
    down to the mean of their darkest quarter. Then every pixel is the mean over frames of what lies
    within four sigmas of the median.

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
    if len(dark) > 1:
        _remove_light(dark)
    flux, error = _combine(dark, noise)
    mask = make_mask(flux, options or MaskOptions(), first_column=first_column)
    return Scene(flux, error, mask, noise, dark_frames)


def _strips(rows: int) -> list[slice]:
    return [slice(first, min(first + STRIP_ROWS, rows)) for first in range(0, rows, STRIP_ROWS)]


def _remove_light(dark: Floats) -> None:
    """Take the smooth light of each dark frame away, down to that of their darkest quarter."""
    reference = np.empty(dark.shape[1:], dtype=np.float32)
    for rows in _strips(dark.shape[1]):
        reference[rows] = np.nanmedian(dark[:, rows], axis=0)
    size = min(LIGHT_BIN, *reference.shape)
    sky = ndimage.median_filter(reference[::4, ::4], size=9)
    bright = (
        reference
        > np.kron(sky, np.ones((4, 4), dtype=np.float32))[: reference.shape[0], : reference.shape[1]] + 100
    )
    plan = plan_reduction(reference, bright, bin=size, statistic="median")
    light = np.stack([ndimage.gaussian_filter(reduce_frame(frame, plan)[0], 1.0) for frame in dark])
    order = np.argsort(np.nanmean(light, axis=(1, 2)))
    light -= light[order[: max(len(dark) // 4, 1)]].mean(axis=0)
    rows, columns = (
        np.clip((np.arange(n) + 0.5) / size - 0.5, 0, m - 1)
        for n, m in zip(reference.shape, light.shape[1:], strict=True)
    )
    for frame, image in zip(dark, light, strict=True):
        if np.isfinite(image).all():
            frame -= _bilinear(image, rows, columns)


def _bilinear(image: Floats, rows: npt.NDArray[np.float64], columns: npt.NDArray[np.float64]) -> Floats:
    """Interpolate an image on the grid of fractional `rows` and `columns`."""

    def along(values: Floats, position: npt.NDArray[np.float64]) -> Floats:
        low = np.minimum(position.astype(np.intp), max(len(values) - 2, 0))
        high = np.minimum(low + 1, len(values) - 1)
        share = (position - low).astype(np.float32)[:, None]
        return values[low] * (1 - share) + values[high] * share

    return along(along(image, rows).T, columns).T


def _combine(dark: Floats, noise: tuple[float, float]) -> tuple[Floats, Floats]:
    """Clipped mean over frames and its standard error."""
    flux = np.empty(dark.shape[1:], dtype=np.float32)
    error = np.empty_like(flux)
    n = len(dark)
    for rows in _strips(dark.shape[1]):
        values = np.sort(dark[:, rows], axis=0)  # NaN last
        count = np.isfinite(values).sum(axis=0)
        last = np.maximum(count - 1, 0)[None]
        quartile = [np.take_along_axis(values, k * last // 4, axis=0)[0] for k in (1, 2, 3)]
        middle = (quartile[1] + np.take_along_axis(values, (last + 1) // 2, axis=0)[0]) / 2
        sigma = np.sqrt(noise[0] * np.maximum(middle, 0) + noise[1])
        # Stars that move a little scatter more than the noise: the quartiles say how much.
        sigma = np.maximum(sigma, (quartile[2] - quartile[0]) / 1.349 if n > 3 else 0)
        with np.errstate(invalid="ignore"):
            kept = np.abs(values - middle) <= CLIP_SIGMA * sigma
        number = kept.sum(axis=0)
        total = np.where(kept, values, 0).sum(axis=0, dtype=np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            flux[rows] = total / number
            error[rows] = sigma / np.sqrt(number)
    return flux, error


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
    filled = np.where(bad, np.nanmedian(flux) if not bad.all() else 0, flux).astype(np.float32)
    star = filled - local_sky(filled) > options.star_level
    gradient = np.hypot(*np.gradient(filled)) if min(flux.shape) > 1 else np.zeros_like(filled)
    star |= gradient > options.star_gradient
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
        grown = STRAP_COLUMNS[:, None] + np.arange(-options.strap_dilation, options.strap_dilation + 1)
        columns = np.unique(grown) - first_column
        mask[:, columns[(columns >= 0) & (columns < flux.shape[1])]] |= np.uint8(Mask.STRAP)
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
