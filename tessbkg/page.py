"""A page about one built CCD: what it is made of, what became of its frames, pictures; one HTML file."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from tessbkg.ccd import CCD
from tessbkg.errors import StoreError
from tessbkg.ffi import FrameStatus
from tessbkg.plot import UNITS, plot_focal_plane, plot_light_curve, plot_reduction
from tessbkg.storage import Options
from tessbkg.store import Group, groups, open_background, read_child, read_rows, select
from tessbkg.tasks import scene_of_dataset

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Floats = npt.NDArray[np.float32]

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1080px; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #ddd }
table { border-collapse: collapse } td, th { padding: .2em .8em .2em 0; text-align: left }
th { vertical-align: top; white-space: nowrap } img { max-width: 100% }
.note { background: #fff4d6; padding: .5em 1em; border-left: 4px solid #e69f00 }
"""


def quality_page(
    store: str, *, sector: int, camera: int, ccd: int, store_options: Options | None = None
) -> str:
    """Write a page about one built CCD.

    Parameters
    ----------
    store : str
        Folder or URL.
    sector, camera, ccd : int
    store_options : dict, optional
        fsspec options of the store.

    Returns
    -------
    str
        HTML with the pictures in it; it needs no other file and no network.

    Raises
    ------
    StoreError
        If there is no such group.

    Examples
    --------
    >>> import tessbkg, tessbkg.simulate
    >>> _ = tessbkg.simulate.simulate("memory://page", frames=4, shape=(64, 64))
    >>> ccd = {"sector": 1, "camera": 1, "ccd": 4}
    >>> _ = tessbkg.build("memory://page.zarr", root="memory://page", dark_frames=2, **ccd)
    >>> "<h1>" in quality_page("memory://page.zarr", **ccd)
    True
    """
    identity = CCD(sector, camera, ccd)
    ds = open_background(store, sector=sector, camera=camera, ccd=ccd, store_options=store_options)
    group = Group.of(store, identity, store_options)
    status = ds["frame_status"].to_numpy()
    good = status == FrameStatus.GOOD
    parts = [f"<h1>{html.escape(str(ds.attrs.get('title', identity)))}</h1>", _facts(ds, good)]
    angles = str(ds.attrs.get("angles", ""))
    if angles.startswith("none"):
        parts.append(f'<p class="note">No angles: {html.escape(angles.removeprefix("none: "))}</p>')
    parts += [f'<p class="note">{html.escape(str(one))}</p>' for one in ds.attrs.get("warnings", [])]
    rows = read_rows(group, "report")
    parts += ["<h2>Frames</h2>", _counts(status), _reading(rows), _bad_frames(rows)]
    if good.any():
        for heading, figure in (
            ("Light over time", plot_light_curve(ds)),
            ("Scene, mask and light of the brightest frame", _draw_frame(group, ds, None)),
            ("Maps", _maps(ds, good)),
        ):
            parts += [f"<h2>{heading}</h2>", _picture(figure, heading)]
    parts += ["<h2>Parameters</h2>", _parameters(ds)]
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(str(identity))}</title><style>{STYLE}</style></head>\n<body>{body}</body></html>\n"
    )


def draw_frame(
    store: str,
    *,
    sector: int,
    camera: int,
    ccd: int,
    frame: int | None = None,
    store_options: Options | None = None,
) -> Figure:
    """Draw the scene, the mask and the light of one frame of a store, and scene and light put together.

    Parameters
    ----------
    store : str
        Folder or URL.
    sector, camera, ccd : int
    frame : int, optional
        Number of the frame in order of time, from 0; by default that of the brightest good one.
    store_options : dict, optional
        fsspec options of the store.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    StoreError
        If there is no such group.
    ValueError
        If the frame is not there or not good.

    Examples
    --------
    >>> import tessbkg, tessbkg.simulate
    >>> _ = tessbkg.simulate.simulate("memory://frame", frames=4, shape=(64, 64))
    >>> ccd = {"sector": 1, "camera": 1, "ccd": 4}
    >>> _ = tessbkg.build("memory://f.zarr", root="memory://frame", dark_frames=2, **ccd)
    >>> len(draw_frame("memory://f.zarr", frame=1, **ccd).axes)
    8
    """
    ds = open_background(store, sector=sector, camera=camera, ccd=ccd, store_options=store_options)
    return _draw_frame(Group.of(store, CCD(sector, camera, ccd), store_options), ds, frame)


def _draw_frame(group: Group, ds: xr.Dataset, frame: int | None) -> Figure:
    stored = read_child(group, "scene")
    if stored is None:
        raise StoreError(f"{group.name} has no scene")
    scene, i = scene_of_dataset(stored), choose_frame(ds, frame)
    light = ds["scattered_light"].isel(time=i).to_numpy()
    title = f"{ds.attrs['title']}, TJD {float(ds['time'][i]):.3f}"
    together = _together(scene.flux, light, int(ds.attrs["bin"]))
    return plot_reduction(together, scene, light, title=title, before="static scene and light put together")


def choose_frame(ds: xr.Dataset, frame: int | None) -> int:
    """Take a good frame of a CCD: the one that is asked for, or the brightest.

    Raises
    ------
    ValueError
        If there is none.
    """
    good = ds["frame_status"].to_numpy() == FrameStatus.GOOD
    if not good.any():
        raise ValueError("there is no good frame to show")
    if frame is None:
        return int(np.argmax(np.where(good, ds["level"], -np.inf)))
    if not frame < len(good) or not good[frame]:
        allowed = f"good ones are among 0 to {np.flatnonzero(good)[-1]}"
        raise ValueError(f"frame={frame} is not there or not good: {allowed}")
    return frame


def draw_focal_plane(
    store: str,
    variable: str = "scattered_light",
    *,
    sector: int | None = None,
    camera: int | None = None,
    ccd: int | None = None,
    frame: int | None = None,
    store_options: Options | None = None,
) -> Figure:
    """Draw one exposure of all CCDs of a sector that a store holds.

    Parameters
    ----------
    store : str
        Folder or URL.
    variable : str
        Any on (time, y, x).
    sector, camera, ccd : int, optional
        Which CCDs; all must be of one sector.
    frame : int, optional
        Number of the frame of the first CCD, from 0; by default that of its brightest good one.
    store_options : dict, optional
        fsspec options of the store.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    StoreError
        If there is no such CCD.
    ValueError
        If the frame or the variable is not there, or the CCDs are of several sectors.

    Examples
    --------
    >>> import tessbkg, tessbkg.simulate
    >>> _ = tessbkg.simulate.simulate("memory://plane", frames=4, shape=(64, 64))
    >>> ccd = {"sector": 1, "camera": 1, "ccd": 4}
    >>> _ = tessbkg.build("memory://p.zarr", root="memory://plane", dark_frames=2, **ccd)
    >>> len(draw_focal_plane("memory://p.zarr", "earth_angle").axes)
    2
    """
    chosen = select(groups(store, store_options), store, sector=sector, camera=camera, ccd=ccd)
    if len(sectors := sorted({one.sector for one in chosen})) > 1:
        raise ValueError(f"sector=None is not enough: {store} has the sectors {sectors}")
    parts = [open_background(store, **asdict(one), store_options=store_options) for one in chosen]
    three = [str(name) for name, v in parts[0].items() if v.dims == ("time", "y", "x")]
    if variable not in three:
        raise ValueError(f"variable={variable!r} is not among those on (time, y, x): {', '.join(three)}")
    time = float(parts[0]["time"][choose_frame(parts[0], frame)])
    return plot_focal_plane(
        [ds.isel(time=int(np.argmin(np.abs(ds["time"].to_numpy() - time)))) for ds in parts],
        variable,
        title=f"{variable.replace('_', ' ')}, sector {sectors[0]}, TJD {time:.3f}",
    )


def _together(scene: Floats, light: Floats, size: int) -> Floats:
    """Add light in bins of `size` pixels to a scene; pixels beyond the last whole bin get none."""
    frame = scene.copy()
    rows, columns = (n * size for n in light.shape)
    frame[:rows, :columns] += np.kron(light, np.ones((size, size), dtype=np.float32))
    return frame


def _table(rows: Mapping[str, Any]) -> str:
    cells = "".join(
        f"<tr><th>{html.escape(str(name))}</th><td>{html.escape(str(value))}</td></tr>"
        for name, value in rows.items()
    )
    return f"<table>{cells}</table>"


def _facts(ds: xr.Dataset, good: npt.NDArray[np.bool_]) -> str:
    time, used = ds["time"].to_numpy(), ds["n_pixels"].to_numpy()
    facts = {
        "time": f"TJD {time[0]:.4f} to {time[-1]:.4f} ({time[-1] - time[0]:.1f} days)",
        "frames": f"{len(time):,}, {int(good.sum()):,} good",
        "bins": f"{ds.sizes['y']} x {ds.sizes['x']} of {ds.attrs['bin']} x {ds.attrs['bin']} pixels",
        "unmasked pixels a bin": f"median {int(np.median(used))}, least {int(used.min())}; "
        f"{int((used == 0).sum())} bins filled from their neighbours",
    }
    if "wcs_misfit_deg" in ds.attrs:
        facts["WCS misfit"] = f"{ds.attrs['wcs_misfit_deg']:.4f} degrees ({ds.attrs['pointing_source']})"
    if "ephemeris_source" in ds.attrs:
        facts["ephemeris"] = f"{ds.attrs['ephemeris_source']}; predicted: {ds.attrs['ephemeris_predicted']}"
    if not ds.attrs.get("complete"):
        facts["state"] = "NOT FINISHED: build it again to go on"
    return _table(facts)


def _counts(status: npt.NDArray[np.uint8]) -> str:
    numbers = {
        FrameStatus(int(s)): int(n) for s, n in zip(*np.unique(status, return_counts=True), strict=True)
    }
    return _table({s.name.lower().replace("_", " "): f"{n:,}" for s, n in numbers.items()})


def _reading(rows: list[dict[str, Any]]) -> str:
    """Say what was read, and how well neighbouring bins agree."""
    scatter = [row["scatter"] for row in rows if row["scatter"] is not None]
    if not scatter:
        return ""
    retries = sum(row["retries"] for row in rows)
    middle, most = np.median(scatter), max(scatter)
    return _table(
        {
            "read": f"{sum(row['nbytes'] for row in rows) / 1e9:,.2f} GB, {retries:,} requests tried again",
            "noise between neighbouring bins": f"{middle:.2f} of their error bars, at most {most:.2f}",
        }
    )


def _bad_frames(rows: list[dict[str, Any]]) -> str:
    bad = [row for row in rows if row["status"] not in {FrameStatus.GOOD, FrameStatus.REJECTED}]
    if not bad:
        return "<p>Every frame was read.</p>"
    more = f"<p>and {len(bad) - 50} more</p>" if len(bad) > 50 else ""
    return _table({row["ffi"]: row["reason"] for row in bad[:50]}) + more


def _maps(ds: xr.Dataset, good: npt.NDArray[np.bool_]) -> Figure:
    """Draw the mean light, its spread over time and the mean error of all good frames."""
    from matplotlib.figure import Figure as NewFigure  # noqa: PLC0415 (slow to import)

    light = ds["scattered_light"].to_numpy()[good]
    error = ds["scattered_light_err"].to_numpy()[good]
    figure = NewFigure(figsize=(13, 4), dpi=80, layout="constrained")
    images = (
        ("median light", np.nanmedian(light, axis=0)),
        ("standard deviation over time", np.nanstd(light, axis=0)),
        ("median error", np.nanmedian(error, axis=0)),
    )
    for axes, (title, image) in zip(figure.subplots(1, 3), images, strict=True):
        low, high = np.nanpercentile(image, [1, 99])
        drawn = axes.imshow(image, origin="lower", cmap="inferno", vmin=low, vmax=high)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("bin along columns")
        axes.set_ylabel("bin along rows")
        figure.colorbar(drawn, ax=axes, fraction=0.046).set_label(UNITS)
    return figure


def _picture(figure: Figure, what: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(what)}" src="data:image/png;base64,{data}">'


def _parameters(ds: xr.Dataset) -> str:
    options = json.loads(ds.attrs["options"])
    mask = options.pop("mask", {})
    return _table({**options, **{f"mask: {k}": v for k, v in mask.items()}, "made by": ds.attrs["source"]})
