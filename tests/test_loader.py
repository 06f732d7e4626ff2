"""Batches: every window once, aligned, without leakage; the same after fork, spawn and a restart."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from tessbkg import loader
from tessbkg.ccd import CCD
from tessbkg.errors import StoreError
from tessbkg.loader import Batches, make_order, normalise, open_frames, split, statistics
from tessbkg.store import open_store

STEP = 1 / 48
NY, NX, SHARD = 4, 5, 16


def code(ccd, frame):
    """Value of a pixel: which CCD, which frame."""
    return 10000 * ccd + frame


def write_store(url, *, sectors=(1, 2), ccds=(1, 2), n=100, bad=(7, 30, 31), maps=True):
    """Write groups whose pixels encode their own index; each sector is two orbits."""
    store = open_store(url)
    for sector in sectors:
        time = 1325 + 27.3 * (sector - 1) + np.arange(n) * STEP
        time[n // 2 :] += 5
        for ccd in ccds:
            path = CCD(sector, 1, ccd).group
            parts = path.split("/")
            for depth in range(len(parts) + 1):
                zarr.open_group(store, path="/".join(parts[:depth]), mode="a", zarr_format=3)
            status = np.zeros(n, "u1")
            status[list(bad)] = 1
            frames = code(10 * sector + ccd, np.arange(n, dtype="f4"))[:, None, None]
            light = np.broadcast_to(frames, (n, NY, NX)).astype("f4").copy()
            light[status != 0] = np.nan
            names = {"scattered_light": light}
            if maps:
                names |= {"earth_angle": light + 0.25, "earth_azimuth": light % 360}
            for name, values in names.items():
                array = zarr.create_array(
                    store,
                    name=f"{path}/{name}",
                    shape=values.shape,
                    dtype="f4",
                    chunks=(8, NY, NX),
                    shards=(SHARD, NY, NX),
                    fill_value=np.nan,
                    overwrite=True,
                )
                array[:] = values
            for name, values in {
                "time": time,
                "frame_status": status,
                "earth_distance": time * 1e3,
                "earth_direction": np.stack([time, time, time], axis=1),
            }.items():
                array = zarr.create_array(
                    store, name=f"{path}/{name}", data=values, chunks=values.shape, overwrite=True
                )


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("loader") / "bkg.zarr")
    write_store(path)
    return path


@pytest.fixture(scope="module")
def frames(url):
    return open_frames(url)


def codes(frames, batch):
    """What the first pixel of every first frame must hold."""
    numbers = np.array([10 * ccd.sector + ccd.ccd for ccd in frames.ccds])
    return code(numbers[batch["group"]], batch["frame"])


def seen(batches):
    return [
        (int(g), int(f)) for batch in batches for g, f in zip(batch["group"], batch["frame"], strict=True)
    ]


def test_the_index_holds_good_frames_orbits_and_runs(frames):
    assert repr(frames) == "<Frames: 388 good frames of 4 CCDs in 4 orbits>"
    assert repr(frames.select(np.arange(388) == 0)) == "<Frames: 1 good frame of 4 CCDs in 1 orbit>"
    assert [str(ccd) for ccd in frames.ccds][:2] == ["sector 1 camera 1 CCD 1", "sector 1 camera 1 CCD 2"]
    first = frames.select(frames.group == 0)
    assert set(range(100)) - set(first.frame.tolist()) == {7, 30, 31}
    assert (first.orbit == (first.frame >= 50)).all()
    ends = np.flatnonzero(np.diff(first.run))
    assert first.frame[ends].tolist() == [6, 29, 49]
    assert frames.sector.tolist() == [1] * 194 + [2] * 194


@pytest.mark.parametrize(("length", "stride"), [(1, 1), (3, 1), (4, 4), (5, 2), (200, 1)])
def test_windows_never_cross_a_break(frames, length, stride):
    starts = frames.windows(length, stride)
    for start in starts:
        inside = slice(start, start + length)
        assert len(set(frames.run[inside])) == len(set(frames.group[inside])) == 1
        assert (np.diff(frames.frame[inside]) == 1).all()
    if stride == 1:
        lengths = np.unique(frames.run, return_counts=True)[1]
        assert len(starts) == np.maximum(lengths - length + 1, 0).sum()


@pytest.mark.parametrize("by", ["orbit", "sector"])
def test_a_split_shares_no_orbit(frames, by):
    train, test = split(frames, test=0.3, by=by, seed=3)
    assert len(train) + len(test) == len(frames)
    keys = [{(s, o) for s, o in zip(one.sector, one.orbit, strict=True)} for one in (train, test)]
    assert not keys[0] & keys[1]
    if by == "sector":
        assert not set(train.sector) & set(test.sector)
    for one in (train, test):
        assert len(set(one.group.tolist())) == 2 * len(set(one.sector.tolist()))
        batch = next(iter(Batches(one, window=3, batch_size=8)))
        assert np.array_equal(batch["scattered_light"][:, 0, 0, 0], codes(one, batch))
    _, named = split(frames, test=[(1, 0)])
    assert {(s, o) for s, o in zip(named.sector, named.orbit, strict=True)} == {(1, 0)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"test": 1.5}, "test=1.5 is out of range"),
        ({"by": "ccd"}, "by='ccd' is unknown"),
        ({"test": [(9, 9)]}, "test names orbit"),
        ({"test": [1, 2], "by": "sector"}, "one side of the split would be empty"),
    ],
)
def test_wrong_splits_are_named(frames, arguments, message):
    with pytest.raises(ValueError, match=message):
        split(frames, **arguments)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("window", [1, 4])
def test_every_window_comes_once_with_its_own_maps_and_scalars(frames, shuffle, window):
    batches = Batches(
        frames,
        window=window,
        batch_size=7,
        shuffle=shuffle,
        scalars=("earth_distance", "earth_direction"),
        buffer_shards=3,
    )
    got = list(batches)
    assert len(got) == len(batches)
    expected = [(int(frames.group[i]), int(frames.frame[i])) for i in frames.windows(window)]
    assert sorted(seen(got)) == sorted(expected)
    assert (seen(got) == expected) is not shuffle
    for batch in got:
        light = batch["scattered_light"]
        assert light.shape[1:] == (window, NY, NX)
        assert light.dtype == np.float32
        assert np.array_equal(light[:, :, 0, 0], codes(frames, batch)[:, None] + np.arange(window))
        assert np.array_equal(batch["earth_angle"], light + 0.25)
        assert np.array_equal(batch["earth_distance"], batch["time"] * 1e3)
        assert batch["earth_direction"].shape == (len(light), window, 3)
        assert np.array_equal(batch["earth_direction"][..., 1], batch["time"])
    assert len(got[-1]["group"]) == (len(expected) - 1) % 7 + 1


def test_the_order_is_that_of_seed_and_epoch(frames):
    def run(**options):
        return seen(Batches(frames, batch_size=10, **options))

    assert run(seed=1) == run(seed=1)
    assert run(seed=1) != run(seed=2)
    assert run(seed=1, epoch=1) != run(seed=1)
    assert sorted(run(seed=1, epoch=1)) == sorted(run(seed=1))


@settings(deadline=None, max_examples=60)
@given(
    data=st.data(),
    batch=st.integers(1, 40),
    ranks=st.integers(1, 5),
    workers=st.integers(1, 5),
    window=st.integers(1, 5),
)
def test_ranks_and_workers_share_the_windows(frames, data, batch, ranks, workers, window):  # noqa: PLR0917
    starts = frames.windows(window)
    buffer = data.draw(st.integers(1, 6))
    every, lengths = [], []
    for rank in range(ranks):
        total = 0
        counts = []
        for worker in range(workers):
            order = make_order(
                frames,
                starts,
                batch_size=batch,
                buffer_shards=buffer,
                rng=np.random.default_rng(5),
                part=(rank, ranks),
                worker=(worker, workers),
            )
            every += order.windows.tolist()
            total += len(order.windows)
            counts.append(-(-len(order.windows) // batch))
            assert sum(order.buffers) == len(order.windows)
        # DataLoader takes turns: no worker may end before its turn
        batches = -(-total // batch)
        assert counts == [len(range(w, batches, workers)) for w in range(workers)]
        lengths.append(total)
    assert len(set(lengths)) == 1
    assert len(every) == len(set(every)) == len(starts) // ranks * ranks


def test_an_epoch_goes_on_where_it_stopped(frames):
    whole = Batches(frames, batch_size=9, window=2, buffer_shards=2)
    everything = list(whole)
    for start in (0, 1, 5, len(everything) - 1, len(everything)):
        rest = list(whole.at(start=start))
        assert seen(rest) == seen(everything[start:])
        assert len(whole.at(start=start)) == len(rest)


def test_what_was_seen_is_not_read_again(frames, monkeypatch):
    reads = []
    real = loader.read
    monkeypatch.setattr(loader, "read", lambda *a: reads.append(a) or real(*a))
    list(Batches(frames, batch_size=9, variables=["scattered_light"]))
    whole = len(reads)
    assert whole == 2 * 4 * 7  # light and time, 4 groups of 7 shards: each once
    reads.clear()
    list(Batches(frames, batch_size=9, variables=["scattered_light"], start=30))
    assert 0 < len(reads) < whole / 2


def test_statistics_are_computed_once_and_kept(frames, tmp_path, monkeypatch):
    train, test = split(frames, seed=1)
    path = str(tmp_path / "stats.json")
    found = statistics(train, path, scalars=("earth_distance",))
    values = np.concatenate([b["scattered_light"].ravel() for b in Batches(train)]).astype("f8")
    assert found["scattered_light"]["mean"] == pytest.approx(values.mean())
    assert found["scattered_light"]["std"] == pytest.approx(values.std())
    assert found["scattered_light"]["n"] == values.size
    assert set(found) == {"scattered_light", "earth_angle", "earth_distance"}
    assert json.loads((tmp_path / "stats.json").read_text())["statistics"] == found

    def fail(*_):
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr(loader, "read", fail)
        assert statistics(train, path, scalars=("earth_distance",)) == found
    other = statistics(test, path, scalars=("earth_distance",))
    assert other != found
    values = [b["scattered_light"].ravel() for b in Batches(train, stats=found)]
    assert np.concatenate(values).mean() == pytest.approx(0, abs=1e-4)
    assert np.concatenate(values).std() == pytest.approx(1, abs=1e-4)


def test_turning_angles_become_sine_and_cosine():
    batch = {"earth_azimuth": np.array([0.0, 359.9]), "other": np.arange(2)}
    made = normalise(batch, {})
    assert set(made) == {"earth_azimuth_sin", "earth_azimuth_cos", "other"}
    assert np.abs(np.diff(made["earth_azimuth_sin"])) < 0.002
    assert made["earth_azimuth_cos"].dtype == np.float32


def test_variables_are_those_that_all_ccds_have(frames, tmp_path):
    assert Batches(frames).variables == ("scattered_light", "earth_angle", "earth_azimuth")
    write_store(str(tmp_path / "no_maps"), sectors=(3,), maps=False)
    both = open_frames([frames.groups[0].url, str(tmp_path / "no_maps")])
    assert Batches(both).variables == ("scattered_light",)
    with pytest.raises(ValueError, match="no variable 'earth_angle'"):
        list(Batches(both, variables=["earth_angle"]))


def test_some_ccds_of_a_store(url, tmp_path):
    one = open_frames(url, ccds=[(2, 1, 1)])
    assert one.ccds == (CCD(2, 1, 1),)
    with pytest.raises(StoreError, match="has no sector 9 camera 1 CCD 1"):
        open_frames(url, ccds=[CCD(9, 1, 1)])
    with pytest.raises(StoreError):
        open_frames(str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"window": 0}, "window=0"),
        ({"stride": 1.5}, "stride=1.5"),
        ({"rank": 2, "world_size": 2}, "rank=2 is out of range: there are 2"),
        ({"start": -1}, "start=-1"),
        ({"buffer_shards": True}, "buffer_shards=True"),
    ],
)
def test_wrong_arguments_are_named(frames, options, message):
    with pytest.raises(ValueError, match=message):
        Batches(frames, **options)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("earth_angel", "'earth_angel': did you mean 'earth_angle'?"), ("xyzzy", "'xyzzy'; it has earth_angle")],
)
def test_a_variable_that_is_not_there_is_named(frames, name, hint):
    with pytest.raises(ValueError, match=re.escape(hint)):
        next(iter(Batches(frames, variables=(name,))))


def test_what_there_is_to_read_is_shown(frames):
    batches = Batches(frames, batch_size=10, window=2, seed=3, scalars=("earth_distance",))
    names = ", ".join((*batches.variables, "earth_distance"))
    where = "epoch 0, seed 3, rank 0 of 1"
    assert repr(batches) == f"<Batches: {len(batches)} of 10 windows of 2, {names}; {where}>"


def test_frames_a_day_apart_are_of_two_orbits(tmp_path):
    times = 1325 + 1.04 * np.array([0, 1, 2, 3, 4, 5, 7, 8, 9, 10])
    group = zarr.open_group(tmp_path / "few.zarr", path="s0001/cam1/ccd1", mode="w")
    for name, values in {
        "scattered_light": np.zeros((10, 4, 4), "f4"),
        "time": times,
        "frame_status": np.zeros(10, "u1"),
    }.items():
        group.create_array(name, data=values)
    assert open_frames(str(tmp_path / "few.zarr")).orbit.tolist() == [0] * 6 + [1] * 4


def test_a_store_that_tessbkg_built(tmp_path):
    import tessbkg
    from tessbkg.simulate import simulate

    simulate(str(tmp_path / "sky"), frames=20, shape=(64, 64), faults={3: "missing"})
    store = str(tmp_path / "bkg.zarr")
    tessbkg.build(store, sector=1, camera=1, ccd=4, root=str(tmp_path / "sky"), dark_frames=2, shard_frames=8)
    ds = tessbkg.open_background(store, sector=1, camera=1, ccd=4, chunks=None)
    index = open_frames(store)
    assert len(index) == int((ds.frame_status == 0).sum())
    for batch in Batches(index, batch_size=4, scalars=("level",)):
        for i, frame in enumerate(batch["frame"]):
            assert np.array_equal(batch["scattered_light"][i, 0], ds.scattered_light[frame])
            assert batch["time"][i, 0] == ds.time[frame]
            assert batch["level"][i, 0] == ds.level[frame]


# ------------------------------------------------------------------ PyTorch


@pytest.fixture(scope="module")
def data():
    """torch.utils.data, where PyTorch is installed."""
    return pytest.importorskip("torch.utils.data")


def load(data, dataset, *, workers=0, context=None, **options):
    return data.DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        multiprocessing_context=context if workers else None,
        **options,
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:This DataLoader:UserWarning")
@pytest.mark.parametrize(("workers", "context"), [(0, None), (1, "fork"), (3, "fork"), (2, "spawn")])
def test_a_loader_yields_every_window_once(frames, data, workers, context):
    import torch

    dataset = loader.torch_batches(frames, batch_size=16, window=2, buffer_shards=2)
    list(Batches(frames, batch_size=16))  # stores were open before the fork
    got = list(load(data, dataset, workers=workers, context=context))
    assert len(got) == len(dataset)
    assert isinstance(got[0]["scattered_light"], torch.Tensor)
    expected = [(int(frames.group[i]), int(frames.frame[i])) for i in frames.windows(2)]
    assert sorted(seen(got)) == sorted(expected)
    for batch in got:
        assert np.array_equal(
            batch["scattered_light"][:, 0, 0, 0].numpy(),
            codes(frames, {k: v.numpy() for k, v in batch.items()}),
        )
    dataset.set_epoch(1)
    again = list(load(data, dataset, workers=workers, context=context))
    assert seen(again) != seen(got)
    assert sorted(seen(again)) == sorted(expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:This DataLoader:UserWarning")
@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("stop", [0, 1, 5, 8])
def test_a_loader_goes_on_in_mid_epoch(frames, data, workers, stop):
    dataset = loader.torch_batches(frames, batch_size=16, buffer_shards=2, seed=4)
    dataset.set_epoch(2)
    whole = list(load(data, dataset, workers=workers, context="fork"))
    state = json.loads(json.dumps(dataset.state(stop, workers=workers)))
    fresh = loader.torch_batches(frames, batch_size=16, buffer_shards=2, seed=4)
    fresh.load_state(state)
    assert len(fresh) == len(whole) - stop
    rest = list(load(data, fresh, workers=workers, context="fork"))
    assert seen(rest) == seen(whole[stop:])


def test_a_state_of_another_order_is_refused(frames, data):
    dataset = loader.torch_batches(frames, batch_size=16)
    with pytest.raises(ValueError, match="the state is of batch_size=8"):
        dataset.load_state(loader.torch_batches(frames, batch_size=8).state(1))
    dataset.load_state(dataset.state(1, workers=2))
    with pytest.raises(ValueError, match="the state is of 2 workers, this loader has 1"):
        next(iter(dataset))
    with pytest.raises(ValueError, match="worker is the business of DataLoader"):
        loader.torch_batches(frames, worker=1)


def test_distributed_ranks_share_an_epoch(frames, data):
    parts = [
        seen(load(data, loader.torch_batches(frames, batch_size=8, rank=rank, world_size=3)))
        for rank in range(3)
    ]
    assert len({len(part) for part in parts}) == 1
    together = [one for part in parts for one in part]
    assert len(set(together)) == len(together) == len(frames) // 3 * 3


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:This DataLoader:UserWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_windows_by_number_are_the_same_windows(frames, data, workers):
    from torch.utils.data.distributed import DistributedSampler

    dataset = loader.torch_windows(frames, window=3, scalars=["earth_distance"])
    assert len(dataset) == len(frames.windows(3))
    one = dataset[5]
    assert one["scattered_light"].shape == (3, NY, NX)
    assert one["scattered_light"][0, 0, 0] == codes(frames, {k: np.asarray(v) for k, v in one.items()})
    with pytest.raises(IndexError):
        dataset[len(dataset)]
    got = []
    for rank in range(2):
        sampler = DistributedSampler(dataset, num_replicas=2, rank=rank, shuffle=True)
        got += list(
            data.DataLoader(
                dataset,
                batch_size=10,
                sampler=sampler,
                num_workers=workers,
                multiprocessing_context="fork" if workers else None,
            )
        )
    for batch in got:
        arrays = {k: v.numpy() for k, v in batch.items()}
        expected = codes(frames, arrays)[:, None] + np.arange(3)
        assert np.array_equal(arrays["scattered_light"][:, :, 0, 0], expected)
        assert np.array_equal(arrays["earth_distance"], arrays["time"] * 1e3)
    expected = {(int(frames.group[i]), int(frames.frame[i])) for i in frames.windows(3)}
    assert set(seen(got)) == expected
