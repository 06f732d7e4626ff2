"""Fixtures that all tests share. Nothing heavy is imported here: fixtures import what they need.

`ministack`, `hadro`, `serve_folder`, `ceph` and `proxy` are described in `servers.py`.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from servers import Endpoint, Fault, FolderServer, Proxy, Request, S3Server

# The same examples every time, and no limit on their time: a loaded machine is no failure.
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_configure(config: pytest.Config) -> None:
    """Keep the tests apart from the user's accounts, proxies and settings, subprocesses included."""
    patch = pytest.MonkeyPatch()
    config.add_cleanup(patch.undo)
    for name in list(os.environ):
        if name.startswith(("AWS_", "FSSPEC_")) or name.lower().endswith("_proxy"):
            patch.delenv(name)
    from_nowhere = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "BOTO_CONFIG": os.devnull,
        "FSSPEC_CONFIG_DIR": os.devnull,
        "NO_PROXY": "*",
    }
    for name, value in from_nowhere.items():
        patch.setenv(name, value)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests that use the fixtures `ceph` and `shared`, so that -m selects them.

    Slow tests run when TESSBKG_SLOW is set, or when -m or a test's own name selects them.
    """
    named = any("::" in argument for argument in config.args)
    if not (config.option.markexpr or named or os.environ.get("TESSBKG_SLOW")):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: set TESSBKG_SLOW=1"))
    for item in items:
        for name in ("ceph", "shared"):
            if name in getattr(item, "fixturenames", ()):
                item.add_marker(name)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of real data beside the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"the real data set is not here: no folder {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def ministack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Run an S3 emulator with access control, for reading and writing."""
    from servers import run_ministack

    with run_ministack(tmp_path_factory.mktemp("ministack")) as server:
        yield server


@pytest.fixture(scope="session")
def serve_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., FolderServer]]:
    """Serve folders as public, read-only object stores: `serve_folder(folder, latency_ms=30)`."""
    from servers import run_hadro

    with contextlib.ExitStack() as stack:
        yield lambda folder, **knobs: stack.enter_context(
            run_hadro(folder, tmp_path_factory.mktemp("hadro"), **knobs)
        )


@pytest.fixture(scope="session")
def hadro(
    serve_folder: Callable[..., FolderServer], tmp_path_factory: pytest.TempPathFactory
) -> FolderServer:
    """Serve a folder of the session as a public, read-only object store."""
    return serve_folder(tmp_path_factory.mktemp("hadro-data"))


@pytest.fixture(scope="session")
def ceph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Run a real Ceph object store."""
    from servers import ceph_missing, run_ceph

    if missing := ceph_missing():
        pytest.skip(missing)
    with run_ceph(tmp_path_factory.mktemp("ceph")) as server:
        yield server


@pytest.fixture
def proxy() -> Iterator[Callable[..., Proxy]]:
    """Put a proxy before a server: `proxy(ministack, fault=None)`; it counts, and fails when told to."""
    from servers import Proxy

    with contextlib.ExitStack() as stack:

        def start(server: Endpoint, fault: Callable[[Request], Fault | None] | None = None) -> Proxy:
            made = Proxy(server, fault)
            stack.callback(made.close)
            return made

        yield start
