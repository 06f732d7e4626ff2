"""What a build will do, before it does it: its frames, tasks and bytes, and what the store has already."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd

from tessbkg.catalog import ROOT, list_ffis, single_ccd
from tessbkg.ccd import SCIENCE_SHAPE
from tessbkg.dataset import (
    SHARD_FRAMES,
    Options,
)
from tessbkg.evaluation import frame_spacing
from tessbkg.ffi import SCIENCE_END
from tessbkg.stack import (
    OnError,
    check_on_error,
)
from tessbkg.storage import Options as StorageOptions
from tessbkg.storage import (
    check_options,
    check_url,
    freeze,
)
from tessbkg.store import (
    Group,
    check_fields,
    marker,
    read_fields,
    shards,
    unwritten_shards,
)
from tessbkg.tasks import READ_AHEAD, Job

SURVEY_TASKS: Final = 8

SURVEY_FRAMES: Final = 256
"""The survey of a CCD is cut into this many tasks at most, of this many frames at least."""

FILE_BYTES: Final = 35_547_840
"""Size of an FFI with headers of the usual length."""

SURVEY_SHARE: Final = 0.025
"""Share of a frame's science bytes that the survey reads: the header and three bands of 16 rows."""

NOISE_FRAMES: Final = 4
"""Frames read with their uncertainties to fit the noise law."""

SCENE_BYTES: Final = 60_000_000
"""Scene, error and mask, and what is prepared of them."""


def survey_parts(n: int) -> list[slice]:
    """Cut `n` frames into the parts that are surveyed by one task each."""
    size = max(SURVEY_FRAMES, -(-n // SURVEY_TASKS))
    return [slice(first, first + size) for first in range(0, n, size)]


@dataclass(frozen=True, eq=False, repr=False)
class BuildPlan:
    """A build that has not begun: what there is to do, and what is done already.

    Parameters
    ----------
    job : Job
    frames : pandas.DataFrame
        Frames in order of time, as :func:`tessbkg.list_ffis` gives them.
    fields : dict
        What the group is made of; a group made of something else is not touched.
    missing : list of (int, int)
        First and last (exclusive) frame of every shard that is to be done.
    steps : tuple of str
        Steps before the shards that are to be done: survey, scene, template.
    bin_hours : float, optional
        Length of the bins in time that the CCD is averaged in too.
    """

    job: Job
    frames: pd.DataFrame
    fields: dict[str, Any]
    missing: list[tuple[int, int]]
    steps: tuple[str, ...]
    bin_hours: float | None = None

    @property
    def tasks(self) -> int:
        """Tasks that a cluster gets."""
        survey = len(survey_parts(len(self.frames))) if "survey" in self.steps else 0
        return survey + ("scene" in self.steps) + len(self.missing)

    @property
    def frames_to_read(self) -> int:
        """Frames of the shards that are to be done."""
        return sum(last - first for first, last in self.missing)

    @property
    def bytes_to_read(self) -> int:
        """Bytes over the wire, as far as the listing tells."""
        sizes = self.frames["size"].to_numpy()
        full = np.median(sizes[sizes > 0]) if (sizes > 0).any() else FILE_BYTES
        science = SCIENCE_END * full / FILE_BYTES
        passes = 2.0 if self.job.options.errors == "uncert" else 1.0
        total = self.frames_to_read * science * passes
        if "survey" in self.steps:
            total += len(self.frames) * SURVEY_SHARE * science
        if "scene" in self.steps:
            total += (self.job.options.dark_frames + 2 * NOISE_FRAMES) * science
        return int(total)

    def __repr__(self) -> str:
        return self.explain()

    def explain(self) -> str:
        """Say in a few lines what the build will do."""
        options, job, n = self.job.options, self.job, len(self.frames)
        total = shards(n, job.shard_frames)
        begin, end = self.frames["start"].iloc[[0, -1]]
        bins = (SCIENCE_SHAPE[0] // options.bin) ** 2
        memory = (READ_AHEAD + 2) * SCIENCE_END + SCENE_BYTES + 2 * job.shard_frames * bins * 4
        lines = [
            f"{job.ccd} -> {job.group.name}",
            f"frames        {n:,} from TJD {begin:.3f} to {end:.3f}, {(end - begin):.1f} days",
            f"over the wire {self.bytes_to_read / 1e9:,.2f} GB",
            f"reduction     bin {options.bin}, {options.statistic}, errors by {options.errors}, "
            f"scene of {options.dark_frames} dark frames",
            f"result        {n} x {SCIENCE_SHAPE[0] // options.bin} x {SCIENCE_SHAPE[1] // options.bin}, "
            f"{2 * n * bins * 4 / 1e6:,.0f} MB before compression",
            *([f"in time       means of {self.bin_hours:g} hours too"] if self.bin_hours else []),
            f"tasks         {self.tasks} of up to {job.shard_frames} frames, "
            f"about {memory / 1e6:,.0f} MB of memory each",
            f"done already  {len(total) - len(self.missing)} of {len(total)} shards"
            + (f"; to do first: {', '.join(self.steps)}" if self.steps else ""),
        ]
        return "\n".join(lines)


def plan_build(
    store: str,
    *,
    sector: int | None = None,
    camera: int | None = None,
    ccd: int | None = None,
    files: str | Iterable[str] | pd.DataFrame | None = None,
    root: str = ROOT,
    frames: slice | None = None,
    options: Options | None = None,
    shard_frames: int = SHARD_FRAMES,
    on_error: OnError = "flag",
    storage_options: StorageOptions | None = None,
    store_options: StorageOptions | None = None,
    overwrite: bool = False,
    bin_hours: float | None = None,
    **reduction: Any,
) -> BuildPlan:
    """Plan the build of one CCD: list its frames and see what the store has.

    Reads no header and no pixel. The arguments are those of :func:`build`.

    Returns
    -------
    BuildPlan
        ``plan.explain()`` says it in words.

    Raises
    ------
    CatalogError
        If no frames are found.
    StoreMismatchError
        If the store has this CCD made with other parameters.
    ValueError
        If an argument is wrong.

    Examples
    --------
    >>> import tessbkg.simulate
    >>> _ = tessbkg.simulate.simulate("memory://plan", frames=3, shape=(64, 64))
    >>> plan_build("memory://plan.zarr", sector=1, camera=1, ccd=4, root="memory://plan").tasks
    3
    """
    check_on_error(on_error)
    check_url(str(store), "store")
    if isinstance(shard_frames, bool) or not isinstance(shard_frames, int) or not 1 <= shard_frames <= 4096:
        raise ValueError(f"shard_frames={shard_frames!r} is out of range: allowed are 1 to 4096")
    options = _options(options, reduction)
    source = check_options(storage_options)
    check_options(store_options, "store_options")
    if isinstance(files, pd.DataFrame):
        table = files
    else:
        table = list_ffis(files, sector=sector, camera=camera, ccd=ccd, root=root, storage_options=source)
    identity = single_ccd(table)
    if frames is not None:
        total = len(table)
        table = table.iloc[frames].reset_index(drop=True)
        if table.empty:
            raise ValueError(f"frames={_slice_text(frames)} selects none of {total} frames")
    if bin_hours is not None:
        _check_bin_hours(bin_hours, table)
    group = Group.of(store, identity, store_options)
    job = Job(identity, group, options, freeze(source), on_error, shard_frames)
    fields = {
        "sector": identity.sector,
        "camera": identity.camera,
        "ccd": identity.ccd,
        **options.as_dict(),
        "shard_frames": shard_frames,
        "frames": len(table),
        "frames_digest": hashlib.sha256("\n".join(table["ffi"]).encode()).hexdigest()[:16],
    }
    missing = shards(len(table), shard_frames)
    steps: tuple[str, ...] = ("survey", "scene", "template")
    found = None if overwrite else read_fields(group)
    if found is not None:
        check_fields(group, found, fields)
        steps = tuple(
            step
            for step, done in (
                ("survey", marker(group.child("survey"), "complete")),
                ("scene", marker(group.child("scene"), "complete")),
                ("template", found.get("template")),
            )
            if not done
        )
        if not steps:
            missing = unwritten_shards(group, shard_frames)
    if "template" in steps:
        _check_ephemeris(options)
    return BuildPlan(job, table, fields, missing, steps, None if bin_hours is None else float(bin_hours))


def _check_ephemeris(options: Options) -> None:
    """Refuse an ephemeris that is not there before hours of work end at it."""
    named = options.angles and options.ephemeris not in {"table", "horizons"}
    if named and not Path(options.ephemeris).is_file():
        raise ValueError(f"ephemeris={options.ephemeris!r}: there is no such file")


def _check_bin_hours(bin_hours: float, table: pd.DataFrame) -> None:
    """Refuse bins that hold no more than one frame, before anything is read."""
    spacing = 24 * frame_spacing(table["start"].to_numpy())
    number = isinstance(bin_hours, int | float | np.number) and np.isfinite(bin_hours)
    if not number or bin_hours <= 1.01 * spacing:
        raise ValueError(
            f"bin_hours={bin_hours!r} is not allowed: it must be more than the {spacing:.3g} hours "
            "from frame to frame"
        )


def _slice_text(frames: slice) -> str:
    return ":".join("" if part is None else str(part) for part in (frames.start, frames.stop, frames.step))


def _options(options: Options | None, reduction: dict[str, Any]) -> Options:
    """Options given whole or one by one."""
    if options is None:
        unknown = sorted(set(reduction) - set(Options.__dataclass_fields__))
        if unknown:
            allowed = ", ".join(Options.__dataclass_fields__)
            known = [*Options.__dataclass_fields__, *(plan_build.__kwdefaults__ or {})]
            near = difflib.get_close_matches(unknown[0], known, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"unknown option {unknown[0]!r}: {hint}allowed are {allowed}")
        return Options(**reduction)
    if reduction:
        raise ValueError(f"options and {sorted(reduction)[0]!r} are both given: put it into options")
    return options
