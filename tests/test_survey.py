"""Pass 1: every frame gets its time, quality, place and brightness from a few bytes."""

from __future__ import annotations

import fsspec
import numpy as np
import pandas as pd
import pytest
from frames import contents, counted, edited, listed, simulated
from servers import Fault

from tessbkg import storage
from tessbkg.ccd import DROP_QUALITY
from tessbkg.errors import FFIReadError
from tessbkg.ffi import SCIENCE_END, FrameStatus
from tessbkg.simulate import KINDS, Model
from tessbkg.survey import (
    choose_dark,
    finish_survey,
    orbit_numbers,
    reject,
    survey_frames,
    wcs_frames,
)

FAULTS = {
    1: "zero",
    2: "nan",
    4: "empty",
    5: "garbage",
    7: "no_wcs",
    8: "no_index",
    9: "offset",
    10: "wrong_camera",
    11: "wrong_naxis",
    12: "dump",
    13: "saturated",
}


@pytest.fixture(scope="module")
def faulty():
    root, truth = simulated(24, shape=(128, 128), faults=FAULTS)
    frames = listed(root)
    cut = contents(frames["url"][3])[:100_000]  # three quarters of the science rows
    fsspec.filesystem("memory").pipe_file(frames["url"][3], cut)
    return frames, finish_survey([survey_frames(frames)]), truth


@pytest.fixture(scope="module")
def sound():
    root, truth = simulated(24, shape=(128, 128))
    frames = listed(root)
    return frames, finish_survey([survey_frames(frames)]), truth


def test_times_are_those_of_the_truth(sound):
    _, survey, truth = sound
    np.testing.assert_allclose(survey["time"], truth["time"], atol=1e-9, rtol=0)
    np.testing.assert_allclose(survey["time"] + survey["barycorr"], truth["btjd"], atol=1e-9, rtol=0)
    assert survey["cadence"].tolist() == truth["cadence"].to_numpy().tolist()
    assert survey["quality"].tolist() == truth["quality"].to_numpy().tolist()
    assert survey["ffi"].tolist() == truth["ffi"].to_numpy().tolist()
    assert (survey["status"] == FrameStatus.GOOD).all()
    assert survey[["rows", "columns", "first_row", "first_column"]].drop_duplicates().to_numpy().tolist() == [
        [128, 128, 1, 45]
    ]


def test_every_frame_keeps_its_place_with_a_status(faulty):
    frames, survey, truth = faulty
    assert len(survey) == len(frames) == 24
    assert survey["ffi"].tolist() == truth["ffi"].to_numpy().tolist()
    assert survey["time"].is_monotonic_increasing
    bad = survey[survey["status"] != FrameStatus.GOOD]
    assert dict(zip(bad.index, bad["status"], strict=True)) == {
        3: FrameStatus.UNREADABLE,
        4: FrameStatus.UNREADABLE,
        5: FrameStatus.BAD_HEADER,
        10: FrameStatus.BAD_HEADER,
        11: FrameStatus.BAD_HEADER,
    }
    assert bad["reason"].str.len().min() > 5
    assert "camera 2 CCD 4" in survey["reason"][10]
    assert "128 x 64 science pixels where others have 128 x 128" in survey["reason"][11]
    assert (survey[survey["status"] == FrameStatus.GOOD]["reason"] == "").all()


def test_frames_without_a_header_have_the_time_of_their_name(faulty):
    _, survey, truth = faulty
    late = np.abs(survey["time"] - truth["time"].to_numpy()) * 86400
    assert late[[4, 5, 10]].max() < 2
    assert late.drop([4, 5, 10]).max() < 1e-3
    np.testing.assert_allclose(survey["barycorr"], truth["barycorr"], atol=2 / 86400)
    assert survey["cadence"].tolist() == truth["cadence"].to_numpy().tolist()


def test_level_is_the_background(sound):
    _, survey, truth = sound
    light = truth["light"].median(("y", "x")).to_numpy() + float(truth["scene"].median())
    np.testing.assert_allclose(survey["level"], light, rtol=0.3, atol=3)
    assert np.corrcoef(np.log(survey["level"]), np.log(light))[0, 1] > 0.99


def test_blank_frames_are_never_dark(faulty):
    _, survey, _ = faulty
    assert survey["level"][1] == 0
    assert survey["excess"][[1, 2, 3, 4, 5, 10, 11]].isna().all()
    assert not set(choose_dark(survey, 24)) & {1, 2, 3, 4, 5, 10, 11}


def test_dark_frames_are_dark_in_truth_and_of_both_orbits():
    root, truth = simulated(60, shape=(64, 64))
    survey = finish_survey([survey_frames(listed(root))])
    light = truth["light"].mean(("y", "x")).to_numpy()
    orbit = orbit_numbers(survey)
    assert np.flatnonzero(np.diff(orbit)).size == 1
    dark = choose_dark(survey, 6)
    assert len(dark) == 6
    assert (np.diff(dark) > 0).all()
    assert np.bincount(orbit[dark]).tolist() == [3, 3]
    assert light[dark].max() < 0.1 < np.median(light)
    assert sorted(choose_dark(survey, 100)) == list(range(60))
    assert len(choose_dark(survey, 1)) == 1
    first = survey[orbit == 0]
    assert len(choose_dark(first.reset_index(drop=True), 6)) == 6


def test_a_glint_in_a_corner_counts_as_light():
    model = Model(earth=0.0, moon=0.0, glint=3000.0, arcs=3)
    root, truth = simulated(24, shape=(256, 256), kind=model)
    survey = finish_survey([survey_frames(listed(root))])
    brightest = truth["light"].max(("y", "x")).to_numpy()
    dark = choose_dark(survey, 6)
    assert brightest[dark].max() <= np.median(brightest)


def test_few_dark_frames_are_found():
    root, truth = simulated(16, kind=KINDS["few_dark"])
    survey = finish_survey([survey_frames(listed(root))])
    light = truth["light"].mean(("y", "x")).to_numpy()
    assert choose_dark(survey, 6).tolist() == sorted(np.argsort(light)[:6])


def test_no_good_frame_no_dark_frame():
    root, _ = simulated(2, faults={0: "zero", 1: "nan"})
    survey = finish_survey([survey_frames(listed(root))])
    with pytest.raises(FFIReadError, match="no good frame"):
        choose_dark(survey, 3)


def test_nothing_readable_says_why():
    root, _ = simulated(2, faults={0: "garbage", 1: "empty"})
    frames = listed(root)
    with pytest.raises(FFIReadError, match=r"no FITS header.*none of 2 frames is readable"):
        finish_survey([survey_frames(frames)])


def test_quality_rejects(faulty):
    _, survey, truth = faulty
    kept = reject(survey, DROP_QUALITY)
    rejected = kept.index[kept["status"] == FrameStatus.REJECTED].tolist()
    assert rejected == np.flatnonzero((truth["quality"].to_numpy() & DROP_QUALITY) != 0).tolist()
    assert {12, 13} <= set(rejected)
    assert kept["reason"][12].startswith("DQUALITY ")
    assert (kept["quality"] == survey["quality"]).all()
    assert kept["status"][4] == FrameStatus.UNREADABLE
    assert (survey["status"] != FrameStatus.REJECTED).all()  # the argument is left alone
    assert (reject(survey, 0)["status"] == survey["status"]).all()


def test_parts_in_any_order_make_the_same(sound):
    frames, survey, _ = sound
    parts = [survey_frames(frames.iloc[a:b]) for a, b in ((17, 24), (0, 5), (5, 17))]
    pd.testing.assert_frame_equal(finish_survey(parts), survey)


def test_headers_alone_have_no_level(sound):
    frames, survey, _ = sound
    with counted() as log:
        headers = finish_survey([survey_frames(frames, bands=False)])
    assert headers[["level", "excess"]].isna().all(axis=None)
    same = [name for name in headers if name not in {"level", "excess"}]
    pd.testing.assert_frame_equal(headers[same], survey[same])
    assert len(log) == 24


def test_a_full_frame_costs_three_per_cent():
    root, _ = simulated(2, shape=(2048, 2048))
    frames = listed(root)
    with counted() as log:
        survey = finish_survey([survey_frames(frames)])
    assert (survey["status"] == FrameStatus.GOOD).all()
    assert len(log) == 2 * 4
    assert sum(nbytes for *_, nbytes in log) <= 0.03 * 2 * SCIENCE_END
    assert survey["end"].tolist() == [20160 + 2048 * 2136 * 4] * 2


def test_wcs_frames_are_near_the_median_and_have_one():
    root, _ = simulated(9, faults={4: "no_wcs", 0: "dump"})
    frames = listed(root)
    fs = fsspec.filesystem("memory")
    fs.pipe_file(frames["url"][2], edited(contents(frames["url"][2]), CRVAL1=100.0, CRVAL2=10.0))
    survey = finish_survey([survey_frames(frames, bands=False)])
    chosen = wcs_frames(survey, 9)
    assert frames["url"][4] not in chosen
    assert chosen[-1] == frames["url"][2]
    none, _ = simulated(2, faults={0: "no_wcs", 1: "no_wcs"})
    assert wcs_frames(finish_survey([survey_frames(listed(none))])) == []


def test_shortest_image_still_has_bands():
    root, _ = simulated(2, shape=(16, 16))
    survey = finish_survey([survey_frames(listed(root))])
    assert survey["level"].notna().all()


def test_transient_faults_leave_no_trace(hadro, proxy, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "BACKOFF_SECONDS", 0.001)
    bucket, folder = hadro.bucket()
    simulated(6, root=str(folder), faults={2: "missing"})
    expected = finish_survey([survey_frames(listed(str(folder)))])
    front = proxy(hadro, lambda request: Fault("status", 503) if request.number % 3 == 0 else None)
    frames = listed(bucket, storage_options=front.options(anon=True))
    assert len(frames) == 5
    gone = frames.iloc[[1]].assign(url=frames["url"][1].replace("_ffic", "_gone_ffic"))
    frames = pd.concat([frames, gone])
    survey = finish_survey([survey_frames(frames, storage_options=front.options(anon=True))])
    assert survey["status"].tolist().count(FrameStatus.MISSING) == 1
    found = survey[survey["status"] == FrameStatus.GOOD].reset_index(drop=True)
    same = ["time", "barycorr", "cadence", "quality", "level", "end"]
    pd.testing.assert_frame_equal(found[same], expected[same])
