"""What a store holds, in words: `tessbkg info`."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from tessbkg.ccd import CCD
from tessbkg.ffi import FrameStatus
from tessbkg.storage import Options
from tessbkg.store import (
    BINNED,
    NOT_WRITTEN,
    Group,
    groups,
    list_objects,
    marker,
    read_array,
    read_fields,
    select,
    shards,
)

TJD_0 = np.datetime64("2014-12-08T12:00")
"""JD 2457000."""


def info(
    store: str,
    *,
    sector: int | None = None,
    camera: int | None = None,
    ccd: int | None = None,
    store_options: Options | None = None,
) -> str:
    """Say what a store holds, as a tree of its sectors, cameras and CCDs; of a single CCD, the details.

    Reads a listing and a few small arrays of each CCD.

    Parameters
    ----------
    store : str
        Folder or URL.
    sector, camera, ccd : int, optional
        Only these; all three for the details.
    store_options : dict, optional
        fsspec options of the store. Never credentials.

    Returns
    -------
    str

    Raises
    ------
    StoreMismatchError
        If there is no store, or no such CCD; the message names those there are.
    ValueError
        If a number is out of range.

    Examples
    --------
    >>> import tessbkg, tessbkg.simulate
    >>> _ = tessbkg.simulate.simulate("memory://info", frames=4, shape=(64, 64))
    >>> _ = tessbkg.build("memory://i.zarr", sector=1, camera=1, ccd=4, root="memory://info", dark_frames=2)
    >>> print(info("memory://i.zarr"))
    memory://i.zarr: 1 CCD, ... MB
    sector 1
      camera 1
        CCD 4  complete, 4 frames, 4 x 4 bins of 16 pixels, whole, ... MB
               TJD 1325.324 to 1345.303 (2018-07-25 to 2018-08-14): 4 good
    """
    there = groups(store, store_options)
    if not there:
        return f"{store} is empty"
    wanted = {"sector": sector, "camera": camera, "ccd": ccd}
    asked = select(there, store, **wanted)
    if None not in wanted.values():
        return "\n".join(_details(store, asked[0], store_options))
    sizes = list_objects(replace(Group.of(store, asked[0], store_options), path=""))
    total = 0
    lines: list[str] = []
    before: tuple[int, ...] = ()
    for one in asked:
        if before[:1] != (one.sector,):
            lines.append(f"sector {one.sector}")
        if before != (one.sector, one.camera):
            lines.append(f"  camera {one.camera}")
        before = (one.sector, one.camera)
        size = sum(n for name, n in sizes.items() if name.startswith(f"{one.group}/"))
        total += size
        head, *rest = _lines(Group.of(store, one, store_options), size)
        lines += [f"    CCD {one.ccd}  {head}", *(f"           {line}" for line in rest)]
    count = "1 CCD" if len(asked) == 1 else f"{len(asked)} CCDs"
    return "\n".join([f"{store}: {count}, {total / 1e6:,.1f} MB", *lines])


def _lines(group: Group, size: int) -> Iterator[str]:
    """Describe a CCD in two lines; in one while its build has written no frame."""
    attrs, status = read_fields(group) or {}, read_array(group, "frame_status")
    megabytes = f"{size / 1e6:,.1f} MB"
    if status is None or not attrs.get("template"):
        yield f"begun, nothing written yet, {megabytes}"
        return
    hours = marker(group.child(BINNED), "time_bin_hours")
    parts = [_state(attrs, status), f"{len(status):,} frames", _bins(group, attrs)]
    yield ", ".join([*parts, *([f"means of {hours:g} h"] if hours else []), megabytes])
    yield f"{_span(group)}: {_counts(status)}"


def _state(attrs: dict[str, Any], status: npt.NDArray[Any]) -> str:
    """Say how far the build is."""
    if attrs.get("complete"):
        return "complete"
    size = json.loads(attrs["fields"])["shard_frames"]
    parts = shards(len(status), size)
    done = sum(not (status[first:last] == NOT_WRITTEN).any() for first, last in parts)
    return f"NOT FINISHED ({done} of {len(parts)} shards)"


def _bins(group: Group, attrs: dict[str, Any]) -> str:
    ny, nx = (len(axis) if (axis := read_array(group, name)) is not None else 0 for name in ("y", "x"))
    return f"{ny} x {nx} bins of {attrs['bin']} pixels, {attrs['statistic']}"


def _span(group: Group) -> str:
    """Give times and dates of the first and the last frame."""
    time = read_array(group, "time")
    assert time is not None  # the template is there
    first, last = float(np.nanmin(time)), float(np.nanmax(time))
    dates = [np.datetime_as_string(TJD_0 + np.timedelta64(round(t * 1440), "m"), "D") for t in (first, last)]
    return f"TJD {first:.3f} to {last:.3f} ({dates[0]} to {dates[1]})"


def _counts(status: npt.NDArray[Any]) -> str:
    return ", ".join(
        f"{n:,} {FrameStatus(int(s)).name.lower().replace('_', ' ')}"
        for s, n in zip(*np.unique(status, return_counts=True), strict=True)
    )


def _details(store: str, ccd: CCD, store_options: Options | None) -> Iterator[str]:
    """Describe one CCD line by line."""
    group = Group.of(store, ccd, store_options)
    sizes = list_objects(group)
    attrs = read_fields(group) or {}
    yield f"{ccd}: {group.name}"
    for line in _lines(group, sum(sizes.values())):
        yield f"  {line}"
    options = json.loads(attrs.get("options", "{}"))
    dark = str(attrs.get("dark_frames", "")).split()
    notes = {
        "errors": f"by {options.get('errors')}",
        "scene": f"of {len(dark)} dark frames: {', '.join(dark)}",
        "quality": f"frames with a bit of {options.get('drop_quality')} are rejected",
        "angles": attrs.get("angles"),
        "ephemeris": attrs.get("ephemeris_source"),
        "made by": attrs.get("source"),
        "to note": "; ".join(attrs.get("warnings", [])),
    }
    for name, text in notes.items():
        if text and options:
            yield from textwrap.wrap(f"  {name:12s}{text}", 100, subsequent_indent=14 * " ")
    parts: dict[str, int] = {}
    for name, size in sizes.items():
        parts[name.split("/")[0]] = parts.get(name.split("/")[0], 0) + size
    largest = sorted(parts.items(), key=lambda part: -part[1])[:8]
    yield f"  {'MB':12s}" + ", ".join(f"{name} {size / 1e6:.1f}" for name, size in largest)
