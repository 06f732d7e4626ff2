"""The scattered light of TESS Full Frame Images as an analysis-ready dataset.

frames = tessbkg.list_ffis(sector=1, camera=1, ccd=4)
ffis = tessbkg.open_ffis(sector=1, camera=1, ccd=4)
light = tessbkg.scattered_light(ffis.isel(time=slice(0, 200)), bin=16)
report = tessbkg.build("bkg.zarr", sector=1, camera=1, ccd=4, bin=16)
ds = tessbkg.open_background("bkg.zarr", sector=1, camera=1, ccd=4)
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tessbkg.catalog import list_ffis
    from tessbkg.ccd import CCD, Quality
    from tessbkg.correction import correct
    from tessbkg.dataset import Options, scattered_light
    from tessbkg.evaluation import evaluate
    from tessbkg.exports import export
    from tessbkg.ffi import FrameStatus, read_ffi
    from tessbkg.geometry import angles, boresight_angles
    from tessbkg.jobs import build, read_report
    from tessbkg.plan import plan_build
    from tessbkg.scene import MaskOptions
    from tessbkg.stack import open_ffis
    from tessbkg.store import open_background
    from tessbkg.timebins import bin_time

__version__ = "0.1.0"

_MODULE_OF = {
    "CCD": "ccd",
    "FrameStatus": "ffi",
    "MaskOptions": "scene",
    "Options": "dataset",
    "Quality": "ccd",
    "angles": "geometry",
    "boresight_angles": "geometry",
    "bin_time": "timebins",
    "build": "jobs",
    "correct": "correction",
    "evaluate": "evaluation",
    "export": "exports",
    "list_ffis": "catalog",
    "open_background": "store",
    "open_ffis": "stack",
    "plan_build": "plan",
    "read_ffi": "ffi",
    "read_report": "jobs",
    "scattered_light": "dataset",
}

__all__ = [
    "CCD",
    "FrameStatus",
    "MaskOptions",
    "Options",
    "Quality",
    "angles",
    "bin_time",
    "boresight_angles",
    "build",
    "correct",
    "evaluate",
    "export",
    "list_ffis",
    "open_background",
    "open_ffis",
    "plan_build",
    "read_ffi",
    "read_report",
    "scattered_light",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `import tessbkg` alone is quick."""
    if name in _MODULE_OF:
        value = getattr(importlib.import_module(f"tessbkg.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'tessbkg' has no attribute {name!r}", name=name, obj=sys.modules[__name__])


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
