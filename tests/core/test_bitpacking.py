"""Packed numbers come back, and take the bits that they need."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedloom.core.bitpacking import pack, unpack


@given(st.data())
def test_numbers_come_back_from_their_bits(data: st.DataObject) -> None:
    limit = data.draw(st.integers(1, 2**62))
    values = torch.tensor(data.draw(st.lists(st.integers(0, limit - 1), max_size=40)))
    packed = pack(values.long(), limit)
    assert packed.dtype is torch.uint8
    assert torch.equal(unpack(packed, limit, len(values)), values.long())


@pytest.mark.parametrize(
    ("limit", "num_bytes"), [(1, 25), (2, 25), (3, 50), (1024, 250), (1025, 275), (4096, 300)]
)
def test_two_hundred_numbers_take_the_bits_of_the_largest(limit: int, num_bytes: int) -> None:
    assert len(pack(torch.full((200,), limit - 1), limit)) == num_bytes


def test_the_lowest_bit_comes_first() -> None:
    assert pack(torch.tensor([1, 2, 4]), 8).tolist() == [0b00_010_001, 0b1]
    assert pack(torch.tensor([True, False, True]), 2).tolist() == [0b101]


@pytest.mark.parametrize("num_bytes", [0, 3, 5])
def test_bytes_of_other_numbers_are_refused(num_bytes: int) -> None:
    packed = torch.zeros(num_bytes, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"3 numbers below 1024 take 4 bytes, got shape \(\d,\)"):
        unpack(packed, 1024, 3)
