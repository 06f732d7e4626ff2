"""Batches for training, straight from Zarr: no dask, no xarray in the hot path.

>>> frames = open_frames("bkg.zarr")                          # doctest: +SKIP
>>> train, test = split(frames, by="orbit", test=0.2)         # doctest: +SKIP
>>> stats = statistics(train, "stats.json")                   # doctest: +SKIP
>>> for batch in Batches(train, batch_size=32, stats=stats):  # doctest: +SKIP
...     step(batch["earth_angle"], batch["scattered_light"])

What is read is whole shards, each once an epoch; windows of a few shards are shuffled together in a buffer.
The order is a pure function of seed, epoch, rank and worker, so a run goes on in mid-epoch where it stopped.
Stores are opened where they are read: in the worker, after the fork, never before.

For PyTorch see `torch_batches` and `torch_windows`.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import numpy.typing as npt
import zarr

from tessbkg.ccd import CCD
from tessbkg.errors import StoreError
from tessbkg.evaluation import frame_spacing
from tessbkg.ffi import FrameStatus
from tessbkg.storage import filesystem
from tessbkg.store import Group, groups
from tessbkg.survey import ORBIT_GAP_DAYS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from tessbkg.storage import Options
    from tessbkg.torchdata import BatchDataset, WindowDataset

Ints = npt.NDArray[np.intp]
Batch = dict[str, npt.NDArray[Any]]

MAPS: Final = ("earth_angle", "earth_azimuth", "moon_angle", "moon_azimuth")
"""Read beside the light where every CCD has them."""

READERS: Final = 4
"""Shards on their way at once."""

CIRCULAR: Final = ("_azimuth", "_longitude")
"""Endings of names whose values turn: normalised they become a sine and a cosine."""


@dataclass(frozen=True, eq=False)
class Frames:
    """Good frames of some CCDs: an index without data, small, to be pickled.

    Parameters
    ----------
    groups : tuple of Group
        Where the CCDs are.
    ccds : tuple of CCD
    shard_frames : tuple of int
        Frames of a shard, of every group.
    group : (n,) int
        Which group a frame is in.
    frame : (n,) int
        Its index along the group's time.
    time : (n,) float64
        TJD at the spacecraft.
    orbit : (n,) int
        Number of the orbit in its sector, from 0; the same for all CCDs.
    run : (n,) int
        Frames of one group with the same number follow each other without a break.
    """

    groups: tuple[Group, ...]
    ccds: tuple[CCD, ...]
    shard_frames: tuple[int, ...]
    group: Ints
    frame: Ints
    time: npt.NDArray[np.float64]
    orbit: Ints
    run: Ints

    def __len__(self) -> int:
        return len(self.frame)

    def __repr__(self) -> str:
        orbits = len({(self.ccds[g].sector, o) for g, o in zip(self.group, self.orbit, strict=True)})
        counts = (len(self), "good frame"), (len(self.ccds), "CCD"), (orbits, "orbit")
        return "<Frames: {} of {} in {}>".format(*(f"{n:,} {of}{'s' * (n != 1)}" for n, of in counts))

    def select(self, keep: npt.NDArray[np.bool_]) -> Frames:
        """Keep some frames."""
        names = ("group", "frame", "time", "orbit", "run")
        return replace(self, **{name: getattr(self, name)[keep] for name in names})

    @property
    def sector(self) -> Ints:
        """Sector of every frame."""
        return np.array([ccd.sector for ccd in self.ccds], dtype=np.intp)[self.group]

    def windows(self, length: int = 1, stride: int = 1) -> Ints:
        """Index of the first frame of every window of `length` frames that follow each other.

        `stride` counts frames from one window to the next within a run.
        """
        for name, value in (("window", length), ("stride", stride)):
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
                raise ValueError(f"{name}={value!r} is not allowed: it must be a whole number above zero")
        n = len(self)
        if n < length:
            return np.empty(0, dtype=np.intp)
        first = np.arange(n - length + 1)
        whole = (self.run[first] == self.run[first + length - 1]) & (
            self.frame[first + length - 1] - self.frame[first] == length - 1
        )
        whole &= self.group[first] == self.group[first + length - 1]
        change = np.diff(self.run, prepend=self.run[0] - 1) != 0
        begin = np.flatnonzero(change)[np.cumsum(change) - 1]
        return np.asarray(first[whole & ((first - begin[first]) % stride == 0)], dtype=np.intp)


def open_frames(
    stores: str | Sequence[str],
    *,
    ccds: Iterable[CCD | tuple[int, int, int]] | None = None,
    store_options: Options | None = None,
) -> Frames:
    """List the good frames of stores. Reads time and status of every CCD: a few requests each.

    Parameters
    ----------
    stores : str, or several
        Folders or URLs.
    ccds : iterable of CCD or (sector, camera, ccd), optional
        Only these; all that are there by default.
    store_options : dict, optional
        fsspec options of the stores. Never credentials.

    Returns
    -------
    Frames

    Raises
    ------
    StoreError
        If a store or a CCD is not there, or there is no good frame.

    Examples
    --------
    >>> import tessbkg, tessbkg.simulate
    >>> _ = tessbkg.simulate.simulate("memory://ld", frames=6, step=1, shape=(64, 64))
    >>> _ = tessbkg.build("memory://ld.zarr", sector=1, camera=1, ccd=4, root="memory://ld", dark_frames=2)
    >>> open_frames("memory://ld.zarr")
    <Frames: 6 good frames of 1 CCD in 1 orbit>
    """
    wanted = None if ccds is None else [one if isinstance(one, CCD) else CCD(*one) for one in ccds]
    found: list[tuple[Group, CCD]] = []
    for url in [stores] if isinstance(stores, str) else stores:
        there = groups(url, store_options)
        found += [
            (Group.of(url, ccd, store_options), ccd) for ccd in there if wanted is None or ccd in wanted
        ]
    missing = [str(ccd) for ccd in wanted or () if ccd not in {one for _, one in found}]
    if missing:
        raise StoreError(f"{stores} has no {', '.join(missing)}")
    tables = [_read_times(group) for group, _ in found]
    orbit_of = _orbits([(ccd.sector, table[0]) for (_, ccd), table in zip(found, tables, strict=True)])
    parts: dict[str, list[npt.NDArray[Any]]] = {
        name: [] for name in ("group", "frame", "time", "orbit", "run")
    }
    runs = 0
    for i, ((_, ccd), (time, status, _)) in enumerate(zip(found, tables, strict=True)):
        good = np.flatnonzero((status == FrameStatus.GOOD) & np.isfinite(time))
        orbit = orbit_of(ccd.sector, time[good])
        step = frame_spacing(np.sort(time[np.isfinite(time)]))
        broken = (np.diff(good, prepend=-9) != 1) | (np.diff(time[good], prepend=-np.inf) > 1.5 * step)
        broken |= np.diff(orbit, prepend=-1) != 0
        run = np.cumsum(broken) + runs
        runs = int(run[-1]) if len(run) else runs
        for name, values in (
            ("group", np.full(len(good), i)),
            ("frame", good),
            ("time", time[good]),
            ("orbit", orbit),
            ("run", run),
        ):
            parts[name].append(values)
    if not sum(map(len, parts["frame"])):
        raise StoreError(f"{stores} has no good frame")
    joined = {name: np.concatenate(values) for name, values in parts.items()}
    return Frames(
        tuple(group for group, _ in found),
        tuple(ccd for _, ccd in found),
        tuple(size for _, _, size in tables),
        **joined,
    )


def _read_times(group: Group) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.uint8], int]:
    """Read times, statuses and the size of shards of a group."""
    store = group.store(read_only=True)
    try:
        time, status, light = (
            zarr.open_array(store, path=f"{group.path}/{name}", mode="r")
            for name in ("time", "frame_status", "scattered_light")
        )
    except FileNotFoundError:
        raise StoreError(f"{group.name} has no light yet: build it first") from None
    return np.asarray(time[:]), np.asarray(status[:]), int((light.shards or light.chunks)[0])


def _orbits(tables: list[tuple[int, npt.NDArray[np.float64]]]) -> Any:
    """Make a function that numbers the orbits of times of a sector, the same for all its CCDs."""
    starts: dict[int, npt.NDArray[np.float64]] = {}
    for sector in {sector for sector, _ in tables}:
        every = np.unique(np.concatenate([time for one, time in tables if one == sector]))
        every = every[np.isfinite(every)]
        # of thinned frames, each has a long pause before it
        starts[sector] = every[1:][np.diff(every) > frame_spacing(every) + ORBIT_GAP_DAYS]
    return lambda sector, time: np.searchsorted(starts[sector], time, side="right")


def split(
    frames: Frames,
    *,
    test: float | Iterable[Any] = 0.2,
    by: Literal["orbit", "sector"] = "orbit",
    seed: int = 0,
) -> tuple[Frames, Frames]:
    """Split frames into those to train on and those to test on, whole orbits or sectors at a time.

    All CCDs of an orbit go to the same side: they see the same Earth at the same time. Call it again on the
    first part for a validation set.

    Parameters
    ----------
    frames : Frames
    test : float or iterable
        Share of the orbits (sectors) to test on, at least one; or which: sectors as numbers, orbits as
        (sector, orbit) with orbits counted from 0.
    by : {"orbit", "sector"}
    seed : int
        Of the choice.

    Returns
    -------
    train, test : Frames

    Raises
    ------
    ValueError
        If an argument is wrong or one side would be empty.

    Examples
    --------
    >>> import tessbkg, tessbkg.simulate
    >>> _ = tessbkg.simulate.simulate("memory://sp", frames=8, shape=(64, 64))
    >>> ccd = {"sector": 1, "camera": 1, "ccd": 4}
    >>> _ = tessbkg.build("memory://sp.zarr", root="memory://sp", dark_frames=2, **ccd)
    >>> train, test = split(open_frames("memory://sp.zarr"), test=0.5)
    >>> len(train) > 0 and len(test) > 0
    True
    """
    if by not in {"orbit", "sector"}:
        raise ValueError(f"by={by!r} is unknown: allowed are 'orbit' and 'sector'")
    keys = [
        (int(s), int(o)) if by == "orbit" else int(s)
        for s, o in zip(frames.sector, frames.orbit, strict=True)
    ]
    units: list[Any] = sorted(set(keys))
    if isinstance(test, float | int):
        if not 0 < test < 1:
            raise ValueError(f"test={test!r} is out of range: allowed is a share between 0 and 1")
        count = min(max(1, round(test * len(units))), len(units) - 1)
        chosen = {units[i] for i in np.random.default_rng(seed).permutation(len(units))[:count]}
    else:
        chosen = {tuple(int(i) for i in one) if by == "orbit" else int(one) for one in test}
        unknown = sorted(chosen - set(units))
        if unknown:
            raise ValueError(f"test names {by} {unknown[0]}: there are {units}")
    inside = np.array([key in chosen for key in keys])
    if inside.all() or not inside.any():
        raise ValueError(f"one side of the split would be empty: there is only {by} {units}")
    return frames.select(~inside), frames.select(inside)


# ------------------------------------------------------------------ reading


@lru_cache(maxsize=1024)
def _open_array(group: Group, name: str, pid: int) -> Any:  # noqa: ARG001 (a fork opens its own)
    return zarr.open_array(group.store(read_only=True), path=f"{group.path}/{name}", mode="r")


@lru_cache(maxsize=1024)
def _whole(group: Group, name: str, pid: int) -> npt.NDArray[Any]:
    """Array along time alone, read once a process."""
    return np.asarray(_open_array(group, name, pid)[:])


def read(group: Group, name: str, first: int, last: int) -> npt.NDArray[Any]:
    """Read frames `first` to `last` (exclusive) of a variable.

    Raises
    ------
    ValueError
        If the group has no such variable.
    """
    try:
        array = _open_array(group, name, os.getpid())
    except FileNotFoundError:
        there = sorted(zarr.open_group(group.store(read_only=True), path=group.path, mode="r").array_keys())
        close = difflib.get_close_matches(name, there, 1)
        hint = f": did you mean {close[0]!r}?" if close else f"; it has {', '.join(there)}"
        raise ValueError(f"{group.name} has no variable {name!r}{hint}") from None
    if array.ndim < 3:
        return _whole(group, name, os.getpid())[first:last]
    return np.asarray(array[first:last])


def choose_variables(frames: Frames, variables: Sequence[str] | None) -> tuple[str, ...]:
    """Names to read: those given, or light and the angle maps that every CCD has."""
    if variables is not None:
        return tuple(variables)
    names = ["scattered_light"]
    for name in MAPS:
        try:
            for group in frames.groups:
                _open_array(group, name, os.getpid())
        except FileNotFoundError:
            continue
        names.append(name)
    return tuple(names)


# ------------------------------------------------------------------ order


@dataclass(frozen=True, eq=False)
class Order:
    """What one consumer reads and yields in one epoch.

    Parameters
    ----------
    windows : (n,) int
        Index into `Frames` of the first frame of every window, in the order in which they are yielded.
    buffers : tuple of int
        Windows of each filling of the buffer.
    """

    windows: Ints
    buffers: tuple[int, ...]


def make_order(
    frames: Frames,
    starts: Ints,
    *,
    batch_size: int,
    buffer_shards: int,
    rng: np.random.Generator | None,
    part: tuple[int, int] = (0, 1),
    worker: tuple[int, int] = (0, 1),
) -> Order:
    """Order the windows of an epoch for one worker of one rank: every window once, over all of them.

    Shards are shuffled; the list of their windows is cut into one run a rank, of equal length, and each of
    those into one run a worker, of whole batches. Windows of `buffer_shards` shards are shuffled together.

    Parameters
    ----------
    frames : Frames
    starts : (n,) int
        From :meth:`Frames.windows`.
    batch_size, buffer_shards : int
    rng : numpy.random.Generator, optional
        The same for all ranks and workers; None keeps the order of time.
    part, worker : (int, int)
        Which of how many ranks, workers.
    """
    sizes = np.array(frames.shard_frames, dtype=np.intp)[frames.group[starts]]
    shard = frames.frame[starts] // sizes
    key = frames.group[starts] * (int(shard.max(initial=0)) + 1) + shard
    _, number = np.unique(key, return_inverse=True)
    total = int(number.max(initial=-1)) + 1
    place = np.arange(total) if rng is None else rng.permutation(total)
    order = starts[np.argsort(place[number], kind="stable")]
    number = np.sort(place[number])
    rank, ranks = part
    if ranks > 1:  # equal numbers of batches: a rank that ends early would hang the others
        size = len(order) // ranks
        order, number = (one[rank * size : (rank + 1) * size] for one in (order, number))
    this, workers = worker
    batches = -(-len(order) // batch_size)
    counts = [len(range(w, batches, workers)) for w in range(workers)]
    if workers > 1 and len(order) % batch_size:  # the short batch is the last one of the epoch
        last = (batches - 1) % workers
        sizes_of = [count * batch_size for count in counts]
        sizes_of[last] -= batch_size - len(order) % batch_size
    else:
        sizes_of = [min(count * batch_size, len(order)) for count in counts]
    begin = sum(sizes_of[:this])
    order, number = (one[begin : begin + sizes_of[this]] for one in (order, number))
    filling = np.unique(number, return_inverse=True)[1] // buffer_shards
    buffers = tuple(int(n) for n in np.bincount(filling)) if len(order) else ()
    if rng is not None:
        mine = np.random.default_rng([int(rng.integers(1 << 31)), rank, this])
        order = np.concatenate(
            [mine.permutation(one) for one in np.split(order, np.cumsum(buffers)[:-1])] or [order]
        )
    return Order(order, buffers)


class Batches:
    """An epoch of batches after the other, as NumPy arrays. For JAX, Keras or a loop of your own.

    Iterating once goes through one epoch. Memory holds two fillings of the buffer: 25 MB a shard of 64
    frames, 128 x 128 bins and six variables.

    Parameters
    ----------
    frames : Frames
    window : int
        Frames of a sample that follow each other without a break.
    stride : int
        Frames from one window to the next.
    variables : sequence of str, optional
        Variables on (time, y, x); by default light and the angle maps that are there.
    scalars : sequence of str
        Variables on time, also with more dimensions: "earth_distance", "earth_direction" ...
    batch_size : int
    shuffle : bool
        In random order, another one every epoch; else in order of time.
    buffer_shards : int
        Shards whose windows are shuffled together.
    seed, epoch : int
        Of the order.
    start : int
        Batches of the epoch that were seen already: they are skipped without being read.
    rank, world_size : int
        This process and how many there are: each gets its own part, all parts equally long (up to
        ``world_size - 1`` windows are left out).
    worker, workers : int
        The same within a process; no window is left out.
    drop_last : bool
        Leave out a last batch that is not full.
    stats : mapping, optional
        From `statistics`: values are normalised by it.

    Yields
    ------
    dict of str to numpy.ndarray
        Variables (batch, window, y, x) float32, scalars and `time` (batch, window), `group` and `frame`
        (batch,): which CCD of ``frames.ccds`` and which frame of it comes first.

    Raises
    ------
    ValueError
        If an argument is wrong or a CCD lacks a variable.

    Examples
    --------
    >>> import tessbkg, tessbkg.simulate
    >>> _ = tessbkg.simulate.simulate("memory://ba", frames=8, shape=(64, 64))
    >>> ccd = {"sector": 1, "camera": 1, "ccd": 4}
    >>> _ = tessbkg.build("memory://ba.zarr", root="memory://ba", dark_frames=2, **ccd)
    >>> batch = next(iter(Batches(open_frames("memory://ba.zarr"), batch_size=4)))
    >>> batch["earth_angle"].shape
    (4, 1, 4, 4)
    """

    def __init__(
        self,
        frames: Frames,
        *,
        window: int = 1,
        stride: int = 1,
        variables: Sequence[str] | None = None,
        scalars: Sequence[str] = (),
        batch_size: int = 32,
        shuffle: bool = True,
        buffer_shards: int = 4,
        seed: int = 0,
        epoch: int = 0,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
        worker: int = 0,
        workers: int = 1,
        drop_last: bool = False,
        stats: Mapping[str, Mapping[str, float]] | None = None,
    ) -> None:
        for name, value, low in (
            ("batch_size", batch_size, 1),
            ("buffer_shards", buffer_shards, 1),
            ("epoch", epoch, 0),
            ("start", start, 0),
            ("seed", seed, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < low:
                raise ValueError(f"{name}={value!r} is not allowed: it must be a whole number from {low}")
        for name, one, many in (("rank", rank, world_size), ("worker", worker, workers)):
            if not 0 <= one < many:
                raise ValueError(f"{name}={one} is out of range: there are {many}")
        self.frames = frames
        self.window = window
        self.starts = frames.windows(window, stride)
        self.variables = choose_variables(frames, variables)
        self.scalars = tuple(scalars)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.buffer_shards = buffer_shards
        self.seed, self.epoch, self.start = seed, epoch, start
        self.rank, self.world_size = rank, world_size
        self.worker, self.workers = worker, workers
        self.drop_last = drop_last
        self.stats = stats

    def __repr__(self) -> str:
        what = f"{len(self):,} of {self.batch_size} windows of {self.window}"
        where = f"epoch {self.epoch}, seed {self.seed}, rank {self.rank} of {self.world_size}"
        return f"<Batches: {what}, {', '.join((*self.variables, *self.scalars))}; {where}>"

    def order(self) -> Order:
        """Order of the windows of this epoch."""
        return make_order(
            self.frames,
            self.starts,
            batch_size=self.batch_size,
            buffer_shards=self.buffer_shards,
            rng=np.random.default_rng([self.seed, self.epoch]) if self.shuffle else None,
            part=(self.rank, self.world_size),
            worker=(self.worker, self.workers),
        )

    def __len__(self) -> int:
        """Batches of this epoch, of this worker, those before `start` not counted."""
        n = len(self.order().windows)
        whole = n // self.batch_size if self.drop_last else -(-n // self.batch_size)
        return max(whole - self.start, 0)

    def at(
        self, *, epoch: int | None = None, start: int = 0, worker: tuple[int, int] | None = None
    ) -> Batches:
        """Return the same batches from another place on, or for one of several workers."""
        other = copy.copy(self)
        other.epoch = self.epoch if epoch is None else epoch
        other.start = start
        other.worker, other.workers = (self.worker, self.workers) if worker is None else worker
        return other

    def __iter__(self) -> Iterator[Batch]:
        order = self.order()
        ends = np.cumsum(order.buffers)
        begin = self.start * self.batch_size
        fillings = [
            (max(int(end) - n, begin), int(end))
            for n, end in zip(order.buffers, ends, strict=True)
            if end > begin
        ]
        with ThreadPoolExecutor(1) as ahead, ThreadPoolExecutor(READERS) as pool:
            waiting = iter(fillings)
            pending = [
                ahead.submit(self._fill, pool, order.windows[slice(*one)])
                for one in [next(waiting, None)]
                if one
            ]
            rest: list[tuple[Batch, Ints]] = []
            held = 0
            while pending:
                block = pending.pop().result()
                nxt = next(waiting, None)
                if nxt is not None:
                    pending.append(ahead.submit(self._fill, pool, order.windows[slice(*nxt)]))
                rest.append((block, np.arange(len(block["group"]))))
                held += len(block["group"])
                while held >= self.batch_size or (held and nxt is None):
                    if held < self.batch_size and self.drop_last:
                        return
                    yield self._take(rest, min(self.batch_size, held))
                    held -= min(self.batch_size, held)

    def _take(self, rest: list[tuple[Batch, Ints]], size: int) -> Batch:
        """Take the next samples out of what the buffers hold."""
        pieces: list[Batch] = []
        while size:
            block, places = rest[0]
            now, later = places[:size], places[size:]
            size -= len(now)
            pieces.append({name: self._gather(block, name, now) for name in block if name[0] != "_"})
            if len(later):
                rest[0] = block, later
            else:
                rest.pop(0)
        batch = (
            pieces[0]
            if len(pieces) == 1
            else {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
        )
        return normalise(batch, self.stats) if self.stats is not None else batch

    def _gather(self, block: Batch, name: str, places: Ints) -> npt.NDArray[Any]:
        """Pick samples of one variable: windows of the frames that the buffer holds."""
        if name in {"group", "frame"}:
            return block[name][places]
        rows = block["_row"][places][:, None] + np.arange(self.window)
        return block[name][rows]

    def _fill(self, pool: ThreadPoolExecutor, windows: Ints) -> Batch:
        """Read all shards that windows touch, each variable into one array."""
        frames = self.frames
        names = (*self.variables, *(one for one in self.scalars if one != "time"), "time")
        group, first = frames.group[windows], frames.frame[windows]
        sizes = np.array(frames.shard_frames, dtype=np.intp)[group]
        spans: dict[tuple[int, int], tuple[int, int, int]] = {}
        rows = 0
        pairs = np.unique(np.stack([group, first // sizes], axis=1), axis=0)
        for g, s in pairs.tolist():
            of = first[(group == g) & (first // sizes == s)]
            low, high = int(of.min()), int(of.max()) + self.window
            spans[g, s] = (low, high, rows)
            rows += high - low
        jobs = {
            (name, key): pool.submit(read, frames.groups[key[0]], name, low, high)
            for key, (low, high, _) in spans.items()
            for name in names
        }
        block: Batch = {}
        for name in names:
            parts = [jobs[name, key].result() for key in spans]
            block[name] = parts[0] if len(parts) == 1 else np.concatenate(parts)
        keys = zip(group.tolist(), (first // sizes).tolist(), first.tolist(), strict=True)
        block["_row"] = np.array([spans[g, s][2] + f - spans[g, s][0] for g, s, f in keys], dtype=np.intp)
        block["group"], block["frame"] = group, first
        return block


# ------------------------------------------------------------------ normalisation


def statistics(
    frames: Frames,
    path: str | None = None,
    *,
    variables: Sequence[str] | None = None,
    scalars: Sequence[str] = (),
    store_options: Options | None = None,
) -> dict[str, dict[str, float]]:
    """Compute mean and standard deviation of variables over frames; once, if given a place to keep them.

    Give the frames to train on, never those to test on. Angles that turn (azimuths, longitudes) have none.

    Parameters
    ----------
    frames : Frames
    path : str, optional
        JSON file or URL: read if it was made of the same frames, else written.
    variables, scalars : sequence of str
        As of `Batches`.
    store_options : dict, optional
        fsspec options of `path`.

    Returns
    -------
    dict
        ``{name: {"mean": ..., "std": ..., "n": ...}}``; NaN left out.

    Raises
    ------
    ValueError
        If a CCD lacks a variable.

    Examples
    --------
    >>> import tessbkg, tessbkg.simulate
    >>> _ = tessbkg.simulate.simulate("memory://st", frames=8, shape=(64, 64))
    >>> ccd = {"sector": 1, "camera": 1, "ccd": 4}
    >>> _ = tessbkg.build("memory://st.zarr", root="memory://st", dark_frames=2, **ccd)
    >>> sorted(statistics(open_frames("memory://st.zarr")))
    ['earth_angle', 'moon_angle', 'scattered_light']
    """
    names = (*choose_variables(frames, variables), *scalars)
    names = tuple(name for name in names if not name.endswith(CIRCULAR))
    text = repr([[(str(c), g.url) for c, g in zip(frames.ccds, frames.groups, strict=True)], sorted(names)])
    digest = hashlib.sha256(text.encode() + frames.group.tobytes() + frames.frame.tobytes()).hexdigest()[:16]
    fs = place = None
    if path is not None:
        fs, place = filesystem(path, store_options)
        try:
            stored = json.loads(fs.cat_file(place))
        except FileNotFoundError:
            stored = {}
        if stored.get("frames") == digest:
            found: dict[str, dict[str, float]] = stored["statistics"]
            return found
    sums = {name: np.zeros(3) for name in names}  # n, mean, sum of squares about it
    sizes = np.array(frames.shard_frames, dtype=np.intp)[frames.group]
    keys = np.stack([frames.group, frames.frame // sizes], axis=1)
    for g, s in np.unique(keys, axis=0).tolist():
        inside = frames.frame[(keys == (g, s)).all(axis=1)]
        low, high = int(inside.min()), int(inside.max()) + 1
        for name in names:
            values = read(frames.groups[g], name, low, high)[inside - low].astype(np.float64)
            sums[name] = _merge(sums[name], values[np.isfinite(values)])
    result = {
        name: {"mean": float(mean), "std": float(np.sqrt(square / n)) if n else float("nan"), "n": int(n)}
        for name, (n, mean, square) in sums.items()
    }
    if fs is not None:
        fs.pipe_file(place, json.dumps({"frames": digest, "statistics": result}, indent=1).encode())
    return result


def _merge(sums: npt.NDArray[np.float64], values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Add values to number, mean and squares about the mean (Chan, Golub and LeVeque 1979)."""
    if not values.size:
        return sums
    n, mean, square = sums
    m, other = values.size, values.mean()
    apart = other - mean
    both = n + m
    return np.array(
        [both, mean + apart * m / both, square + np.square(values - other).sum() + apart**2 * n * m / both]
    )


def normalise(batch: Batch, stats: Mapping[str, Mapping[str, float]]) -> Batch:
    """Take the mean away and divide by the standard deviation; turn azimuths into sine and cosine.

    Variables without statistics stay as they are. An azimuth `a` becomes `a_sin` and `a_cos`.

    Parameters
    ----------
    batch : dict of str to array
        From `Batches`.
    stats : mapping
        From `statistics`.

    Returns
    -------
    dict of str to float32 array
        Of the same shapes.

    Examples
    --------
    >>> import numpy as np
    >>> normalise({"earth_angle": np.array([80.0, 100.0])}, {"earth_angle": {"mean": 90.0, "std": 5.0}})
    {'earth_angle': array([-2.,  2.], dtype=float32)}
    """
    out: Batch = {}
    for name, values in batch.items():
        if name in stats:
            scale = stats[name]["std"] or 1.0
            out[name] = ((values - stats[name]["mean"]) / scale).astype(np.float32)
        elif name.endswith(CIRCULAR):
            radians = np.radians(values)
            out[f"{name}_sin"], out[f"{name}_cos"] = (
                turn(radians).astype(np.float32) for turn in (np.sin, np.cos)
            )
        else:
            out[name] = values
    return out


# ------------------------------------------------------------------ PyTorch


def torch_batches(frames: Frames, **options: Any) -> BatchDataset:
    """Make an iterable PyTorch dataset of whole batches.

    Use it as ``DataLoader(dataset, batch_size=None, num_workers=4)``: batches are made in the workers, each
    of which reads its own shards. Options are those of `Batches` but `worker` and `workers`; `rank` and
    `world_size` are taken from ``torch.distributed`` where that is running. ``dataset.set_epoch(n)`` before
    every epoch; ``dataset.state(batches_seen, workers=4)`` and ``dataset.load_state(state)`` go on in
    mid-epoch, in the same order, with the same number of workers.

    Parameters
    ----------
    frames : Frames
        From `open_frames` or `split`.
    **options
        As of `Batches`, but `worker` and `workers`.

    Returns
    -------
    BatchDataset
        Tensors by name; an example stands there.

    Raises
    ------
    ImportError
        If PyTorch is not installed: ``pip install tessbkg[torch]``.
    """
    from tessbkg.torchdata import BatchDataset  # noqa: PLC0415 (PyTorch is optional)

    return BatchDataset(frames, **options)


def torch_windows(frames: Frames, **options: Any) -> WindowDataset:
    """Make a map-style PyTorch dataset of windows, for samplers of your own.

    Random access costs one inner chunk (8 frames) a variable and sample, less in batches, which are read
    together; `torch_batches` reads every shard once instead.

    Parameters
    ----------
    frames : Frames
        From `open_frames` or `split`.
    **options
        `window`, `stride`, `variables`, `scalars`, `stats`, as of `Batches`.

    Returns
    -------
    WindowDataset
        Tensors by name; an example stands there.

    Raises
    ------
    ImportError
        If PyTorch is not installed: ``pip install tessbkg[torch]``.
    """
    from tessbkg.torchdata import WindowDataset  # noqa: PLC0415 (PyTorch is optional)

    return WindowDataset(frames, **options)
