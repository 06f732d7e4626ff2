"""Whole builds from disk and from S3 servers, against tess-backml, naive xarray + dask, and raw reads."""

from __future__ import annotations

import os
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
from timing import ms, ratio, spread, table

SHARD = 16
WORKERS = 2


def raw_read(urls, ends, options):
    """Read the bytes that a build reads, with its client and concurrency, and drop them; return how many."""
    from tessbkg.storage import filesystem, path_of, read_range, source_options
    from tessbkg.tasks import READ_AHEAD

    fs, _ = filesystem(urls[0], source_options(urls[0], options))

    def read(url, end):
        return len(read_range(fs, path_of(fs, url), 0, end))

    with ThreadPoolExecutor(READ_AHEAD) as pool:
        return sum(pool.map(read, urls, ends))


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
    """Build; return the job, whose store is kept, and the seconds of the whole and of the shards."""
    import tessbkg

    marks = []

    def progress(step, done, total):
        if step == "reduce":
            marks.append(time.perf_counter())

    arguments = {
        "root": source.root,
        "statistic": statistic,
        "dark_frames": dark_frames,
        "shard_frames": SHARD,
        "storage_options": source.options,
        **CCD1,
    }
    out = f"{folder}/ours-{time.monotonic_ns()}.zarr"
    began = time.perf_counter()
    report = tessbkg.build(out, client=client, progress=progress, **arguments)
    whole = time.perf_counter() - began
    bad = sum(n for status, n in report.counts.items() if status not in {"good", "rejected"})
    if bad:
        raise RuntimeError(report.summary())
    return tessbkg.plan_build(out, **arguments).job, {"whole": whole, "shards": marks[-1] - marks[0]}


def reduce_part(job, frames):
    """Read and reduce some frames as a task of a build does, writing nothing."""
    from tessbkg.tasks import prepared, reduce_frames

    survey, plan = prepared(job)
    reduce_frames(job, survey.iloc[frames], plan)


def kernel_call(survey, scene, statistic):
    """Header, decode and reduce on one core, of frames whose bytes are in memory."""
    from tessbkg.dataset import Options, plan_of, reduce_or_blank
    from tessbkg.ffi import decode, parse_header

    urls = survey["url"].iloc[:: max(1, len(survey) // 8)]
    frames = [Path(url.removeprefix("file://")).read_bytes() for url in urls]
    plan = plan_of(scene, Options(statistic=statistic))

    def reduce_all():
        for data in frames:
            header = parse_header(data, "")
            reduce_or_blank(decode(data, header, header.science[:2], 0), plan)

    return {f"kernel {statistic}": (reduce_all, len(frames))}


def run(cache: Path, *, repeats: int, quick: bool, prior: str | None, servers_wanted):
    from tessbkg.dataset import Options
    from tessbkg.ffi import FrameStatus
    from tessbkg.jobs import local_cluster

    default = Options().statistic
    n = 32 if quick else 64
    dark_frames = 8 if quick else DARK_FRAMES
    root, _ = sky(cache, "orbit", n)
    _, survey, scene = survey_and_scene(root, Options(dark_frames=dark_frames))
    survey = survey[survey["status"] == FrameStatus.GOOD].reset_index(drop=True)
    masked = scene.mask != 0
    figures = {"frames": len(survey)}

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

    statistics = tuple(dict.fromkeys((default, "rolling")))
    kernels = [kernel_call(survey, scene, statistic) for statistic in statistics]
    with ExitStack() as stack:
        tmp = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tessbkg-bench-", dir=cache)))
        running = stack.enter_context(servers(tmp, servers_wanted))
        sources = [Source("disk", root, {}, survey, root)]
        for name, server in running.items():
            print(f"  copying {n} frames to {name} ...", flush=True)
            url = upload(server, root, "ffis")
            sources.append(Source(name, url, server.options(anon=True), survey, root))
        client = stack.enter_context(local_cluster(WORKERS))
        for source in sources:
            calls = reading_calls(source, client)
            for statistic, kernel in zip(statistics, kernels, strict=True):
                job, one = timed_build(source, tmp, statistic, client, dark_frames)
                figures[f"{source.name}: build, {statistic}"] = one
                calls |= kernel | reducing_calls(source, job, statistic, client)
            if source.name != "ceph":  # slow; one server is enough
                calls |= naive_calls(source, scene.flux, masked, f"{tmp}/naive.zarr", 8 if quick else 24)
            for name, values in clock(calls, repeats).items():
                figures[f"{source.name}: {name}"] = {
                    part: spread([one[part] for one in values]) for part in values[0]
                }
    return figures, tables(figures, [source.name for source in sources], statistics, sum(sources[0].ends))


def clock(calls, repeats):
    """Run each of `calls` (name to function and its frames) in turn, `repeats` times, and once before.

    Returns
    -------
    dict
        Name to a list of the seconds a frame took, and those that all cores were busy for it.
    """
    found = {name: [] for name in calls}
    for i in range(repeats + 1):
        for name, (call, frames) in calls.items() if i % 2 else reversed(calls.items()):
            began, busy = time.perf_counter(), busy_seconds()
            call()
            one = {"seconds": time.perf_counter() - began, "busy": busy_seconds() - busy}
            if i:
                found[name].append({part: value / frames for part, value in one.items()})
    return found


def on_workers(client, function, *arguments):
    """Run a function on every worker at once; each argument has a part for each worker."""
    workers = client.scheduler_info()["workers"]
    client.gather(
        [
            client.submit(function, *parts, workers=[worker], pure=False)
            for worker, *parts in zip(workers, *arguments, strict=True)
        ]
    )


def reading_calls(source, client):
    """Raw reads of all frames."""
    parts = [slice(i, None, WORKERS) for i in range(WORKERS)]
    n, options = len(source.urls), source.options

    def there():
        every = [source.urls[part] for part in parts], [source.ends[part] for part in parts]
        on_workers(client, raw_read, *every, [options] * WORKERS)

    return {
        "raw bytes, 1 process": (lambda: raw_read(source.urls, source.ends, options), n),
        f"raw bytes, {WORKERS} processes": (there, n),
    }


def reducing_calls(source, job, statistic, client):
    """Reading and reducing of all frames, as the tasks of a build do."""
    n = len(source.urls)
    parts = [slice(i, None, WORKERS) for i in range(WORKERS)]
    return {
        f"tessbkg {statistic}, 1 process": (lambda: reduce_part(job, slice(None)), n),
        f"tessbkg {statistic}, {WORKERS} workers": (
            lambda: on_workers(client, reduce_part, [job] * WORKERS, parts),
            n,
        ),
    }


def naive_calls(source, flux, masked, out, n):
    """The naive way for some frames, by threads and by the workers of the client that is open."""
    import dask

    def reduce_all():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            naive(source.urls[:n], source.options, flux, masked, out)

    def by_threads():
        with dask.config.set(scheduler="threads", num_workers=WORKERS):
            reduce_all()

    return {
        f"naive xarray + dask, {WORKERS} threads": (by_threads, n),
        f"naive xarray + dask, {WORKERS} workers": (reduce_all, n),
    }


def tables(figures, sources, statistics, nbytes):
    """Make tables of the figures."""
    n = figures["frames"]
    old = figures["tess-backml seconds a frame, frames in memory"]
    seconds = {
        tuple(name.split(": ")): one["seconds"]["median"]
        for name, one in figures.items()
        if ": " in name and "seconds" in one
    }
    slow = old.get("rolling with errors", {}).get("median")
    fixed = old.get("fixed windows with errors", {}).get("median")
    rows = [
        (
            f"{source}: {name}",
            ratio(slow / each) if slow else "",
            ratio(fixed / each) if fixed else "",
            ratio(seconds[source, "raw bytes, 1 process"] / each),
            ms(each),
            f"{nbytes / n / each / 1e6:,.0f}",
        )
        for (source, name), each in seconds.items()
    ]
    for name, one in old.items():
        faster = ratio(slow / one["median"]), ratio(fixed / one["median"])
        rows.append((f"tess-backml 0.3.3, {name}", *faster, "", ms(one["median"]), ""))
    first = table(
        f"{n} frames of 2048 x 2048, bin 16, by where the frames are",
        (
            "",
            "faster than tess-backml, rolling",
            "faster than tess-backml, fixed windows",
            "of the raw byte rate",
            "ms a frame",
            "MB/s",
        ),
        rows,
        "A frame: read, decoded, reduced, as the tasks of a build do it; kernel: all but read, on one core. "
        "tess-backml has its frames in memory before its clock starts. Servers share the cores with the "
        "workers.",
    )
    whole = table(
        f"Whole builds of {n} frames, {WORKERS} workers",
        ("", "s", "of them in shards, s"),
        [
            (f"{source}: {statistic}", f"{one['whole']:.1f}", f"{one['shards']:.1f}")
            for source in sources
            for statistic in statistics
            for one in [figures[f"{source}: build, {statistic}"]]
        ],
        "Listing, survey, scene and template; in the shards reading and preparing the scene on every worker "
        "(compiling, for `rolling`), which counts much in so few frames, angles and writing.",
    )
    limits = []
    figures["of the limit"] = {}
    for source in sources:
        for statistic in statistics:
            for who, raw, workers in (
                ("1 process", "raw bytes, 1 process", 1),
                (f"{WORKERS} workers", f"raw bytes, {WORKERS} processes", WORKERS),
            ):
                ours = seconds[source, f"tessbkg {statistic}, {who}"]
                reading, kernel = seconds[source, raw], seconds[source, f"kernel {statistic}"]
                busy = figures[f"{source}: {raw}"]["busy"]["median"]
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
        "Milliseconds a frame. Bytes: raw reads by the same client. Kernel: one frame in memory to bins, on "
        "as many cores as there are workers. Cores: what raw reads keep all cores of this machine busy with, "
        "the server's work included, and the kernel, shared out among them.",
    )
    return [first, whole, second]
