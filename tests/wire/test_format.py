"""Messages: what goes in comes out, in few bytes."""

import importlib
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedloom.core.protocols import Payload
from fedloom.wire.body import roundtrip
from fedloom.wire.format import (
    WireError,
    decode,
    decode_with_header,
    encode,
)
from fedloom.wire.quantize import VALUE_CODECS
from fedloom.wire.table import DTYPES
from fedloom.wire.wire_settings import Compression, ValueType

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
VALUES: list[ValueType] = ["float32", "bfloat16", "float16", "int8", "int4", "fp8", "nf4"]


def same(a: Payload, b: Payload) -> bool:
    """Compare bit by bit, so that NaN equals itself and -0.0 differs from 0.0."""
    return list(a) == list(b) and all(
        list(a[group]) == list(b[group])
        and all(same_bits(a[group][name], b[group][name]) for name in a[group])
        for group in a
    )


def same_bits(a: Tensor, b: Tensor) -> bool:
    raw = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


def lora(num_layers: int = 15, rank: int = 8, width: int = 64) -> dict[str, Tensor]:
    """Return an adapter of 2 tensors a layer under the names peft gives them, 2 kB each."""
    g = torch.Generator().manual_seed(0)
    return {
        f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{factor}.weight": torch.randn(
            (rank, width) if factor == "A" else (width, rank), generator=g
        )
        for i in range(num_layers)
        for factor in "AB"
    }


def mask(size: int, density: float) -> Tensor:
    """Return a bool that is True at floor(size * density) random places."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(size))
    return (order < int(size * density)).bool()


def sparse_tensor(size: int, density: float) -> Tensor:
    """Return normal entries in the places of `mask`, zeros elsewhere."""
    g = torch.Generator().manual_seed(1)
    return torch.where(mask(size, density), torch.randn(size, generator=g), 0)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Draw any type, any shape, any bits, any share of zeros."""
    dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
    shape = draw(st.lists(st.integers(0, 9), max_size=4))
    kept = draw(st.sampled_from([0.0, 0.02, 0.3, 1.0]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    num_bytes = math.prod(shape) * dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (num_bytes,), generator=g)
    present = torch.rand(math.prod(shape), generator=g) < kept
    return (
        (raw.to(torch.uint8) * present.repeat_interleave(dtype.itemsize)).view(dtype).reshape(shape)
    )


PAYLOADS = st.dictionaries(st.text(max_size=9), st.dictionaries(st.text(), tensors(), max_size=4))


@given(
    payload=PAYLOADS,
    header=st.dictionaries(st.text(), st.integers() | st.text() | st.floats(allow_nan=False)),
    compression=st.sampled_from(["none", "zstd"]),
)
@settings(max_examples=40)
def test_every_payload_and_header_comes_back_bit_for_bit(
    payload: Payload, header: dict[str, object], compression: Compression
) -> None:
    message = encode(payload, header, compression=compression)
    decoded_header, decoded = decode_with_header(message)
    assert decoded_header == header
    assert same(decoded, payload)
    assert encode(decoded, header, compression=compression) == message


@given(payload=PAYLOADS, values=st.sampled_from(VALUES[1:]))
@settings(max_examples=40)
def test_rounding_touches_float32_only(payload: Payload, values: ValueType) -> None:
    exact = {
        group: {name: t for name, t in params.items() if t.dtype != torch.float32}
        for group, params in payload.items()
    }
    assert same(decode(encode(exact, values=values)), exact)


@pytest.mark.parametrize(
    ("values", "num_bytes"),
    [
        ("float32", 32_768),
        ("bfloat16", 16_384),
        ("float16", 16_384),
        ("int8", 8_192 + 128 * 2),
        ("int4", 4_096 + 128 * 2),
        ("fp8", 8_192 + 128),
        ("nf4", 4_096 + 128 * 2),
    ],
)
def test_a_dense_tensor_takes_the_bytes_of_its_values_and_a_short_table(
    values: ValueType, num_bytes: int
) -> None:
    weights = torch.randn(128, 64, generator=torch.Generator().manual_seed(0))
    message = encode({"delta": {"w": weights}}, values=values)
    assert 0 < len(message) - num_bytes < 60


def test_a_second_group_of_the_same_names_costs_a_few_bytes_a_name() -> None:
    one = encode({"delta": lora()})
    two = encode({"delta": lora(), "control_delta": lora()})
    assert len(two) - len(one) <= 30 * (2048 + 28)


def test_zeros_are_cheap() -> None:
    dense = {"x": torch.ones(1000, 100)}
    assert len(encode({"p": {"x": torch.zeros(1000, 100)}})) < 200
    for kept, share in ((0.25, 0.29), (0.01, 0.021)):
        g = torch.Generator().manual_seed(1)
        sparse = {"x": dense["x"] * (torch.rand(1000, 100, generator=g) < kept)}
        message = encode({"p": sparse})
        assert len(message) < share * len(encode({"p": dense}))
        assert same(decode(message), {"p": sparse})


@pytest.mark.parametrize(
    ("density", "values", "expected"),
    [
        (1 / 16, "float16", 167_800),
        (1 / 4, "float16", 602_700),
        (1 / 64, "int8", 30_800),
        (1 / 16, "int8", 107_300),
    ],
)
def test_a_sparse_million_takes_the_bytes_of_the_table(
    density: float, values: ValueType, expected: int
) -> None:
    """An int8 scale is float32 a block of 128 here, float16 of 64 there: the same."""
    payload = {"delta": {"w": sparse_tensor(1_000_000, density).view(1000, 1000)}}
    message = encode(payload, values=values)
    assert len(message) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("density", [0.0, 1e-6, 1 / 16, 1 / 4, 1.0])
def test_beyond_values_a_message_costs_the_entropy_of_its_positions(
    density: float, values: ValueType
) -> None:
    """At most 1.02 * floor + values + 256 bytes."""
    size = 1_000_000
    count = int(size * density)
    ways = math.lgamma(size + 1) - math.lgamma(count + 1) - math.lgamma(size - count + 1)
    num_values = VALUE_CODECS["exact" if values == "float32" else values].num_bytes(count, 4)
    message = encode({"p": {"x": sparse_tensor(size, density)}}, values=values)
    assert len(message) <= 1.02 * ways / math.log(2) / 8 + num_values + 256


@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 0.9, 1.0])
def test_a_mask_costs_its_positions_only(density: float) -> None:
    payload = {"mask": {"x": mask(100_000, density).view(100, 1000)}}
    message = encode(payload)
    assert same(decode(message), payload)
    heads = {0.0: 0, 0.05: 3700, 0.5: 12_500, 0.9: 6000, 1.0: 0}
    assert len(message) <= heads[density] + 130


def test_where_few_entries_are_zero_the_zeros_are_coded() -> None:
    payload = {"p": {"x": sparse_tensor(1_000_000, 0.9)}}
    message = encode(payload)
    assert len(message) < 3_600_000 + 60_000
    assert same(decode(message), payload)


def again(work: Callable[[], object], times: int = 10) -> None:
    """Do it a few times, so that a turn begins with what it needs in the caches."""
    for _ in range(times):
        work()


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.parametrize("density", [1 / 4, 1 / 16])
def test_a_million_entries_are_written_and_read_in_less_than_half_of_torchs_selection(
    monkeypatch: pytest.MonkeyPatch, density: float
) -> None:
    """CPU seconds of one thread, medians of turns, of memory that the process has already, beside `torch.topk` of a quarter."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    timing = importlib.import_module("timing")
    payload = {"delta": {"w": sparse_tensor(1_000_000, density)}}
    message = encode(payload, values="float16")
    dense = sparse_tensor(1_000_000, 1.0)

    def ours() -> None:
        again(partial(encode, payload, values="float16"))
        again(partial(decode, message))

    bytearray(16 << 20)  # freed at once: from now on malloc keeps large blocks
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = timing.paired(
        {
            "ours": ours,
            "torch": lambda: again(partial(torch.topk, dense, 250_000, sorted=False)),
        },
        turns=9,
    )
    torch.set_num_threads(threads)
    assert times["torch"].ratio(times["ours"]) < 1 / 2


def test_negative_zero_is_no_zero() -> None:
    sparse = torch.zeros(1000)
    sparse[7] = -0.0
    assert math.copysign(1, float(decode(encode({"p": {"x": sparse}}))["p"]["x"][7])) == -1


@pytest.mark.parametrize("values", VALUES)
def test_entries_left_out_are_zero_for_every_value_type(values: ValueType) -> None:
    g = torch.Generator().manual_seed(2)
    sparse = torch.randn(4000, generator=g) * (torch.rand(4000, generator=g) < 0.1)
    decoded = roundtrip({"p": {"x": sparse}}, values=values, compression="zstd")["p"]["x"]
    assert not decoded[sparse == 0].any()
    bounds = {"int8": 0.5 / 127, "int4": 0.5 / 7, "fp8": 2**-4, "nf4": 0.153}
    bound = bounds.get(values, 2**-8) * float(sparse.abs().max())
    assert float((decoded - sparse).abs().max()) <= bound * 1.001


def test_decoded_tensors_are_writable_and_leave_the_message_alone() -> None:
    message = bytearray(encode({"p": {"dense": torch.ones(4), "empty": torch.zeros(0, 3)}}))
    before = bytes(message)
    payload = decode(message)  # type: ignore[arg-type]
    payload["p"]["dense"].mul_(7)
    assert bytes(message) == before
    message[:] = bytes(len(message))
    assert payload["p"]["dense"].tolist() == [7, 7, 7, 7]


def test_views_and_parameters_are_written_as_they_look() -> None:
    base = torch.arange(12.0).view(3, 4)
    parameter = torch.nn.Parameter(base.t())
    decoded = decode(encode({"p": {"x": parameter, "y": base[:, 1]}}))
    assert torch.equal(decoded["p"]["x"], base.t())
    assert not decoded["p"]["x"].requires_grad
    assert decoded["p"]["y"].tolist() == [1, 5, 9]


def test_nan_and_infinity_travel_exactly() -> None:
    odd = torch.tensor([math.nan, math.inf, -math.inf, 1.0])
    assert same(decode(encode({"p": {"x": odd}})), {"p": {"x": odd}})


def test_what_cannot_be_rounded_is_refused_by_name() -> None:
    with pytest.raises(WireError, match=r"delta/lora_A cannot travel as float16: it holds 1e\+06"):
        encode({"delta": {"lora_A": torch.tensor([1e6])}}, values="float16")
    with pytest.raises(WireError, match=r"delta/lora_B cannot travel as int8: it holds nan"):
        encode({"delta": {"lora_B": torch.tensor([math.nan])}}, values="int8")


def test_a_type_that_cannot_travel_is_refused_by_name() -> None:
    complex_payload = {"delta": {"x": torch.ones(2, dtype=torch.complex64)}}
    with pytest.raises(WireError, match="delta/x is of type complex64, what can travel is float32"):
        encode(complex_payload)


def test_zstd_shrinks_what_repeats() -> None:
    payload = {"p": {"x": torch.arange(10_000) % 7}}
    assert len(encode(payload, compression="zstd")) < 0.1 * len(encode(payload))


def test_missing_zstandard_is_an_error_that_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    message = encode({}, compression="zstd")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ValueError, match=r"wire\.compression zstd needs the package zstandard"):
        encode({}, compression="zstd")
    with pytest.raises(WireError, match="is compressed, and zstandard is not installed"):
        decode(message)
