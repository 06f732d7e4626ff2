"""What `tessbkg demo` computes and draws: a store of simulated frames against their truth."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import xarray as xr

import tessbkg
from tessbkg.ccd import CCD
from tessbkg.ffi import FrameStatus
from tessbkg.plot import animate, plot_reduction
from tessbkg.simulate import BLOCK
from tessbkg.store import Group, read_child, read_rows
from tessbkg.tasks import scene_of_dataset


def residual(ds: xr.Dataset, truth: xr.Dataset) -> xr.DataArray:
    """Recovered minus true light of the good frames of a store, in memory.

    Parameters
    ----------
    ds : xarray.Dataset
        From :func:`tessbkg.open_background`.
    truth : xarray.Dataset
        From :func:`tessbkg.simulate.simulate`, of the same frames.

    Returns
    -------
    (time, y, x) float32, electron s-1
    """
    good = ds["frame_status"].to_numpy() == FrameStatus.GOOD
    size = int(ds.attrs["bin"]) // BLOCK
    light = truth["light"].isel(time=good).coarsen(y=size, x=size).mean()
    return (
        ds["scattered_light"]
        .isel(time=good)
        .load()
        .copy(data=ds["scattered_light"].isel(time=good).to_numpy() - light.to_numpy())
    )


def compare(store: str, root: str, ccd: CCD) -> str:
    """Say how close a store is to the truth that the simulator wrote."""
    ds = tessbkg.open_background(store, **asdict(ccd))
    truth = xr.open_zarr(f"{root}/truth/{ccd.group}.zarr", consolidated=False)
    difference = residual(ds, truth)
    light = ds["scattered_light"].sel(time=difference["time"])
    error = ds["scattered_light_err"].sel(time=difference["time"]).to_numpy()
    level = np.median(light, axis=(1, 2))
    lines = []
    for name, chosen in (("quiet", level < 1), ("bright", level >= 1)):
        if chosen.any():
            part = difference.to_numpy()[chosen]
            darkest, brightest = level[chosen].min(), level[chosen].max()
            lines.append(
                f"   {chosen.sum():3d} {name:6s} frames, light {darkest:8.2f} to {brightest:8.2f} e-/s: "
                f"median |difference| {np.median(np.abs(part)):.3f}, rms {np.sqrt(np.mean(part**2)):.3f}, "
                f"error bar {np.median(error[chosen]):.3f} e-/s"
            )
    return "\n".join(lines)


def draw(store: str, root: str, out: Path, ccd: CCD) -> list[Path]:
    """Draw the brightest usable frame before and after, and the light of all frames as a GIF."""
    group = Group.of(store, ccd, None)
    stored = read_child(group, "scene")
    assert stored is not None  # the build that just ended wrote it
    ds = tessbkg.open_background(store, **asdict(ccd))
    good = ds["frame_status"].to_numpy() == FrameStatus.GOOD
    level = np.full(len(good), np.nan)
    level[good] = ds["scattered_light"].isel(time=good).median(("y", "x"))
    i = (
        int(np.nanargmax(np.where(level < 100, level, np.nan)))
        if (level < 100).any()
        else int(np.nanargmin(level))
    )
    frame = (
        tessbkg.list_ffis(root=root, **asdict(ccd)).set_index("ffi").loc[read_rows(group, "report")[i]["ffi"]]
    )
    figure = plot_reduction(
        tessbkg.read_ffi(str(frame["url"])).flux,
        scene_of_dataset(stored),
        ds["scattered_light"][i].to_numpy(),
        title=f"{ccd}, TJD {float(ds['time'][i]):.3f} (simulated)",
    )
    picture, movie = out / "frame.png", out / "light.gif"
    figure.savefig(picture)
    animate(ds, movie, fps=4)
    return [picture, movie]
