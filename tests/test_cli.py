"""The command line: what it prints, what it refuses, and with which exit code it ends."""

from __future__ import annotations

import html
import re
import warnings

import numpy as np
import pytest
import xarray as xr
from click.testing import CliRunner
from frames import CCD1, memory_root, simulated
from hypothesis import given
from hypothesis import strategies as st

import tessbkg
from tessbkg.ccd import CCD
from tessbkg.cli import FrameSlice, Numbers, main
from tessbkg.store import Group, set_attributes

ONE = ["--sector", "1", "--camera", "1", "--ccd", "4"]
QUICK = ["--dark-frames", "2", "--no-angles", "--shard-frames", "4"]


def run(*arguments, code=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def refused(*arguments, code=2):
    """Run a command that must fail; return its last line."""
    result = run(*arguments, code=code)
    assert "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit)
    return result.stderr.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def sky():
    return simulated(6, shape=(64, 64), faults={2: "garbage"})[0]


@pytest.fixture(scope="module")
def store(sky):
    url = f"{memory_root()}/a.zarr"
    result = run("build", url, *ONE, "--root", sky, *QUICK)
    assert "6 frames (" in result.output
    return url


# --- help --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [None, *sorted(main.commands)])
def test_help(command):
    words = [command] if command else []
    for flag in ("--help", "-h"):
        text = run(*words, flag).output
        assert "Usage: main" in text
        assert len(text.splitlines()) > 5
        assert "\\b" not in text
    if command:
        assert re.search(rf"^  Examples?:\n    tessbkg {command} ", text, re.MULTILINE)
    else:
        assert "...\n" not in text.partition("Commands:")[2]  # every command says in one line what it does
        assert {"build", "demo", "info", "list", "plan", "simulate"} <= set(
            re.findall(r"^  (\w+)", text, re.MULTILINE)
        )


def test_version():
    assert tessbkg.__version__ in run("--version").output


# --- arguments ---------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 5)), min_size=1, max_size=5))
def test_numbers_and_ranges(parts):
    text = ",".join(str(a) if n == 0 else f"{a}-{a + n}" for a, n in parts)
    assert Numbers(50).convert(text, None, None) == sorted({i for a, n in parts for i in range(a, a + n + 1)})


def test_numbers_that_are_documented():
    assert Numbers(9999, every=False).convert("1-5,7", None, None) == [1, 2, 3, 4, 5, 7]
    assert Numbers(4).convert("all", None, None) == [1, 2, 3, 4]


@pytest.mark.parametrize("text", ["", "0", "5", "1-", "-1", "2-1", "1,", "a", "1.5", "1--2", "ALL", "²"])
def test_numbers_that_are_refused(text):
    line = refused("list", "--sector", "1", "--camera", text)
    assert "'--camera'" in line
    assert repr(text) in line
    assert "allowed are numbers from 1 to 4" in line


@given(
    start=st.none() | st.integers(0, 99),
    stop=st.none() | st.integers(0, 99),
    step=st.none() | st.integers(1, 9),
)
def test_slices(start, stop, step):
    text = ":".join("" if part is None else str(part) for part in (start, stop))
    text += "" if step is None else f":{step}"
    assert FrameSlice().convert(text, None, None) == slice(start, stop, step)


@pytest.mark.parametrize("text", ["", "5", "a:b", "1:2:3:4", "::0", "-5:", "1.5:2"])
def test_slices_that_are_refused(text):
    line = refused("plan", "x.zarr", *ONE, "--root", "memory://nothing", "--frames", text)
    assert "'--frames'" in line
    assert "START:STOP" in line


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--sector", "all"], "'--sector'"),
        (["--sector", "10000"], "'--sector'"),
        (["--bin", "3"], "bin=3 is not allowed"),
        (["--bin", "x"], "'--bin'"),
        (["--statistic", "mode"], "'--statistic'"),
        (["--errors", "none"], "'--errors'"),
        (["--dark-frames", "0"], "'--dark-frames'"),
        (["--drop-quality", "-1"], "'--drop-quality'"),
        (["--shard-frames", "0"], "'--shard-frames'"),
        (["--on-error", "skip"], "'--on-error'"),
        (["--workers", "0"], "'--workers'"),
        (
            ["--workers", "1", "--scheduler", "tcp://127.0.0.1:1"],
            "--workers and --scheduler exclude each other",
        ),
        (["--root", "nonsense://x"], "nonsense"),
        (
            ["--root", "memory://nothing-there"],
            "no calibrated FFIs (sector 1, camera 1, CCD 4) in memory://nothing",
        ),
        (["--frames", "50:60"], "frames=50:60"),
        (["--nothing"], "--nothing"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(sky, options, part):
    words = ["build", f"{memory_root()}/a.zarr", *ONE, "--root", sky, *options]
    assert part in refused(*words)


def test_a_missing_sector_is_named():
    assert "'--sector'" in refused("list", "--camera", "1")
    assert "'OUT'" in refused("build", "--sector", "1")


def test_traceback_with_debug_only(sky):
    words = ["plan", "x.zarr", *ONE, "--root", "memory://nothing-there"]
    refused(*words)
    result = CliRunner().invoke(main, ["--debug", *words])
    assert type(result.exception).__name__ == "CatalogError"


# --- commands ----------------------------------------------------------------------------------------------


def test_list(sky):
    lines = run("list", *ONE, "--root", sky).output.splitlines()
    assert lines[0].split()[:4] == ["sector", "camera", "ccd", "frames"]
    assert lines[1].split()[:4] == ["1", "1", "4", "6"]
    urls = run("list", *ONE, "--root", sky, "--urls").output.split()
    assert len(urls) == 6
    assert all(sky[9:] in url and url.endswith("_ffic.fits") for url in urls)
    assert run("list", "--sector", "1", "--root", sky).output.splitlines() == lines


def test_plan_writes_nothing(sky, tmp_path):
    out = tmp_path / "a.zarr"
    text = run("plan", out, *ONE, "--root", sky, "--shard-frames", "4").output
    assert "sector 1 camera 1 CCD 4" in text
    assert "0 of 2 shards" in text
    assert not out.exists()


def test_build_says_what_it_did(sky, store):
    result = run("build", store, *ONE, "--root", sky, *QUICK)
    assert "everything was there already" in result.output
    assert "no FITS header" in result.output
    assert store in result.output
    fresh = run("build", f"{memory_root()}/a.zarr", *ONE, "--root", sky, *QUICK)
    assert "reduce, 2 tasks" in fresh.stderr
    assert "1 bad header" in fresh.output
    assert re.search(r"[\d.]+ s, [\d,]+ MB read, [\d,]+ MB/s", fresh.output)


def test_build_options_reach_the_store(sky):
    out = f"{memory_root()}/a.zarr"
    words = [
        "--bin",
        "8",
        "--statistic",
        "mean",
        "--errors",
        "uncert",
        "--frames",
        "0:4",
        "--drop-quality",
        "0",
    ]
    run("build", out, *ONE, "--root", sky, *QUICK, *words)
    with xr.open_zarr(out, group="s0001/cam1/ccd4", consolidated=False) as ds:
        assert ds["scattered_light"].shape == (4, 8, 8)
        assert (ds.attrs["bin"], ds.attrs["statistic"]) == (8, "mean")
        assert (ds["frame_status"] != 4).all()


def test_other_parameters_end_with_two_and_overwrite_helps(sky):
    out = f"{memory_root()}/a.zarr"
    run("build", out, *ONE, "--root", sky, *QUICK)
    assert "bin: 16 there, 8 asked" in refused("build", out, *ONE, "--root", sky, *QUICK, "--bin", "8")
    run("build", out, *ONE, "--root", sky, *QUICK, "--bin", "8", "--overwrite")


def test_a_failed_job_ends_with_one(sky):
    line = refused(
        "build", f"{memory_root()}/a.zarr", *ONE, "--root", sky, *QUICK, "--on-error", "raise", code=1
    )
    assert line.startswith("tessbkg: ")
    assert "no FITS header" in line


def test_failed_frames_are_tried_again_when_asked(tmp_path):
    simulated(4, shape=(64, 64), root=str(tmp_path / "sky"))
    path = min((tmp_path / "sky/ffi").rglob("*.fits"))
    content = path.read_bytes()
    path.write_bytes(b"")
    words = ["build", tmp_path / "a.zarr", *ONE, "--root", tmp_path / "sky", *QUICK]
    said = run(*words).output
    assert "1 unreadable" in said
    assert "--retry-failed" in said
    path.write_bytes(content)
    assert "everything was there already" in run(*words).output
    said = run(*words, "--retry-failed").output
    assert "unreadable" not in said
    assert "--retry-failed" not in said
    assert "nothing is wrong" in run("check", tmp_path / "a.zarr", "--deep").output


def test_a_warning_and_a_damaged_store_are_one_line_each(sky, tmp_path):
    out = tmp_path / "a.zarr"
    run("build", out, *ONE, "--root", sky, *QUICK)
    set_attributes(Group.of(str(out), CCD(**CCD1), None), complete=None)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        said = run("export", out, tmp_path / "x.npz", *ONE).stderr.splitlines()
        assert said == [f"tessbkg: warning: {out}/s0001/cam1/ccd4 is not finished: build it again to go on"]
        shard = out / "s0001/cam1/ccd4/scattered_light/c/0/0/0"
        shard.write_bytes(shard.read_bytes()[::-1])
        line = refused("export", out, tmp_path / "x.npz", *ONE, code=1)
    assert line.startswith("tessbkg: the store is damaged, tessbkg check tells where: ")


def test_build_of_many_ccds(tmp_path):
    for ccd in (1, 3):
        simulated(2, shape=(32, 32), root=str(tmp_path), ccd=ccd)
    out = tmp_path / "a.zarr"
    words = ["--sector", "1", "--camera", "1-2", "--ccd", "1,3", "--root", tmp_path]
    result = run("build", out, *words, *QUICK)
    assert result.output.count("2 frames (") == 2
    lines = run("info", out).output.splitlines()
    assert re.fullmatch(r".*a\.zarr: 2 CCDs, [\d.]+ MB", lines[0])
    assert lines[1:3] == ["sector 1", "  camera 1"]
    begins = [f"    CCD {n}  complete, 2 frames, 2 x 2 bins of 16 pixels, whole" for n in (1, 3)]
    assert [line[: len(begins[0])] for line in lines[3::2]] == begins
    assert all(line.endswith(": 2 good") for line in lines[4::2])
    assert run("info", out, "--ccd", "3").output.count("CCD ") == 1
    line = refused("plot", out, tmp_path / "x.png", "--sector", "1")
    assert "has 2 such CCDs, sector 1 camera 1 CCD 1 to sector 1 camera 1 CCD 3: give --sector" in line
    run("export", out, f"{memory_root()}/x.npz", "--ccd", "3")
    assert "it has sector 1 camera 1 CCD 1, sector" in refused("info", out, "--camera", "2")


def test_source_and_store_on_two_servers(hadro, ministack, proxy):
    bucket, folder = hadro.bucket()
    simulated(2, shape=(32, 32), root=str(folder))
    source, target = proxy(hadro), proxy(ministack)
    words = ["plan", f"{ministack.bucket()}/a.zarr", *ONE, "--root", bucket, "--frames", "0:1"]
    words += ["--endpoint-url", source.endpoint_url, "--store-endpoint-url", target.endpoint_url]
    assert "0 of 1 shards" in run(*words).output
    assert source.log
    assert not any(exchange.request.signed for exchange in source.log)
    assert target.log
    assert all(exchange.request.signed for exchange in target.log)
    source.clear()
    run(*words, "--no-anon")
    assert all(exchange.request.signed for exchange in source.log)


def test_info(store, tmp_path):
    text = run("info", store).output
    assert "CCD 4  complete, 6 frames, 4 x 4 bins of 16 pixels, whole" in text
    assert ": 5 good, 1 bad header" in text
    details = run("info", store, *ONE).output
    for part in ("scene       of 2 dark frames: tess", "errors      by model", "scattered_light 0."):
        assert part in details
    assert "is not a Zarr store" in refused("info", tmp_path / "nothing")


def test_info_of_a_build_that_is_not_finished(sky):
    from tessbkg.jobs import run_build

    url = f"{memory_root()}/a.zarr"

    def stop(at):
        def progress(step, done, total):
            if (step, done) == at:
                raise KeyboardInterrupt

        return progress

    for at, words in ((("scene", 0), "begun, nothing written yet"), (("reduce", 1), "NOT FINISHED (1 of 3")):
        plan = tessbkg.plan_build(url, root=sky, **CCD1, dark_frames=2, angles=False, shard_frames=2)
        with pytest.raises(KeyboardInterrupt):
            run_build(plan, progress=stop(at))
        assert words in run("info", url).output
    assert "NOT FINISHED (1 of 3 shards), 6 frames" in run("info", url, *ONE).output


def test_averages_in_time(sky):
    url = f"{memory_root()}/a.zarr"
    words = ["build", url, *ONE, "--root", sky, *QUICK, "--bin-hours"]
    assert "hours from frame to frame" in refused(*words, "99")
    assert "means of 250 hours too" in run("plan", url, *ONE, "--root", sky, "--bin-hours", "250").output
    run(*words, "250")
    assert "means of 250 h" in run("info", url).output


def test_pictures_and_pages(sky, tmp_path):
    url = str(tmp_path / "a.zarr")
    run("build", url, *ONE, "--root", sky, "--dark-frames", "2", "--bin-hours", "250")
    for words in (
        ["plot", url, "level.png"],
        ["plot", url, "frame.png", *ONE, "--kind", "frame", "--frame", "1"],
        ["plot", url, "plane.png", "--kind", "focal-plane", "--variable", "earth_angle"],
        ["animate", url, "light.gif", *ONE],
        ["animate", url, "binned.gif", *ONE, "--binned", "--variable", "moon_angle"],
        ["report", url, "page.html", *ONE],
        ["export", url, "binned.npz", *ONE, "--binned"],
    ):
        words[2] = str(tmp_path / words[2])
        assert words[2] in run(*words).output.replace("\n", "")
        assert (tmp_path / words[2]).stat().st_size > 3000
    page = (tmp_path / "page.html").read_text()
    assert page.count('<img alt="') == page.count("data:image/png;base64") == 3
    assert "http" not in page
    warnings = tessbkg.open_background(url, **CCD1).attrs["warnings"]
    for part in ("no FITS header", "GB, 0 requests tried again", *warnings):
        assert html.escape(part) in page
    out = tmp_path / "x.png"
    assert "it has sector 1 camera 1 CCD 4" in refused("plot", url, out, "--sector", "2")
    assert "frame=2 is not there or not good" in refused(
        "plot", url, out, *ONE, "--kind", "frame", "--frame", "2"
    )
    words = ["plot", url, out, "--sector", "1", "--kind", "focal-plane", "--variable"]
    assert "variable='earth' is not among" in refused(*words, "earth")


def test_simulate(tmp_path):
    words = ["--frames", "2", "--size", "32", "--seed", "5"]
    result = run("simulate", tmp_path, "--sector", "100", "--camera", "2", "--ccd", "1-2", *words)
    assert "sector 100 camera 2 CCD 1: 2 frames" in result.output
    found = run("list", "--sector", "100", "--root", tmp_path).output
    assert len(found.splitlines()) == 3
    assert "'--size'" in refused("simulate", tmp_path, *ONE, "--size", "5")


@pytest.mark.slow
def test_demo(tmp_path):
    out = tmp_path / "demo"
    result = run("demo", "--frames", "4", "--out", out)
    for part in ("1. simulate 4 frames", "4 frames (", "median |difference|", "tessbkg plan"):
        assert part in result.output
    for picture in ("frame.png", "light.gif"):
        assert (out / picture).stat().st_size > 10_000
    with xr.open_zarr(out / "bkg.zarr", group="s0001/cam1/ccd4", consolidated=False) as ds:
        assert ds["scattered_light"].shape == (4, 128, 128)
        assert np.isfinite(ds["scattered_light"]).any()
