"""Bad arguments: one line that names the argument and what is allowed, exit code 2; ValueError in Python."""

from pathlib import Path

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


@pytest.fixture(scope="module")
def store(source, tmp_path_factory) -> str:
    out = str(tmp_path_factory.mktemp("arguments") / "s.zarr")
    tessbkg.build(out, **CCD1, root=source, dark_frames=2)
    return out


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
SERVER = [
    ("--endpoint-url", "127.0.0.1:9000", "http://HOST:PORT"),
    ("--endpoint-url", "http://", "http://HOST:PORT"),
    ("--endpoint-url", "http://me:password@127.0.0.1:1", "credentials"),
]
STORE_SERVER = [(f"--store-{option.lstrip('-')}", value, words) for option, value, words in SERVER]
SOURCE = [
    *COMMON,
    *SERVER,
    ("--sector", "2", "no calibrated FFIs (sector 2"),
    ("--root", "nosuch://x", "Protocol not known"),
    ("--root", "/no/such/folder", "no calibrated FFIs"),
    ("--root", __file__, "no calibrated FFIs"),
    ("--root", "https://me:password@example.org/x", "credentials"),
]
REDUCTION = [
    ("OUT", "nosuch://x", "Protocol not known"),
    ("OUT", __file__, "is a file; choose another store"),
    ("OUT", "s3://me:password@bucket/x", "credentials"),
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
    ("--ephemeris", "nowhere.bsp", "there is no such file"),
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
]
BUILD = [
    ("--on-error", "ignore", "'flag', 'raise'"),
    ("--workers", "0", "1<=x<=1024"),
    ("--workers", "x", "not a valid integer"),
    ("--scheduler", "nonsense", "--scheduler"),
]
SIMULATE = [
    ("URL", "nosuch://x", "Protocol not known"),
    ("--frames", "0", "x>=1"),
    ("--size", "7", "16<=x<=2048"),
    ("--size", "17", "multiples of 4"),
    ("--seed", "-1", "x>=0"),
    ("--kind", "sunny", "orbit"),
]
STORED = [
    ("STORE", "/no/such/store", "is not a Zarr store"),
    ("STORE", "nosuch://x", "Protocol not known"),
    ("--sector", "0", "1<=x<=9999"),
    ("--sector", "2", "it has sector 1 camera 1 CCD 4"),
    ("--camera", "5", "1<=x<=4"),
    ("--ccd", "x", "not a valid integer"),
    *STORE_SERVER,
]
CHECK = [
    *SERVER,
    ("STORE", str(Path(__file__).parent), "is not a Zarr store"),
    ("--sample", "0", "x>=1"),
    ("--seed", "-1", "x>=0"),
]
FILE = [
    ("OUT", "/no/such/folder/x.{}", "there is no folder '/no/such/folder'"),
    ("OUT", "/", "is a directory"),
]
PLOT = [
    ("OUT", "x.txt", "must end in .png or .pdf or .svg"),
    ("--kind", "nope", "'focal-plane'"),
    ("--frame", "-1", "x>=0"),
    ("--frame", "99", "good ones are among 0 to 3"),
    ("--variable", "earth_angle", "--kind focal-plane only"),
]
ANIMATE = [
    ("OUT", "x.png", "must end in .gif or .html or .mp4"),
    ("--variable", "nope", "variable='nope' is not among"),
    ("--fps", "0", "1<=x<=60"),
]
EXPORT = [("OUT", "x.txt", "ends in none of .npz"), ("--format", "nope", "'npz', 'fits', 'netcdf'")]
DEMO = [("--frames", "3", "4<=x<=200"), ("--out", __file__, "is a file")]
ENDINGS = {"plot": "png", "animate": "gif", "report": "html", "export": "npz"}
TABLE = [
    *(("list", *row) for row in SOURCE),
    *((command, *row) for command in ("plan", "build") for row in (*SOURCE, *STORE_SERVER, *REDUCTION)),
    *(("build", *row) for row in BUILD),
    *(("simulate", *row) for row in (*COMMON, *SERVER, *SIMULATE)),
    *((command, *row) for command in ("info", "check", *ENDINGS) for row in STORED),
    *(("check", *row) for row in CHECK),
    *(
        (command, name, value.format(end), words)
        for command, end in ENDINGS.items()
        for name, value, words in FILE
    ),
    *(("plot", *row) for row in PLOT),
    *(("animate", *row) for row in ANIMATE),
    *(("export", *row) for row in EXPORT),
    *(("demo", *row) for row in DEMO),
]


def right(command: str, source: str, store: str, folder: Path) -> dict[str, str]:
    """Arguments of a command with which it would do something."""
    match command:
        case "list":
            return {"--root": source, **IDENTITY}
        case "plan" | "build":
            return {"OUT": str(folder / "out"), "--root": source, **IDENTITY}
        case "simulate":
            return {"URL": str(folder / "out"), "--frames": "1", "--size": "16", **IDENTITY}
        case "info" | "check":
            return {"STORE": store}
        case "demo":
            return {}
    kind = {"--kind": "frame"} if command == "plot" else {}
    return {"STORE": store, "OUT": str(folder / f"x.{ENDINGS[command]}"), **IDENTITY, **kind}


@pytest.mark.parametrize(("command", "option", "value", "words"), TABLE)
def test_a_bad_option_is_one_line_and_exit_code_2(  # noqa: PLR0917
    source, store, tmp_path, command, option, value, words
):
    options = right(command, source, store, tmp_path) | {option: value}
    given = [value if name.isupper() else f"{name}={value}" for name, value in options.items()]
    result = CliRunner().invoke(main, [command, *given])
    assert result.exit_code == 2, result.output
    said = [line for line in result.stderr.splitlines() if line.startswith(("tessbkg: ", "Error: "))]
    assert len(said) == 1, result.stderr
    assert words in said[0], said[0]
    name = option.lstrip("-")
    assert name in said[0] or name.replace("-", "_") in said[0] or value in said[0] or "password" in value
    assert "password" not in said[0].replace("a password", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", sorted({*main.commands} - {"demo"}))
def test_every_option_that_needs_a_value_or_is_unknown_is_said(command):
    for arguments in ([command, "--nonsense"], [command]):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 2
        assert "Error: " in result.stderr


@pytest.mark.parametrize("command", sorted(main.commands))
def test_every_argument_and_option_is_in_the_table(command):
    tested = {option for name, option, *_ in TABLE if name == command}
    there = {
        one.opts[0] if one.opts[0].startswith("-") else one.name.upper()
        for one in main.commands[command].params
        if not getattr(one, "is_flag", False)
    }
    assert there == tested


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
