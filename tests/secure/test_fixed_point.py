"""Numbers as whole steps, added up modulo 2^R."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.core.randomness import generator
from fedloom.secure.fixed_point import (
    limbs,
    packed,
    rounded,
    signed,
    unlimbed,
    unpacked,
    width,
    words,
)


def test_values_are_whole_numbers_of_steps_by_hand():
    values = torch.tensor([0.0, 0.25, -0.25, 1.0, -1.0, 7.0, -7.0])
    # Two bits: a step is a quarter of the clip.
    assert rounded(values, clip=1.0, bits=2, source=None).tolist() == [0, 1, -1, 4, -4, 4, -4]
    # Towards zero no entry grows.
    assert rounded(torch.tensor([0.49, -0.49]), clip=1.0, bits=2, source=None).tolist() == [1, -1]


def test_rounding_by_chance_keeps_the_mean():
    values = torch.full((40_000,), 0.3)
    steps = rounded(values, clip=1.0, bits=2, source=generator(0, "x"))
    assert set(steps.tolist()) == {1, 2}
    assert float(steps.double().mean()) / 4 == pytest.approx(0.3, abs=0.003)
    again = rounded(values, clip=1.0, bits=2, source=generator(0, "x"))
    assert torch.equal(steps, again)


@pytest.mark.parametrize(("number", "bits", "expected"), [(10, 20, 25), (8, 20, 25), (2, 8, 11)])
def test_a_sum_takes_one_bit_more_than_all_at_their_largest(number: int, bits: int, expected: int):
    assert width(number, bits) == expected
    assert number << bits < 1 << (expected - 1)


def test_more_clients_than_a_sum_has_room_for_are_refused():
    assert width(127, 24) == 32
    with pytest.raises(
        ValueError, match=r"secure.bits 24 leaves room for sums of 127 clients, got 128"
    ):
        width(128, 24)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 12), st.integers(8, 24), st.integers(0, 1 << 30), st.sampled_from([0.1, 4.0]))
def test_a_sum_is_within_a_step_of_each_client(number: int, bits: int, seed: int, clip: float):
    source = generator(seed, "values")
    values = (2 * torch.rand(number, 50, dtype=torch.float64, generator=source) - 1) * clip
    number_bits = width(number, bits)
    total = np.zeros(50, np.uint32)
    for client in values:
        total += words(rounded(client, clip=clip, bits=bits, source=source))
    through_the_wire = unpacked(packed(total, number_bits), number_bits, 50)
    found = signed(through_the_wire, number_bits).double() * clip * 2.0**-bits
    assert float((found - values.sum(0)).abs().max()) <= number * clip * 2.0**-bits


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-(2.0**60), 2.0**60), min_size=1, max_size=9), st.integers(8, 28))
def test_wide_numbers_add_up_over_their_coordinates(values: list[float], bits: int):
    total = sum(torch.tensor(limbs(value, bits)) for value in values)
    assert isinstance(total, torch.Tensor)
    assert int(total.abs().max()) < len(values) << bits
    assert unlimbed(total, bits) == pytest.approx(
        sum(values), rel=1e-12, abs=len(values) * 2.0**-32
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -(2.0**64)])
def test_a_number_that_is_too_wide_is_refused(value: float):
    with pytest.raises(ValueError, match=r"must be below 2\^64"):
        limbs(value, 20)
