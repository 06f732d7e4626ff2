"""Every example of every docstring runs; what the README says exists."""

import doctest
import importlib
import pkgutil
import re
import warnings
from pathlib import Path

import pytest
from click.testing import CliRunner

import tessbkg
from tessbkg.cli import main

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(tessbkg.__path__, "tessbkg.")
    if not module.name.rsplit(".", 1)[-1].startswith("make_")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        module = importlib.import_module(name)
    except ImportError as error:  # an optional extra
        pytest.skip(f"{name}: {error}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert results.failed == 0


def test_every_public_function_has_an_example():
    for name in tessbkg.__all__:
        public = getattr(tessbkg, name)
        if callable(public) and not isinstance(public, type):
            assert ">>>" in public.__doc__, name


def test_readme_names_only_what_exists():
    names = {match for match in re.findall(r"tessbkg\.(\w+)\(", README) if not match.startswith("_")}
    assert names
    assert names <= set(tessbkg.__all__), names - set(tessbkg.__all__)


def test_readme_commands_exist():
    shown = set(re.findall(r"^ {4}tessbkg (\w+)", README, flags=re.MULTILINE))
    assert shown
    assert shown <= set(main.commands)
    for name in main.commands:
        result = CliRunner().invoke(main, [name, "--help"])
        assert result.exit_code == 0
        assert "Example" in result.output


def test_readme_pictures_are_there():
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    for picture in pictures:
        assert (Path(__file__).parents[1] / picture).stat().st_size > 1000
    assert pictures
