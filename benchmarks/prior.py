"""The published tess-backml on simulated frames, in its own environment: only its reduction is timed.

    python prior.py ROOT OUT.npz --bin 16 --rolling 1 --dark 3,5,7 [--frames 0,1,2]

Its source of frames, the package `tesscube`, asks the network at import. A module of that name that reads
local files takes its place; each frame is in memory, native floats, before the clock starts.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import time
import types
from pathlib import Path
from typing import ClassVar

import numpy as np


class _HDU:
    def __init__(self, data):
        self.data = data


class TESSCube:
    """As much of tesscube.TESSCube as tess-backml uses, over local files."""

    paths: ClassVar[list] = []
    held: ClassVar[dict] = {}

    def __init__(self, sector, camera, ccd):
        self.sector, self.camera, self.ccd = sector, camera, ccd
        self.nframes = len(self.paths)
        self.time = np.arange(self.nframes, dtype=float)
        self.cadence_number = np.arange(self.nframes)
        self.quality = np.zeros(self.nframes, dtype=int)

    @classmethod
    def hold(cls, i):
        """Put one frame into memory; that is not timed."""
        from astropy.io import fits

        with fits.open(cls.paths[i], memmap=False) as hdus:
            cls.held = {i: [None] + [np.asarray(hdus[k].data, dtype=np.float32) for k in (1, 2)]}

    def get_ffi(self, i):
        if i not in self.held:
            self.hold(i)
        # The caller changes the flux in place.
        return [None] + [_HDU(image.copy() if k == 0 else image) for k, image in enumerate(self.held[i][1:])]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("paths", help="file with one path a line")
    parser.add_argument("out")
    parser.add_argument("--bin", type=int, default=16)
    parser.add_argument("--rolling", type=int, default=1)
    parser.add_argument("--errors", type=int, default=1)
    parser.add_argument("--dark", required=True, help="frames of the static scene, darkest first")
    arguments = parser.parse_args()

    stub = types.ModuleType("tesscube")
    stub.TESSCube = TESSCube
    sys.modules["tesscube"] = stub
    with contextlib.redirect_stderr(io.StringIO()):
        from tess_backml import BackgroundCube, bkg_data

    TESSCube.paths = Path(arguments.paths).read_text().split()
    times = {}

    def clocked(frames, **_):
        """Stand in for tqdm around its loop over frames."""
        for i in frames:
            TESSCube.hold(i)
            began = time.perf_counter()
            yield i
            times[i] = time.perf_counter() - began

    bkg_data.tqdm = clocked
    cube = BackgroundCube(sector=1, camera=1, ccd=4, img_bin=arguments.bin)
    # It would take the indices of sector 1 from a file in its package.
    cube.dark_frames = np.array([int(i) for i in arguments.dark.split(",")])
    cube.darkest_frame = cube.dark_frames[0]
    cube._get_dark_frame_idx = lambda: None
    with contextlib.redirect_stdout(io.StringIO()):
        cube.get_scatter_light_cube(rolling=bool(arguments.rolling), errors=bool(arguments.errors))
    seconds = np.array([times[i] for i in sorted(times)])
    np.savez(arguments.out, value=cube.scatter_cube, error=cube.scatter_err_cube, seconds=seconds)
    print(
        json.dumps({"frames": len(seconds), "median": float(np.median(seconds)), "min": float(seconds.min())})
    )


if __name__ == "__main__":
    main()
