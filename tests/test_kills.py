"""Builds that are killed, stopped and cut off end, and go on where they were."""

import os
import random
import signal
import subprocess
import time

import pytest
from builds import ARGUMENTS, DASK, REDUCTION, TESSBKG, Build, assert_equal, gone, some
from frames import CCD1, simulated
from servers import Fault, free_port

import tessbkg
from tessbkg.check import check

FRAMES = 48
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143}


@pytest.fixture(scope="module")
def source(serve_folder, tmp_path_factory):
    """A slow source of small frames, some of them bad, and an uninterrupted build of it."""
    folder = tmp_path_factory.mktemp("kills")
    faults = {5: "empty", 17: "zero", 30: "garbage"}
    simulated(FRAMES, shape=(64, 64), root=str(folder / "bucket"), faults=faults)
    server = serve_folder(folder, latency_ms=100)
    tessbkg.build(str(folder / "clean.zarr"), **CCD1, root=str(folder / "bucket"), **REDUCTION)
    return server, str(folder / "clean.zarr")


def where(server) -> list[str]:
    return ["--root", "s3://bucket", "--endpoint-url", server.endpoint_url]


def finish(server, store, clean) -> None:
    """Go on with a build in this process; the store must be that of the uninterrupted one."""
    tessbkg.build(
        str(store),
        **CCD1,
        root="s3://bucket",
        storage_options={"endpoint_url": server.endpoint_url},
        **REDUCTION,
    )
    assert_equal(str(store), clean, apart={"survey/url", "survey/size"})
    assert check(str(store)) == []


@pytest.mark.parametrize(
    ("how", "number"),
    some(
        [(how, number) for how in ("here", "workers") for number in SIGNALS],
        ("here", signal.SIGTERM),
        ("workers", signal.SIGINT),
    ),
)
def test_a_signal_ends_a_build_within_seconds(source, tmp_path, number, how):
    server, clean = source
    out = tmp_path / "s.zarr"
    build = Build(out, *where(server), *(["--workers", "2"] if how == "workers" else []))
    build.wait_for("reduce, ")
    time.sleep(0.4)
    workers = build.workers()
    assert bool(workers) == (how == "workers")
    began = time.monotonic()
    build.signal(number, group=number == signal.SIGINT)  # a terminal sends SIGINT to the whole group
    assert build.end(15) == SIGNALS[number], build.said
    assert time.monotonic() - began < 12
    assert gone(workers)
    assert f"stopped by {number.name}; what is written stays. To go on:" in build.said
    assert f"  tessbkg build {out} {' '.join(ARGUMENTS)}" in build.said
    assert "Traceback" not in build.said, build.said
    finish(server, out, clean)


@pytest.mark.slow
def test_a_stalled_read_does_not_hold_the_end(source, tmp_path, proxy):
    server, _ = source
    stalled = proxy(
        server, lambda request: Fault("stall", seconds=50) if "range" in request.headers else None
    )
    build = Build(tmp_path / "s.zarr", *where(stalled))
    build.wait_for("survey, ")
    time.sleep(1)
    began = time.monotonic()
    build.signal(signal.SIGTERM)
    assert build.end(15) == 143
    assert time.monotonic() - began < 3


def test_a_stalled_frame_does_not_hold_the_end(source, tmp_path, proxy):
    server, clean = source
    armed = []
    stalled = proxy(
        server, lambda request: Fault("stall", seconds=50) if armed and "range" in request.headers else None
    )
    build = Build(tmp_path / "s.zarr", *where(stalled))
    build.wait_for("reduce, ")
    armed.append(1)
    time.sleep(0.5)
    began = time.monotonic()
    build.signal(signal.SIGINT)
    assert build.end(15) == 130
    assert time.monotonic() - began < 3
    finish(server, tmp_path / "s.zarr", clean)


def rounds(source, tmp_path, number: int, seed: int) -> dict[str, int]:
    """Kill builds on LocalClusters at random moments, always into the same store; then finish it."""
    server, clean = source
    chance = random.Random(seed)
    counts = {"worker": 0, "workers": 0, "driver": 0, "finished": 0}
    for k in range(number):
        store = tmp_path / f"{k // 4}.zarr"  # four kills a store
        build = Build(store, *where(server), "--workers", "2")
        build.wait_for(chance.choice(["survey, ", "scene, ", "reduce, "]) if k % 4 == 0 else "dashboard")
        time.sleep(chance.uniform(0, 1.5))
        victims, what = build.workers(), chance.choice(["worker", "workers", "driver"])
        if what == "driver":
            build.signal(signal.SIGKILL)
            build.process.wait()
            assert gone(victims), "workers outlive their driver"
        else:
            for victim in victims[: 1 if what == "worker" else None]:
                victim.kill()
            time.sleep(chance.uniform(0, 1))
            if what == "workers":
                build.signal(signal.SIGKILL)
                build.process.wait()
            elif build.end() == 0:
                counts["finished"] += 1
            else:
                assert "tessbkg: " in build.said
        counts[what] += 1
        build.end()
    for k in range(-(-number // 4)):
        finish(server, tmp_path / f"{k}.zarr", clean)
    return counts


def test_builds_killed_at_random_end_in_the_same_store(source, tmp_path):
    rounds(source, tmp_path, 4, seed=7)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_builds_killed_at_random_many_times_end_in_the_same_store(source, tmp_path):
    counts = rounds(source, tmp_path, 40, seed=8)
    assert min(counts["worker"], counts["workers"], counts["driver"]) > 0, counts


class Cluster:
    """A scheduler and workers as processes of their own."""

    def __init__(self, workers: int, tmp_path) -> None:
        self.address = f"tcp://127.0.0.1:{free_port()}"
        self.log = (tmp_path / "dask.log").open("ab")
        port = self.address.rpartition(":")[2]
        self.scheduler = self.start("scheduler", "--host", "127.0.0.1", "--port", port)
        self.workers = [
            self.start(
                "worker",
                self.address,
                "--nthreads",
                "1",
                "--host",
                "127.0.0.1",
                "--local-directory",
                str(tmp_path),
            )
            for _ in range(workers)
        ]

    def start(self, *command: str):
        return subprocess.Popen(
            [DASK, command[0], *command[1:], "--no-dashboard"],
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @staticmethod
    def kill(process) -> None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def close(self) -> None:
        for process in (*self.workers, self.scheduler):
            if process.poll() is None:
                self.kill(process)
        self.log.close()


@pytest.fixture
def cluster(tmp_path):
    made = Cluster(2, tmp_path)
    yield made
    made.close()


def test_a_build_on_a_scheduler_survives_the_loss_of_a_worker_and_of_its_driver(source, tmp_path, cluster):
    server, clean = source
    out = tmp_path / "s.zarr"
    first = Build(out, *where(server), "--scheduler", cluster.address)
    first.wait_for("reduce, ")
    first.signal(signal.SIGKILL)
    first.end()
    second = Build(out, *where(server), "--scheduler", cluster.address)
    second.wait_for("reduce, ")
    time.sleep(0.3)
    cluster.kill(cluster.workers[0])
    assert second.end() == 0, second.said
    assert_equal(str(out), clean, apart={"survey/url", "survey/size"})
    assert check(str(out)) == []


def test_the_loss_of_the_scheduler_is_one_line_and_the_build_goes_on_elsewhere(source, tmp_path, cluster):
    server, clean = source
    out = tmp_path / "s.zarr"
    build = Build(
        out,
        *where(server),
        "--scheduler",
        cluster.address,
        env={"DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "3s"},
    )
    build.wait_for("reduce, ")
    time.sleep(0.3)
    cluster.kill(cluster.scheduler)
    assert build.end(60) == 1, build.said
    assert "tessbkg: the cluster could not do the work" in build.said
    finish(server, out, clean)


@pytest.mark.slow
def test_sigterm_on_a_scheduler_leaves_the_cluster_running(source, tmp_path, cluster):
    server, clean = source
    out = tmp_path / "s.zarr"
    build = Build(out, *where(server), "--scheduler", cluster.address)
    build.wait_for("reduce, ")
    build.signal(signal.SIGTERM)
    assert build.end(15) == 143, build.said
    assert cluster.scheduler.poll() is None
    again = Build(out, *where(server), "--scheduler", cluster.address)
    assert again.end() == 0, again.said
    assert_equal(str(out), clean, apart={"survey/url", "survey/size"})


def test_two_processes_that_build_the_same_ccd_write_the_same_bytes(source, tmp_path):
    server, clean = source
    out = tmp_path / "s.zarr"
    both = [Build(out, *where(server)), Build(out, *where(server), "--workers", "1")]
    assert [one.end() for one in both] == [0, 0], [one.said for one in both]
    assert_equal(str(out), clean, apart={"survey/url", "survey/size"})
    assert check(str(out)) == []


@pytest.mark.slow
def test_many_processes_that_build_the_same_ccd_and_are_killed_leave_a_store_to_go_on_with(source, tmp_path):
    server, clean = source
    out, chance = tmp_path / "s.zarr", random.Random(3)
    several = [Build(out, *where(server)) for _ in range(3)]
    several[0].wait_for("reduce, ")
    for one in several[1:]:
        time.sleep(chance.uniform(0, 0.8))
        one.signal(signal.SIGKILL)
        one.end()
    assert several[0].end() == 0, several[0].said
    assert check(str(out)) == []
    finish(server, out, clean)


def test_a_finished_build_run_again_reads_no_pixel_and_says_so(source, tmp_path, proxy):
    server, _ = source
    counting = proxy(server)
    for wanted in (True, False):
        counting.clear()
        done = subprocess.run(
            [TESSBKG, "build", str(tmp_path / "s.zarr"), *ARGUMENTS, *where(counting)],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        assert bool(counting.reads()) is wanted
    assert "everything was there already: no pixel was read" in done.stdout
