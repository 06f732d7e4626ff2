"""The detector: names of a CCD, constants with their sources, bit meanings of DQUALITY.

The constants describe a real TESS CCD. Nothing here is used where the header of a file says the same:
the header is the truth.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntFlag
from typing import Final

import numpy as np
import numpy.typing as npt

SCIENCE_SHAPE: Final = (2048, 2048)
"""Science rows and columns of a CCD (SCIROWS..SCIROWE, SCCSA..SCCED of the FFI header)."""

FIRST_SCIENCE_COLUMN: Final = 45
"""1-based FFI column of the first science pixel (keyword SCCSA; 44 virtual columns stand before it)."""

FRAME_SHAPE: Final = (2078, 2136)
"""Rows and columns of a whole FFI (NAXIS2, NAXIS1): science, buffer, smear and virtual pixels."""

LIVE_FRACTION: Final = 0.8 * 0.99
"""Time on source over elapsed time: 8 of every 10 two-second reads survive the on-board cosmic-ray
mitigation (CRBLKSZ = 10; NREADOUT 720 of NUM_FRM 900), and 1.98 of 2.00 s of a read collect light."""

INDEX_EPOCH: Final = 1227.4586
"""TJD at which FFIINDEX would be zero: TSTART = INDEX_EPOCH + FFIINDEX * cadence in every era.
Read off the mission's frame catalogs of sectors 1-37, within 40 s."""

# Table A.3 of the TESS Instrument Handbook: columns over the metal straps below the CCD, 1-based within
# the 2048 science columns (FFI column = Column + 44, 1-based).
_STRAPS: Final = (
    "77 78 81 82 85 86 205 206 209 210 213 214 333 334 337 338 341 342 461 462 465 466 469 470 "
    "516 517 520 521 524 525 589 590 593 594 597 598 673 674 675 676 717 718 721 722 725 726 "
    "845 846 849 850 853 854 973 974 977 978 981 982 1067 1068 1071 1072 1075 1076 "
    "1195 1196 1199 1200 1203 1204 1323 1324 1327 1328 1331 1332 1373 1374 1375 1376 "
    "1451 1452 1455 1456 1459 1460 1524 1525 1528 1529 1532 1533 1579 1580 1583 1584 1587 1588 "
    "1707 1708 1711 1712 1715 1716 1835 1836 1839 1840 1843 1844 1963 1964 1967 1968 1971 1972"
)
STRAP_COLUMNS: Final[npt.NDArray[np.intp]] = np.array([int(c) - 1 for c in _STRAPS.split()], dtype=np.intp)
"""0-based science columns over straps: 116 of them, 1-2 % brighter than their neighbours in red light."""


class Quality(IntFlag):
    """Bits of the header keyword DQUALITY, bit n of the documents being value 2**(n-1).

    Source: TESS Science Data Products Description Document, table of data quality flags.
    """

    ATTITUDE_TWEAK = 1
    SAFE_MODE = 2
    COARSE_POINT = 4
    EARTH_POINT = 8
    ARGABRIGHTENING = 16
    DESATURATION = 32
    APERTURE_COSMIC = 64
    MANUAL_EXCLUDE = 128
    DISCONTINUITY = 256
    IMPULSIVE_OUTLIER = 512
    COLLATERAL_COSMIC = 1024
    STRAY_LIGHT = 2048
    SCATTERED_LIGHT = 4096
    PLANET_SEARCH_EXCLUDE = 8192
    BAD_CALIBRATION = 16384
    INSUFFICIENT_TARGETS = 32768


DROP_QUALITY: Final = int(
    Quality.ATTITUDE_TWEAK
    | Quality.SAFE_MODE
    | Quality.COARSE_POINT
    | Quality.EARTH_POINT
    | Quality.ARGABRIGHTENING
    | Quality.DESATURATION
    | Quality.BAD_CALIBRATION
)
"""Frames with any of these bits are rejected by default: the pointing moved or the CCD could not be
calibrated (1.6 % of all FFIs). STRAY_LIGHT and SCATTERED_LIGHT are the signal and stay; MANUAL_EXCLUDE is
about planet searches and stays too."""


@dataclass(frozen=True, order=True)
class CCD:
    """One CCD in one sector.

    Parameters
    ----------
    sector : int
        1 to 9999; special sectors such as 1751 are as good as others.
    camera, ccd : int
        1 to 4.

    Raises
    ------
    ValueError
        If a number is out of range.

    Examples
    --------
    >>> CCD(1, 4, 2).group
    's0001/cam4/ccd2'
    """

    sector: int
    camera: int
    ccd: int

    def __post_init__(self) -> None:
        for name, high in (("sector", 9999), ("camera", 4), ("ccd", 4)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise ValueError(f"{name}={value!r} is not an integer")  # noqa: TRY004 (one error for arguments)
            if not 1 <= value <= high:
                raise ValueError(f"{name}={value} is out of range: allowed are 1 to {high}")

    def __str__(self) -> str:
        return f"sector {self.sector} camera {self.camera} CCD {self.ccd}"

    @property
    def group(self) -> str:
        """Path of this CCD's group in a store."""
        return f"s{self.sector:04d}/cam{self.camera}/ccd{self.ccd}"

    @classmethod
    def from_group(cls, path: str) -> CCD:
        """Read the numbers back from a group path.

        Raises
        ------
        ValueError
            If the path does not end in ``sSSSS/camC/ccdK``.
        """
        match = re.search(r"(?:^|/)s(\d{4})/cam(\d)/ccd(\d)$", path.rstrip("/"))
        if match is None:
            raise ValueError(f"{path!r} is not the path of a CCD; one looks like 's0001/cam4/ccd2'")
        return cls(*(int(number) for number in match.groups()))
