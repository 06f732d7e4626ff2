"""Make ``pointings.csv`` from the pointing table of the PyPI package tesswcs (1.9.3, MIT licence).

Usage: ``python make_pointings.py .../tesswcs/data/pointings.csv``. Needs the standard library only.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

HEADER = (
    "# Pointing of TESS in each sector: RA, Dec and roll of the spacecraft's +Z axis in degrees (ICRS), "
    "and the planned days in TJD (JD - 2457000); numbers of tesswcs 1.9.3, sectors after 108 are plans\n"
    "sector,ra,dec,roll,start,stop\n"
)


def main(source: Path) -> None:
    """Write the table beside this script."""
    with source.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    lines = [
        f"{int(row['Sector'])},{float(row['RA'])},{float(row['Dec'])},{float(row['Roll'])},"
        f"{float(row['Start']) - 2457000:.4f},{float(row['End']) - 2457000:.4f}\n"
        for row in rows
    ]
    (Path(__file__).parent / "pointings.csv").write_text(HEADER + "".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
