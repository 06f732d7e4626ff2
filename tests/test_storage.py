"""Bytes come back whole or with a typed error, after a bounded number of requests."""

from __future__ import annotations

import contextlib
import errno
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import aiohttp
import botocore.exceptions
import fsspec
import pytest
import urllib3
from fsspec.exceptions import FSTimeoutError
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict, CIMultiDictProxy
from servers import Fault
from yarl import URL

from tessbkg import storage
from tessbkg.errors import FFIMissingError, FFIReadError
from tessbkg.storage import (
    ATTEMPTS,
    check_options,
    filesystem,
    freeze,
    is_transient,
    read_range,
    read_ranges,
    read_rest,
    retry,
    source_options,
    thaw,
)

DATA = bytes(range(256)) * 400


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(storage, "BACKOFF_SECONDS", 0.001)


@pytest.fixture
def public(hadro) -> str:
    """Return the URL of `DATA` in hadro."""
    url, folder = hadro.bucket()
    (folder / "data").write_bytes(DATA)
    return f"{url}/data"


def first(fault: Fault, times: int):
    """Spoil the first requests for objects."""
    left = iter(range(times))
    return lambda request: fault if request.key and next(left, None) is not None else None


def s3(front, **config):
    """Return the filesystem that tessbkg would read with."""
    options = front.options(anon=True)
    if config:
        options["config_kwargs"] = config
    return filesystem("s3://bucket", source_options("s3://bucket", options))[0]


# --- options -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("secret", ["key", "secret", "token", "password", "headers", "aws_secret_access_key"])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_credentials_are_refused_at_any_depth(secret, depth):
    options = {secret: "hidden"}
    for _ in range(depth):
        options = {"client_kwargs": options}
    with pytest.raises(ValueError, match=f"store_options holds '{secret}'") as caught:
        check_options(options, "store_options")
    assert "hidden" not in str(caught.value)


def test_options_pass_and_none_is_no_credential():
    options = {"anon": False, "profile": "me", "key": None, "client_kwargs": {"region_name": "us-east-1"}}
    assert check_options(options) == options
    assert check_options(None) == {}


PLAIN = st.none() | st.booleans() | st.integers() | st.text(max_size=5)
PLAIN |= st.lists(PLAIN, max_size=2) | st.lists(st.dictionaries(st.text(max_size=3), PLAIN), max_size=2)
NESTED = st.dictionaries(
    st.text(max_size=3), PLAIN | st.dictionaries(st.text(max_size=3), PLAIN, max_size=3), max_size=4
)


@given(NESTED)
def test_frozen_options_are_hashed_and_thawed(options):
    assert thaw(freeze(options)) == options
    assert hash(freeze(options)) == hash(freeze(dict(reversed(options.items()))))


def test_sources_are_anonymous_and_do_not_retry_by_themselves():
    assert source_options("s3://b", None) == {"anon": True, "config_kwargs": {"retries": {"max_attempts": 0}}}
    assert source_options("s3://b", {"anon": False})["anon"] is False
    assert source_options("file:///b", None) == {}
    fs, path = filesystem("s3://b/c", source_options("s3://b", {"config_kwargs": {"read_timeout": 5}}))
    assert (path, fs.retries) == ("b/c", 1)
    assert fs.config_kwargs["read_timeout"] == 5
    assert fs.config_kwargs["max_pool_connections"] == 64
    assert filesystem("s3://b/c", {"anon": True})[0].retries > 1  # of stores


def test_unknown_protocol_is_a_wrong_argument():
    with pytest.raises(ValueError, match="cannot open 'nonsense://a'"):
        filesystem("nonsense://a")


# --- which faults are worth another try --------------------------------------------------------------------


def answered(status):
    asked = aiohttp.RequestInfo(URL("http://x"), "GET", CIMultiDictProxy(CIMultiDict()), URL("http://x"))
    return aiohttp.ClientResponseError(asked, (), status=status, message="no")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EBUSY, "SlowDown"),
        OSError(errno.EREMOTEIO, "InternalError"),
        OSError(errno.EIO, "unknown code"),
        OSError("no errno"),
        ConnectionResetError(),
        TimeoutError(),
        FSTimeoutError(),
        EOFError(),
        aiohttp.ClientPayloadError(),
        aiohttp.ServerDisconnectedError(),
        answered(500),
        answered(503),
        answered(429),
        answered(408),
        botocore.exceptions.ReadTimeoutError(endpoint_url="http://x"),
        botocore.exceptions.EndpointConnectionError(endpoint_url="http://x"),
        botocore.exceptions.ConnectionClosedError(endpoint_url="http://x"),
        botocore.exceptions.IncompleteReadError(actual_bytes=1, expected_bytes=2),
        botocore.exceptions.ResponseStreamingError(error="reset"),
        urllib3.exceptions.SSLError("bad record"),
    ],
)
def test_transient(error):
    assert is_transient(error)


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(),
        PermissionError(),
        IsADirectoryError(),
        NotADirectoryError(),
        OSError(errno.EINVAL, "InvalidRange"),
        OSError(errno.ENAMETOOLONG, "KeyTooLong"),
        ValueError(),
        KeyError("x"),
        answered(400),
        answered(403),
        answered(404),
        aiohttp.InvalidURL("x"),
        botocore.exceptions.NoCredentialsError(),
        botocore.exceptions.ProfileNotFound(profile="x"),
        botocore.exceptions.ParamValidationError(report="x"),
    ],
)
def test_final(error):
    assert not is_transient(error)
    calls = []

    def call():
        calls.append(1)
        raise error

    with pytest.raises(FFIReadError) as caught:
        retry(call, "the key", sleep=pytest.fail)
    assert len(calls) == 1
    assert caught.value.__cause__ is error
    assert caught.value.key == "the key"
    assert "\n" not in caught.value.reason


def failing(times, error):
    """Return a call that fails some times."""
    left = iter(range(times))

    def call():
        if next(left, None) is not None:
            raise error
        return "done"

    return call


def test_waits_grow_and_end(monkeypatch):
    monkeypatch.setattr(storage, "BACKOFF_SECONDS", 0.2)
    monkeypatch.setattr(storage.random, "uniform", lambda _, high: high)
    waits = []
    assert retry(failing(ATTEMPTS - 1, OSError("x")), "k", sleep=waits.append) == "done"
    assert waits == pytest.approx([0.2, 0.4, 0.8, 1.6, 3.2])
    with pytest.raises(FFIReadError, match=f"k: OSError: x after {ATTEMPTS} attempts"):
        retry(failing(ATTEMPTS, OSError("x")), "k", sleep=waits.append)


def test_jitter_spreads_the_waits():
    waits = {storage.pause(OSError("x"), 3) for _ in range(20)}
    assert len(waits) == 20
    assert 0 <= min(waits) <= max(waits) <= storage.BACKOFF_SECONDS * 8


def test_patience_ends_before_the_attempts_do():
    clock = itertools.count(0, 60)  # every look at the clock is a minute later
    waits = []
    with pytest.raises(FFIReadError, match="after 3 attempts"):
        retry(failing(99, TimeoutError("stalled")), "k", sleep=waits.append, clock=lambda: next(clock))
    assert len(waits) == 2


# --- over HTTP and S3, with a server that fails ------------------------------------------------------------

TRANSIENT = [
    Fault("status", 500),
    Fault("status", 503),
    Fault("status", 503, code="ServiceUnavailable", retry_after=0),
    Fault("status", 502),
    Fault("reset"),
    Fault("reset", after=5000),
    Fault("truncate"),
    Fault("truncate", after=0),
]


@pytest.mark.parametrize("fault", TRANSIENT, ids=str)
@pytest.mark.parametrize("protocol", ["s3", "http"])
def test_transient_faults_heal(hadro, public, proxy, protocol, fault):
    front = proxy(hadro, first(fault, 2))
    if protocol == "s3":
        fs, path = s3(front), public
    else:
        fs, path = filesystem(f"{front.endpoint_url}/{public[5:]}")
    assert read_range(fs, path, 1000, 21_000) == DATA[1000:21_000]
    assert len(front.reads()) == 3
    front.fault = first(fault, 2)
    front.clear()
    assert read_ranges(fs, [(path, i, i + 9000) for i in (0, 9000, 18_000)]) == [
        DATA[i : i + 9000] for i in (0, 9000, 18_000)
    ]
    assert len(front.reads()) == 5


@pytest.mark.parametrize("fault", TRANSIENT[1:6:2], ids=str)
@pytest.mark.parametrize("protocol", ["s3", "http"])
def test_lasting_faults_end_after_as_many_requests_as_attempts(hadro, public, proxy, protocol, fault):
    front = proxy(hadro, first(fault, 1000))
    if protocol == "s3":
        fs, path = s3(front), public
    else:
        fs, path = filesystem(f"{front.endpoint_url}/{public[5:]}")
    with pytest.raises(FFIReadError, match=f"after {ATTEMPTS} attempts"):
        read_range(fs, path, 0, 20_000)
    assert len(front.reads()) == ATTEMPTS
    front.clear()
    [error] = read_ranges(fs, [(path, 0, 20_000)])
    assert isinstance(error, FFIReadError)
    assert len(front.reads()) == ATTEMPTS


@pytest.mark.parametrize(("status", "kind"), [(403, FFIReadError), (404, FFIMissingError)])
@pytest.mark.parametrize("protocol", ["s3", "http"])
def test_refusal_and_absence_are_asked_once(hadro, public, proxy, protocol, *, status, kind):
    front = proxy(hadro, first(Fault("status", status), 1000))
    if protocol == "s3":
        fs, path = s3(front), public
    else:
        fs, path = filesystem(f"{front.endpoint_url}/{public[5:]}")
    with pytest.raises(kind, match="access denied" if status == 403 else "not found") as caught:
        read_range(fs, path, 0, 10)
    assert type(caught.value) is kind
    [error] = read_ranges(fs, [(path, 0, 10)])
    assert type(error) is kind
    assert len(front.reads()) == 2


@pytest.fixture
def private(ministack) -> str:
    """Return the path of `DATA` in a bucket of its owner."""
    bucket = ministack.bucket()
    ministack.filesystem().pipe(f"{bucket}/data", DATA)
    return f"{bucket[5:]}/data"


def owned(front, **options):
    """Return a filesystem that signs its requests."""
    return filesystem("s3://b", source_options("s3://b", {**front.options(), "anon": False, **options}))[0]


def test_ranges_of_s3_are_signed_unless_anonymous(ministack, private, proxy):
    front = proxy(ministack)
    assert read_range(owned(front), private, 10, 500) == DATA[10:500]
    with pytest.raises(FFIReadError, match="access denied"):
        read_range(s3(front), private, 10, 500)
    assert [entry.request.signed for entry in front.log] == [True, False]


def test_credentials_come_from_a_profile_or_the_configuration_of_fsspec(
    ministack, private, proxy, tmp_path, monkeypatch
):
    front = proxy(ministack)
    (tmp_path / "keys").write_text("[mine]\naws_access_key_id = test\naws_secret_access_key = test\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "keys"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert read_range(owned(front, profile="mine"), private, 0, 9) == DATA[:9]
    with pytest.raises(FFIReadError, match="Unable to locate credentials"):
        read_range(owned(front), private, 0, 9)
    monkeypatch.setitem(fsspec.config.conf, "s3", {"key": "test", "secret": "test"})
    assert read_range(owned(front), private, 0, 9) == DATA[:9]
    assert [entry.request.signed for entry in front.log] == [True, True]


def test_options_of_s3_reach_the_client_of_ranges(hadro, public, proxy):
    front = proxy(hadro)
    more = {
        "client_kwargs": {"region_name": "eu-west-1"},
        "config_kwargs": {
            "user_agent_extra": "tester",
            "connector_args": {"force_close": True},
            "warm_up_loader_caches": True,
        },
        "s3_additional_kwargs": {
            "ExpectedBucketOwner": "123456789012",
            "ServerSideEncryption": "AES256",
            "RequestPayer": None,
            "Range": "bytes=5-7",
        },
    }
    fs = owned(front, requester_pays=True, **more)
    assert read_range(fs, public, 0, 9) == DATA[:9]
    [entry] = front.log
    headers = entry.request.headers
    assert "/eu-west-1/s3/" in headers["authorization"]
    assert headers["user-agent"].endswith("tester")
    assert headers["x-amz-request-payer"] == "requester"
    assert headers["x-amz-expected-bucket-owner"] == "123456789012"
    assert "x-amz-server-side-encryption" not in headers


def test_a_version_that_a_url_names_is_asked_for(ministack, private, proxy):
    front = proxy(ministack)
    options = source_options("s3://b", {**front.options(), "anon": False})
    fs, path = filesystem(f"s3://{private}?versionId=old", options)
    with contextlib.suppress(FFIReadError):
        read_range(fs, path, 0, 9)
    assert front.log[0].request.query == "versionId=old"


def test_threads_share_one_client_and_read_side_by_side(hadro, public, proxy):
    together = threading.Barrier(4)

    def meet(request):  # nobody is answered before all have asked
        together.wait(30)

    front = proxy(hadro, meet)
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda i: read_range(s3(front), public, i, i + 9), range(4)))
    assert got == [DATA[i : i + 9] for i in range(4)]
    mine = [options for options in storage.s3._clients if front.endpoint_url in str(options)]
    assert len(mine) == 1


@pytest.mark.parametrize("after", [None, 5000])
def test_a_stall_ends_with_the_timeout_and_heals(hadro, public, proxy, after):
    front = proxy(hadro, first(Fault("stall", seconds=60, after=after), 1))
    fs = s3(front, read_timeout=0.3)
    assert read_range(fs, public, 0, 20_000) == DATA[:20_000]
    assert len(front.reads()) == 2
    front.fault = first(Fault("stall", seconds=60, after=after), 1)
    assert read_ranges(fs, [(public, 0, 20_000)]) == [DATA[:20_000]]
    assert len(front.reads()) == 4


def test_a_stall_over_http_ends_with_the_timeout_and_heals(hadro, public, proxy):
    front = proxy(hadro, first(Fault("stall", seconds=60, after=5000), 1))
    options = {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=0.3)}}
    fs, path = filesystem(f"{front.endpoint_url}/{public[5:]}", options)
    assert read_range(fs, path, 0, 20_000) == DATA[:20_000]
    assert len(front.reads()) == 2


@pytest.mark.parametrize("protocol", ["s3", "http"])
def test_retry_after_is_obeyed_within_reason(hadro, public, proxy, protocol, monkeypatch):
    front = proxy(hadro)
    if protocol == "s3":
        fs, path = s3(front), public
    else:
        fs, path = filesystem(f"{front.endpoint_url}/{public[5:]}")
    waits = []
    for seconds in (7, 3600):
        front.fault = first(Fault("status", 503, retry_after=seconds), 1)
        assert retry(lambda: fs.cat_file(path, start=0, end=10), path, sleep=waits.append) == DATA[:10]
    assert waits == [7, storage.MAX_WAIT_SECONDS]


def test_nobody_listens():
    fs, path = filesystem("http://127.0.0.1:9/x")
    with pytest.raises(FFIReadError, match=f"after {ATTEMPTS} attempts"):
        read_range(fs, path, 0, 10)


@pytest.mark.parametrize("protocol", ["s3", "http", "file", "memory"])
def test_ranges_beyond_the_end_are_short_and_cost_one_request(hadro, public, proxy, protocol, tmp_path):
    front = proxy(hadro)
    (tmp_path / "data").write_bytes(DATA)
    fsspec.filesystem("memory").pipe_file("/beyond/data", DATA)
    fs, path = {
        "s3": lambda: (s3(front), public),
        "http": lambda: filesystem(f"{front.endpoint_url}/{public[5:]}"),
        "file": lambda: filesystem(str(tmp_path / "data")),
        "memory": lambda: filesystem("memory://beyond/data"),
    }[protocol]()
    n = len(DATA)
    assert read_range(fs, path, n - 5, n + 100) == DATA[-5:]
    assert read_range(fs, path, n, n + 100) == b""
    assert read_range(fs, path, n + 50, n + 100) == b""
    assert read_ranges(fs, [(path, n - 5, n + 5), (path, n, n + 5), (path, 0, 3)]) == [
        DATA[-5:],
        b"",
        DATA[:3],
    ]
    assert len(front.reads()) == (6 if protocol in {"s3", "http"} else 0)
    missing = path + "-not"
    with pytest.raises(FFIMissingError):
        read_range(fs, missing, 0, 10)
    assert isinstance(read_ranges(fs, [(missing, 0, 10)])[0], FFIMissingError)


def test_many_ranges_keep_their_order_and_errors_their_place(hadro, public, proxy):
    front = proxy(hadro)
    fs = s3(front)
    requests = [(public if i % 5 else public + "-not", 100 * i, 100 * i + 50) for i in range(60)]
    answers = read_ranges(fs, requests, concurrency=8)
    for (path, start, end), answer in zip(requests, answers, strict=True):
        if path == public:
            assert answer == DATA[start:end]
        else:
            assert isinstance(answer, FFIMissingError)
    assert len(front.reads()) == 60
    assert read_ranges(fs, []) == []


def test_a_server_that_ignores_ranges_is_cut():
    class Whole:
        def cat_file(self, _path, **_):
            return DATA

    assert read_range(Whole(), "x", 300, 310) == DATA[300:310]


def test_listing_heals_and_says_when_it_is_refused(hadro, public, proxy):
    left = iter(range(2))
    front = proxy(hadro, lambda _: Fault("status", 503) if next(left, None) is not None else None)
    fs = s3(front)
    folder = public.rpartition("/")[0]
    assert [info["name"] for info in storage.list_folder(fs, folder)] == [public[5:]]
    assert len(front.listings()) == 3
    assert storage.list_folder(fs, f"{folder}/nothing") == []
    front.fault = lambda _: Fault("status", 403)
    with pytest.raises(FFIReadError, match="access denied"):
        storage.list_folder(fs, folder)


def test_a_folder_is_no_file(tmp_path):
    fs, path = filesystem(str(tmp_path))
    with pytest.raises(FFIReadError, match="is a folder"):
        read_range(fs, path, 0, 10)


@pytest.mark.parametrize("error", [TypeError("what"), AttributeError("what"), MemoryError()])
def test_errors_of_the_program_are_not_taken_for_faults_of_a_frame(error, monkeypatch):
    def fails(*_, **__):
        raise error

    with pytest.raises(type(error)):
        retry(fails, "key")
    fs = fsspec.filesystem("memory")
    monkeypatch.setattr(type(fs), "cat_file", fails)
    with pytest.raises(type(error)):
        read_ranges(fs, [("/nowhere", 0, 5)])


class Short(MemoryFileSystem):
    """Answers short, so many times."""

    cachable = False
    left = 0

    def cat_file(self, path, start=None, end=None, **kwargs):
        data = super().cat_file(path, start=start, end=end, **kwargs)
        self.left -= 1
        return data[: len(data) // 2] if self.left >= 0 else data


def test_short_answers_are_the_end_of_an_object_only_if_it_is_no_longer(monkeypatch):
    monkeypatch.setattr("tessbkg.storage.BACKOFF_SECONDS", 0.001)
    fs = Short()
    fs.pipe_file("/short", bytes(range(100)))
    for left in range(ATTEMPTS):
        fs.left = left
        assert read_rest(fs, "/short", 40, 200) == bytes(range(40, 100))
    fs.left = 100
    with pytest.raises(FFIReadError, match=f"30 of 60 bytes came after {ATTEMPTS} attempts"):
        read_rest(fs, "/short", 40, 200)
