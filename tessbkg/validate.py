"""What a scientist should look at before using a build: numbers per frame and warnings per CCD."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd

from tessbkg.ffi import FrameStatus

DARK_EXCESS: Final = 5.0
"""Electron s-1 by which the brightest part of a dark frame may outshine the darkest frames of its CCD."""

MIN_UNMASKED: Final = 0.25
"""Share of a bin's pixels below which its value hangs on few of them."""

MAX_MISFIT_DEG: Final = 0.02
"""Misfit of a WCS and the camera's shape; 0.02 degrees are 3.4 pixels."""

MAX_SCATTER: Final = 5.0
"""Noise between neighbouring bins over their error bars above which the error bars are not believed."""

MAD_TO_SIGMA: Final = 1.4826


def scatter(value: npt.NDArray[np.float32], error: npt.NDArray[np.float32]) -> float | None:
    """Give the noise between neighbouring bins of a frame in units of their error bars.

    The robust scatter of second differences along rows and columns over what the errors predict: 1 if the
    errors are right, more where the light has structure at the scale of bins. Smooth light cancels.

    Parameters
    ----------
    value, error : (ny, nx) float32, electron s-1

    Returns
    -------
    float or None
        None where fewer than three bins stand in a row.
    """
    ratios = []
    for v, e in ((value, error), (value.T, error.T)):
        difference = v[:-2] - 2 * v[1:-1] + v[2:]
        ratios.append((difference / np.sqrt(e[:-2] ** 2 + 4 * e[1:-1] ** 2 + e[2:] ** 2)).ravel())
    ratio = np.concatenate(ratios)
    ratio = ratio[np.isfinite(ratio)]
    return round(float(MAD_TO_SIGMA * np.median(np.abs(ratio))), 3) if ratio.size else None


def doubts(
    survey: pd.DataFrame,
    rows: Sequence[Mapping[str, Any]],
    *,
    dark_frames: Sequence[str],
    unread: Sequence[str],
    wanted: int,
    unmasked: npt.NDArray[np.floating],
    misfit: float | None,
) -> list[str]:
    """Say, a line each, what is doubtful about a build; nothing if all is well.

    Parameters
    ----------
    survey : pandas.DataFrame
        With `ffi`, `status` and `excess`.
    rows : sequence of mappings
        The report, with `ffi`, `status` and `scatter`.
    dark_frames : sequence of str
        Frames that made the scene.
    unread : sequence of str
        Frames that were to make it and could not be read, with the reason.
    wanted : int
        How many were asked for.
    unmasked : (ny, nx) float
        Share of each bin's pixels that are not masked.
    misfit : float or None
        Of the WCS and the camera, degrees.
    """
    lines = []
    excess = survey.set_index("ffi")["excess"].reindex(list(dark_frames)).to_numpy(dtype=np.float64)
    bright = int((excess > DARK_EXCESS).sum())
    if bright:
        lines.append(
            f"{bright} of {len(dark_frames)} dark frames are not dark: up to {np.nanmax(excess):.1f} "
            "electron s-1 above the darkest of the CCD; the scene holds part of the light"
        )
    lines += [f"a dark frame could not be read, the next-darkest was taken: {line}" for line in unread]
    available = min(wanted, int((survey["status"] == FrameStatus.GOOD).sum()))
    if len(dark_frames) < available:
        lines.append(f"the scene is made of {len(dark_frames)} frames where {available} were to be had")
    few = int((unmasked < MIN_UNMASKED).sum())
    if few:
        lines.append(
            f"{few} of {unmasked.size} bins have less than {MIN_UNMASKED:.0%} of their pixels unmasked"
        )
    if misfit is not None and misfit > MAX_MISFIT_DEG:
        lines.append(f"the WCS misfits the camera by {misfit:.3f} degrees: angles may be off by as much")
    noisy = [row for row in rows if (row["scatter"] or 0) > MAX_SCATTER]
    if noisy:
        worst = max(noisy, key=lambda row: float(row["scatter"]))
        lines.append(
            f"{len(noisy)} frames scatter by more than {MAX_SCATTER:g} times their error bars, most of all "
            f"{worst['ffi']} by {worst['scatter']:g}"
        )
    return lines
