"""The job: all FFIs of a CCD into a group of a store, shard by shard, in this process or on a cluster.

One task is one shard of 64 frames: it reads them ahead with a few threads, reduces them one by one, writes
the shard and then its `frame_status`. What is done stays done; running the job again does the rest.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd
import xarray as xr

from tessbkg.catalog import ROOT, list_ffis, single_ccd
from tessbkg.ccd import CCD, FIRST_SCIENCE_COLUMN, SCIENCE_SHAPE
from tessbkg.dataset import (
    SHARD_FRAMES,
    Options,
    add_sky,
    choose_bright_frames,
    choose_noise_frames,
    describe,
    expected_noise,
    noise_of,
    plan_of,
    reduce_or_blank,
    static_variables,
)
from tessbkg.errors import ClusterError, FFIFormatError, FFIReadError, StoreError, TessbkgError
from tessbkg.ffi import FFI, SCIENCE_END, FFIHeader, FrameStatus, error_status, read_ffi_from
from tessbkg.geometry import ATTRS, angle_maps
from tessbkg.reduce import Plan
from tessbkg.scene import Mask, Scene, make_scene
from tessbkg.stack import (
    OnError,
    bin_coordinates,
    check_on_error,
    frame_coordinates,
    pixel_coordinates,
    reference_wcs,
)
from tessbkg.storage import (
    FrozenOptions,
    check_options,
    check_url,
    filesystem,
    freeze,
    path_of,
    source_options,
    tally,
    thaw,
)
from tessbkg.storage import Options as StorageOptions
from tessbkg.store import (
    Group,
    begin_report,
    check_fields,
    create_group,
    dataset_to_table,
    empty_variable,
    marker,
    read_array,
    read_child,
    read_fields,
    read_rows,
    set_attributes,
    shards,
    sizes_and_digests,
    table_to_dataset,
    unwritten_shards,
    write_child,
    write_rows,
    write_shard,
    write_template,
)
from tessbkg.survey import choose_dark, finish_survey, reject, survey_frames
from tessbkg.validate import doubts, scatter

if TYPE_CHECKING:
    from distributed import Client

logger = logging.getLogger(__name__)

READ_AHEAD: Final = 3
"""Frames on their way while one is reduced. Of 1 to 6, three were the fastest on two S3 servers."""

SURVEY_TASKS: Final = 8
SURVEY_FRAMES: Final = 256
"""The survey of a CCD is cut into this many tasks at most, of this many frames at least."""

RETRIES: Final = 2
"""Times that a cluster tries a task again whose worker died or whose store failed."""

MAPS: Final = ("earth_angle", "earth_azimuth", "moon_angle", "moon_azimuth")
"""Variables on (time, y, x) beside the light."""

FILE_BYTES: Final = 35_547_840
"""Size of an FFI with headers of the usual length."""

SURVEY_SHARE: Final = 0.025
"""Share of a frame's science bytes that the survey reads: the header and three bands of 16 rows."""

NOISE_FRAMES: Final = 4
"""Frames read with their uncertainties to fit the noise law."""

SCENE_BYTES: Final = 60_000_000
"""Scene, error and mask, and what is prepared of them."""

WORKER_ENVIRONMENT: Final = {
    "MALLOC_TRIM_THRESHOLD_": 2 << 30,
    "MALLOC_MMAP_THRESHOLD_": 1 << 30,
    "MALLOC_TOP_PAD_": 64 << 20,
    "MALLOC_ARENA_MAX": 1,
}
"""Settings of glibc for a worker: keep freed frame-sized buffers, and where every thread finds them. With one
arena for each thread a worker took 900 MB instead of 600."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Job:
    """What every task of one CCD's build needs to know: small, plain, the same for all.

    Parameters
    ----------
    ccd : CCD
    group : Group
        Where the result goes.
    options : Options
        What the reduction does.
    source : FrozenOptions
        fsspec options of the source.
    on_error : {"flag", "raise"}
    shard_frames : int
    """

    ccd: CCD
    group: Group
    options: Options
    source: FrozenOptions
    on_error: OnError
    shard_frames: int


@dataclass(frozen=True, eq=False)
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
    """

    job: Job
    frames: pd.DataFrame
    fields: dict[str, Any]
    missing: list[tuple[int, int]]
    steps: tuple[str, ...]

    @property
    def tasks(self) -> int:
        """Tasks that a cluster gets."""
        survey = len(_survey_parts(len(self.frames))) if "survey" in self.steps else 0
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
            f"tasks         {self.tasks} of up to {job.shard_frames} frames, "
            f"about {memory / 1e6:,.0f} MB of memory each",
            f"done already  {len(total) - len(self.missing)} of {len(total)} shards"
            + (f"; to do first: {', '.join(self.steps)}" if self.steps else ""),
        ]
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class Report:
    """What a build did.

    Parameters
    ----------
    ccd : CCD
    store : str
        Store and group.
    frames : pandas.DataFrame
        One row a frame: `ffi`, `status`, `reason`, `seconds`, `nbytes`, `retries` (failed reads that were
        tried again), `scatter` (noise between neighbouring bins over their error bars; NaN if not good).
    seconds : float
        Wall time of this run.
    shards_done : int
        Shards that this run wrote; 0 when everything was there.
    nbytes : int
        Bytes that this run read in its second pass.
    notes : tuple of str
        What else a user should know, such as why there are no angles.
    """

    ccd: CCD
    store: str
    frames: pd.DataFrame
    seconds: float
    shards_done: int
    nbytes: int
    notes: tuple[str, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """Frames by status."""
        statuses = self.frames["status"].value_counts().sort_index()
        return {
            FrameStatus(int(status)).name.lower(): int(n)
            for status, n in zip(statuses.index.to_numpy(), statuses, strict=True)
        }

    @property
    def bad(self) -> pd.DataFrame:
        """Frames that are neither good nor rejected by quality."""
        return self.frames[~self.frames["status"].isin([FrameStatus.GOOD, FrameStatus.REJECTED])]

    def summary(self) -> str:
        """Say in a few lines what became of the frames."""
        counts = ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in self.counts.items())
        lines = [f"{self.ccd}: {len(self.frames):,} frames ({counts})"]
        shown = self.bad.head(10)
        lines += [f"  {row.ffi}: {row.reason}" for row in shown.itertuples()]
        if len(self.bad) > len(shown):
            lines.append(f"  and {len(self.bad) - len(shown)} more")
        if self.shards_done:
            rate = self.nbytes / 1e6 / self.seconds
            lines.append(f"{self.seconds:.1f} s, {self.nbytes / 1e6:,.0f} MB read, {rate:,.0f} MB/s")
        else:
            lines.append("everything was there already: no pixel was read")
        lines += [f"note: {note}" for note in self.notes]
        lines.append(f"store: {self.store}")
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
    return BuildPlan(job, table, fields, missing, steps)


def _slice_text(frames: slice) -> str:
    return ":".join("" if part is None else str(part) for part in (frames.start, frames.stop, frames.step))


def _options(options: Options | None, reduction: dict[str, Any]) -> Options:
    """Options given whole or one by one."""
    if options is None:
        unknown = sorted(set(reduction) - set(Options.__dataclass_fields__))
        if unknown:
            allowed = ", ".join(Options.__dataclass_fields__)
            raise ValueError(f"unknown option {unknown[0]!r}: allowed are {allowed}")
        return Options(**reduction)
    if reduction:
        raise ValueError(f"options and {sorted(reduction)[0]!r} are both given: put it into options")
    return options


def build(
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
    client: Client | None = None,
    progress: Progress | None = None,
    **reduction: Any,
) -> Report:
    """Reduce all FFIs of one CCD into a group of a Zarr store; go on where an earlier run ended.

    Parameters
    ----------
    store : str
        Folder or URL of the store; several CCDs share one, built in any order.
    sector, camera, ccd : int
        Which CCD. Optional with `files` that are of one CCD.
    files : str, iterable of str or pandas.DataFrame, optional
        Instead of a listing: paths or URLs, a glob, a folder, or a table of :func:`tessbkg.list_ffis`.
    root : str
        URL of the folder that holds `ffi/`.
    frames : slice, optional
        Only these frames, counted in order of time.
    options : Options, optional
        What the reduction does; or its fields one by one: ``bin=16, statistic="whole", ...``.
    shard_frames : int
        Frames of a shard: the unit of work, of storage and of resuming.
    on_error : {"flag", "raise"}
        What a frame that cannot be read does: become NaN with a status and a row in the report, or stop
        the job.
    storage_options, store_options : dict, optional
        fsspec options of the source and of the store. Reading from S3 is anonymous by default; the store uses
        the usual AWS settings. Never credentials.
    overwrite : bool
        Delete this CCD's group and start over.
    client : distributed.Client, optional
        Cluster that does the work; this process does it without.
    progress : callable, optional
        Called with the name of a step, tasks done and tasks in all.

    Returns
    -------
    Report

    Raises
    ------
    CatalogError
        If no frames are found.
    FFIReadError
        If not one frame can be read, or with `on_error="raise"` one cannot.
    StoreMismatchError
        If the store has this CCD made with other parameters.
    StoreError
        If the store cannot be written.
    ValueError
        If an argument is wrong.

    Examples
    --------
    >>> import tessbkg.simulate
    >>> _ = tessbkg.simulate.simulate("memory://job", frames=5, shape=(64, 64))
    >>> report = build("memory://job.zarr", sector=1, camera=1, ccd=4, root="memory://job", dark_frames=2)
    >>> sum(report.counts.values())
    5
    """
    plan = plan_build(
        store,
        sector=sector,
        camera=camera,
        ccd=ccd,
        files=files,
        root=root,
        frames=frames,
        options=options,
        shard_frames=shard_frames,
        on_error=on_error,
        storage_options=storage_options,
        store_options=store_options,
        overwrite=overwrite,
        **reduction,
    )
    return run_build(plan, client=client, overwrite=overwrite, progress=progress)


def run_build(
    plan: BuildPlan,
    *,
    client: Client | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Do what a plan says; see :func:`build`."""
    began = time.perf_counter()
    job, tell = plan.job, progress or (_silent)
    if not plan.missing and not plan.steps and marker(job.group.child("report"), "objects"):
        return _report(plan, read_rows(job.group, "report"), [], began)
    create_group(job.group, plan.fields, overwrite=overwrite)
    survey = _survey_step(plan, client, tell)
    tell("scene", 0, 1)
    _run(client, [(make_scene_group, (job,))], None)
    tell("scene", 1, 1)
    begin_report(job.group)
    if not marker(job.group, "template"):
        write_template(job.group, make_template(job, survey), job.shard_frames)
    parts = plan.missing if not plan.steps else unwritten_shards(job.group, job.shard_frames)
    done = len(shards(len(plan.frames), job.shard_frames)) - len(parts)
    _run(
        client,
        [(reduce_shard, (job, first, last)) for first, last in spread(parts)],
        lambda finished: tell("reduce", done + finished, done + len(parts)),
    )
    rows = _shard_rows(job.group, len(plan.frames), job.shard_frames)
    warnings = _doubts(job, survey, rows)
    set_attributes(job.group, complete=1, **({"warnings": warnings} if warnings else {}))
    write_rows(job.group, "report", rows, objects=sizes_and_digests(job.group))
    return _report(plan, rows, parts, began)


def _silent(*_: object) -> None:
    """Tell nobody about progress."""


def _doubts(job: Job, survey: pd.DataFrame, rows: list[dict[str, Any]]) -> list[str]:
    """Say what a scientist should look at before using a build."""
    scene, n_pixels = read_child(job.group, "scene"), read_array(job.group, "n_pixels")
    assert scene is not None  # the shards were made with it
    assert n_pixels is not None
    return doubts(
        survey,
        rows,
        dark_frames=list(scene.attrs["dark_frames"]),
        wanted=job.options.dark_frames,
        unmasked=n_pixels / job.options.bin**2,
        misfit=marker(job.group, "wcs_misfit_deg"),
    )


def _report(
    plan: BuildPlan, rows: list[dict[str, Any]], parts: list[tuple[int, int]], began: float
) -> Report:
    return Report(
        plan.job.ccd,
        plan.job.group.name,
        _table_of(rows),
        time.perf_counter() - began,
        len(parts),
        sum(row["nbytes"] for first, last in parts for row in rows[first:last]),
        _notes(plan.job.group),
    )


def _shard_rows(group: Group, frames: int, shard_frames: int) -> list[dict[str, Any]]:
    """Collect the rows that the shards left; those of a shard that is not written are not there."""
    with ThreadPoolExecutor(16) as pool:
        parts = pool.map(lambda part: read_rows(group, _rows_of(part[0])), shards(frames, shard_frames))
        return [row for part in parts for row in part]


def read_report(
    store: str, *, sector: int, camera: int, ccd: int, store_options: StorageOptions | None = None
) -> pd.DataFrame:
    """Read what became of every frame of a CCD's build.

    Parameters
    ----------
    store : str
        Folder or URL.
    sector, camera, ccd : int
    store_options : dict, optional
        fsspec options of the store. Never credentials.

    Returns
    -------
    pandas.DataFrame
        One row a frame, in order of time; of a build that is not finished, the frames of its finished
        shards. `ffi`; `status`, a :class:`~tessbkg.ffi.FrameStatus`; `reason`; `seconds` spent; `nbytes`
        read; `retries`, failed reads that were tried again; `scatter`, the noise between neighbouring bins
        over their error bars (1 if the error bars are right), NaN if the frame is not good.

    Raises
    ------
    StoreError
        If there is no such group.

    Examples
    --------
    >>> import tessbkg, tessbkg.simulate
    >>> _ = tessbkg.simulate.simulate("memory://report", frames=4, shape=(64, 64))
    >>> _ = tessbkg.build("memory://r.zarr", sector=1, camera=1, ccd=4, root="memory://report", dark_frames=2)
    >>> len(read_report("memory://r.zarr", sector=1, camera=1, ccd=4))
    4
    """
    group = Group.of(store, CCD(sector, camera, ccd), store_options)
    attrs = read_fields(group)
    if attrs is None:
        raise StoreError(f"{store} has no {CCD(sector, camera, ccd)}")
    fields = json.loads(attrs["fields"])
    rows = read_rows(group, "report") or _shard_rows(group, fields["frames"], fields["shard_frames"])
    return _table_of(rows)


COLUMNS: Final = ("ffi", "status", "reason", "seconds", "nbytes", "retries", "scatter")
"""What a report says of a frame."""


def _table_of(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Turn rows of a report into a table."""
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"scatter": np.float64})


def _notes(group: Group) -> tuple[str, ...]:
    """Read from the attributes of a group what a user should know."""
    angles = str(marker(group, "angles") or "")
    without = (
        (f"the store has no angles ({angles.removeprefix('none: ')})",) if angles.startswith("none") else ()
    )
    return (*without, *(marker(group, "warnings") or ()))


def _rows_of(first: int) -> str:
    """Name of the child group with the report of the shard that begins with frame `first`."""
    return f"report/{first:06d}"


def spread(parts: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Order shards so that neighbours run far apart: workers do not crowd one day's prefix."""
    bits = max(len(parts) - 1, 0).bit_length()
    order = sorted(range(len(parts)), key=lambda i: int(f"{i:0{bits}b}"[::-1], 2) if bits else 0)
    return [parts[i] for i in order]


def _run(
    client: Client | None,
    calls: list[tuple[Callable[..., Any], tuple[Any, ...]]],
    finished: Callable[[int], None] | None,
) -> list[Any]:
    """Run independent calls here or on a cluster; results in order. The first error ends all.

    Raises
    ------
    ClusterError
        If the scheduler is lost, or workers die again and again in the same task.
    """
    results: list[Any] = [None] * len(calls)
    count = finished or _silent
    count(0)
    if client is None:
        for i, (function, arguments) in enumerate(calls):
            results[i] = function(*arguments)
            count(i + 1)
        return results
    from concurrent.futures import CancelledError  # noqa: PLC0415

    from distributed import as_completed  # noqa: PLC0415 (slow to import)

    futures: list[Any] = []
    try:
        futures += [
            client.submit(function, *arguments, pure=False, retries=RETRIES, key=_key(function, i, arguments))
            for i, (function, arguments) in enumerate(calls)
        ]
        place = {future.key: i for i, future in enumerate(futures)}
        for number, future in enumerate(as_completed(futures)):
            results[place[future.key]] = future.result()
            count(number + 1)
    except TessbkgError:
        raise
    except (Exception, CancelledError) as error:
        reason = f"{type(error).__name__}: {error}".split("\n")[0][:300]
        raise ClusterError(f"the cluster could not do the work: {reason}") from error
    finally:
        if client.status == "running":
            client.cancel([future for future in futures if not future.done()])
    return results


def _key(function: Callable[..., Any], i: int, arguments: tuple[Any, ...]) -> str:
    """Name a task so that the dashboard groups it and two builds do not share it."""
    job = next(one for one in arguments if isinstance(one, Job))
    return f"{function.__name__}-{job.ccd.group.replace('/', '-')}-{i:04d}-{time.time_ns():x}"


# --- survey, scene, template ---------------------------------------------------------------------------


def _survey_parts(n: int) -> list[slice]:
    size = max(SURVEY_FRAMES, -(-n // SURVEY_TASKS))
    return [slice(first, first + size) for first in range(0, n, size)]


def _survey_step(plan: BuildPlan, client: Client | None, tell: Progress) -> pd.DataFrame:
    """Take the survey from the store, or make it."""
    job = plan.job
    stored = read_child(job.group, "survey")
    if stored is not None:
        return dataset_to_table(stored)
    parts = _survey_parts(len(plan.frames))
    pieces = _run(
        client,
        [(survey_part, (job, plan.frames.iloc[part])) for part in parts],
        lambda finished: tell("survey", finished, len(parts)),
    )
    survey = reject(finish_survey(pieces), job.options.drop_quality)
    broken = survey[~survey["status"].isin([FrameStatus.GOOD, FrameStatus.REJECTED])]
    if job.on_error == "raise" and not broken.empty:
        raise FFIReadError(broken.iloc[0]["url"], broken.iloc[0]["reason"])
    write_child(job.group, "survey", table_to_dataset(survey))
    return survey


def survey_part(job: Job, frames: pd.DataFrame) -> pd.DataFrame:
    """Survey some frames: a task."""
    return survey_frames(frames, storage_options=thaw(job.source))


def make_scene_group(job: Job) -> None:
    """Make the scene of a CCD and write it into the group, unless it is there: a task."""
    if marker(job.group.child("scene"), "complete"):
        return
    survey = read_survey(job)
    dark = choose_dark(survey, job.options.dark_frames)
    noise_frames = choose_noise_frames(survey, dark)
    noise = _fit_noise(job, survey.iloc[noise_frames])
    stack = np.empty((len(dark), *survey.loc[dark[0], ["rows", "columns"]].astype(int)), dtype=np.float32)
    kept: list[str] = []
    for i, frame, _ in read_ahead(job, survey.iloc[dark], ahead=2):
        if isinstance(frame, FFI) and np.any(frame.flux > 0):
            stack[len(kept)] = frame.flux
            kept.append(str(survey["ffi"].iloc[dark[i]]))
    if not kept:
        raise FFIReadError(str(survey["url"].iloc[dark[0]]), "none of the dark frames could be read")
    chosen = survey.iloc[choose_bright_frames(survey, dark)]
    bright = (
        []
        if chosen.empty
        else [frame.flux for _, frame, _ in read_ahead(job, chosen, ahead=2) if isinstance(frame, FFI)]
    )
    scene = make_scene(
        stack[: len(kept)],
        noise or expected_noise(float(survey["exposure"].median())),
        bright=np.stack(bright) if bright else None,
        options=job.options.mask,
        first_column=int(survey["first_column"].max()) - FIRST_SCIENCE_COLUMN,
        dark_frames=tuple(kept),
    )
    write_child(job.group, "scene", scene_to_dataset(scene))


def _fit_noise(job: Job, survey: pd.DataFrame) -> tuple[float, float] | None:
    """Fit the noise law to a sample of the pixels of some frames."""
    sample = [
        (frame.flux[::7, ::7].copy(), frame.flux_err[::7, ::7].copy())
        for _, frame, _ in read_ahead(job, survey, errors=True, ahead=1)
        if isinstance(frame, FFI) and frame.flux_err is not None
    ]
    return noise_of(*(np.stack(images) for images in zip(*sample, strict=True))) if sample else None


def scene_to_dataset(scene: Scene) -> xr.Dataset:
    """Put a scene into variables."""
    dims = ("row", "column")
    dataset = xr.Dataset(
        {
            "flux": (dims, scene.flux, {"units": "electron s-1", "long_name": "static scene"}),
            "flux_err": (
                dims,
                scene.error,
                {"units": "electron s-1", "long_name": "one-sigma error of flux"},
            ),
            "mask": (
                dims,
                scene.mask,
                {
                    "long_name": "why a pixel is masked",
                    "flag_masks": np.array([bit.value for bit in Mask], dtype="u1"),
                    "flag_meanings": " ".join(str(bit.name).lower() for bit in Mask),
                },
            ),
        },
        attrs={"noise": list(scene.noise), "dark_frames": list(scene.dark_frames)},
    )
    if scene.terms is not None:
        what = "what a pixel gains when stars move along rows, columns; second-order terms yy, yx, xx"
        dataset["terms"] = (("term", *dims), scene.terms, {"units": "electron s-1", "long_name": what})
    if scene.response is not None:
        what = "response of a column to light"
        dataset["response"] = ("column", scene.response, {"units": "1", "long_name": what})
    return dataset


def scene_of_dataset(dataset: xr.Dataset) -> Scene:
    """Take a scene out of variables."""
    a, b = dataset.attrs["noise"]
    return Scene(
        dataset["flux"].to_numpy(),
        dataset["flux_err"].to_numpy(),
        dataset["mask"].to_numpy(),
        (float(a), float(b)),
        tuple(dataset.attrs["dark_frames"]),
        dataset["terms"].to_numpy() if "terms" in dataset else None,
        dataset["response"].to_numpy() if "response" in dataset else None,
    )


def read_survey(job: Job) -> pd.DataFrame:
    """Survey of a CCD as the store has it.

    Raises
    ------
    StoreError
        If it is not there.
    """
    stored = read_child(job.group, "survey")
    if stored is None:
        raise StoreError(f"{job.group.name} has no survey")
    return dataset_to_table(stored)


def make_template(job: Job, survey: pd.DataFrame) -> xr.Dataset:
    """Make the Dataset of a CCD without the values that shards bring."""
    stored = read_child(job.group, "scene")
    if stored is None:
        raise StoreError(f"{job.group.name} has no scene")
    scene = scene_of_dataset(stored)
    plan = plan_of(scene, job.options)
    along_time = frame_coordinates(survey)
    status = along_time.pop("frame_status")
    del along_time["url"]  # the place of the source is its owner's; the survey has it for checks
    shape = (len(survey), *plan.shape)
    empty = empty_variable(shape, "f4", np.nan)
    template = xr.Dataset(
        {
            "scattered_light": (("time", "y", "x"), empty),
            "scattered_light_err": (("time", "y", "x"), empty),
            "frame_status": ("time", empty_variable(shape[:1], "u1", FrameStatus.NOT_WRITTEN), status.attrs),
            **static_variables(plan),
        },
        coords={
            **along_time,
            **bin_coordinates(pixel_coordinates(survey, scene.flux.shape), job.options.bin),
        },
        attrs={
            **asdict(job.ccd),
            "wcs": reference_wcs(survey, thaw(job.source)),
        },
    )
    template = add_sky(describe(template, job.options, scene.dark_frames), job.options, maps=False)
    if "earth_direction" in template:
        template["xyz"] = template["xyz"].astype(object)  # Zarr v3 has no type for text of fixed length
        for name in MAPS:
            template[name] = (("time", "y", "x"), empty, ATTRS[name])
    return template


# --- shards ----------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def prepared(job: Job) -> tuple[pd.DataFrame, Plan]:
    """Survey and plan of a CCD, read once a process."""
    stored = read_child(job.group, "scene")
    if stored is None:
        raise StoreError(f"{job.group.name} has no scene")
    return read_survey(job), plan_of(scene_of_dataset(stored), job.options)


def reduce_shard(job: Job, first: int, last: int) -> None:
    """Reduce the frames of one shard and write them: a task."""
    survey, plan = prepared(job)
    part = survey.iloc[first:last]
    both, rows = reduce_frames(job, part, plan)
    write_rows(job.group, _rows_of(first), rows)
    status = np.array([row["status"] for row in rows], dtype=np.uint8)
    variables = {"scattered_light": both[0], "scattered_light_err": both[1], **_maps(job, first, last)}
    write_shard(job.group, first, last, variables, status)
    logger.info("%s: frames %d to %d written", job.group.name, first, last - 1)


def _maps(job: Job, first: int, last: int) -> dict[str, npt.NDArray[np.float32]]:
    """Angle maps of the frames of one shard, from the directions that the template holds."""
    maps: dict[str, npt.NDArray[np.float32]] = {}
    pixel = read_array(job.group, "pixel_direction")
    for body in ("earth", "moon"):
        direction = read_array(job.group, f"{body}_direction", slice(first, last))
        if pixel is None or direction is None:
            return {}
        maps[f"{body}_angle"], maps[f"{body}_azimuth"] = angle_maps(direction, pixel)
    return maps


def reduce_frames(
    job: Job, survey: pd.DataFrame, plan: Plan
) -> tuple[np.ndarray[Any, np.dtype[np.float32]], list[dict[str, Any]]]:
    """Read and reduce frames, one after the other.

    Returns
    -------
    both : (2, time, ny, nx) float32
        Values and errors; NaN where a frame is not good.
    rows : list of dict
        The report: see :func:`read_report`.
    """
    both = np.full((2, len(survey), *plan.shape), np.nan, dtype=np.float32)
    rows = []
    before = time.perf_counter()
    for i, frame, retries in read_ahead(job, survey, errors=job.options.errors == "uncert"):
        status, reason, nbytes = FrameStatus(int(survey["status"].iloc[i])), str(survey["reason"].iloc[i]), 0
        if isinstance(frame, FFIReadError):
            status, reason = error_status(frame), frame.reason
        elif frame is not None:
            status, both[:, i] = reduce_or_blank(frame.flux, plan, frame.flux_err)
            reason = "nothing but zero and NaN" if status is FrameStatus.BLANK else ""
            nbytes = frame.nbytes
        now = time.perf_counter()
        rows.append(
            {
                "ffi": str(survey["ffi"].iloc[i]),
                "status": int(status),
                "reason": reason,
                "seconds": round(now - before, 4),
                "nbytes": nbytes,
                "retries": retries,
                "scatter": scatter(*both[:, i]) if status is FrameStatus.GOOD else None,
            }
        )
        before = now
    return both, rows


_SURVEYED: Final = {"time": "time", "barycorr": "BARYCORR", "cadence": "FFIINDEX", "quality": "DQUALITY"}
"""What must be the same in both passes, and its name for people."""


def check_surveyed(header: FFIHeader, row: Mapping[str, Any], key: str) -> None:
    """Refuse a file whose header is not the one that the survey saw: it was replaced meanwhile.

    Raises
    ------
    FFIFormatError
    """
    for name, keyword in _SURVEYED.items():
        if getattr(header, name) != row[name]:
            raise FFIFormatError(
                key, f"changed since the survey: {keyword} {getattr(header, name)}, was {row[name]}"
            )
    place = (*header.science_shape, header.region[0], header.region[2])
    seen = (row["rows"], row["columns"], row["first_row"], row["first_column"])
    if place != seen:
        raise FFIFormatError(
            key,
            f"changed since the survey: {place[0]} x {place[1]} science pixels, were {seen[0]} x {seen[1]}",
        )


def read_ahead(
    job: Job, survey: pd.DataFrame, *, errors: bool = False, ahead: int = READ_AHEAD
) -> Iterator[tuple[int, FFI | FFIReadError | None, int]]:
    """Read frames in order, a few ahead; None for those whose status is not good.

    A frame on its way takes 35 MB, twice that with errors: bytes and pixels. The scene, which holds all dark
    frames, has fewer on their way.

    Yields
    ------
    i : int
    frame : FFI, FFIReadError or None
    retries : int
        Failed reads that were tried again.

    Raises
    ------
    FFIReadError
        If a frame cannot be read and the job is to raise.
    """
    table: list[Any] = survey.to_dict("records")
    good = [row["status"] == FrameStatus.GOOD for row in table]
    fs, _ = filesystem(table[0]["url"], source_options(table[0]["url"], thaw(job.source)))

    def read(row: Mapping[str, Any]) -> tuple[FFI | FFIReadError, int]:
        before = tally.retries
        try:
            path = path_of(fs, row["url"])
            frame = read_ffi_from(fs, path, errors=errors, end=row["end"], ccd=job.ccd)
            check_surveyed(frame.header, row, row["url"])
        except FFIReadError as error:
            return error, tally.retries - before
        return frame, tally.retries - before

    pool = ThreadPoolExecutor(ahead)
    pending: dict[int, Future[tuple[FFI | FFIReadError, int]]] = {}
    waiting = iter([i for i in range(len(table)) if good[i]])
    try:
        for i in range(len(table)):
            while len(pending) < ahead and (nxt := next(waiting, None)) is not None:
                pending[nxt] = pool.submit(read, table[nxt])
            frame, retries = pending.pop(i).result() if i in pending else (None, 0)
            if job.on_error == "raise" and isinstance(frame, FFIReadError):
                raise frame
            yield i, frame, retries
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # a stalled read must not hold who stops


# --- clusters ----------------------------------------------------------------------------------------------


@contextmanager
def local_cluster(workers: int) -> Iterator[Client]:
    """Start a cluster of single-thread processes on this machine's loopback address.

    The environment of the workers keeps freed memory with the process: the default of dask gives every
    frame-sized buffer back to the system, which halves the throughput.
    """
    import dask  # noqa: PLC0415
    from distributed import Client, LocalCluster  # noqa: PLC0415

    environment = "distributed.nanny.pre-spawn-environ"
    with (
        dask.config.set({f"{environment}.{name}": value for name, value in WORKER_ENVIRONMENT.items()}),
        LocalCluster(
            n_workers=workers, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0"
        ) as cluster,
        Client(cluster) as client,
    ):
        client.register_plugin(_deaf(), name="tessbkg-deaf")
        yield client


def _deaf() -> Any:
    """Make a plugin that keeps workers from the terminal's Ctrl-C: their client ends them in good order."""
    from distributed import WorkerPlugin  # noqa: PLC0415

    class Deaf(WorkerPlugin):
        def setup(self, worker: Any) -> None:  # noqa: ARG002 (of distributed)
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    return Deaf()
