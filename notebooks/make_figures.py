"""Draw the figures of the README: `python notebooks/make_figures.py` writes `notebooks/figures/*.png`."""

from pathlib import Path

import numpy as np
import xarray as xr

import tessbkg
from tessbkg.plot import plot_focal_plane

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


if __name__ == "__main__":
    FIGURES.mkdir(exist_ok=True)
    focal_planes()
