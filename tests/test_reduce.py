"""The kernels against slow obvious NumPy; whole bins; error bars; accuracy against simulated truth."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_scene import NOISE, frames_of

from tessbkg import compiled, simulate
from tessbkg.reduce import STATISTICS, median_variance, plan_reduction, reduce_frame
from tessbkg.scene import make_scene, with_response


def random_case(seed, shape, masked=0.15):
    random = np.random.default_rng(seed)
    flux = random.normal(10, 1, shape).astype(np.float32)
    return flux, random.random(shape) < masked


def slow(flux, mask, size, statistic):
    ny, nx = (n // size for n in flux.shape)
    image = np.where(mask, np.nan, flux)
    if statistic == "rolling":
        while image.shape[0] > ny:
            padded = np.pad(image, 1, constant_values=np.nan)
            windows = np.lib.stride_tricks.sliding_window_view(padded, (4, 4))[::2, ::2]
            image = np.nanmedian(windows, axis=(2, 3))
        return image
    out = np.empty((ny, nx))
    for j, i in np.ndindex(ny, nx):
        pixels = image[j * size : (j + 1) * size, i * size : (i + 1) * size].ravel().astype(float)
        pixels = np.sort(pixels[np.isfinite(pixels)])
        if statistic == "median":
            out[j, i] = np.median(pixels)
        elif statistic == "mean":
            out[j, i] = pixels.mean()
        else:
            last = len(pixels) - 1
            sigma = (pixels[3 * last // 4] - pixels[last // 4]) / 1.349
            out[j, i] = pixels[np.abs(pixels - np.median(pixels)) <= 3 * sigma].mean()
    return out


@pytest.mark.parametrize("size", [4, 8, 16])
@pytest.mark.parametrize("statistic", ["median", "mean", "clipped", "rolling"])
def test_kernels_equal_slow_numpy(statistic, size):
    flux, mask = random_case(3, (64, 32))
    scene = np.full_like(flux, 3)
    plan = plan_reduction(scene, mask, bin=size, statistic=statistic)
    value, error = reduce_frame(flux, plan)
    np.testing.assert_allclose(value, slow(flux - 3, mask, size, statistic), rtol=2e-6, atol=2e-6)
    assert value.dtype == error.dtype == np.float32
    assert np.isnan(error).all()  # no noise law


def test_compiled_loops_equal_numpy():
    random = np.random.default_rng(4)
    flux, scene = random.normal(0, 1, (2, 32, 40)).astype(np.float32)
    gain = random.normal(1, 0.1, 40).astype(np.float32)
    out = np.empty((32, 39), dtype=np.float32)
    assert not compiled.subtract_pixels(flux, scene, gain, out)
    np.testing.assert_array_equal(out, ((flux - scene) * gain)[:, :39])
    scene[3, 5], flux[31, 38] = -np.inf, np.nan
    assert compiled.subtract_pixels(flux, scene, gain, out)
    np.testing.assert_array_equal(out, ((flux - scene) * gain)[:, :39])

    image = random.normal(0, 1, (18, 34)).astype(np.float32)
    side = random.integers(-1, 2, (8, 16)).astype(np.int8)
    middle = np.empty((8, 16), dtype=np.float32)
    compiled.middle_of_windows(image, side, middle)
    windows = np.lib.stride_tricks.sliding_window_view(image, (4, 4))[::2, ::2].reshape(8, 16, 16)
    low, high = np.sort(windows, axis=2)[:, :, 7:9].transpose(2, 0, 1)
    expected = np.select([side < 0, side > 0], [low, high], np.float32(0.5) * (low + high))
    np.testing.assert_array_equal(middle, expected)

    image = image[:16, :32]
    image[4:9, 3:10] = np.nan  # all of one block, some of others
    mean = np.empty((4, 8), dtype=np.float32)
    compiled.mean_of_blocks(image, mean)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a mean of nothing
        expected = np.nanmean(image.reshape(4, 4, 8, 4), axis=(1, 3), dtype=np.float64).astype(np.float32)
    assert np.isnan(expected).sum() == 1
    np.testing.assert_array_equal(mean, expected)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_frames_as_astropy_reads_them(statistic):
    """FITS is big-endian, and slices of it are not contiguous."""
    flux, mask = random_case(5, (64, 96))
    plan = plan_reduction(
        np.zeros((64, 64), np.float32), mask[:, :64], bin=8, statistic=statistic, noise=NOISE
    )
    native = reduce_frame(np.ascontiguousarray(flux[:, :64]), plan)
    np.testing.assert_array_equal(reduce_frame(flux.astype(">f4")[:, :64], plan), native)


def test_errors_are_positive_and_finite_where_much_is_masked():
    """Bins without pixels of their own, some between good ones, some far from any."""
    flux, mask = random_case(1, (128, 128), 0.2)
    mask[:, 24:] = True
    mask[40:56, :] = True
    mask[44, ::8] = False
    for statistic in STATISTICS:
        plan = plan_reduction(
            np.zeros_like(flux),
            mask,
            bin=8,
            statistic=statistic,
            noise=NOISE,
            scene_err=np.linspace(0.2, 0.01, 128, dtype=np.float32) * np.ones_like(flux),
        )
        for flux_err in (None, np.full_like(flux, 0.15)):
            value, error = reduce_frame(flux, plan, flux_err)
            assert np.isfinite(value).all(), statistic
            assert np.isfinite(error).all(), statistic
            assert (error > 0).all(), statistic
            assert (plan.scene_error > 0).all(), statistic


def test_no_pixel_left_is_no_warning():
    flux, mask = np.ones((32, 32), dtype=np.float32), np.ones((32, 32), dtype=bool)
    for statistic in STATISTICS:
        value, error = reduce_frame(flux, plan_reduction(flux, mask, bin=8, statistic=statistic, noise=NOISE))
        assert np.isnan(value).all()
        assert np.isnan(error).all()


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), share=st.floats(0, 0.97), size=st.sampled_from([2, 4, 8]))
def test_rolling_equals_nanmedian_whatever_is_missing(seed, share, size):
    flux, mask = random_case(seed, (32, 16), share)
    plan = plan_reduction(np.zeros_like(flux), np.zeros_like(mask), bin=size, statistic="rolling")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = slow(flux, mask, size, "rolling")
    np.testing.assert_allclose(reduce_frame(np.where(mask, np.nan, flux), plan)[0], expected, rtol=1e-6)


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 1000),
    size=st.sampled_from([1, 3, 4, 8, 16, 32]),
    statistic=st.sampled_from(STATISTICS),
)
def test_masked_pixels_do_not_count(seed, size, statistic):
    if statistic == "rolling" and size == 3:
        size = 4
    flux, mask = random_case(seed, (64, 48), 0.3)
    plan = plan_reduction(np.zeros_like(flux), mask, bin=size, statistic=statistic, noise=NOISE)
    wild = np.where(mask, np.float32(np.nan), flux)
    first, second = reduce_frame(flux, plan), reduce_frame(wild, plan)
    np.testing.assert_array_equal(first, second)
    assert plan.n_pixels.sum() == (~mask[: 64 // size * size, : 48 // size * size]).sum()
    assert np.isfinite(first[0]).all()


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 1000),
    size=st.sampled_from([2, 4, 8, 16, 32]),
    slope=st.tuples(st.floats(-1, 1), st.floats(-1, 1)),
)
def test_whole_bins_show_planes_exactly(seed, size, slope):
    _, mask = random_case(seed, (64, 64), 0.02)
    mask[10:17, 20:31] = True  # a star
    mask[[0, -1]] = mask[:, [0, -1]] = False  # every gap is closed
    row, column = np.mgrid[:64, :64]
    plane = (5 + slope[0] * row + slope[1] * column).astype(np.float32)
    plan = plan_reduction(np.zeros_like(plane), mask, bin=size, noise=(1e-3, 1.0))
    value, _ = reduce_frame(plane, plan)
    expected = plane.reshape(64 // size, size, 64 // size, size).mean(axis=(1, 3))
    np.testing.assert_allclose(value, expected, atol=1e-3)


def test_whole_bins_follow_an_edge():
    edge = np.zeros((64, 64), np.float32)
    edge[:, 27:] = 100
    _, mask = random_case(0, edge.shape, 0.03)
    whole, median = (
        reduce_frame(edge, plan_reduction(np.zeros_like(edge), mask, bin=16, statistic=s, noise=NOISE))[0][
            :, 1
        ]
        for s in ("whole", "median")
    )
    assert np.abs(whole - 100 * 5 / 16).max() < 1
    assert np.abs(median - 100 * 5 / 16).min() > 30


def test_stars_tell_where_an_edge_is_but_not_when_they_moved():
    random = np.random.default_rng(0)
    star, edge = np.zeros((2, 256, 256), np.float32)
    mask = random.random(star.shape) < 0.02
    for row, column in random.integers(8, 248, (60, 2)):
        star[row - 2 : row + 3, column - 2 : column + 3] += 100
    mask |= star > 0
    edge[:, 107:] = 200
    flux = 50 + star + edge + random.normal(0, 0.2, star.shape).astype(np.float32)
    truth = edge.reshape(16, 16, 16, 16).mean(axis=(1, 3))

    def off(frame, spare):
        plan = plan_reduction(50 + star, mask, bin=16, noise=(0.0, 0.04), spare=spare)
        value, error = reduce_frame(frame, plan)
        return value - truth, error

    (with_stars, small), (without, large) = off(flux, star > 0), off(flux, None)
    assert np.abs(with_stars).max() < 0.5 * np.abs(without).max()
    assert small[:, 6].mean() < large[:, 6].mean()
    # Stars twice as bright, which the plan does not know of: what they show is not believed.
    bright, usual = off(flux + star, star > 0)[0], off(flux + star, None)[0]
    quiet = np.r_[:5, 9:16]
    assert np.abs(bright - usual)[:, quiet].max() < 0.1


def test_cosmic_rays_do_not_count_in_whole_bins_but_edges_do():
    flux, mask = random_case(5, (128, 128), 0.02)
    plan = plan_reduction(np.zeros_like(flux), mask, bin=16, noise=(0.0, 1.0))
    clean = reduce_frame(flux, plan)[0]
    hit = flux.copy()
    for place in ((20, 20), (70, 99), (100, 3)):
        mask_here = mask[place]
        hit[place] += 0 if mask_here else 300
    assert np.abs(reduce_frame(hit, plan)[0] - clean).max() < 0.02
    hit[:, 64:] += 50
    lit = reduce_frame(hit, plan)[0]
    assert np.abs(lit[:, 4:] - clean[:, 4:] - 50).max() < 0.1


@pytest.mark.parametrize("statistic", STATISTICS)
def test_lost_pixels_of_one_frame(statistic):
    flux, mask = random_case(6, (64, 64), 0.1)
    plan = plan_reduction(np.zeros_like(flux), mask, bin=16, statistic=statistic, noise=(0.0, 1.0))
    lost = flux.copy()
    lost[:, :8] = np.nan
    lost[32:48, 32:48] = np.nan
    value, error = reduce_frame(lost, plan)
    assert np.isnan(value[2, 2]) or statistic == "rolling"
    assert (np.isnan(value) == np.isnan(error)).all()
    if statistic != "sparse":
        assert np.abs(value[:, 0] - 10).max() < 1
    nothing = reduce_frame(np.full_like(flux, np.nan), plan)
    assert np.isnan(nothing).all()


def test_saturated_bins_have_no_value():
    flux, mask = random_case(6, (64, 64), 0.1)
    mask[20, 20] = False
    flux[20, 20] = 1e5
    value, _ = reduce_frame(flux, plan_reduction(np.zeros_like(flux), mask, bin=16, noise=NOISE))
    assert np.isnan(value[1, 1])
    assert np.isfinite(np.delete(value.ravel(), 5)).all()


@pytest.mark.parametrize("statistic", STATISTICS)
def test_bins_full_of_saturated_pixels_have_no_value(statistic):
    flux, mask = random_case(6, (64, 64), 0.1)
    flux[:40, :40] = 1e5
    plan = plan_reduction(np.zeros_like(flux), mask, bin=16, statistic=statistic, noise=NOISE)
    value, error = reduce_frame(flux, plan)
    assert np.isnan(value[:2, :2]).all()
    assert np.isnan(error[:2, :2]).all()
    assert np.isfinite(value[3]).all()


@pytest.mark.parametrize("statistic", STATISTICS)
def test_empty_bins_have_the_value_of_flat_light(statistic):
    flat = np.full((128, 128), 20, np.float32)
    mask = np.zeros(flat.shape, bool)
    mask[32:64, 48:80] = True
    plan = plan_reduction(np.zeros_like(flat), mask, bin=8, statistic=statistic, noise=NOISE)
    value, error = reduce_frame(flat, plan)
    np.testing.assert_allclose(value, 20, atol=1e-3)
    assert (error > 0).all()


@pytest.mark.parametrize("statistic", ["whole", "median"])
def test_empty_bins_are_filled_smoothly(statistic):
    row, column = np.mgrid[:128, :128]
    smooth = (20 + 3 * np.sin(row / 40) + 0.05 * column).astype(np.float32)
    mask = np.zeros(smooth.shape, bool)
    mask[32:64, 48:80] = True
    plan = plan_reduction(np.zeros_like(smooth), mask, bin=16, statistic=statistic, noise=NOISE)
    value, error = reduce_frame(smooth, plan)
    expected = smooth.reshape(8, 16, 8, 16).mean(axis=(1, 3))
    assert np.abs(value - expected).max() < 0.15
    assert (plan.n_pixels[2:4, 3:5] == 0).all()
    assert np.isfinite(error).all()
    np.testing.assert_array_equal(value, reduce_frame(smooth, plan)[0])


@pytest.mark.parametrize("statistic", STATISTICS)
def test_errors_beside_an_empty_bin_know_of_structure(statistic):
    light = np.tile(300 * np.exp(-(((np.arange(128) - 60) / 8) ** 2)), (128, 1)).astype(np.float32)
    mask = np.zeros(light.shape, bool)
    plans = []
    for empty in (False, True):
        mask[56:64, 48:56] = empty
        plans.append(plan_reduction(np.zeros_like(light), mask, bin=8, statistic=statistic, noise=NOISE))
    apart, beside = (reduce_frame(light, plan)[1][7] for plan in plans)
    assert apart[7] > 5 * apart[1]  # on the ridge, and away from it
    assert beside[7] > 0.7 * apart[7]
    assert beside[5] > 0.7 * apart[5]


@pytest.mark.parametrize("statistic", STATISTICS)
def test_errors_beside_a_saturated_bin_are_large_but_not_beside_a_lost_one(statistic):
    flux, mask = random_case(6, (128, 128), 0.0)
    plan = plan_reduction(np.zeros_like(flux), mask, bin=16, statistic=statistic, noise=NOISE)
    plain = reduce_frame(flux, plan)[1]
    bright, lost = flux.copy(), flux.copy()
    bright[32:64, 32:64], lost[32:64, 32:64] = 1e5, np.nan
    value, error = reduce_frame(bright, plan)
    assert np.isnan(value).any()
    assert error[2, 1] > 50
    np.testing.assert_allclose(error[7], plain[7], rtol=0.2)
    assert reduce_frame(lost, plan)[1][2, 1] < 3 * plain[2, 1]


@pytest.mark.parametrize("statistic", ["median", "clipped", "rolling"])
def test_light_that_is_outvoted_is_told_in_the_error_but_not_an_outlier(statistic):
    """A ridge that a minority of the pixels of many bins see, and a spot that two bins share."""
    flux, mask = random_case(7, (256, 256), 0.0)
    plan = plan_reduction(np.zeros_like(flux), mask, bin=32, statistic=statistic, noise=NOISE)
    plain = reduce_frame(flux, plan)[1]
    ridge, spot = flux.copy(), flux.copy()
    ridge[140:148] += 40
    spot[140:146, 157:163] += 4000  # on the border of two bins
    (value, error), (before, _) = reduce_frame(ridge, plan), reduce_frame(flux, plan)
    off = value[4] - before[4] - 40 * 8 / 32
    assert np.abs(off).min() > 4
    assert (np.abs(off) < 2.5 * error[4]).all()
    np.testing.assert_allclose(error[7], plain[7], rtol=0.2)
    assert reduce_frame(spot, plan)[1].max() < 0.1  # the means of its bins are off by 70


def test_variance_of_the_median_by_monte_carlo():
    random = np.random.default_rng(0)
    for n in (1, 2, 3, 4, 5, 8, 15, 64, 257):
        spread = np.median(random.standard_normal((200_000 // n + 20_000, n)), axis=1).var()
        assert median_variance(n) == pytest.approx(spread, rel=0.05)


@pytest.mark.parametrize("size", [4, 8, 16, 32, 64])
@pytest.mark.parametrize("statistic", STATISTICS)
def test_error_bars_of_pure_noise(statistic, size):
    if statistic == "rolling" and size == 64:
        pytest.skip("64 bins are too few to tell")
    random = np.random.default_rng(size)
    shape = (512, 512)
    flat = np.full(shape, 100, np.float32)
    _, mask = random_case(1, shape, 0.1)
    plan = plan_reduction(flat, mask, bin=size, statistic=statistic, noise=(1e-3, 0.02))
    z = []
    for light in (0, 300):
        for _ in range(4):
            level = 100 + light
            flux = random.normal(level, np.sqrt(1e-3 * level + 0.02), shape).astype(np.float32)
            value, error = reduce_frame(flux, plan)
            z.append(((value - light) / error).ravel())
            by_image = reduce_frame(flux, plan, np.full(shape, np.sqrt(1e-3 * level + 0.02), np.float32))[1]
            assert np.median(by_image / error) == pytest.approx(1, abs=0.03)
    z = np.concatenate(z)
    assert z.std() == pytest.approx(1, abs=0.05 + 1.5 / np.sqrt(len(z)))


@pytest.mark.parametrize("statistic", ["mean", "median", "clipped", "rolling"])
def test_moved_stars_are_taken_off_and_told_in_the_error(statistic):
    sim = simulate.Simulation(shape=(512, 512), frames=24, seed=3, model=simulate.KINDS["crowded"])
    scene = make_scene(frames_of(sim, [0, 1, 2, 3, 13, 14, 15, 16]), NOISE)
    plan = plan_reduction(
        scene.flux, scene.mask != 0, bin=8, statistic=statistic, scene_err=scene.error, noise=NOISE,
        terms=scene.terms,
    )  # fmt: skip
    still = replace(plan, motion=replace(plan.motion, pixel=plan.motion.pixel[:0]))
    [frame] = frames_of(sim, [19])
    truth = simulate.light(sim, 19).reshape(64, 8, 64, 8).mean(axis=(1, 3))
    used = plan.n_pixels > 0
    (value, error), (raw, naive) = reduce_frame(frame, plan), reduce_frame(frame, still)
    off, before = (value - truth)[used], (raw - truth)[used]
    assert off.std() < 0.6 * before.std()
    assert (off / error[used]).std() == pytest.approx(1, abs=0.2)
    assert (before / naive[used]).std() > (1.3 if statistic in {"median", "clipped"} else 1.5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "bars", "spread", "spread_of_whole"),
    [
        # rms of `whole` in quiet frames at bins of 16 and 8 pixels, electron s-1 (noise alone: 0.025, 0.048);
        # how far the spread of z of all frames is from 1 at bins of 4, 8, 16, 32, 64 pixels for any
        # statistic, None where that takes too long for every run; and the same for `whole` at all of these
        ("orbit", (0.042, 0.070), (0.09, 0.08, 0.07, 0.06, 0.09), 0.03),
        ("smooth", (0.042, 0.070), (None, 0.09, 0.07, 0.13, None), 0.03),
        ("glint", (0.042, 0.070), (None, 0.05, 0.05, 0.05, None), 0.03),
        ("moon", (0.042, 0.070), (None, 0.11, 0.17, 0.12, None), 0.06),
        ("few_dark", (0.070, 0.100), (None, 0.06, 0.17, 0.17, None), 0.06),
        ("drift", (0.110, 0.170), (None, 0.17, 0.18, 0.14, None), 0.10),
        ("crowded", (0.110, 0.170), (None, 0.10, 0.09, 0.08, None), 0.09),
    ],
)
def test_accuracy_on_simulated_frames(kind, bars, spread, spread_of_whole):
    """On a seed that no constant was tuned on."""
    sim = simulate.Simulation(frames=24, seed=7, model=simulate.KINDS[kind])
    dark = [0, 1, 2, 3, 4, 13, 14, 15, 16, 18]
    quiet, bright = [5, 17, 19], [9, 10, 21, 22]
    if kind == "moon":  # which lights up the first orbit
        dark, quiet = [0, 13, 14, 15, 16, 17, 18, 20], [19]
    if kind == "few_dark":
        dark, quiet = [1, 13, 2], [7, 16, 17]
    scene = with_response(make_scene(frames_of(sim, dark), NOISE), frames_of(sim, [11]))
    frames, truths = frames_of(sim, quiet + bright), [simulate.light(sim, i) for i in quiet + bright]
    levels = {i: float(simulate.light(sim, i).mean()) for i in dark}
    # What the darkest frames hold never goes away.
    zero = np.mean(
        [simulate.light(sim, i) for i, level in levels.items() if level < min(levels.values()) + 0.01], axis=0
    )
    bar_of = dict(zip((16, 8), bars, strict=True))
    for size, allowed in zip((4, 8, 16, 32, 64), spread, strict=True):
        if allowed is None:
            continue
        rms = {}
        for name in ("whole", "mean", "median", "clipped", "rolling"):
            plan = plan_reduction(
                scene.flux, scene.mask != 0, bin=size, statistic=name, scene_err=scene.error, noise=NOISE,
                terms=scene.terms, response=scene.response, spare=scene.spare,
            )  # fmt: skip
            results = [reduce_frame(frame, plan) for frame in frames]
            value, error = (np.stack(images) for images in zip(*results, strict=True))
            n = 2048 // size
            light = np.stack([(t - zero).reshape(n, size, n, size).mean(axis=(1, 3)) for t in truths])
            judged = (plan.n_pixels > 0) & np.isfinite(value)
            off = np.where(judged, value - light, 0)
            rms[name] = np.sqrt(np.mean(off**2, axis=(1, 2)))
            z = off[judged] / error[judged]
            within = spread_of_whole if name == "whole" else allowed
            assert np.sqrt(np.mean(z**2)) == pytest.approx(1, abs=within), (name, size)
            if kind in {"orbit", "smooth", "glint"} and size in bar_of:
                most = 0.004 if name == "whole" else 0.005
                assert np.abs(off[: len(quiet)].mean(axis=(1, 2))).max() < most, (name, size)
        if size not in bar_of:
            continue
        assert rms["whole"][: len(quiet)].max() < bar_of[size]
        # `rolling` averages over neighbours, which helps where the light is smooth,
        # and `mean` has nothing from near bright stars, which tells when they move far
        for name in ("median", "clipped") if kind == "drift" else ("mean", "median", "clipped"):
            first = len(quiet) if kind == "drift" else 0
            assert (rms["whole"] < rms[name])[first:].all(), (name, size)
