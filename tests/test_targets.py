"""Stores that cannot be written, or are not ours: one clear line, the right exit code, nothing half true."""

import contextlib
import os
import random
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import zarr
from builds import ARGUMENTS, REDUCTION, arrays_of, some
from click.testing import CliRunner
from frames import CCD1, simulated
from servers import Fault, free_port

import tessbkg
from tessbkg.check import check
from tessbkg.cli import main
from tessbkg.errors import StoreError

PATH = "s0001/cam1/ccd4"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("targets")
    simulated(8, shape=(64, 64), root=str(folder))
    return str(folder)


def run(*arguments: object):
    """Run the command line; return exit code and stderr."""
    result = CliRunner().invoke(main, [str(one) for one in arguments])
    assert "Traceback" not in result.output
    return result.exit_code, result.stderr


def build(out, source, *arguments):
    return run("build", out, *ARGUMENTS, "--root", source, *arguments)


def assert_one_line(stderr: str, *words: str) -> None:
    lines = [line for line in stderr.splitlines() if line.startswith(("tessbkg: ", "Error: "))]
    assert len(lines) == 1, stderr
    for word in words:
        assert word in lines[0]


def assert_not_finished(out) -> None:
    """Assert that nothing there looks finished."""
    with contextlib.suppress(FileNotFoundError):
        assert not zarr.open_group(str(out), path=PATH, mode="r").attrs.get("complete")
    assert run("check", out)[0] == 1


@contextlib.contextmanager
def mounted(folder: Path, options: str):
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    if os.geteuid() or shutil.which("mount") is None or subprocess.run(command, check=False).returncode:
        pytest.skip("a file system can be mounted by root only")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("kilobytes", some([8, 64, 200, 400], 64, 400))
@pytest.mark.slow
def test_a_full_disk(source, tmp_path, kilobytes):
    with mounted(tmp_path / "small", f"size={kilobytes}k") as folder:
        code, stderr = build(folder / "s.zarr", source)
        assert code == 1
        assert_one_line(stderr, "No space left on device", "s.zarr")
        assert_not_finished(folder / "s.zarr")
        subprocess.run(["mount", "-o", "remount,size=20m", str(folder)], check=True)
        code, stderr = build(folder / "s.zarr", source)
        assert code == 0, stderr  # it goes on when there is room again
        assert run("check", folder / "s.zarr")[0] == 0


@pytest.mark.slow
def test_a_full_disk_keeps_the_picture_that_was_there(source, tmp_path):
    assert build(tmp_path / "s.zarr", source)[0] == 0
    with mounted(tmp_path / "small", "size=8k") as folder:
        for command, name in (
            ("plot", "x.png"),
            ("animate", "x.gif"),
            ("report", "x.html"),
            ("export", "x.npz"),
        ):
            (folder / name).write_text("old")
            ccd = ("--sector", 1, "--camera", 1, "--ccd", 4)
            code, stderr = run(command, tmp_path / "s.zarr", folder / name, *ccd)
            assert code == 1
            assert_one_line(stderr, f"{folder / name}: cannot write: No space left on device")
            assert [path.name for path in folder.iterdir()] == [name]
            assert (folder / name).read_text() == "old"
            (folder / name).unlink()


@pytest.mark.slow
def test_a_full_disk_on_a_cluster(source, tmp_path):
    with mounted(tmp_path / "small", "size=500k") as folder:
        simulated(64, shape=(64, 64), root=str(tmp_path / "more"))
        code, stderr = build(folder / "s.zarr", tmp_path / "more", "--workers", "1")
        assert code == 1
        assert_one_line(stderr, "No space left on device")
        assert_not_finished(folder / "s.zarr")


def test_a_read_only_store(source, tmp_path):
    with mounted(tmp_path / "fixed", "size=20m") as folder:
        assert build(folder / "s.zarr", source, "--frames", "0:4")[0] == 0
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        assert build(folder / "s.zarr", source, "--frames", "0:4")[0] == 0  # nothing to do, nothing to write
        for arguments in (("--overwrite",), ("--camera", "1", "--overwrite")):
            code, stderr = build(folder / "s.zarr", source, *arguments)
            assert code == 1
            assert_one_line(stderr, "ead-only file system")
        code, stderr = build(folder / "t.zarr", source)
        assert code == 1
        assert_one_line(stderr, "ead-only file system", "t.zarr")
        assert run("check", folder / "s.zarr")[0] == 0


def test_permission_denied(source):
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    try:
        shutil.copytree(source, folder / "src")
        subprocess.run(["chmod", "-R", "a+rX", str(folder)], check=True)
        assert build(folder / "warm.zarr", folder / "src")[0] == 0  # everything is imported now
        (folder / "out").mkdir(mode=0o555)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            code, stderr = build(folder / "out" / "s.zarr", folder / "src")
        finally:
            if root:
                os.seteuid(0)
        assert code == 1
        assert_one_line(stderr, "permission denied", "s.zarr")
        assert not any((folder / "out").iterdir())
    finally:
        shutil.rmtree(folder)


def test_a_server_that_refuses_writes(source, hadro, ministack):
    bucket, _ = hadro.bucket()
    code, stderr = build(f"{bucket}/s.zarr", source, "--store-endpoint-url", hadro.endpoint_url)
    assert code == 1
    assert_one_line(stderr, f"{bucket}/s.zarr: cannot ")
    store = f"{ministack.bucket()}/s.zarr"
    with pytest.raises(StoreError, match="permission denied"):
        tessbkg.build(store, **CCD1, root=source, store_options=ministack.options(anon=True), dark_frames=2)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [Fault("status", status=503), Fault("status", status=500, forward=True)])
def test_a_server_that_throttles_or_loses_answers_gets_the_whole_store(
    source, ministack, proxy, tmp_path, fault
):
    chance, lock = random.Random(1), threading.Lock()

    def decide(_):
        with lock:
            return fault if chance.random() < 0.1 else None

    store, faulty = f"{ministack.bucket()}/s.zarr", proxy(ministack, decide)
    tessbkg.build(store, **CCD1, root=source, store_options=faulty.options(), **REDUCTION)
    assert sum(exchange.fault is not None for exchange in faulty.log) > 20
    assert check(store, store_options=ministack.options()) == []
    tessbkg.build(str(tmp_path / "s.zarr"), **CCD1, root=source, **REDUCTION)
    ours, clean = arrays_of(store, options=ministack.options()), arrays_of(str(tmp_path / "s.zarr"))
    assert ours.keys() == clean.keys()
    for name, values in clean.items():
        np.testing.assert_array_equal(ours[name], values, err_msg=name)


def test_a_bucket_that_is_not_there(source, ministack):
    code, stderr = build("s3://no-such-bucket/s.zarr", source, "--store-endpoint-url", ministack.endpoint_url)
    assert code == 1
    assert_one_line(stderr, "does the bucket exist?", "s3://no-such-bucket/s.zarr")


@pytest.mark.slow
def test_a_store_whose_server_is_down(source):
    nobody = f"http://127.0.0.1:{free_port()}"
    code, stderr = build("s3://bucket/s.zarr", source, "--store-endpoint-url", nobody)
    assert code == 1
    assert_one_line(stderr, "s3://bucket/s.zarr")


def test_a_source_whose_server_is_down(tmp_path, monkeypatch):
    monkeypatch.setattr("tessbkg.storage.BACKOFF_SECONDS", 0.001)
    nobody = f"http://127.0.0.1:{free_port()}"
    code, stderr = build(tmp_path / "s.zarr", "s3://bucket", "--endpoint-url", nobody)
    assert code == 1
    assert_one_line(stderr, "after 6 attempts")
    assert not (tmp_path / "s.zarr").exists()


@pytest.mark.parametrize("command", ["build", "plan"])
def test_another_layout_is_refused_with_both_versions(source, tmp_path, command):
    out = tmp_path / "s.zarr"
    assert build(out, source)[0] == 0
    group = zarr.open_group(str(out), path=PATH)
    group.attrs["layout"] = 99
    code, stderr = run(command, out, *ARGUMENTS, "--root", source)
    assert code == 1
    assert_one_line(stderr, "layout 99", "layout 1")
    assert run("check", out)[0] == 1
    with pytest.raises(StoreError, match=r"layout 99.*layout 1"):
        tessbkg.open_background(str(out), **CCD1)
    assert build(out, source, "--overwrite")[0] == 0


def foreign_group(out):
    zarr.open_group(str(out), path=PATH, mode="w").attrs["mine"] = 1


def foreign_folder(out):
    out.mkdir()
    (out / "thesis.tex").write_text("precious")


def foreign_file(out):
    out.write_text("precious")


@pytest.mark.parametrize("make", [foreign_group, foreign_folder, foreign_file])
@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_what_is_not_ours_is_not_touched(source, tmp_path, make, overwrite):
    out = tmp_path / "thing"
    make(out)
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    code, stderr = build(out, source, *overwrite)
    assert code == 2
    assert_one_line(stderr, "choose another store")
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


def test_other_parameters_are_refused_with_the_fields_named(source, tmp_path):
    out = tmp_path / "s.zarr"
    assert build(out, source)[0] == 0
    code, stderr = build(out, source, "--bin", "32", "--statistic", "mean")
    assert code == 2
    assert_one_line(stderr, "bin: 16 there, 32 asked", "there, 'mean' asked")
    code, stderr = build(out, source, "--frames", "0:4")
    assert code == 2
    assert_one_line(stderr, "frames: 8 there, 4 asked")
    assert run("check", out)[0] == 0
    assert build(out, source, "--bin", "32", "--overwrite")[0] == 0


def test_raise_ends_the_command_with_key_and_reason(source, tmp_path):
    shutil.copytree(source, tmp_path / "src")
    path = Path(tessbkg.list_ffis(**CCD1, root=str(tmp_path / "src"))["url"][2].removeprefix("file://"))
    path.write_bytes(b"x" * 5000)
    code, stderr = build(tmp_path / "s.zarr", tmp_path / "src", "--on-error", "raise")
    assert code == 1
    assert_one_line(stderr, path.name, "no FITS header")
