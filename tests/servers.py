"""Object stores on loopback for the tests: ministack, hadro, Ceph RGW, and a proxy that counts and fails.

Every server is bound to 127.0.0.1 on a free port and dies with the tests, however these end: a watcher in
its process group ends the group when the pipe that pytest holds is closed.
"""

from __future__ import annotations

import atexit
import contextlib
import http.client
import io
import json
import logging
import os
import shutil
import signal
import socket
import socketserver
import struct
import subprocess
import sys
import threading
import time
import uuid
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import s3fs

logger = logging.getLogger(__name__)

ACCESS_KEY = "test"
SECRET_KEY = "test"  # ministack looks a key up but knows one pair only
REGION = "us-east-1"
CEPH_COMMANDS = ("ceph", "ceph-authtool", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")

# Descriptor 3 is the pipe to pytest. The watcher ignores TERM so that it outlives a server that does so too.
_WATCHED = """
exec 3<&0 </dev/null
(
    trap '' TERM INT
    cat <&3
    kill -TERM -$$
    for i in 1 2 3 4 5 6 7 8 9 10; do kill -0 $$ && sleep 0.1; done
    kill -KILL -$$
) >/dev/null 2>&1 &
exec 3<&-
exec "$@"
"""


class ServerStartError(Exception):
    """A server did not come up; the message ends with its log."""


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(endpoint_url: str) -> bool:
    """Tell whether an HTTP server answers anything at all, be it an error."""
    url = urlsplit(endpoint_url)
    connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=2)
    try:
        connection.request("GET", "/")
        connection.getresponse().read()
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
    return True


class Daemon:
    """A server process, the leader of its own process group, with its log in a file.

    Parameters
    ----------
    command : sequence of str
    log : Path
        Takes stdout and stderr.
    env : mapping of str
        The whole environment of the process.
    """

    def __init__(self, command: Sequence[str], *, log: Path, env: Mapping[str, str]) -> None:
        self.name = Path(command[0]).name if command[0] != sys.executable else command[2]
        self.log = log
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                ["/bin/sh", "-c", _WATCHED, "sh", *command],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=dict(env),
                start_new_session=True,
            )
        atexit.register(self.stop)

    def wait_until(self, ready: Callable[[], bool], *, seconds: float) -> None:
        """Wait until `ready()`.

        Raises
        ------
        ServerStartError
            If the process ends or the time passes before that; the server is stopped.
        """
        deadline = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < deadline:
            if ready():
                return
            time.sleep(0.02)
        state = self.process.poll()
        reason = f"not ready after {seconds:g} s" if state is None else f"ended with status {state}"
        self.stop()
        tail = self.log.read_text(errors="replace")[-4000:]
        raise ServerStartError(f"{self.name}: {reason}; end of its log {self.log}:\n{tail}")

    def stop(self, patience: float = 5.0) -> None:
        """End the whole process group, by force after `patience` seconds; harmless when called again."""
        atexit.unregister(self.stop)
        if self.process.returncode is None:
            self._signal(signal.SIGTERM)
            try:
                self.process.wait(patience)
            except subprocess.TimeoutExpired:
                logger.warning("%s did not end on SIGTERM", self.name)
        self._signal(signal.SIGKILL)  # the watcher, and what is left of the server
        self.process.wait()
        if self.process.stdin and not self.process.stdin.closed:
            self.process.stdin.close()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


class Endpoint(Protocol):
    """What a proxy can stand before."""

    endpoint_url: str


class S3Server:
    """An S3 server that can be read and written.

    The credentials are never part of the options: clients find them in the environment.
    """

    def __init__(self, endpoint_url: str) -> None:
        self.endpoint_url = endpoint_url
        self._made: dict[str, bool] = {}

    def options(self, *, anon: bool = False) -> dict[str, Any]:
        """Return the storage options of fsspec; a new dictionary at each call."""
        return storage_options(self.endpoint_url, anon=anon)

    def filesystem(self, *, anon: bool = False) -> s3fs.S3FileSystem:
        """Return a file system that remembers no listing; closed with this."""
        return open_filesystem(self.endpoint_url, anon=anon)

    def bucket(self, name: str | None = None, *, public_read: bool = False) -> str:
        """Make a bucket and return its URL, `s3://name`.

        Parameters
        ----------
        name : str, optional
            A new name by default: the server lives as long as the test session. A bucket that is there
            already is left as it is, its objects too.
        public_read : bool
            Anybody may list and read, as in the bucket of the mission. Nobody may write without a key.

        Raises
        ------
        ValueError
            If the bucket was made before with another `public_read`.
        """
        name = name or f"bucket-{uuid.uuid4().hex[:12]}"
        if name in self._made:
            if self._made[name] != public_read:
                raise ValueError(f"bucket {name!r} was made with public_read={self._made[name]}")
            return f"s3://{name}"
        s3 = self.filesystem()
        s3.call_s3("create_bucket", Bucket=name)
        if public_read:
            s3.call_s3("delete_public_access_block", Bucket=name)
            s3.call_s3("put_bucket_policy", Bucket=name, Policy=public_read_policy(name))
        self._made[name] = public_read
        return f"s3://{name}"


def storage_options(endpoint_url: str, *, anon: bool) -> dict[str, Any]:
    """Return what fsspec needs to find an S3 server, credentials excepted."""
    return {"anon": anon, "endpoint_url": endpoint_url, "client_kwargs": {"region_name": REGION}}


def open_filesystem(endpoint_url: str, *, anon: bool) -> s3fs.S3FileSystem:
    """Return an s3fs file system that remembers no listing."""
    import s3fs

    return s3fs.S3FileSystem(**storage_options(endpoint_url, anon=anon), use_listings_cache=False)


def close_filesystems(endpoint_url: str) -> None:
    """Close all file systems of a server that fsspec keeps, and clients that tessbkg keeps, and drop them.

    Each holds 13 MB and connections. s3fs closes them when they are collected, but gives up after 0.1 s, and
    the ResourceWarning then fails whatever test is running.
    """
    if (s3fs := sys.modules.get("s3fs")) is None:
        return
    from fsspec.asyn import sync

    kept = s3fs.S3FileSystem._cache
    for token, filesystem in list(kept.items()):
        if (
            filesystem.endpoint_url == endpoint_url and not filesystem.asynchronous
        ):  # zarr's are in its own loop
            del kept[token]
            if filesystem._s3 is not None:
                sync(filesystem.loop, filesystem._s3.__aexit__, None, None, None)
    from tessbkg import s3

    for options in [options for options in s3._clients if endpoint_url in str(options)]:
        s3._clients.pop(options)[0].close()


def public_read_policy(bucket: str) -> str:
    """Return the bucket policy that lets anybody list and read."""
    statement = {
        "Effect": "Allow",
        "Principal": {"AWS": ["*"]},
        "Action": ["s3:GetObject", "s3:ListBucket"],
        "Resource": [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"],
    }
    return json.dumps({"Version": "2012-10-17", "Statement": [statement]})


def _plain_env(tmp: Path, **extra: str) -> dict[str, str]:
    """Return an environment in which a server finds nothing of the user's."""
    return {"PATH": os.environ.get("PATH", os.defpath), "HOME": str(tmp), "TMPDIR": str(tmp), **extra}


@contextlib.contextmanager
def run_ministack(tmp: Path) -> Iterator[S3Server]:
    """Run ministack, an S3 emulator with its objects in memory, with access control switched on."""
    if tuple(int(part) for part in version("ministack").split(".")[:2]) < (1, 5):
        raise ServerStartError(f"ministack {version('ministack')} knows no AUTH: install ministack>=1.5")
    port = free_port()
    env = _plain_env(
        tmp,
        BIND_HOST="127.0.0.1",  # the default binds every interface
        GATEWAY_PORT=str(port),
        SERVICES="s3",
        AUTH="true",  # anonymous requests are refused unless a policy allows them
        LOG_LEVEL="WARNING",
        AWS_ACCESS_KEY_ID=ACCESS_KEY,
        AWS_SECRET_ACCESS_KEY=SECRET_KEY,
    )
    server = S3Server(f"http://127.0.0.1:{port}")
    daemon = Daemon([sys.executable, "-m", "ministack"], log=tmp / "ministack.log", env=env)
    try:
        daemon.wait_until(lambda: answers(server.endpoint_url), seconds=30)
        yield server
    finally:
        close_filesystems(server.endpoint_url)
        daemon.stop()


class FolderServer:
    """A folder as a public, read-only object store: `<folder>/<bucket>/<key>`.

    `s3://bucket/key` with `options()` and `<endpoint_url>/bucket/key` without any name the same bytes.
    """

    def __init__(self, endpoint_url: str, folder: Path) -> None:
        self.endpoint_url = endpoint_url
        self.folder = folder

    def options(self, *, anon: bool = True) -> dict[str, Any]:
        """Return the storage options of fsspec; a new dictionary at each call."""
        return storage_options(self.endpoint_url, anon=anon)

    def filesystem(self, *, anon: bool = True) -> s3fs.S3FileSystem:
        """Return a file system that remembers no listing; closed with this."""
        return open_filesystem(self.endpoint_url, anon=anon)

    def bucket(self, name: str | None = None) -> tuple[str, Path]:
        """Make a bucket; return its URL, `s3://name`, and its folder."""
        name = name or f"bucket-{uuid.uuid4().hex[:12]}"
        path = self.folder / name
        path.mkdir(parents=True, exist_ok=True)
        return f"s3://{name}", path


@contextlib.contextmanager
def run_hadro(
    folder: Path,
    tmp: Path,
    *,
    latency_ms: float = 0,
    jitter_ms: float = 0,
    bandwidth_mbps: float = 0,
    error_rate: float = 0,
    seed: int = 1,
) -> Iterator[FolderServer]:
    """Run hadro over a folder.

    Parameters
    ----------
    folder : Path
        May be filled while the server runs.
    tmp : Path
        Of the log.
    latency_ms, jitter_ms : float
        Waited before each answer: a constant and the upper end of a random part.
    bandwidth_mbps : float
        Megabits per second of one answer; 0 is without limit.
    error_rate : float
        Fraction of requests answered by 503 SlowDown.
    seed : int
        Of the jitter and the errors.
    """
    port = free_port()
    knobs = {
        "host": "127.0.0.1",
        "port": port,
        "region": REGION,
        "latency-ms": latency_ms,
        "latency-jitter-ms": jitter_ms,
        "bandwidth-mbps": bandwidth_mbps,
        "error-rate": error_rate,
        "fault-seed": seed,
        "log-level": "warning",
    }
    command = [sys.executable, "-m", "hadro", str(folder)]
    command += [word for name, value in knobs.items() for word in (f"--{name}", str(value))]
    server = FolderServer(f"http://127.0.0.1:{port}", folder)
    daemon = Daemon(command, log=tmp / f"hadro-{port}.log", env=_plain_env(tmp))
    try:
        daemon.wait_until(lambda: answers(server.endpoint_url), seconds=30)
        yield server
    finally:
        close_filesystems(server.endpoint_url)
        daemon.stop()


def ceph_missing() -> str | None:
    """Return why a Ceph RGW cannot be started here, in one sentence; None if it can."""
    missing = [command for command in CEPH_COMMANDS if shutil.which(command) is None]
    if missing:
        return (
            f"no Ceph RGW: {', '.join(missing)} not found "
            "(apt-get install --no-install-recommends ceph-mon ceph-osd radosgw ceph-common)"
        )
    if os.geteuid() != 0:
        return "no Ceph RGW: its daemons are started by root only"
    return None


_CEPH_CONF = """
[global]
fsid = {fsid}
mon host = v2:127.0.0.1:{mon_port}
mon initial members = a
public addr = 127.0.0.1
public network = 127.0.0.0/8
keyring = {d}/keyring
ms_bind_msgr1 = false
osd pool default size = 1
osd pool default min size = 1
mon allow pool size one = true
osd crush chooseleaf type = 0
osd pool default pg num = 1
osd pool default pgp num = 1
osd pool default pg autoscale mode = off
mon_max_pg_per_osd = 1000
# each pool that the gateway makes waits for rounds of the monitor, a second apart by default
paxos propose interval = 0.02
paxos min wait = 0.01
run dir = {d}/run
admin socket =
log file = {d}/$name.log
pid file =
mon data = {d}/mon
osd data = {d}/osd
osd objectstore = memstore
memstore device bytes = 4294967296
osd memory target = 1073741824
mon_data_avail_warn = 1
mon_data_avail_crit = 1
[osd]
keyring = {d}/osd/keyring
[client.rgw]
# without tcp_nodelay each small GET waits 44 ms for a delayed acknowledgement
rgw frontends = beast endpoint=127.0.0.1:{rgw_port} tcp_nodelay=1
rgw data = {d}/rgw
rgw thread pool size = 64
"""


@contextlib.contextmanager
def run_ceph(d: Path) -> Iterator[S3Server]:
    """Run a Ceph of one monitor, one OSD in memory and one RADOS gateway: the S3 of production systems.

    Parameters
    ----------
    d : Path
        An empty folder for all its files; removed in the end.
    """
    daemons: list[Daemon] = []
    try:
        server = _start_ceph(d, daemons)
        yield server
        close_filesystems(server.endpoint_url)
    finally:
        for daemon in reversed(daemons):
            daemon.stop()
        shutil.rmtree(d, ignore_errors=True)


def _start_ceph(d: Path, daemons: list[Daemon]) -> S3Server:
    for name in ("mon", "osd", "rgw", "run"):
        (d / name).mkdir()
    rgw_port, mon_port = free_port(), free_port()
    fsid, osd_id = str(uuid.uuid4()), str(uuid.uuid4())
    conf = d / "ceph.conf"
    conf.write_text(_CEPH_CONF.format(d=d, fsid=fsid, rgw_port=rgw_port, mon_port=mon_port))
    env = _plain_env(d)

    def run(*command: str, given: str = "") -> str:
        done = subprocess.run(
            command, input=given, env=env, capture_output=True, text=True, timeout=60, check=False
        )
        if done.returncode:
            raise ServerStartError(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stderr}")
        return done.stdout

    def start(*command: str) -> Daemon:
        daemons.append(
            Daemon([command[0], "-c", str(conf), *command[1:], "-f"], log=d / f"{command[0]}.out", env=env)
        )
        return daemons[-1]

    keyring, osd_keyring, monmap = str(d / "keyring"), str(d / "osd" / "keyring"), str(d / "monmap")
    every = ("--cap", "mon", "allow *", "--cap", "osd", "allow *")
    run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v2:127.0.0.1:{mon_port}]", monmap)
    run("ceph-authtool", "--create-keyring", keyring, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
    run("ceph-authtool", keyring, "--gen-key", "-n", "client.admin", *every)
    run("ceph-authtool", keyring, "--gen-key", "-n", "client.rgw", *every)
    key = run("ceph-authtool", "--gen-print-key").strip()
    run("ceph-authtool", "--create-keyring", osd_keyring, "--name", "osd.0", "--add-key", key)
    run("ceph-mon", "-c", str(conf), "-i", "a", "--mkfs", "--monmap", monmap, "--keyring", keyring)
    start("ceph-mon", "-i", "a")
    ceph = ("ceph", "-c", str(conf), "--connect-timeout", "30")
    run(*ceph, "osd", "new", osd_id, "-i", "-", given=json.dumps({"cephx_secret": key}))
    run("ceph-osd", "-c", str(conf), "-i", "0", "--mkfs", "--osd-uuid", osd_id)
    start("ceph-osd", "-i", "0")
    gateway = start("radosgw", "-n", "client.rgw")
    server = S3Server(f"http://127.0.0.1:{rgw_port}")
    gateway.wait_until(lambda: answers(server.endpoint_url), seconds=60)
    user = (
        "--uid",
        "tessbkg",
        "--display-name",
        "tessbkg",
        "--access-key",
        ACCESS_KEY,
        "--secret",
        SECRET_KEY,
    )
    run("radosgw-admin", "-c", str(conf), "-n", "client.rgw", "user", "create", *user)
    return server


# --- the proxy ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """What a client asked.

    Parameters
    ----------
    number : int
        Place in the order of arrival, from 0; never reset.
    method : str
    path : str
        Decoded, `/bucket/key`.
    query : str
    headers : mapping of str
        Names in lower case.
    """

    number: int
    method: str
    path: str
    query: str
    headers: Mapping[str, str]

    @property
    def key(self) -> str:
        """The object's key; empty when the request is about the bucket, such as a listing."""
        return self.path.lstrip("/").partition("/")[2]

    @property
    def range(self) -> str | None:
        """The Range header."""
        return self.headers.get("range")

    @property
    def signed(self) -> bool:
        """Whether the request carries a signature."""
        return "authorization" in self.headers


@dataclass(frozen=True)
class Fault:
    """How an answer goes wrong.

    Parameters
    ----------
    kind : str
        * "status": an error answer with an S3 error document, the request does not reach the server;
        * "reset": the connection is reset;
        * "stall": nothing comes for `seconds`, then the rest does;
        * "truncate": the connection is closed before the announced length;
        * "wrong_length": a complete HTTP answer of only `after` bytes of body;
        * "corrupt": the body has its announced length, but every byte from `after` on is inverted.
    status : int
        Of kind "status".
    code : str, optional
        S3 error code; by default the one that S3 gives with the status.
    retry_after : int, optional
        Seconds of a Retry-After header of kind "status".
    after : int, optional
        Bytes of body that pass before the fault. None: kinds "reset" and "stall" strike before the first
        byte of the answer, "truncate" and "wrong_length" in the middle of the body, "corrupt" all of it.
    seconds : float
        Of kind "stall".
    forward : bool
        Kinds "status" and "reset" with ``after=None`` let the server do the request, then lose its answer.
    """

    kind: Literal["status", "reset", "stall", "truncate", "wrong_length", "corrupt"]
    status: int = 503
    code: str | None = None
    retry_after: int | None = None
    after: int | None = None
    seconds: float = 60.0
    forward: bool = False


@dataclass
class Exchange:
    """A request and what was answered.

    Parameters
    ----------
    request : Request
    fault : Fault or None
    status : int
        0 if the answer never began.
    received, sent : int
        Bytes of body from and to the client. `sent` is counted before the bytes leave, so that a client
        that has them all finds them all counted.
    """

    request: Request
    fault: Fault | None = None
    status: int = 0
    received: int = 0
    sent: int = 0


_ERROR_CODES = {403: "AccessDenied", 404: "NoSuchKey", 500: "InternalError", 503: "SlowDown"}
_HOP_BY_HOP = frozenset(
    {"connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding"}
)
_SHORT = frozenset({"reset", "truncate", "wrong_length"})
_PIECE = 1 << 18  # 256 KiB


class Proxy:
    """A reverse proxy on loopback that writes down every request and can spoil its answer.

    Parameters
    ----------
    server : Endpoint
    fault : callable, optional
        Asked for each request, in the thread that serves it: None lets the request pass. Can be replaced at
        any time.

    Attributes
    ----------
    log : list of Exchange
        In the order of arrival.
    """

    def __init__(self, server: Endpoint, fault: Callable[[Request], Fault | None] | None = None) -> None:
        url = urlsplit(server.endpoint_url)
        self.upstream = (url.hostname or "", url.port or 80)
        self.fault = fault
        self.log: list[Exchange] = []
        self.closing = threading.Event()
        self.failures: list[BaseException] = []
        self._numbers = count()
        self._lock = threading.Lock()
        self._listener = _Listener(self)
        self.endpoint_url = f"http://127.0.0.1:{self._listener.server_address[1]}"
        self._thread = threading.Thread(
            target=self._listener.serve_forever, kwargs={"poll_interval": 0.05}, name="proxy", daemon=True
        )
        self._thread.start()

    def options(self, *, anon: bool = False) -> dict[str, Any]:
        """Return the storage options of fsspec; a new dictionary at each call."""
        return storage_options(self.endpoint_url, anon=anon)

    def filesystem(self, *, anon: bool = False) -> s3fs.S3FileSystem:
        """Return a file system that remembers no listing; closed with this."""
        return open_filesystem(self.endpoint_url, anon=anon)

    def reads(self, part: str = "") -> list[Exchange]:
        """Return the GETs of objects (not the listings) whose key contains `part`."""
        return [
            e for e in list(self.log) if e.request.method == "GET" and e.request.key and part in e.request.key
        ]

    def writes(self, part: str = "") -> list[Exchange]:
        """Return the PUTs, POSTs and DELETEs of objects whose key contains `part`."""
        return self._objects({"PUT", "POST", "DELETE"}, part)

    def listings(self) -> list[Exchange]:
        """Return the GETs of buckets."""
        return [e for e in list(self.log) if e.request.method == "GET" and not e.request.key]

    def bytes_read(self, part: str = "") -> int:
        """Return the bytes of body of `reads(part)`."""
        return sum(e.sent for e in self.reads(part))

    def _objects(self, methods: set[str], part: str) -> list[Exchange]:
        log = [e for e in list(self.log) if e.request.method in methods]
        return [e for e in log if e.request.key and part in e.request.key]

    def clear(self) -> None:
        """Forget the log."""
        with self._lock:
            self.log = []

    def close(self) -> None:
        """Stop listening, end every connection and raise what a fault callable raised, if any."""
        close_filesystems(self.endpoint_url)
        self.closing.set()
        self._listener.shutdown()
        self._listener.close_clients()
        self._listener.server_close()
        self._thread.join()
        if self.failures:
            raise self.failures[0]

    def begin(self, handler: _Handler, headers: Mapping[str, str], raw_path: str) -> Exchange:
        """Write a request down and ask for its fault."""
        path, _, query = raw_path.partition("?")
        with self._lock:
            request = Request(next(self._numbers), handler.command, unquote(path), query, headers)
            exchange = Exchange(request)
            self.log.append(exchange)
        if self.fault is not None:
            exchange.fault = self.fault(request)
        return exchange


class _Listener(socketserver.ThreadingMixIn, socketserver.TCPServer):
    allow_reuse_address = True
    request_queue_size = 128
    block_on_close = True  # server_close() joins the threads
    daemon_threads = False

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy
        self._clients: set[socket.socket] = set()
        self._clients_lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._clients_lock:
            self._clients.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._clients_lock:
            self._clients.discard(request)
        super().shutdown_request(request)

    def close_clients(self) -> None:
        with self._clients_lock:
            clients = list(self._clients)
        for client in clients:
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 (of socketserver)
        error = sys.exception()
        if error is not None and not isinstance(error, ConnectionError):
            self.proxy.failures.append(error)


@dataclass
class _Answer:
    """What the server said, its body still to be read."""

    status: int
    headers: list[tuple[str, str]]
    length: int
    body: Any = field(repr=False)  # has read(n)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Listener

    def setup(self) -> None:
        super().setup()
        self.upstream = http.client.HTTPConnection(*self.server.proxy.upstream, timeout=120)

    def finish(self) -> None:
        self.upstream.close()
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, *args: Any) -> None:
        """Write nothing: the log is a list."""

    def serve(self) -> None:
        body = self.read_body()
        headers = {name.lower(): value for name, value in self.headers.items()}
        proxy = self.server.proxy
        exchange = proxy.begin(self, headers, self.requestline.split()[1])
        exchange.received = len(body)
        fault = exchange.fault
        kind = fault.kind if fault else None
        if fault and kind in {"status", "reset"} and fault.after is None:
            if fault.forward:
                answer = self.ask(body)
                answer.body.read()
            if kind == "reset":
                self.reset()
            else:
                self.answer_error(exchange, fault)
            return
        if fault and kind == "stall" and fault.after is None:
            proxy.closing.wait(fault.seconds)
        self.relay(exchange, self.ask(body))

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_OPTIONS = serve  # noqa: N815 (names of http.server)

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("transfer-encoding", ""):
            return self.rfile.read(int(self.headers.get("content-length", 0)))
        pieces = []
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(pieces)

    def ask(self, body: bytes) -> _Answer:
        """Hand the request on. The Host header stays as it is: the signature covers it."""
        while True:
            reused = self.upstream.sock is not None
            try:
                self.upstream.putrequest(
                    self.command, self.requestline.split()[1], skip_host=True, skip_accept_encoding=True
                )
                for name, value in self.headers.items():
                    if name.lower() not in _HOP_BY_HOP | {"content-length", "expect"}:
                        self.upstream.putheader(name, value)
                if body or self.command in {"PUT", "POST"}:
                    self.upstream.putheader("Content-Length", str(len(body)))
                self.upstream.endheaders(body or None)
                response = self.upstream.getresponse()
                break
            except (http.client.RemoteDisconnected, ConnectionError):
                self.upstream.close()
                if not reused:  # otherwise the server may have closed an idle connection
                    raise
        headers = [
            (n, v) for n, v in response.getheaders() if n.lower() not in _HOP_BY_HOP | {"content-length"}
        ]
        length = response.getheader("content-length")
        if self.command == "HEAD" or length is not None:
            return _Answer(response.status, headers, int(length or 0), response)
        whole = response.read()
        return _Answer(response.status, headers, len(whole), io.BytesIO(whole))

    def relay(self, exchange: Exchange, answer: _Answer) -> None:
        fault = None if self.command == "HEAD" else exchange.fault  # there is no body to spoil
        kind = fault.kind if fault else None
        after = fault.after if fault else None
        if after is None:
            after = 0 if kind == "corrupt" else answer.length // 2
        stop = min(after, answer.length) if kind in _SHORT else answer.length
        length = stop if kind == "wrong_length" else answer.length
        self.begin_answer(exchange, answer.status, [*answer.headers, ("Content-Length", str(length))])
        if self.command == "HEAD":
            answer.body.read()
            return
        if fault and kind == "stall" and fault.after is not None:
            self.copy(exchange, answer, min(after, stop))
            self.server.proxy.closing.wait(fault.seconds)
        self.copy(exchange, answer, stop, spoiled_from=after if kind == "corrupt" else stop)
        if kind == "reset":
            self.reset()
        elif kind == "truncate":
            self.close_connection = True
        if stop < answer.length:
            self.upstream.close()
        else:
            answer.body.read()  # the end of the answer, so that the connection can be used again

    def copy(self, exchange: Exchange, answer: _Answer, stop: int, spoiled_from: int | None = None) -> None:
        """Send the body up to byte `stop`."""
        while exchange.sent < stop:
            piece = answer.body.read(min(_PIECE, stop - exchange.sent))
            if not piece:
                raise ConnectionAbortedError("the server closed the connection")
            if spoiled_from is not None:
                piece = spoil(piece, max(0, spoiled_from - exchange.sent))
            exchange.sent += len(piece)
            self.wfile.write(piece)

    def begin_answer(self, exchange: Exchange, status: int, headers: Sequence[tuple[str, str]]) -> None:
        exchange.status = status
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()

    def answer_error(self, exchange: Exchange, fault: Fault) -> None:
        code = fault.code or _ERROR_CODES.get(fault.status, "InternalError")
        body = (
            f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code>'
            f"<Message>injected {fault.status}</Message></Error>"
        ).encode()
        headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
        if fault.retry_after is not None:
            headers.append(("Retry-After", str(fault.retry_after)))
        self.begin_answer(exchange, fault.status, headers)
        if self.command != "HEAD":
            exchange.sent = len(body)
            self.wfile.write(body)

    def reset(self) -> None:
        """Close with a RST and no FIN before it."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())
        raise ConnectionAbortedError("reset on purpose")


def spoil(piece: bytes, start: int) -> bytes:
    """Return a piece with the bytes from `start` on inverted."""
    return piece[:start] + piece[start:].translate(_INVERTED)


_INVERTED = bytes(255 - i for i in range(256))
