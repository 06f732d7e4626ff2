"""Medians of overlapping windows: the kernel of the statistic `rolling`.

An image is halved again and again by medians of 4 x 4 windows that stand two pixels apart, one pixel beyond
each edge; masked pixels do not count. Windows share sorted 2 x 2 and 4 x 2 blocks, which networks of minima
and maxima merge, many at once, on flat arrays: what they make of the ends of rows is not used.

A masked pixel is infinite for the network, half of each block's negative, so that the eighth and the ninth of
sixteen still are the middles of the others. Which are which never changes; the few windows where it does not
come out, and those with pixels lost in one frame only, are sorted one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]

CHUNK: Final = 32768
"""Windows that are ordered at once: they stay in the processor's cache."""


@dataclass(frozen=True, eq=False)
class Halving:
    """What is static of one halving.

    Parameters
    ----------
    shape : tuple of (int, int)
        Rows and columns of the image with one pixel more on each side; both even.
    missing : (n,) int
        Flat indices in it of pixels that do not count.
    infinite : (n,) float32
        What stands there.
    lower, upper : (windows along rows, windows along columns + 1) bool
        Where the eighth (the ninth) of the sixteen alone is the median; elsewhere it is their mean.
    single : (m,) int
        Flat indices, as in `lower`, of windows that are sorted one by one.
    """

    shape: tuple[int, int]
    missing: npt.NDArray[np.intp]
    infinite: Floats
    lower: Bools
    upper: Bools
    single: npt.NDArray[np.intp]


def prepare_rolling(valid: Bools, size: int) -> list[Halving]:
    """Prepare the kernel.

    Parameters
    ----------
    valid : (rows, columns) bool
        Pixels that count, of whole bins only.
    size : int
        Pixels along the side of a bin: a power of two.
    """
    halvings = []
    for _ in range(size.bit_length() - 1):
        there = np.pad(valid, 1)
        halvings.append(_prepare(there))
        valid = overlapping(valid) > 0
    return halvings


def _prepare(there: Bools) -> Halving:
    rows, columns = there.shape
    quads = there.reshape(rows // 2, 2, columns // 2, 2).transpose(0, 2, 1, 3).reshape(-1, 4)
    gone = 4 - quads.sum(axis=1)
    parity = np.add.outer(np.arange(rows // 2), np.arange(columns // 2)).ravel() % 2
    negative = (gone + parity) // 2
    # The first ones of a block are negative.
    order = np.cumsum(~quads, axis=1)
    sign = np.where(order <= negative[:, None], np.float32(-np.inf), np.float32(np.inf))
    sign = sign.reshape(rows // 2, columns // 2, 2, 2).transpose(0, 2, 1, 3).reshape(rows, columns)
    missing = np.flatnonzero(~there)
    more = (gone - 2 * negative).reshape(rows // 2, columns // 2)
    balance, lost = (
        a[:-1, :-1] + a[:-1, 1:] + a[1:, :-1] + a[1:, 1:] for a in (more, gone.reshape(more.shape))
    )
    lower, upper, single = (
        np.pad(which, [(0, 0), (0, 1)])
        for which in (balance == 1, balance == -1, (np.abs(balance) > 1) | (lost == 16))
    )
    return Halving((rows, columns), missing, sign.reshape(-1)[missing], lower, upper, np.flatnonzero(single))


def reduce_rolling(image: Floats, halvings: list[Halving]) -> Floats:
    """Halve an image again and again.

    Parameters
    ----------
    image : (rows, columns) float32
        Of whole bins; NaN where a pixel is lost in this image. Pixels that never count may be anything.
    halvings : list of Halving

    Returns
    -------
    (ny, nx) float32
        NaN where no pixel counts.
    """
    for halving in halvings:
        padded = np.empty(halving.shape, dtype=np.float32)
        padded[1:-1, 1:-1] = image
        padded.reshape(-1)[halving.missing] = halving.infinite
        image = _halve(padded, halving)
    return image


def _halve(padded: Floats, halving: Halving) -> Floats:
    rows, width = halving.lower.shape
    half = np.empty((rows, width), dtype=np.float32)
    step = max(CHUNK // width, 1)
    for first in range(0, rows, step):
        chunk = slice(first, min(first + step, rows))
        low, high = _middles(padded[2 * chunk.start : 2 * chunk.stop + 2])
        with np.errstate(invalid="ignore"):  # of windows that are sorted one by one
            np.add(low, high, out=half[chunk])
        half[chunk] *= np.float32(0.5)
        np.copyto(half[chunk], low, where=halving.lower[chunk])
        np.copyto(half[chunk], high, where=halving.upper[chunk])
    flat = half.reshape(-1)
    flat[halving.single] = np.nan
    half[:, -1] = 0
    single = np.flatnonzero(np.isnan(flat))
    row, column = np.divmod(single, width)
    at = 2 * (row * padded.shape[1] + column)
    offsets = np.add.outer(np.arange(4) * padded.shape[1], np.arange(4)).reshape(16, 1)
    flat[single] = _medians(padded.reshape(-1)[at + offsets])
    return half[:, :-1]


def _middles(padded: Floats) -> tuple[Floats, Floats]:
    """Give the eighth and the ninth of the 16 pixels of each window; the last column is of no window."""
    width = padded.shape[1] // 2
    quad = _sort4(*(padded[r::2, c::2].ravel() for r in (0, 1) for c in (0, 1)))
    pair = _merge4([q[:-1] for q in quad], [q[1:] for q in quad])
    upper, lower = [p[:-width] for p in pair], [p[width:] for p in pair]
    both = np.zeros((2, padded.shape[0] // 2 - 1, width), dtype=np.float32)
    low, high = (side.reshape(-1)[:-1] for side in both)
    np.minimum(upper[0], lower[7], out=low)
    np.maximum(upper[0], lower[7], out=high)
    for k in range(1, 8):  # the eight lowest and the eight highest of both: bitonic halves
        np.maximum(low, np.minimum(upper[k], lower[7 - k]), out=low)
        np.minimum(high, np.maximum(upper[k], lower[7 - k]), out=high)
    return both[0], both[1]


def _medians(values: Floats) -> Floats:
    """Medians of the finite values along the first axis, which is 16 long; NaN where there are none."""
    missing = ~np.isfinite(values)
    count = 16 - np.count_nonzero(missing, axis=0)
    values[missing] = np.inf
    values.sort(axis=0)
    column = np.arange(values.shape[1])
    low, high = np.maximum(count - 1, 0) // 2, count // 2
    middle: Floats = (values[low, column] + values[np.minimum(high, 15), column]) / 2
    middle[count == 0] = np.nan
    return middle


def _sort4(a: Floats, b: Floats, c: Floats, d: Floats) -> list[Floats]:
    """Four images in order, pixel by pixel."""
    a, b = np.minimum(a, b), np.maximum(a, b)
    c, d = np.minimum(c, d), np.maximum(c, d)
    lowest, second = np.minimum(a, c), np.maximum(a, c)
    third, highest = np.minimum(b, d), np.maximum(b, d)
    return [lowest, np.minimum(second, third), np.maximum(second, third), highest]


def _merge4(a: list[Floats], b: list[Floats]) -> list[Floats]:
    """Two lists of four images in order merged into one of eight."""
    low = [np.minimum(a[k], b[3 - k]) for k in range(4)]
    high = [np.maximum(a[k], b[3 - k]) for k in range(4)]
    return _merge_bitonic(low) + _merge_bitonic(high)


def _merge_bitonic(four: list[Floats]) -> list[Floats]:
    """Order four images that rise and then fall, or are a rotation of such, pixel by pixel."""
    p, q = np.minimum(four[0], four[2]), np.maximum(four[0], four[2])
    r, s = np.minimum(four[1], four[3]), np.maximum(four[1], four[3])
    return [np.minimum(p, r), np.maximum(p, r), np.minimum(q, s), np.maximum(q, s)]


def overlapping(image: npt.NDArray[np.generic]) -> npt.NDArray[np.float64]:
    """Sum over the windows of one halving."""
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(image, 1), (4, 4))[::2, ::2]
    return np.asarray(windows.sum(axis=(2, 3), dtype=np.float64))


def rolling_factor(valid: Bools, halvings: list[Halving]) -> Floats:
    """Give the standard error of `rolling`: shape from counts, scale from noise put through the kernel.

    A bin's value draws on windows that reach beyond it, so the pixels that matter are counted with the
    same overlapping windows; one number then scales their inverse root to the spread that eight images of
    pure noise show over all bins, which holds it to half a per cent on a full CCD.
    """
    weight = valid.astype(np.float64)
    for _ in halvings:
        weight = overlapping(weight) / 16
    n = np.where(weight > 0, weight * 4 ** len(halvings), np.nan)
    random = np.random.default_rng(0)
    images = (random.standard_normal(valid.shape, dtype=np.float32) for _ in range(8))
    spread = np.mean([np.nanmean(np.square(reduce_rolling(image, halvings)) * n) for image in images])
    return np.asarray(np.sqrt(spread / n), dtype=np.float32)
