"""Small FFIs for the tests: simulated ones, their bytes changed card by card or pixel by pixel."""

from __future__ import annotations

import contextlib
import itertools
import uuid

import fsspec
import numpy as np
from fsspec.implementations.memory import MemoryFileSystem

import tessbkg
from tessbkg.simulate import simulate

SHAPE = (64, 96)
CCD1 = {"sector": 1, "camera": 1, "ccd": 4}


def memory_root() -> str:
    return f"memory://{uuid.uuid4().hex}"


def simulated(frames: int = 8, *, shape=SHAPE, root: str | None = None, **options):
    """Simulate into memory; return root and truth."""
    root = root or memory_root()
    return root, simulate(root, frames=frames, shape=shape, **options)


def listed(root: str, **options):
    return tessbkg.list_ffis(**{**CCD1, "root": root, **options})


def contents(url: str) -> bytes:
    fs, path = fsspec.core.url_to_fs(url)
    return fs.cat_file(path)


def put(data: bytes, name: str = "tess2018206192942-s0001-1-4-0120-s_ffic.fits") -> str:
    """Put a file into memory; return its URL."""
    url = f"{memory_root()}/{name}"
    fsspec.filesystem("memory").pipe_file(url, data)
    return url


def units(data: bytes) -> list[int]:
    """Where the header units of a file begin and end: primary, flux, uncertainties."""
    from tessbkg.ffi import parse_header, read_cards

    header = parse_header(data, "")
    _, primary_end = read_cards(data, 0, "")
    _, errors_offset = read_cards(data, header.image_end, "")
    return [0, primary_end, header.offset, header.image_end, errors_offset]


def edited(data: bytes, unit: int = 1, *, remove=(), blocks: int | None = None, **cards) -> bytes:
    """Change cards of header unit 0 (primary), 1 (flux) or 2 (uncertainties); values are FITS text."""
    places = units(data)
    first, last = ((0, places[1]), (places[1], places[2]), (places[3], places[4]))[unit]
    lines = [data[i : i + 80] for i in range(first, last, 80)]
    lines = lines[: lines.index(b"END" + b" " * 77)]
    names = [line[:8].decode().strip() for line in lines]
    lines = [line for line, name in zip(lines, names, strict=True) if name not in remove]
    names = [name for name in names if name not in remove]
    for name, text in cards.items():
        line = f"{name:8}= {text:>20}".ljust(80).encode()
        if name in names:
            lines[names.index(name)] = line
        else:
            lines.append(line)
    size = -(-80 * (len(lines) + 1) // 2880) if blocks is None else blocks
    while len(lines) + 1 <= (size - 1) * 36:
        lines.append(b"COMMENT filler".ljust(80))
    unit_bytes = b"".join([*lines, b"END".ljust(80)])
    return data[:first] + unit_bytes.ljust(size * 2880) + data[last:]


def with_pixels(data: bytes, image: np.ndarray, unit: int = 1) -> bytes:
    """Put a whole image (rows, columns of NAXIS) into a file."""
    places = units(data)
    first = places[2] if unit == 1 else places[4]
    raw = image.astype(">f4").tobytes()
    return data[:first] + raw + data[first + len(raw) :]


@contextlib.contextmanager
def counted(part: str = "_ffic"):
    """Write down the reads of files in memory whose path has `part`: (path, start, end, bytes)."""
    log = []
    original = MemoryFileSystem.cat_file

    def cat_file(self, path, start=None, end=None, **kwargs):
        data = original(self, path, start=start, end=end, **kwargs)
        if part in path:
            log.append((path, start, end, len(data)))
        return data

    MemoryFileSystem.cat_file = cat_file
    try:
        yield log
    finally:
        MemoryFileSystem.cat_file = original


def encoded(number: int, shape=SHAPE) -> np.ndarray:
    """Science pixels that say which they are: frame, row and column in one float32."""
    rows, columns = shape
    assert number * rows * columns + rows * columns < 1 << 24
    return np.float32(number * rows * columns) + np.arange(rows * columns, dtype="f4").reshape(shape)


def encode_all(root: str, shape=SHAPE) -> None:
    """Replace the pixels of all frames below a root by ones that say which they are."""
    fs = fsspec.filesystem("memory")
    for number, url in zip(itertools.count(), listed(root)["url"], strict=False):
        data = fs.cat_file(url)
        header = tessbkg.ffi.parse_header(data, url)
        for unit, sign in ((1, 1), (2, -1)):
            image = np.full(header.shape, 9e9, dtype="f4")
            image[: shape[0], 44 : 44 + shape[1]] = sign * encoded(number, shape)
            data = with_pixels(data, image, unit)
        fs.pipe_file(url, data)
