"""What one task of a build does: survey some frames, make the scene, reduce one shard.

Tasks run in this process or on a worker; they take a :class:`Job`, a few numbers, and read the rest from the
store. Nothing here knows of a cluster.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd
import xarray as xr

from tessbkg.ccd import CCD, FIRST_SCIENCE_COLUMN
from tessbkg.dataset import (
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
from tessbkg.errors import FFIFormatError, FFIReadError, StoreError
from tessbkg.ffi import FFI, FFIHeader, FrameStatus, error_status, read_ffi_from
from tessbkg.geometry import ATTRS, angle_maps
from tessbkg.reduce import Plan
from tessbkg.scene import Mask, Scene, make_scene, with_response
from tessbkg.stack import (
    OnError,
    bin_coordinates,
    frame_coordinates,
    pixel_coordinates,
    reference_wcs,
)
from tessbkg.storage import (
    FrozenOptions,
    filesystem,
    path_of,
    source_options,
    tally,
    thaw,
)
from tessbkg.store import (
    BINNED,
    Group,
    dataset_to_table,
    empty_variable,
    open_background,
    read_array,
    read_child,
    write_child,
    write_rows,
    write_shard,
    write_template,
)
from tessbkg.survey import choose_dark, survey_frames
from tessbkg.timebins import bin_time
from tessbkg.validate import scatter

logger = logging.getLogger(__name__)

READ_AHEAD: Final = 3
"""Frames on their way while one is reduced. Of 1 to 6, three were the fastest on two S3 servers."""

DARK_ROUNDS: Final = 3
"""Times that dark frames are chosen, each time without those that could not be read."""

MAPS: Final = ("earth_angle", "earth_azimuth", "moon_angle", "moon_azimuth")
"""Variables on (time, y, x) beside the light."""

_SURVEYED: Final = {"time": "time", "barycorr": "BARYCORR", "cadence": "FFIINDEX", "quality": "DQUALITY"}
"""What must be the same in both passes, and its name for people."""


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
    run : str
        Name of this run of the build: what a process keeps in memory is of one run.
    """

    ccd: CCD
    group: Group
    options: Options
    source: FrozenOptions
    on_error: OnError
    shard_frames: int
    run: str = ""


def rows_of(first: int) -> str:
    """Name of the child group with the report of the shard that begins with frame `first`."""
    return f"report/{first:06d}"


def survey_part(job: Job, frames: pd.DataFrame) -> pd.DataFrame:
    """Survey some frames: a task."""
    return survey_frames(frames, storage_options=thaw(job.source))


def make_scene_group(job: Job) -> None:
    """Make the scene of a CCD and write it into the group: a task."""
    survey = read_survey(job)
    dark = choose_dark(survey, job.options.dark_frames)
    noise_frames = choose_noise_frames(survey, dark)
    noise = _fit_noise(job, survey.iloc[noise_frames])
    dark, stack, unread = _read_dark(job, survey, dark)
    first_column = int(survey["first_column"].max()) - FIRST_SCIENCE_COLUMN
    scene = make_scene(
        stack,
        noise or expected_noise(float(survey["exposure"].median())),
        options=job.options.mask,
        first_column=first_column,
        dark_frames=tuple(str(name) for name in survey["ffi"].iloc[dark]),
    )
    del stack  # the most of a worker's memory
    chosen = survey.iloc[choose_bright_frames(survey, dark)]
    bright = [
        frame.flux
        for _, frame, _ in (read_ahead(job, chosen, ahead=2) if len(chosen) else ())
        if isinstance(frame, FFI)
    ]
    scene = with_response(scene, bright, options=job.options.mask, first_column=first_column)
    write_child(job.group, "scene", scene_to_dataset(scene).assign_attrs(unread=unread))
    del scene, chosen, bright
    _trim()


def _trim() -> None:
    """Give memory that is free back to the system, where C's library can: a worker keeps it otherwise."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _read_dark(
    job: Job, survey: pd.DataFrame, dark: npt.NDArray[np.intp]
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float32], list[str]]:
    """Read the dark frames; in place of those that cannot be read, the next-darkest.

    Returns
    -------
    dark : (n,) int
        Positions of the frames that were read.
    stack : (n, rows, columns) float32
    unread : list of str
        Names of frames that were to be dark frames, each with the reason why it is none.

    Raises
    ------
    FFIReadError
        If none could be read.
    """
    url = str(survey["url"].iloc[dark[0]])
    stack = np.empty((len(dark), *survey.loc[dark[0], ["rows", "columns"]].astype(int)), dtype=np.float32)
    reasons: dict[int, str] = {}
    for rounds in range(DARK_ROUNDS):
        if rounds:
            usable = survey.drop(index=list(reasons))
            if not (usable["status"] == FrameStatus.GOOD).any():
                break
            dark = usable.index.to_numpy()[choose_dark(usable.reset_index(drop=True), len(stack))]
        kept: list[int] = []
        for i, frame, _ in read_ahead(job, survey.iloc[dark], ahead=2):
            if isinstance(frame, FFI) and np.any(frame.flux > 0):
                stack[len(kept)] = frame.flux
                kept.append(int(dark[i]))
            else:
                reasons[int(dark[i])] = frame.reason if isinstance(frame, FFIReadError) else "blank"
        if len(kept) == len(dark):
            break
    if not kept:
        raise FFIReadError(url, "none of the dark frames could be read")
    unread = [f"{survey['ffi'].iloc[i]}: {reason}" for i, reason in sorted(reasons.items())]
    return np.array(kept, dtype=np.intp), stack[: len(kept)], unread


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


@functools.lru_cache(maxsize=2)
def read_survey(job: Job) -> pd.DataFrame:
    """Survey of a CCD as the store has it, read once a process.

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
    write_rows(job.group, rows_of(first), rows)
    status = np.array([row["status"] for row in rows], dtype=np.uint8)
    variables = {"scattered_light": both[0], "scattered_light_err": both[1], **_maps(job, first, last)}
    write_shard(job.group, first, last, variables, status)
    logger.info("%s: frames %d to %d written", job.group.name, first, last - 1)


@functools.lru_cache(maxsize=6)
def _direction(job: Job, name: str) -> npt.NDArray[Any] | None:
    """Directions that the template holds, read once a process."""
    return read_array(job.group, f"{name}_direction")


def _maps(job: Job, first: int, last: int) -> dict[str, npt.NDArray[np.float32]]:
    """Angle maps of the frames of one shard."""
    maps: dict[str, npt.NDArray[np.float32]] = {}
    pixel = _direction(job, "pixel")
    for body in ("earth", "moon"):
        direction = _direction(job, body)
        if pixel is None or direction is None:
            return {}
        maps[f"{body}_angle"], maps[f"{body}_azimuth"] = angle_maps(direction[first:last], pixel)
    return maps


def averages(job: Job, hours: float) -> xr.Dataset:
    """Average a finished CCD in time, lazily."""
    ds = open_background(job.group.url, **asdict(job.ccd), store_options=job.group.store_options)
    return bin_time(ds, hours=hours)


def make_binned_template(job: Job, hours: float) -> None:
    """Write the template of the averages of a CCD: a task."""
    ds = averages(job, hours)
    for name, variable in ds.variables.items():
        if variable.dims == ("time", "y", "x"):
            ds[name] = (variable.dims, empty_variable(variable.shape, "f4", np.nan), variable.attrs)
    status = empty_variable(ds["time"].shape, "u1", FrameStatus.NOT_WRITTEN)
    ds["frame_status"] = ("time", status, ds["frame_status"].attrs)
    template = ds.rename(time="time_bin")
    template.attrs = {name: value for name, value in ds.attrs.items() if name not in {"complete", "template"}}
    write_template(job.group.child(BINNED), template, job.shard_frames)


def bin_shard(job: Job, hours: float, first: int, last: int) -> None:
    """Average the frames of some bins and write them as one shard: a task."""
    part = averages(job, hours).isel(time=slice(first, last))
    cubes = part[[name for name, variable in part.items() if variable.dims == ("time", "y", "x")]]
    # one thread: a worker's memory holds the frames of one block, not of several
    values = {str(name): cube.to_numpy() for name, cube in cubes.compute(scheduler="sync").items()}
    write_shard(job.group.child(BINNED), first, last, values, part["frame_status"].to_numpy())


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
