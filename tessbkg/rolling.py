"""Medians of overlapping windows: the kernel of the statistic `rolling`.

An image is halved again and again by medians of 4 x 4 windows that stand two pixels apart, one pixel beyond
each edge; masked pixels do not count. :func:`tessbkg.compiled.middle_of_windows` orders all pixels of all
windows.

A masked pixel is infinite for it, half of each block's negative, so that the eighth and the ninth of sixteen
still are the middles of the others. Which are which never changes; the few windows where it does not come
out, and those with pixels lost in one frame only, are sorted one by one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]


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
    side : (windows along rows, windows along columns) int8
        Negative where the eighth of the sixteen alone is the median, positive where the ninth is, 0 for the
        mean of both.
    single : (m,) int
        Flat indices of windows that are sorted one by one.
    """

    shape: tuple[int, int]
    missing: npt.NDArray[np.intp]
    infinite: Floats
    side: npt.NDArray[np.int8]
    single: npt.NDArray[np.intp]


def prepare_rolling(scene: Floats, valid: Bools, size: int) -> tuple[Floats, list[Halving]]:
    """Prepare the kernel.

    Parameters
    ----------
    scene : (rows, columns) float32
    valid : (rows, columns) bool
        Pixels that count.
    size : int
        Pixels along the side of a bin: a power of two, at least 2.

    Returns
    -------
    subtract : (rows, columns) float32
        The scene; infinite where pixels do not count, as the first halving wants them.
    halvings : list of Halving
        The first without what `subtract` has.
    """
    ny, nx = (n // size for n in valid.shape)
    valid = valid[: ny * size, : nx * size]
    rows, columns = valid.shape
    halvings = []
    for _ in range(size.bit_length() - 1):
        there = np.pad(valid, 1)
        halvings.append(_prepare(there))
        valid = overlapping(valid) > 0
    first = halvings[0]
    row, column = (axis - 1 for axis in np.divmod(first.missing, first.shape[1]))
    inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
    subtract = scene.copy()
    subtract[row[inside], column[inside]] = -first.infinite[inside]
    halvings[0] = replace(first, missing=first.missing[~inside], infinite=first.infinite[~inside])
    return subtract, halvings


def _prepare(there: Bools) -> Halving:
    rows, columns = there.shape
    quads = there.reshape(rows // 2, 2, columns // 2, 2).transpose(0, 2, 1, 3).reshape(-1, 4)
    gone = 4 - quads.sum(axis=1, dtype=np.int8)
    parity = (np.add.outer(np.arange(rows // 2), np.arange(columns // 2)).ravel() % 2).astype(np.int8)
    negative = (gone + parity) // 2
    # The first ones of a block are negative.
    order = np.cumsum(~quads, axis=1, dtype=np.int8)
    sign = np.where(order <= negative[:, None], np.float32(-np.inf), np.float32(np.inf))
    sign = sign.reshape(rows // 2, columns // 2, 2, 2).transpose(0, 2, 1, 3).reshape(rows, columns)
    missing = np.flatnonzero(~there)
    more = (gone - 2 * negative).reshape(rows // 2, columns // 2)
    # 0 where no pixel counts: the mean of two infinities, NaN.
    balance = more[:-1, :-1] + more[:-1, 1:] + more[1:, :-1] + more[1:, 1:]
    side = np.clip(-balance, -1, 1).astype(np.int8)
    single = np.flatnonzero(np.abs(balance) > 1)
    return Halving((rows, columns), missing, sign.reshape(-1)[missing], side, single)


def reduce_rolling(
    flux: Floats, subtract: Floats, gain: Floats, halvings: list[Halving]
) -> tuple[Floats, Floats]:
    """Subtract a scene from a frame, and halve what is left again and again.

    Parameters
    ----------
    flux : (rows, columns) float32
        NaN where a pixel is lost in this frame; pixels that never count may be anything.
    subtract : (rows, columns) float32
        From :func:`prepare_rolling`.
    gain : (columns,) float32
        What pixels of each column are multiplied by.
    halvings : list of Halving

    Returns
    -------
    value : (ny, nx) float32
        NaN where no pixel counts.
    mean : (ny, nx) float32
        Mean over each bin of what the first halving gives.
    """
    from tessbkg.compiled import mean_of_blocks, middle_of_windows, subtract_pixels  # noqa: PLC0415 (slow)

    image, any_lost = np.empty((0, 0), dtype=np.float32), False
    mean = np.empty(halvings[-1].side.shape, dtype=np.float32)
    for halving in halvings:
        padded = np.empty(halving.shape, dtype=np.float32)
        if halving is halvings[0]:
            any_lost = subtract_pixels(flux, subtract, gain, padded[1:-1, 1:-1])
        else:
            padded[1:-1, 1:-1] = image
        flat = padded.reshape(-1)
        flat[halving.missing] = halving.infinite
        if any_lost:
            lost = np.flatnonzero(np.isnan(flat))
            flat[lost] = np.inf
        image = np.empty(halving.side.shape, dtype=np.float32)
        middle_of_windows(padded, halving.side, image)
        single = halving.single
        if any_lost:
            single = np.union1d(single, _windows_of(lost, halving))
        row, column = np.divmod(single, image.shape[1])
        at = 2 * (row * padded.shape[1] + column)
        offsets = np.add.outer(np.arange(4) * padded.shape[1], np.arange(4)).reshape(16, 1)
        image.reshape(-1)[single] = _medians(flat[at + offsets])
        if halving is halvings[0]:
            mean_of_blocks(image, mean)
    return image, mean


def _windows_of(pixel: npt.NDArray[np.intp], halving: Halving) -> npt.NDArray[np.intp]:
    """Flat indices of the windows that pixels are in."""
    hit = np.zeros((halving.shape[0] // 2, halving.shape[1] // 2), dtype=np.bool_)  # blocks of 2 x 2
    row, column = np.divmod(pixel, halving.shape[1])
    hit[row // 2, column // 2] = True
    return np.flatnonzero(hit[:-1, :-1] | hit[:-1, 1:] | hit[1:, :-1] | hit[1:, 1:])


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


def overlapping(image: npt.NDArray[np.generic]) -> npt.NDArray[np.floating]:
    """Sum over the windows of one halving."""
    sums: npt.NDArray[np.floating] = np.pad(image, 1).astype(np.float32, copy=False)
    for _ in range(2):
        sums = sums[::2] + sums[1::2]
        sums = (sums[:-1] + sums[1:]).T
    return sums


def mean_of_windows(image: Floats, valid: Bools, size: int) -> Floats:
    """Mean of the pixels that count, each as often as windows have it; NaN where none counts."""
    ny, nx = (n // size for n in image.shape)
    valid = valid[: ny * size, : nx * size]
    total = _share(np.where(valid, image[: ny * size, : nx * size], 0), size)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(total / _share(valid, size), dtype=np.float32)


def _share(image: npt.NDArray[np.generic], size: int) -> npt.NDArray[np.floating]:
    """Mean over the windows of all halvings down to bins of `size` pixels, 0 beyond the edges."""
    share: npt.NDArray[np.generic] = image
    for _ in range(size.bit_length() - 1):
        share = overlapping(share) / 16
    return np.asarray(share, dtype=np.float32)


def rolling_factor(subtract: Floats, halvings: list[Halving]) -> Floats:
    """Give the standard error of `rolling`: shape from counts, scale from noise put through the kernel.

    A bin's value draws on windows that reach beyond it, so the pixels that matter are counted with the
    same overlapping windows; one number then scales their inverse root to the spread that eight images of
    pure noise show over all bins, which holds it to half a per cent on a full CCD.
    """
    rows, columns = (n - 2 for n in halvings[0].shape)
    hidden = subtract[:rows, :columns].copy()
    valid = np.isfinite(hidden)
    hidden[valid] = 0
    weight = _share(valid, 2 ** len(halvings))
    if not weight.any():
        return np.full(weight.shape, np.nan, dtype=np.float32)
    n = np.where(weight > 0, weight * 4 ** len(halvings), np.nan)
    random = np.random.default_rng(0)
    one = np.ones(valid.shape[1], dtype=np.float32)
    images = (random.standard_normal(valid.shape, dtype=np.float32) for _ in range(8))
    values = (reduce_rolling(image, hidden, one, halvings)[0] for image in images)
    spread = np.mean([np.nanmean(np.square(value) * n) for value in values])
    return np.asarray(np.sqrt(spread / n), dtype=np.float32)
