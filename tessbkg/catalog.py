"""List the FFIs of CCDs below a root URL, or sort out a list, glob or folder of files.

The layout is that of the public bucket, below the root:
`ffi/s0001/2018/206/1-4/tess2018206192942-s0001-1-4-0120-s_ffic.fits`.
Each day folder of a CCD is one page of a listing, so the folders are listed in parallel. The stamp in a
name is the start of the exposure at the spacecraft (UTC, to about two seconds); exact times are in headers.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd

from tessbkg.ccd import CCD
from tessbkg.errors import CatalogError, FFIReadError
from tessbkg.ffi import BLOCK, read_cards
from tessbkg.storage import (
    Options,
    check_below,
    check_url,
    filesystem,
    has_magic,
    join,
    list_folder,
    path_of,
    read_ranges,
    source_options,
)

logger = logging.getLogger(__name__)

ROOT: Final = "s3://stpubdata/tess/public"
"""Public bucket of the Mikulski Archive for Space Telescopes, region us-east-1."""

NAME: Final = re.compile(r"tess(\d{13})-s(\d{4})-([1-4])-([1-4])-(\d{4})-[xsab]_ffic\.fits")
"""Grammar that all 4,482,130 names of sectors 1-68 obey: stamp, sector, camera, CCD, SCCONFIG."""

DUPLICATE_SECONDS: Final = 60.0
"""Two files of a CCD closer than this are one exposure processed twice (the fastest cadence is 200 s)."""

COLUMNS: Final = ("ffi", "url", "sector", "camera", "ccd", "start", "size")

Numbers = int | Iterable[int] | None


def stamp_to_tjd(stamps: Sequence[str]) -> npt.NDArray[np.float64]:
    """Convert name stamps `YYYYDDDHHMMSS` (UTC) to TJD (JD - 2457000, TDB).

    Examples
    --------
    >>> float(stamp_to_tjd(["2018206192942"])[0].round(4))
    1325.3131
    """
    from astropy.time import Time  # noqa: PLC0415 (slow to import)

    if not len(stamps):
        return np.empty(0)
    utc = pd.to_datetime(pd.Series(list(stamps)), format="%Y%j%H%M%S").to_numpy().astype("datetime64[s]")
    tdb = Time(utc, format="datetime64", scale="utc").tdb
    return np.asarray((tdb.jd1 - 2457000.0) + tdb.jd2)


def _wanted(value: int | Iterable[int], name: str) -> list[int]:
    """Normalise one number or several to a sorted list."""
    values = list(value) if isinstance(value, Iterable) else [value]
    if not values:
        raise ValueError(f"{name}={value!r} is empty: give at least one number")
    for one in values:
        CCD(**{"sector": 1, "camera": 1, "ccd": 1, name: one})
    return sorted({int(one) for one in values})


def list_ffis(
    files: str | Iterable[str] | None = None,
    *,
    sector: Numbers = None,
    camera: Numbers = None,
    ccd: Numbers = None,
    root: str = ROOT,
    storage_options: Options | None = None,
) -> pd.DataFrame:
    """List calibrated FFIs, sorted by time.

    Parameters
    ----------
    files : str or iterable of str, optional
        Instead of a listing below `root`: paths or URLs, a glob, or a folder (searched to any depth).
    sector : int or iterable of int
        Required unless `files` is given.
    camera, ccd : int or iterable of int, optional
        1 to 4; all by default.
    root : str
        URL of the folder that holds `ffi/`.
    storage_options : dict, optional
        fsspec options; reading from S3 is anonymous by default. Never credentials.

    Returns
    -------
    pandas.DataFrame
        One row a frame, sorted by CCD and time: `ffi` (file name), `url`, `sector`, `camera`, `ccd`,
        `start` (TJD, TDB, from the stamp in the name), `size` in bytes (-1 where unknown). Of an exposure
        processed twice only the newer is kept (by the header keywords DATA_REL and DATE).

    Raises
    ------
    CatalogError
        If nothing is found; the message says what was looked for and where.
    ValueError
        If an argument is out of range.

    Examples
    --------
    >>> import tessbkg.simulate
    >>> _ = tessbkg.simulate.simulate("memory://list", frames=3, shape=(64, 64))
    >>> len(list_ffis(sector=1, camera=1, ccd=4, root="memory://list"))
    3
    """
    sectors = None if sector is None else _wanted(sector, "sector")
    cameras = _wanted(range(1, 5) if camera is None else camera, "camera")
    ccds = _wanted(range(1, 5) if ccd is None else ccd, "ccd")
    check_url(root, "root")
    if files is not None:
        entries, where = _explicit(files, storage_options)
    elif sectors is None:
        raise ValueError("sector is missing: give a sector (sector=1) or files")
    else:
        where = join(root, "ffi")
        entries = _below_root(root, sectors, cameras, ccds, storage_options)
    frames = _table(entries)
    chosen = frames["camera"].isin(cameras) & frames["ccd"].isin(ccds)
    if sectors is not None:
        chosen &= frames["sector"].isin(sectors)
    frames = frames[chosen]
    if frames.empty:
        what = ", ".join(
            f"{name} {' or '.join(map(str, value if isinstance(value, Iterable) else [value]))}"
            for name, value in (("sector", sector), ("camera", camera), ("CCD", ccd))
            if value is not None
        )
        raise CatalogError(f"no calibrated FFIs ({what or 'any CCD'}) in {where}")
    return _drop_duplicates(frames, storage_options)


def _explicit(files: str | Iterable[str], options: Options | None) -> tuple[list[tuple[str, int, Any]], str]:
    """Expand a list, glob or folder to (url, size, modified)."""
    if not isinstance(files, str):
        urls = [str(file) for file in files]
        for url in urls:
            if NAME.fullmatch(url.rsplit("/", 1)[-1]) is None:
                raise CatalogError(f"{url!r} does not have the name of a calibrated FFI")
        return [(url, -1, None) for url in urls], f"a list of {len(urls)} files"
    fs, path = filesystem(files, source_options(files, options))
    if has_magic(files):
        found = fs.glob(path, detail=True).values()
    elif fs.isdir(path):
        found = fs.find(path, detail=True).values()
        for info in found:
            check_below(path, str(info["name"]))
    else:
        return _explicit([files], options)[0], files
    return [_entry(fs, info) for info in found], files


def _entry(fs: Any, info: dict[str, Any]) -> tuple[str, int, Any]:
    modified = info.get("LastModified", info.get("mtime", info.get("created")))
    return str(fs.unstrip_protocol(info["name"])), int(info.get("size") or -1), modified


def _below_root(
    root: str, sectors: list[int], cameras: list[int], ccds: list[int], options: Options | None
) -> list[tuple[str, int, Any]]:
    """List the day folders of every wanted CCD in parallel."""
    fs, path = filesystem(root, source_options(root, options))

    def folders(parents: Iterable[str]) -> list[str]:
        listings = pool.map(lambda parent: list_folder(fs, parent), parents)
        return [str(info["name"]).rstrip("/") for infos in listings for info in infos]

    def name(folder: str) -> str:
        return folder.rsplit("/", 1)[-1]

    with ThreadPoolExecutor(32) as pool:
        years = folders(join(path, "ffi", f"s{number:04d}") for number in sectors)
        days = folders(year for year in years if name(year).isdigit())
        wanted = [
            f"{day}/{camera}-{ccd}"
            for day in days
            if name(day).isdigit()
            for camera in cameras
            for ccd in ccds
        ]
        found = list(pool.map(lambda folder: list_folder(fs, folder), wanted))
    return [_entry(fs, info) for infos in found for info in infos]


def _table(entries: list[tuple[str, int, Any]]) -> pd.DataFrame:
    """Make the table of frames out of names; what has no name of a calibrated FFI is left out."""
    rows = [
        (match, url, size, modified)
        for url, size, modified in entries
        if (match := NAME.fullmatch(url.rsplit("/", 1)[-1])) is not None
    ]
    frames = pd.DataFrame(
        {
            "ffi": [match[0] for match, *_ in rows],
            "url": [url for _, url, *_ in rows],
            "sector": np.array([match[2] for match, *_ in rows], dtype=np.int64),
            "camera": np.array([match[3] for match, *_ in rows], dtype=np.int64),
            "ccd": np.array([match[4] for match, *_ in rows], dtype=np.int64),
            "start": stamp_to_tjd([match[1] for match, *_ in rows]),
            "size": np.array([size for *_, size, _ in rows], dtype=np.int64),
            "modified": [str(modified) if modified is not None else "" for *_, modified in rows],
        }
    )
    return frames.drop_duplicates("url").sort_values(
        ["sector", "camera", "ccd", "start", "ffi"], ignore_index=True
    )


def _drop_duplicates(frames: pd.DataFrame, options: Options | None) -> pd.DataFrame:
    """Of files of one exposure keep the newest processing.

    The primary headers decide (2,880 bytes each). Where they cannot be read, the time of modification
    does, then the earlier stamp: reprocessing moved the times of the first releases two seconds back.
    """
    identity = frames[["sector", "camera", "ccd"]].to_numpy()
    close = np.diff(frames["start"].to_numpy()) * 86400 < DUPLICATE_SECONDS
    same = np.append([False], close & (identity[1:] == identity[:-1]).all(axis=1))
    exposure = np.cumsum(~same)
    doubled = np.flatnonzero(same | np.append(same[1:], [False]))
    if doubled.size:
        frames = frames.copy()
        urls = frames["url"].to_numpy()[doubled]
        releases = _releases([str(url) for url in urls], options)
        order = pd.DataFrame(
            {
                "row": doubled,
                "exposure": exposure[doubled],
                "release": [release for release, _ in releases],
                "date": [date for _, date in releases],
                "modified": frames["modified"].to_numpy()[doubled],
                "stamp": -frames["start"].to_numpy()[doubled],
            }
        ).sort_values(["exposure", "release", "date", "modified", "stamp"])
        older = order[order.duplicated("exposure", keep="last")]["row"].to_numpy()
        logger.info("%d frames were processed twice; the newer ones are kept", older.size)
        frames = frames.drop(index=frames.index[older])
    return frames.reset_index(drop=True)[list(COLUMNS)]


def _releases(urls: list[str], options: Options | None) -> list[tuple[int, str]]:
    """DATA_REL and DATE of each file's primary header; (-1, "") where it cannot be read."""
    fs, _ = filesystem(urls[0], source_options(urls[0], options))
    answers = read_ranges(fs, [(path_of(fs, url), 0, BLOCK) for url in urls])
    releases = []
    for url, answer in zip(urls, answers, strict=True):
        try:
            if isinstance(answer, FFIReadError):
                raise answer
            cards, _ = read_cards(answer, 0, url)
        except (FFIReadError, IndexError):
            releases.append((-1, ""))
        else:
            release = cards.get("DATA_REL")
            releases.append((release if isinstance(release, int) else 0, str(cards.get("DATE", ""))))
    return releases


def single_ccd(frames: pd.DataFrame) -> CCD:
    """Return the one CCD that all frames are of.

    Raises
    ------
    ValueError
        If they are of several.
    """
    identities = frames[["sector", "camera", "ccd"]].drop_duplicates()
    if len(identities) != 1:
        several = ", ".join(CCD(*(int(n) for n in row)).group for row in identities.to_numpy())
        raise ValueError(f"frames are of {len(identities)} CCDs ({several}); give one")
    return CCD(*(int(number) for number in identities.to_numpy()[0]))
