"""Bad arguments: one line that names the argument and what is allowed, exit code 2; ValueError in Python."""

import pytest
from click.testing import CliRunner
from frames import CCD1, simulated

import tessbkg
from tessbkg.check import check
from tessbkg.cli import main
from tessbkg.errors import CatalogError


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("arguments")
    simulated(4, shape=(64, 64), root=str(folder))
    return str(folder)


IDENTITY = {"--sector": "1", "--camera": "1", "--ccd": "4"}
NUMBERS = "allowed are numbers from 1 to"
COMMON = [
    ("--sector", "0", NUMBERS),
    ("--sector", "-1", NUMBERS),
    ("--sector", "10000", "1 to 9999"),
    ("--sector", "one", NUMBERS),
    ("--sector", "all", NUMBERS),
    ("--sector", "5-3", NUMBERS),
    ("--sector", "", NUMBERS),
    ("--sector", "1.5", NUMBERS),
    ("--camera", "5", "1 to 4"),
    ("--camera", "0", "1 to 4"),
    ("--camera", "x", "1 to 4"),
    ("--ccd", "5", "1 to 4"),
    ("--ccd", "1,,2", "1 to 4"),
]
REDUCTION = [
    ("--bin", "7", "must divide 2048"),
    ("--bin", "0", "divisor of 2048"),
    ("--bin", "-16", "divisor of 2048"),
    ("--bin", "4096", "must divide 2048"),
    ("--bin", "x", "not a valid integer"),
    ("--bin", "1.5", "not a valid integer"),
    ("--statistic", "mode", "'median', 'mean'"),
    ("--errors", "none", "'model', 'uncert'"),
    ("--dark-frames", "0", "1<=x<=32"),
    ("--dark-frames", "33", "1<=x<=32"),
    ("--dark-frames", "many", "not a valid integer"),
    ("--drop-quality", "-1", "0<=x<=65535"),
    ("--drop-quality", "65536", "0<=x<=65535"),
    ("--ephemeris", "nowhere", "ephemeris"),
    ("--bin-hours", "0", "x>0"),
    ("--bin-hours", "nan", "is not allowed"),
    ("--bin-hours", "0.01", "hours from frame to frame"),
    ("--frames", "5", "START:STOP"),
    ("--frames", "a:b", "START:STOP"),
    ("--frames", "-3:5", "START:STOP"),
    ("--frames", "1:2:3:4", "START:STOP"),
    ("--frames", "0:4:0", "START:STOP"),
    ("--frames", "10:20", "selects none of 4 frames"),
    ("--shard-frames", "0", "1<=x<=4096"),
    ("--shard-frames", "4097", "1<=x<=4096"),
    ("--sector", "2", "no calibrated FFIs (sector 2"),
    ("--root", "nosuch://x", "Protocol not known"),
    ("--root", "/no/such/folder", "no calibrated FFIs"),
    ("--root", "https://me:password@example.org/x", "credentials"),
]
BUILD = [
    ("--on-error", "ignore", "'flag', 'raise'"),
    ("--workers", "0", "1<=x<=1024"),
    ("--workers", "x", "not a valid integer"),
    ("--scheduler", "nonsense", "--scheduler"),
    ("--store-endpoint-url", "http://me:password@127.0.0.1:1", "credentials"),
]
SIMULATE = [
    ("--frames", "0", "x>=1"),
    ("--size", "7", "16<=x<=2048"),
    ("--size", "17", "multiples of 4"),
    ("--seed", "-1", "x>=0"),
    ("--kind", "sunny", "orbit"),
]
CHECK = [
    ("--sector", "0", "1<=x<=9999"),
    ("--camera", "5", "1<=x<=4"),
    ("--ccd", "x", "not a valid integer"),
    ("--sample", "0", "x>=1"),
    ("--seed", "-1", "x>=0"),
]
TABLE = [
    *(("list", *row) for row in COMMON),
    *((command, *row) for command in ("plan", "build") for row in (*COMMON, *REDUCTION)),
    *(("build", *row) for row in BUILD),
    *(("simulate", *row) for row in (*COMMON, *SIMULATE)),
    *(("check", *row) for row in CHECK),
]


@pytest.mark.parametrize(("command", "option", "value", "words"), TABLE)
def test_a_bad_option_is_one_line_and_exit_code_2(  # noqa: PLR0917
    source, tmp_path, command, option, value, words
):
    options = {} if command == "check" else {"--root": source, **IDENTITY}
    if command == "simulate":
        options = {**IDENTITY, "--frames": "1", "--size": "16"}
    options[option] = value
    out = [] if command == "list" else [str(tmp_path / "out")]
    result = CliRunner().invoke(main, [command, *out, *(f"{k}={v}" for k, v in options.items())])
    assert result.exit_code == 2, result.output
    said = [line for line in result.stderr.splitlines() if line.startswith(("tessbkg: ", "Error: "))]
    assert len(said) == 1, result.stderr
    assert words in said[0], said[0]
    name = option.lstrip("-")
    if name != "store-endpoint-url":  # it is store_options['endpoint_url'] inside
        assert name in said[0] or name.replace("-", "_") in said[0] or value in said[0], said[0]
    assert "password" not in said[0].replace("a password", "")
    assert not (tmp_path / "out" / "zarr.json").exists()


@pytest.mark.parametrize("command", ["list", "plan", "build", "simulate", "check", "info"])
def test_every_option_that_needs_a_value_or_is_unknown_is_said(command):
    for arguments in ([command, "--nonsense"], [command]):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 2
        assert "Error: " in result.stderr


def test_every_option_of_a_build_is_in_the_table():
    tested = {option for _, option, *_ in TABLE}
    free = {"--overwrite", "--retry-failed", "--angles", "--anon", "--help", "--deep"}  # flags
    free |= {"--endpoint-url"}  # any value will do
    for name in ("list", "plan", "build", "simulate", "check"):
        options = {one.opts[-1] for one in main.commands[name].params if one.opts[0].startswith("-")}
        assert options - free - {"--urls"} <= tested, name


PYTHON = [
    ({"sector": 0}, ValueError, "sector=0"),
    ({"sector": "1"}, ValueError, "sector"),
    ({"sector": None}, ValueError, "sector is missing"),
    ({"camera": 5}, ValueError, "camera=5"),
    ({"ccd": 0}, ValueError, "ccd=0"),
    ({"ccd": True}, ValueError, "ccd=True"),
    ({"camera": None, "ccd": None, "sector": 2}, CatalogError, "no calibrated FFIs"),
    ({"root": "nosuch://x"}, ValueError, "nosuch"),
    ({"files": []}, CatalogError, "no calibrated FFIs"),
    ({"files": ["x.txt"]}, CatalogError, "x.txt"),
    ({"frames": slice(100, 200)}, ValueError, "selects none of 4"),
    ({"bin": 7}, ValueError, "bin=7"),
    ({"bin": 16.0}, ValueError, "bin=16.0"),
    ({"bin": True}, ValueError, "bin=True"),
    ({"statistic": "mode"}, ValueError, "allowed are whole"),
    ({"errors": "none"}, ValueError, "'model' and 'uncert'"),
    ({"dark_frames": 0}, ValueError, "1 to 32"),
    ({"drop_quality": 70000}, ValueError, "0 to 65535"),
    ({"shard_frames": 0}, ValueError, "1 to 4096"),
    ({"shard_frames": 2.0}, ValueError, "1 to 4096"),
    ({"on_error": "ignore"}, ValueError, "'flag' and 'raise'"),
    ({"color": 1}, ValueError, "unknown option 'color'"),
    ({"statistics": "mean"}, ValueError, "did you mean 'statistic'?"),
    ({"sektor": 1}, ValueError, "did you mean 'sector'?"),
    ({"bin_hours": "2"}, ValueError, "bin_hours='2' is not allowed"),
    ({"storage_options": {"key": "x"}}, ValueError, "credentials"),
    ({"storage_options": {"client_kwargs": {"aws_secret_access_key": "x"}}}, ValueError, "credentials"),
    ({"storage_options": {"endpoint_url": "http://me:pw@h"}}, ValueError, "endpoint_url"),
    ({"store_options": {"secret": "x"}}, ValueError, "store_options"),
]


@pytest.mark.parametrize(("change", "kind", "words"), PYTHON)
def test_a_bad_argument_in_python_is_named(source, tmp_path, change, kind, words):
    arguments = {**CCD1, "root": source, **change}
    for function in (tessbkg.plan_build, tessbkg.build):
        with pytest.raises(kind, match=words.replace("(", r"\(")):
            function(str(tmp_path / "s.zarr"), **arguments)
    assert not (tmp_path / "s.zarr").exists()


def test_a_bad_argument_of_check_is_named(tmp_path):
    for change, words in (({"sector": 0}, "sector=0"), ({"sample": 0}, "sample=0"), ({"ccd": 9}, "ccd=9")):
        with pytest.raises(ValueError, match=words):
            check(str(tmp_path), **change)
