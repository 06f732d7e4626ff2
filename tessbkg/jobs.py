"""The job: all FFIs of a CCD into a group of a store, shard by shard, in this process or on a cluster.

One task is one shard of 64 frames: it reads them ahead with a few threads, reduces them one by one, writes
the shard and then its `frame_status`. What is done stays done; running the job again does the rest.
"""

from __future__ import annotations

import json
import logging
import signal
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from tessbkg.catalog import ROOT
from tessbkg.ccd import CCD
from tessbkg.dataset import (
    SHARD_FRAMES,
    Options,
)
from tessbkg.errors import ClusterError, FFIReadError, StoreMismatchError, TessbkgError
from tessbkg.ffi import FrameStatus
from tessbkg.stack import (
    OnError,
)
from tessbkg.storage import Options as StorageOptions
from tessbkg.store import (
    BINNED,
    NOT_WRITTEN,
    Group,
    begin_report,
    create_group,
    dataset_to_table,
    delete_group,
    marker,
    read_array,
    read_child,
    read_fields,
    read_objects,
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
from tessbkg.survey import finish_survey, reject
from tessbkg.validate import doubts

if TYPE_CHECKING:
    from distributed import Client

from tessbkg.plan import BuildPlan, plan_build, survey_parts
from tessbkg.tasks import (
    Job,
    bin_shard,
    make_binned_template,
    make_scene_group,
    make_template,
    reduce_shard,
    rows_of,
    survey_part,
)

RETRIES: Final = 2
"""Times that a cluster tries a task again whose worker died or whose store failed."""

WORKER_ENVIRONMENT: Final = {
    "MALLOC_TRIM_THRESHOLD_": 2 << 30,
    "MALLOC_MMAP_THRESHOLD_": 1 << 30,
    "MALLOC_TOP_PAD_": 64 << 20,
    "MALLOC_ARENA_MAX": 1,
}
"""Settings of glibc for a worker: keep freed frame-sized buffers, and where every thread finds them. With one
arena for each thread a worker took 900 MB instead of 600."""

FAILED: Final = (FrameStatus.MISSING, FrameStatus.UNREADABLE, FrameStatus.BAD_HEADER)
"""What may be otherwise when it is tried again."""

COLUMNS: Final = ("ffi", "status", "reason", "seconds", "nbytes", "retries", "scatter")
"""What a report says of a frame."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False, repr=False)
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

    def __repr__(self) -> str:
        return self.summary()

    def summary(self) -> str:
        """Say in a few lines what became of the frames."""
        counts = ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in self.counts.items())
        lines = [f"{self.ccd}: {len(self.frames):,} frames ({counts})"]
        shown = self.bad.head(10)
        lines += [f"  {row.ffi}: {row.reason}" for row in shown.itertuples()]
        if len(self.bad) > len(shown):
            lines.append(f"  and {len(self.bad) - len(shown)} more")
        if self.bad["status"].isin(FAILED).any():
            lines.append("  retry_failed (--retry-failed) tries again what was missing, unreadable or broken")
        if self.shards_done:
            rate = self.nbytes / 1e6 / self.seconds
            lines.append(f"{self.seconds:.1f} s, {self.nbytes / 1e6:,.0f} MB read, {rate:,.0f} MB/s")
        else:
            lines.append("everything was there already: no pixel was read")
        lines += [f"note: {note}" for note in self.notes]
        lines.append(f"store: {self.store}")
        return "\n".join(lines)


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
    retry_failed: bool = False,
    client: Client | None = None,
    progress: Progress | None = None,
    bin_hours: float | None = None,
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
    retry_failed : bool
        Survey the frames that are missing, unreadable or of a bad header again and do their shards anew. The
        scene stays: where a dark frame was lost, `overwrite` is the way to have it.
    client : distributed.Client, optional
        Cluster that does the work; this process does it without.
    progress : callable, optional
        Called with the name of a step, tasks done and tasks in all.
    bin_hours : float, optional
        Write the averages of :func:`tessbkg.bin_time` too, into the child group `binned`; open them with
        ``open_background(..., binned=True)``. A store that has them keeps them up to date; another length
        replaces them.

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
        bin_hours=bin_hours,
        **reduction,
    )
    return run_build(plan, client=client, overwrite=overwrite, retry_failed=retry_failed, progress=progress)


def run_build(
    plan: BuildPlan,
    *,
    client: Client | None = None,
    overwrite: bool = False,
    retry_failed: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Do what a plan says; see :func:`build`."""
    began = time.perf_counter()
    job, tell = replace(plan.job, run=uuid.uuid4().hex), progress or _silent
    if client is not None:
        _check_reachable(client, {job.group.url, *plan.frames["url"].iloc[:1]})
    retried = retry_failed and not overwrite and _forget_failed(job, plan.frames, client)
    hours = plan.bin_hours or (None if overwrite else marker(job.group.child(BINNED), "time_bin_hours"))
    sealed = marker(job.group.child("report"), "objects")
    if not (plan.missing or plan.steps or retried) and sealed and _is_binned(job, hours):
        return _report(plan, read_rows(job.group, "report"), [], began)
    create_group(job.group, plan.fields, overwrite=overwrite)
    survey = _survey_step(job, plan.frames, client, tell)
    if not marker(job.group.child("scene"), "complete"):
        tell("scene", 0, 1)
        _run(client, [(make_scene_group, (job,))], None)
        tell("scene", 1, 1)
    begin_report(job.group)
    if not marker(job.group, "template"):
        write_template(job.group, make_template(job, survey), job.shard_frames)
    parts = unwritten_shards(job.group, job.shard_frames) if plan.steps or retried else plan.missing
    if parts:
        delete_group(job.group.child(BINNED))  # averages of what is about to change
    done = len(shards(len(plan.frames), job.shard_frames)) - len(parts)
    _run(
        client,
        [(reduce_shard, (job, first, last)) for first, last in spread(parts)],
        lambda finished: tell("reduce", done + finished, done + len(parts)),
    )
    rows = _shard_rows(job.group, len(plan.frames), job.shard_frames)
    warnings = _doubts(job, survey, rows)
    set_attributes(job.group, complete=1, warnings=warnings or None)
    if hours is not None:
        _bin_step(job, hours, client, tell)
    write_rows(job.group, "report", rows, objects=sizes_and_digests(job.group))
    return _report(plan, rows, parts, began)


def _is_binned(job: Job, hours: float | None) -> bool:
    """Whether the averages in time that are wanted are there."""
    child = job.group.child(BINNED)
    return hours is None or (bool(marker(child, "complete")) and marker(child, "time_bin_hours") == hours)


def _bin_step(job: Job, hours: float, client: Client | None, tell: Progress) -> None:
    """Write the averages in time of a finished CCD, shard by shard, or go on with it."""
    child = job.group.child(BINNED)
    if marker(child, "time_bin_hours") not in {None, hours}:
        delete_group(child)
    if not marker(child, "template"):
        _run(client, [(make_binned_template, (job, hours))], None)
    parts = unwritten_shards(child, job.shard_frames)
    _run(
        client,
        [(bin_shard, (job, hours, *part)) for part in parts],
        lambda finished: tell("bin", finished, len(parts)),
    )
    set_attributes(child, complete=1)


def _silent(*_: object) -> None:
    """Tell nobody about progress."""


def _check_reachable(client: Client, urls: Iterable[str]) -> None:
    """Refuse what workers cannot see.

    Raises
    ------
    ValueError
    """
    apart = not str(client.scheduler_info()["address"]).startswith("inproc://")
    for url in urls:
        if apart and url.startswith("memory://"):
            raise ValueError(f"{url} is in the memory of this process, which workers of a cluster cannot see")


def _forget_failed(job: Job, frames: pd.DataFrame, client: Client | None) -> bool:
    """Make frames that could not be read look as if nobody had tried; tell whether there are any.

    The shards that have such frames count as not written, and the survey gets their headers anew.
    """
    survey, status = read_child(job.group, "survey"), read_array(job.group, "frame_status")
    if survey is None:
        return False
    table = dataset_to_table(survey)
    failed = table["status"].isin(FAILED).to_numpy()
    if status is not None:
        failed = failed | np.isin(status, FAILED)
    if not failed.any():
        return False
    write_rows(job.group, "report", [])  # without the list of objects: a build that is not finished
    set_attributes(job.group, complete=None, template=None, warnings=None)
    if status is not None:
        for first, last in shards(len(status), job.shard_frames):
            if failed[first:last].any():
                write_shard(job.group, first, last, {}, np.full(last - first, NOT_WRITTEN, dtype=np.uint8))
    set_attributes(job.group.child("survey"), complete=None)
    if marker(job.group.child("scene"), "complete"):  # else the whole survey is made anew
        frames = frames[frames["ffi"].isin(table["ffi"][failed])]
        parts = survey_parts(len(frames))
        pieces = _run(client, [(survey_part, (job, frames.iloc[part])) for part in parts], None)
        again = reject(finish_survey([table[~failed], *pieces]), job.options.drop_quality)
        write_child(job.group, "survey", table_to_dataset(again))
    return True


def _doubts(job: Job, survey: pd.DataFrame, rows: list[dict[str, Any]]) -> list[str]:
    """Say what a scientist should look at before using a build."""
    n_pixels = read_array(job.group, "n_pixels")
    assert n_pixels is not None  # the template has it
    scene = job.group.child("scene")
    return doubts(
        survey,
        rows,
        dark_frames=marker(scene, "dark_frames"),
        unread=marker(scene, "unread") or (),
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
    names = [f"{rows_of(first)}/zarr.json" for first, _ in shards(frames, shard_frames)]
    found = read_objects(group, names, lost=True)
    parts = [json.loads(found[name])["attributes"]["rows"] for name in names if name in found]
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
    StoreMismatchError
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
        raise StoreMismatchError(f"{store} has no {CCD(sector, camera, ccd)}")
    fields = json.loads(attrs["fields"])
    rows = read_rows(group, "report") or _shard_rows(group, fields["frames"], fields["shard_frames"])
    return _table_of(rows)


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


def _survey_step(job: Job, frames: pd.DataFrame, client: Client | None, tell: Progress) -> pd.DataFrame:
    """Take the survey from the store, or make it."""
    stored = read_child(job.group, "survey")
    if stored is not None:
        return dataset_to_table(stored)
    parts = survey_parts(len(frames))
    pieces = _run(
        client,
        [(survey_part, (job, frames.iloc[part])) for part in parts],
        lambda finished: tell("survey", finished, len(parts)),
    )
    survey = reject(finish_survey(pieces), job.options.drop_quality)
    broken = survey[~survey["status"].isin([FrameStatus.GOOD, FrameStatus.REJECTED])]
    if job.on_error == "raise" and not broken.empty:
        raise FFIReadError(broken.iloc[0]["url"], broken.iloc[0]["reason"])
    write_child(job.group, "survey", table_to_dataset(survey))
    return survey


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
            # what it says of tasks that are cancelled
            logging.getLogger("distributed.worker.state_machine").setLevel(logging.ERROR)

    return Deaf()
