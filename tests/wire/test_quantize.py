"""Rounding float32 to fewer bits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedloom.wire.quantize import BLOCK, NF4, VALUE_CODECS

LOSSY = ["bfloat16", "float16", "int8", "int4", "fp8", "nf4"]
TOP = {"int8": 127, "int4": 7}
FLOATS = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=3 * BLOCK)


def round_trip(name: str, values: Tensor) -> Tensor:
    codec = VALUE_CODECS[name]
    block = codec.encode(values)
    assert len(block) == codec.num_bytes(values.numel(), 4)
    return codec.decode(memoryview(block), values.numel(), torch.float32)


def scales(values: Tensor, name: str) -> Tensor:
    """Return the scale of every entry, in float64."""
    padded = torch.cat([values, torch.zeros(-values.numel() % BLOCK)]).view(-1, BLOCK)
    largest = padded.abs().amax(dim=1).double() / TOP[name]
    return largest.repeat_interleave(BLOCK)[: values.numel()]


@pytest.mark.parametrize("name", TOP)
@given(values=FLOATS)
def test_an_integer_is_off_by_at_most_half_its_blocks_scale(name: str, values: list[float]) -> None:
    given_values = torch.tensor(values, dtype=torch.float32)
    error = (round_trip(name, given_values).double() - given_values.double()).abs()
    # The scale is rounded up to float32: by one unit in the last place, or the smallest subnormal.
    bound = scales(given_values, name) * (0.5 + 2**-16) + 2**-148 * TOP[name]
    assert bool((error <= bound).all())


@pytest.mark.parametrize("name", TOP)
@pytest.mark.parametrize("scale", [1e-45, 1e-38, 1e-3, 1.0, 3.4028234663852886e38])
def test_the_bound_holds_for_adapter_sized_entries_of_any_scale(name: str, scale: float) -> None:
    g = torch.Generator().manual_seed(0)
    values = (torch.rand(64, 8, generator=g).flatten() * 2 - 1) * scale
    error = (round_trip(name, values).double() - values.double()).abs()
    bound = scales(values, name) * (0.5 + 2**-16) + 2**-148 * TOP[name]
    assert bool((error <= bound).all())


@pytest.mark.parametrize("name", LOSSY)
@given(values=FLOATS.map(lambda v: [x for x in v if abs(x) < 60000]), at=st.integers(0, 400))
def test_zero_stays_exactly_zero(name: str, values: list[float], at: int) -> None:
    values = [*values[:at], 0.0, *values[at:]]
    decoded = round_trip(name, torch.tensor(values, dtype=torch.float32))
    assert decoded[min(at, len(values) - 1)] == 0.0


@pytest.mark.parametrize("name", LOSSY)
def test_all_zeros_stay_zeros(name: str) -> None:
    assert not round_trip(name, torch.zeros(300)).any()


@pytest.mark.parametrize("name", LOSSY)
def test_nothing_is_an_empty_block(name: str) -> None:
    assert round_trip(name, torch.zeros(0)).shape == (0,)


@pytest.mark.parametrize(("name", "top"), TOP.items())
def test_multiples_of_the_scale_are_exact_and_ties_go_to_even(name: str, top: int) -> None:
    levels = torch.arange(-top, top + 1, dtype=torch.float32)
    assert torch.equal(round_trip(name, levels), levels)
    ties = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, float(top)])
    assert round_trip(name, ties).tolist() == [0, 2, 2, 0, -2, -2, top]


@pytest.mark.parametrize("name", TOP)
def test_a_large_entry_spoils_its_own_block_only(name: str) -> None:
    values = torch.full((2 * BLOCK,), 0.01)
    values[0] = 1e6
    decoded = round_trip(name, values)
    assert not decoded[1:BLOCK].any()
    assert torch.allclose(decoded[BLOCK:], values[BLOCK:], rtol=1e-6)


def test_a_half_is_rounded_to_nearest_even() -> None:
    values = torch.tensor([1 + 2**-11, 1 + 3 * 2**-11, 65504.0, -0.0])
    assert round_trip("float16", values).tolist() == [1.0, 1 + 2**-9, 65504.0, 0.0]
    brain = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8])
    assert round_trip("bfloat16", brain).tolist() == [1.0, 1 + 2**-6]


@pytest.mark.parametrize(
    ("name", "entry", "limit"), [("float16", 65520.0, "65504"), ("bfloat16", 3.4e38, "3.38953e")]
)
def test_overflow_is_refused_instead_of_becoming_infinite(
    name: str, entry: float, limit: str
) -> None:
    with pytest.raises(ValueError, match=f"beyond the largest {limit}"):
        round_trip(name, torch.tensor([1.0, -entry]))


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("entry", [float("nan"), float("inf"), float("-inf")])
def test_only_finite_entries_are_rounded(name: str, entry: float) -> None:
    with pytest.raises(ValueError, match="only finite entries can be rounded"):
        round_trip(name, torch.tensor([1.0, entry]))


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-3, 1.0, 3.38e38])
def test_codes_with_short_scales_are_as_near_as_their_tables_say(scale: float) -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)).clamp(-1, 1) * scale
    # Each against a search through all its codes, block by block, in float64.
    for name, block, top, table in (
        ("nf4", 64, 1.0, torch.tensor(NF4, dtype=torch.float64)),
        ("fp8", 128, 448.0, every_float8()),
    ):
        decoded = round_trip(name, values).double()
        for at in range(0, 1000, block):
            rows = values[at : at + block].double()
            least = rows.abs().max() / top
            # Scales are rounded up, to eight bits; subnormal ones to fewer.
            most = least * (1 + 2**-7) + 2.0**-133
            nearest = (rows[:, None] / most - table).abs().min(1).values * most
            widest = (table[1:] - table[:-1]).max() / 2
            error = (decoded[at : at + block] - rows).abs()
            assert bool((error <= widest * most * (1 + 1e-6)).all())
            assert bool(error.mean() <= nearest.mean() * 1.3 + 2.0**-133 * top)


def test_every_code_times_a_scale_is_exact_and_of_two_nearest_levels_the_lower_is_taken() -> None:
    assert torch.equal(round_trip("nf4", 4 * torch.tensor(NF4)), 4 * torch.tensor(NF4))
    eights = every_float8().float() / 8
    assert torch.equal(round_trip("fp8", eights), eights)
    middle = (NF4[15] + NF4[14]) / 2
    assert round_trip("nf4", torch.tensor([1.0, middle])).tolist()[1] == torch.tensor(NF4[14])


def test_normal_float_is_stored_as_in_bitsandbytes_but_for_the_order_of_a_pair() -> None:
    # The nibbles 15 and 0, and 7 for zero; a scale of 2 in bfloat16.
    block = VALUE_CODECS["nf4"].encode(torch.tensor([2.0, -2.0, 0.0]))
    assert bytes(block) == b"\x00\x40" + b"\x0f" + b"\x87"


def test_an_entry_beyond_a_short_scale_and_one_that_is_no_number_are_refused() -> None:
    with pytest.raises(ValueError, match=r"beyond the largest 3\.38953e\+38"):
        VALUE_CODECS["nf4"].encode(torch.tensor([3.4e38]))
    assert round_trip("fp8", torch.tensor([3.4e38])).isfinite().all()
    for entry in (b"\x7f", b"\xff"):
        with pytest.raises(ValueError, match="an entry that is not a number"):
            VALUE_CODECS["fp8"].decode(memoryview(b"\x80\x3f" + entry), 1, torch.float32)


def every_float8() -> Tensor:
    """Return the numbers of E4M3 in order, in float64."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    return codes[~codes.isnan()].unique()


@pytest.mark.parametrize("name", ["nf4", "fp8"])
@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -1.0])
def test_a_short_scale_that_is_no_scale_is_refused(name: str, scale: float) -> None:
    block = torch.tensor([scale]).bfloat16().view(torch.uint8).numpy().tobytes() + b"\x01"
    with pytest.raises(ValueError, match="negative or not finite"):
        VALUE_CODECS[name].decode(memoryview(block), 1, torch.float32)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -1.0])
def test_a_scale_that_is_no_scale_is_refused(scale: float) -> None:
    block = torch.tensor([scale]).numpy().tobytes() + b"\x01"
    with pytest.raises(ValueError, match="negative or not finite"):
        VALUE_CODECS["int8"].decode(memoryview(block), 1, torch.float32)


def test_what_travels_of_a_bool_takes_no_bytes() -> None:
    codec = VALUE_CODECS["true"]
    assert codec.num_bytes(9, 1) == 0
    assert codec.encode(torch.ones(9, dtype=torch.bool)) == b""
    assert codec.decode(memoryview(b""), 9, torch.bool).all()
