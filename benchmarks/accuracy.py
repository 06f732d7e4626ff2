"""How far from the known truth: our statistics and tess-backml on the same simulated full-size frames.

Frames that the scene is made of are not judged. What the darkest frames still hold is in the scene of
everybody, so the mean light of the dark frames is taken from the truth.
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

KINDS = ("smooth", "orbit", "glint")
BINS = (16, 8)
PRIOR_DARK = 10  # tess-backml takes ten, of the darkest 3 %


def score(value, error, truth, usable):
    """Rms and worst of value - truth over frames and bins, and the spread of (value - truth) / error."""
    off = (value - truth)[:, usable]
    with np.errstate(invalid="ignore", divide="ignore"):
        z = off / error[:, usable]
    z = z[np.isfinite(z)]
    each = np.sqrt(np.nanmean(off**2, axis=1))
    return {
        "rms": float(np.sqrt(np.nanmean(off**2))),
        "rms of the middle frame": float(np.median(each)),
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

    frames = 24 if quick else 48
    kinds = KINDS[1:2] if quick else KINDS
    figures, rows = {}, []
    for kind in kinds:
        root, truth = sky(cache, kind, frames)
        _, survey, scene = survey_and_scene(root, Options(dark_frames=8 if quick else DARK_FRAMES))
        good = np.flatnonzero(survey["status"] == FrameStatus.GOOD)
        urls = survey["url"].to_numpy()
        place = {str(name): i for i, name in enumerate(truth["ffi"].to_numpy())}
        names = survey["ffi"].to_numpy()
        order = good[np.argsort(survey["excess"].to_numpy()[good])]
        judged = [i for i in good if names[i] not in scene.dark_frames and i not in order[:PRIOR_DARK]]
        judged = judged[:: 4 if quick else 1]
        for size in BINS:
            light = np.stack([binned_truth(truth, place[names[i]], size) for i in judged])
            base = np.mean([binned_truth(truth, place[name], size) for name in scene.dark_frames], axis=0)
            plans = {s: plan_of(scene, Options(bin=size, statistic=s)) for s in STATISTICS}
            results = {s: [] for s in STATISTICS}
            for i in judged:
                flux = read_ffi(str(urls[i])).flux
                for statistic, plan in plans.items():
                    results[statistic].append(reduce_frame(flux, plan))
            inside = plans[STATISTICS[0]].n_pixels > 0
            found = {
                f"tessbkg {s}": score(*(np.stack(a) for a in zip(*pairs, strict=True)), light, inside)
                for s, pairs in results.items()
            }
            if prior:
                dark = order[:PRIOR_DARK]
                chosen = [*dark, *judged]
                paths = [str(urls[i]).removeprefix("file://") for i in chosen]
                for rolling in (True, False):
                    cube = prior_cube(prior, cache, paths, range(len(dark)), size=size, rolling=rolling)
                    if cube is None:
                        continue
                    value, error, seconds = cube
                    kept = slice(len(dark), None)
                    name = f"tess-backml {'rolling (its default)' if rolling else 'fixed windows'}"
                    # Its static frame has the light that its own dark frames share.
                    found[name] = score(value[kept], error[kept], light, inside)
                    found[name]["seconds a frame"] = float(np.median(seconds[kept]))
            figures[f"{kind} bin {size}"] = {
                **found,
                "frames": len(judged),
                "light of dark frames": float(base.mean()),
            }
            rows += [
                (
                    f"{kind}, bin {size}: {name}",
                    f"{one['rms']:.3f}",
                    f"{one['rms of the middle frame']:.3f}",
                    f"{one['worst']:.2f}",
                    f"{one['z']:.2f}",
                    f"{one['z rms']:.2f}",
                )
                for name, one in found.items()
            ]
            print(
                f"  {kind} bin {size}: "
                + json.dumps({k: round(v["rms of the middle frame"], 3) for k, v in found.items()}),
                flush=True,
            )
    head = ("", "rms", "rms, middle frame", "worst bin", "z (robust)", "z (rms)")
    note = (
        "Difference from the truth in electron s-1 over all bins that have pixels, of frames that are not "
        "among the dark ones; z is (value - truth) / error: 1 for honest error bars."
    )
    return figures, [table("Accuracy on simulated full-size frames", head, rows, note)]
