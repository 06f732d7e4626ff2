"""Target pixel files and cutouts freed of scattered light.

Conventions, each checked on real files: the physical WCS keywords of a target pixel file (1CRVnP, 2CRVnP)
are 1-based FFI column and row of the centre of its first pixel; TIME is barycentric for the target and
TIMECORR is what was added, so TIME - TIMECORR is time at the spacecraft. CADENCENO is never trusted: it is
zero in TESScut files, counts 2 minutes in target pixel files, and lightkurve counts from zero where it finds
zeros.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import xarray as xr

from tessbkg.evaluation import MAX_GAP, Gaps, Method, evaluate, frame_spacing
from tessbkg.storage import filesystem

Floats = npt.NDArray[np.float64]
Match = Literal["auto", "cadence", "time"]

SNAP: Final = 0.1
"""A file whose times lie within this part of a frame spacing of the frames' own (median) is of the same FFIs:
each of its times then takes its frame as it is. Times of early TESScut files jitter by 8 s."""


@dataclass(frozen=True, eq=False)
class Pixels:
    """A time series of an image and where it comes from.

    Parameters
    ----------
    flux : (t, y, x) float, electron s-1
    flux_err : (t, y, x) float, or None
    row, column : (y,) and (x,) float64
        1-based FFI coordinates.
    label : (t,) float64
        Times as the source has them.
    time : (t,) float64, or None
        At the spacecraft, TJD.
    cadence : (t,) int, or None
        FFIINDEX.
    quality : (t,) int, or None
    identity : dict
        Sector, camera, CCD, as far as they are known.
    """

    flux: npt.NDArray[Any]
    flux_err: npt.NDArray[Any] | None
    row: Floats
    column: Floats
    label: Floats
    time: Floats | None
    cadence: npt.NDArray[Any] | None
    quality: npt.NDArray[Any] | None
    identity: dict[str, int]


def correct(
    tpf: Any,
    ds: xr.Dataset,
    *,
    time: npt.ArrayLike | None = None,
    cadence: npt.ArrayLike | None = None,
    row: npt.ArrayLike | None = None,
    column: npt.ArrayLike | None = None,
    match: Match = "auto",
    method: Method = "cubic",
    gaps: Gaps = "nan",
    max_gap: float = MAX_GAP,
) -> xr.Dataset:
    """Subtract the scattered light from a target pixel file, a cutout or an array.

    Parameters
    ----------
    tpf : lightkurve.TargetPixelFile, str, pathlib.Path, astropy.io.fits.HDUList or (t, y, x) array
        A file is a TESScut cutout or a target pixel file, anywhere fsspec reads. Flux in electron s-1. An
        xarray.DataArray with the coordinates `time` (TJD at the spacecraft), `row` and `column`, such as a
        part of ``open_ffis(...).flux``, says itself where and when it is.
    ds : xarray.Dataset
        Light of the same sector, camera and CCD.
    time : (t,) array_like, optional
        TJD at the spacecraft, in place of the file's own; needed with a bare array unless `cadence` is given.
    cadence : (t,) array_like of int, optional
        FFIINDEX of every image, in place of the file's own.
    row, column : int or array_like, optional
        1-based FFI row and column of the first pixel, or of every row and column of the images; needed with
        a bare array.
    match : {"auto", "cadence", "time"}
        How images find their frames: by FFIINDEX, or by time at the spacecraft. By default by FFIINDEX where
        it is given or the file has such a column (TESScut has none), else by time.
    method, gaps, max_gap
        As in :func:`tessbkg.evaluate`.

    Returns
    -------
    xarray.Dataset
        `flux` (corrected), `flux_err` (with the error of the light, where the source has errors),
        `scattered_light`, `scattered_light_err` : (time, y, x); `kind` (time) as of `evaluate`;
        coordinates `time` as the source has it, `spacecraft_time`, `row`, `column`, `quality`.
        In lightkurve, ``tpf - result.scattered_light.values`` is the corrected target pixel file.

    Raises
    ------
    ValueError
        If the source is of another CCD, lies outside the data, or lacks what is needed.

    Warns
    -----
    UserWarning
        If a background was already subtracted from the flux (2-minute target pixel files).

    Examples
    --------
    >>> import tessbkg, tessbkg.simulate
    >>> _ = tessbkg.simulate.simulate("memory://co", frames=6, step=1, shape=(64, 64))
    >>> _ = tessbkg.build("memory://co.zarr", sector=1, camera=1, ccd=4, root="memory://co", dark_frames=2)
    >>> ds = tessbkg.open_background("memory://co.zarr", sector=1, camera=1, ccd=4)
    >>> ffis = tessbkg.open_ffis(sector=1, camera=1, ccd=4, root="memory://co")
    >>> clean = correct(ffis.flux[:, 20:31, 30:41], ds)
    >>> clean.flux.shape
    (6, 11, 11)
    """
    if match not in {"auto", "cadence", "time"}:
        raise ValueError(f"match={match!r} is unknown: allowed are 'auto', 'cadence' and 'time'")
    source = _with(_read(tpf), time, cadence, row, column)
    for name, number in source.identity.items():
        if name in ds.attrs and int(ds.attrs[name]) != number:
            raise ValueError(f"the pixels are of {name} {number}, the light of {name} {ds.attrs[name]}")
    light = evaluate(
        ds,
        row=source.row[:, None],
        column=source.column[None, :],
        method=method,
        gaps=gaps,
        max_gap=max_gap,
        **_when(source, ds, match),
    ).load()
    return _subtract(source, light)


def _when(source: Pixels, ds: xr.Dataset, match: Match) -> dict[str, Any]:
    """Say when the images were taken, as an argument of `evaluate`."""
    if match == "cadence" and source.cadence is None:
        raise ValueError("match='cadence' needs FFIINDEX: the source has no such column, give cadence")
    if match != "time" and source.cadence is not None:
        return {"cadence": source.cadence}
    if source.time is None:
        raise ValueError("the source has no spacecraft times (TIME and TIMECORR): give time or cadence")
    return {"time": _snap(source.time, ds)}


def _subtract(source: Pixels, light: xr.Dataset) -> xr.Dataset:
    """Put pixels and light into one dataset."""
    dims = ("time", "y", "x")
    units = {"units": "electron s-1"}
    data: dict[str, Any] = {
        "flux": (
            dims,
            source.flux - light["scattered_light"].to_numpy(),
            {**units, "long_name": "flux without scattered light"},
        )
    }
    if source.flux_err is not None:
        total = np.hypot(source.flux_err, light["scattered_light_err"].to_numpy())
        data["flux_err"] = (
            dims,
            total,
            {**units, "long_name": "one-sigma error of flux", "comment": "with the error of the light"},
        )
    for name in ("scattered_light", "scattered_light_err"):
        data[name] = (dims, light[name].to_numpy(), light[name].attrs)
    data["kind"] = light["kind"].variable
    coords: dict[str, Any] = {
        "time": ("time", source.label, {"units": "d", "long_name": "time as the source has it"}),
        "row": ("y", source.row, {"units": "pixel", "long_name": "FFI row, 1-based"}),
        "column": ("x", source.column, {"units": "pixel", "long_name": "FFI column, 1-based"}),
    }
    if source.time is not None:
        coords["spacecraft_time"] = (
            "time",
            source.time,
            {"units": "d", "long_name": "time at the spacecraft, TJD, TDB"},
        )
    for name, values in (("cadence", source.cadence), ("quality", source.quality)):
        if values is not None:
            coords[name] = ("time", values)
    return xr.Dataset(data, coords, light.attrs)


def _snap(time: Floats, ds: xr.Dataset) -> Floats:
    """Take the frames' own times for those of the same frames."""
    frames = np.sort(ds["time"].to_numpy())
    frames = frames[np.isfinite(frames)]
    known = np.isfinite(time)
    if not len(frames) or not known.any():
        return time
    after = np.clip(np.searchsorted(frames, time), 1, max(len(frames) - 1, 1))
    before = frames[after - 1]
    after_time = frames[np.minimum(after, len(frames) - 1)]
    nearest = np.where(np.abs(time - before) <= np.abs(after_time - time), before, after_time)
    apart = np.abs(time - nearest) / frame_spacing(frames)
    if np.median(apart[known]) > SNAP:
        return time
    return np.where(known & (apart < 0.5), nearest, time)


# ------------------------------------------------------------------ sources


def _with(
    source: Pixels,
    time: npt.ArrayLike | None,
    cadence: npt.ArrayLike | None,
    row: npt.ArrayLike | None,
    column: npt.ArrayLike | None,
) -> Pixels:
    """Put what the caller says in place of what the source says, and check the shapes."""
    flux = source.flux
    if flux.ndim != 3:
        raise ValueError(f"flux has shape {flux.shape}: it must be (time, y, x)")
    times, cadences = source.time, source.cadence
    if time is not None:
        times, cadences = np.asarray(time, dtype=np.float64), None
    if cadence is not None:
        cadences = np.asarray(cadence)
    for name, values in (("time", times), ("cadence", cadences)):
        if values is not None and values.shape != (len(flux),):
            raise ValueError(f"{name} has shape {values.shape}: there are {len(flux)} images")
    label = source.label
    if label.shape != (len(flux),):
        label = times if times is not None else np.full(len(flux), np.nan)
    return replace(
        source,
        row=_place("row", row, source.row, flux.shape[1]),
        column=_place("column", column, source.column, flux.shape[2]),
        label=label,
        time=times,
        cadence=cadences,
    )


def _place(name: str, given: npt.ArrayLike | None, own: Floats, size: int) -> Floats:
    """FFI coordinates of the rows or the columns of the images."""
    values = own if given is None else np.asarray(given, dtype=np.float64)
    if values.ndim == 0:
        values = values + np.arange(size)
    if values.shape != (size,):
        if given is None:
            raise ValueError(f"the source does not say where it is: give {name}, 1-based FFI coordinates")
        raise ValueError(f"{name} has shape {values.shape}: it must be one number or ({size},)")
    return values


def _read(tpf: Any) -> Pixels:
    """Take pixels, times and places out of any source."""
    from astropy.io import fits  # noqa: PLC0415 (slow to import)

    if isinstance(tpf, str | Path):
        fs, path = filesystem(str(tpf))
        with fs.open(path, "rb") as file, fits.open(file, memmap=False) as hdus:
            return _of_hdus(hdus, str(tpf))
    if isinstance(tpf, fits.HDUList):
        return _of_hdus(tpf, "the HDUList")
    if isinstance(tpf, xr.DataArray) and {"time", "row", "column"} <= set(tpf.coords):
        return _of_frames(tpf)
    if all(hasattr(tpf, name) for name in ("flux", "time", "row", "column")):
        return _of_lightkurve(tpf)
    flux = np.asarray(tpf)
    if flux.dtype.kind not in "fiu":
        raise ValueError(
            f"{type(tpf).__name__} is not something to correct: allowed are a lightkurve TargetPixelFile, "
            "a FITS file and an array (time, y, x)"
        )
    nothing = np.empty(0)
    return Pixels(flux, None, nothing, nothing, nothing, None, None, None, {})


def _of_frames(flux: xr.DataArray) -> Pixels:
    """Take a part of frames as `open_ffis` has them."""
    time, row, column = (flux[name].to_numpy().astype(np.float64) for name in ("time", "row", "column"))
    quality = flux["quality"].to_numpy() if "quality" in flux.coords else None
    return Pixels(
        flux.to_numpy(), None, np.atleast_1d(row), np.atleast_1d(column), time, time, None, quality, {}
    )


def _identity(header: Any) -> dict[str, int]:
    return {
        name.lower(): int(header[name])
        for name in ("SECTOR", "CAMERA", "CCD")
        if isinstance(header.get(name), int)
    }


def _of_hdus(hdus: Any, name: str) -> Pixels:
    """Read a target pixel file."""
    table = next((hdu for hdu in hdus if "FLUX" in (getattr(hdu, "columns", None) or _NO).names), None)
    if table is None or "TIME" not in table.columns.names:
        raise ValueError(f"{name} is not a target pixel file: it has no table with TIME and FLUX")
    columns = {one.upper(): native(table.data[one]) for one in table.columns.names if one != "FFI_FILE"}
    flux = columns["FLUX"]
    if np.any(np.nan_to_num(columns.get("FLUX_BKG", np.zeros(1))) != 0):
        warnings.warn(f"{name}: a background was already subtracted from FLUX (see FLUX_BKG)", stacklevel=4)
    number = [one.upper() for one in table.columns.names].index("FLUX") + 1
    corner = [_corner(table.header, axis, number) for axis in (1, 2)]
    label = columns["TIME"].astype(np.float64)
    time = None
    if "TIMECORR" in columns:
        time = label - columns["TIMECORR"].astype(np.float64)
    elif str(table.header.get("TIMEREF", "")).strip().upper() == "LOCAL":
        time = label
    return Pixels(
        flux,
        columns.get("FLUX_ERR"),
        _places(corner[1], flux.shape[1]),
        _places(corner[0], flux.shape[2]),
        label,
        time,
        columns.get("FFIINDEX"),
        columns.get("QUALITY"),
        _identity(hdus[0].header),
    )


class _NO:
    names = ()


def _corner(header: Any, axis: int, number: int) -> float | None:
    """FFI coordinate of the first pixel along an axis of a table column; None if it is not said."""
    value = header.get(f"{axis}CRV{number}P")
    if value is None:
        return None
    reference = float(header.get(f"{axis}CRP{number}P") or 1)
    step = float(header.get(f"{axis}CDL{number}P") or 1)
    return float(value) + (1 - reference) * step


def _places(corner: float | None, size: int) -> Floats:
    return np.empty(0) if corner is None else corner + np.arange(size, dtype=np.float64)


def _of_lightkurve(tpf: Any) -> Pixels:
    """Read an object that has what a lightkurve TargetPixelFile has."""
    flux = _plain(tpf.flux)
    label = _plain(getattr(tpf.time, "value", tpf.time)).astype(np.float64)
    if len(label) and np.nanmedian(label) > 2400000:
        label = label - 2457000
    time = cadence = None
    header: Any = {}
    hdus = getattr(tpf, "hdu", None)
    if hdus is not None:
        header, table = hdus[0].header, hdus[1]
        names = {one.upper() for one in table.columns.names}
        # the table has all rows, the object those that its quality mask keeps
        kept = getattr(tpf, "quality_mask", slice(None))
        if "TIMECORR" in names:
            correction = native(table.data["TIMECORR"])[kept].astype(np.float64)
            if correction.shape != label.shape:
                raise ValueError("the pixels and their table have different lengths: give time or cadence")
            time = label - correction
        if "FFIINDEX" in names:
            cadence = native(table.data["FFIINDEX"])[kept]
        if "FLUX_BKG" in names and np.any(np.nan_to_num(table.data["FLUX_BKG"]) != 0):
            warnings.warn("a background was already subtracted from flux (see flux_bkg)", stacklevel=4)
    error = getattr(tpf, "flux_err", None)
    quality = getattr(tpf, "quality", None)
    return Pixels(
        flux,
        None if error is None else _plain(error),
        _places(float(tpf.row), flux.shape[1]),
        _places(float(tpf.column), flux.shape[2]),
        label,
        time,
        cadence,
        None if quality is None else native(np.asarray(quality)),
        _identity(header) or _numbers(tpf),
    )


def _numbers(tpf: Any) -> dict[str, int]:
    return {
        name: int(getattr(tpf, name))
        for name in ("sector", "camera", "ccd")
        if isinstance(getattr(tpf, name, None), int | np.integer)
    }


def _plain(values: Any) -> npt.NDArray[Any]:
    """Values without unit and mask; masked ones are NaN."""
    values = getattr(values, "value", values)
    if np.ma.isMaskedArray(values) or hasattr(values, "unmasked"):
        filled: npt.NDArray[Any] = np.ma.filled(np.ma.asarray(values).astype(np.float64), np.nan)
        return filled
    return native(np.asarray(values))


def native(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return an array in the byte order of this machine."""
    return np.asarray(values).astype(values.dtype.newbyteorder("="), copy=False)
