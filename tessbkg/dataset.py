"""Scattered light as an xarray Dataset: options, scene, reduction, attributes.

The lazy path of a notebook (:func:`scattered_light`) and the cluster job (:mod:`tessbkg.jobs`) share
everything here: the same options, the same choice of dark frames, the same kernel.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

import dask.array as da
import numpy as np
import numpy.typing as npt
import pandas as pd
import xarray as xr
from dask.base import tokenize
from dask.delayed import delayed

from tessbkg.ccd import CCD, DROP_QUALITY, FIRST_SCIENCE_COLUMN, LIVE_FRACTION, SCIENCE_SHAPE
from tessbkg.errors import TessbkgError
from tessbkg.ffi import FrameStatus
from tessbkg.reduce import STATISTICS, Plan, plan_reduction, reduce_frame
from tessbkg.scene import Mask, MaskOptions, Scene, fit_noise, make_scene, with_response
from tessbkg.stack import bin_coordinates
from tessbkg.survey import choose_dark, finish_survey, reject, survey_frames

logger = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]
Errors = Literal["model", "uncert"]

SHARD_FRAMES: Final = 64
"""Frames of a shard: the unit of work and of storage."""

MAX_DARK_FRAMES: Final = 32
"""Dark frames are combined in memory, 17 MB each."""

BRIGHT_LEVEL: Final = 500.0
"""Light, electron s-1, of the frames that show the response of columns best."""

UNITS: Final = "electron s-1"


@dataclass(frozen=True)
class Options:
    """What a reduction does; its digest names the result.

    Parameters
    ----------
    bin : int
        Pixels along the side of a bin; a divisor of 2048.
    statistic : {"whole", "median", "mean", "clipped", "rolling", "sparse"}
        What a bin's value is, see :func:`tessbkg.reduce.plan_reduction`. `whole`, the mean light of the
        whole bin, is the nearest to the truth.
    errors : {"model", "uncert"}
        Error bars from the noise law fitted to a few frames, or from the uncertainty image of every frame,
        which doubles the bytes.
    dark_frames : int
        Frames that the scene is made of.
    drop_quality : int
        Frames with any of these bits of DQUALITY are rejected.
    angles : bool
        Add the angles of Earth, Moon and Sun.
    ephemeris : str
        Where TESS was: `table`, `horizons`, a SPICE kernel or a TESSVectors file (:mod:`tessbkg.ephemeris`).
    mask : MaskOptions
    """

    bin: int = 16
    statistic: str = "whole"
    errors: str = "model"
    dark_frames: int = 12
    drop_quality: int = DROP_QUALITY
    angles: bool = True
    ephemeris: str = "table"
    mask: MaskOptions = field(default_factory=MaskOptions)

    def __post_init__(self) -> None:
        if isinstance(self.bin, bool) or not isinstance(self.bin, int | np.integer) or self.bin < 1:
            raise ValueError(f"bin={self.bin!r} is not allowed: it must be a divisor of {SCIENCE_SHAPE[0]}")
        if SCIENCE_SHAPE[0] % self.bin:
            raise ValueError(f"bin={self.bin} is not allowed: it must divide {SCIENCE_SHAPE[0]}")
        if self.statistic not in STATISTICS:
            raise ValueError(f"statistic={self.statistic!r} is unknown: allowed are {', '.join(STATISTICS)}")
        if self.errors not in {"model", "uncert"}:
            raise ValueError(f"errors={self.errors!r} is unknown: allowed are 'model' and 'uncert'")
        if not 1 <= self.dark_frames <= MAX_DARK_FRAMES:
            raise ValueError(
                f"dark_frames={self.dark_frames} is out of range: allowed are 1 to {MAX_DARK_FRAMES}"
            )
        known = self.ephemeris in {"table", "horizons"} or self.ephemeris.lower().endswith((".bsp", ".csv"))
        if not known:
            raise ValueError(
                f"ephemeris={self.ephemeris!r} is unknown: allowed are 'table', 'horizons', "
                "a SPICE kernel '*.bsp' or a TESSVectors file '*.csv'"
            )
        if not 0 <= self.drop_quality < 1 << 16:
            raise ValueError(f"drop_quality={self.drop_quality} is out of range: allowed are 0 to 65535")

    def as_dict(self) -> dict[str, Any]:
        """Options as plain numbers and strings, for attributes and digests."""
        return {
            name: (value if isinstance(value, str | dict) else _plain(value))
            for name, value in asdict(self).items()
        }


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def digest(content: Mapping[str, Any]) -> str:
    """Hash a mapping of plain values."""
    text = json.dumps(content, sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def expected_noise(exposure: float) -> tuple[float, float]:
    """Noise law of an exposure of `exposure` days, for frames whose uncertainties cannot be read.

    a = 7.445e-4 electron s-1 and b = 0.0197 (electron s-1)^2 were measured on sector 1, where light is
    collected for 1425.6 s of each 1800 s; both go with the inverse of the exposure.
    """
    scale = 1425.6 / (exposure * 86400 * LIVE_FRACTION)
    return 7.445e-4 * scale, 0.0197 * scale


def plan_of(scene: Scene, options: Options) -> Plan:
    """Plan the reduction of a scene's frames."""
    return plan_reduction(
        scene.flux,
        scene.mask != 0,
        bin=options.bin,
        statistic=options.statistic,
        scene_err=scene.error,
        noise=scene.noise,
        terms=scene.terms,
        response=scene.response,
        spare=scene.spare,
    )


def scattered_light(
    ffis: xr.Dataset,
    *,
    bin: int = 16,  # noqa: A002 (the public name of this option)
    statistic: str = "whole",
    errors: Errors = "model",
    dark_frames: int = 12,
    drop_quality: int = DROP_QUALITY,
    angles: bool = True,
    ephemeris: str = "table",
    mask: MaskOptions | None = None,
    scene: Scene | None = None,
) -> xr.Dataset:
    """Reduce FFIs to scattered light, lazily.

    Without `scene` one is made at once: from the levels of the frames given (0.44 MB each) and the darkest
    of them, whole. Everything else waits until it is computed; then each frame is read once.

    Parameters
    ----------
    ffis : xarray.Dataset
        From :func:`tessbkg.open_ffis`, or a selection of it; `flux` may also be your own array.
    bin, statistic, errors, dark_frames, drop_quality, angles, ephemeris, mask
        As in :class:`Options`.
    scene : Scene, optional
        Static sky made elsewhere, of the same pixels.

    Returns
    -------
    xarray.Dataset
        `scattered_light`, `scattered_light_err` : (time, y, x) float32, electron s-1, lazy, one frame a
        chunk: looking at one frame reads one frame;
        `n_pixels` and `filled` : (y, x); `frame_status` : (time,), lazy; coordinates and angles as in a
        store.

    Raises
    ------
    ValueError
        If an option is wrong or the dataset has no `flux`.

    Examples
    --------
    >>> import tessbkg
    >>> import tessbkg.simulate
    >>> _ = tessbkg.simulate.simulate("memory://lazy", frames=4, shape=(128, 128))
    >>> ffis = tessbkg.open_ffis(sector=1, camera=1, ccd=4, root="memory://lazy")
    >>> scattered_light(ffis, bin=16, dark_frames=2).scattered_light.shape
    (4, 8, 8)
    """
    if "flux" not in ffis or ffis["flux"].dims != ("time", "y", "x"):
        raise ValueError("ffis has no variable flux(time, y, x): open FFIs with tessbkg.open_ffis")
    options = Options(
        bin, statistic, errors, dark_frames, drop_quality, angles, ephemeris, mask or MaskOptions()
    )
    survey = reject(_survey_of(ffis), drop_quality)
    if scene is None:
        scene = _scene_of(ffis, survey, options)
    plan = plan_of(scene, options)
    kept = (survey["status"] == FrameStatus.GOOD).to_numpy()
    flux = da.asarray(ffis["flux"].data)
    flux = flux.rechunk((1, *flux.shape[1:]))
    arrays = [flux]
    if errors == "uncert":
        arrays.append(da.asarray(ffis["flux_err"].data).rechunk(flux.chunks))
    both = da.map_blocks(
        _reduce_block,
        da.from_array(kept, chunks=1, name=False)[:, None, None],
        *arrays,
        plan=delayed(plan, pure=True),
        dtype=np.float32,
        meta=np.empty((0, 0, 0, 0), dtype=np.float32),
        new_axis=0,
        chunks=((2,), flux.chunks[0], (plan.shape[0],), (plan.shape[1],)),
        name="scattered-light-" + tokenize(flux.name, plan.subtract, options, kept),
    )
    status = da.from_array(survey["status"].to_numpy().astype("u1"), chunks=1)
    blank = da.isnan(both[0]).all(axis=(1, 2))
    status = da.where((status == FrameStatus.GOOD) & blank, np.uint8(FrameStatus.BLANK), status)
    coordinates = {
        name: coordinate.variable for name, coordinate in ffis.coords.items() if coordinate.dims == ("time",)
    }
    described = describe(
        xr.Dataset(
            {
                "scattered_light": (("time", "y", "x"), both[0]),
                "scattered_light_err": (("time", "y", "x"), both[1]),
                "frame_status": (
                    "time",
                    status,
                    ffis["frame_status"].attrs if "frame_status" in ffis else {},
                ),
                **static_variables(plan),
            },
            coords={**coordinates, **bin_coordinates(ffis.coords, bin)},
            attrs={
                name: ffis.attrs[name] for name in ("sector", "camera", "ccd", "wcs") if name in ffis.attrs
            },
        ),
        options,
        scene.dark_frames,
    )
    return add_sky(described, options) if "sector" in ffis.attrs else described


def _reduce_block(
    kept: npt.NDArray[np.bool_], flux: Floats, flux_err: Floats | None = None, *, plan: Plan
) -> Floats:
    """Reduce the frames of one dask block: (2, time, y, x), values and errors."""
    both = np.empty((2, len(flux), *plan.shape), dtype=np.float32)
    for i in range(len(flux)):
        if kept[i, 0, 0]:
            both[:, i] = reduce_or_blank(flux[i], plan, None if flux_err is None else flux_err[i])[1]
        else:
            both[:, i] = np.nan
    return both


def reduce_or_blank(
    flux: Floats, plan: Plan, flux_err: Floats | None = None
) -> tuple[FrameStatus, npt.NDArray[np.float32]]:
    """Reduce a frame, or find that it is blank: nothing but zero and NaN.

    Returns
    -------
    status : FrameStatus
        GOOD or BLANK.
    both : (2, ny, nx) float32
        Value and error; NaN when blank.
    """
    if not (flux[::7, ::7] > 0).any() and not (np.isfinite(flux) & (flux != 0)).any():
        return FrameStatus.BLANK, np.full((2, *plan.shape), np.nan, dtype=np.float32)
    return FrameStatus.GOOD, np.stack(reduce_frame(flux, plan, flux_err))


def _survey_of(ffis: xr.Dataset) -> pd.DataFrame:
    """Table of frames of a Dataset of FFIs."""
    n = ffis.sizes["time"]
    columns = {
        name: ffis[name].to_numpy() if name in ffis.variables else default
        for name, default in (
            ("time", np.arange(n, dtype=np.float64)),
            ("quality", np.zeros(n, dtype=np.int64)),
            ("frame_status", np.zeros(n, dtype=np.int64)),
            ("ffi", np.array([f"frame {i}" for i in range(n)], dtype=object)),
            ("url", np.array([""] * n, dtype=object)),
        )
    }
    survey = pd.DataFrame(columns).rename(columns={"frame_status": "status"})
    survey["reason"] = ""
    survey["status"] = survey["status"].astype(np.int64)
    if "level" in ffis.variables:
        survey["level"] = ffis["level"].to_numpy()
    return survey


def _scene_of(ffis: xr.Dataset, survey: pd.DataFrame, options: Options) -> Scene:
    """Choose the dark frames of a Dataset and combine them."""
    survey = survey.assign(excess=_excess_of(ffis, survey))
    dark = choose_dark(survey, options.dark_frames)
    noise_frames = choose_noise_frames(survey, dark)
    stack = np.ascontiguousarray(ffis["flux"].isel(time=dark).compute().to_numpy(), dtype=np.float32)
    noise = None
    if "flux_err" in ffis:
        sample = ffis[["flux", "flux_err"]].isel(time=noise_frames).compute()
        noise = noise_of(*(sample[name].to_numpy()[:, ::7, ::7] for name in ("flux", "flux_err")))
    if noise is None:
        exposure = float(np.median(np.diff(ffis["time"]))) if ffis.sizes["time"] > 1 else 1800 / 86400
        noise = expected_noise(exposure)
    first = int(ffis["column"][0]) - FIRST_SCIENCE_COLUMN if "column" in ffis.coords else 0
    scene = make_scene(
        stack,
        noise,
        options=options.mask,
        first_column=first,
        dark_frames=tuple(str(name) for name in survey["ffi"].to_numpy()[dark]),
    )
    del stack  # it is large
    bright = ffis["flux"].isel(time=choose_bright_frames(survey, dark)).compute().to_numpy()
    return with_response(scene, list(bright.astype(np.float32)), options=options.mask, first_column=first)


def noise_of(flux: Floats, flux_err: Floats) -> tuple[float, float] | None:
    """Fit the noise law to pixels of a few frames; None where they do not say."""
    try:
        return fit_noise(flux, flux_err)
    except ValueError:
        return None


def choose_noise_frames(survey: pd.DataFrame, dark: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
    """Two dark and two bright good frames, to fit the noise law to."""
    excess = survey["excess"].where(survey["status"] == FrameStatus.GOOD).to_numpy(dtype=np.float64)
    order = excess.argsort()
    order = order[np.isfinite(excess[order])]
    return np.unique([*dark[:2], *order[-2:]])


def choose_bright_frames(survey: pd.DataFrame, dark: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
    """Two good frames full of light but not blown out, to measure the response of columns over straps."""
    excess = survey["excess"].to_numpy(dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        far = np.abs(np.log(excess / BRIGHT_LEVEL))
    far[dark] = np.nan
    order = np.argsort(far)
    return np.sort(order[np.isfinite(far[order])][:2])


def _excess_of(ffis: xr.Dataset, survey: pd.DataFrame) -> npt.NDArray[np.float64]:
    """How bright each frame is, from bands of its file where there is one, else from `flux`."""
    # As in a job, whose survey is finished before frames are rejected.
    good = survey["status"].isin([FrameStatus.GOOD, FrameStatus.REJECTED]).to_numpy()
    excess = np.full(len(survey), np.nan)
    if not good.any():
        return excess
    if (survey["url"][good] != "").all():
        frames = survey[good][["ffi", "url"]].assign(
            sector=ffis.attrs["sector"],
            camera=ffis.attrs["camera"],
            ccd=ffis.attrs["ccd"],
            start=survey["time"],
        )
        source = json.loads(ffis.attrs.get("source_options", "{}"))
        levels = finish_survey([survey_frames(frames, storage_options=source)])
        excess[good] = levels.set_index("url")["excess"].reindex(frames["url"]).to_numpy()
    else:
        step = max(ffis.sizes["y"] // 64, 1)
        sample = ffis["flux"].isel(y=slice(None, None, step), x=slice(None, None, step)).data
        level = np.asarray(da.nanmedian(da.asarray(sample).rechunk((1, -1, -1)), axis=(1, 2)))
        excess[good & (level != 0)] = level[good & (level != 0)]
    return excess


def static_variables(plan: Plan) -> dict[str, xr.Variable]:
    """Variables on (y, x) that follow from the mask."""
    counts = plan.n_pixels
    return {
        "n_pixels": xr.Variable(
            ("y", "x"),
            counts.astype("u2"),
            {"units": "1", "long_name": "unmasked pixels in the bin"},
        ),
        "scene_err": xr.Variable(
            ("y", "x"),
            plan.scene_error,
            {
                "units": UNITS,
                "long_name": "part of scattered_light_err that is common to all frames",
                "comment": "error of the scene. Differences between frames are free of it: their variance is "
                "the sum of scattered_light_err squared less twice scene_err squared",
            },
        ),
        "filled": xr.Variable(
            ("y", "x"),
            (counts == 0).astype("u1"),
            {
                "long_name": "bin without unmasked pixels, filled from its neighbours",
                "flag_values": np.array([0, 1], dtype="u1"),
                "flag_meanings": "measured filled",
            },
        ),
    }


def add_sky(ds: xr.Dataset, options: Options, *, maps: bool = True) -> xr.Dataset:
    """Add the angles of Earth, Moon and Sun to light, or say in the attribute `angles` why there are none.

    Parameters
    ----------
    ds : xarray.Dataset
        With `time`, `row`, `column`, and the attributes `sector`, `camera`, `ccd`, `wcs`.
    options : Options
    maps : bool
        Add the maps on (time, y, x) too, lazily.
    """
    from tessbkg import geometry  # noqa: PLC0415 (astropy is slow to import)

    if not options.angles:
        return ds.assign_attrs(angles="none: not asked for")
    try:
        if maps:
            sky = geometry.angles(ds, ephemeris=options.ephemeris)
        else:
            about = geometry.geometry(
                ds["time"].to_numpy(),
                wcs=ds.attrs["wcs"] or None,
                row=ds["row"].to_numpy(),
                column=ds["column"].to_numpy(),
                **{name: ds.attrs[name] for name in ("sector", "camera", "ccd")},
                ephemeris=options.ephemeris,
            )
            sky = ds.merge(about.drop_vars("time"), combine_attrs="override").assign_attrs(about.attrs)
    except (TessbkgError, ValueError) as error:
        logger.warning("no angles: %s", error)
        return ds.assign_attrs(angles=f"none: {error}")
    # JSON knows no NaN: what could not be measured is left out.
    sky.attrs = {k: v for k, v in sky.attrs.items() if not isinstance(v, float) or np.isfinite(v)}
    return sky.assign_attrs(angles="Earth, Moon and Sun")


def describe(ds: xr.Dataset, options: Options, dark_frames: tuple[str, ...]) -> xr.Dataset:
    """Give variables and Dataset their attributes."""
    import tessbkg  # noqa: PLC0415 (the version is at the top)

    ds["scattered_light"].attrs = {
        "units": UNITS,
        "long_name": "scattered light",
        "comment": "per FFI pixel, above the static scene that the dark frames show",
        "ancillary_variables": "scattered_light_err scene_err n_pixels filled",
    }
    ds["scattered_light_err"].attrs = {
        "units": UNITS,
        "long_name": "one-sigma error of scattered_light",
        "comment": "noise of the frame, of moved stars and of structure within the bin, and error of the "
        "scene. The last is common to all frames: it does not average out in time, see scene_err",
    }
    identity = {name: ds.attrs[name] for name in ("sector", "camera", "ccd", "wcs") if name in ds.attrs}
    title = "TESS scattered light"
    if {"sector", "camera", "ccd"} <= identity.keys():
        title += f" of {CCD(identity['sector'], identity['camera'], identity['ccd'])}"
    ds.attrs = {
        "title": title,
        **identity,
        "bin": options.bin,
        "statistic": options.statistic,
        "options": json.dumps(options.as_dict(), default=_plain),
        "dark_frames": " ".join(dark_frames),
        "mask_bits": ", ".join(f"{bit.value} {str(bit.name).lower()}" for bit in Mask),
        "source": f"tessbkg {tessbkg.__version__}",
        "Conventions": "CF-1.11",
    }
    return ds
