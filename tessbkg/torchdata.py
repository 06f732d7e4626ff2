"""PyTorch datasets over `tessbkg.loader`; made by `tessbkg.loader.torch_batches` and `torch_windows`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

try:
    import torch
    from torch.utils.data import Dataset, IterableDataset, get_worker_info
except ImportError as error:  # pragma: no cover
    raise ImportError("PyTorch is not installed: pip install tessbkg[torch]") from error

from tessbkg.loader import Batches, choose_variables, normalise, read

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from tessbkg.loader import Batch, Frames

Tensors = dict[str, torch.Tensor]


def _tensors(batch: Batch) -> Tensors:
    return {name: torch.from_numpy(np.asarray(values, order="C")) for name, values in batch.items()}


class BatchDataset(IterableDataset[Tensors]):
    """Whole batches, made in the worker that reads their shards; see :func:`tessbkg.loader.torch_batches`.

    Examples
    --------
    >>> from tessbkg.loader import open_frames, torch_batches
    >>> import tessbkg, tessbkg.simulate
    >>> _ = tessbkg.simulate.simulate("memory://bd", frames=8, shape=(64, 64))
    >>> ccd = {"sector": 1, "camera": 1, "ccd": 4}
    >>> _ = tessbkg.build("memory://bd.zarr", root="memory://bd", dark_frames=2, **ccd)
    >>> dataset = torch_batches(open_frames("memory://bd.zarr"), batch_size=4)
    >>> loader = torch.utils.data.DataLoader(dataset, batch_size=None)
    >>> next(iter(loader))["scattered_light"].shape
    torch.Size([4, 1, 4, 4])
    """

    def __init__(
        self,
        frames: Frames,
        *,
        rank: int | None = None,
        world_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        forbidden = sorted({"worker", "workers"} & set(options))
        if forbidden:
            raise ValueError(f"{forbidden[0]} is the business of DataLoader")
        if rank is None or world_size is None:
            rank, world_size = _place()
        self.batches = Batches(frames, rank=rank, world_size=world_size, **options)
        self.workers: int | None = None

    def __repr__(self) -> str:
        return repr(self.batches).replace("Batches", "BatchDataset", 1)

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch."""
        self.batches, self.workers = self.batches.at(epoch=epoch), None

    def state(self, batches_seen: int, *, workers: int = 0) -> dict[str, int]:
        """Where this epoch stands after `batches_seen` batches from this loader, of `num_workers=workers`."""
        one = self.batches
        return {
            "seed": one.seed,
            "epoch": one.epoch,
            "start": one.start + batches_seen,
            "batch_size": one.batch_size,
            "world_size": one.world_size,
            "workers": workers,
        }

    def load_state(self, state: dict[str, int]) -> None:
        """Go on where `state` was taken.

        Raises
        ------
        ValueError
            If this dataset orders batches otherwise.
        """
        one = self.batches
        for name in ("seed", "batch_size", "world_size"):
            if state[name] != getattr(one, name):
                raise ValueError(
                    f"the state is of {name}={state[name]}, this dataset of {getattr(one, name)}"
                )
        self.batches = one.at(epoch=state["epoch"], start=state["start"])
        self.workers = max(state["workers"], 1)

    def __len__(self) -> int:
        """Batches that are left in this epoch."""
        return len(self.batches)

    def __iter__(self) -> Iterator[Tensors]:
        info = get_worker_info()
        workers = info.num_workers if info is not None else 1
        if self.workers is not None and self.workers != workers:
            raise ValueError(f"the state is of {self.workers} workers, this loader has {workers}")
        # DataLoader takes a batch from every worker in turn, from the first: the one whose turn it is
        # after `start` batches becomes the first.
        start = self.batches.start
        role = ((info.id if info is not None else 0) + start) % workers
        seen = len(range(role, start, workers))
        for batch in self.batches.at(start=seen, worker=(role, workers)):
            yield _tensors(batch)


def _place() -> tuple[int, int]:
    """Rank and number of processes of a distributed run; alone without."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


class WindowDataset(Dataset[Tensors]):
    """Windows by number; see :func:`tessbkg.loader.torch_windows`.

    Examples
    --------
    >>> from tessbkg.loader import open_frames, torch_windows
    >>> import tessbkg, tessbkg.simulate
    >>> _ = tessbkg.simulate.simulate("memory://wd", frames=8, shape=(64, 64))
    >>> ccd = {"sector": 1, "camera": 1, "ccd": 4}
    >>> _ = tessbkg.build("memory://wd.zarr", root="memory://wd", dark_frames=2, **ccd)
    >>> torch_windows(open_frames("memory://wd.zarr"))[0]["scattered_light"].shape
    torch.Size([1, 4, 4])
    """

    def __init__(
        self,
        frames: Frames,
        *,
        window: int = 1,
        stride: int = 1,
        variables: Sequence[str] | None = None,
        scalars: Sequence[str] = (),
        stats: Mapping[str, Mapping[str, float]] | None = None,
    ) -> None:
        super().__init__()
        self.frames, self.window, self.stats = frames, window, stats
        self.starts = frames.windows(window, stride)
        self.names = (*choose_variables(frames, variables), *(s for s in scalars if s != "time"), "time")

    def __repr__(self) -> str:
        return f"<WindowDataset: {len(self):,} windows of {self.window}, {', '.join(self.names)}>"

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> Tensors:
        if not -len(self) <= i < len(self):
            raise IndexError(f"window {i} of {len(self)}")
        return self.__getitems__([i])[0]

    def __getitems__(self, places: Sequence[int]) -> list[Tensors]:
        """Read several windows; neighbours in one read."""
        starts = self.starts[np.asarray(places, dtype=np.intp)]
        group, first = self.frames.group[starts], self.frames.frame[starts]
        samples: list[Any] = [None] * len(starts)
        order = np.lexsort((first, group))
        apart = (np.diff(group[order], prepend=-1) != 0) | (
            np.diff(first[order], prepend=0) > 2 * self.window + 8
        )
        for together in np.split(order, np.flatnonzero(apart)[1:]):
            g, low, high = int(group[together[0]]), int(first[together[0]]), int(first[together[-1]])
            block = {name: read(self.frames.groups[g], name, low, high + self.window) for name in self.names}
            for i in together:
                at = slice(int(first[i]) - low, int(first[i]) - low + self.window)
                sample = {name: values[at].copy() for name, values in block.items()}
                sample |= {"group": np.array(g), "frame": np.array(first[i])}
                samples[i] = _tensors(normalise(sample, self.stats) if self.stats is not None else sample)
        return samples
