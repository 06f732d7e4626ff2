"""Pass 1: what every frame is, from its header and a few rows of pixels.

The table of frames from the catalog gains a status, exact times, quality, the place of the pixels in the
file and a background level. That is 2.5 % of the bytes of a full pass.
"""

from __future__ import annotations

import itertools
import logging
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd

from tessbkg.ccd import CCD, INDEX_EPOCH
from tessbkg.errors import FFIReadError
from tessbkg.ffi import (
    HEADER_BYTES,
    FFIHeader,
    FrameStatus,
    check_identity,
    decode,
    error_status,
    header_of,
    read_on,
)
from tessbkg.storage import Options, filesystem, path_of, read_ranges, source_options

logger = logging.getLogger(__name__)

BANDS: Final = (0.05, 0.5, 0.95)
"""Where along the science rows the bands stand whose medians are the level of a frame."""

BAND_ROWS: Final = 16
BLOCKS: Final = 4
"""Parts of a band along columns: one per CCD output."""

BATCH: Final = 128
"""Frames whose bytes are held in memory at once."""

ORBIT_GAP_DAYS: Final = 0.7
"""A longer pause in good frames starts a new orbit: the mid-sector downlink is 22 to 79 hours long in
sectors 1-55; later sectors pause for 5 hours several times, within an orbit."""

LEVELS: Final = [f"level_{i}" for i in range(len(BANDS) * BLOCKS)]


def survey_frames(
    frames: pd.DataFrame, *, bands: bool = True, storage_options: Options | None = None
) -> pd.DataFrame:
    """Read headers, and with `bands` a few rows, of some frames of one CCD.

    Parameters
    ----------
    frames : pandas.DataFrame
        Rows of :func:`tessbkg.list_ffis`.
    bands : bool
        Read three bands of 16 rows too: 0.44 MB a frame in three GETs, against 32 kB in one GET without.
    storage_options : dict, optional
        fsspec options of the source.

    Returns
    -------
    pandas.DataFrame
        The rows of `frames` with `status`, `reason`, and what the header says; NaN where it says nothing.
        Finish with :func:`finish_survey`.
    """
    fs, _ = filesystem(frames["url"].iloc[0], source_options(frames["url"].iloc[0], storage_options))
    rows: list[dict[str, Any]] = []
    for first in range(0, len(frames), BATCH):
        rows += _survey_batch(fs, frames.iloc[first : first + BATCH], bands=bands)
    return pd.concat([frames, pd.DataFrame(rows, index=frames.index)], axis=1)


def _survey_batch(fs: Any, frames: pd.DataFrame, *, bands: bool) -> list[dict[str, Any]]:
    paths = [path_of(fs, url) for url in frames["url"]]
    ccds = [CCD(*(int(n) for n in identity)) for identity in frames[["sector", "camera", "ccd"]].to_numpy()]
    answers = read_ranges(fs, [(path, 0, HEADER_BYTES) for path in paths])
    rows: list[dict[str, Any]] = []
    headers: list[FFIHeader | None] = []
    for path, ccd, answer in zip(paths, ccds, answers, strict=True):
        try:
            if isinstance(answer, FFIReadError):
                raise answer
            header, _ = header_of(fs, path, answer)
            check_identity(header, ccd, path)
        except FFIReadError as error:
            rows.append({"status": int(error_status(error)), "reason": error.reason})
            headers.append(None)
        else:
            rows.append(_header_row(header))
            headers.append(header)
    if bands:
        _add_levels(fs, paths, headers, rows)
    return rows


def _header_row(header: FFIHeader) -> dict[str, Any]:
    ra, dec = header.crval or (np.nan, np.nan)
    return {
        "status": int(FrameStatus.GOOD),
        "reason": "",
        "time": header.time,
        "barycorr": header.barycorr,
        "exposure": header.exposure,
        "cadence": header.cadence,
        "quality": header.quality,
        "ra": ra,
        "dec": dec,
        "end": header.flux_end,
        "rows": header.science_shape[0],
        "columns": header.science_shape[1],
        "first_row": header.region[0],
        "first_column": header.region[2],
    }


def _add_levels(
    fs: Any, paths: list[str], headers: list[FFIHeader | None], rows: list[dict[str, Any]]
) -> None:
    """Add the medians of blocks of three bands to the rows of frames that have a header."""
    requests, owners = [], []
    for i, header in enumerate(headers):
        if header is None:
            continue
        for place in BANDS:
            first = header.science[0] + int(place * max(header.science_shape[0] - BAND_ROWS, 0))
            last = min(first + BAND_ROWS, header.science[1])
            requests.append((paths[i], header.row_offset(first), header.row_offset(last)))
            owners.append((i, first, last))
    levels: dict[int, list[float]] = {}
    for (i, first, last), request, answer in zip(owners, requests, read_ranges(fs, requests), strict=True):
        header = headers[i]
        assert header is not None
        try:
            if isinstance(answer, FFIReadError):
                raise answer
            data = read_on(fs, paths[i], answer, request[1], request[2] - request[1])
        except FFIReadError as error:
            rows[i].update(status=int(error_status(error)), reason=error.reason)
            levels.setdefault(i, []).extend([np.nan] * BLOCKS)
            continue
        band = decode(data, header, (first, last), request[1])
        levels.setdefault(i, []).extend(_block_medians(band))
    for i, values in levels.items():
        rows[i].update(zip(LEVELS, values, strict=True))


def _block_medians(band: npt.NDArray[np.float32]) -> list[float]:
    edges = np.linspace(0, band.shape[1], BLOCKS + 1).astype(int)
    medians = []
    for first, last in itertools.pairwise(edges):
        block = band[:, first:last]
        block = block[np.isfinite(block)]
        medians.append(float(np.median(block)) if block.size else np.nan)
    return medians


def finish_survey(parts: list[pd.DataFrame]) -> pd.DataFrame:
    """Put the parts of a survey together and give every frame its place in time.

    Parameters
    ----------
    parts : list of pandas.DataFrame
        Results of :func:`survey_frames`, in any order; also rows of a finished survey.

    Returns
    -------
    pandas.DataFrame
        Sorted by time, every frame listed once, with

        `status` : a :class:`~tessbkg.ffi.FrameStatus`;
        `reason` : why, where it is not good;
        `time` : TJD at the spacecraft (TDB), mid-exposure. A frame without a readable header has its name's
        stamp plus half an exposure, which is good to two seconds;
        `barycorr` : days, interpolated where the header cannot be read;
        `cadence` : FFIINDEX, computed where the header does not have it;
        `quality` : DQUALITY, 0 where unknown;
        `level` : median of the block medians, electron s-1 (NaN without bands);
        `excess` : how far the brightest block is above its own darkest frames (for choosing dark frames);
        `end` : byte after the last science row.

    Raises
    ------
    FFIReadError
        If not one frame could be read; it carries the first frame's reason.
    """
    survey = pd.concat(parts)
    for column in ("time", "barycorr", "exposure", "cadence", "quality", "ra", "dec", "end", *LEVELS):
        if column not in survey:
            survey[column] = np.nan
    good = survey["time"].notna()
    if not good.any():
        first = survey.iloc[0]
        raise FFIReadError(first["url"], f"{first['reason']} (and none of {len(survey)} frames is readable)")
    survey = _same_region(survey)
    exposure = float(survey.loc[good, "exposure"].median())
    survey["time"] = survey["time"].fillna(survey["start"] + exposure / 2)
    survey = survey.sort_values(["time", "ffi"], ignore_index=True)
    good = survey["barycorr"].notna()
    survey["barycorr"] = np.interp(survey["time"], survey.loc[good, "time"], survey.loc[good, "barycorr"])
    index = np.round((survey["time"] - exposure / 2 - INDEX_EPOCH) / exposure)
    survey["cadence"] = survey["cadence"].fillna(pd.Series(index)).astype(np.int64)
    survey["quality"] = survey["quality"].fillna(0).astype(np.int64)
    survey["exposure"] = survey["exposure"].fillna(exposure)
    for column in ("end", "rows", "columns", "first_row", "first_column"):
        survey[column] = survey[column].fillna(-1).astype(np.int64)
    return _add_excess(survey)


def _same_region(survey: pd.DataFrame) -> pd.DataFrame:
    """Frames of one CCD have one science region; the odd ones out are bad headers."""
    region = ["rows", "columns", "first_row", "first_column"]
    common = survey.loc[survey["time"].notna(), region].value_counts().index[0]
    odd = survey["time"].notna() & (survey[region] != list(common)).any(axis=1)
    survey.loc[odd, "status"] = int(FrameStatus.BAD_HEADER)
    survey.loc[odd, "reason"] = [
        f"{int(rows)} x {int(columns)} science pixels where others have {int(common[0])} x {int(common[1])}"
        for rows, columns in survey.loc[odd, ["rows", "columns"]].to_numpy()
    ]
    return survey


def _add_excess(survey: pd.DataFrame) -> pd.DataFrame:
    levels = survey[LEVELS].to_numpy(dtype=np.float64)
    good = (survey["status"] == FrameStatus.GOOD).to_numpy() & np.isfinite(levels).all(axis=1)
    blank = good & (levels == 0).all(axis=1)
    again = "excess" in survey  # with rows of an earlier survey, whose levels are gone: they made the scene
    if not again:
        survey["level"] = survey["excess"] = np.nan
    if good.any():
        survey.loc[good, "level"] = np.median(levels[good], axis=1)
    usable = good & ~blank
    if usable.any() and not again:
        darkest = np.percentile(levels[usable], 1, axis=0)
        survey.loc[usable, "excess"] = (levels[usable] - darkest).max(axis=1)
    return survey.drop(columns=LEVELS)


def reject(survey: pd.DataFrame, drop_quality: int) -> pd.DataFrame:
    """Give status REJECTED to good frames whose DQUALITY has any bit of `drop_quality`."""
    flagged = (survey["status"] == FrameStatus.GOOD) & ((survey["quality"] & drop_quality) != 0)
    survey = survey.copy()
    survey.loc[flagged, "status"] = int(FrameStatus.REJECTED)
    survey.loc[flagged, "reason"] = [
        f"DQUALITY {quality} has bits of {drop_quality}" for quality in survey.loc[flagged, "quality"]
    ]
    return survey


def orbit_numbers(survey: pd.DataFrame) -> npt.NDArray[np.intp]:
    """Give every frame the number of its orbit, from 0, by pauses longer than ORBIT_GAP_DAYS."""
    return np.append([0], np.cumsum(np.diff(survey["time"]) > ORBIT_GAP_DAYS)).astype(np.intp)


def choose_dark(survey: pd.DataFrame, number: int) -> npt.NDArray[np.intp]:
    """Choose the darkest good frames, the same number from every orbit as far as there are enough.

    Parameters
    ----------
    survey : pandas.DataFrame
        From :func:`finish_survey`, with levels.
    number : int
        Frames wanted.

    Returns
    -------
    (n,) int
        Positions in `survey`, in order of time; n is `number` or all good frames if they are fewer.

    Raises
    ------
    FFIReadError
        If there is no good frame.
    """
    usable = (survey["status"] == FrameStatus.GOOD) & survey["excess"].notna()
    candidates = pd.DataFrame(
        {"orbit": orbit_numbers(survey), "excess": survey["excess"]}, index=np.arange(len(survey))
    )[usable.to_numpy()].sort_values("excess")
    if candidates.empty:
        raise FFIReadError(str(survey["url"].iloc[0]), "no good frame among its CCD's to make a scene of")
    # The k-th darkest of each orbit, k = 1, 2, ..., darkest orbit first.
    turn = candidates.groupby("orbit").cumcount()
    chosen = candidates.assign(turn=turn).sort_values(["turn", "excess"]).index[:number]
    return np.sort(chosen.to_numpy())


def wcs_frames(survey: pd.DataFrame, number: int = 3) -> list[str]:
    """URLs of good frames whose WCS is nearest the median WCS of the CCD; empty when none has one."""
    usable = survey[(survey["status"] == FrameStatus.GOOD) & survey["ra"].notna()]
    if usable.empty:
        return []
    turned = np.deg2rad(usable[["ra", "dec"]].to_numpy(dtype=np.float64))
    direction = np.stack(
        [
            np.cos(turned[:, 1]) * np.cos(turned[:, 0]),
            np.cos(turned[:, 1]) * np.sin(turned[:, 0]),
            np.sin(turned[:, 1]),
        ]
    )
    distance = np.abs(direction - np.median(direction, axis=1, keepdims=True)).sum(axis=0)
    return [str(url) for url in usable["url"].to_numpy()[np.argsort(distance, kind="stable")[:number]]]
