"""Reading a finished store: what a picture, a light curve, a training batch and a whole pass take.

The same cube in several layouts of chunks and shards, from disk and from S3, ours opened by
`tessbkg.open_background` and by bare zarr; an epoch of `tessbkg.loader` against bare reads of the same
shards.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from data import CCD1, servers, sky
from timing import measure, median, ms, ratio, spread, table

MAPS = ("earth_angle", "earth_azimuth", "moon_angle", "moon_azimuth")
LAYOUTS = {
    "shard (64,Y,X) of (8,Y,X)": ((8, None, None), (64, None, None), False),
    "same with crc32c": ((8, None, None), (64, None, None), True),
    "shard (64,Y,X) of (4,Y,X)": ((4, None, None), (64, None, None), False),
    "shard (64,Y,X) of (16,Y,X)": ((16, None, None), (64, None, None), False),
    "shard (64,Y,X) of (8,64,64)": ((8, 64, 64), (64, None, None), False),
    "shard (64,Y,X) of (16,64,64)": ((16, 64, 64), (64, None, None), False),
    "shard (64,Y,X) of (64,32,32)": ((64, 32, 32), (64, None, None), False),
    "chunk (8,Y,X), no shards": ((8, None, None), None, False),
    "chunk (64,Y,X), no shards": ((64, None, None), None, False),
}
CURRENT = next(iter(LAYOUTS))


def make_store(cache: Path, frames: int) -> Path:
    """Build a store of `frames` real-format frames; its light is smooth, with the noise of bins of 16."""
    import zarr

    import tessbkg
    from tessbkg.ccd import CCD
    from tessbkg.reduce import median_variance
    from tessbkg.simulate import NOISE_A, NOISE_B

    out, complete = cache / f"reads-{frames}.zarr", cache / f"reads-{frames}.complete"
    if complete.exists():
        return out
    shutil.rmtree(out, ignore_errors=True)
    root, truth = sky(cache, "smooth", frames, (128, 128))
    print("  building the store ...", flush=True)
    tessbkg.build(str(out), root=str(root), bin=1, dark_frames=8, **CCD1)
    group = zarr.open_group(out, path=CCD(**CCD1).group, mode="r+")
    random = np.random.default_rng(0)
    from tessbkg.simulate import light

    for first in range(0, frames, 64):
        last = min(first + 64, frames)
        block = np.stack([light(truth, i) for i in range(first, last)])
        sigma = np.sqrt((NOISE_A * (block + 100) + NOISE_B) * median_variance(180))
        group["scattered_light"][first:last] = block + sigma * random.standard_normal(block.shape)
        group["scattered_light_err"][first:last] = sigma
    complete.touch()
    return out


def copy_layout(source, target, name, frames):
    """Write light and angle maps of `source` into a group of another layout."""
    from zarr.codecs import BloscCodec, Crc32cCodec

    chunks, shards, checksum = LAYOUTS[name]
    for variable in ("scattered_light", *MAPS):
        old = source[variable]
        full = (frames, *old.shape[1:])
        codecs = [BloscCodec(cname="zstd", clevel=3, shuffle="bitshuffle")]
        new = target.create_array(
            variable,
            shape=full,
            dtype="f4",
            chunks=tuple(c or full[i] for i, c in enumerate(chunks)),
            shards=None if shards is None else tuple(s or full[i] for i, s in enumerate(shards)),
            compressors=[*codecs, Crc32cCodec()] if checksum else codecs,
            fill_value=np.nan,
        )
        for first in range(0, frames, 64):
            new[first : first + 64] = old[first : first + 64]


def reads(group, frames, random):
    """Name to function: what people read."""
    light = group["scattered_light"]
    chosen = np.sort(random.choice(frames, 32, replace=False))
    start = int(random.integers(frames - 32))
    ny, nx = light.shape[1:]

    def batch():
        return [group[name].oindex[chosen] for name in ("scattered_light", *MAPS)]

    return {
        "one frame": lambda: light[frames // 2],
        "light curve of a bin": lambda: light[:, ny // 2, nx // 3],
        "32 random frames + 4 maps": batch,
        "32 consecutive frames": lambda: light[start : start + 32],
        "whole cube": lambda: light[:],
    }


def ours(dataset, frames, random):
    """The same reads through the Dataset of `open_background`."""
    chosen = np.sort(random.choice(frames, 32, replace=False))
    start = int(random.integers(frames - 32))
    light = dataset["scattered_light"]
    both = dataset[["scattered_light", *MAPS]]
    return {
        "one frame": lambda: light[frames // 2].to_numpy(),
        "light curve of a bin": lambda: light[:, light.shape[1] // 2, light.shape[2] // 3].to_numpy(),
        "32 random frames + 4 maps": lambda: both.isel(time=chosen).compute(),
        "32 consecutive frames": lambda: light[start : start + 32].to_numpy(),
        "whole cube": lambda: light[:].to_numpy(),  # an xarray variable read whole would keep its values
    }


def epochs(bare, store, options):
    """Name to function: all good frames with their maps once, and the number of frames."""
    from tessbkg.loader import Batches, open_frames, torch_batches, torch_windows

    frames, names = open_frames(store, store_options=options), ("scattered_light", *MAPS)
    settings = {"variables": names, "batch_size": 32}

    def shards():
        for first in range(0, bare["time"].shape[0], 64):
            for name in names:
                bare[name][first : first + 64]

    def through(batches):
        assert sum(len(batch["group"]) for batch in batches) == len(frames)

    calls = {
        "bare zarr, shard after shard": shards,
        "Batches, in order of time": lambda: through(Batches(frames, shuffle=False, **settings)),
        "Batches, shuffled": lambda: through(Batches(frames, **settings)),
    }
    if importlib.util.find_spec("torch"):
        from torch.utils.data import DataLoader

        dataset, windows = torch_batches(frames, **settings), torch_windows(frames, variables=names)
        workers = DataLoader(dataset, batch_size=None, num_workers=2, persistent_workers=True)
        calls |= {
            "torch_batches in the process": lambda: through(DataLoader(dataset, batch_size=None)),
            "torch_batches, 2 workers": lambda: through(workers),
            "torch_windows, random order": lambda: through(DataLoader(windows, batch_size=32, shuffle=True)),
        }
    return calls, len(frames)


def run(cache: Path, *, repeats: int, quick: bool, servers_wanted):
    import zarr

    import tessbkg
    from tessbkg.ccd import CCD
    from tessbkg.store import open_store

    frames = 320 if quick else 1300
    path = CCD(**CCD1).group
    made = make_store(cache, frames)
    source = zarr.open_group(made, path=path, mode="r")
    figures, tables = {}, []
    with ExitStack() as stack:
        tmp = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tessbkg-bench-", dir=cache)))
        running = stack.enter_context(servers(tmp, servers_wanted))
        places = {"disk": (str(tmp / "layouts.zarr"), str(made), {})}
        for name, server in running.items():
            bucket = server.bucket("store")
            server.filesystem().put(str(made / "s0001"), f"{bucket}/ours.zarr/", recursive=True)
            server.filesystem().pipe_file(f"{bucket}/ours.zarr/zarr.json", (made / "zarr.json").read_bytes())
            places[name] = (f"{bucket}/layouts.zarr", f"{bucket}/ours.zarr", server.options())
        for place, (url, store, options) in places.items():
            layouts = (
                LAYOUTS
                if place == "disk"
                else {k: LAYOUTS[k] for k in list(LAYOUTS)[:1] + list(LAYOUTS)[3:7]}
            )
            root = zarr.open_group(open_store(url, options), mode="w", zarr_format=3)
            calls, sizes = {}, {}
            for i, name in enumerate(layouts):
                copy_layout(source, root.create_group(str(i)), name, frames)
                group = zarr.open_group(open_store(url, options, read_only=True), path=str(i), mode="r")
                calls |= {
                    (name, what): f for what, f in reads(group, frames, np.random.default_rng(1)).items()
                }
                if place == "disk":
                    files = [f for f in (Path(url) / str(i)).rglob("*") if f.is_file()]
                    sizes[name] = (sum(f.stat().st_size for f in files), len(files))
            bare = zarr.open_group(open_store(store, options, read_only=True), path=path, mode="r")
            calls |= {
                ("bare zarr", what): f for what, f in reads(bare, frames, np.random.default_rng(1)).items()
            }
            for label, chunks in (
                ("open_background, dask", "shards"),
                ("open_background, chunks=None", None),
            ):
                dataset = tessbkg.open_background(store, store_options=options, chunks=chunks, **CCD1)
                calls |= {
                    (label, what): f for what, f in ours(dataset, frames, np.random.default_rng(1)).items()
                }
            opening = {
                "open_background": lambda store=store, options=options: tessbkg.open_background(
                    store, store_options=options, **CCD1
                )
            }
            seconds = measure(calls, repeats=max(2, repeats // 2))
            opened = measure(opening, repeats=max(2, repeats // 2))["open_background"]
            figures[place] = {f"{a}: {b}": spread(v) for (a, b), v in seconds.items()}
            figures[place]["open_background"] = spread(opened)
            training, good = epochs(bare, store, options)
            epoch = measure(training, repeats=max(2, repeats // 2))
            figures[place] |= {f"epoch: {name}": spread(v) for name, v in epoch.items()}
            base = median(epoch["bare zarr, shard after shard"])
            rows = [(name, f"{good / median(v):,.0f}", ratio(base / median(v))) for name, v in epoch.items()]
            tables.append(
                table(
                    f"An epoch of {good:,} frames of 128 x 128 with four angle maps, {place}",
                    ("", "frames/s", "of bare zarr"),
                    rows,
                )
            )
            kinds = list(dict.fromkeys(what for _, what in calls))
            for title, names, base in (
                (
                    f"Reading a store of {frames:,} x 128 x 128 from {place}",
                    ("bare zarr", "open_background, chunks=None", "open_background, dask"),
                    "bare zarr",
                ),
                (f"Layouts of the same cube, {place}", tuple(layouts), CURRENT),
            ):
                rows = []
                for name in names:
                    cells = []
                    for what in kinds:
                        one = median(seconds[name, what])
                        against = "" if name == base else f" ({ratio(one / median(seconds[base, what]))})"
                        cells.append(ms(one) + against)
                    if name in sizes:
                        cells += [f"{sizes[name][0] / 1e6:.0f}", sizes[name][1]]
                    elif base == CURRENT:
                        cells += ["", ""]
                    rows.append((name, *cells))
                head = ("ms (time over the first row)", *kinds)
                if base == CURRENT:
                    head += ("MB, light and maps", "files")
                note = f"Opening takes {ms(median(opened))} ms." if base == "bare zarr" else ""
                tables.append(table(title, head, rows, note))
    figures["sizes"] = (
        {name: {"bytes": size, "files": n} for name, (size, n) in sizes.items()} if sizes else {}
    )
    return figures, tables
