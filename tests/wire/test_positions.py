"""Where a tensor is not zero."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.wire.positions import POSITION_CODECS, Bitmap, Index


@pytest.mark.parametrize("name", POSITION_CODECS)
@given(present=st.lists(st.booleans(), max_size=200))
def test_every_codec_returns_the_positions_it_was_given(name: str, present: list[bool]) -> None:
    codec, where = POSITION_CODECS[name], np.flatnonzero(np.array(present, bool))
    block = memoryview(codec.encode(where, len(present)))
    assert codec.decode(block, len(present), where.size).tolist() == where.tolist()


@pytest.mark.parametrize("name", POSITION_CODECS)
@given(block=st.binary(max_size=40), size=st.integers(0, 300), count=st.integers(0, 300))
def test_arbitrary_bytes_are_refused_or_ascend_below_the_size(
    name: str, block: bytes, size: int, count: int
) -> None:
    try:
        where = POSITION_CODECS[name].decode(memoryview(block), size, count).tolist()
    except ValueError:
        return
    assert len(where) == count
    assert where == sorted(set(where))
    assert all(0 <= position < size for position in where)


@pytest.mark.parametrize(
    ("size", "width"), [(2, 2), (1 << 16, 2), ((1 << 16) + 1, 4), (1 << 32, 4), ((1 << 32) + 1, 8)]
)
def test_an_index_is_as_wide_as_the_last_position_needs(size: int, width: int) -> None:
    block = Index().encode(np.array([0, size - 1]), size)
    assert len(block) == 2 * width
    assert Index().decode(memoryview(block), size, 2).tolist() == [0, size - 1]


@pytest.mark.parametrize(
    ("block", "size", "count", "message"),
    [
        (b"\x80\x00", 8, 1, "a bitmap of 2 bytes for 8 entries"),
        (b"\x81", 7, 2, "2 bits set below or beyond 7 entries, not 2"),
        (b"\x80", 7, 2, "1 bits set"),
    ],
)
def test_a_malformed_bitmap_is_refused(block: bytes, size: int, count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Bitmap().decode(memoryview(block), size, count)


@pytest.mark.parametrize(
    ("block", "size", "count", "message"),
    [
        (b"\x01\x00\x00", 8, 1, "3 bytes of indices for 1 entries"),
        (b"\x08\x00", 8, 1, "do not ascend below 8"),
        (b"\x01\x00\x01\x00", 8, 2, "do not ascend"),
        (b"\x02\x00\x01\x00", 8, 2, "do not ascend"),
    ],
)
def test_malformed_indices_are_refused(block: bytes, size: int, count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Index().decode(memoryview(block), size, count)
