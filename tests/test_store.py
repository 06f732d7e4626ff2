"""Groups are written shard by shard, by anybody, and read by anything that reads Zarr."""

from __future__ import annotations

import json

import dask.array
import fsspec
import numpy as np
import pandas as pd
import pytest
import xarray as xr
import zarr
from frames import memory_root
from hypothesis import given, settings
from hypothesis import strategies as st

from tessbkg import open_background
from tessbkg.ccd import CCD
from tessbkg.errors import StoreError, StoreMismatchError
from tessbkg.store import (
    LAYOUT,
    NOT_WRITTEN,
    Group,
    create_group,
    dataset_to_table,
    empty_variable,
    groups,
    marker,
    read_child,
    read_fields,
    read_rows,
    set_marker,
    shards,
    table_to_dataset,
    unwritten_shards,
    write_child,
    write_rows,
    write_shard,
    write_template,
)

ONE = CCD(1, 1, 4)
FIELDS = {"bin": 16, "statistic": "median", "shard_frames": 8, "mask": {"stars": True}}


def template(n: int, shape=(3, 4)) -> xr.Dataset:
    return xr.Dataset(
        {
            "light": (("time", "y", "x"), empty_variable((n, *shape), "f4", np.nan)),
            "frame_status": ("time", empty_variable((n,), "u1", NOT_WRITTEN)),
            "n_pixels": (("y", "x"), np.arange(12, dtype="u2").reshape(shape)),
        },
        coords={"time": np.arange(n, dtype="f8"), "ffi": ("time", np.array(["a"] * n, dtype=object))},
        attrs={"title": "a test"},
    )


def new(n: int, shard_frames: int, url: str | None = None, options=None, ccd: CCD = ONE) -> Group:
    group = Group.of(url or f"{memory_root()}/a.zarr", ccd, options)
    create_group(group, {**FIELDS, "shard_frames": shard_frames})
    write_template(group, template(n), shard_frames)
    return group


def opened(group: Group, **options) -> xr.Dataset:
    return xr.open_zarr(
        group.url,
        group=group.path,
        consolidated=False,
        storage_options=group.store_options or None if "://" in group.url else None,
        **options,
    )


def values(n: int, seed: int = 0):
    light = np.random.default_rng(seed).normal(size=(n, 3, 4)).astype("f4")
    return light, (np.arange(n) % 6).astype("u1")


# --- shards ------------------------------------------------------------------------------------------------


@given(st.integers(1, 400), st.integers(1, 70))
def test_shards_tile_the_frames_once(n, shard_frames):
    parts = shards(n, shard_frames)
    assert [i for first, last in parts for i in range(first, last)] == list(range(n))
    assert all(first % shard_frames == 0 for first, _ in parts)


@pytest.fixture(params=["disk", "memory", "s3"])
def place(request, tmp_path):
    if request.param == "disk":
        return str(tmp_path / "a.zarr"), None
    if request.param == "memory":
        return f"{memory_root()}/a.zarr", None
    ministack = request.getfixturevalue("ministack")
    return f"{ministack.bucket()}/a.zarr", ministack.options()


def test_write_and_read_back_everywhere(place):
    url, options = place
    group = new(20, 8, url, options)
    light, status = values(20)
    assert unwritten_shards(group, 8) == [(0, 8), (8, 16), (16, 20)]
    for first, last in ((16, 20), (0, 8)):
        write_shard(group, first, last, {"light": light[first:last]}, status[first:last])
    assert unwritten_shards(group, 8) == [(8, 16)]
    with opened(group, chunks=None) as ds:
        np.testing.assert_array_equal(ds["frame_status"][8:16], np.full(8, NOT_WRITTEN))
        assert np.isnan(ds["light"][8:16]).all()
    write_shard(group, 8, 16, {"light": light[8:16]}, status[8:16])
    assert unwritten_shards(group, 8) == []
    with opened(group) as ds:
        np.testing.assert_array_equal(ds["light"], light)
        np.testing.assert_array_equal(ds["frame_status"], status)
        assert ds["frame_status"].dtype == np.uint8
        assert ds["light"].dtype == np.float32
        assert ds["ffi"].to_numpy().tolist() == ["a"] * 20
        assert ds["light"].encoding["shards"] == (8, 3, 4)
        assert ds["light"].encoding["chunks"] == (8, 3, 4)


def test_all_nan_shards_are_written():
    group = new(8, 8)
    write_shard(group, 0, 8, {"light": np.full((8, 3, 4), np.nan, "f4")}, np.full(8, 5, "u1"))
    fs, root = fsspec.core.url_to_fs(group.name)
    assert [name for name in fs.find(root) if "/light/c/" in name]
    assert unwritten_shards(group, 8) == []


@settings(max_examples=60, deadline=None)
@given(first=st.integers(0, 25), length=st.integers(0, 25))
def test_a_write_that_is_not_one_whole_shard_is_refused(first, length):
    group = new_once()
    whole = (first, first + length) in shards(20, 8)
    light = np.zeros((length, 3, 4), "f4")
    if whole:
        write_shard(group, first, first + length, {"light": light}, np.zeros(length, "u1"))
        return
    before = opened(group)["light"].to_numpy()
    with pytest.raises(ValueError, match="is not one whole shard of 8 frames"):
        write_shard(group, first, first + length, {"light": light}, np.zeros(length, "u1"))
    np.testing.assert_array_equal(opened(group)["light"], before)


_ONCE: list[Group] = []


def new_once() -> Group:
    if not _ONCE:
        _ONCE.append(new(20, 8))
    return _ONCE[0]


def test_a_block_of_another_shape_is_refused():
    group = new(16, 8)
    for shape in ((8, 3, 5), (7, 3, 4), (8, 4, 3)):
        with pytest.raises(ValueError, match="is not one whole shard"):
            write_shard(group, 0, 8, {"light": np.zeros(shape, "f4")}, np.zeros(8, "u1"))


@pytest.mark.parametrize("shard", [0, 2])
@pytest.mark.parametrize("length", [0, 1, 50, -20, -1])
def test_a_torn_shard_is_written_over(shard, length, request):
    options, url = None, None
    if length == 50:
        ministack = request.getfixturevalue("ministack")
        options, url = ministack.options(), f"{ministack.bucket()}/a.zarr"
    group = new(20, 8, url, options)
    light, status = values(20)
    first, last = shards(20, 8)[shard]
    write_shard(group, first, last, {"light": light[first:last]}, status[first:last])
    fs, root = fsspec.core.url_to_fs(group.name, **(options or {}))
    for name in ("light", "frame_status"):
        [key] = [key for key in fs.find(f"{root}/{name}/c", refresh=True) if f"/c/{shard}" in key]
        if name == "light":
            fs.pipe_file(key, fs.cat_file(key)[:length])
        else:
            fs.rm_file(key)
    fs.invalidate_cache()
    assert (first, last) in unwritten_shards(group, 8)
    write_shard(group, first, last, {"light": light[first:last]}, status[first:last])
    with opened(group) as ds:
        np.testing.assert_array_equal(ds["light"][first:last], light[first:last])
        np.testing.assert_array_equal(ds["frame_status"][first:last], status[first:last])


def test_status_is_written_last(monkeypatch):
    group = new(8, 8)
    light, status = values(8)

    original = zarr.storage.FsspecStore.set

    async def fails(self, key, value):
        if "/light/c/" in key:
            raise OSError("the disk is full")
        await original(self, key, value)

    monkeypatch.setattr(zarr.storage.FsspecStore, "set", fails)
    with pytest.raises(StoreError, match="cannot write: the disk is full"):
        write_shard(group, 0, 8, {"light": light}, status)
    monkeypatch.undo()
    assert unwritten_shards(group, 8) == [(0, 8)]


# --- groups ------------------------------------------------------------------------------------------------


def test_a_group_is_made_once_and_found_again(place):
    url, options = place
    group = Group.of(url, ONE, options)
    assert read_fields(group) is None
    create_group(group, FIELDS)
    found = create_group(group, dict(reversed(FIELDS.items())))
    assert found["layout"] == LAYOUT
    assert json.loads(found["fields"]) == FIELDS
    assert groups(url, options) == [ONE]


def test_other_fields_are_refused_by_name():
    group = Group.of(f"{memory_root()}/a.zarr", ONE, None)
    create_group(group, FIELDS)
    other = {**FIELDS, "bin": 8, "new": 1}
    with pytest.raises(
        StoreMismatchError, match=r"bin: 16 there, 8 asked; new: None there, 1 asked"
    ) as caught:
        create_group(group, other)
    assert "statistic" not in str(caught.value)
    create_group(group, other, overwrite=True)
    assert json.loads(read_fields(group)["fields"]) == other


def test_overwrite_deletes_this_group_only():
    url = f"{memory_root()}/a.zarr"
    one, two = new(8, 8, url), new(8, 8, url, ccd=CCD(1, 1, 3))
    light, status = values(8)
    for group in (one, two):
        write_shard(group, 0, 8, {"light": light}, status)
    create_group(one, FIELDS, overwrite=True)
    assert marker(one, "template") is None
    np.testing.assert_array_equal(opened(two)["light"], light)
    assert groups(url) == [CCD(1, 1, 3), ONE]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_lost_group_above_is_made_again(tmp_path, overwrite):
    group = new(8, 8, str(tmp_path / "a.zarr"))
    (tmp_path / "a.zarr/zarr.json").unlink()
    create_group(group, FIELDS, overwrite=overwrite)
    assert groups(group.url) == [ONE]
    assert (marker(group, "template") is None) == overwrite


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_a_deletion_that_is_cut_off_leaves_nothing_that_looks_written(tmp_path, monkeypatch, calls):
    group = new(8, 8, str(tmp_path / "a.zarr"))
    write_child(group, "survey", table_to_dataset(pd.DataFrame({"ffi": ["a"]})))
    write_shard(group, 0, 8, {"light": values(8)[0]}, values(8)[1])
    assert unwritten_shards(group, 8) == []
    local, left = fsspec.filesystem("file"), [1] * calls
    remove = local.rm

    def rm(path, recursive):
        remove(path, recursive=recursive)
        left.pop()
        if not left:
            raise KeyboardInterrupt

    monkeypatch.setattr(local, "rm", rm)
    with pytest.raises(KeyboardInterrupt):
        create_group(group, FIELDS, overwrite=True)
    monkeypatch.undo()
    if calls == 1:
        assert unwritten_shards(group, 8) == [(0, 8)]
    if calls == 2:
        with pytest.raises(StoreError, match="overwrite it"):
            create_group(group, FIELDS)
    create_group(group, FIELDS, overwrite=calls != 3)
    assert read_child(group, "survey") is None


def test_foreign_groups_are_left_alone(tmp_path):
    url = str(tmp_path / "a.zarr")
    group = Group.of(url, ONE, None)
    zarr.open_group(url, path=ONE.group, mode="w")
    with pytest.raises(StoreMismatchError, match="is not one of tessbkg's"):
        create_group(group, FIELDS)
    zarr.open_group(url, path=ONE.group, mode="r+").attrs["layout"] = LAYOUT + 1
    with pytest.raises(StoreError, match=f"has layout {LAYOUT + 1}; .* layout {LAYOUT}"):
        read_fields(group)


def test_a_store_that_cannot_be_written_says_so(ministack, tmp_path):
    private = ministack.bucket()
    for url, options, match in (
        (f"{private}/a.zarr", ministack.options(anon=True), "permission denied"),
        ("s3://no-such-bucket-here/a.zarr", ministack.options(), "not found"),
    ):
        with pytest.raises(StoreError, match=match) as caught:
            create_group(Group.of(url, ONE, options), FIELDS)
        assert "\n" not in str(caught.value)
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError):
        create_group(Group.of(str(tmp_path / "file"), ONE, None), FIELDS)


def test_no_store(tmp_path):
    with pytest.raises(StoreError, match="is not a Zarr store"):
        groups(str(tmp_path / "nothing"))
    with pytest.raises(StoreError):
        open_background(str(tmp_path / "nothing"), sector=1, camera=1, ccd=4)


def test_credentials_are_refused():
    with pytest.raises(ValueError, match="store_options holds 'key'"):
        Group.of("s3://b/a.zarr", ONE, {"key": "x"})
    with pytest.raises(ValueError, match="store_options holds 'token'"):
        open_background("s3://b/a.zarr", sector=1, camera=1, ccd=4, store_options={"token": "x"})


def test_groups_travel_between_processes():
    import pickle

    group = Group.of("s3://b/a.zarr/", ONE, {"client_kwargs": {"region_name": "x"}})
    assert pickle.loads(pickle.dumps(group)) == group
    assert hash(group)
    assert group.name == "s3://b/a.zarr/s0001/cam1/ccd4"
    assert group.store_options == {"client_kwargs": {"region_name": "x"}}


# --- children, tables, rows --------------------------------------------------------------------------------


def test_tables_come_back_exactly(place):
    url, options = place
    group = Group.of(url, ONE, options)
    create_group(group, FIELDS)
    table = pd.DataFrame(
        {
            "ffi": ["a.fits", "ü", ""],
            "time": [1325.3243517676, np.nan, -0.0],
            "status": np.array([0, 255, 3]),
            "size": np.array([2**53 + 1, -1, 0]),
            "good": [True, False, True],
        }
    )
    assert read_child(group, "survey") is None
    write_child(group, "survey", table_to_dataset(table))
    back = dataset_to_table(read_child(group, "survey"))
    pd.testing.assert_frame_equal(back[list(table)], table, check_dtype=False, check_exact=True)
    write_child(group, "survey", table_to_dataset(table))
    assert len(dataset_to_table(read_child(group, "survey"))) == 3


def test_a_child_without_its_marker_is_not_there():
    group = new(8, 8)
    write_child(group, "scene", xr.Dataset({"flux": (("row", "column"), np.ones((2, 3)))}))
    zarr.open_group(group.store(), path=group.child("scene").path).attrs["complete"] = 0
    assert read_child(group, "scene") is None
    write_child(group, "scene", xr.Dataset({"flux": (("row", "column"), np.full((2, 3), 2.0))}))
    assert (read_child(group, "scene")["flux"] == 2).all()


def test_rows_of_a_report():
    group = new(8, 8)
    assert read_rows(group, "report/000000") == []
    write_rows(group, "report/000000", [{"ffi": "a", "status": 0}])
    write_rows(group, "report/000000", [{"ffi": "b", "status": 1}])
    assert read_rows(group, "report/000000") == [{"ffi": "b", "status": 1}]


# --- opening -----------------------------------------------------------------------------------------------


def finished(n=20, shard_frames=8) -> Group:
    group = new(n, shard_frames)
    light, status = values(n)
    for first, last in shards(n, shard_frames):
        write_shard(group, first, last, {"light": light[first:last]}, status[first:last])
    set_marker(group, "complete")
    return group


def test_opened_chunks_are_shards_and_a_changed_copy_can_be_written(tmp_path):
    group = finished()
    ds = open_background(group.url, sector=1, camera=1, ccd=4)
    assert ds["light"].chunks == ((8, 8, 4), (3,), (4,))
    assert isinstance(ds["light"].data, dask.array.Array)
    np.testing.assert_array_equal(ds["light"], values(20)[0])
    part = ds.isel(time=slice(0, 16), x=slice(1, None)) * 1
    part.to_zarr(tmp_path / "copy.zarr", zarr_format=3, consolidated=False)
    with xr.open_zarr(tmp_path / "copy.zarr", consolidated=False) as copy:
        np.testing.assert_array_equal(copy["light"], values(20)[0][:16, :, 1:])
    eager = open_background(group.url, sector=1, camera=1, ccd=4, chunks=None)
    assert eager["light"].chunks is None
    np.testing.assert_array_equal(eager["light"], values(20)[0])
    assert (
        open_background(group.url, sector=1, camera=1, ccd=4, chunks={"time": 5})["light"].chunks[0]
        == (5,) * 4
    )


def test_opening_what_is_not_there_names_what_is():
    group = finished()
    with pytest.raises(StoreError, match="has no sector 2 camera 1 CCD 4; it has sector 1 camera 1 CCD 4"):
        open_background(group.url, sector=2, camera=1, ccd=4)
    with pytest.raises(ValueError, match="camera=7 is out of range"):
        open_background(group.url, sector=1, camera=7, ccd=4)


def test_opening_what_was_begun_says_so():
    group = Group.of(f"{memory_root()}/a.zarr", ONE, None)
    create_group(group, FIELDS)
    with pytest.raises(StoreError, match="was begun, but nothing of it can be read yet; run it again"):
        open_background(group.url, sector=1, camera=1, ccd=4)


def test_opening_what_is_not_finished_warns():
    group = new(8, 8)
    with pytest.warns(UserWarning, match="is not finished"):
        ds = open_background(group.url, sector=1, camera=1, ccd=4)
    assert (ds["frame_status"] == NOT_WRITTEN).all()
    assert np.isnan(ds["light"]).all()
