"""Pictures and animations of frames, scenes and scattered light.

Colours are those of `viridis` and `inferno`, which people with any colour vision can tell apart, on scales
that are linear near zero and logarithmic far from it: the light spans five decades.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from tessbkg.ccd import Quality
from tessbkg.ephemeris import camera_from_spacecraft
from tessbkg.survey import ORBIT_GAP_DAYS

if TYPE_CHECKING:
    from matplotlib.animation import FuncAnimation
    from matplotlib.figure import Figure

    from tessbkg.scene import Scene

_BUTTONS = {
    "minus": "-",
    "fast-backward": "&#8676;",
    "step-backward": "&larr;",
    "play fa-flip-horizontal": "&#9664;",
    "pause": "||",
    "play": "&#9654;",
    "step-forward": "&rarr;",
    "fast-forward": "&#8677;",
    "plus": "+",
}
"""Signs of an animation's buttons."""

UNITS = "e$^-$ s$^{-1}$"


def _figure(width: float, height: float) -> Figure:
    """Make an empty figure that needs no display; tell a notebook how to show it."""
    from matplotlib.figure import Figure as NewFigure  # noqa: PLC0415 (slow to import)

    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if shell is not None:
        from IPython.core.pylabtools import select_figure_formats  # noqa: PLC0415

        select_figure_formats(shell, {"png"})
    return NewFigure(figsize=(width, height), dpi=80, layout="constrained")


def _norm(low: float, high: float, linear: float) -> Any:
    from matplotlib.colors import AsinhNorm  # noqa: PLC0415 (slow to import)

    return AsinhNorm(linear_width=linear, vmin=low, vmax=max(high, low + 1e-6))


def _ticks(axis: Any, low: float, high: float, place: Callable[[Any], Any]) -> None:
    """Put round numbers on an axis or bar whose ends are `low` and `high`; `place` maps it to 0 .. 1."""
    decades = 10.0 ** np.arange(-2, 7)
    kept: list[float] = []
    # the roundest first; others where there is room
    for values in ([0.0], decades, 5 * decades, 2 * decades):
        for value in (sign * v for v in values for sign in (1, -1)):
            if low <= value <= high and all(abs(place(value) - place(k)) > 0.07 for k in kept):
                kept.append(value)
    axis.set_ticks(kept, [f"{value:g}" for value in kept])
    axis.set_ticks([], minor=True)


def _bar(figure: Figure, drawn: Any, axes: Any, label: str, **style: Any) -> None:
    """Draw the colour bar of an image."""
    from matplotlib.colors import AsinhNorm  # noqa: PLC0415

    bar = figure.colorbar(drawn, ax=axes, **style)
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8)
    if isinstance(drawn.norm, AsinhNorm):
        _ticks(bar.ax.yaxis, *bar.ax.get_ylim(), drawn.norm)


def _show(figure: Figure, axes: Any, image: npt.NDArray[Any], title: str, label: str, **style: Any) -> None:
    """Draw one image with row 0 at the bottom, as FITS viewers do, and its colour bar."""
    drawn = axes.imshow(image, origin="lower", interpolation="nearest", **style)
    axes.set_title(title, fontsize=10)
    _bar(figure, drawn, axes, label, fraction=0.046, pad=0.03)
    axes.tick_params(labelsize=8)


def _style(variable: str, values: npt.NDArray[Any]) -> dict[str, Any]:
    """Choose colours and scale of a variable: light spans decades, azimuths come round."""
    if variable.endswith("azimuth"):
        return {"vmin": 0, "vmax": 360, "cmap": "twilight"}
    low, high = np.nanpercentile(values, [0.2, 99.8])
    if variable.startswith("scattered_light"):
        return {"norm": _norm(min(low, 0.0), high, max((high - low) / 200, 0.5)), "cmap": "inferno"}
    return {"vmin": low, "vmax": high, "cmap": "viridis"}


def plot_reduction(
    flux: npt.NDArray[np.float32],
    scene: Scene,
    light: npt.NDArray[np.float32],
    *,
    title: str = "",
    before: str = "before: the frame",
) -> Figure:
    """Draw one frame, its static scene, the mask, and the scattered light that is left.

    Parameters
    ----------
    flux : (rows, columns) float32, electron s-1
    scene : Scene
    light : (ny, nx) float32, electron s-1
    title, before : str
        Of the whole, and of the picture of `flux`.

    Returns
    -------
    matplotlib.figure.Figure

    Examples
    --------
    >>> import numpy as np
    >>> from tessbkg.scene import make_scene
    >>> frame = np.full((64, 64), 100, dtype=np.float32)
    >>> figure = plot_reduction(frame + 5, make_scene(frame[None], (7e-4, 0.02)), np.full((4, 4), 5.0))
    >>> len(figure.axes)
    8
    """
    from matplotlib.colors import BoundaryNorm, ListedColormap  # noqa: PLC0415

    figure = _figure(13, 11)
    axes = figure.subplots(2, 2)
    low, high = np.nanpercentile(scene.flux, [1, 99.5])
    sky = {"norm": _norm(low - 5, max(high, float(np.nanpercentile(flux, 99.5))), 30), "cmap": "viridis"}
    extent = (-0.5, flux.shape[1] - 0.5, -0.5, flux.shape[0] - 0.5)
    _show(figure, axes[0, 0], flux, before, f"flux ({UNITS})", extent=extent, **sky)
    _show(figure, axes[0, 1], scene.flux, "the static scene", f"flux ({UNITS})", extent=extent, **sky)
    names = ["used", "star", "saturated", "strap", "bad"]
    kind = np.zeros(scene.mask.shape, dtype=np.uint8)
    for code, bit in ((1, 1), (3, 4), (2, 2), (4, 8)):
        kind[(scene.mask & bit) != 0] = code
    colours = ListedColormap(["#f7f7f7", "#0072b2", "#d55e00", "#56b4e9", "#000000"])
    drawn = axes[1, 0].imshow(
        kind,
        origin="lower",
        cmap=colours,
        norm=BoundaryNorm(np.arange(-0.5, 5.5), 5),
        interpolation="nearest",
    )
    used = np.mean(scene.mask == 0)
    axes[1, 0].set_title(f"mask: {used:.0%} of pixels are used", fontsize=10)
    bar = figure.colorbar(drawn, ax=axes[1, 0], fraction=0.046, pad=0.03, ticks=range(5))
    bar.ax.set_yticklabels(names, fontsize=8)
    low, high = np.nanpercentile(light, [0.5, 99.8])
    _show(
        figure, axes[1, 1], light, "after: scattered light", f"scattered light ({UNITS})",
        extent=extent, cmap="inferno", norm=_norm(min(low, 0), high, max((high - low) / 20, 0.1)),
    )  # fmt: skip
    for panel in axes.flat:
        panel.set_xlabel("science column (pixel)", fontsize=9)
        panel.set_ylabel("science row (pixel)", fontsize=9)
    figure.suptitle(title)
    return figure


def plot_focal_plane(
    datasets: Iterable[xr.Dataset], variable: str = "scattered_light", *, title: str = ""
) -> Figure:
    """Draw one exposure of several CCDs where they lie in the field of view.

    The plane is that of the spacecraft: its X axis, along which the four cameras fan out, to the right, its Y
    axis up, as seen along the line of sight. The gaps between CCDs are drawn to scale.

    Parameters
    ----------
    datasets : iterable of xarray.Dataset
        One of each CCD, with `variable` on (y, x), `pixel_direction`, and the attributes `camera` and `ccd`.
    variable : str
    title : str

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ValueError
        If a dataset lacks the variable or the directions, or there is none.

    Examples
    --------
    >>> import tessbkg, xarray as xr
    >>> row, column = ("y", [1.0, 1024.0, 2048.0]), ("x", [45.0, 1068.0, 2092.0])
    >>> grid = {"time": [1340.0], "row": row, "column": column}
    >>> attrs = {"sector": 1, "camera": 1}
    >>> ccds = [tessbkg.angles(xr.Dataset(coords=grid, attrs=attrs | {"ccd": n})) for n in (1, 2, 3, 4)]
    >>> len(plot_focal_plane([ds.isel(time=0) for ds in ccds], "earth_angle").axes)
    2
    """
    parts = list(datasets)
    for ds in parts:
        if variable not in ds or ds[variable].dims != ("y", "x") or "pixel_direction" not in ds:
            raise ValueError(f"a dataset has no {variable!r} on (y, x), or no pixel_direction")
    if not parts:
        raise ValueError("datasets is empty: give one dataset of each CCD")
    style = _style(variable, np.concatenate([ds[variable].to_numpy().ravel() for ds in parts]))
    wide = len({ds.attrs["camera"] for ds in parts}) > 1
    figure = _figure(14, 4.4) if wide else _figure(7, 6)
    axes = figure.subplots()
    drawn = None
    for ds in parts:
        turn = camera_from_spacecraft(int(ds.attrs["camera"]))
        x, y, z = np.moveaxis(ds["pixel_direction"].to_numpy() @ turn, -1, 0)
        across, along = np.degrees(np.arctan2(x, z)), np.degrees(np.arctan2(y, np.hypot(x, z)))
        drawn = axes.pcolormesh(
            _edges(across), _edges(along), ds[variable].to_numpy(), rasterized=True, **style
        )
        axes.text(
            float(across.mean()), float(along.mean()), f"{ds.attrs['camera']}.{ds.attrs['ccd']}",
            ha="center", va="center", fontsize=9,
            bbox={"boxstyle": "round", "facecolor": "white", "alpha": 0.7, "edgecolor": "none"},
        )  # fmt: skip
    assert drawn is not None
    axes.set_aspect("equal")
    axes.set_xlabel("angle along the spacecraft's X axis (degree)")
    axes.set_ylabel("along Y (degree)")
    units = parts[0][variable].attrs.get("units", "1").replace("electron s-1", UNITS)
    label = f"{variable.replace('_', ' ')} ({units})"
    _bar(figure, drawn, axes, label, pad=0.01, shrink=0.8 if wide else 1.0)
    axes.set_title(title)
    return figure


def _edges(centres: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Corners of the cells of a grid whose centres are given: means of four, carried on beyond the rim."""
    grown = np.pad(centres, 1, mode="reflect", reflect_type="odd")
    return (grown[:-1, :-1] + grown[1:, :-1] + grown[:-1, 1:] + grown[1:, 1:]) / 4


def _levels(light: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Percentiles 5, 50 and 95 of each frame, NaN where there is no value.

    Raises
    ------
    ValueError
        If there is none anywhere.
    """
    good = np.isfinite(light).any(axis=1)
    if not good.any():
        raise ValueError("there is no good frame to show")
    levels = np.full((3, len(light)), np.nan)
    levels[:, good] = np.nanpercentile(light[good], [5, 50, 95], axis=1)
    return levels


def plot_light_curve(ds: xr.Dataset) -> Figure:
    """Draw the level of scattered light over time, with flags, gaps and the Earth's and Moon's angles.

    Parameters
    ----------
    ds : xarray.Dataset
        From :func:`tessbkg.open_background`.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ValueError
        If there is no good frame.

    Examples
    --------
    >>> import numpy as np, xarray as xr
    >>> light = xr.DataArray(np.ones((3, 4, 4), "f4"), {"time": [1, 2, 9]}, ("time", "y", "x"))
    >>> len(plot_light_curve(light.to_dataset(name="scattered_light")).axes)
    1
    """
    time = ds["time"].to_numpy()
    low, middle, high = _levels(ds["scattered_light"].to_numpy().reshape(len(time), -1))
    angles = [body for body in ("earth", "moon") if f"{body}_boresight_angle" in ds]
    figure = _figure(12, 6 if angles else 3.6)
    panels: Any = figure.subplots(2 if angles else 1, 1, sharex=True, squeeze=False)[:, 0]
    step = np.median(np.diff(time)) if len(time) > 1 else 1.0
    gaps = np.diff(time)
    # of thinned frames, those on both sides of a downlink are only a little farther apart
    cuts = np.flatnonzero((gaps > 5 * step) | (gaps > step + ORBIT_GAP_DAYS)) + 1
    for part in np.split(np.arange(len(time)), cuts):
        panels[0].fill_between(time[part], low[part], high[part], color="#56b4e9", alpha=0.4, lw=0)
        panels[0].plot(time[part], middle[part], color="#0072b2", lw=1, marker="." if len(part) < 100 else "")
    for cut in cuts:
        for panel in panels:
            panel.axvspan(time[cut - 1], time[cut], color="0.93", lw=0)
    if "quality" in ds:
        quality = ds["quality"].to_numpy()
        marks = (
            ("stray light", Quality.STRAY_LIGHT, "#e69f00"),
            ("momentum dump", Quality.DESATURATION, "#cc79a7"),
            ("bad calibration", Quality.BAD_CALIBRATION, "#d55e00"),
        )
        for k, (name, bit, colour) in enumerate(marks):
            flagged = time[(quality & int(bit)) != 0]
            if flagged.size:
                height = np.full(flagged.size, 0.96 - 0.05 * k)
                panels[0].plot(
                    flagged,
                    height,
                    "|",
                    ms=8,
                    mew=1.5,
                    color=colour,
                    label=name,
                    transform=panels[0].get_xaxis_transform(),
                )
        if panels[0].get_legend_handles_labels()[0]:
            panels[0].legend(loc="upper left", fontsize=8, framealpha=0.8)
    panels[0].set_yscale("asinh", linear_width=1.0)
    low_end, high_end = panels[0].get_ylim()
    bottom, top = np.arcsinh([low_end, high_end])
    _ticks(panels[0].yaxis, low_end, high_end, lambda value: (np.arcsinh(value) - bottom) / (top - bottom))
    panels[0].set_ylabel(f"scattered light ({UNITS})\nmedian and 5-95 % of the CCD")
    size = 6 if len(time) < 300 else 2
    for body, colour in zip(angles, ("#009e73", "#999999"), strict=False):
        panels[1].plot(time, ds[f"{body}_boresight_angle"], ".", ms=size, color=colour, label=body.title())
    if angles:
        panels[1].set_ylabel("angle from the boresight (degree)")
        panels[1].legend(fontsize=8, markerscale=6 / size)
    panels[-1].set_xlabel("time at the spacecraft, TJD (JD - 2457000, TDB)")
    panels[0].set_title(ds.attrs.get("title", ""))
    return figure


def animate(
    ds: xr.Dataset,
    path: str | Path,
    *,
    variable: str = "scattered_light",
    fps: int = 8,
    max_frames: int = 200,
) -> None:
    """Write an animation of a variable, with one colour scale for all frames.

    Parameters
    ----------
    ds : xarray.Dataset
        With `variable` on (time, y, x). Frames that are not good are left out.
    path : str or Path
        Ends in `.gif`, `.html` (a page with controls) or `.mp4` (needs the program ffmpeg, or the package
        imageio-ffmpeg, which brings it).
    variable : str
    fps : int
        Frames a second.
    max_frames : int
        More frames than these are thinned out evenly.

    Raises
    ------
    ValueError
        If there is no such variable, no good frame, or no such kind of file.
    FileNotFoundError
        If ffmpeg is needed and missing.

    Examples
    --------
    >>> import numpy as np, tempfile, xarray as xr
    >>> light = xr.Dataset({"scattered_light": (("time", "y", "x"), np.ones((2, 4, 4), "f4"))})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     animate(light, f"{folder}/light.gif")
    """
    from matplotlib.animation import FuncAnimation  # noqa: PLC0415 (slow to import)
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415

    if variable not in ds or ds[variable].dims != ("time", "y", "x"):
        three = [str(name) for name, v in ds.items() if v.dims == ("time", "y", "x")]
        raise ValueError(f"variable={variable!r} is not among those on (time, y, x): {', '.join(three)}")
    kind = Path(path).suffix.lower()
    if kind not in {".gif", ".html", ".mp4"}:
        raise ValueError(f"path={str(path)!r} must end in .gif, .html or .mp4")
    program = _ffmpeg() if kind == ".mp4" else ""
    good = (
        np.flatnonzero(ds["frame_status"].to_numpy() == 0)
        if "frame_status" in ds
        else np.arange(ds.sizes["time"])
    )
    if not good.size:
        raise ValueError("there is no good frame to show")
    chosen = good[np.linspace(0, good.size - 1, min(good.size, max_frames)).round().astype(int)]
    cube = ds[variable].isel(time=chosen).to_numpy()
    figure = _figure(6.4, 5.6)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    attrs = ds[variable].attrs
    units = attrs.get("units", "1").replace("electron s-1", UNITS)
    label = f"{attrs.get('long_name', variable)} ({units})"
    half = float(ds["x"][1] - ds["x"][0]) / 2 if "x" in ds.coords and ds.sizes["x"] > 1 else 0.5
    x, y = (ds[d].to_numpy() if d in ds.coords else np.arange(ds.sizes[d]) for d in ("x", "y"))
    _show(
        figure, axes, cube[0], " ", label, **_style(variable, cube),
        extent=(x[0] - half, x[-1] + half, y[0] - half, y[-1] + half),
    )  # fmt: skip
    axes.set_xlabel("science column (pixel)")
    axes.set_ylabel("science row (pixel)")
    image = axes.images[0]

    def draw(i: int) -> tuple[Any, ...]:
        frame = ds.isel(time=chosen[i])
        image.set_data(cube[i])
        parts = [f"TJD {float(frame['time']):.3f}" if "time" in ds.coords else f"frame {chosen[i]}"]
        if "btjd" in ds.coords:
            parts.append(f"BTJD {float(frame['btjd']):.3f}")
        if "cadence" in ds.coords:
            parts.append(f"cadence {int(frame['cadence'])}")
        axes.set_title("  ".join(parts), fontsize=10)
        return (image,)

    draw(0)
    for _ in range(5):  # the layout comes to rest
        figure.draw_without_rendering()
    figure.set_layout_engine("none")  # nothing moves from frame to frame
    animation = FuncAnimation(figure, draw, frames=len(chosen), blit=False)
    _write(animation, Path(path), fps, program)


def _write(animation: FuncAnimation, path: Path, fps: int, program: str) -> None:
    """Write an animation in the way that the name of the file asks for."""
    import matplotlib as mpl  # noqa: PLC0415 (slow to import)
    from matplotlib.animation import FFMpegWriter, PillowWriter  # noqa: PLC0415

    if path.suffix.lower() == ".html":
        page = animation.to_jshtml(fps=fps)
        page = re.sub(r'<link rel="stylesheet"[^>]*>', "", page)  # an icon font from the network
        for name, sign in _BUTTONS.items():
            page = page.replace(f'<i class="fa fa-{name}"></i>', sign)
        path.write_text(page, encoding="utf-8")
        return
    with mpl.rc_context({"animation.ffmpeg_path": program}):
        animation.save(str(path), writer=FFMpegWriter(fps=fps) if program else PillowWriter(fps=fps))


def _ffmpeg() -> str:
    """Find the program ffmpeg."""
    import matplotlib as mpl  # noqa: PLC0415 (slow to import)

    if found := shutil.which(str(mpl.rcParams["animation.ffmpeg_path"])):
        return found
    if importlib.util.find_spec("imageio_ffmpeg"):
        return str(importlib.import_module("imageio_ffmpeg").get_ffmpeg_exe())
    raise FileNotFoundError(
        "MP4 needs the program ffmpeg: install it or `pip install imageio-ffmpeg`, or write .gif or .html"
    )
