"""The errors of tessbkg. Wrong arguments are plain `ValueError`; these are for the world outside."""

from __future__ import annotations


class TessbkgError(Exception):
    """Base of every error that tessbkg raises on purpose."""


class CatalogError(TessbkgError):
    """No frames were found, or the names found make no sense."""


class FFIReadError(TessbkgError):
    """One FFI could not be read.

    Parameters
    ----------
    key : str
        URL or path of the FFI.
    reason : str
        What was wrong, in one line.
    """

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(key, reason)
        self.key = key
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}"


class FFIMissingError(FFIReadError, FileNotFoundError):
    """The FFI is not there."""

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}"


class FFIFormatError(FFIReadError, ValueError):
    """The bytes are there but are not a calibrated TESS FFI."""


class StoreError(TessbkgError):
    """The Zarr store cannot be written, read or understood."""


class StoreMismatchError(StoreError):
    """The store is not the one that was meant: not ours, without the CCD, or made with other parameters.

    The message names what there is, or the fields that differ.
    """


class EphemerisRangeError(TessbkgError):
    """A time lies outside the span of the ephemeris; the message names the span and how to get more."""


class ClusterError(TessbkgError):
    """A cluster lost its scheduler, or a task took its workers down; the build can be resumed."""
