"""Faulty sources: each fault is healed by a retry or becomes a status and a reason."""

import random
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from builds import REDUCTION, arrays_of, assert_equal, some
from frames import CCD1, contents, edited, listed, simulated
from servers import Fault

import tessbkg
from tessbkg import storage
from tessbkg.check import check
from tessbkg.errors import FFIFormatError, FFIMissingError, FFIReadError
from tessbkg.ffi import FrameStatus, parse_header

FRAMES = 24
BAD = 9  # a frame that is good and not dark
QUICK = {"read_timeout": 2, "connect_timeout": 2}


@pytest.fixture(scope="module")
def source(serve_folder, tmp_path_factory):
    """A server of small frames, their folder, and the store of an undisturbed build."""
    folder = tmp_path_factory.mktemp("faults")
    simulated(FRAMES, shape=(64, 64), root=str(folder / "bucket"))
    server = serve_folder(folder)
    tessbkg.build(str(folder / "clean.zarr"), **CCD1, root=str(folder / "bucket"), **REDUCTION)
    report = tessbkg.read_report(str(folder / "clean.zarr"), **CCD1)
    assert report["status"][BAD] == 0
    return server, folder / "bucket", str(folder / "clean.zarr"), report["ffi"].tolist()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(storage, "BACKOFF_SECONDS", 0.002)


def build(proxy, store, phase=None, **options):
    """Build through a proxy; `phase` gets the name of the step that runs."""

    def tell(step, done, total):
        if phase is not None and done == 0:
            phase.append(step)

    return tessbkg.build(
        str(store),
        **CCD1,
        root="s3://bucket",
        storage_options={"endpoint_url": proxy.endpoint_url, "config_kwargs": QUICK},
        progress=tell,
        **{**REDUCTION, **options},
    )


def once(fault, name, phase, when):
    """Fail the first read of a frame in a step."""
    left = [fault]

    def decide(request):
        if phase and phase[-1] == when and name in request.key and left:
            return left.pop()
        return None

    return decide


def always(fault, name, phase, when):
    def decide(request):
        return fault if phase and phase[-1] == when and name in request.key else None

    return decide


HEALED = {
    "500": Fault("status", status=500),
    "503": Fault("status", status=503),
    "503 with Retry-After": Fault("status", status=503, retry_after=1),
    "429": Fault("status", status=429),
    "reset": Fault("reset"),
    "reset in the body": Fault("reset", after=9000),
    "stall": Fault("stall", seconds=20),
    "stall in the body": Fault("stall", seconds=20, after=9000),
    "truncated body": Fault("truncate"),
    "wrong length": Fault("wrong_length", after=9000),
    "no body": Fault("wrong_length", after=0),
}
RECORDED = {
    "404": (Fault("status", status=404), FrameStatus.MISSING, "not found"),
    "403": (Fault("status", status=403), FrameStatus.UNREADABLE, "access denied"),
    "500": (Fault("status", status=500), FrameStatus.UNREADABLE, "after 6 attempts"),
    "503": (Fault("status", status=503), FrameStatus.UNREADABLE, "after 6 attempts"),
    "reset": (Fault("reset"), FrameStatus.UNREADABLE, "after 6 attempts"),
    "truncated body": (Fault("truncate"), FrameStatus.UNREADABLE, "after 6 attempts"),
    "no body": (Fault("wrong_length", after=0), FrameStatus.UNREADABLE, "after 6 attempts"),
    "wrong length": (
        Fault("wrong_length", after=12000),
        FrameStatus.UNREADABLE,
        "bytes came after 6 attempts",
    ),
    "wrong bytes": (Fault("corrupt"), FrameStatus.BAD_HEADER, "no FITS header"),
}


@pytest.mark.parametrize(
    "name", some(HEALED, "503 with Retry-After", "stall", "reset in the body", "wrong length")
)
def test_a_fault_that_passes_is_healed(source, tmp_path, proxy, name):
    server, _, clean, ffis = source
    for step in ("survey", "reduce") if name in {"503", "stall", "wrong length"} else ("reduce",):
        phase = []
        faulty = proxy(server, once(HEALED[name], ffis[BAD], phase, step))
        report = build(faulty, tmp_path / f"{step}.zarr", phase)
        assert [e.fault for e in faulty.log if e.fault] == [HEALED[name]]
        assert_equal(str(tmp_path / f"{step}.zarr"), clean, apart={"survey/url", "survey/size"})
        retries = report.frames["retries"].tolist()
        retried = step == "reduce" and HEALED[name].kind != "wrong_length"
        assert retries == [int(i == BAD and retried) for i in range(FRAMES)]


@pytest.mark.parametrize("name", some(RECORDED, "404", "503", "wrong bytes"))
def test_a_fault_that_stays_is_recorded(source, tmp_path, proxy, name):
    server, _, clean, ffis = source
    fault, status, words = RECORDED[name]
    phase = []
    report = build(proxy(server, always(fault, ffis[BAD], phase, "reduce")), tmp_path / "s.zarr", phase)
    assert report.frames["status"][BAD] == status
    assert words in report.frames["reason"][BAD]
    assert_others_equal(tmp_path / "s.zarr", clean, {BAD})
    assert check(str(tmp_path / "s.zarr")) == []


def assert_others_equal(store, clean, bad) -> None:
    """Assert that frames but the bad ones are bit-equal, and the bad ones NaN."""
    ours, theirs = arrays_of(str(store)), arrays_of(clean)
    others = [i for i in range(len(ours["time"])) if i not in bad]
    for name in ("scattered_light", "scattered_light_err", "earth_angle", "frame_status"):
        assert ours[name][others].tobytes() == theirs[name][others].tobytes()
    assert np.isnan(ours["scattered_light"][sorted(bad)]).all()


def test_a_fault_in_the_survey_is_recorded(source, tmp_path, proxy):
    server, _, _, ffis = source
    phase = []
    report = build(
        proxy(server, always(Fault("status", status=403), ffis[BAD], phase, "survey")),
        tmp_path / "s.zarr",
        phase,
    )
    assert report.frames["status"][BAD] == FrameStatus.UNREADABLE
    assert report.frames["reason"][BAD] == "access denied"
    assert report.counts["good"] == (tessbkg.read_report(source[2], **CCD1)["status"] == 0).sum() - 1


@pytest.mark.parametrize("step", ["survey", "reduce"])
@pytest.mark.parametrize("name", some(["404", "503", "wrong bytes"], "404"))
def test_raise_stops_with_key_and_reason(source, tmp_path, proxy, name, step):
    server, _, _, ffis = source
    fault, status, _ = RECORDED[name]
    phase = []
    kind = {FrameStatus.MISSING: FFIMissingError, FrameStatus.BAD_HEADER: FFIFormatError}.get(
        status, FFIReadError
    )
    with pytest.raises(FFIReadError, match=ffis[BAD]) as caught:
        build(
            proxy(server, always(fault, ffis[BAD], phase, step)), tmp_path / "s.zarr", phase, on_error="raise"
        )
    if step == "reduce":
        assert isinstance(caught.value, kind)
    assert caught.value.reason
    assert any("not finished" in one.what for one in check_of(tmp_path / "s.zarr"))


def check_of(store):
    from tessbkg.check import Finding
    from tessbkg.errors import StoreError

    try:
        return check(str(store))
    except StoreError as error:
        return [Finding("", f"not finished: {error}")]


@pytest.mark.slow
def test_a_thousand_faults_are_all_accounted_for(serve_folder, tmp_path, proxy):  # noqa: C901
    frames, chance = 240, random.Random(11)
    simulated(frames, shape=(64, 64), root=str(tmp_path / "data/bucket"))
    clean = str(tmp_path / "clean.zarr")
    reduction = {**REDUCTION, "shard_frames": 16}
    tessbkg.build(clean, **CCD1, root=str(tmp_path / "data/bucket"), **reduction)
    before = tessbkg.read_report(clean, **CCD1)
    number = {name: i for i, name in enumerate(before["ffi"])}
    passing = [fault for name, fault in HEALED.items() if "stall" not in name and "After" not in name]
    planned = {}  # (step, frame) to the faults of its first reads
    for step in ("survey", "reduce"):
        for i in range(frames):
            planned[step, i] = [chance.choice(passing) for _ in range(chance.choice([2, 3, 4]))]
    lasting = {}
    for i in chance.sample(before.index[before["status"] == 0].tolist(), 24):
        lasting[i] = RECORDED[chance.choice(["404", "403", "503", "no body", "wrong bytes"])]
        planned["reduce", i] = []
    for i in chance.sample(sorted({*range(frames)} - set(lasting)), 6):
        planned["reduce", i].insert(0, Fault("stall", seconds=20))
    phase, injected, lock = [], {i: [] for i in range(frames)}, threading.Lock()

    def decide(request):
        name = request.key.rpartition("/")[2]
        if not phase or name not in number or request.method != "GET":
            return None
        i = number[name]
        with lock:
            if phase[-1] == "reduce" and i in lasting:
                injected[i].append(lasting[i][0])
                return lasting[i][0]
            if left := planned.get((phase[-1], i)):
                fault = left.pop(0)
                if phase[-1] == "reduce":
                    injected[i].append(fault)
                return fault
        return None

    faulty = proxy(serve_folder(tmp_path / "data"), decide)
    report = build(faulty, tmp_path / "s.zarr", phase, **reduction).frames
    total = sum(e.fault is not None for e in faulty.log)
    assert total >= 1000
    for i in range(frames):
        if i in lasting:
            assert report["status"][i] == lasting[i][1]
            assert lasting[i][2] in report["reason"][i]
        else:
            assert report["status"][i] == before["status"][i]
            # short answers are read on from
            kinds = [fault.kind for fault in injected[i]]
            sure = [kind for kind in kinds if kind != "wrong_length"]
            assert len(sure) <= report["retries"][i] <= len(kinds)
    assert_others_equal(tmp_path / "s.zarr", clean, {*before.index[before["status"] != 0], *lasting})
    assert check(str(tmp_path / "s.zarr")) == []


@pytest.mark.parametrize("step", ["survey", "reduce"])
def test_failed_frames_are_done_again_when_asked(source, tmp_path, proxy, step):
    server, _, clean, ffis = source
    store, phase = tmp_path / "s.zarr", []
    faulty = proxy(server, always(Fault("status", status=404), ffis[BAD], phase, step))
    build(faulty, store, phase)
    assert build(faulty, store, phase).shards_done == 0
    faulty.fault = None
    report = build(faulty, store, retry_failed=True)
    assert report.shards_done == 1
    assert report.frames["status"][BAD] == FrameStatus.GOOD
    assert_equal(str(store), clean, apart={"survey/url", "survey/size", "survey/excess"})
    assert check(str(store)) == []
    assert build(faulty, store, retry_failed=True).shards_done == 0


@pytest.mark.parametrize("stop", ["_run", "write_shard", "write_child", "write_template"])
def test_a_second_try_that_is_cut_off_can_be_gone_on_with(source, tmp_path, monkeypatch, stop):
    _, folder, clean, ffis = source
    shutil.copytree(folder, tmp_path / "src")
    [path] = (tmp_path / "src").rglob(ffis[BAD])
    path.rename(tmp_path / "away")
    frames = tessbkg.list_ffis(**CCD1, root=str(folder))
    frames["url"] = frames["url"].str.replace(str(folder), str(tmp_path / "src"))
    store = str(tmp_path / "s.zarr")
    tessbkg.build(store, files=frames, **REDUCTION)
    (tmp_path / "away").rename(path)

    def fails(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"tessbkg.jobs.{stop}", fails)
        with pytest.raises(KeyboardInterrupt):
            tessbkg.build(store, files=frames, retry_failed=True, **REDUCTION)
    assert any("not finished" in one.what for one in check_of(store))
    tessbkg.build(store, files=frames, **REDUCTION)
    assert check(store) == []
    tessbkg.build(store, files=frames, retry_failed=True, **REDUCTION)
    assert_equal(store, clean, apart={"survey/url", "survey/excess"})


def test_the_next_darkest_frame_takes_the_place_of_one_that_cannot_be_read(source, tmp_path, proxy):
    server, _, clean, _ = source
    dark = arrays_attr(clean)
    for name in ("one", "other"):
        phase = []
        report = build(
            proxy(server, always(Fault("status", status=404), dark[1], phase, "scene")),
            tmp_path / f"{name}.zarr",
            phase,
        )
        assert any(dark[1] in note and "could not be read" in note for note in report.notes)
    taken = arrays_attr(tmp_path / "one.zarr")
    assert len(taken) == len(dark)
    assert set(dark) - set(taken) == {dark[1]}
    assert_equal(str(tmp_path / "one.zarr"), str(tmp_path / "other.zarr"), apart={"survey/url"})
    assert check(str(tmp_path / "one.zarr")) == []


REPLACED = {
    "quality": (lambda data: edited(data, DQUALITY="32"), "DQUALITY 32, was 0"),
    "time": (lambda data: edited(data, TSTART="1325.7", TSTOP="1325.72"), "time"),
    "barycorr": (lambda data: edited(data, BARYCORR="0.001"), ""),
    "cadence": (lambda data: edited(data, 0, FFIINDEX="12345"), "FFIINDEX 12345"),
    "shape": (lambda data: edited(data, SCIROWE="32"), "32 x 64 science pixels, were 64 x 64"),
    "camera": (lambda data: edited(data, CAMERA="3"), "header says camera 3"),
}


@pytest.mark.parametrize("what", some(REPLACED, "quality", "shape", "camera"))
def test_an_object_that_is_replaced_between_the_passes_is_noticed(source, tmp_path, what):
    clean = source[2]
    simulated(FRAMES, shape=(64, 64), root=str(tmp_path / "src"))
    path = Path(listed(str(tmp_path / "src"))["url"][BAD].removeprefix("file://"))
    change, words = REPLACED[what]

    def replace(step, done, total):
        if step == "reduce" and done == 0:
            path.write_bytes(change(path.read_bytes()))

    store = str(tmp_path / "s.zarr")
    report = tessbkg.build(store, **CCD1, root=str(tmp_path / "src"), progress=replace, **REDUCTION).frames
    assert report["status"][BAD] == FrameStatus.BAD_HEADER
    assert words in report["reason"][BAD]
    assert_others_equal(store, clean, {BAD})


def test_wrong_pixels_behind_a_right_header_cannot_be_noticed(source, tmp_path, proxy):
    """A ranged GET has no checksum, and CHECKSUM and DATASUM are of whole HDUs: README says so."""
    server, folder, _, ffis = source
    phase = []
    data = contents(listed(str(folder))["url"][BAD])
    fault = Fault("corrupt", after=parse_header(data, "").offset + 4000)
    report = build(proxy(server, always(fault, ffis[BAD], phase, "reduce")), tmp_path / "s.zarr", phase)
    assert report.frames["status"][BAD] == FrameStatus.GOOD
    assert check(str(tmp_path / "s.zarr")) == []
    found = check(
        str(tmp_path / "s.zarr"),
        deep=True,
        sample=FRAMES,
        storage_options={"endpoint_url": server.endpoint_url},
    )
    assert [f"[{BAD}]" in str(one) for one in found] == [True] * len(found) != []


def spoil_empty(path, _):
    path.write_bytes(b"")


def spoil_short(path, _):
    path.write_bytes(path.read_bytes()[:12000])


def spoil_header(path, _):
    path.write_bytes(path.read_bytes()[:2880])


def spoil_garbage(path, _):
    path.write_bytes(np.random.default_rng(1).bytes(20000))


def spoil_naxis(path, _):
    path.write_bytes(edited(path.read_bytes(), NAXIS1="40"))


def spoil_camera(path, _):
    path.write_bytes(edited(path.read_bytes(), CAMERA="2"))


def spoil_folder(path, _):
    path.unlink()
    path.mkdir()


def spoil_link(path, _):
    path.unlink()
    path.symlink_to("nowhere")


def spoil_gone(path, _):
    path.unlink()


def pixels(value):
    def spoil(path, _):
        data = path.read_bytes()
        header = parse_header(data, "")
        image = np.full(header.shape, value, dtype=">f4").tobytes()
        path.write_bytes(data[: header.offset] + image + data[header.offset + len(image) :])

    return spoil


FILES = {
    "empty": (spoil_empty, FrameStatus.UNREADABLE, "empty"),
    "truncated": (spoil_short, FrameStatus.UNREADABLE, "truncated"),
    "truncated header": (spoil_header, FrameStatus.UNREADABLE, "truncated"),
    "garbage": (spoil_garbage, FrameStatus.BAD_HEADER, "no FITS header"),
    "wrong NAXIS": (spoil_naxis, FrameStatus.BAD_HEADER, "science pixels"),
    "wrong camera": (spoil_camera, FrameStatus.BAD_HEADER, "camera 2"),
    "directory": (spoil_folder, FrameStatus.UNREADABLE, "is a folder"),
    "dangling link": (spoil_link, FrameStatus.MISSING, "not found"),
    "all zero": (pixels(0.0), FrameStatus.BLANK, "nothing but zero and NaN"),
    "all NaN": (pixels(np.nan), FrameStatus.BLANK, "nothing but zero and NaN"),
}


def test_every_fault_of_a_file_is_recorded_before_and_after_the_survey(tmp_path):
    simulated(FRAMES, shape=(64, 64), root=str(tmp_path / "src"))
    paths = [Path(url.removeprefix("file://")) for url in listed(str(tmp_path / "src"))["url"]]
    tessbkg.build(str(tmp_path / "clean.zarr"), **CCD1, root=str(tmp_path / "src"), **REDUCTION)
    good = tessbkg.read_report(str(tmp_path / "clean.zarr"), **CCD1)["status"] == 0
    dark = {Path(name).name for name in arrays_attr(tmp_path / "clean.zarr")}
    chosen = [i for i in range(FRAMES) if good[i] and paths[i].name not in dark][: len(FILES)]
    where = dict(zip(FILES, chosen, strict=True))
    frames = tessbkg.list_ffis(**CCD1, root=str(tmp_path / "src"))

    def spoil(step, done, total):
        if step == "reduce" and done == 0:
            for name, i in where.items():
                FILES[name][0](paths[i], None)

    for when in ("after", "before"):
        store = str(tmp_path / f"{when}.zarr")
        progress = spoil if when == "after" else None
        report = tessbkg.build(store, files=frames, progress=progress, **REDUCTION).frames
        for name, i in where.items():
            assert report["status"][i] == FILES[name][1], (name, report["reason"][i])
            assert FILES[name][2] in report["reason"][i], (name, report["reason"][i])
            if FILES[name][1] != FrameStatus.BLANK:
                with pytest.raises(FFIReadError, match=paths[i].name):
                    tessbkg.build(
                        str(tmp_path / f"{when}{i}.zarr"), files=frames, on_error="raise",
                        **REDUCTION, frames=slice(i, i + 1),
                    )  # fmt: skip
        assert check(store) == []
    assert_others_equal(
        tmp_path / "after.zarr", str(tmp_path / "clean.zarr"), {*where.values()} | set(np.flatnonzero(~good))
    )


def arrays_attr(store) -> list[str]:
    import zarr

    return zarr.open_group(str(store), path="s0001/cam1/ccd4", mode="r").attrs["dark_frames"].split()


def test_a_listing_that_climbs_out_of_its_folder_is_refused():
    from tessbkg.storage import check_below

    check_below("bucket/ffi", "bucket/ffi/s0001")
    for name in (
        "bucket/ffi/../etc/passwd",
        "other/ffi",
        "/etc/passwd",
        "bucket/ffi2/x",
        "bucket/ffi/x/../../y",
    ):
        with pytest.raises(FFIReadError, match="not below it"):
            check_below("bucket/ffi", name)
