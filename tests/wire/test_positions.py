"""Where a tensor is not zero."""

import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.wire.positions import POSITION_CODECS, Bitmap, Golomb, mask_of


def random_positions(size: int, density: float, seed: int = 0) -> np.ndarray[Any, Any]:
    """Return floor(size * density) distinct positions, ascending."""
    rng = np.random.default_rng(seed)
    return np.sort(rng.choice(size, int(size * density), replace=False))


def entropy_bytes(size: int, count: int) -> float:
    """Return log2 of the number of ways to choose `count` of `size`, in bytes."""
    ways = math.lgamma(size + 1) - math.lgamma(count + 1) - math.lgamma(size - count + 1)
    return ways / math.log(2) / 8


def check(name: str, where: np.ndarray[Any, Any], size: int) -> int:
    """Write, compare with the forecast and read back; return the length."""
    codec = POSITION_CODECS[name]
    plan = codec.plan(where, size)
    block = plan.write()
    assert len(block) == plan.num_bytes
    index = codec.decode(memoryview(block), size, where.size)
    assert np.array_equal(np.flatnonzero(mask_of(index, size)), where)
    return len(block)


@pytest.mark.parametrize("name", POSITION_CODECS)
@given(present=st.lists(st.booleans(), max_size=200))
def test_every_codec_returns_the_positions_it_was_given(name: str, present: list[bool]) -> None:
    check(name, np.flatnonzero(np.array(present, bool)), len(present))


@pytest.mark.parametrize("name", POSITION_CODECS)
@given(gaps=st.lists(st.integers(0, 40_000) | st.integers(0, 3), max_size=60))
def test_clusters_and_wide_gaps_come_back(name: str, gaps: list[int]) -> None:
    where = np.cumsum(np.array(gaps, np.int64) + 1) - 1
    check(name, where, int(where[-1]) + 3 if gaps else 1)


@pytest.mark.parametrize("name", POSITION_CODECS)
@pytest.mark.parametrize("size", [1, 63, 64, 1_000_000])
def test_no_entry_one_and_all_come_back_at_any_size(name: str, size: int) -> None:
    assert check(name, np.arange(0), size) == 0
    assert check(name, np.arange(size), size) == 0
    for at in {0, size // 2, size - 1}:
        check(name, np.array([at]), size)
        check(name, np.delete(np.arange(size), at), size)


@pytest.mark.parametrize("density", [1 / 3, 0.3, 1 / 4, 0.22, 0.2, 0.1, 1 / 16, 0.0585, 1 / 256])
def test_random_positions_take_two_percent_more_than_their_entropy_at_most(density: float) -> None:
    """At the powers of two and where plain Rice codes would miss it."""
    size = 1_000_000
    where = random_positions(size, density)
    assert check("golomb", where, size) <= 1.02 * entropy_bytes(size, where.size)
    others = np.flatnonzero(mask_of(where, size, value=False))
    assert check("golomb", others, size) == check("golomb", where, size)


@pytest.mark.parametrize(
    ("stretches", "most"),
    [([(0, 1000)], 300), ([(500_000, 1000)], 1600), ([(10, 64), (90_000, 64), (700_000, 64)], 330)],
)
def test_clusters_take_less_than_random_positions(
    stretches: list[tuple[int, int]], most: int
) -> None:
    where = np.concatenate([np.arange(start, start + length) for start, length in stretches])
    num_bytes = check("golomb", where, 1_000_000)
    assert num_bytes <= most
    assert num_bytes < entropy_bytes(1_000_000, where.size)


@given(gaps=st.lists(st.integers(0, 300), min_size=1, max_size=30), spare=st.integers(0, 300))
def test_the_divisor_is_the_best_of_all(gaps: list[int], spare: int) -> None:
    where = np.cumsum(np.array(gaps) + 1) - 1
    size = int(where[-1]) + 1 + max(spare, 2 * len(gaps))
    rice = min(sum((gap >> bits) + 1 + bits for gap in gaps) for bits in range(10))
    assert Golomb().plan(where, size).num_bytes <= 1 + -(-rice // 8)


def test_a_hand_computed_code() -> None:
    """Gaps 0, 2, 5, 0 by 3: rests 0, 2, 2, 0 as 0, 11, 11, 0; quotients 0, 0, 1, 0."""
    where = np.array([0, 3, 9, 10])
    block = bytes([2, 0b0110_1111, 0b0110_0000])
    assert Golomb().decode(memoryview(block), 20, 4).tolist() == where.tolist()
    assert Golomb().plan(where, 20).num_bytes <= len(block)


@pytest.mark.parametrize("name", POSITION_CODECS)
@given(block=st.binary(max_size=40), size=st.integers(0, 300), count=st.integers(0, 300))
def test_arbitrary_bytes_are_refused_or_select_as_many_as_they_say(
    name: str, block: bytes, size: int, count: int
) -> None:
    count = min(count, size)
    try:
        index = POSITION_CODECS[name].decode(memoryview(block), size, count)
    except ValueError:
        return
    assert np.count_nonzero(mask_of(index, size)) == count


@given(
    block=st.binary(min_size=2, max_size=40),
    divisor=st.integers(0, 239),
    size=st.integers(1, 1 << 60),
    count=st.integers(1, 200),
)
def test_no_stream_leads_beyond_the_size_or_takes_memory(
    block: bytes, divisor: int, size: int, count: int
) -> None:
    count = min(count, -(-size // 2))
    try:
        index = Golomb().decode(memoryview(bytes([divisor]) + block), size, count)
    except ValueError:
        return
    if index.dtype == np.int64:
        where = index.tolist()
        assert where == sorted(set(where))
        assert len(where) == count
        assert 0 <= where[0] <= where[-1] < size


def test_a_short_stream_cannot_claim_many_entries() -> None:
    tracemalloc.start()
    for divisor in range(256):
        block = memoryview(bytes([divisor]) + b"\xff" * 50)
        with pytest.raises(ValueError, match="a Golomb code"):
            Golomb().decode(block, 1 << 40, 1 << 39)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize(
    ("block", "size", "count", "message"),
    [
        (b"\x80\x00", 8, 1, "a bitmap of 2 bytes for 8 entries"),
        (b"\x81", 7, 2, "2 bits set below or beyond 7 entries, not 2"),
        (b"\x80", 7, 2, "1 bits set"),
        (b"\x80", 7, 0, "1 bytes of positions where all or no entries travel"),
    ],
)
def test_a_malformed_bitmap_is_refused(block: bytes, size: int, count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Bitmap().decode(memoryview(block), size, count)


@pytest.mark.parametrize(
    ("block", "size", "count", "message"),
    [
        (b"", 8, 1, "of 0 bytes without a fitting divisor"),
        (b"\x00", 8, 1, "of 1 bytes without a fitting divisor"),
        (b"\xff\x80", 8, 1, "without a fitting divisor"),
        (b"\x14\x80", 8, 1, "without a fitting divisor"),
        (b"\x00\x80", 80, 9, "of 2 bytes for 9 gaps"),
        (b"\x00\x00", 8, 1, "of 0 gaps, not 1"),
        (b"\x00\xc0", 8, 1, "of 2 gaps, not 1"),
        (b"\x00\x80\x00", 8, 1, "of 1 gaps, not 1"),
        (b"\x01\x01", 8, 1, "beyond 8 entries"),
        (b"\x05\x68", 8, 1, "position 9 of 8 entries"),
        (b"\x00\x80", 8, 0, "2 bytes of positions where all or no entries travel"),
        (b"\x00\x80", 8, 8, "2 bytes of positions where all or no entries travel"),
    ],
)
def test_a_malformed_golomb_code_is_refused(
    block: bytes, size: int, count: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Golomb().decode(memoryview(block), size, count)
