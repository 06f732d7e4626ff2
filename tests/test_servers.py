"""The object stores of the tests do what ours is built upon, and the proxy counts and fails as told."""

from __future__ import annotations

import contextlib
import errno
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import fsspec
import numpy as np
import pytest
from servers import Daemon, Fault, FolderServer, Proxy, Request, S3Server, ServerStartError, ceph_missing

DATA = bytes(range(256)) * 800  # 204,800 bytes
if TYPE_CHECKING:
    from collections.abc import Callable

ONCE = {"config_kwargs": {"retries": {"max_attempts": 0}}}  # botocore's own retries, off


@pytest.fixture(params=["ministack", pytest.param("ceph", marks=pytest.mark.ceph)])
def s3(request: pytest.FixtureRequest) -> S3Server:
    return request.getfixturevalue(request.param)


@pytest.fixture
def public(hadro: FolderServer) -> str:
    """Return the URL of `DATA` in hadro."""
    url, folder = hadro.bucket()
    (folder / "data").write_bytes(DATA)
    return f"{url}/data"


def once(proxy: Proxy, *, anon: bool = True):
    """Return a file system that asks once."""
    s3 = fsspec.filesystem("s3", **proxy.options(anon=anon), **ONCE)
    s3.retries = 1
    return s3


def of_objects(fault: Fault, times: int | None = None) -> Callable[[Request], Fault | None]:
    """Return a callable that spoils the first `times` requests for objects, or all."""
    left = iter(range(times)) if times is not None else iter(int, 1)
    return lambda request: fault if request.key and next(left, None) is not None else None


# --- environment -------------------------------------------------------------------------------------------


def test_nothing_of_the_user_is_seen():
    own = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    assert own.pop("AWS_DEFAULT_REGION") == "us-east-1"
    assert own.pop("AWS_EC2_METADATA_DISABLED") == "true"
    assert {own.pop("AWS_CONFIG_FILE"), own.pop("AWS_SHARED_CREDENTIALS_FILE")} == {os.devnull}
    assert own == {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    assert [name for name in os.environ if name.lower().endswith("_proxy")] == ["NO_PROXY"]


def test_options_hold_no_credentials(ministack, hadro, proxy):
    for server in (ministack, hadro, proxy(hadro)):
        for anon in (False, True):
            options = server.options(anon=anon)
            assert options == {
                "anon": anon,
                "endpoint_url": server.endpoint_url,
                "client_kwargs": {"region_name": "us-east-1"},
            }
            assert options["client_kwargs"] is not server.options(anon=anon)["client_kwargs"]


def test_servers_listen_on_one_address_only(s3, hadro, proxy):
    for server in (s3, hadro, proxy(hadro)):
        port = urlsplit(server.endpoint_url).port
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            pass
        with pytest.raises(ConnectionRefusedError):  # 127.0.0.2 is loopback too, bound by a wildcard only
            socket.create_connection(("127.0.0.2", port), timeout=5)


# --- who may do what ---------------------------------------------------------------------------------------


def test_public_bucket_is_read_by_anybody_and_written_with_a_key(s3):
    bucket = s3.bucket(public_read=True)
    owner, anybody = s3.filesystem(), s3.filesystem(anon=True)
    owner.pipe(f"{bucket}/ffi/s0001/a.fits", DATA)
    assert anybody.cat(f"{bucket}/ffi/s0001/a.fits") == DATA
    assert anybody.find(bucket) == [f"{bucket[5:]}/ffi/s0001/a.fits"]
    assert anybody.info(f"{bucket}/ffi/s0001/a.fits")["size"] == len(DATA)
    with pytest.raises(FileNotFoundError):
        anybody.cat_file(f"{bucket}/ffi/s0001/b.fits", start=0, end=10)
    with pytest.raises(PermissionError):
        anybody.pipe(f"{bucket}/ffi/s0001/b.fits", DATA)
    with pytest.raises(PermissionError):
        anybody.rm_file(f"{bucket}/ffi/s0001/a.fits")
    assert owner.find(bucket) == [f"{bucket[5:]}/ffi/s0001/a.fits"]


def test_private_bucket_is_for_its_owner(s3):
    bucket = s3.bucket()
    owner, anybody = s3.filesystem(), s3.filesystem(anon=True)
    owner.pipe(f"{bucket}/a", DATA)
    assert owner.cat(f"{bucket}/a") == DATA
    with pytest.raises(PermissionError):
        anybody.cat_file(f"{bucket}/a", start=0, end=10)
    with pytest.raises(PermissionError):
        anybody.ls(bucket)
    with pytest.raises(PermissionError):
        anybody.pipe(f"{bucket}/b", DATA)


def test_unknown_key_is_refused(s3, proxy, monkeypatch):
    bucket = s3.bucket()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    with pytest.raises(PermissionError):
        proxy(s3).filesystem().pipe(f"{bucket}/a", DATA)


def test_bucket_is_made_once(ministack):
    url = ministack.bucket("twice")
    ministack.filesystem().pipe(f"{url}/a", b"a")
    assert ministack.bucket("twice") == url == "s3://twice"
    assert ministack.filesystem().cat(f"{url}/a") == b"a"
    with pytest.raises(ValueError, match="public_read=False"):
        ministack.bucket("twice", public_read=True)


def test_hadro_refuses_to_write(hadro, public):
    for anon in (True, False):
        with pytest.raises(OSError):
            hadro.filesystem(anon=anon).pipe(f"{public}2", DATA)
    assert hadro.filesystem().cat(public) == DATA


# --- listing -----------------------------------------------------------------------------------------------


def test_list_more_than_a_page(s3, proxy, request):
    n = 2_500 if request.node.callspec.params["s3"] == "ministack" else 1_200
    bucket = s3.bucket(public_read=True)
    keys = [f"ffi/s0001/2018/{day}/1-1/{i:05d}_ffic.fits" for day in (206, 207) for i in range(n // 2)]
    s3.filesystem().pipe({f"{bucket}/{key}": b"x" for key in keys}, batch_size=32)
    front = proxy(s3)
    anybody = front.filesystem(anon=True)
    assert anybody.find(bucket) == [f"{bucket[5:]}/{key}" for key in keys]
    assert len(front.listings()) == -(-n // 1000)
    assert not front.reads()
    days = s3.filesystem(anon=True).ls(f"{bucket}/ffi/s0001/2018")
    assert sorted(days) == [f"{bucket[5:]}/ffi/s0001/2018/{day}" for day in (206, 207)]


def test_list_more_than_a_page_of_a_folder(hadro, proxy):
    bucket, folder = hadro.bucket()
    day = folder / "ffi" / "206"
    day.mkdir(parents=True)
    for i in range(2_500):
        (day / f"{i:05d}_ffic.fits").write_bytes(b"x")
    front = proxy(hadro)
    assert front.filesystem(anon=True).find(bucket) == [
        f"{bucket[5:]}/ffi/206/{i:05d}_ffic.fits" for i in range(2_500)
    ]
    assert len(front.listings()) == 3


# --- ranges ------------------------------------------------------------------------------------------------


def check_ranges(s3, url: str) -> None:
    n = len(DATA)
    assert s3.cat_file(url) == DATA
    assert s3.cat_file(url, start=1000, end=70_000) == DATA[1000:70_000]
    assert s3.cat_file(url, start=n - 7) == DATA[-7:]
    assert s3.cat_file(url, start=-7) == DATA[-7:]
    assert s3.cat_file(url, start=n - 7, end=n + 1000) == DATA[-7:]
    with pytest.raises(OSError):
        s3.cat_file(url, start=n, end=n + 10)
    starts = list(range(0, n, 4096))
    ranges = s3.cat_ranges([url] * len(starts), starts, [i + 100 for i in starts])
    assert ranges == [DATA[i : i + 100] for i in starts]


def test_ranges(s3):
    bucket = s3.bucket(public_read=True)
    s3.filesystem().pipe(f"{bucket}/a", DATA)
    check_ranges(s3.filesystem(anon=True), f"{bucket}/a")
    check_ranges(s3.filesystem(), f"{bucket}/a")


def test_suffix_range_on_the_wire(s3, hadro, public):
    """s3fs turns a suffix into an absolute range; other clients, zarr's shard index among them, do not."""
    bucket = s3.bucket(public_read=True)
    s3.filesystem().pipe(f"{bucket}/a", DATA)
    for server, url in ((s3, f"{bucket}/a"), (hadro, public)):
        connection = http.client.HTTPConnection(urlsplit(server.endpoint_url).netloc, timeout=10)
        connection.request("GET", url.removeprefix("s3:/"), headers={"Range": "bytes=-20"})
        response = connection.getresponse()
        assert (response.status, response.read()) == (206, DATA[-20:])
        connection.close()


def test_ranges_of_a_folder(hadro, public):
    check_ranges(hadro.filesystem(), public)


def test_folder_over_plain_http(hadro, public):
    web = fsspec.filesystem("http")
    url = f"{hadro.endpoint_url}/{public[5:]}"
    assert web.cat_file(url, start=1000, end=70_000) == DATA[1000:70_000]
    with pytest.raises(FileNotFoundError):
        web.cat_file(f"{url}2", start=0, end=10)


# --- writing -----------------------------------------------------------------------------------------------


def test_write_in_parts(s3):
    url = f"{s3.bucket()}/big"
    big = np.random.default_rng(1).bytes(11 << 20)
    with s3.filesystem().open(url, "wb", block_size=5 << 20) as file:
        file.write(big)
    assert s3.filesystem().cat(url) == big


def test_overwrite_and_delete(s3):
    url = f"{s3.bucket()}/folder"
    owner = s3.filesystem()
    for content in (b"first", b"second, longer"):
        owner.pipe(f"{url}/a", content)
        assert owner.cat(f"{url}/a") == content
    owner.pipe({f"{url}/{i}": b"x" for i in range(30)})
    owner.rm(url, recursive=True)
    assert owner.find(url) == []


def test_create_only_if_absent(s3):
    """One of many writers wins, as for a lock or a template."""
    url = f"{s3.bucket()}/lock"
    wins = []

    def create(number: int) -> None:
        with contextlib.suppress(FileExistsError, OSError):
            s3.filesystem().pipe_file(url, str(number).encode(), mode="create")
            wins.append(str(number).encode())

    threads = [threading.Thread(target=create, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wins == [s3.filesystem().cat(url)]


def test_zarr_shards(s3):
    import zarr
    from zarr.storage import FsspecStore

    bucket = s3.bucket(public_read=True)
    value = np.arange(20 * 16 * 16, dtype="f4").reshape(20, 16, 16)
    store = FsspecStore.from_url(f"{bucket}/a.zarr", storage_options=s3.options())
    array = zarr.create_array(
        store, name="light", shape=value.shape, dtype="f4", chunks=(2, 8, 8), shards=(8, 16, 16)
    )
    array[:] = value
    array[8:16] += 1
    value[8:16] += 1
    shards = [key for key in s3.filesystem().find(bucket) if "/c/" in key]
    assert len(shards) == 3
    everybody = FsspecStore.from_url(
        f"{bucket}/a.zarr", storage_options=s3.options(anon=True), read_only=True
    )
    np.testing.assert_array_equal(zarr.open_array(everybody, path="light", mode="r")[:], value)
    np.testing.assert_array_equal(zarr.open_array(everybody, path="light", mode="r")[9, 3:5], value[9, 3:5])


def test_xarray_writes_regions_and_reads_few_bytes(s3, proxy):
    import dask.array
    import xarray as xr

    bucket = s3.bucket(public_read=True)
    url, group = f"{bucket}/b.zarr", "s0001/cam1/ccd4"
    light = np.random.default_rng(1).random((24, 32, 32), dtype="f4")
    lazy = xr.Dataset(
        {"light": (("time", "y", "x"), dask.array.zeros(light.shape, chunks=-1, dtype="f4"))},
        coords={"time": np.arange(24.0)},
    )
    encoding = {"light": {"chunks": (2, 32, 32), "shards": (8, 32, 32), "compressors": None}}
    common = {"group": group, "consolidated": False}
    lazy.to_zarr(
        url, storage_options=s3.options(), mode="w", compute=False, encoding=encoding, zarr_format=3, **common
    )
    for start in (16, 0, 8):
        region = slice(start, start + 8)
        part = xr.Dataset({"light": (("time", "y", "x"), light[region])})
        part.to_zarr(url, storage_options=s3.options(), region={"time": region}, **common)

    front = proxy(s3)
    with xr.open_zarr(url, storage_options=front.options(anon=True), **common) as ds:
        front.clear()
        np.testing.assert_array_equal(ds.light.isel(time=9), light[9])
        assert len(front.reads("/light/c/")) == 2  # the index of one shard and one chunk of it
        assert front.bytes_read("/light/c/") == 2 * 32 * 32 * 4 + 4 * 16 + 4
        np.testing.assert_array_equal(ds.light, light)


# --- the knobs of hadro ------------------------------------------------------------------------------------


def test_slow_and_failing_folder(serve_folder, tmp_path):
    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket" / "a").write_bytes(DATA)
    slow = serve_folder(tmp_path, latency_ms=200).filesystem()
    began = time.monotonic()
    assert slow.cat_file("s3://bucket/a", start=0, end=10) == DATA[:10]
    assert time.monotonic() - began >= 0.2
    failing = serve_folder(tmp_path, error_rate=1.0)
    with pytest.raises(OSError, match=r"reduce your request rate") as error:
        once(failing).cat_file("s3://bucket/a", start=0, end=10)
    assert error.value.errno == errno.EBUSY


# --- the proxy ---------------------------------------------------------------------------------------------


def test_proxy_counts_signed_and_anonymous_requests(s3, proxy):
    front = proxy(s3)
    bucket = s3.bucket(public_read=True)
    owner, anybody = front.filesystem(), front.filesystem(anon=True)
    owner.pipe_file(f"{bucket}/folder/a b+c=ü.fits", DATA)
    [put] = front.writes()
    assert (put.request.method, put.status, put.request.signed) == ("PUT", 200, True)
    assert put.request.path == f"/{bucket[5:]}/folder/a b+c=ü.fits"
    assert put.received >= len(DATA)
    front.clear()
    assert anybody.cat_file(f"{bucket}/folder/a b+c=ü.fits", start=100, end=300) == DATA[100:300]
    [get] = front.reads(".fits")
    assert (get.status, get.sent, get.request.range, get.request.signed) == (206, 200, "bytes=100-299", False)
    assert get.request.key == "folder/a b+c=ü.fits"
    assert front.bytes_read("nothing like it") == 0
    with pytest.raises(FileNotFoundError):
        anybody.cat_file(f"{bucket}/nothing", start=0, end=10)
    assert front.reads()[-1].status == 404
    numbers = [e.request.number for e in front.log]
    assert numbers == list(range(1, len(numbers) + 1))  # the PUT was number 0


def test_proxy_takes_many_requests_at_once(hadro, public, proxy):
    front = proxy(hadro)
    starts = list(range(0, len(DATA), 1000))
    got = front.filesystem(anon=True).cat_ranges([public] * len(starts), starts, [i + 1000 for i in starts])
    assert b"".join(got) == DATA
    assert len(front.reads()) == len(starts)
    assert front.bytes_read() == len(DATA)
    assert sorted(e.request.number for e in front.log) == list(range(len(front.log)))


def test_proxy_writes_in_parts(s3, proxy):
    front = proxy(s3)
    url = f"{s3.bucket()}/big"
    big = np.random.default_rng(2).bytes(11 << 20)
    with front.filesystem().open(url, "wb", block_size=5 << 20) as file:
        file.write(big)
    assert front.filesystem().cat(url) == big
    assert front.bytes_read() == len(big)


@pytest.mark.parametrize(
    ("status", "raised"),
    [
        (403, (PermissionError, None)),
        (404, (FileNotFoundError, None)),
        (500, (OSError, errno.EREMOTEIO)),
        (503, (OSError, errno.EBUSY)),
    ],
)
def test_fault_status(hadro, public, proxy, status, raised):
    front = proxy(hadro, of_objects(Fault("status", status, retry_after=7)))
    with pytest.raises(raised[0], match=f"injected {status}") as caught:
        once(front).cat_file(public, start=0, end=10)
    assert (type(caught.value), caught.value.errno) == raised
    assert caught.value.__cause__.response["ResponseMetadata"]["HTTPHeaders"]["retry-after"] == "7"
    [exchange] = front.reads()
    assert (exchange.status, exchange.fault.status) == (status, status)


def test_fault_status_over_http_has_no_retry_after_unless_told(hadro, public, proxy):
    front = proxy(hadro, of_objects(Fault("status", 503, code="ServiceUnavailable")))
    connection = http.client.HTTPConnection(urlsplit(front.endpoint_url).netloc, timeout=10)
    for _ in range(2):  # over one connection
        connection.request("GET", f"/{public[5:]}")
        response = connection.getresponse()
        assert (response.status, response.getheader("Retry-After")) == (503, None)
        assert b"<Code>ServiceUnavailable</Code>" in response.read()
    connection.close()


def test_fault_some_times_only(hadro, public, proxy):
    front = proxy(hadro, of_objects(Fault("status", 503), times=1))
    assert front.filesystem(anon=True).cat_file(public, start=0, end=10) == DATA[:10]
    assert [e.status for e in front.reads()] == [503, 206]
    front.fault = None
    assert once(front).cat_file(public, start=0, end=10) == DATA[:10]


def test_fault_reset_before_the_answer(hadro, public, proxy):
    front = proxy(hadro, of_objects(Fault("reset")))
    connection = http.client.HTTPConnection(urlsplit(front.endpoint_url).netloc, timeout=10)
    connection.request("GET", f"/{public[5:]}")
    with pytest.raises(ConnectionResetError):
        connection.getresponse()
    connection.close()
    [exchange] = front.reads()
    assert (exchange.status, exchange.sent) == (0, 0)


def test_fault_reset_in_the_body(hadro, public, proxy):
    front = proxy(hadro, of_objects(Fault("reset", after=5000)))
    connection = http.client.HTTPConnection(urlsplit(front.endpoint_url).netloc, timeout=10)
    connection.request("GET", f"/{public[5:]}")
    response = connection.getresponse()
    with pytest.raises((ConnectionResetError, http.client.IncompleteRead)):
        response.read()
    connection.close()
    [exchange] = front.reads()
    assert (exchange.status, exchange.sent) == (200, 5000)


@pytest.mark.parametrize("fault", [Fault("reset", after=5000), Fault("truncate"), Fault("truncate", after=0)])
def test_fault_incomplete_body(hadro, public, proxy, fault):
    import aiohttp

    front = proxy(hadro, of_objects(fault))
    web = fsspec.filesystem("http")
    for read in (
        lambda: once(front).cat_file(public, start=0, end=20_000),
        lambda: web.cat_file(f"{front.endpoint_url}/{public[5:]}", start=0, end=20_000),
    ):
        front.clear()
        with pytest.raises(aiohttp.ClientPayloadError, match="of 20000 bytes"):
            read()
        [exchange] = front.reads()
        assert exchange.sent == (10_000 if fault.after is None else fault.after)


def test_fault_wrong_length_is_a_short_answer_without_an_error(hadro, public, proxy):
    front = proxy(hadro, of_objects(Fault("wrong_length", after=1234)))
    assert once(front).cat_file(public, start=0, end=20_000) == DATA[:1234]


def test_fault_corrupt_is_not_noticed_in_a_range(hadro, public, proxy):
    front = proxy(hadro, of_objects(Fault("corrupt", after=300)))
    got = once(front).cat_file(public, start=0, end=20_000)
    assert got[:300] == DATA[:300]
    np.testing.assert_array_equal(np.frombuffer(got[300:], "u1"), 255 - np.frombuffer(DATA[300:20_000], "u1"))


@pytest.mark.parametrize("after", [None, 5000])
def test_fault_stall(hadro, public, proxy, after):
    from botocore.exceptions import ReadTimeoutError
    from fsspec.exceptions import FSTimeoutError

    front = proxy(hadro, of_objects(Fault("stall", seconds=60, after=after)))
    options = front.options(anon=True)
    options["config_kwargs"] = {"read_timeout": 0.5, "retries": {"max_attempts": 0}}
    s3 = fsspec.filesystem("s3", **options)
    s3.retries = 1
    # s3fs raises botocore's error before the answer has begun, fsspec's own (without a word) after that
    with pytest.raises(ReadTimeoutError if after is None else FSTimeoutError):
        s3.cat_file(public, start=0, end=20_000)
    assert front.reads()[0].sent == (after or 0)
    front.fault = of_objects(Fault("stall", seconds=0.1, after=after))
    assert s3.cat_file(public, start=0, end=20_000) == DATA[:20_000]


def test_fault_after_the_server_did_it(ministack, proxy):
    front = proxy(ministack, of_objects(Fault("status", 500, forward=True)))
    url = f"{ministack.bucket()}/a"
    with pytest.raises(OSError, match="injected"):
        once(front, anon=False).pipe_file(url, DATA)
    assert ministack.filesystem().cat(url) == DATA
    front.fault = of_objects(Fault("reset"))
    with pytest.raises(Exception, match=r"Could not connect"):
        once(front, anon=False).pipe_file(f"{url}2", DATA)
    assert not ministack.filesystem().exists(f"{url}2")


def test_fault_callable_that_raises_fails_the_test(hadro, public):
    front = Proxy(hadro, lambda _: 1 // 0)
    connection = http.client.HTTPConnection(urlsplit(front.endpoint_url).netloc, timeout=10)
    connection.request("GET", f"/{public[5:]}")
    with pytest.raises(http.client.RemoteDisconnected):
        connection.getresponse()
    connection.close()
    with pytest.raises(ZeroDivisionError):
        front.close()


def test_closed_proxy_takes_its_filesystems_with_it(hadro, public):
    front = Proxy(hadro)
    ours = fsspec.filesystem("s3", **front.options(anon=True))
    assert ours.cat_file(public, start=0, end=10) == DATA[:10]
    assert ours is fsspec.filesystem("s3", **front.options(anon=True))
    front.close()
    assert ours is not fsspec.filesystem("s3", **front.options(anon=True))
    assert front.log[0].sent == 10


def test_closed_proxy_leaves_no_thread(hadro, public):
    before = set(threading.enumerate())
    front = Proxy(hadro, of_objects(Fault("stall", seconds=60)))
    connection = http.client.HTTPConnection(urlsplit(front.endpoint_url).netloc, timeout=10)
    connection.request("GET", f"/{public[5:]}")
    while not front.reads():
        time.sleep(0.01)
    front.close()
    connection.close()
    assert {t for t in set(threading.enumerate()) - before if t.name != "fsspecIO"} == set()


# --- starting and stopping ---------------------------------------------------------------------------------


def gone(group: int) -> bool:
    """Tell whether a process group ends; what was killed may take a moment."""
    deadline = time.monotonic() + 10
    while alive(group) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not alive(group)


def alive(group: int) -> bool:
    """Tell whether a process group has a member that is not a zombie."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
            if int(pgrp) == group and state != "Z":
                return True
    return False


def test_log_of_a_server_that_does_not_start_is_shown(tmp_path):
    with pytest.raises(ServerStartError, match=r"(?s)ended with status 3.*no such disk"):
        Daemon(["/bin/sh", "-c", "echo no such disk; exit 3"], log=tmp_path / "log", env={}).wait_until(
            lambda: False, seconds=10
        )
    daemon = Daemon(["/bin/sleep", "60"], log=tmp_path / "log2", env={})
    with pytest.raises(ServerStartError, match=r"sleep: not ready after 0\.1 s"):
        daemon.wait_until(lambda: False, seconds=0.1)
    assert gone(daemon.process.pid)


def test_stopping_ends_the_whole_group(tmp_path):
    """Also children, and what ignores SIGTERM."""
    script = "trap '' TERM; sleep 61 & echo ready; wait"
    daemon = Daemon(["/bin/sh", "-c", script], log=tmp_path / "log", env={})
    daemon.wait_until(lambda: "ready" in (tmp_path / "log").read_text(), seconds=10)
    daemon.stop(patience=0.1)
    assert gone(daemon.process.pid)
    daemon.stop()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_servers_die_with_the_tests(tmp_path, number):
    script = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from servers import Daemon
daemon = Daemon(["/bin/sleep", "62"], log=Path({str(tmp_path)!r}) / "log", env={{}})
print(daemon.process.pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as tests:
        group = int(tests.stdout.readline())
        assert alive(group)
        tests.send_signal(number)
        tests.wait(10)
    assert gone(group)


def test_ceph_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "ceph-mon" in ceph_missing()
