"""Is a store whole and true? Every object against its checksum, every value against what it must be.

What is looked at, object by object, and what finds a flipped bit or a lost object:

* chunks of all arrays: each carries its CRC-32C; reading them all is the test;
* `zarr.json` of arrays and groups: their digests are in the list of objects in `report/zarr.json`;
* `report/zarr.json` and those of the shards' reports: the digest of their own bytes;
* lost objects: the list of objects has them all; so has it stray ones.

A build that is not finished has no list yet: of it the finished shards are looked at.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import zarr

from tessbkg.ccd import CCD
from tessbkg.dataset import Options
from tessbkg.errors import StoreError, TessbkgError
from tessbkg.ffi import FrameStatus
from tessbkg.scene import MaskOptions
from tessbkg.storage import Options as StorageOptions
from tessbkg.storage import check_options, freeze
from tessbkg.store import (
    NOT_WRITTEN,
    Group,
    digest_of,
    groups,
    list_objects,
    read_fields,
    read_objects,
    read_rows,
    seal_holds,
    select,
    shards,
    store_errors,
)
from tessbkg.tasks import Job, prepared, reduce_frames

logger = logging.getLogger(__name__)

ATTRIBUTES: Final = (
    "title sector camera ccd bin statistic options dark_frames mask_bits source Conventions wcs angles"
).split()
"""Attributes that a finished group has."""

RANGES: Final = {
    "_angle": (0.0, 180.0),
    "_azimuth": (-180.0, 360.0),
    "_elevation": (-90.0, 90.0),
    "_fraction": (0.0, 1.0),
    "_distance": (0.0, np.inf),
    "_angular_radius": (0.0, 90.0),
    "_err": (0.0, np.inf),
    "dec": (-90.0, 90.0),
    "ra": (0.0, 360.0),
}
"""Allowed values by how the name of a variable ends."""

SAMPLE: Final = 8
"""Frames that `deep` reduces again by default."""


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a store.

    Parameters
    ----------
    where : str
        Group, array or object.
    what : str
        In one line.
    """

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


def check(
    store: str,
    *,
    sector: int | None = None,
    camera: int | None = None,
    ccd: int | None = None,
    deep: bool = False,
    sample: int = SAMPLE,
    seed: int = 0,
    storage_options: StorageOptions | None = None,
    store_options: StorageOptions | None = None,
) -> list[Finding]:
    """Look for what is wrong with a store: reads every byte of it once, 64 frames in memory at a time.

    Parameters
    ----------
    store : str
        Folder or URL.
    sector, camera, ccd : int, optional
        Only these CCDs; all by default.
    deep : bool
        Read a random sample of frames from the source again, reduce them and compare bit for bit.
    sample : int
        Frames per CCD of `deep`.
    seed : int
        Of the sample.
    storage_options, store_options : dict, optional
        fsspec options of the source (for `deep`) and of the store. Never credentials.

    Returns
    -------
    list of Finding
        Empty if all is well.

    Raises
    ------
    StoreMismatchError
        If there is no store, or none of the CCDs asked for is in it.
    ValueError
        If an argument is out of range.

    Examples
    --------
    >>> import tessbkg, tessbkg.simulate
    >>> _ = tessbkg.simulate.simulate("memory://chk", frames=4, shape=(64, 64))
    >>> _ = tessbkg.build("memory://c.zarr", sector=1, camera=1, ccd=4, root="memory://chk", dark_frames=2)
    >>> check("memory://c.zarr", deep=True)
    []
    """
    wanted = {"sector": sector, "camera": camera, "ccd": ccd}
    CCD(**{"sector": 1, "camera": 1, "ccd": 1, **{k: v for k, v in wanted.items() if v is not None}})
    if isinstance(sample, bool) or not isinstance(sample, int) or sample < 1:
        raise ValueError(f"sample={sample!r} is out of range: allowed are integers from 1")
    root = Group.root(store, store_options)
    source = check_options(storage_options)
    findings = list(_check_folders(root))
    try:
        there = groups(root.url, root.store_options)
    except StoreError as error:
        if not findings:
            raise
        return [*findings, Finding(root.url, str(error))]
    for one in select(there, store, **wanted) if there or not findings else []:
        group = Group.of(store, one, store_options)
        found = list(_check_group(group))
        findings += found
        if deep and not found:
            findings += _check_frames(group, one, source, sample, seed)
    return findings


def _check_folders(root: Group) -> Iterator[Finding]:
    """Check the groups above those of CCDs, which hold nothing but their kind."""
    objects = list_objects(root)
    parents = {"/".join(name.split("/")[:i]) for name in objects for i in (1, 2) if _of_a_ccd(name)}
    names = ["zarr.json", *(f"{parent}/zarr.json" for parent in sorted(parents))]
    for name in names if parents else []:  # without any it is no store: that is for the caller to say
        if name not in objects:
            yield Finding(name, LOST)
    for name, content in read_objects(root, [name for name in names if name in objects]).items():
        try:
            document = json.loads(content)
        except ValueError:
            yield Finding(name, "not JSON")
            continue
        plain = {"zarr_format": 3, "node_type": "group"}
        kind = {k: v for k, v in document.items() if k != "attributes"} if isinstance(document, dict) else {}
        if kind != plain or not isinstance(document.get("attributes"), dict):
            yield Finding(name, "not the metadata of a group")
    for ccd in {"/".join(name.split("/")[:3]) for name in objects if _of_a_ccd(name)}:
        if f"{ccd}/zarr.json" not in objects:
            yield Finding(f"{ccd}/zarr.json", LOST)


def _of_a_ccd(name: str) -> bool:
    """Whether an object of the store lies below a CCD's group."""
    try:
        CCD.from_group("/".join(name.split("/")[:3]))
    except ValueError:
        return False
    return name.count("/") > 2


@dataclass(frozen=True)
class _Objects:
    """Objects of a group as they are now: sizes of all, contents of metadata; names relative to the group."""

    sizes: dict[str, int]
    metadata: dict[str, bytes]

    @property
    def arrays(self) -> list[str]:
        """Arrays of the group and of its child groups."""
        return sorted(
            name.removesuffix("/zarr.json") for name, text in self.metadata.items() if b'"array"' in text
        )


def _check_group(group: Group) -> Iterator[Finding]:
    """Check one CCD."""
    sizes = list_objects(group)
    metadata = read_objects(group, [name for name in sizes if name.rpartition("/")[2] == "zarr.json"])
    objects = _Objects(sizes, metadata)
    try:
        attrs = read_fields(group)
        assert attrs is not None  # it was listed
        fields = json.loads(attrs["fields"])
        finished = bool(attrs.get("complete"))
    except (TessbkgError, ValueError, KeyError) as error:
        yield Finding(group.path, f"attributes cannot be read: {error}")
        return
    sound = True
    for where, what in (*_check_objects(group, objects, finished=finished), *_check_arrays(group, objects)):
        sound = False
        yield Finding(f"{group.path}/{where}", what)
    if not attrs.get("template"):
        yield Finding(group.path, f"{UNFINISHED}: nothing can be read yet; build it again to go on")
    elif sound:
        yield from _check_values(group, attrs, fields)


UNFINISHED: Final = "the build is not finished"
CHANGED: Final = "does not have its digest: changed after it was written"
LOST: Final = "object is lost"

Places = Iterator[tuple[str, str]]
"""What is wrong where within a group."""


def _check_objects(group: Group, objects: _Objects, *, finished: bool) -> Places:
    """Check the list of objects and the digests of metadata."""
    reports = [name for name in objects.sizes if name.startswith("report/")]
    for name in reports:
        if not seal_holds(objects.metadata.get(name, b"")):
            yield name, CHANGED
    if "report/zarr.json" not in reports or b'"objects": ' not in objects.metadata["report/zarr.json"]:
        if finished:
            yield "report/zarr.json", f"{LOST}, or the end of the build: build it again"
        return
    try:
        report = json.loads(objects.metadata["report/zarr.json"])["attributes"]
        expected, rows = dict(report["objects"]), list(report["rows"])
    except (ValueError, KeyError, TypeError):
        return  # its digest does not hold; said above
    yield from _check_list(objects, expected, reports)
    yield from _check_rows(group, rows, objects)


def _check_list(objects: _Objects, expected: dict[str, int | str], reports: list[str]) -> Places:
    """Check that the objects are those of the list."""
    for name in sorted(objects.sizes.keys() - expected.keys() - set(reports)):
        yield name, "object is not one of the build's"
    for name, value in sorted(expected.items()):
        if name not in objects.sizes:
            yield name, LOST
        elif isinstance(value, int) and objects.sizes[name] != value:
            yield name, f"has {objects.sizes[name]} bytes where it had {value}"
        elif isinstance(value, str) and digest_of(objects.metadata[name]) != value:
            yield name, CHANGED


def _check_rows(group: Group, rows: list[dict[str, Any]], objects: _Objects) -> Places:
    """Check that the report has what the shards' reports have."""
    size = json.loads((read_fields(group) or {"fields": "{}"})["fields"]).get("shard_frames", 1)
    for first, last in shards(len(rows), size):
        name = f"report/{first:06d}/zarr.json"
        if name not in objects.metadata:
            yield name, LOST
        elif seal_holds(objects.metadata[name]):
            part = json.loads(objects.metadata[name])["attributes"]["rows"]
            same = [(row["ffi"], row["status"], row["reason"]) for row in part]
            if same != [(row["ffi"], row["status"], row["reason"]) for row in rows[first:last]]:
                yield name, "differs from the report of the whole build"


def _check_arrays(group: Group, objects: _Objects) -> Places:
    """Read every chunk of every array: each has its CRC-32C."""
    store = group.store(read_only=True)
    for name in objects.arrays:
        try:
            with store_errors(group, "read"):
                array = zarr.open_array(store, path=f"{group.path}/{name}", mode="r", zarr_format=3)
                step = (array.shards or array.chunks)[0]
        except TessbkgError as error:
            yield name, f"damaged: {error}"
            continue
        for first in range(0, array.shape[0], step):
            try:
                with store_errors(group, "read"):
                    _ = array[first : first + step]
            except TessbkgError as error:
                yield f"{name}[{first}:{min(first + step, array.shape[0])}]", f"damaged: {error}"


VARIABLES: Final = (
    "time btjd cadence quality ffi frame_status y x row column scattered_light scattered_light_err n_pixels"
).split()
"""Variables that every group has."""


def _check_values(group: Group, attrs: dict[str, Any], fields: dict[str, Any]) -> Iterator[Finding]:
    """Check what the values must be whatever the frames were."""
    root = zarr.open_group(group.store(read_only=True), path=group.path, mode="r", zarr_format=3)
    arrays: dict[str, Any] = dict(root.arrays())
    for name in [name for name in ATTRIBUTES if name not in attrs]:
        yield Finding(group.path, f"attribute {name} is missing")
    missing = [name for name in VARIABLES if name not in arrays]
    for name in missing:
        yield Finding(f"{group.path}/{name}", "variable is lost")
    if missing:
        return
    n, size = int(fields["frames"]), int(fields["shard_frames"])
    for where, what in _check_axes(arrays, n):
        yield Finding(f"{group.path}/{where}", what)
    status = np.asarray(arrays["frame_status"][:])
    unwritten = int((status == NOT_WRITTEN).sum())
    if unwritten or not attrs.get("complete"):
        yield Finding(
            group.path, f"{UNFINISHED}: {unwritten} of {n} frames are not written; build it again to go on"
        )
    rows = read_rows(group, "report")
    if rows and [row["status"] for row in rows] != status.tolist():
        yield Finding(f"{group.path}/frame_status", "differs from the report")
    for name, array in [(name, array) for name, array in arrays.items() if array.dtype.kind == "f"]:
        step = size if array.shape[:1] == (n,) else max(array.shape[0], 1)
        for first in range(0, array.shape[0], step):
            values = np.asarray(array[first : first + step])
            yield from _check_range(f"{group.path}/{name}", name, values)
            if name.startswith("scattered_light"):
                part = status[first : first + step]
                yield from _check_finite(f"{group.path}/{name}", first, values, part)


def _check_axes(arrays: dict[str, Any], n: int) -> Places:
    """Check that coordinates are aligned and ascend, and that statuses mean something."""
    for name, array in arrays.items():
        if (array.metadata.dimension_names or ())[:1] == ("time",) and array.shape[0] != n:
            yield name, f"has {array.shape[0]} times where there are {n} frames"
    time = np.asarray(arrays["time"][:])
    if not (np.isfinite(time).all() and (np.diff(time) >= 0).all()):
        yield "time", "times are not finite and ascending"
    for name in ("y", "x", "row", "column"):
        if not (np.diff(np.asarray(arrays[name][:])) > 0).all():
            yield name, "bin centres are not ascending"
    if not set(np.unique(arrays["frame_status"][:]).tolist()) <= set(FrameStatus):
        yield "frame_status", "has values that mean nothing"


def _check_range(where: str, name: str, values: npt.NDArray[Any]) -> Iterator[Finding]:
    ends = [bounds for ending, bounds in RANGES.items() if name == ending or name.endswith(ending)]
    for low, high in ends[:1] if not name.startswith("field_") else []:
        outside = int(((values < low) | (values > high)).sum())
        if outside:
            yield Finding(where, f"{outside} values are not between {low:g} and {high:g}")


def _check_finite(
    where: str, first: int, values: npt.NDArray[Any], status: npt.NDArray[np.uint8]
) -> Iterator[Finding]:
    """Good frames have values everywhere, others nowhere."""
    finite = np.isfinite(values)
    for i in np.flatnonzero((status == FrameStatus.GOOD) & ~finite.all(axis=(1, 2))):
        yield Finding(where, f"frame {first + i} is good but has {int((~finite[i]).sum())} values not finite")
    for i in np.flatnonzero((status != FrameStatus.GOOD) & finite.any(axis=(1, 2))):
        yield Finding(where, f"frame {first + i} has status {status[i]} but {int(finite[i].sum())} values")


def _check_frames(
    group: Group, ccd: CCD, source: dict[str, Any], sample: int, seed: int
) -> Iterator[Finding]:
    """Reduce a sample of frames again from the source and compare bit for bit."""
    fields = json.loads((read_fields(group) or {})["fields"])
    names = [name for name in Options.__dataclass_fields__ if name != "mask"]
    options = Options(**{name: fields[name] for name in names}, mask=MaskOptions(**fields["mask"]))
    size, run = int(fields["shard_frames"]), uuid.uuid4().hex
    job = Job(ccd, group, options, freeze(source), "flag", size, run)
    survey, plan = prepared(job)
    chosen = np.sort(np.random.default_rng(seed).permutation(len(survey))[:sample])
    both, rows = reduce_frames(job, survey.iloc[chosen], plan)
    root = zarr.open_group(group.store(read_only=True), path=group.path, mode="r", zarr_format=3)
    stored = np.asarray(root["frame_status"][:])  # type: ignore[index]
    for place, i in enumerate(chosen):
        row = rows[place]
        if row["status"] != stored[i]:
            name = FrameStatus(row["status"]).name.lower()
            yield Finding(f"{group.path}[{i}]", f"{row['ffi']} is now {name} ({row['reason']})")
            continue
        for k, name in enumerate(("scattered_light", "scattered_light_err")):
            old = np.asarray(root[name][int(i)])  # type: ignore[index]
            if old.tobytes() != both[k, place].tobytes():
                worst = float(np.nanmax(np.abs(old - both[k, place])))
                yield Finding(
                    f"{group.path}/{name}[{i}]", f"{row['ffi']} reduced again differs by up to {worst:.3g}"
                )
