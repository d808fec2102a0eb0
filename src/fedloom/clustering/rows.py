"""What clients are compared by: an update as a row of numbers, or its seeded sketch.

Finding Frequent Items in Data Streams. Charikar, Chen, Farach-Colton, ICALP 2002: every entry is added, with a hashed
sign, to a hashed place, so that inner products of sketches are those of the rows on average, their error about
|x| |y| / sqrt(size). Fast and Scalable Polynomial Kernels via Explicit Feature Maps. Pham, Pagh, KDD 2013: the sketch of
an outer product is the circular convolution of its factors' sketches, so that LoRA's B A is never written down.
"""

from functools import cache
from typing import Literal

import torch
from torch import Tensor

from fedloom.core.protocols import Params
from fedloom.core.randomness import derive, generator
from fedloom.server.combine.products import pairs

Compare = Literal["B", "last_B", "all", "BA"]
"""LoRA's B (where a space has none, all), the last such tensor of a file, all tensors, or the product B A."""

_CHUNK = 1 << 15
"""Entries sketched at once: few, so that memory is not left in pieces between the rows that stay."""
_TABLE = 1 << 20
"""Hashes there are; each chunk reads them from a place of its own, turned and signed anew."""
_B = "lora_B"


def compared(delta: Params, compare: Compare) -> Params:
    """Return the tensors that are compared."""
    of_b = [name for name in sorted(delta) if _B in name]
    if compare == "all" or not of_b:
        return delta
    # Names sorted as text, as in a file of safetensors: layer 9 comes after layer 10.
    return {name: delta[name] for name in (of_b[-1:] if compare == "last_B" else of_b)}


def row_of(start: Params, delta: Params, *, compare: Compare, size: int) -> Tensor:
    """Return the (at most size,) float32 row of an update that began at `start`: its entries times their size, sketched."""
    if compare == "BA":
        return _product_sketch(start, delta, size)
    # Signed squares: adaptive optimizers step by one size, so that far is where step after step agreed.
    return sketch(compared(delta, compare), size, squared=True)


def whole_row(delta: Params, compare: Compare) -> Tensor:
    """Return the compared tensors as (numel,) float32."""
    tensors = compared(delta, compare)
    return torch.cat([tensors[name].flatten().float() for name in sorted(tensors)])


def sketch(params: Params, size: int, *, squared: bool = False) -> Tensor:
    """Return (size,) float32 of params of any length, in one pass; (numel,), themselves, where they are no longer.

    Args:
        params: What to sketch.
        size: Numbers to keep.
        squared: Take every entry times its size.
    """
    if sum(t.numel() for t in params.values()) <= size:
        whole = whole_row(params, "all")
        return whole * whole.abs() if squared else whole
    total = torch.zeros(size, dtype=torch.float64)
    for name in sorted(params):
        for at, chunk in enumerate(torch.split(params[name].flatten(), _CHUNK)):
            values = chunk.float()
            places, signs, turn = _hashes(name, at, len(chunk), size)
            sums = torch.bincount(
                places, (values * values.abs() if squared else values) * signs, minlength=size
            )
            total += sums.roll(turn)
    return total.float()


def check_product(start: Params) -> None:
    """Refuse a space whose coordinates are not the factors themselves.

    Raises:
        ValueError: where there are no factors, or A counts from its own start.
    """
    factors = [start[a] for a, _ in pairs(start)]
    if not factors:
        raise ValueError(
            "clustered.mode.auto.compare BA needs tune: lora, got a space without factors"
        )
    if not any(bool(t.any()) for t in factors):
        raise ValueError(
            "clustered.mode.auto.compare BA multiplies LoRA's factors, which needs tune.lora.origin zero,"
            " got coordinates that count from where A began"
        )


def _product_sketch(start: Params, delta: Params, size: int) -> Tensor:
    """Sketch (B + dB)(A + dA) - B A, all layers together."""
    spectrum = torch.zeros(size // 2 + 1, dtype=torch.complex128)
    end = {name: t + delta[name] if name in delta else t for name, t in start.items()}
    for a, b in pairs(start):
        columns = torch.cat([end[b], -start[b]], dim=1)  # (out, 2 rank)
        rows = torch.cat([end[a], start[a]])  # (2 rank, in)
        left = _columns_sketch(columns.double(), b, size)
        right = _columns_sketch(rows.double().T, a, size)
        spectrum += (torch.fft.rfft(left, dim=0) * torch.fft.rfft(right, dim=0)).sum(1)
    found: Tensor = torch.fft.irfft(spectrum, n=size)
    return found.float()


def _columns_sketch(matrix: Tensor, name: str, size: int) -> Tensor:
    """Sketch each column of (n, columns) as (size, columns)."""
    places, signs, turn = _hashes(name, 0, len(matrix), size)
    sums = torch.zeros(size, matrix.shape[1], dtype=matrix.dtype)
    return sums.index_add_(0, places, matrix * signs[:, None]).roll(turn, dims=0)


def _hashes(name: str, at: int, count: int, size: int) -> tuple[Tensor, Tensor, int]:
    """Return (count,) places, int64, and signs, float32, of a chunk's entries, and a turn of all places."""
    places, signs = _table(size)
    number = derive(0, "sketch", name, at)
    first, turn, odd = number % (_TABLE - count + 1), (number >> 21) % size, number >> 50 & 1
    window = slice(first, first + count)
    return places[window], -signs[window] if odd else signs[window], turn


@cache
def _table(size: int) -> tuple[Tensor, Tensor]:
    source = generator(0, "sketch", size)
    places = torch.randint(size, (_TABLE,), generator=source)
    return places, 1.0 - 2.0 * torch.randint(2, (_TABLE,), generator=source)
