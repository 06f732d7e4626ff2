"""Many builds at once into one store, and builds killed and resumed for a long time."""

import logging
import os
import random
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from builds import REDUCTION, Build, assert_equal
from frames import CCD1, simulated

import tessbkg
from tessbkg.check import check

logger = logging.getLogger(__name__)

SOAK_MINUTES = float(os.environ.get("TESSBKG_SOAK", "20"))
TINY = {"dark_frames": 2, "shard_frames": 2, "bin": 32}


def tiny(tmp_path, store, options, ccd):
    """Build a CCD of three frames of 64 x 64 pixels."""
    names = dict(zip(("sector", "camera", "ccd"), ccd, strict=True))
    return tessbkg.build(store, **names, root=str(tmp_path / "src"), store_options=options, **TINY)


def test_a_build_asks_little_of_its_store(ministack, tmp_path, proxy):
    simulated(3, shape=(64, 64), root=str(tmp_path / "src"), ffir=False)
    store, counting = f"{ministack.bucket()}/bkg.zarr", proxy(ministack)
    tiny(tmp_path, store, counting.options(), (1, 1, 4))
    objects = len(ministack.filesystem().find(store))
    methods = Counter(exchange.request.method for exchange in counting.log)
    assert set(methods) <= {"GET", "HEAD", "PUT"}  # builders delete nothing
    assert methods["PUT"] <= objects + 10
    assert methods.total() <= 2.5 * objects
    counting.clear()
    tiny(tmp_path, store, counting.options(), (1, 1, 4))
    assert len(counting.log) <= 15
    assert not counting.writes()
    counting.clear()
    tessbkg.open_background(store, **CCD1, store_options=counting.options())
    assert len(counting.log) <= 80


def many(ministack, tmp_path, sectors: int, at_once: int) -> None:
    """Build all CCDs of some sectors into one store, some at a time, each in a thread."""
    ccds = [(s, c, k) for s in range(1, sectors + 1) for c in range(1, 5) for k in range(1, 5)]
    for s, c, k in ccds:
        simulated(3, shape=(64, 64), root=str(tmp_path / "src"), sector=s, camera=c, ccd=k, ffir=False)
    store, me = f"{ministack.bucket()}/bkg.zarr", psutil.Process()
    seen = []

    def one(ccd):
        report = tiny(tmp_path, store, ministack.options(), ccd)
        seen.append((me.memory_info().rss / 1e6, me.num_fds()))
        return report

    began = time.perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        reports = list(pool.map(one, ccds))
    seconds = time.perf_counter() - began
    memory, files = map(max, zip(*seen, strict=True))
    logger.info("%d builds in %.0f s: %.0f MB, %d open files", len(ccds), seconds, memory, files)
    assert memory < 1000 + 20 * at_once  # each thread has an S3 client of its own
    assert files < 1000 + 10 * at_once  # and keeps its connections
    assert [sum(report.counts.values()) for report in reports] == [3] * len(ccds)
    began = time.perf_counter()
    assert check(store, store_options=ministack.options()) == []
    logger.info("checked in %.0f s", time.perf_counter() - began)
    # any of them is what it is when built alone
    for ccd in ccds[:: max(len(ccds) // 4, 1)]:
        tiny(tmp_path, str(tmp_path / "alone.zarr"), None, ccd)
        names = dict(zip(("sector", "camera", "ccd"), ccd, strict=True))
        light = [
            tessbkg.open_background(url, **names, store_options=options)["scattered_light"].to_numpy()
            for url, options in ((store, ministack.options()), (str(tmp_path / "alone.zarr"), None))
        ]
        assert light[0].tobytes() == light[1].tobytes()


@pytest.mark.slow
def test_sixteen_ccds_are_built_at_once_into_one_store(ministack, tmp_path):
    many(ministack, tmp_path, 1, 16)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_two_hundred_ccds_are_built_at_once_into_one_store(ministack, tmp_path):
    many(ministack, tmp_path, 13, 208)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_memory_and_open_files_stay_flat_while_builds_are_killed_and_resumed(tmp_path):
    source, clean = str(tmp_path / "src"), str(tmp_path / "clean.zarr")
    simulated(32, shape=(64, 64), root=source, faults={5: "empty"})
    tessbkg.build(clean, **CCD1, root=source, **REDUCTION)
    me, chance, seen = psutil.Process(), random.Random(5), []
    log = Path(os.environ.get("TESSBKG_SOAK_LOG", tmp_path / "soak.csv"))
    end = time.monotonic() + SOAK_MINUTES * 60
    number = 0
    while time.monotonic() < end:
        store = tmp_path / f"{number}.zarr"
        for _ in range(2):
            build = Build(store, "--root", source, *chance.choice([(), (), ("--workers", "2")]))
            time.sleep(chance.uniform(0.5, 3.0))
            build.signal(chance.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
            build.end()
        tessbkg.build(str(store), **CCD1, root=source, **REDUCTION)
        assert_equal(str(store), clean)
        if number % 10 == 0:
            assert check(str(store), deep=True) == []
        number += 1
        seen.append((me.memory_info().rss / 1e6, me.num_fds()))
        with log.open("a") as file:
            file.write(f"{number},{seen[-1][0]:.1f},{seen[-1][1]},{len(me.children(recursive=True))}\n")
    quarter = max(len(seen) // 4, 1)
    memory = [max(m for m, _ in part) for part in (seen[quarter : 2 * quarter], seen[-quarter:])]
    files = [max(f for _, f in part) for part in (seen[quarter : 2 * quarter], seen[-quarter:])]
    assert memory[1] < memory[0] + 40
    assert files[1] <= files[0] + 2
