"""How far from the known truth: our statistics and tess-backml on the same simulated full-size frames.

Frames that the scene is made of are not judged. What the darkest frames hold is in the scene of everybody, so
the mean light of the frames that are each one's zero is taken from the truth.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from data import DARK_FRAMES, binned_truth, sky, survey_and_scene
from timing import table

KINDS = ("smooth", "orbit", "glint", "moon", "few_dark", "drift", "crowded")
PRIOR_KINDS = ("smooth", "orbit")
BINS = (16, 8)
MORE_BINS = (4, 32, 64)  # error bars only
PRIOR_DARK = 10  # tess-backml takes ten, of the darkest 3 %
QUIET = 3.0  # electron s-1


def score(value, error, truth, usable):
    """Rms and worst of value - truth over frames and bins, and the spread of (value - truth) / error."""
    off = (value - truth)[:, usable]
    with np.errstate(invalid="ignore", divide="ignore"):
        z = off / error[:, usable]
    z = z[np.isfinite(z)]
    each = np.sqrt(np.nanmean(off**2, axis=1))
    quiet = truth.mean(axis=(1, 2)) < QUIET
    return {
        "rms quiet": float(np.sqrt(np.nanmean(off[quiet] ** 2))) if quiet.any() else float("nan"),
        "rms middle": float(np.median(each)),
        "rms": float(np.sqrt(np.nanmean(off**2))),
        "worst": float(np.nanmax(np.abs(off))),
        "z rms": float(np.sqrt(np.mean(z**2))) if z.size else float("nan"),
        "z": float(1.4826 * np.median(np.abs(z - np.median(z)))) if z.size else float("nan"),
    }


def prior_cube(python, cache: Path, paths, dark, *, size, rolling):
    """Run tess-backml on frames; return values, errors and seconds a frame."""
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        names, out = Path(folder) / "paths.txt", Path(folder) / "out.npz"
        names.write_text("\n".join(paths))
        command = [python, str(Path(__file__).with_name("prior.py")), str(names), str(out)]
        command += ["--bin", str(size), "--rolling", str(int(rolling)), "--dark", ",".join(map(str, dark))]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            print(f"  tess-backml failed: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
            return None
        with np.load(out) as found:
            return found["value"], found["error"], found["seconds"]


def run(cache: Path, *, repeats: int, quick: bool, prior: str | None):
    from tessbkg.dataset import Options, plan_of
    from tessbkg.ffi import FrameStatus, read_ffi
    from tessbkg.reduce import STATISTICS, reduce_frame
    from tessbkg.scene import SAME_LEVEL

    figures, rows = {}, []
    for kind in ("orbit",) if quick else KINDS:
        root, truth = sky(cache, kind, 24)
        _, survey, scene = survey_and_scene(root, Options(dark_frames=DARK_FRAMES))
        good = np.flatnonzero(survey["status"] == FrameStatus.GOOD)
        urls = survey["url"].to_numpy()
        names = survey["ffi"].to_numpy()
        place = {str(name): i for i, name in enumerate(truth["ffi"].to_numpy())}
        order = good[np.argsort(survey["excess"].to_numpy()[good])]
        prior_dark = order[:PRIOR_DARK]
        judged = [i for i in good if names[i] not in scene.dark_frames and i not in prior_dark]
        for size in BINS if quick else (*BINS, *MORE_BINS):

            def truth_of(chosen, size=size, truth=truth, place=place):
                return np.stack([binned_truth(truth, place[name], size) for name in chosen])

            light, dark = truth_of(names[judged]), truth_of(scene.dark_frames)
            level = dark.mean(axis=(1, 2))
            ours = light - dark[level < level.min() + SAME_LEVEL].mean(axis=0)
            plans = {s: plan_of(scene, Options(bin=size, statistic=s)) for s in STATISTICS}
            results = {s: [] for s in STATISTICS}
            for i in judged:
                flux = read_ffi(str(urls[i])).flux
                for statistic, plan in plans.items():
                    results[statistic].append(reduce_frame(flux, plan))
            inside = plans["whole"].n_pixels > 0
            found = {
                f"tessbkg {s}": score(*(np.stack(a) for a in zip(*pairs, strict=True)), ours, inside)
                for s, pairs in results.items()
            }
            for rolling in (True, False) if prior and kind in PRIOR_KINDS and size in BINS else ():
                paths = [str(urls[i]).removeprefix("file://") for i in [*prior_dark, *judged]]
                cube = prior_cube(prior, cache, paths, range(PRIOR_DARK), size=size, rolling=rolling)
                if cube is None:
                    continue
                value, error, seconds = (part[PRIOR_DARK:] for part in cube)
                name = f"tess-backml {'rolling (its default)' if rolling else 'fixed windows'}"
                zero = truth_of(names[prior_dark]).mean(axis=0)
                found[name] = score(value, error, light - zero, inside)
                found[name]["seconds a frame"] = float(np.median(seconds))
            figures[f"{kind} bin {size}"] = {**found, "frames": len(judged)}
            rows += [
                (
                    f"{kind}, bin {size}: {name}",
                    *(f"{one[k]:.3f}" for k in ("rms quiet", "rms middle", "rms")),
                    f"{one['worst']:.1f}",
                    f"{one['z rms']:.2f}",
                    f"{one['z']:.2f}",
                )
                for name, one in found.items()
            ]
            short = {name: round(one["rms middle"], 3) for name, one in found.items()}
            print(f"  {kind} bin {size}: {json.dumps(short)}", flush=True)
    head = ("", "rms, quiet frames", "rms, middle frame", "rms, all", "worst bin", "z (rms)", "z (robust)")
    note = (
        "Difference from the truth in electron s-1 over all bins that have pixels, of frames that are not "
        f"among the dark ones; quiet: under {QUIET:.0f} electron s-1 of light; z is (value - truth) / error: "
        "1 for honest error bars."
    )
    rows = [row for row in rows if int(row[0].split("bin ")[1].split(":")[0]) in BINS]
    return figures, [table("Accuracy on simulated full-size frames", head, rows, note), error_bars(figures)]


def error_bars(figures):
    """Make a table of z of each statistic by kind and bin."""
    sizes = sorted({int(name.split()[-1]) for name in figures})
    kinds = dict.fromkeys(name.split()[0] for name in figures)
    statistics = [name for name in next(iter(figures.values())) if name.startswith("tessbkg")]
    rows = [
        (
            f"{name.removeprefix('tessbkg ')}, {kind}",
            *(f"{figures[f'{kind} bin {size}'][name]['z rms']:.2f}" for size in sizes),
        )
        for name in statistics
        for kind in kinds
    ]
    return table("z, the rms of (value - truth) / error", ("", *(f"bin {n}" for n in sizes)), rows)
