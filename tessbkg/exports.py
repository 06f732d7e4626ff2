"""The light in other formats: npz and FITS with the names and layout of tess-backml, and NetCDF.

tess-backml's users can switch by changing a file name; what its names mean is kept, what they hold is right:
angles, azimuths and sizes differ from pixel to pixel, and the Moon's are the Moon's.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import xarray as xr

from tessbkg.evaluation import frame_spacing, good_frames
from tessbkg.storage import Options, filesystem
from tessbkg.store import open_background

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Format = Literal["npz", "fits", "netcdf"]

JD: Final = 2457000

NPZ_COMMENT: Final = (
    "Keys as in tess-backml. scatter_cube: scattered light, electron s-1 per pixel, (time, row, column), "
    "good frames only. time: JD (TDB) at the solar-system barycentre for the CCD centre; time_spacecraft: JD "
    "(TDB) at TESS. *_alt: angle of the body's centre from the camera boresight (not an altitude), *_az: its "
    "azimuth in the camera frame, 0 .. 360 from x (away from the spacecraft boresight) to y = z cross x; "
    "*_alt_map, *_az_map: the same about the line of sight of every bin; *_dist, *_dist_map: angular "
    "diameter, the same in all bins. All in degrees. row, column: 1-based FFI coordinates of bin centres."
)


def export(
    source: str | xr.Dataset,
    out: str | os.PathLike[str],
    *,
    format: Format,  # noqa: A002 (the public name of this option)
    sector: int | None = None,
    camera: int | None = None,
    ccd: int | None = None,
    store_options: Options | None = None,
) -> None:
    """Write the light of one CCD to a file of another format.

    * ``npz``: keys of tess-backml (`scatter_cube`, `time`, `cadenceno`, `earth_alt` ... `moon_dist_map`), as
      far as the dataset has what they need, and `scatter_err_cube`, `time_spacecraft`, `row`, `column`,
      `pixel_counts`, `comment`. Good frames only. Arrays are written one after the other.
    * ``fits``: layout of tess-backml's cube, which its ``ScatterLightCorrector`` opens. Good frames only.
      That corrector interpolates in time only where the data are binned in time: give it
      ``bin_time(ds, hours=2)``; else it returns the frames themselves. Its grid lies half a pixel beside
      ours.
    * ``netcdf``: the whole dataset, compressed NetCDF 4 by h5netcdf (extra `netcdf`) or netCDF4 where one is
      installed, else NetCDF 3 by SciPy, which has no compression, no unsigned and no 8-byte integers (they
      become larger, or floats).

    Parameters
    ----------
    source : str or xarray.Dataset
        Store, or a dataset opened from one (also binned or selected).
    out : str or path
        File or URL; replaced when it is there.
    format : {"npz", "fits", "netcdf"}
    sector, camera, ccd : int
        Which CCD of a store.
    store_options : dict, optional
        fsspec options of the store and of `out`. Never credentials.

    Raises
    ------
    StoreError
        If the store or the CCD is not there.
    ValueError
        If an argument is wrong or there is no good frame.

    Examples
    --------
    >>> import tessbkg, tessbkg.simulate
    >>> _ = tessbkg.simulate.simulate("memory://ex", frames=6, shape=(64, 64))
    >>> _ = tessbkg.build("memory://ex.zarr", sector=1, camera=1, ccd=4, root="memory://ex", dark_frames=2)
    >>> export("memory://ex.zarr", "memory://light.npz", format="npz", sector=1, camera=1, ccd=4)
    """
    writers: dict[str, Callable[[xr.Dataset, Path], None]] = {
        "npz": _write_npz,
        "fits": _write_fits,
        "netcdf": _write_netcdf,
    }
    if format not in writers:
        raise ValueError(f"format={format!r} is unknown: allowed are {', '.join(writers)}")
    ds = _open(source, sector, camera, ccd, store_options)
    url = os.fspath(out)
    fs, place = filesystem(url, store_options if "://" in url else None)
    local = "file" in np.atleast_1d(fs.protocol)
    folder = Path(place).parent if local else None
    if folder is not None and not folder.is_dir():
        raise ValueError(f"out={url!r}: there is no folder {folder}")
    with tempfile.TemporaryDirectory(prefix=".tessbkg-", dir=folder) as work:
        made = Path(work) / "made"
        writers[format](ds, made)
        if local:
            made.replace(place)
        else:
            fs.put_file(str(made), place)


def _open(
    source: str | xr.Dataset,
    sector: int | None,
    camera: int | None,
    ccd: int | None,
    store_options: Options | None,
) -> xr.Dataset:
    """Open a store, or take a dataset as it is."""
    if isinstance(source, xr.Dataset):
        ds = source
    else:
        if sector is None or camera is None or ccd is None:
            raise ValueError("give sector, camera and ccd: a store holds several")
        ds = open_background(source, sector=sector, camera=camera, ccd=ccd, store_options=store_options)
    if "scattered_light" not in ds or ds["scattered_light"].dims != ("time", "y", "x"):
        raise ValueError("the dataset has no scattered_light(time, y, x)")
    return ds


def _good(ds: xr.Dataset) -> xr.Dataset:
    good = np.flatnonzero(good_frames(ds))
    if not len(good):
        raise ValueError("the dataset has no good frame")
    return ds.isel(time=good)


def _barycentric(ds: xr.Dataset) -> Any:
    """BTJD at the CCD centre; at the spacecraft where the dataset does not know it."""
    return ds["btjd" if "btjd" in ds.variables else "time"].to_numpy()


# ------------------------------------------------------------------ npz


def _write_npz(ds: xr.Dataset, path: Path) -> None:
    """Write arrays one after the other: only one is in memory."""
    with zipfile.ZipFile(path, "w") as archive:
        for key, values in _npz(_good(ds)):
            with archive.open(f"{key}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asarray(values), allow_pickle=False)


def _npz(ds: xr.Dataset) -> Iterator[tuple[str, Any]]:
    """Yield keys and values."""
    yield "scatter_cube", ds["scattered_light"].to_numpy()
    if "scattered_light_err" in ds:
        yield "scatter_err_cube", ds["scattered_light_err"].to_numpy()
    yield "time", _barycentric(ds) + JD
    yield "time_spacecraft", ds["time"].to_numpy() + JD
    for key, name in (
        ("cadenceno", "cadence"),
        ("quality", "quality"),
        ("row", "row"),
        ("column", "column"),
        ("pixel_counts", "n_pixels"),
    ):
        if name in ds.variables:
            yield key, ds[name].to_numpy()
    shape = ds["scattered_light"].shape
    for body in ("earth", "moon"):
        for key, name in (
            ("alt", "boresight_angle"),
            ("az", "boresight_azimuth"),
            ("alt_map", "angle"),
            ("az_map", "azimuth"),
        ):
            if f"{body}_{name}" in ds:
                yield f"{body}_{key}", ds[f"{body}_{name}"].to_numpy()
        if f"{body}_angular_radius" in ds:
            size = 2 * ds[f"{body}_angular_radius"].to_numpy()
            yield f"{body}_dist", size
            yield (
                f"{body}_dist_map",
                np.broadcast_to(size.astype(np.float32)[:, None, None], shape),
            )
    yield "comment", np.array(NPZ_COMMENT)


# ------------------------------------------------------------------ FITS


def _write_fits(ds: xr.Dataset, path: Path) -> None:
    """Write the cube as tess-backml does: its axes are (column, row, time, value and error)."""
    from astropy.io import fits  # noqa: PLC0415 (slow to import)

    import tessbkg  # noqa: PLC0415 (the version is at the top)

    ds = _good(ds)
    time = _barycentric(ds)
    step = frame_spacing(np.sort(time))
    binned = "n_frames" in ds
    n, ny, nx = ds["scattered_light"].shape
    primary = fits.PrimaryHDU()
    header = primary.header
    for key, value, comment in (
        ("OBJECT", "Scatter Light cube", "type of data"),
        ("CREATOR", "tessbkg", "software of origin; layout of tess-backml"),
        ("PROCVER", tessbkg.__version__, "software version"),
        ("TELESCOP", "TESS", "telescope"),
        ("SECTOR", _number(ds, "sector"), "observing sector"),
        ("CAMERA", _number(ds, "camera"), "camera"),
        ("CCD", _number(ds, "ccd"), "CCD"),
        ("TSTART", float(time[0] - step / 2), "BTJD of the beginning of the first frame"),
        ("TSTOP", float(time[-1] + step / 2), "BTJD of the end of the last frame"),
        ("BUNIT", "electron/s", "per FFI pixel"),
        ("PIXBIN", _number(ds, "bin"), "FFI pixels along the side of a bin"),
        ("PIXBINM", str(ds.attrs.get("statistic", "median")), "method of binning in pixel space"),
        ("IMGSIZEX", ny, "bins along rows of the CCD, first axis"),
        ("IMGSIZEY", nx, "bins along columns of the CCD"),
        ("TIMBINS", step * 24, "[h] frame spacing"),
        ("TIMBINM", "mean" if binned else "none", "method of binning in time"),
        ("TIMSIZE", n, "frames"),
        ("ROW1", float(ds["row"][0]), "FFI row of the first bin centre, 1-based"),
        ("COLUMN1", float(ds["column"][0]), "FFI column of the first bin centre, 1-based"),
    ):
        header[key] = (value, comment)
    header["COMMENT"] = "Extension 1, NumPy shape (column, row, time, 2): scattered light and its error."
    header["COMMENT"] = "Extension 3: time is JD (TDB) at the solar-system barycentre for the CCD centre;"
    header["COMMENT"] = "time_spacecraft is JD (TDB) at TESS. Frames that are not good are left out."
    cube = np.empty((2, n, ny, nx), dtype=">f4")
    cube[0] = ds["scattered_light"].to_numpy()
    cube[1] = ds["scattered_light_err"].to_numpy() if "scattered_light_err" in ds else np.nan
    counts = ds["n_pixels"].to_numpy() if "n_pixels" in ds else np.full((ny, nx), -1)
    columns = [
        fits.Column("time", "D", unit="d", array=time + JD),
        fits.Column("time_spacecraft", "D", unit="d", array=ds["time"].to_numpy() + JD),
    ]
    for name, form in (("cadence", "D" if binned else "J"), ("quality", "J")):
        if name in ds.variables:
            columns.append(fits.Column(name, form, array=ds[name].to_numpy()))
    table = fits.BinTableHDU.from_columns(columns, name="TIME")
    table.header["BINNED"] = (binned, "is the cube binned in time")
    image = fits.ImageHDU(cube.T, name="Scatter Light Cube")
    fits.HDUList([primary, image, fits.ImageHDU(counts.astype("i4"), name="Pixel Counts"), table]).writeto(
        path, checksum=True
    )


def _number(ds: xr.Dataset, name: str) -> int:
    if name not in ds.attrs:
        raise ValueError(f"the dataset has no attribute {name!r}")
    return int(ds.attrs[name])


# ------------------------------------------------------------------ NetCDF


def _write_netcdf(ds: xr.Dataset, path: Path) -> None:
    """Write the dataset with what is installed."""
    engine = "scipy"
    # h5netcdf installs without h5py, and then cannot write
    for name, needs in (("netCDF4", ("netCDF4",)), ("h5netcdf", ("h5netcdf", "h5py"))):
        if all(importlib.util.find_spec(one) for one in needs):
            engine = name
    classic = engine == "scipy"
    ds = xr.Dataset(
        {name: _plain(variable.variable, classic=classic) for name, variable in ds.data_vars.items()},
        {name: _plain(variable.variable, classic=classic) for name, variable in ds.coords.items()},
        _plain_attrs(ds.attrs, classic=classic),
    )
    encoding: dict[str, Any] = {}
    if not classic:
        encoding = {
            str(name): {"zlib": True, "complevel": 4, "shuffle": True}
            for name, variable in ds.variables.items()
            if variable.ndim == 3 and variable.dtype.kind == "f"
        }
    ds.to_netcdf(path, engine=engine.lower(), encoding=encoding)  # type: ignore[call-overload]


_CLASSIC: Final = {"uint8": "i2", "uint16": "i4", "uint32": "f8", "int64": "f8", "uint64": "f8", "bool": "i1"}
"""What stands for types that NetCDF 3 lacks; cadence numbers and flags fit."""


def _plain(variable: xr.Variable, *, classic: bool) -> xr.Variable:
    """Variable without encoding, of types that the format has."""
    data: Any = variable.data
    if variable.dtype.kind in "OTU":
        data = np.array([str(one) for one in np.asarray(variable).ravel()], dtype=object).reshape(
            variable.shape
        )
    elif classic and str(variable.dtype) in _CLASSIC:
        data = data.astype(_CLASSIC[str(variable.dtype)])
    return xr.Variable(variable.dims, data, _plain_attrs(variable.attrs, classic=classic))


def _plain_attrs(attrs: Any, *, classic: bool) -> dict[str, Any]:
    """Attributes of types that the format has."""
    out: dict[str, Any] = {}
    for name, value in attrs.items():
        if isinstance(value, bool):
            out[name] = np.int8(value) if classic else int(value)
        elif isinstance(value, str | float | int | np.number):
            out[name] = np.int32(value) if classic and isinstance(value, int) else value
        else:
            values = np.asarray(value)
            if values.dtype.kind not in "fiu":
                out[name] = str(value)
            else:
                small = values.dtype.kind in "iu" and classic
                out[name] = values.astype("i4") if small else values
    return out
