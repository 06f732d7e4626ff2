"""Frames are found, each exposure once, in order."""

from __future__ import annotations

import os

import fsspec
import numpy as np
import pandas as pd
import pytest
from frames import contents, edited, listed, memory_root, simulated
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from servers import Fault

import tessbkg
from tessbkg.catalog import COLUMNS, NAME, list_ffis, single_ccd, stamp_to_tjd
from tessbkg.ccd import CCD
from tessbkg.errors import CatalogError, FFIReadError


def touch(root: str, keys, data: bytes = b"") -> None:
    """Make many files in memory at once."""
    fs = fsspec.filesystem("memory")
    _, path = fsspec.core.url_to_fs(root)
    for key in keys:
        fs.store[f"{path}/{key}"] = MemoryFile(fs, f"{path}/{key}", data)
    folders = {f"{path}/{key}".rsplit("/", depth)[0] for key in keys for depth in range(1, 6)}
    fs.pseudo_dirs.extend(sorted(folders - set(fs.pseudo_dirs)))


def key_of(stamp: str, *, sector=1, camera=1, ccd=4, scid=120, kind="ffic") -> str:
    folder = f"ffi/s{sector:04d}/{stamp[:4]}/{stamp[4:7]}/{camera}-{ccd}"
    return f"{folder}/tess{stamp}-s{sector:04d}-{camera}-{ccd}-{scid:04d}-s_{kind}.fits"


# --- real names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sector", "names", "frames"), [(1, 1282, 1282), (2, 1543, 1245), (56, 11775, 11775)]
)
def test_real_names(shared, monkeypatch, *, sector, names, frames):
    table = pd.read_parquet(shared / "catalogs" / f"tess-s{sector:04d}-spoc-ffi-catalog.parquet")
    keys = table[(table["camera"] == 1) & (table["ccd"] == 1)]["path"].tolist()
    assert len(keys) == names
    root = memory_root()
    folders = {}
    for key in keys:
        for name in (key, key.replace("_ffic", "_ffir")):
            path, kind = f"{root.removeprefix('memory:/')}/{name}", "file"
            while path.count("/") > 1:
                folder = path.rpartition("/")[0]
                folders.setdefault(folder, {})[path] = kind
                path, kind = folder, "directory"
    asked = []

    def ls(self, path, detail=True, **kwargs):
        asked.append(path)
        found = folders.get("/" + path.strip("/"))
        if found is None:
            raise FileNotFoundError(path)
        return [{"name": name, "type": kind, "size": 5} for name, kind in found.items()]

    monkeypatch.setattr(MemoryFileSystem, "ls", ls)
    found = list_ffis(sector=sector, camera=1, ccd=1, root=root)
    assert len(found) == frames
    assert list(found.columns) == list(COLUMNS)
    assert found["start"].is_monotonic_increasing
    assert found["ffi"].is_unique
    assert not found["ffi"].str.contains("ffir").any()
    assert np.diff(found["start"]).min() * 86400 > 190
    assert (found[["sector", "camera", "ccd"]] == [sector, 1, 1]).all(axis=None)
    days = {key.rsplit("/", 2)[0] for key in keys}
    assert len(asked) == 1 + len({day.rpartition("/")[0] for day in days}) + len(days)
    if sector == 2:  # a pair is one exposure: one of both is kept
        kept = set(found["ffi"])
        assert kept <= {key.rpartition("/")[2] for key in keys}
        stamps = stamp_to_tjd([NAME.fullmatch(key.rpartition("/")[2])[1] for key in keys])
        nearest = np.abs(found["start"].to_numpy()[:, None] - stamps).min(axis=0)
        assert (nearest * 86400 < 60).all()


def test_stamps_are_the_start_of_the_exposure():
    root, truth = simulated(4)
    start = truth["time"].to_numpy() - 900 / 86400
    assert np.abs(listed(root)["start"].to_numpy() - start).max() * 86400 < 2
    assert stamp_to_tjd([]).size == 0
    # 2018-07-25T19:29:42 UTC is 69.184 s less in UTC than in TDB
    assert stamp_to_tjd(["2018206192942"])[0] == pytest.approx(
        2458325.3122916667 - 2457000 + 69.184 / 86400, abs=2e-8
    )


# --- below a root ------------------------------------------------------------------------------------------


def test_one_ccd_of_many():
    root, _ = simulated(3)
    simulated(5, root=root, camera=2, ccd=1)
    simulated(2, root=root, sector=2)
    assert list_ffis(sector=1, root=root).groupby(["camera", "ccd"]).size().to_dict() == {
        (1, 4): 3,
        (2, 1): 5,
    }
    assert len(list_ffis(sector=[1, 2], camera=1, root=root)) == 5
    assert len(list_ffis(sector=1, camera=[1, 2], ccd=(1, 4), root=root)) == 8
    assert len(list_ffis(sector=np.int64(1), camera=2, ccd=1, root=root + "/")) == 5
    frames = list_ffis(sector=1, camera=2, ccd=1, root=root)
    assert single_ccd(frames) == CCD(1, 2, 1)
    assert tessbkg.read_ffi(frames["url"][0]).header.camera == 2
    with pytest.raises(ValueError, match=r"frames are of 2 CCDs \(s0001/cam1/ccd4, s0001/cam2/ccd1\)"):
        single_ccd(list_ffis(sector=1, root=root))


@pytest.mark.parametrize("sector", [99, 100, 104, 1751, 9999])
def test_any_sector_number(sector):
    root, _ = simulated(2, sector=sector)
    found = list_ffis(sector=sector, root=root)
    assert list(found["sector"]) == [sector, sector]
    assert found["url"].str.contains(f"/s{sector:04d}/").all()


def test_configuration_number_changes_and_twins_are_left_out():
    root, _ = simulated(6, scid_change=True)
    found = listed(root)
    assert len(found) == 6
    assert found["ffi"].str[-16:-12].nunique() == 2
    fs = fsspec.filesystem("memory")
    assert sum("_ffir" in name for name in fs.find(root)) == 6


def test_foreign_names_are_left_out():
    root = memory_root()
    good = key_of("2018206192942")
    touch(
        root,
        [
            good,
            good + ".gz",
            good.replace("_ffic", "_ffir"),
            good.replace("tess2018", "hlsp_tess2018"),
            good.replace("-s_ffic", "-q_ffic"),
            "ffi/s0001/notes/readme.txt",
            "ffi/s0001/2018/readme.txt",
            "ffi/s0001/2018/206/1-4/index.html",
        ],
    )
    assert list(listed(root)["ffi"]) == [good.rpartition("/")[2]]


def test_year_change_and_order():
    root = memory_root()
    stamps = ["2019001000942", "2018365233942", "2019001003942", "2018365230942"]
    touch(root, [key_of(stamp) for stamp in stamps])
    assert [name[4:17] for name in listed(root)["ffi"]] == sorted(stamps)


def test_over_s3_anonymously(ministack, proxy):
    bucket = ministack.bucket(public_read=True)
    fs = ministack.filesystem()
    keys = [key_of(f"2018{day}192942", camera=c) for day in (206, 207, 208) for c in (1, 2)]
    fs.pipe({f"{bucket}/tess/public/{key}": b"12345" for key in keys})
    front = proxy(ministack)
    found = list_ffis(
        sector=1, camera=1, ccd=4, root=f"{bucket}/tess/public", storage_options=front.options(anon=True)
    )
    assert list(found["url"]) == [f"{bucket}/tess/public/{key}" for key in keys[::2]]
    assert list(found["size"]) == [5, 5, 5]
    assert len(front.log) == len(front.listings()) == 1 + 1 + 3
    assert not any(exchange.request.signed for exchange in front.log)
    front.fault = lambda _: Fault("status", 403)
    with pytest.raises(FFIReadError, match="access denied"):
        list_ffis(sector=1, root=f"{bucket}/tess/public", storage_options=front.options(anon=True))


# --- lists, globs, folders ---------------------------------------------------------------------------------


def test_list_glob_folder_file(tmp_path):
    root, _ = simulated(4, root=str(tmp_path))
    expected = listed(root)["ffi"].tolist()
    urls = listed(root)["url"].tolist()
    for files in (
        urls[::-1],
        iter(urls),
        [*urls, urls[0]],
        tuple(tmp_path / url.partition(str(tmp_path) + "/")[2] for url in urls),
        f"{root}/ffi/*/*/*/1-4/*_ffic.fits",
        f"{root}/ffi/**/*.fits",
        root,
        f"{root}/ffi/s0001",
    ):
        assert list_ffis(files)["ffi"].tolist() == expected
    assert list_ffis(urls[2])["ffi"].tolist() == expected[2:3]
    assert list_ffis(root, camera=1, ccd=4, sector=1)["ffi"].tolist() == expected
    assert (list_ffis(root)["size"] > 0).all()
    with pytest.raises(CatalogError, match=r"no calibrated FFIs \(camera 2\) in .*" + tmp_path.name):
        list_ffis(root, camera=2)


# --- one exposure twice ------------------------------------------------------------------------------------


def test_newer_processing_is_kept_by_its_header():
    root, truth = simulated(6, faults={1: "duplicate", 2: "duplicate", 5: "duplicate"})
    fs = fsspec.filesystem("memory")
    assert sum("_ffic" in name for name in fs.find(root)) == 9
    assert listed(root)["ffi"].tolist() == truth["ffi"].to_numpy().tolist()


@pytest.fixture(scope="module")
def small() -> bytes:
    root, _ = simulated(1)
    return contents(listed(root)["url"][0])


def pair(tmp_path, first: bytes, second: bytes, seconds=(0, 0)):
    """Write two files of one exposure, a second apart; return which is kept."""
    for number, data in enumerate((first, second)):
        path = tmp_path / key_of(f"201820619294{2 + number}").rpartition("/")[2]
        path.write_bytes(data)
        os.utime(path, (1_600_000_000 + seconds[number],) * 2)
    [kept] = list_ffis(str(tmp_path))["ffi"]
    return int(kept[16]) - 2


@pytest.mark.parametrize("newer", [0, 1])
def test_what_decides_between_two_processings(tmp_path, small, newer):
    order = (lambda pair: pair[::-1]) if newer == 0 else (lambda pair: pair)
    release = order([edited(small, 0, DATA_REL=9), edited(small, 0, DATA_REL=10)])
    assert pair(tmp_path, *release, seconds=order([9, 0])) == newer
    dates = order([edited(small, 0, DATE="'2018-12-31'"), edited(small, 0, DATE="'2019-01-01'")])
    assert pair(tmp_path, *dates, seconds=order([9, 0])) == newer
    assert pair(tmp_path, small, small, seconds=order([0, 9])) == newer
    assert pair(tmp_path, b"garbage", b"", seconds=order([0, 9])) == newer
    assert pair(tmp_path, *order([b"garbage", small]), seconds=order([9, 0])) == newer


def test_of_equals_the_earlier_stamp_is_kept(tmp_path, small):
    assert pair(tmp_path, small, small) == 0


def test_three_of_one_exposure_and_neighbours():
    root = memory_root()
    touch(
        root,
        [key_of(stamp) for stamp in ("2018206192942", "2018206192943", "2018206192944", "2018206195942")],
    )
    touch(root, [key_of("2018206192943", ccd=3), key_of("2018206192942", camera=2)])
    assert [name[4:17] for name in listed(root)["ffi"]] == ["2018206192944", "2018206195942"]  # written last
    assert len(list_ffis(sector=1, root=root)) == 4  # other CCDs are other exposures


# --- nothing found, wrong arguments ------------------------------------------------------------------------


def test_nothing_found_says_what_and_where(tmp_path):
    root, _ = simulated(1)
    for arguments, match in (
        ({"sector": 7, "root": root}, rf"no calibrated FFIs \(sector 7\) in {root}/ffi"),
        ({"sector": 1, "camera": 3, "ccd": 2, "root": root}, r"\(sector 1, camera 3, CCD 2\)"),
        ({"sector": 1, "root": str(tmp_path)}, str(tmp_path)),
        ({"files": f"{tmp_path}/*.fits"}, str(tmp_path)),
        ({"files": str(tmp_path)}, str(tmp_path)),
        ({"files": []}, "a list of 0 files"),
        ({"files": ["a.txt"]}, "'a.txt' does not have the name of a calibrated FFI"),
        ({"files": f"{tmp_path}/nothing.fits"}, "nothing.fits"),
    ):
        with pytest.raises(CatalogError, match=match):
            list_ffis(**arguments)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({}, "sector is missing"),
        ({"sector": 0}, "sector=0 is out of range: allowed are 1 to 9999"),
        ({"sector": 10_000}, "sector=10000"),
        ({"sector": 1.5}, "sector=1.5 is not an integer"),
        ({"sector": "1"}, "sector='1' is not an integer"),
        ({"sector": True}, "sector=True is not an integer"),
        ({"sector": [1, 0]}, "sector=0"),
        ({"sector": 1, "camera": 5}, "camera=5 is out of range: allowed are 1 to 4"),
        ({"sector": 1, "ccd": 0}, "ccd=0"),
        ({"sector": 1, "camera": []}, "camera"),
        ({"sector": 1, "storage_options": {"secret": "x"}}, "storage_options holds 'secret'"),
        ({"sector": 1, "root": "nonsense://x"}, "nonsense"),
    ],
    ids=str,
)
def test_wrong_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        list_ffis(**{"root": "memory://empty", **arguments})
