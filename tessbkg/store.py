"""Zarr v3 groups: template, shards, scene, open. Knows nothing of TESS but the names of groups.

A store holds one group per CCD, `s0001/cam1/ccd4`. A group is written in this order, and each step is done
only when the marker that is its last write is there:

1. the group with its `fields`: what it is made of, and with which options;
2. child group `survey`: the table of frames; marker: attribute `complete`;
3. child group `scene`: the static sky and masks; marker: attribute `complete`;
4. the template: every variable with its coordinates and attributes, no data; marker: attribute `template`;
5. the shards along time, in any order, by anybody; marker: `frame_status` of the shard's frames;
6. attribute `complete` of the CCD's group;
7. where asked for, child group `binned`: averages in time, made as the CCD's group is (4 to 6);
8. child group `report`: what became of every frame, and the list of the group's objects; its digest is the
   seal of the group (:func:`write_sealed`).

Trying failed frames again takes back, in this order, 8, 6 and 4, the `frame_status` of their shards, and 2;
then the build goes on as any other.

Every chunk carries its CRC-32C, every `zarr.json` its digest in the list of objects: :mod:`tessbkg.check`
finds any flipped bit and any lost object.

Each step is encoded in memory and sent object by object, all at once but for its marker; an object is
written whole or not at all (a rename on a disk, one PUT on S3). Two processes that build the same CCD with
the same options do the work twice and write the same bytes; so nobody deletes anything, but `overwrite` the
whole group.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import dask.array as da
import numpy as np
import numpy.typing as npt
import pandas as pd
import xarray as xr
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import FsspecStore, LocalStore, MemoryStore

from tessbkg.ccd import CCD
from tessbkg.errors import StoreError, StoreMismatchError, TessbkgError
from tessbkg.storage import FrozenOptions, Options, check_options, filesystem, freeze, join, thaw

logger = logging.getLogger(__name__)

LAYOUT: Final = 1
"""Version of this layout; a store of another one is refused."""

CHUNK_FRAMES: Final = 8
"""Frames of an inner chunk: one frame costs one request, a light curve one per 8 frames."""

CHILD_CHUNKS: Final = {"term": 1, "row": 256}
"""Longest chunks of full-size images: whole ones would be held twice while they are decoded."""

NOT_WRITTEN: Final = 255

AT_ONCE: Final = 32
"""Objects on their way to a store."""
BINNED: Final = "binned"
"""Child group of averages in time; its dimension is `time_bin`, as `time` is its parent's."""


@dataclass(frozen=True)
class Group:
    """Where a CCD's group is: a store and a path in it.

    Parameters
    ----------
    url : str
        Store: a folder or any URL that fsspec opens.
    path : str
        Group path, such as `s0001/cam1/ccd4`.
    options : FrozenOptions
        fsspec options of the store; never credentials.
    """

    url: str
    path: str
    options: FrozenOptions = ()

    @classmethod
    def of(cls, url: str, ccd: CCD, options: Options | None) -> Group:
        """Make the group of a CCD; see :meth:`root`."""
        return replace(cls.root(url, options), path=ccd.group)

    @classmethod
    def root(cls, url: str, options: Options | None) -> Group:
        """Make the group that holds all others.

        Raises
        ------
        ValueError
            If nothing can open the URL, or it or the options hold credentials.
        """
        url = str(url).rstrip("/")
        filesystem(url, check_options(options, "store_options"))
        return cls(url, "", freeze(dict(options or {})))

    @property
    def store_options(self) -> dict[str, Any]:
        """Options as a dictionary."""
        return thaw(self.options)

    @property
    def name(self) -> str:
        """Store and path in one."""
        return join(self.url, self.path).rstrip("/")

    def store(self, *, read_only: bool = False) -> Any:
        """Open the Zarr store."""
        return open_store(self.url, self.store_options, read_only=read_only)

    def child(self, name: str) -> Group:
        """Return a child group."""
        return Group(self.url, f"{self.path}/{name}", self.options)


class _MemoryStore(FsspecStore):
    """`memory://`, which in another process is empty and would read as NaN."""

    home = 0

    async def get(self, *args: Any, **kwargs: Any) -> Buffer | None:
        if self.home != os.getpid():
            raise StoreError(
                "memory:// is in the memory of one process, which workers of a cluster cannot see; "
                "use another store or Client(processes=False)"
            )
        return await super().get(*args, **kwargs)


def open_store(url: str, options: Options | None = None, *, read_only: bool = False) -> Any:
    """Open a Zarr store at a URL or in a folder."""
    fs, path = filesystem(url, check_options(options, "store_options"))
    if "file" in np.atleast_1d(fs.protocol):
        return LocalStore(path, read_only=read_only)
    if fs.async_impl:
        fs, path = filesystem(url, {**check_options(options), "asynchronous": True})
        return FsspecStore(fs, path=path, read_only=read_only)
    if "memory" in np.atleast_1d(fs.protocol):
        store: Any = _MemoryStore.from_url(url, read_only=read_only)
        store.home = os.getpid()
        return store
    return FsspecStore.from_url(url, storage_options=dict(options or {}), read_only=read_only)


@contextlib.contextmanager
def store_errors(group: Group, verb: str = "write") -> Iterator[None]:
    """Turn whatever a store raises into one clear line.

    Raises
    ------
    StoreError
    """
    try:
        yield
    except TessbkgError:
        raise
    except PermissionError as error:
        raise StoreError(f"{group.url}: cannot {verb}: permission denied: {_line(error)}") from error
    except FileNotFoundError as error:
        hint = " (does the bucket exist?)" if "://" in group.url else ""
        reason = f"not found{hint}: {_line(error)}"
        raise StoreError(f"{group.url}: cannot {verb}: {reason}") from error
    except OSError as error:
        raise StoreError(f"{group.url}: cannot {verb}: {_line(error)}") from error
    except Exception as error:
        # Clients of object stores and codecs have errors of their own.
        reason = f"{type(error).__name__}: {_line(error)}"
        raise StoreError(f"{group.name}: cannot {verb}: {reason}") from error


def _line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).split("\n")[0][:200]


def read_fields(group: Group) -> dict[str, Any] | None:
    """Attributes of a CCD's group, or None if there is no group.

    Raises
    ------
    StoreMismatchError
        If the group is not ours.
    StoreError
        If it is of another layout, or cannot be read.
    """
    with store_errors(group, "read"):
        try:
            attrs = _attributes(group)
        except FileNotFoundError:
            _check_place(group)
            return None
        except NotADirectoryError:
            raise StoreMismatchError(f"{group.url} is a file; choose another store") from None
    layout = attrs.get("layout")
    if layout is None:
        raise StoreMismatchError(f"{group.name} is not one of tessbkg's; choose another store")
    if layout != LAYOUT:
        raise StoreError(f"{group.name} has layout {layout}; this version reads and writes layout {LAYOUT}")
    return attrs


def _check_place(group: Group) -> None:
    """Refuse a local folder that holds something else than a Zarr store.

    Raises
    ------
    StoreMismatchError
    """
    fs, root = filesystem(group.url, group.store_options)
    if "file" not in np.atleast_1d(fs.protocol) or not fs.exists(root):
        return
    if not fs.isdir(root):
        raise StoreMismatchError(f"{group.url} is a file; choose another store")
    names = {str(name).rpartition("/")[2] for name in fs.ls(root, detail=False)}
    if "zarr.json" not in names and any(not name.endswith(".partial") for name in names):
        raise StoreMismatchError(f"{group.url} is a folder of other things; choose another store")


def create_group(group: Group, fields: Mapping[str, Any], *, overwrite: bool = False) -> dict[str, Any]:
    """Create the group of a CCD, or find that it is there with the same fields.

    Parameters
    ----------
    group : Group
    fields : mapping
        Plain values that say what the group is made of.
    overwrite : bool
        Delete what is there first.

    Returns
    -------
    dict
        The attributes of the group.

    Raises
    ------
    StoreMismatchError
        If the group was made with other fields; the message names them.
    StoreError
        If the store cannot be written, or the group has lost its attributes.
    """
    with store_errors(group):
        found = None
        if overwrite:
            _check_ours(group)
        elif (found := read_fields(group)) is None:
            _check_whole(group)
        parts = group.path.split("/")
        for depth in range(len(parts)):
            _make_group(group, "/".join(parts[:depth]), {})
        if overwrite:
            delete_group(group)
        if found is None:
            # Text, because NetCDF knows no nested attributes.
            _make_group(group, group.path, {"layout": LAYOUT, "fields": json.dumps(fields)})
            found = read_fields(group)  # another process may have been quicker
            assert found is not None
    check_fields(group, found, fields)
    return found


def _check_whole(group: Group) -> None:
    """Refuse to go on with what was made of nobody knows what.

    Raises
    ------
    StoreError
    """
    if marker(group.child("survey"), "complete") and read_fields(group) is None:
        raise StoreError(f"{group.name} has lost its zarr.json, or its deletion was cut off; overwrite it")


def _make_group(group: Group, path: str, attributes: Mapping[str, Any]) -> None:
    """Make a group of the store, unless it is there."""
    store, key = group.store(), f"{path}/zarr.json".lstrip("/")
    if sync(store.get(key, default_buffer_prototype())) is None:
        sync(store.set_if_not_exists(key, _document(attributes)))


def _document(attributes: Mapping[str, Any]) -> Buffer:
    """Encode the `zarr.json` of a group."""
    content = {"attributes": attributes, "zarr_format": 3, "node_type": "group"}
    return _buffer(json.dumps(content, allow_nan=False).encode())


def _buffer(content: bytes) -> Buffer:
    return default_buffer_prototype().buffer.from_bytes(content)


def _check_ours(group: Group) -> None:
    """Refuse to delete a group that is not ours; one of another layout or a damaged one may go."""
    try:
        read_fields(group)
    except StoreMismatchError:
        raise
    except StoreError:
        logger.info("%s is of another layout or damaged; it is deleted", group.name)


def check_fields(group: Group, attrs: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    """Refuse a group that was made of something else.

    Raises
    ------
    StoreMismatchError
        Naming the fields that differ.
    """
    stored = json.loads(attrs.get("fields", "{}"))
    differing = sorted(
        name for name in {*stored, *fields} if json.dumps(stored.get(name)) != json.dumps(fields.get(name))
    )
    if differing:
        details = "; ".join(
            f"{name}: {stored.get(name)!r} there, {fields.get(name)!r} asked" for name in differing
        )
        raise StoreMismatchError(
            f"{group.name} was made with other parameters ({details}); overwrite it or choose another store"
        )


def delete_group(group: Group) -> None:
    """Delete a group with everything in it, first what makes the rest look written: this may be cut off."""
    fs, path = filesystem(group.url, group.store_options)
    if list_objects(group):
        for part in ("frame_status/c", "zarr.json", ""):
            with contextlib.suppress(FileNotFoundError):
                fs.rm(join(path, group.path, part).rstrip("/"), recursive=True)
            fs.invalidate_cache()


def _attributes(group: Group) -> dict[str, Any]:
    """Attributes of a group, with one request."""
    return dict(zarr.open_group(group.store(read_only=True), path=group.path, mode="r", zarr_format=3).attrs)


def set_attributes(group: Group, **values: Any) -> None:
    """Set attributes of a group; None removes one."""
    with store_errors(group):
        attributes = {**_attributes(group), **values}
        kept = {name: value for name, value in attributes.items() if value is not None}
        _send(group, {"zarr.json": _document(kept)})


def set_marker(group: Group, name: str) -> None:
    """Set an attribute of a group to 1: the last write of a step."""
    set_attributes(group, **{name: 1})


def marker(group: Group, name: str) -> Any:
    """Read an attribute of a group; None if either is not there."""
    with store_errors(group, "read"):
        try:
            return _attributes(group).get(name)
        except FileNotFoundError:
            return None


def write_child(group: Group, name: str, dataset: xr.Dataset) -> None:
    """Write a small Dataset as a child group and mark it complete."""
    encoding = {
        str(v): {
            "chunks": tuple(
                min(n, CHILD_CHUNKS.get(str(dim), n))
                for dim, n in zip(variable.dims, variable.shape, strict=True)
            ),
            **_compressed(variable),
        }
        for v, variable in dataset.variables.items()
    }
    _write(group.child(name), dataset.assign_attrs(complete=1), encoding)


def _compressed(variable: xr.Variable) -> dict[str, Any]:
    """Encode a variable with compression and, around it, the checksum of each chunk."""
    if variable.dtype.kind == "O":
        return {"compressors": (ZstdCodec(), Crc32cCodec())}
    return {"compressors": (BloscCodec(cname="zstd", clevel=3, shuffle="bitshuffle"), Crc32cCodec())}


def _write(group: Group, dataset: xr.Dataset, encoding: Mapping[str, dict[str, Any]]) -> None:
    """Write variables into a group, over what is there; the attributes of the group come last."""
    objects: dict[str, Buffer] = {}
    dataset.to_zarr(
        MemoryStore(objects),
        mode="w",
        compute=False,
        consolidated=False,
        zarr_format=3,
        encoding=encoding,
        write_empty_chunks=True,  # what was there is no longer valid
    )
    last = objects.pop("zarr.json")
    with store_errors(group):
        _send(group, objects)
        _send(group, {"zarr.json": last})


def _send(group: Group, objects: Mapping[str, Buffer]) -> None:
    """Write objects of a group, in no order."""
    store = group.store()
    limit = asyncio.Semaphore(AT_ONCE)

    async def send(name: str) -> None:
        async with limit:
            await store.set(f"{group.path}/{name}", objects[name])

    async def send_all() -> list[BaseException | None]:
        return await asyncio.gather(*map(send, objects), return_exceptions=True)

    for error in sync(send_all()):
        if error is not None:
            raise error


def read_child(group: Group, name: str) -> xr.Dataset | None:
    """Read a child group into memory; None if it is not there or not complete."""
    child = group.child(name)
    if not marker(child, "complete"):
        return None
    objects = {key: _buffer(value) for key, value in read_objects(child, list(list_objects(child))).items()}
    with store_errors(child, "read"):
        loaded: xr.Dataset = xr.open_zarr(
            MemoryStore(objects, read_only=True), consolidated=False, chunks=None, zarr_format=3
        )
        for variable_name, variable in loaded.variables.items():
            variable.load()
            for key in [key for key in objects if key.startswith(f"{variable_name}/")]:
                del objects[key]  # a scene is the most that a worker reads
    return loaded


def table_to_dataset(table: pd.DataFrame) -> xr.Dataset:
    """Turn a table into variables along `frame`."""
    return xr.Dataset(
        {
            str(name): ("frame", column.to_numpy(dtype=object if column.dtype.kind not in "iufb" else None))
            for name, column in table.items()
        }
    )


def dataset_to_table(dataset: xr.Dataset) -> pd.DataFrame:
    """Turn variables along `frame` back into a table."""
    return pd.DataFrame({str(name): variable.to_numpy() for name, variable in dataset.variables.items()})


def write_template(group: Group, template: xr.Dataset, shard_frames: int) -> None:
    """Write variables, coordinates and attributes of a group; variables backed by dask get no data.

    Raises
    ------
    StoreError
        If the store cannot be written.
    """
    encoding: dict[str, dict[str, Any]] = {}
    for name, variable in template.variables.items():
        codec = {"chunks": variable.shape, **_compressed(variable)}
        if name == "frame_status":
            codec |= {"chunks": (shard_frames,), "fill_value": NOT_WRITTEN}
        elif variable.dims[1:] == ("y", "x"):
            frames = CHUNK_FRAMES if shard_frames % CHUNK_FRAMES == 0 else shard_frames
            codec |= {
                "chunks": (frames, *variable.shape[1:]),
                "shards": (shard_frames, *variable.shape[1:]),
                "fill_value": np.nan,
            }
        encoding[str(name)] = codec
    with store_errors(group):
        attrs = read_fields(group) or {}
    _write(group, template.assign_attrs({**attrs, **template.attrs, "template": 1}), encoding)


def empty_variable(shape: tuple[int, ...], dtype: str, fill: float) -> da.Array:
    """Make a variable that a template declares and shards fill: one lazy chunk."""
    variable: da.Array = da.full(shape, fill, dtype=dtype, chunks=-1)
    return variable


def read_array(group: Group, name: str, region: slice = slice(None)) -> npt.NDArray[Any] | None:
    """Read an array of a group, or a region of it along its first axis; None if it is not there."""
    with store_errors(group, "read"):
        try:
            array = zarr.open_array(
                group.store(read_only=True), path=f"{group.path}/{name}", mode="r", zarr_format=3
            )
        except FileNotFoundError:
            return None
        return np.asarray(array[region])


def shards(n: int, shard_frames: int) -> list[tuple[int, int]]:
    """First and last (exclusive) frame of every shard of `n` frames."""
    return [(first, min(first + shard_frames, n)) for first in range(0, n, shard_frames)]


def unwritten_shards(group: Group, shard_frames: int) -> list[tuple[int, int]]:
    """Shards whose `frame_status` still has its fill value."""
    status = read_array(group, "frame_status")
    if status is None:
        raise StoreError(f"{group.name} has no frame_status; build it anew with overwrite")
    return [(a, b) for a, b in shards(len(status), shard_frames) if (status[a:b] == NOT_WRITTEN).any()]


def write_shard(
    group: Group,
    first: int,
    last: int,
    variables: Mapping[str, npt.NDArray[Any]],
    status: npt.NDArray[np.uint8],
) -> None:
    """Write one shard of every variable, then its `frame_status`.

    Parameters
    ----------
    first, last : int
        Frames of the shard, last exclusive.
    variables : mapping of str to (last - first, ...) array
    status : (last - first,) uint8

    Raises
    ------
    ValueError
        If the region is not one whole shard of a variable: other writers would lose data.
    StoreError
        If the store cannot be written.
    """
    blocks = {**variables, "frame_status": status}
    metadata = read_objects(group, [f"{name}/zarr.json" for name in blocks])
    for name, block in blocks.items():
        objects = {"zarr.json": _buffer(metadata[f"{name}/zarr.json"])}
        # zarr 3.1 ignores `config` of open_array
        with store_errors(group), zarr.config.set({"array.write_empty_chunks": True}):
            array = zarr.open_array(MemoryStore(objects), mode="r+", zarr_format=3)
        _check_region(array, first, last, block, name)
        with store_errors(group):
            array[first:last] = block
            del objects["zarr.json"]
            _send(group.child(name), objects)


def _check_region(array: Any, first: int, last: int, block: npt.NDArray[Any], name: str) -> None:
    """Refuse a write that is not one whole shard."""
    frames = (array.shards or array.chunks)[0]
    whole = first % frames == 0 and last == min(first + frames, array.shape[0])
    if not whole or block.shape != (last - first, *array.shape[1:]):
        raise ValueError(
            f"{name}[{first}:{last}] of shape {block.shape} is not one whole shard "
            f"of {frames} frames of {array.shape}"
        )


_UNSEALED: Final = "0" * 64


def write_sealed(group: Group, attributes: Mapping[str, Any]) -> None:
    """Write a group of attributes alone, in one go, with the digest of its own bytes among them.

    The attribute `digest` is the SHA-256 of the object `zarr.json` with zeros in its place.
    """
    content = {
        "attributes": {**attributes, "digest": _UNSEALED},
        "zarr_format": 3,
        "node_type": "group",
    }
    text = json.dumps(content, allow_nan=False)
    head, _, tail = text.rpartition(_UNSEALED)
    text = head + hashlib.sha256(text.encode()).hexdigest() + tail
    with store_errors(group):
        _send(group, {"zarr.json": _buffer(text.encode())})


def seal_holds(content: bytes) -> bool:
    """Whether the bytes of a `zarr.json` are those that :func:`write_sealed` wrote."""
    found = re.search(rb'"digest": "([0-9a-f]{64})"}', content)
    if found is None:
        return False
    blank = content[: found.start(1)] + _UNSEALED.encode() + content[found.end(1) :]
    return hashlib.sha256(blank).hexdigest().encode() == found[1]


def begin_report(group: Group) -> None:
    """Make the child group `report`, or take its list of objects away: shards put their rows below it."""
    report = group.child("report")
    if marker(report, "digest") is None or marker(report, "objects"):
        write_rows(group, "report", read_rows(group, "report"))


def write_rows(group: Group, name: str, rows: list[dict[str, Any]], **more: Any) -> None:
    """Write rows of a report as JSON: the attribute `rows` of a child group, sealed."""
    write_sealed(group.child(name), {**more, "rows": rows})


def read_rows(group: Group, name: str) -> list[dict[str, Any]]:
    """Read rows of a report; none if it is not there."""
    rows: list[dict[str, Any]] = marker(group.child(name), "rows") or []
    return rows


def list_objects(group: Group) -> dict[str, int]:
    """Names, relative to the group, and sizes of its objects, without unfinished files of killed writers."""
    fs, root = filesystem(group.url, group.store_options)
    with store_errors(group, "list"):
        fs.invalidate_cache()
        prefix = join(root, group.path).rstrip("/") + "/"
        found = fs.find(prefix, detail=True)
    return {
        name: int(info["size"])
        for path, info in sorted(found.items())
        if not (name := str(path).removeprefix(prefix)).endswith(".partial")
    }


def read_objects(group: Group, names: list[str], *, lost: bool = False) -> dict[str, bytes]:
    """Read whole objects of a group; with `lost` those that are there."""
    fs, root = filesystem(group.url, group.store_options)
    prefix = join(root, group.path).rstrip("/") + "/"
    with store_errors(group, "read"):
        found = fs.cat([prefix + name for name in names], on_error="return") if names else {}
        for error in [one for one in found.values() if isinstance(one, BaseException)]:
            if not (lost and isinstance(error, FileNotFoundError)):
                raise error
    return {path.removeprefix(prefix): one for path, one in found.items() if isinstance(one, bytes)}


def sizes_and_digests(group: Group) -> dict[str, int | str]:
    """List the objects of a group but its report's: the digest of metadata, the size of chunks."""
    objects: dict[str, int | str] = {
        name: size for name, size in list_objects(group).items() if not name.startswith("report/")
    }
    metadata = read_objects(group, [name for name in objects if name.rpartition("/")[2] == "zarr.json"])
    return {**objects, **{name: digest_of(content) for name, content in metadata.items()}}


def digest_of(content: bytes) -> str:
    """Digest of an object in the list of a group's objects."""
    return hashlib.sha256(content).hexdigest()[:16]


def groups(url: str, options: Options | None = None) -> list[CCD]:
    """CCDs that have a group in a store.

    Raises
    ------
    StoreMismatchError
        If there is no store at `url`.
    StoreError
        If it cannot be read.
    """
    group = Group.root(url, options)
    with store_errors(group, "read"):
        try:
            root = zarr.open_group(group.store(read_only=True), mode="r", zarr_format=3)
        except (FileNotFoundError, NotADirectoryError):
            raise StoreMismatchError(f"{url} is not a Zarr store") from None
        paths = [
            f"{sector}/{camera}/{ccd}"
            for sector, s in root.groups()
            for camera, c in s.groups()
            for ccd in c.group_keys()
        ]
    found = []
    for path in paths:
        with contextlib.suppress(ValueError):
            found.append(CCD.from_group(path))
    return sorted(found)


def select(there: list[CCD], store: str, **wanted: int | None) -> list[CCD]:
    """Keep the CCDs of a store that have the numbers that are wanted; None is any.

    Raises
    ------
    StoreMismatchError
        If there is none; the message names those there are.
    """
    found = [one for one in there if all(n in {None, getattr(one, name)} for name, n in wanted.items())]
    if not found:
        listed = ", ".join(str(one) for one in there) or "none"
        raise StoreMismatchError(f"{store} has no CCD that is asked for; it has {listed}")
    return found


def open_background(
    store: str,
    *,
    sector: int,
    camera: int,
    ccd: int,
    store_options: Options | None = None,
    chunks: Any = "shards",
    binned: bool = False,
) -> xr.Dataset:
    """Open the scattered light of one CCD, lazily.

    The same as ``xarray.open_zarr(store, group="s0001/cam1/ccd4", consolidated=False)``, with dask chunks
    that are whole shards, and without the encoding that would make `to_zarr` of a changed copy fail.

    Parameters
    ----------
    store : str
        Folder or URL.
    sector, camera, ccd : int
    store_options : dict, optional
        fsspec options of the store. Never credentials.
    chunks : optional
        As in `xarray.open_zarr`; by default one shard a chunk. None gives NumPy arrays read when indexed.
    binned : bool
        Open the averages in time that :func:`tessbkg.build` wrote with `bin_hours`, as
        :func:`tessbkg.bin_time` gives them. In the store their dimension is `time_bin`, which xarray's
        `open_datatree` needs; here it is `time`.

    Returns
    -------
    xarray.Dataset
        `scattered_light`, `scattered_light_err` : (time, y, x) float32, electron s-1, and what the README's
        table of the store lists.

    Raises
    ------
    StoreMismatchError
        If there is no such group, the message naming those there are; if it is not binned in time.
    StoreError
        If nothing is written of it yet; if it has another layout.
    ValueError
        If a number is out of range.

    Warns
    -----
    UserWarning
        If the build is not finished: frames that are not written are NaN with status 255.

    Examples
    --------
    >>> import tessbkg, tessbkg.simulate
    >>> _ = tessbkg.simulate.simulate("memory://src", frames=4, shape=(64, 64))
    >>> ccd = {"sector": 1, "camera": 1, "ccd": 4}
    >>> _ = tessbkg.build("memory://opened.zarr", root="memory://src", dark_frames=2, **ccd)
    >>> open_background("memory://opened.zarr", **ccd).scattered_light.shape
    (4, 4, 4)
    """
    group = Group.of(store, CCD(sector, camera, ccd), store_options)
    attrs = read_fields(group)
    if attrs is not None and not attrs.get("template"):
        raise StoreError(
            f"{group.name}: the build was begun, but nothing of it can be read yet; run it again to go on"
        )
    if attrs is None:
        there = ", ".join(str(one) for one in groups(store, store_options)) or "none"
        raise StoreMismatchError(f"{store} has no {CCD(sector, camera, ccd)}; it has {there}")
    if binned:
        group = group.child(BINNED)
        if not marker(group, "complete"):
            raise StoreMismatchError(f"{group.name} is not there: build it with bin_hours=2 or so")
    elif not attrs.get("complete"):
        warnings.warn(f"{group.name} is not finished: build it again to go on", stacklevel=2)
    dataset: xr.Dataset = xr.open_zarr(
        group.store(read_only=True), group=group.path, consolidated=False, chunks=None, zarr_format=3
    )
    if binned:
        dataset = dataset.rename(time_bin="time")
    if chunks == "shards":
        chunks = {"time": json.loads(attrs["fields"])["shard_frames"], "y": -1, "x": -1}
    for variable in dataset.variables.values():
        variable.encoding = {}
    if chunks is not None:
        cubes = {name: v for name, v in dataset.items() if v.dims == ("time", "y", "x")}
        dataset = dataset.assign({name: cube.chunk(chunks) for name, cube in cubes.items()})
    # the order in which a store lists arrays is none
    names = sorted(str(name) for name in dataset.data_vars)
    return dataset[sorted(names, key=lambda name: not str(name).startswith("scattered_light"))]
