"""The names of a CCD and the constants of the detector."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessbkg.ccd import (
    CCD,
    DROP_QUALITY,
    FIRST_SCIENCE_COLUMN,
    FRAME_SHAPE,
    SCIENCE_SHAPE,
    STRAP_COLUMNS,
    Quality,
)

CCDS = st.builds(CCD, st.integers(1, 9999), st.integers(1, 4), st.integers(1, 4))


@given(CCDS, CCDS)
def test_group_names_a_ccd_and_sorts_like_it(one, other):
    assert CCD.from_group(one.group) == one
    assert CCD.from_group(f"bucket/store.zarr/{one.group}/") == one
    assert (one.group == other.group) == (one == other)
    assert (one < other) == (one.group < other.group)


@pytest.mark.parametrize("path", ["", "s1/cam1/ccd1", "s0001/cam1", "s0001/cam9/ccd1", "xs0001/cam1/ccd1"])
def test_no_group(path):
    with pytest.raises(ValueError):
        CCD.from_group(path)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((0, 1, 1), "sector=0 is out of range: allowed are 1 to 9999"),
        ((10_000, 1, 1), "sector=10000 is out of range"),
        ((1, 5, 1), "camera=5 is out of range: allowed are 1 to 4"),
        ((1, 1, 0), "ccd=0 is out of range"),
        ((1.0, 1, 1), "sector=1.0 is not an integer"),
        ((1, True, 1), "camera=True is not an integer"),
        ((1, 1, None), "ccd=None is not an integer"),
    ],
)
def test_wrong_numbers_are_named(numbers, message):
    with pytest.raises(ValueError, match=message):
        CCD(*numbers)


def test_special_sectors_are_as_good_as_others():
    assert CCD(1751, 2, 3).group == "s1751/cam2/ccd3"
    assert str(CCD(100, 2, 3)) == "sector 100 camera 2 CCD 3"


def test_straps_are_116_pairs_of_0_based_science_columns():
    assert STRAP_COLUMNS.shape == (116,)
    assert (np.diff(STRAP_COLUMNS) > 0).all()
    assert 0 <= STRAP_COLUMNS[0] < STRAP_COLUMNS[-1] < SCIENCE_SHAPE[1]
    # Column 77 of the handbook is 1-based among the science columns: FFI column 121, 1-based.
    assert STRAP_COLUMNS[0] == 76
    assert STRAP_COLUMNS[0] + FIRST_SCIENCE_COLUMN == 121
    pairs = STRAP_COLUMNS.reshape(-1, 2)
    assert (pairs[:, 1] - pairs[:, 0] == 1).all()


def test_science_pixels_lie_within_a_frame():
    rows, columns = FRAME_SHAPE
    assert rows - SCIENCE_SHAPE[0] == 30
    assert columns - SCIENCE_SHAPE[1] == 2 * (FIRST_SCIENCE_COLUMN - 1)


def test_quality_bits_and_what_is_dropped():
    assert [flag.value for flag in Quality] == [1 << n for n in range(16)]
    bits = {n for n in range(1, 17) if DROP_QUALITY & 1 << (n - 1)}
    assert bits == {1, 2, 3, 4, 5, 6, 15}
    assert not DROP_QUALITY & (Quality.STRAY_LIGHT | Quality.SCATTERED_LIGHT)
