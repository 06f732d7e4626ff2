"""Draw the figures of the README: `python notebooks/make_figures.py` writes `notebooks/figures/*.png`."""

import shutil
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.colors import LogNorm

import tessbkg
from tessbkg.cli import main
from tessbkg.plot import plot_focal_plane
from tessbkg.scene import SAME_LEVEL
from tessbkg.simulate import BLOCK, KINDS, simulate

FIGURES = Path(__file__).parent / "figures"


def reduction():
    """Draw the frame that `tessbkg demo` shows."""
    with tempfile.TemporaryDirectory() as folder:
        main(["demo", "--out", folder], standalone_mode=False)
        shutil.move(f"{folder}/frame.png", FIGURES / "reduction.png")


def exposure(sector, time, size=64):
    """Sky angles of all 16 CCDs at one time, from the sector's pointing alone."""
    centre = np.arange(size // 2, 2048, size) + 0.5
    for camera in range(1, 5):
        for ccd in range(1, 5):
            empty = xr.Dataset(
                coords={"time": [time], "row": ("y", centre), "column": ("x", centre + 44)},
                attrs={"sector": sector, "camera": camera, "ccd": ccd},
            )
            yield tessbkg.angles(empty).isel(time=0)


def focal_planes():
    """Draw the Earth's angle and azimuth and the Moon's angle at the end of sector 1."""
    ccds = list(exposure(1, 1352.9))
    for variable in ("earth_angle", "earth_azimuth", "moon_angle"):
        name = variable.replace("_", " ")
        figure = plot_focal_plane(ccds, variable, title=f"{name}, sector 1, TJD 1352.9")
        figure.savefig(FIGURES / f"focal_plane_{variable}.png")


def accuracy(frame=22, size=16):
    """Draw truth, result and what is between them for one bright frame of each kind of simulation."""
    ccd = {"sector": 1, "camera": 1, "ccd": 4}
    figure, rows = plt.subplots(len(KINDS), 4, figsize=(12, 2.6 * len(KINDS)), layout="constrained", dpi=70)
    for kind, axes in zip(KINDS, rows, strict=True):
        with tempfile.TemporaryDirectory() as folder:
            truth = simulate(folder, kind=kind, seed=7, ffir=False, **ccd).load()
            tessbkg.build(f"{folder}/s.zarr", root=folder, bin=size, angles=False, **ccd)
            ds = tessbkg.open_background(f"{folder}/s.zarr", **ccd).load()
        light = truth.light.coarsen(y=size // BLOCK, x=size // BLOCK).mean()
        # What the darkest frames hold never goes away.
        dark = light.values[np.isin(truth.ffi.values, ds.attrs["dark_frames"].split())]
        level = dark.mean(axis=(1, 2))
        true = light.values[frame] - dark[level < level.min() + SAME_LEVEL].mean(axis=0)
        result, error = (ds[name].values[frame] for name in ("scattered_light", "scattered_light_err"))
        off = result - true
        shown = {"cmap": "viridis", "norm": LogNorm(np.percentile(true, 0.1), np.percentile(true, 99.9))}
        rms = f"rms {np.sqrt(np.nanmean(off**2)):.3f}, z {np.nanstd(off / error):.2f}"
        images = (
            (f"{kind}: truth", true, shown),
            ("result", result, shown),
            (rms, off, {"vmin": -0.3, "vmax": 0.3, "cmap": "RdBu_r"}),
            ("", off / error, {"vmin": -4, "vmax": 4, "cmap": "RdBu_r"}),
        )
        drawn = []
        for ax, (title, image, style) in zip(axes, images, strict=True):
            drawn.append(ax.imshow(image, origin="lower", interpolation="nearest", **style))
            ax.set(title=title, xticks=[], yticks=[])
        ticks = [t for t in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if true.min() < t < true.max()]
        unit = "e$^-$ s$^{-1}$"
        bar = figure.colorbar(drawn[1], ax=axes[:2], label=f"light, {unit}")
        bar.set_ticks(ticks, labels=[str(t) for t in ticks])
        bar.minorticks_off()
        figure.colorbar(drawn[2], ax=axes[2], label=f"result - truth, {unit}")
        figure.colorbar(drawn[3], ax=axes[3], label="the same over its error")
    figure.savefig(FIGURES / "accuracy.png")


if __name__ == "__main__":
    FIGURES.mkdir(exist_ok=True)
    reduction()
    focal_planes()
    accuracy()
