"""Whole builds from disk and from S3 servers, against tess-backml, naive xarray + dask, and raw reads."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import psutil
from accuracy import PRIOR_DARK, prior_cube
from data import CCD1, DARK_FRAMES, servers, sky, survey_and_scene, upload
from timing import measure, median, ms, ratio, spread, table

SHARD = 16
WORKERS = 2


def raw_read(urls, ends, options):
    """Read the bytes that a build reads, with its client and concurrency, and drop them; return how many."""
    from tessbkg.storage import filesystem, path_of, source_options
    from tessbkg.tasks import READ_AHEAD

    fs, _ = filesystem(urls[0], source_options(urls[0], options))
    with ThreadPoolExecutor(READ_AHEAD) as pool:
        jobs = [
            pool.submit(fs.cat_file, path_of(fs, u), start=0, end=e) for u, e in zip(urls, ends, strict=True)
        ]
        return sum(len(job.result()) for job in jobs)


def naive(urls, options, scene, masked, out, *, size=16):
    """What one writes first: delayed astropy reads, a stack, arithmetic, coarsen, to_zarr."""
    import dask
    import dask.array as da
    import xarray as xr
    from astropy.io import fits

    def read(url):
        more = {"use_fsspec": True, "fsspec_kwargs": options} if url.startswith("s3://") else {}
        with fits.open(url.removeprefix("file://"), **more) as hdus:
            return np.asarray(hdus[1].section[:2048, 44:2092], dtype=np.float32)

    frames = [da.from_delayed(dask.delayed(read)(url), scene.shape, np.float32) for url in urls]
    flux = xr.DataArray(da.stack(frames), dims=("time", "y", "x"))
    light = (flux - scene).where(~masked).coarsen(y=size, x=size).median()
    light.to_dataset(name="light").to_zarr(out, mode="w", consolidated=False)


def busy_seconds():
    """Seconds that all cores together have been busy, whoever kept them so: clients and servers alike."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0)


class Source:
    """One place where the frames are, with what has been timed on it."""

    def __init__(self, name, root, options, survey, base):
        self.name, self.root, self.options = name, str(root), options
        urls = [f"{self.root}/{Path(u.removeprefix('file://')).relative_to(base)}" for u in survey["url"]]
        self.urls = urls if self.root.startswith("s3://") else [f"file://{u}" for u in urls]
        self.ends = [int(end) for end in survey["end"]]


def timed_build(source, folder, statistic, client, dark_frames):
    """Build; return seconds of the whole, of the shards, and the median seconds of a frame in them."""
    import tessbkg

    marks = []

    def progress(step, done, total):
        if step == "reduce":
            marks.append(time.perf_counter())

    out = f"{folder}/ours-{time.monotonic_ns()}.zarr"
    began = time.perf_counter()
    report = tessbkg.build(
        out,
        root=source.root,
        statistic=statistic,
        dark_frames=dark_frames,
        shard_frames=SHARD,
        storage_options=source.options,
        client=client,
        progress=progress,
        **CCD1,
    )
    whole = time.perf_counter() - began
    shutil.rmtree(out)
    bad = sum(n for status, n in report.counts.items() if status not in {"good", "rejected"})
    if bad:
        raise RuntimeError(report.summary())
    seconds = report.frames.loc[report.frames["nbytes"] > 0, "seconds"]
    return {
        "whole": whole,
        "shards": marks[-1] - marks[0],
        "frame": float(seconds.median()),
        "nbytes": report.nbytes,
    }


def kernel_limit(survey, scene, statistic, repeats):
    """Seconds of one core for one frame whose bytes are in memory: header, decode, reduce."""
    from tessbkg.dataset import Options, plan_of, reduce_or_blank
    from tessbkg.ffi import decode, parse_header

    url = str(survey["url"].iloc[len(survey) // 2])
    data = Path(url.removeprefix("file://")).read_bytes()
    plan = plan_of(scene, Options(statistic=statistic))

    def frame():
        header = parse_header(data, url)
        reduce_or_blank(decode(data, header, header.science[:2], 0), plan)

    return median(measure({"frame": frame}, repeats=max(5, repeats))["frame"])


def run(cache: Path, *, repeats: int, quick: bool, prior: str | None, servers_wanted):
    from tessbkg.dataset import Options
    from tessbkg.ffi import FrameStatus
    from tessbkg.jobs import local_cluster

    default = Options().statistic
    n = 32 if quick else 64
    dark_frames = 8 if quick else DARK_FRAMES
    repeats = max(1, repeats // 2)
    root, _ = sky(cache, "orbit", n)
    _, survey, scene = survey_and_scene(root, Options(dark_frames=dark_frames))
    survey = survey[survey["status"] == FrameStatus.GOOD].reset_index(drop=True)
    masked = scene.mask != 0
    limit = {s: kernel_limit(survey, scene, s, repeats) for s in (default, "rolling")}
    figures = {"kernel seconds a frame": limit, "frames": len(survey)}

    few = survey.iloc[:: max(1, len(survey) // (6 if quick else 12))]
    order = survey["excess"].to_numpy().argsort()[:PRIOR_DARK]
    old = {}
    if prior:
        paths = [survey["url"].iloc[i].removeprefix("file://") for i in order]
        paths += [url.removeprefix("file://") for url in few["url"]]
        for name, rolling in (("rolling with errors", True), ("fixed windows with errors", False)):
            cube = prior_cube(prior, cache, paths, range(len(order)), size=16, rolling=rolling)
            if cube is not None:
                old[name] = spread(cube[2][len(order) :])
    figures["tess-backml seconds a frame, frames in memory"] = old

    runs: dict = {}
    with ExitStack() as stack:
        tmp = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tessbkg-bench-", dir=cache)))
        running = stack.enter_context(servers(tmp, servers_wanted))
        sources = [Source("disk", root, {}, survey, root)]
        for name, server in running.items():
            print(f"  copying {n} frames to {name} ...", flush=True)
            url = upload(server, root, "ffis")
            sources.append(Source(name, url, server.options(anon=True), survey, root))
        client = stack.enter_context(local_cluster(WORKERS))
        nbytes = sum(sources[0].ends)

        def clock(source, name, call):
            began, busy = time.perf_counter(), busy_seconds()
            found = call()
            found = found if isinstance(found, dict) else {"shards": time.perf_counter() - began}
            found["busy"] = busy_seconds() - busy
            runs.setdefault(source.name, {}).setdefault(name, []).append(found)

        for round_ in range(repeats + 1):
            for source in sources if round_ % 2 else sources[::-1]:
                parts = [slice(i, i + SHARD) for i in range(0, len(survey), SHARD)]

                def raw_here(source=source):
                    raw_read(source.urls, source.ends, source.options)

                def raw_there(source=source, parts=parts):
                    args = [(source.urls[p], source.ends[p], source.options) for p in parts]
                    client.gather([client.submit(raw_read, *a, pure=False) for a in args])

                clock(source, "raw bytes, 1 process", raw_here)
                clock(source, f"raw bytes, {WORKERS} processes", raw_there)
                for statistic in dict.fromkeys((default, "rolling")):
                    for who, cluster in (("1 process", None), (f"{WORKERS} workers", client)):
                        clock(
                            source,
                            f"tessbkg {statistic}, {who}",
                            lambda s=statistic, c=cluster, source=source: timed_build(
                                source, tmp, s, c, dark_frames
                            ),
                        )
                if source.name == "ceph" or round_ == 0:
                    continue  # slow; one server is enough
                urls = source.urls[: 8 if quick else 24]

                def by_threads(source=source, urls=urls):
                    import dask

                    began = time.perf_counter()
                    with dask.config.set(scheduler="threads", num_workers=WORKERS), warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        naive(urls, source.options, scene.flux, masked, f"{tmp}/naive.zarr")
                    return {"shards": (time.perf_counter() - began) * len(survey) / len(urls)}

                def by_cluster(source=source, urls=urls):
                    began = time.perf_counter()
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        naive(urls, source.options, scene.flux, masked, f"{tmp}/naive.zarr")
                    return {"shards": (time.perf_counter() - began) * len(survey) / len(urls)}

                clock(source, f"naive xarray + dask, {WORKERS} threads", by_threads)
                clock(source, f"naive xarray + dask, {WORKERS} workers", by_cluster)
    return summarise(figures, runs, len(survey), nbytes)


def summarise(figures, runs, n, nbytes):
    """Make tables of ratios. The first round warms everything and is not counted."""
    for source, found in runs.items():
        for name, values in found.items():
            kept = values[1:] if len(values) > 1 and not name.startswith("naive") else values
            figures[f"{source}: {name}"] = {
                part: spread([one[part] for one in kept]) for part in kept[0] if part != "nbytes"
            }
    return figures, tables(figures, [(source, name) for source in runs for name in runs[source]], n, nbytes)


def tables(figures, names, n, nbytes):
    """Make tables of the figures."""
    limit = figures["kernel seconds a frame"]
    old = figures["tess-backml seconds a frame, frames in memory"]
    seconds = {}  # a frame
    for source, name in names:
        one = figures[f"{source}: {name}"]
        share = WORKERS if name.endswith(f"{WORKERS} workers") else 1
        seconds[source, name] = (
            one["frame"]["median"] / share if "frame" in one else one["shards"]["median"] / n
        )
    slow = old.get("rolling with errors", {}).get("median")
    fixed = old.get("fixed windows with errors", {}).get("median")
    rows = []
    for (source, name), each in seconds.items():
        one = figures[f"{source}: {name}"]
        whole = one.get("whole")
        rows.append(
            (
                f"{source}: {name}",
                ratio(slow / each) if slow else "",
                ratio(fixed / each) if fixed else "",
                ratio(seconds[source, "raw bytes, 1 process"] / each),
                ms(each),
                f"{nbytes / n / each / 1e6:,.0f}",
                ms(one["shards"]["median"] / n) if whole else "",
                f"{whole['median']:.1f}" if whole else "",
            )
        )
    for name, one in old.items():
        rows.append(
            (
                f"tess-backml 0.3.3, {name}",
                ratio(slow / one["median"]),
                ratio(fixed / one["median"]),
                "",
                ms(one["median"]),
                "",
                "",
                "",
            )
        )
    first = table(
        f"Build of {n} frames of 2048 x 2048, bin 16, by where the frames are",
        (
            "",
            "faster than tess-backml, rolling",
            "faster than tess-backml, fixed windows",
            "of the raw byte rate",
            "ms a frame",
            "MB/s",
            "ms a frame with what comes once",
            "whole build, s",
        ),
        rows,
        "A frame: read, decoded, reduced; the median within the tasks over the number of workers. What comes "
        "once for each worker (reading and preparing the scene, which counts much in so few frames), writing "
        "and angles are in the column after; listing, survey, scene and template in that of the whole build. "
        "tess-backml has its frames in memory before its clock starts; reads, scene and writing not counted. "
        "Servers share the cores with the workers.",
    )
    limits = []
    figures["of the limit"] = {}
    for source in dict.fromkeys(source for source, _ in names):
        for statistic in limit:
            for who, raw, workers in (
                ("1 process", "raw bytes, 1 process", 1),
                (f"{WORKERS} workers", f"raw bytes, {WORKERS} processes", WORKERS),
            ):
                ours = seconds[source, f"tessbkg {statistic}, {who}"]
                reading, kernel = seconds[source, raw], limit[statistic]
                busy = figures[f"{source}: {raw}"]["busy"]["median"] / n
                # Reading keeps cores busy, the server's part included, and so does the kernel.
                bounds = {
                    "bytes": reading,
                    "kernel": kernel / workers,
                    "cores": (busy + kernel) / os.cpu_count(),
                }
                binding = max(bounds, key=bounds.get)
                figures["of the limit"][f"{source}: {statistic}, {who}"] = bounds[binding] / ours
                limits.append(
                    (
                        f"{source}: {statistic}, {who}",
                        f"{100 * bounds[binding] / ours:.0f} %",
                        binding,
                        *(f"{100 * bound / ours:.0f} %" for bound in bounds.values()),
                        ms(ours),
                    )
                )
    second = table(
        "How near the limit: the slowest of raw reads, kernel and cores",
        ("", "of the limit", "which binds", "of raw bytes", "of the kernel", "of the cores", "build, ms"),
        limits,
        "Milliseconds a frame. Bytes: raw reads by the same client. Kernel: one frame in memory to bins, on as "
        "many cores as there are workers. Cores: what raw reads keep the cores of this machine busy with, the "
        "server's work included, and the kernel, shared out among them all.",
    )
    return [first, second]
