"""Nothing secret gets out, nothing listens to the world, nothing from storage is run."""

import ast
import os
import re
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cloudpickle
import psutil
import pytest
from builds import ARGUMENTS, TESSBKG, Build
from frames import CCD1, simulated

import tessbkg
from tessbkg.errors import FFIReadError
from tessbkg.storage import check_options, check_url
from tessbkg.tasks import reduce_shard

PLANTED = "PLANTEDwJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLE"
SOURCES = sorted(Path(tessbkg.__file__).parent.glob("*.py"))


@pytest.fixture(scope="module")
def source(serve_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("security")
    simulated(8, shape=(64, 64), root=str(folder / "bucket"), faults={2: "garbage"})
    return serve_folder(folder, latency_ms=30)


def everything(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("root", ["s3://bucket", "s3://no-such-bucket"])
def test_a_planted_credential_is_nowhere(source, tmp_path, root):
    planted = {
        "AWS_ACCESS_KEY_ID": f"{PLANTED}id",
        "AWS_SECRET_ACCESS_KEY": PLANTED,
        "AWS_SESSION_TOKEN": f"{PLANTED}token",
    }
    where = ["--root", root, "--endpoint-url", source.endpoint_url, "--no-anon"]
    done = subprocess.run(
        [TESSBKG, "--debug", "build", str(tmp_path / "s.zarr"), *ARGUMENTS, *where, "--workers", "1"],
        capture_output=True, timeout=120, check=False, env={**os.environ, **planted},
    )  # fmt: skip
    assert (done.returncode == 0) == (root == "s3://bucket"), done.stderr[-2000:]
    written = everything(tmp_path)
    assert bool(written) == (root == "s3://bucket")
    for text in (done.stdout, done.stderr, written):
        assert PLANTED.encode() not in text


def test_a_planted_credential_is_not_in_task_arguments_nor_in_a_refusal(source, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", PLANTED)
    options = {"endpoint_url": source.endpoint_url, "anon": False}
    plan = tessbkg.plan_build(
        str(tmp_path / "s.zarr"), **CCD1, root="s3://bucket", storage_options=options, store_options={}
    )
    ffis = tessbkg.open_ffis(**CCD1, root="s3://bucket", storage_options=options)
    for thing in ((reduce_shard, plan.job, 0, 8), plan.frames, dict(ffis.flux.__dask_graph__())):
        assert PLANTED.encode() not in cloudpickle.dumps(thing)
    assert PLANTED not in plan.explain()
    for given in (
        {"secret": PLANTED},
        {"client_kwargs": {"aws_secret_access_key": PLANTED}},
        {"token": PLANTED},
    ):
        with pytest.raises(ValueError, match="credentials are not taken") as caught:
            check_options(given)
        assert PLANTED not in str(caught.value)
    for url in (
        f"https://me:{PLANTED}@host/x",
        f"https://host/x?X-Amz-Signature={PLANTED}",
        f"s3://b/?sig={PLANTED}",
    ):
        with pytest.raises(ValueError, match="credentials are not taken") as caught:
            check_url(url)
        assert PLANTED not in str(caught.value)


def test_a_source_on_s3_is_read_without_signature_unless_asked(source, proxy, tmp_path):
    watched = proxy(source)
    tessbkg.build(
        str(tmp_path / "s.zarr"), **CCD1, root="s3://bucket", dark_frames=2,
        storage_options={"endpoint_url": watched.endpoint_url},
    )  # fmt: skip
    assert watched.reads()
    assert not any(exchange.request.signed for exchange in watched.log)


def test_a_local_cluster_listens_on_loopback_only(source, tmp_path):
    build = Build(
        tmp_path / "s.zarr", "--root", "s3://bucket", "--endpoint-url", source.endpoint_url, "--workers", "2"
    )
    build.wait_for("dashboard: http://127.0.0.1:")
    build.wait_for("survey, ")
    me = psutil.Process(build.process.pid)
    listening = {
        connection.laddr.ip
        for process in (me, *me.children(recursive=True))
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert build.end() == 0
    assert listening == {"127.0.0.1"}


FORBIDDEN = {"pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle", "subprocess"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_nothing_that_is_read_is_run(path):
    """No pickle, no eval, no shell: what comes from storage is numbers, text and JSON."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name.split(".")[0] for alias in node.names} | {
                (getattr(node, "module", "") or "").split(".")[0]
            }
            assert not names & FORBIDDEN
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            assert not (isinstance(node.func, ast.Name) and name in {"eval", "exec", "compile", "__import__"})
            assert name not in {"read_pickle", "system", "popen"}
            for keyword in node.keywords:
                assert keyword.arg not in {"allow_pickle", "shell"} or keyword.value.value is False


class _Redirect(BaseHTTPRequestHandler):
    target = ""

    def do_GET(self):
        if self.path.startswith("/there"):
            self.send_response(200)
            self.send_header("Content-Length", "5")
            self.end_headers()
            self.wfile.write(b"there")
            return
        self.send_response(302)
        self.send_header("Location", self.target)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *args):
        pass


@pytest.mark.parametrize(
    "target", ["https://127.0.0.1:1/x", "file:///etc/passwd", "ftp://127.0.0.1/x", "/there"]
)
def test_redirects_to_other_schemes_are_refused(target, monkeypatch):
    monkeypatch.setattr("tessbkg.storage.BACKOFF_SECONDS", 0.001)
    monkeypatch.setattr(_Redirect, "target", target)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Redirect)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}/tess2018206192942-s0001-1-4-0120-s_ffic.fits"
    try:
        with pytest.raises(FFIReadError) as caught:
            tessbkg.read_ffi(url)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    words = "ends in its header at byte" if target == "/there" else "denied|edirect"
    assert re.search(words, caught.value.reason)


def test_a_group_path_is_never_taken_from_a_store():
    from tessbkg.ccd import CCD

    for path in ("../s0001/cam1/ccd9", "s0001/cam1/../ccd1", "/etc/passwd", "s0001/cam1/ccd1/.."):
        with pytest.raises(ValueError, match=r"ccd|path"):
            CCD.from_group(path)
