"""Ranged GETs from S3 with botocore's own client, which s3fs wraps for one thread of coroutines.

A frame costs half the processor time so, and threads read side by side. What is short and many is read with
s3fs (:func:`tessbkg.storage.read_ranges`), and so is all that is no range.
"""

from __future__ import annotations

import os
import threading
from contextlib import closing
from typing import Any, Final

AIOBOTOCORE: Final = frozenset({"connector_args", "http_session_cls", "warm_up_loader_caches"})
"""What `config_kwargs` of s3fs can hold for aiobotocore, which botocore does not know."""

_clients: Final[dict[tuple[int, str], tuple[Any, dict[str, Any]]]] = {}
_lock: Final = threading.Lock()


def get_range(fs: Any, path: str, start: int, end: int) -> bytes:
    """Read bytes `start` to `end` (exclusive) of an object with one GET.

    Parameters
    ----------
    fs : s3fs.S3FileSystem
        Whose options are used.
    path : str
        Bucket and key.
    start, end : int

    Raises
    ------
    OSError
        As s3fs translates what S3 answers; the error of botocore is its cause.
    botocore.exceptions.BotoCoreError
        If there is no answer, or not all of it.
    """
    from botocore.exceptions import ClientError  # noqa: PLC0415 (only for S3)
    from s3fs.errors import translate_boto_error  # noqa: PLC0415

    bucket, key, version = fs.split_path(path)
    client, more = _client(fs)
    what = {"Bucket": bucket, "Key": key, "VersionId": version, "Range": f"bytes={start}-{end - 1}"}
    try:
        answer = client.get_object(**more, **{name: value for name, value in what.items() if value})
    except ClientError as error:
        raise translate_boto_error(error) from error
    with closing(answer["Body"]) as body:
        return bytes(body.read())


def _client(fs: Any) -> tuple[Any, dict[str, Any]]:
    """Client with the options of `fs`, and what these add to every request.

    The threads of a process share it; a process that was forked makes its own.
    """
    options = os.getpid(), repr(fs.storage_options)
    with _lock:
        if options not in _clients:
            _clients[options] = _new_client(fs)
        return _clients[options]


def _new_client(fs: Any) -> tuple[Any, dict[str, Any]]:
    from botocore import UNSIGNED  # noqa: PLC0415 (only for S3)
    from botocore.config import Config  # noqa: PLC0415
    from botocore.session import Session  # noqa: PLC0415

    given = {
        "endpoint_url": fs.endpoint_url,
        "aws_access_key_id": fs.key,
        "aws_secret_access_key": fs.secret,
        "aws_session_token": fs.token,
    }
    given = {name: value for name, value in given.items() if value is not None}
    arguments = {"use_ssl": fs.use_ssl, **fs.client_kwargs, **given}
    config = {name: value for name, value in fs.config_kwargs.items() if name not in AIOBOTOCORE}
    if fs.anon:
        arguments = {name: value for name, value in arguments.items() if not name.startswith("aws_")}
        config["signature_version"] = UNSIGNED
    client = Session(**fs.kwargs).create_client("s3", config=Config(**config), **arguments)
    known = {*client.meta.service_model.operation_model("GetObject").input_shape.members}
    known -= {"Bucket", "Key", "VersionId", "Range"}
    more = {**fs.s3_additional_kwargs, **fs.req_kw}
    return client, {name: more[name] for name in known & more.keys() if more[name] is not None}
