"""The FFIs of a CCD as one lazy xarray Dataset: opening reads headers, indexing reads frames."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal

import dask.array as da
import numpy as np
import numpy.typing as npt
import pandas as pd
import xarray as xr
from dask.base import tokenize

from tessbkg.catalog import ROOT, list_ffis, single_ccd
from tessbkg.ccd import CCD, Quality
from tessbkg.errors import FFIReadError
from tessbkg.ffi import FrameStatus, read_errors_from, read_ffi_from, read_header_text
from tessbkg.storage import Options, check_options, filesystem, source_options
from tessbkg.survey import finish_survey, survey_frames, wcs_frames

logger = logging.getLogger(__name__)

OnError = Literal["flag", "raise"]

TIME_ATTRS: Final = {
    "standard_name": "time",
    "long_name": "mid-exposure at the spacecraft",
    "units": "d",
    "comment": "TESS Julian Date: JD - 2457000, TDB; a plain number, not a CF time",
    "axis": "T",
}


def check_on_error(on_error: str) -> None:
    """Refuse anything but "flag" and "raise"."""
    if on_error not in {"flag", "raise"}:
        raise ValueError(f"on_error={on_error!r} is unknown: allowed are 'flag' and 'raise'")


def open_ffis(
    files: str | Iterable[str] | pd.DataFrame | None = None,
    *,
    sector: int | None = None,
    camera: int | None = None,
    ccd: int | None = None,
    root: str = ROOT,
    storage_options: Options | None = None,
    on_error: OnError = "flag",
    cache: str | None = None,
) -> xr.Dataset:
    """Open the FFIs of one CCD lazily.

    Opening lists the folders (a few dozen requests) and reads 32 kB of header per frame: 41 MB for a
    sector of 30-minute frames, 375 MB for one of 200-second frames. Give `cache` to do that once.
    No pixel is read before it is needed; then each frame costs one GET of 17.5 MB, and as much again for
    `flux_err`.

    Parameters
    ----------
    files : str, iterable of str or pandas.DataFrame, optional
        Instead of a listing: paths or URLs, a glob, a folder, or a table of :func:`tessbkg.list_ffis`.
    sector, camera, ccd : int
        Which CCD. Optional with `files` that are of one CCD.
    root : str
        URL of the folder that holds `ffi/`.
    storage_options : dict, optional
        fsspec options; reading from S3 is anonymous by default. Never credentials.
    on_error : {"flag", "raise"}
        What an unreadable frame does: become NaN with a `frame_status`, or stop with its error.
    cache : str, optional
        CSV file (path or URL) that keeps what the headers say; used again while it lists the same files.

    Returns
    -------
    xarray.Dataset
        `flux`, `flux_err` : (time, y, x) float32, electron s-1, dask arrays of one frame a chunk;
        `frame_status` : (time,) uint8, as far as the headers tell; coordinates `time` (TJD at the
        spacecraft, TDB), `btjd`, `barycorr`, `cadence`, `quality`, `ffi`, `url` on time; `y`, `x`
        (0-based science pixels), `row`, `column` (1-based FFI pixels).

    Raises
    ------
    CatalogError
        If nothing is found.
    FFIReadError
        If no header can be read, or with `on_error="raise"` if one cannot.
    ValueError
        If an argument is wrong or the files are of several CCDs.

    Examples
    --------
    >>> import tessbkg.simulate
    >>> _ = tessbkg.simulate.simulate("memory://open", frames=3, shape=(64, 64))
    >>> ffis = open_ffis(sector=1, camera=1, ccd=4, root="memory://open")
    >>> ffis.flux.shape
    (3, 64, 64)
    """
    check_on_error(on_error)
    options = check_options(storage_options)
    if isinstance(files, pd.DataFrame):
        frames = files
    else:
        frames = list_ffis(files, sector=sector, camera=camera, ccd=ccd, root=root, storage_options=options)
    identity = single_ccd(frames)
    survey = _headers(frames, options, cache)
    broken = survey[survey["status"] != FrameStatus.GOOD]
    if on_error == "raise" and not broken.empty:
        raise FFIReadError(broken.iloc[0]["url"], broken.iloc[0]["reason"])
    return stack(survey, identity, options, on_error)


def _headers(frames: pd.DataFrame, options: Options, cache: str | None) -> pd.DataFrame:
    """Survey headers, or take them from the cache if that is of the same files."""
    if cache is not None:
        fs, path = filesystem(cache, {})
        if fs.exists(path):
            with fs.open(path, "r") as file:
                survey = _typed(pd.read_csv(file, dtype=str, keep_default_na=False))
            if set(survey.get("url", ())) == set(frames["url"]):
                return survey
    survey = finish_survey([survey_frames(frames, bands=False, storage_options=options)])
    if cache is not None:
        with fs.open(path, "w") as file:
            survey.to_csv(file, index=False, na_rep="nan")
    return survey


def _typed(text: pd.DataFrame) -> pd.DataFrame:
    """Give columns of text their types; numbers come back to the last bit, in every version of pandas."""
    for name in text.columns.difference(["ffi", "url", "reason"]):
        whole = text[name].str.fullmatch(r"-?\d+").all()
        text[name] = text[name].astype(np.int64 if whole else np.float64)
    return text


def stack(survey: pd.DataFrame, ccd: CCD, options: Options, on_error: OnError) -> xr.Dataset:
    """Make the lazy Dataset of a survey."""
    common = survey[survey["status"] == FrameStatus.GOOD]
    common = survey[survey["rows"] > 0] if common.empty else common
    shape = (int(common["rows"].iloc[0]), int(common["columns"].iloc[0]))
    urls = da.from_array(survey["url"].to_numpy(dtype=object), chunks=1, name=False)
    ends = da.from_array(survey["end"].to_numpy(), chunks=1, name=False)
    readable = da.from_array((survey["status"] == FrameStatus.GOOD).to_numpy(), chunks=1, name=False)

    def lazy(what: str) -> da.Array:
        array: da.Array = da.map_blocks(
            _read_block,
            urls[:, None, None],
            ends[:, None, None],
            readable[:, None, None],
            what=what,
            ccd=ccd,
            shape=shape,
            options=dict(options),
            on_error=on_error,
            dtype=np.float32,
            meta=np.empty((0, 0, 0), dtype=np.float32),
            chunks=(urls.chunks[0], (shape[0],), (shape[1],)),
            name=f"ffi-{what}-" + tokenize(survey["url"].tolist(), dict(options), what, on_error),
        )
        return array

    attrs: dict[str, Any] = {
        "title": f"TESS calibrated full frame images of {ccd}",
        "sector": ccd.sector,
        "camera": ccd.camera,
        "ccd": ccd.ccd,
        "Conventions": "CF-1.11",
        "wcs": reference_wcs(survey, options),
        "source_options": json.dumps(dict(options)),
    }
    dims = ("time", "y", "x")
    along_time = frame_coordinates(survey)
    return xr.Dataset(
        {
            "flux": (dims, lazy("flux"), {"units": "electron s-1", "long_name": "calibrated flux"}),
            "flux_err": (
                dims,
                lazy("flux_err"),
                {"units": "electron s-1", "long_name": "one-sigma uncertainty of flux"},
            ),
            "frame_status": along_time.pop("frame_status"),
        },
        coords={**along_time, **pixel_coordinates(survey, shape)},
        attrs=attrs,
    )


def reference_wcs(survey: pd.DataFrame, options: Options) -> str:
    """Flux header of a frame with the median WCS, as text; empty when no frame has a WCS.

    Of a few such frames the first is taken whose WCS has the shape of the camera; the first of all if
    none has.
    """
    from tessbkg.geometry import MAX_MISFIT, camera_frame  # noqa: PLC0415 (astropy is slow to import)

    headers = []
    for url in wcs_frames(survey):
        fs, path = filesystem(url, source_options(url, options))
        try:
            headers.append(read_header_text(fs, path))
            if camera_frame(headers[-1])[1] <= MAX_MISFIT:
                return headers[-1]
        except (FFIReadError, ValueError) as error:
            logger.warning("no WCS from %s: %s", url, error)
    return headers[0] if headers else ""


def _read_block(
    urls: npt.NDArray[np.object_],
    ends: npt.NDArray[np.int64],
    readable: npt.NDArray[np.bool_],
    *,
    what: str,
    ccd: CCD,
    shape: tuple[int, int],
    options: Options,
    on_error: OnError,
) -> npt.NDArray[np.float32]:
    """Read the frames of one dask block; a frame that is known or found to be broken is NaN."""
    block = np.full((len(urls), *shape), np.nan, dtype=np.float32)
    for i, (url, end, good) in enumerate(zip(urls[:, 0, 0], ends[:, 0, 0], readable[:, 0, 0], strict=True)):
        if not good:
            continue
        fs, path = filesystem(url, source_options(url, options))
        try:
            if what == "flux":
                image = read_ffi_from(fs, path, end=int(end), ccd=ccd).flux
            else:
                image = read_errors_from(fs, path, ccd=ccd)
            if image.shape != shape:
                raise FFIReadError(path, f"{image.shape} science pixels where others have {shape}")
        except FFIReadError as error:
            if on_error == "raise":
                raise
            logger.warning("%s", error)
        else:
            block[i] = image
    return block


def frame_coordinates(survey: pd.DataFrame) -> dict[str, xr.Variable]:
    """Variables along time, with attributes: the coordinates and `frame_status`."""
    flags = list(Quality)
    status = [s for s in FrameStatus if s is not FrameStatus.NOT_WRITTEN]

    def column(name: str, dtype: str, **attrs: Any) -> xr.Variable:
        return xr.Variable("time", survey[name].to_numpy().astype(dtype), attrs)

    coordinates = {
        "time": column("time", "f8", **TIME_ATTRS),
        "barycorr": column(
            "barycorr", "f8", units="d", long_name="barycentric time minus spacecraft time at the CCD centre"
        ),
        "cadence": column("cadence", "i4", long_name="cadence number (FFIINDEX)"),
        "quality": column(
            "quality",
            "i4",
            long_name="data quality flags (DQUALITY)",
            flag_masks=np.array([flag.value for flag in flags], dtype="i4"),
            flag_meanings=" ".join(str(flag.name).lower() for flag in flags),
        ),
        "frame_status": column(
            "status",
            "u1",
            long_name="what became of the frame",
            flag_values=np.array([s.value for s in status], dtype="u1"),
            flag_meanings=" ".join(s.name.lower() for s in status),
        ),
        "ffi": xr.Variable(
            "time", survey["ffi"].to_numpy(dtype=object), {"long_name": "file name of the FFI"}
        ),
        "url": xr.Variable(
            "time", survey["url"].to_numpy(dtype=object), {"long_name": "where the FFI was read"}
        ),
    }
    btjd = coordinates["time"].to_numpy() + coordinates["barycorr"].to_numpy()
    coordinates["btjd"] = xr.Variable(
        "time",
        btjd,
        {
            "units": "d",
            "long_name": "mid-exposure at the solar-system barycentre, for the CCD centre",
            "comment": "JD - 2457000, TDB",
        },
    )
    if "level" in survey and survey["level"].notna().any():
        coordinates["level"] = column(
            "level", "f4", units="electron s-1", long_name="median background of the frame"
        )
    return coordinates


def pixel_coordinates(survey: pd.DataFrame, shape: tuple[int, int]) -> dict[str, xr.Variable]:
    """Coordinates of `shape` science pixels."""
    first = survey[survey["rows"] > 0].iloc[0]
    coordinates = {}
    for dim, name, start, n in (
        ("y", "row", int(first["first_row"]), shape[0]),
        ("x", "column", int(first["first_column"]), shape[1]),
    ):
        index = np.arange(n, dtype=np.float64)
        coordinates[dim] = xr.Variable(
            dim,
            index,
            {"units": "pixel", "long_name": f"science {name}, 0-based", "axis": dim.upper()},
        )
        coordinates[name] = xr.Variable(
            dim, index + start, {"units": "pixel", "long_name": f"FFI {name}, 1-based as in the FITS header"}
        )
    return coordinates


def bin_coordinates(pixels: Mapping[Any, Any], size: int) -> dict[str, xr.Variable]:
    """Centres of bins of `size` pixels: the means of the coordinates of their pixels."""
    coordinates = {}
    for name, coordinate in pixels.items():
        if coordinate.dims in {("y",), ("x",)}:
            n = coordinate.size // size
            centre = coordinate.to_numpy()[: n * size].reshape(n, size).mean(axis=1)
            coordinates[str(name)] = xr.Variable(coordinate.dims, centre, coordinate.attrs)
    return coordinates
