"""Loops over pixels that do in one pass what NumPy needs many for; compiled by Numba when first called.

Arrays are float32. `min` and `max` become vector instructions, which do not say where a NaN went: a loop that
has them is given none. Tests hold each to the same in plain NumPy.

Whoever calls these imports them where they are called, for Numba takes 0.3 s to import and 130 MB: what only
gains a little from it stays with NumPy.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

Floats = npt.NDArray[np.float32]


@njit(nogil=True)
def _order(a: float, b: float, c: float, d: float) -> tuple[float, float, float, float]:
    """Order four numbers that rise and then fall, or are a rotation of such."""
    p, q = min(a, c), max(a, c)
    r, s = min(b, d), max(b, d)
    return min(p, r), max(p, r), min(q, s), max(q, s)


@njit(nogil=True)
def subtract_pixels(flux: Floats, scene: Floats, gain: Floats, out: Floats) -> bool:
    """Put (flux - scene) x gain of each column into `out`, whose size says how much of a frame counts.

    Returns
    -------
    bool
        Whether any is NaN.
    """
    lost = False
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            rest = (flux[i, j] - scene[i, j]) * gain[j]
            out[i, j] = rest
            lost |= rest != rest  # noqa: PLR0124 (which only NaN is)
    return lost


@njit(nogil=True)
def middle_of_windows(image: Floats, side: npt.NDArray[np.int8], out: Floats) -> None:
    """Median of windows of 4 x 4 pixels that stand two pixels apart.

    Windows share sorted blocks of 2 x 2 and of 2 x 4 pixels. Of two that make a window, each in order, the
    eight lowest of all sixteen are the lower ones of pairs from opposite ends; the highest of them is the
    eighth, and the ninth likewise.

    Parameters
    ----------
    image : (2 ny + 2, 2 nx + 2) float32
        No NaN.
    side : (ny, nx) int8
        As :class:`tessbkg.rolling.Halving` has it.
    out : (ny, nx) float32
    """
    ny, nx = out.shape
    quad = np.empty((4, nx + 1), np.float32)
    above = np.empty((8, nx), np.float32)
    below = np.empty((8, nx), np.float32)
    for i in range(ny + 1):
        for j in range(nx + 1):
            a, b = image[2 * i, 2 * j], image[2 * i, 2 * j + 1]
            c, d = image[2 * i + 1, 2 * j], image[2 * i + 1, 2 * j + 1]
            quad[0, j], quad[1, j], quad[2, j], quad[3, j] = _order(
                min(a, b), max(a, b), max(c, d), min(c, d)
            )
        for j in range(nx):
            a, b, c, d = quad[0, j], quad[1, j], quad[2, j], quad[3, j]
            e, f, g, h = quad[0, j + 1], quad[1, j + 1], quad[2, j + 1], quad[3, j + 1]
            below[0, j], below[1, j], below[2, j], below[3, j] = _order(
                min(a, h), min(b, g), min(c, f), min(d, e)
            )
            below[4, j], below[5, j], below[6, j], below[7, j] = _order(
                max(a, h), max(b, g), max(c, f), max(d, e)
            )
        if i:
            for j in range(nx):
                low, high = min(above[0, j], below[7, j]), max(above[0, j], below[7, j])
                for k in range(1, 8):
                    a, b = above[k, j], below[7 - k, j]
                    low, high = max(low, min(a, b)), min(high, max(a, b))
                both = np.float32(0.5) * (low + high)
                out[i - 1, j] = low if side[i - 1, j] < 0 else high if side[i - 1, j] > 0 else both
        above, below = below, above


@njit(nogil=True)
def mean_of_blocks(image: Floats, out: Floats) -> None:
    """Put the mean of each block of `image` that is not NaN into `out`, whose size says how large blocks are.

    NaN where all of a block is.
    """
    size = image.shape[0] // out.shape[0]
    total = np.empty(out.shape[1], dtype=np.float64)
    number = np.empty(out.shape[1], dtype=np.float64)
    for y in range(out.shape[0]):
        total[:] = 0
        number[:] = 0
        for i in range(y * size, (y + 1) * size):
            for x in range(out.shape[1]):
                for j in range(x * size, (x + 1) * size):
                    value = image[i, j]
                    if value == value:  # noqa: PLR0124 (which NaN is not)
                        total[x] += value
                        number[x] += 1
        for x in range(out.shape[1]):
            out[y, x] = total[x] / number[x] if number[x] else np.nan
