"""The scene: zero of the light, moving stars, straps, noise law."""

from __future__ import annotations

import numpy as np
import pytest

from tessbkg import simulate
from tessbkg.ccd import STRAP_COLUMNS
from tessbkg.motion import expand, place, prepare_motion, scene_terms
from tessbkg.scene import Mask, MaskOptions, _light_maps, fit_noise, make_mask, make_scene, with_response

NOISE = (simulate.NOISE_A, simulate.NOISE_B)


def frames_of(sim, indices):
    """Pixels of frames of a simulation, without files."""
    frames = np.empty((len(indices), *sim.shape), np.float32)
    error = np.empty(sim.shape, np.float32)
    for frame, i in zip(frames, indices, strict=True):
        simulate._pixels(sim, i, simulate.light(sim, i), frame, error)
    return frames


def test_noise_law_is_found_again():
    flux = np.random.default_rng(0).uniform(50, 3000, 5000).astype(np.float32)
    a, b = fit_noise(flux, np.sqrt(NOISE[0] * flux + NOISE[1]))
    assert a == pytest.approx(NOISE[0], rel=1e-3)
    assert b == pytest.approx(NOISE[1], rel=1e-2)


def test_too_few_pixels_give_no_noise_law():
    with pytest.raises(ValueError, match="only 10 pixels"):
        fit_noise(np.ones(10, np.float32), np.ones(10, np.float32))


def test_straps_are_counted_from_0_in_science_columns():
    sim = simulate.Simulation(frames=2, shape=(64, 2048))
    truth = simulate._strap(sim)
    mask = make_mask(np.full((8, 2048), 100, np.float32), MaskOptions(straps=True, strap_dilation=0))
    np.testing.assert_array_equal((mask[0] & Mask.STRAP) > 0, truth == truth.max())
    trimmed = make_mask(
        np.full((8, 100), 100, np.float32), MaskOptions(straps=True, strap_dilation=0), first_column=70
    )
    np.testing.assert_array_equal(np.flatnonzero(trimmed[0]) + 70, STRAP_COLUMNS[STRAP_COLUMNS < 170][:6])


def test_light_in_some_dark_frames_does_not_get_into_the_scene():
    random = np.random.default_rng(1)
    dark = np.float32(100) + random.normal(0, 0.3, (6, 256, 256)).astype(np.float32)
    for k, level in enumerate((0, 0, 0, 5, 12, 20)):
        dark[k] += np.linspace(0, level, 256, dtype=np.float32)
    scene = make_scene(dark, NOISE, dark_frames=tuple("abcdef"))
    assert abs(scene.flux.mean() - 100) < 0.01
    assert scene.dark_frames == ("a", "b", "c")


def test_light_of_dark_frames_is_told_where_stars_moved():
    sim = simulate.Simulation(frames=24, shape=(512, 512), model=simulate.KINDS["drift"])
    indices = [0, 4, 6, 13, 16, 18]
    dark = frames_of(sim, indices)
    truth = np.array([simulate.light(sim, i) for i in indices])
    added = np.array([0, 1, 0.5, 0, 2, 0.2], np.float32)[:, None, None] * np.linspace(
        0.5, 1.5, 512, np.float32
    )
    dark += added
    truth = (truth + added).reshape(6, 16, 32, 16, 32).mean(axis=(2, 4))
    found = _light_maps(dark, NOISE, 32)
    inner = np.s_[:, 2:-2, 2:-2]  # maps are smoothed
    off = (found - found.mean(axis=0) - (truth - truth.mean(axis=0)))[inner]
    # 0.27 and 0.14 with the motion left in
    assert np.abs(off.mean(axis=(1, 2))).max() < 0.05
    assert off.std() < 0.03


def test_motion_of_a_frame_is_found():
    sim = simulate.Simulation(shape=(512, 512), model=simulate.KINDS["smooth"])
    flux = simulate.scene(sim)
    terms = scene_terms(flux)
    moved = np.array([0.05, 0.01, -0.02, -0.08, 0.02, 0.01])
    y, x = place(np.arange(512), 512)[:, None], place(np.arange(512), 512)
    frame = flux + expand(moved, terms, y, x)
    tracers = prepare_motion(flux, terms, NOISE)
    np.testing.assert_allclose(tracers.fit(frame, np.float32(0), NOISE), moved, atol=1e-3)


def test_a_scene_without_stars_does_not_move():
    flux = np.full((64, 64), 100, np.float32)
    tracers = prepare_motion(flux, scene_terms(flux), NOISE)
    np.testing.assert_array_equal(tracers.fit(flux, np.float32(0), NOISE), 0)


def test_one_frame_and_frames_with_nan_make_a_scene():
    sim = simulate.Simulation(frames=24, shape=(128, 128))
    dark = frames_of(sim, [0, 1, 2, 13])
    dark[:, 5, 7] = np.nan
    dark[0, :40] = np.nan
    scene = make_scene(dark.copy(), NOISE)
    assert scene.mask[5, 7] & Mask.BAD
    assert np.isfinite(scene.flux[scene.mask == 0]).all()
    assert make_scene(frames_of(sim, [0]), NOISE).flux.shape == (128, 128)


def test_masks_leave_the_scene_as_it_is():
    flux = np.random.default_rng(2).normal(100, 1, (64, 32)).astype(np.float32)
    before = flux.copy()
    make_mask(flux, MaskOptions())
    np.testing.assert_array_equal(flux, before)


@pytest.mark.slow
def test_response_of_straps_and_scene_of_full_size():
    sim = simulate.Simulation(frames=24)
    dark, bright = frames_of(sim, [0, 1, 2, 13, 14, 15]), frames_of(sim, [11])
    scene = with_response(make_scene(dark, NOISE), bright)
    straps = np.abs(scene.response - simulate._strap(sim))
    assert straps.max() < 1e-3
    assert (scene.response[STRAP_COLUMNS] > 1.01).all()
    used = (scene.mask == 0) & (np.hypot(*scene.terms[:2]) < 20)
    off = scene.flux - simulate.scene(sim)
    assert abs(np.median(off[used])) < 0.02
