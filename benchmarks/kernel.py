"""One frame of 2048 x 2048 pixels in memory to one frame of bins: ours against what others would use.

Everybody starts from the same float32 frame, takes the scene away, leaves masked pixels out. Ours gives
errors and filled bins too.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from data import sky, survey_and_scene
from timing import measure, median, ms, ratio, spread, table


def contenders(flux, scene, size):
    """Name to function of no argument, for bins of `size` pixels."""
    from tessbkg.dataset import Options, plan_of
    from tessbkg.reduce import STATISTICS, reduce_frame

    masked = scene.mask != 0
    n = flux.shape[0] // size
    calls = {}
    for statistic in STATISTICS:
        plan = plan_of(scene, Options(bin=size, statistic=statistic))
        calls[f"tessbkg {statistic}"] = lambda plan=plan: reduce_frame(flux, plan)

    def prepared():
        image = flux - scene.flux
        image[masked] = np.nan
        return image

    def blocks(image):
        return image.reshape(n, size, n, size).transpose(0, 2, 1, 3).reshape(n, n, size * size)

    def nanmedian():
        return np.nanmedian(blocks(prepared()), axis=2)

    calls["np.nanmedian of blocks"] = nanmedian

    import xarray as xr

    def coarsen():
        return xr.DataArray(prepared(), dims=("y", "x")).coarsen(y=size, x=size).median().to_numpy()

    calls["xarray coarsen.median"] = coarsen
    try:
        import bottleneck
    except ImportError:
        print("  bottleneck is not installed")
    else:
        calls["bottleneck.nanmedian"] = lambda: bottleneck.nanmedian(blocks(prepared()), axis=2)
    try:
        from skimage.measure import block_reduce
    except ImportError:
        print("  scikit-image is not installed")
    else:
        calls["skimage block_reduce(np.nanmedian)"] = lambda: block_reduce(
            prepared(), (size, size), np.nanmedian
        )
        calls["skimage block_reduce(np.median), nothing masked"] = lambda: block_reduce(
            flux - scene.flux, (size, size), np.median
        )
    try:
        from astropy.stats import SigmaClip
        from photutils.background import Background2D, MedianBackground
    except ImportError:
        print("  photutils is not installed")
    else:

        def background2d(clip):
            return lambda: (
                Background2D(
                    flux - scene.flux,
                    (size, size),
                    mask=masked,
                    exclude_percentile=90,
                    filter_size=1,
                    sigma_clip=clip,
                    bkg_estimator=MedianBackground(sigma_clip=None),
                ).background_mesh
            )

        calls["photutils Background2D, median"] = background2d(None)
        calls["photutils Background2D, median, clipped at 3 sigma"] = background2d(SigmaClip(3.0, maxiters=5))
    return calls


def run(cache: Path, *, repeats: int, quick: bool):
    from tessbkg.dataset import Options
    from tessbkg.ffi import decode, parse_header, read_ffi

    root, _ = sky(cache, "orbit", 12 if quick else 24)
    _, survey, scene = survey_and_scene(root, Options(dark_frames=8))
    url = str(survey["url"].iloc[int(survey["level"].argmax())])
    data = Path(url.removeprefix("file://")).read_bytes()
    header = parse_header(data, url)
    flux = read_ffi(url).flux
    figures, tables = {}, []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for size in (16, 8):
            calls = {
                "copy of the frame (memory floor)": flux.copy,
                "decode: big-endian bytes to native science pixels": lambda: decode(
                    data, header, header.science[:2], 0
                ),
                **contenders(flux, scene, size),
            }
            seconds = measure(calls, repeats=repeats)
            ours = median(seconds["tessbkg median"])
            figures[f"bin {size}"] = {name: spread(values) for name, values in seconds.items()}
            rows = [
                (
                    name,
                    ratio(median(values) / ours),
                    ms(median(values)),
                    f"{ms(min(values))}-{ms(max(values))}",
                )
                for name, values in seconds.items()
            ]
            tables.append(
                table(
                    f"Kernel: one frame of 2048 x 2048, bin {size}, one core",
                    ("", "time over ours (median)", "ms, median", "range"),
                    rows,
                )
            )
    return figures, tables
