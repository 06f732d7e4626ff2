"""Tests of tessbkg.check: whatever is done to a finished store is found."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from frames import CCD1, simulated

import tessbkg
from tessbkg.check import Finding, check
from tessbkg.errors import StoreError

FRAMES = 12


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a source and a finished store of a few small frames, two of them bad."""
    folder = tmp_path_factory.mktemp("check")
    simulated(FRAMES, shape=(64, 64), root=str(folder / "src"), faults={3: "empty", 7: "nan"})
    tessbkg.build(
        str(folder / "s.zarr"), **CCD1, root=str(folder / "src"), dark_frames=3, shard_frames=8, bin=32
    )
    return folder


@pytest.fixture
def copy(made, tmp_path) -> Path:
    shutil.copytree(made / "s.zarr", tmp_path / "s.zarr")
    return tmp_path / "s.zarr"


def objects(store: Path) -> list[Path]:
    return sorted(path for path in store.rglob("*") if path.is_file())


def flipped(path: Path, bit: int) -> bytes:
    """Flip one bit of a file; return what it was."""
    before = path.read_bytes()
    data = bytearray(before)
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    return before


def test_nothing_is_wrong_with_a_finished_store(made):
    assert check(str(made / "s.zarr"), deep=True, sample=FRAMES) == []


def test_xarray_and_zarr_read_the_store_without_tessbkg(made):
    group = zarr.open_group(str(made / "s.zarr"), path="s0001/cam1/ccd4", mode="r")
    assert group["scattered_light"].shape == (FRAMES, 2, 2)
    assert str(group["ffi"][0]).endswith("_ffic.fits")


def test_flipped_bits_are_found_wherever_they_are(copy):
    assert_flips_are_found(copy, objects(copy)[::7])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_flipped_bits_are_found_in_every_object(copy):
    assert_flips_are_found(copy, objects(copy), flips=3)


def assert_flips_are_found(copy, paths, flips=1):
    rng = np.random.default_rng(4)
    for path in paths:
        for bit in rng.integers(path.stat().st_size * 8, size=flips):
            before = flipped(path, int(bit))
            assert found(copy), f"bit {bit} of {path}"
            path.write_bytes(before)
    assert check(str(copy)) == []


def found(store: Path) -> list[Finding]:
    """Check, taking an unreadable store as found too."""
    try:
        return check(str(store))
    except StoreError as error:
        return [Finding(str(store), str(error))]


def test_lost_objects_are_found(copy):
    assert_losses_are_found(copy, objects(copy)[3::7])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_lost_object_is_found(copy):
    assert_losses_are_found(copy, objects(copy))


def assert_losses_are_found(copy, paths):
    for path in paths:
        before = path.read_bytes()
        path.unlink()
        assert found(copy), path
        path.write_bytes(before)
    assert check(str(copy)) == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_bit_of_a_shard_a_coordinate_and_the_report_is_found(copy):
    for name in ("frame_status/c/0", "scattered_light/c/0/0/0", "time/c/0", "report/000008/zarr.json"):
        path = copy / "s0001/cam1/ccd4" / name
        for bit in range(0, path.stat().st_size * 8, 7):
            before = flipped(path, bit)
            assert found(copy), f"bit {bit} of {path}"
            path.write_bytes(before)


def test_a_truncated_and_a_stray_object_are_found(copy):
    shard = copy / "s0001/cam1/ccd4/earth_angle/c/0/0/0"
    before = shard.read_bytes()
    shard.write_bytes(before[:-9])
    assert any("earth_angle" in one.where for one in check(str(copy)))
    shard.write_bytes(before)
    (copy / "s0001/cam1/ccd4/time/c/1").write_bytes(b"stray")
    assert [one.what for one in check(str(copy))] == ["object is not one of the build's"]


def test_unfinished_files_of_killed_writers_are_no_finding(copy):
    (copy / "s0001/cam1/ccd4/time/c/0.0123abc.partial").write_bytes(b"half")
    assert check(str(copy)) == []


def changed(copy: Path, name: str, change) -> list[Finding]:
    """Change values of an array, put the list of objects right again, check."""
    from tessbkg.ccd import CCD
    from tessbkg.store import Group, marker, read_rows, sizes_and_digests, write_rows

    array = zarr.open_array(str(copy), path=f"s0001/cam1/ccd4/{name}", mode="r+")
    values = array[:]
    change(values)
    array[:] = values
    group = Group.of(str(copy), CCD(**CCD1), None)
    assert marker(group.child("report"), "objects")
    write_rows(group, "report", read_rows(group, "report"), objects=sizes_and_digests(group))
    return check(str(copy))


def put(index, value):
    def change(values):
        values[index] = value

    return change


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("scattered_light", put((0, 0, 0), np.nan), "frame 0 is good but has 1 values not finite"),
        ("scattered_light_err", put((0, 0, 0), -1), "not between 0 and inf"),
        ("scattered_light", put((3, 0, 0), 1.0), "frame 3 has status 2 but 1 values"),
        ("frame_status", put(0, 2), "differs from the report"),
        ("frame_status", put(0, 77), "mean nothing"),
        ("frame_status", put(0, 255), "not finished: 1 of 12 frames"),
        ("time", put(3, 0.0), "not finite and ascending"),
        ("x", put(0, 999.0), "not ascending"),
        ("earth_angle", put((0, 0, 0), 181.0), "not between 0 and 180"),
        ("moon_azimuth", put((0, 0, 0), -999.0), "not between -180 and 360"),
    ],
)
def test_values_that_cannot_be_are_found(copy, name, change, words):
    assert any(words in str(one) for one in changed(copy, name, change))


def test_deep_finds_a_value_that_is_not_what_the_source_gives(copy):
    def change(values):
        values += np.float32(1e-3)

    assert changed(copy, "scattered_light", change) == []
    deep = check(str(copy), deep=True, sample=FRAMES)
    assert len(deep) == FRAMES - sum(tessbkg.read_report(str(copy), **CCD1)["status"] != 0)
    assert all("reduced again differs" in one.what for one in deep)


def test_deep_finds_a_source_that_changed(made, copy):
    frames = tessbkg.list_ffis(**CCD1, root=str(made / "src"))
    path = Path(frames["url"][0].removeprefix("file://"))
    before = path.read_bytes()
    path.write_bytes(b"")
    try:
        assert any("is now unreadable" in str(one) for one in check(str(copy), deep=True, sample=FRAMES))
    finally:
        path.write_bytes(before)


def test_missing_attributes_are_found(copy):
    document = copy / "s0001/cam1/ccd4/zarr.json"
    content = json.loads(document.read_text())
    del content["attributes"]["wcs"]
    document.write_text(json.dumps(content))
    assert any("changed after it was written" in one.what for one in check(str(copy)))


def test_an_unfinished_build_is_said_to_be_unfinished(made, tmp_path):
    plan = tessbkg.plan_build(
        str(tmp_path / "s.zarr"), **CCD1, root=str(made / "src"), dark_frames=3, shard_frames=8, bin=32
    )

    def stop(step, done, total):
        if step == "reduce" and done == 1:
            raise KeyboardInterrupt

    from tessbkg.jobs import run_build

    with pytest.raises(KeyboardInterrupt):
        run_build(plan, progress=stop)
    assert ["not finished" in one.what for one in check(str(tmp_path / "s.zarr"))] == [True]
    run_build(plan)
    assert check(str(tmp_path / "s.zarr")) == []


def test_only_some_ccds_are_checked_when_asked(made, copy):
    assert check(str(copy), sector=1, camera=1) == []
    with pytest.raises(StoreError, match="it has sector 1 camera 1 CCD 4"):
        check(str(copy), camera=2)
    with pytest.raises(ValueError, match="camera=5"):
        check(str(copy), camera=5)


def test_no_store_is_an_error(tmp_path):
    with pytest.raises(StoreError, match="not a Zarr store"):
        check(str(tmp_path / "none"))


def test_the_report_tells_status_bytes_and_retries(made):
    report = tessbkg.read_report(str(made / "s.zarr"), **CCD1)
    assert list(report) == ["ffi", "status", "reason", "seconds", "nbytes", "retries", "scatter"]
    assert report["status"][[3, 7]].tolist() == [2, 5]
    assert "empty" in report["reason"][3]
    assert (report["nbytes"][report["status"] == 0] > 0).all()
    assert (report["retries"] == 0).all()
    assert report["scatter"].dtype == float


@pytest.mark.parametrize("shard", [0, 1])
def test_a_damaged_shard_is_mended_by_building_it_again(made, copy, shard):
    group = copy / "s0001/cam1/ccd4"
    flipped(group / f"scattered_light/c/{shard}/0/0", 77)
    assert check(str(copy)) != []
    (group / f"frame_status/c/{shard}").unlink()
    report = tessbkg.build(str(copy), **CCD1, root=str(made / "src"), dark_frames=3, shard_frames=8, bin=32)
    assert report.shards_done == 1
    assert check(str(copy), deep=True, sample=FRAMES) == []
    for name in ("scattered_light", "frame_status"):
        ours, clean = (
            zarr.open_array(str(s), path=f"s0001/cam1/ccd4/{name}")[:] for s in (copy, made / "s.zarr")
        )
        assert ours.tobytes() == clean.tobytes()
