"""Fuzzing of the header and FFI readers: whatever the bytes, a typed error or an FFI, in bounded memory.

`TESSBKG_FUZZ=200000 pytest tests/test_fuzz.py` runs that many cases, other ones each time, instead of
always the same few hundred.
"""

import os
import tracemalloc

import fsspec
import numpy as np
import pytest
from frames import contents, edited, listed, put, simulated
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tessbkg.errors import FFIFormatError, FFIReadError
from tessbkg.ffi import BLOCK, MAX_HEADER_BYTES, parse_header, read_ffi, read_ffi_from

# a failing case is shown by its repr
pytestmark = pytest.mark.filterwarnings("ignore:Generating overly large repr")

CASES = int(os.environ.get("TESSBKG_FUZZ", "300"))
MEMORY = 100e6  # of the largest image that a header may ask for, twice
fuzzed = settings(
    max_examples=CASES,
    derandomize="TESSBKG_FUZZ" not in os.environ,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)


def valid() -> bytes:
    root, _ = simulated(1, shape=(32, 32))
    return contents(listed(root)["url"][0])


VALID = valid()
KEYWORDS = (
    "SIMPLE XTENSION BITPIX NAXIS NAXIS1 NAXIS2 BSCALE BZERO CAMERA CCD TSTART TSTOP BARYCORR DQUALITY "
    "FFIINDEX DATE DATA_REL CRVAL1 CRVAL2 SCIROWS SCIROWE SCCSA SCCED END"
).split()
VALUES = st.one_of(
    st.sampled_from(
        [
            "1000000000",
            "-1",
            "0",
            "1E308",
            "-1E308",
            "NAN",
            "INF",
            "1e9999",
            "9" * 60,
            "T",
            "''",
            "'x",
            "/",
            "",
        ]
    ),
    st.integers().map(str),
    st.floats().map(repr),
    st.text(max_size=70),
)


def with_card(data: bytes, keyword: str, value: str) -> bytes:
    """Overwrite the value of each card of a keyword, whatever it does to the header."""
    card = f"{keyword:8s}= {value}".encode("utf-8", "replace")[:80].ljust(80)
    for start in range(0, min(len(data), MAX_HEADER_BYTES) - 79, 80):
        if data[start : start + 8] == keyword.encode().ljust(8):
            data = data[:start] + card + data[start + 80 :]
    return data


@st.composite
def mutants(draw) -> bytes:
    """A valid file, changed card by card, byte by byte, cut and put together again."""
    data = VALID
    for _ in range(draw(st.integers(0, 3))):
        data = with_card(data, draw(st.sampled_from(KEYWORDS)), draw(VALUES))
    flips = draw(st.lists(st.tuples(st.integers(0, 8 * BLOCK), st.integers(0, 255)), max_size=8))
    changed = bytearray(data)
    for place, value in flips:
        changed[place] = value
    data = bytes(changed)
    start, end = sorted(draw(st.tuples(*[st.integers(0, len(data))] * 2)))
    kind = draw(st.sampled_from(["whole", "whole", "cut", "without", "twice", "noise"]))
    match kind:
        case "cut":
            return data[:end]
        case "without":
            return data[:start] + data[end:]
        case "twice":
            return data[:end] + data[start:]
        case "noise":
            return data[:start] + draw(st.binary(max_size=200)) + data[start:]
    return data


def read(data: bytes):
    """Read a file of these bytes with its uncertainties."""
    url = put(data)
    fs = fsspec.filesystem("memory")
    try:
        return read_ffi_from(fs, url.removeprefix("memory:/"), errors=True)
    finally:
        fs.rm(url)


@fuzzed
@given(st.one_of(mutants(), st.binary(max_size=4000)))
@example(b"")
@example(VALID)
@example(b"SIMPLE  =" + b" " * 3 * MAX_HEADER_BYTES)
def test_any_bytes_give_an_ffi_or_a_typed_error(data):
    tracemalloc.start()
    frame = reason = None
    try:
        frame = read(data)
    except FFIReadError as error:
        reason = error.reason
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < MEMORY
    if frame is None:
        assert reason
        assert "\n" not in reason
    else:
        assert frame.flux.dtype == np.float32
        assert frame.flux.shape == frame.flux_err.shape == frame.header.science_shape
        assert np.isfinite([frame.header.time, frame.header.barycorr, frame.header.exposure]).all()


@fuzzed
@given(mutants())
def test_any_header_is_parsed_or_refused(data):
    try:
        header = parse_header(data, "key")
    except (IndexError, FFIFormatError):
        return
    assert 0 < header.science_shape[0] * header.science_shape[1] <= header.shape[0] * header.shape[1]
    assert header.offset % BLOCK == 0


@pytest.mark.parametrize(
    ("cards", "words"),
    [
        ({"NAXIS1": "1000000000"}, "impossible image"),
        ({"NAXIS2": "1000000000"}, "impossible image"),
        ({"NAXIS1": "4096", "NAXIS2": "4096", "SCIROWE": "4096", "SCCED": "4096"}, "truncated"),
        ({"SCIROWE": "1000000000"}, ""),
        ({"SCCED": "1E300"}, ""),
        ({"NAXIS": "999999999"}, "not a float32 image"),
    ],
)
def test_a_hostile_header_is_refused_in_bounded_memory(cards, words):
    data = edited(VALID, **cards)
    tracemalloc.start()
    try:
        read(data)
    except FFIReadError as error:
        assert words in str(error)  # noqa: PT017 (the memory is what is tested)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < MEMORY


def test_a_header_without_end_is_refused_in_bounded_memory():
    endless = VALID[: 2 * BLOCK].replace(b"END" + b" " * 77, b"COMMENT" + b" " * 73)
    endless += (b"COMMENT".ljust(80)) * 500_000  # 40 MB
    url = put(endless)
    tracemalloc.start()
    with pytest.raises(FFIFormatError, match="no END card"):
        read_ffi(url)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < MEMORY
