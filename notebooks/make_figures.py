"""Draw the figures of the README: `python notebooks/make_figures.py` writes `notebooks/figures/*.png`."""

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.colors import AsinhNorm

import tessbkg
from tessbkg.demo import residual
from tessbkg.plot import plot_focal_plane
from tessbkg.simulate import BLOCK, KINDS, simulate

FIGURES = Path(__file__).parent / "figures"


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
    figure, rows = plt.subplots(len(KINDS), 4, figsize=(11, 2.5 * len(KINDS)), layout="constrained", dpi=80)
    for kind, axes in zip(KINDS, rows, strict=True):
        with tempfile.TemporaryDirectory() as folder:
            truth = simulate(folder, kind=kind, seed=7, ffir=False, **ccd).load()
            tessbkg.build(f"{folder}/s.zarr", root=folder, bin=size, **ccd)
            ds = tessbkg.open_background(f"{folder}/s.zarr", **ccd).load()
        good = np.flatnonzero(ds.frame_status.values == 0)
        off = residual(ds, truth).values[list(good).index(frame)]
        true = truth.light[frame].coarsen(y=size // BLOCK, x=size // BLOCK).mean().values
        error = ds.scattered_light_err[frame].values
        light = AsinhNorm(linear_width=5, vmin=true.min(), vmax=np.nanpercentile(true, 99.9))
        rms = np.sqrt(np.nanmean(off**2))
        images = (
            (f"{kind}: truth", true, {"norm": light, "cmap": "viridis"}, "e$^-$ s$^{-1}$"),
            (
                "result",
                ds.scattered_light[frame].values,
                {"norm": light, "cmap": "viridis"},
                "e$^-$ s$^{-1}$",
            ),
            (
                f"result - truth, rms {rms:.3f}",
                off,
                {"vmin": -0.3, "vmax": 0.3, "cmap": "RdBu_r"},
                "e$^-$ s$^{-1}$",
            ),
            ("(result - truth) / error", off / error, {"vmin": -4, "vmax": 4, "cmap": "RdBu_r"}, ""),
        )
        for ax, (title, image, style, unit) in zip(axes, images, strict=True):
            drawn = ax.imshow(image, origin="lower", interpolation="nearest", **style)
            ax.set(title=title, xticks=[], yticks=[])
            figure.colorbar(drawn, ax=ax, label=unit)
    figure.savefig(FIGURES / "accuracy.png")


if __name__ == "__main__":
    FIGURES.mkdir(exist_ok=True)
    focal_planes()
    accuracy()
