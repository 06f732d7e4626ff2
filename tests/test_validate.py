"""Tests of tessbkg.validate: warnings where a scientist would want them, none where all is well."""

import numpy as np
import pandas as pd
import pytest
from frames import CCD1, simulated

import tessbkg
from tessbkg.simulate import Model
from tessbkg.store import Group, marker
from tessbkg.validate import doubts, scatter

QUIET = {"unread": [], "dark_frames": ["a", "b"], "wanted": 2, "unmasked": np.ones((2, 2)), "misfit": 0.001}


def survey(excess=(0.0, 0.5, 80.0)) -> pd.DataFrame:
    return pd.DataFrame({"ffi": list("abc"), "status": 0, "excess": excess})


def rows(*values):
    return [{"ffi": name, "status": 0, "scatter": value} for name, value in zip("abc", values, strict=True)]


def test_scatter_is_one_for_honest_errors_whatever_the_smooth_light():
    rng = np.random.default_rng(2)
    y, x = np.mgrid[:64, :64]
    error = rng.uniform(0.5, 2, (64, 64)).astype("f4")
    noise = (rng.standard_normal((64, 64)) * error).astype("f4")
    for light in (0, 30 * x + 7 * y):
        assert scatter((noise + light).astype("f4"), error) == pytest.approx(1, abs=0.05)
    assert scatter(10 * noise, error) == pytest.approx(10, abs=0.5)


def test_scatter_of_two_bins_or_of_nothing_is_unknown():
    assert scatter(np.ones((2, 2), "f4"), np.ones((2, 2), "f4")) is None
    assert scatter(np.full((8, 8), np.nan, "f4"), np.ones((8, 8), "f4")) is None


def test_nothing_is_said_when_all_is_well():
    assert doubts(survey(), rows(1, 1.2, None), **QUIET) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dark_frames": ["a", "c"]}, "1 of 2 dark frames are not dark: up to 80.0 electron s-1"),
        ({"unread": ["a: not found"]}, "could not be read, the next-darkest was taken: a: not found"),
        ({"dark_frames": ["a"]}, "made of 1 frames where 2 were to be had"),
        ({"unmasked": np.array([[1.0, 0.1]])}, "1 of 2 bins have less than 25% of their pixels unmasked"),
        ({"misfit": 0.5}, "misfits the camera by 0.500 degrees"),
        (
            {"rows": rows(1, 99.0, 50.0)},
            "2 frames scatter by more than 5 times their error bars, most of all b by 99",
        ),
    ],
)
def test_what_is_doubtful_is_said(change, words):
    arguments = {**QUIET, **change}
    (line,) = doubts(survey(), arguments.pop("rows", rows(1, 1, 1)), **arguments)
    assert words in line


def test_frames_that_are_never_dark_are_said_in_the_report_and_in_the_store(tmp_path):
    root, _ = simulated(24, shape=(128, 128), root=str(tmp_path / "src"), kind="few_dark")
    report = tessbkg.build(str(tmp_path / "s.zarr"), **CCD1, root=root, dark_frames=16)
    assert any("the scene is made of 3 frames" in note for note in report.notes), report.notes
    assert "note: " in report.summary()
    group = Group.of(str(tmp_path / "s.zarr"), tessbkg.CCD(**CCD1), None)
    assert set(marker(group, "warnings")) <= set(report.notes)


def test_a_good_ccd_has_no_word_about_its_dark_frames(tmp_path):
    quiet = Model(earth=0.0, moon=0.0, glint=0.0)

    root, _ = simulated(12, shape=(256, 256), root=str(tmp_path / "src"), kind=quiet)
    report = tessbkg.build(str(tmp_path / "s.zarr"), **CCD1, root=root, dark_frames=6)
    assert not any("dark" in note for note in report.notes)
