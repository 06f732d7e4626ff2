"""Bytes in object stores and folders through fsspec: options, ranged reads, retries.

Everything that tessbkg reads from a source passes through :func:`read_range` or :func:`read_ranges`, so
this is where a transient fault is healed and where a final one gets its type.
"""

from __future__ import annotations

import errno
import functools
import itertools
import logging
import random
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, TypeVar

import fsspec
from fsspec.core import url_to_fs

from tessbkg import s3
from tessbkg.errors import FFIMissingError, FFIReadError

logger = logging.getLogger(__name__)

T = TypeVar("T")

Options = Mapping[str, Any]
"""Keyword arguments of an fsspec filesystem; never credentials (see :func:`check_options`)."""

ATTEMPTS: Final = 6
"""Tries of one read before it counts as failed."""

BACKOFF_SECONDS: Final = 0.2
"""Longest wait before the second try; it doubles with every further one, with full jitter."""

MAX_WAIT_SECONDS: Final = 20.0
"""Longest wait that a server can ask for with Retry-After."""

PATIENCE_SECONDS: Final = 150.0
"""No further try of one read begins after this time. The last one may take as long as the timeouts of its
client: 60 s without a byte on S3."""

ONE_TRY: Final[Options] = {"max_attempts": 0}
"""Setting of botocore for sources. Its retries and those of s3fs multiply with ours: 750 requests for one
object that answers 503."""

SECRETS: Final = frozenset(
    {"key", "secret", "token", "password", "username", "account_key", "sas_token", "connection_string"}
    | {"aws_access_key_id", "aws_secret_access_key", "aws_session_token", "headers", "auth"}
)

S3_PROTOCOLS: Final = ("s3", "s3a")

PUBLIC_S3: Final[Options] = {"anon": True}
"""Options of a source bucket unless the caller says otherwise."""


def check_options(options: Options | None, name: str = "storage_options") -> dict[str, Any]:
    """Return `options` as a dictionary, refusing credentials.

    Options travel in task graphs and logs; credentials must not. They come from the usual settings of
    AWS (environment variables, `~/.aws`, instance roles) on the machine that uses them.

    Raises
    ------
    ValueError
        If an option, at any depth, is a credential.
    """

    def walk(items: Mapping[str, Any]) -> None:
        for field, value in items.items():
            if str(field).lower() in SECRETS and value is not None:
                raise ValueError(
                    f"{name} holds {field!r}: credentials are not taken as options, because options travel "
                    "in task graphs; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE where "
                    "the work runs, or pass {'profile': name}"
                )
            if isinstance(value, Mapping):
                walk(value)
            elif isinstance(value, str):
                check_url(value, f"{name}[{field!r}]")

    result = dict(options or {})
    walk(result)
    return result


def check_url(url: str, name: str = "URL") -> None:
    """Refuse a URL with a password or a signature in it: it would end in stores, logs and task graphs.

    Raises
    ------
    ValueError
        Without repeating the URL.
    """
    authority, _, rest = url.partition("://")[2].partition("/")
    signed = re.search(r"(?i)[?&](X-Amz-Signature|Signature|sig)=", rest)
    if signed or ":" in authority.rpartition("@")[0]:
        raise ValueError(
            f"{name} holds a password or a signature: credentials are not taken in URLs, because URLs are "
            "kept in stores; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE instead"
        )


@functools.lru_cache(maxsize=1)
def _one_scheme() -> Any:
    """Trace configuration of aiohttp that refuses redirects to another scheme."""
    import aiohttp  # noqa: PLC0415 (only for sources on the web)

    async def refuse(_session: Any, _context: Any, params: Any) -> None:
        target = str(params.response.headers.get("Location", ""))
        scheme = target.partition("://")[0].lower() if "://" in target else params.url.scheme
        if scheme != params.url.scheme:
            raise PermissionError(errno.EACCES, f"redirected from {params.url.scheme} to {scheme}")

    trace = aiohttp.TraceConfig()
    trace.on_request_redirect.append(refuse)
    return trace


FrozenOptions = tuple[tuple[str, Any], ...]
"""Options that can be hashed and compared, for keys of caches and arguments of tasks."""


def freeze(options: Options) -> FrozenOptions:
    """Make options hashable; :func:`thaw` is the way back."""
    return tuple(sorted((name, _freeze(value)) for name, value in options.items()))


def _freeze(value: Any) -> Any:
    if isinstance(value, Mapping):
        return ("dict", freeze(value))
    if isinstance(value, list):
        return ("list", tuple(map(_freeze, value)))
    return value


def thaw(options: FrozenOptions) -> dict[str, Any]:
    """Return frozen options as a dictionary."""
    return {name: _thaw(value) for name, value in options}


def _thaw(value: Any) -> Any:
    if isinstance(value, tuple) and value[:1] == ("dict",):
        return thaw(value[1])
    if isinstance(value, tuple) and value[:1] == ("list",):
        return [_thaw(one) for one in value[1]]
    return value


def is_s3(url: str) -> bool:
    """Whether a URL is of an S3 object."""
    return url.partition("://")[0] in S3_PROTOCOLS


def source_options(url: str, options: Options | None) -> dict[str, Any]:
    """Options for reading `url`: anonymous on S3 unless `options` says otherwise, retries being ours."""
    given = check_options(options)
    if not is_s3(url):
        return given
    config = {"retries": dict(ONE_TRY), **given.get("config_kwargs", {})}
    return {**PUBLIC_S3, **given, "config_kwargs": config}


def filesystem(url: str, options: Options | None = None) -> tuple[Any, str]:
    """Open the filesystem of `url`; return it and the path within it.

    Raises
    ------
    ValueError
        If the protocol of `url` is unknown or its package is not installed.
    """
    check_url(url)
    options = dict(options or {})
    if url.startswith(("http://", "https://")):
        options["client_kwargs"] = {"trace_configs": [_one_scheme()], **options.get("client_kwargs", {})}
    if is_s3(url):
        # With more, s3fs asks for the size of an object before it reads all of it: two requests for one.
        options.setdefault("max_concurrency", 1)
        # botocore keeps ten connections by default: fewer than the reads that run at once.
        options["config_kwargs"] = {
            "max_pool_connections": 64,
            "connect_timeout": 10,
            "read_timeout": 60,
            **options.get("config_kwargs", {}),
        }
    try:
        fs, path = url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        raise ValueError(f"cannot open {url!r}: {error}") from error
    if options.get("config_kwargs", {}).get("retries") == ONE_TRY:
        fs.retries = 1  # s3fs has no option for it
    return fs, path


class _Tally(threading.local):
    """Failed tries of this thread's reads that were tried again."""

    retries = 0


tally: Final = _Tally()


def path_of(fs: Any, url: str) -> str:
    """Strip the protocol off a URL: its path in a filesystem."""
    return str(fs._strip_protocol(url))  # noqa: SLF001 (the only way that fsspec has)


def join(root: str, *parts: str) -> str:
    """Join URL parts with single slashes."""
    return "/".join([root.rstrip("/"), *(part.strip("/") for part in parts)])


_FINAL_ERRNOS: Final = frozenset(
    {errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.ENAMETOOLONG, errno.ELOOP}
    | {getattr(errno, "EREMCHG", errno.ENOENT)}
)
"""What s3fs makes of S3 error codes that come again at every try, such as InvalidRequest."""


_OURS: Final = (TypeError, AttributeError, NameError, AssertionError, MemoryError)
"""Errors that tell of the program or the machine, never of an object."""


def is_transient(error: BaseException) -> bool:
    """Whether trying again may help: anything but absence, refusal and nonsense.

    On S3 403 and 404 are `PermissionError` and `FileNotFoundError`, other answers `OSError` with an errno
    (EBUSY for 503, EREMOTEIO for 500), as s3fs translates them. A stall is botocore's `ReadTimeoutError`,
    or fsspec's `FSTimeoutError` within the body of one of many; a lost connection botocore's
    `HTTPClientError`, within the body `IncompleteReadError`, urllib3's `SSLError` or aiohttp's
    `ClientPayloadError`. fsspec over HTTP raises aiohttp's errors.
    """
    if isinstance(
        error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError | ValueError
    ):
        return False
    status = getattr(error, "status", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status in {408, 429}
    if isinstance(error, OSError):
        return error.errno not in _FINAL_ERRNOS
    if isinstance(error, EOFError):
        return True
    kinds = {(kind.__module__.split(".")[0], kind.__name__) for kind in type(error).__mro__}
    lost = {("aiohttp", "ClientError"), ("botocore", "HTTPClientError"), ("botocore", "ConnectionError")}
    broken = {
        ("botocore", "IncompleteReadError"),
        ("botocore", "ResponseParserError"),
        ("urllib3", "HTTPError"),
    }
    return bool(kinds & (lost | broken))


def _error_code(error: BaseException) -> str:
    """S3 error code or HTTP status behind an error; empty when there is none."""
    response = getattr(error.__cause__, "response", None)
    if isinstance(response, Mapping):
        return str(response.get("Error", {}).get("Code", ""))
    return str(getattr(error, "status", ""))


def is_past_end(error: BaseException) -> bool:
    """Whether a range was refused because the object ends before it."""
    return _error_code(error) in {"InvalidRange", "416"}


def pause(error: BaseException, attempt: int) -> float:
    """Seconds to wait after failed try number `attempt` (from 0): as told by Retry-After, else at random."""
    headers = getattr(error, "headers", None)  # of aiohttp
    response = getattr(error.__cause__, "response", None)  # of botocore
    if isinstance(response, Mapping):
        headers = response.get("ResponseMetadata", {}).get("HTTPHeaders")
    asked = str(headers.get("retry-after", "")) if headers else ""
    backoff = random.uniform(0, BACKOFF_SECONDS * 2**attempt)  # noqa: S311 (jitter)
    return max(backoff, min(float(asked), MAX_WAIT_SECONDS)) if asked.isdecimal() else backoff


def retry(
    call: Callable[[], T],
    key: str,
    *,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> T:
    """Call until it succeeds, waiting longer each time; type the error that stays.

    Raises
    ------
    FFIMissingError
        If the object is not there.
    FFIReadError
        If it is refused, or faults outlast all attempts.
    """
    began = clock()
    for attempt in itertools.count():
        try:
            return call()
        except _OURS:
            raise
        except Exception as error:
            late = attempt == ATTEMPTS - 1 or clock() - began > PATIENCE_SECONDS
            if late or not is_transient(error):
                raise read_error(key, error, attempt + 1) from error
            logger.debug("%s: %s, trying again", key, type(error).__name__)
            wait = pause(error, attempt)
        tally.retries += 1
        sleep(wait)
    raise AssertionError  # pragma: no cover


def read_error(key: str, error: BaseException, attempts: int = 1) -> FFIReadError:
    """Give the error of a failed read its type and one line of reason."""
    if isinstance(error, _OURS):
        raise error
    if isinstance(error, FFIReadError):
        return error
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return FFIMissingError(key, "not found")
    if isinstance(error, PermissionError):
        return FFIReadError(key, "access denied")
    if isinstance(error, IsADirectoryError):
        return FFIReadError(key, "is a folder")
    if _error_code(error) in {"401", "403"}:
        return FFIReadError(key, "access denied")
    tries = f" after {attempts} attempts" if attempts > 1 else ""
    return FFIReadError(key, f"{type(error).__name__}: {error}".split("\n")[0][:200] + tries)


def read_range(fs: Any, path: str, start: int, end: int) -> bytes:
    """Read bytes `start` to `end` (exclusive) of an object with one GET, retrying transient faults.

    Fewer bytes come back where the object ends before `end`, none where it ends before `start`.

    Raises
    ------
    FFIMissingError, FFIReadError
        As :func:`retry`.
    """
    return retry(lambda: _range(fs, path, start, end), path)


def _range(fs: Any, path: str, start: int, end: int) -> bytes:
    try:
        if getattr(fs, "protocol", None) == S3_PROTOCOLS:
            data = s3.get_range(fs, path, start, end)
        else:
            data = bytes(fs.cat_file(path, start=start, end=end))
    except Exception as error:
        if is_past_end(error):
            return b""
        raise
    return _cut(data, start, end)


def read_rest(fs: Any, path: str, start: int, end: int) -> bytes:
    """Read on after an answer that was too short: :func:`read_range` that does not believe the next one.

    Where fewer bytes come than were asked for, the server is asked for the size of the object; if it has
    more, that is a fault like others, tried again.

    Raises
    ------
    FFIMissingError, FFIReadError
        As :func:`retry`.
    """

    def call() -> bytes:
        data = _range(fs, path, start, end)
        if len(data) < end - start:
            fs.invalidate_cache(path)
            size = fs.info(path)["size"] or 0  # a web server may not say
            if size > start + len(data):
                raise EOFError(f"{len(data)} of {min(size, end) - start} bytes came")
        return data

    return retry(call, path)


def _cut(data: bytes, start: int, end: int) -> bytes:
    """Take a range out of an answer that is too long: some web servers send the whole file."""
    return data if len(data) <= end - start else data[start:end]


def read_ranges(
    fs: Any, requests: Sequence[tuple[str, int, int]], *, concurrency: int = 32
) -> list[bytes | FFIReadError]:
    """Read many short ranges at once; a failed one yields its error in place of bytes.

    Coroutines of fsspec: a third less processor time than threads where ranges are as short as a header.

    Parameters
    ----------
    fs : fsspec filesystem
    requests : sequence of (path, start, end)
    concurrency : int
        GETs in flight on an asynchronous filesystem (S3, HTTP).
    """
    results: list[bytes | FFIReadError] = [b""] * len(requests)
    waiting = list(range(len(requests)))
    began = time.monotonic()
    for attempt in itertools.count():
        if not waiting:
            break
        paths, starts, ends = (list(column) for column in zip(*(requests[i] for i in waiting), strict=True))
        answers = fs.cat_ranges(paths, starts, ends, batch_size=concurrency, on_error="return")
        late = attempt == ATTEMPTS - 1 or time.monotonic() - began > PATIENCE_SECONDS
        again: dict[int, float] = {}
        for i, answer in zip(waiting, answers, strict=True):
            if not isinstance(answer, BaseException):
                results[i] = _cut(bytes(answer), *requests[i][1:])
            elif is_past_end(answer):
                results[i] = b""
            elif late or not is_transient(answer):
                results[i] = read_error(requests[i][0], answer, attempt + 1)
            else:
                again[i] = pause(answer, attempt)
        waiting = list(again)
        time.sleep(max(again.values(), default=0.0))
    return results


def list_folder(fs: Any, path: str) -> list[dict[str, Any]]:
    """List one folder afresh: dictionaries with `name`, `type`, `size`; empty when it is not there.

    Raises
    ------
    FFIReadError
        If the folder cannot be listed, or its listing names what is not directly in it.
    """
    try:
        entries: Iterable[dict[str, Any]] = retry(lambda: fs.ls(path, detail=True, refresh=True), path)
    except FFIMissingError:
        return []
    found = list(entries)
    folder = path_of(fs, path)
    for entry in found:
        check_below(folder, str(entry["name"]))
    return found


def check_below(folder: str, name: str) -> None:
    """Refuse a listed name that is not below its folder, or climbs out of it with `..`.

    Raises
    ------
    FFIReadError
    """
    below = f"{name}/".startswith(folder.rstrip("/") + "/")
    if not below or ".." in name[len(folder) :].split("/"):
        raise FFIReadError(folder, f"its listing names {name!r}, which is not below it")


def glob(url: str, options: Options | None = None) -> list[str]:
    """Expand a glob into sorted URLs."""
    fs, path = filesystem(url, options)
    return [fs.unstrip_protocol(name) for name in sorted(fs.glob(path))]


def has_magic(url: str) -> bool:
    """Whether `url` is a glob."""
    return bool(set("*?[") & set(fsspec.core.strip_protocol(url)))
