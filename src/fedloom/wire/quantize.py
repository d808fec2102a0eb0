"""The entries that travel, as bytes: exactly, or float32 rounded to fewer bits."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

Bytes = np.ndarray[Any, np.dtype[Any]]

BLOCK = 128
"""Entries that share one scale; of nf4, half as many."""
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The levels of NormalFloat4: quantiles of a normal distribution, one of them zero (Dettmers et al. 2023, arXiv:2305.14314,
Appendix E)."""


class ValueCodec(Protocol):
    """Writes entries; deterministic, and zero stays zero."""

    def num_bytes(self, count: int, width: int) -> int:
        """Return how many bytes `count` entries of `width` bytes take."""
        ...

    def encode(self, values: Tensor) -> bytes | memoryview:
        """Return the bytes of `values`, (count,) contiguous.

        Raises:
            ValueError: where an entry cannot be written.
        """
        ...

    def decode(self, block: memoryview, count: int, dtype: torch.dtype) -> Tensor:
        """Return fresh entries, (count,).

        Raises:
            ValueError: where the bytes are no such entries.
        """
        ...


@dataclass(frozen=True, slots=True)
class Exact:
    """Bit for bit, any type but bool."""

    def num_bytes(self, count: int, width: int) -> int:
        """Keep the width."""
        return count * width

    def encode(self, values: Tensor) -> bytes | memoryview:
        """View the entries as bytes."""
        return values.view(torch.uint8).numpy().data

    def decode(self, block: memoryview, count: int, dtype: torch.dtype) -> Tensor:
        """Copy the bytes."""
        return _copy(block).view(dtype)


@dataclass(frozen=True, slots=True)
class Ones:
    """What travels of a bool is True: its position says all."""

    def num_bytes(self, count: int, width: int) -> int:
        """Take nothing."""
        return 0

    def encode(self, values: Tensor) -> bytes:
        """Write nothing."""
        return b""

    def decode(self, block: memoryview, count: int, dtype: torch.dtype) -> Tensor:
        """Return True."""
        return torch.ones(count, dtype=dtype)


@dataclass(frozen=True, slots=True)
class Cast:
    """float32 rounded to a 2-byte float, to nearest even."""

    dtype: torch.dtype

    def num_bytes(self, count: int, width: int) -> int:
        """Take 2 bytes an entry."""
        return 2 * count

    def encode(self, values: Tensor) -> bytes | memoryview:
        """Round, and refuse what would become infinite."""
        largest = _largest(values)
        if not bool(torch.isfinite(torch.tensor(largest).to(self.dtype))):
            limit = torch.finfo(self.dtype).max
            raise ValueError(f"holds {largest:.6g}, beyond the largest {limit:.6g}")
        return values.to(self.dtype).view(torch.uint8).numpy().data

    def decode(self, block: memoryview, count: int, dtype: torch.dtype) -> Tensor:
        """Widen."""
        return _copy(block).view(self.dtype).to(dtype)


@dataclass(frozen=True, slots=True)
class Blocks:
    """float32 as signed integers of 8 or 4 bits, symmetric, one scale for each BLOCK entries.

    An entry is off by at most half its block's scale, which is max|x| / 127 or max|x| / 7.
    """

    bits: int

    def num_bytes(self, count: int, width: int) -> int:
        """Count scales and packed integers."""
        return 4 * -(-count // BLOCK) + -(-count * self.bits // 8)

    def encode(self, values: Tensor) -> bytes | memoryview:
        """Round to the nearest multiple of the block's scale, to even where there are two."""
        _largest(values)
        rows = _rows(values, BLOCK)
        top = float((1 << (self.bits - 1)) - 1)
        largest = rows.abs().amax(dim=1)
        scale = largest / top
        # Rounded up, so that no entry needs clipping; for subnormals the difference is large.
        short = scale.double() * top < largest.double()
        scale = torch.where(short, torch.nextafter(scale, torch.tensor(torch.inf)), scale)
        steps = torch.where(scale == 0, 1.0, scale)
        levels = (rows / steps[:, None]).round_().to(torch.int8).flatten()[: values.numel()]
        packed = levels.numpy() if self.bits == 8 else _pack(levels.numpy())
        return scale.numpy().tobytes() + packed.tobytes()

    def decode(self, block: memoryview, count: int, dtype: torch.dtype) -> Tensor:
        """Multiply by the scales."""
        num_blocks = -(-count // BLOCK)
        scale = _copy(block[: 4 * num_blocks]).view(torch.float32)
        if not bool((torch.isfinite(scale) & (scale >= 0)).all()):
            raise ValueError("a scale that is negative or not finite")
        raw = np.frombuffer(block[4 * num_blocks :], np.int8)
        levels = raw if self.bits == 8 else _unpack(raw.view(np.uint8), count)
        rows = _rows(torch.from_numpy(levels.astype(np.float32)), BLOCK)
        limit = torch.finfo(torch.float32).max  # the scale was rounded up
        return (rows * scale[:, None]).clamp_(-limit, limit).flatten()[:count].to(dtype)


@dataclass(frozen=True, slots=True)
class NormalFloat4:
    """float32 as one of 16 levels, 4 bits each, times the largest of each 64 entries in bfloat16, rounded up: 4.25 bits.

    An entry is off by at most 0.153 of its block's largest, half the widest gap between levels.
    """

    block: int = BLOCK // 2

    def num_bytes(self, count: int, width: int) -> int:
        """Count scales and packed levels."""
        return 2 * -(-count // self.block) + -(-count // 2)

    def encode(self, values: Tensor) -> bytes:
        """Take the nearest level, of two as near the lower."""
        largest, limit = _largest(values), torch.finfo(torch.bfloat16).max
        if largest > limit:
            raise ValueError(f"holds {largest:.6g}, beyond the largest {limit:.6g}")
        rows = _rows(values, self.block)
        scale = _short_scales(rows, 1.0)
        levels = torch.tensor(NF4)
        middles = (levels[1:] + levels[:-1]) / 2
        nearest = torch.bucketize(rows / _steps(scale)[:, None], middles)
        # The nibble of a level counts from the first, as everywhere that NF4 is stored.
        places = nearest.to(torch.uint8).flatten()[: values.numel()].numpy()
        return _bytes_of(scale) + _pack_nibbles(places).tobytes()

    def decode(self, block: memoryview, count: int, dtype: torch.dtype) -> Tensor:
        """Multiply levels by the scales."""
        scale, rest = _read_short_scales(block, -(-count // self.block))
        places = _nibbles(np.frombuffer(rest, np.uint8), count)
        rows = _rows(torch.tensor(NF4)[torch.from_numpy(places.astype(np.int64))], self.block)
        return (rows * scale[:, None]).flatten()[:count].to(dtype)


@dataclass(frozen=True, slots=True)
class Float8:
    """float32 as float8 (E4M3, to nearest even) times a bfloat16 scale for each BLOCK entries: 8.125 bits.

    The largest of a block becomes 448. An entry is off by at most a sixteenth of itself, or 2^-18 of its block's largest
    (Micikevicius et al. 2022, arXiv:2209.05433).
    """

    def num_bytes(self, count: int, width: int) -> int:
        """Count scales and entries."""
        return 2 * -(-count // BLOCK) + count

    def encode(self, values: Tensor) -> bytes:
        """Round what the scale brings into range."""
        _largest(values)
        rows = _rows(values, BLOCK)
        scale = _short_scales(rows, torch.finfo(torch.float8_e4m3fn).max)
        small = (rows / _steps(scale)[:, None]).to(torch.float8_e4m3fn)
        return _bytes_of(scale) + _bytes_of(small.flatten()[: values.numel()])

    def decode(self, block: memoryview, count: int, dtype: torch.dtype) -> Tensor:
        """Widen, and multiply by the scales."""
        scale, rest = _read_short_scales(block, -(-count // BLOCK))
        small = _copy(rest).view(torch.float8_e4m3fn).float()
        if bool(torch.isnan(small).any()):
            raise ValueError("an entry that is not a number")
        limit = torch.finfo(torch.float32).max  # the scale was rounded up
        rows = _rows(small, BLOCK) * scale[:, None]
        return rows.clamp_(-limit, limit).flatten()[:count].to(dtype)


VALUE_CODECS: dict[str, ValueCodec] = {
    "exact": Exact(),
    "true": Ones(),
    "bfloat16": Cast(torch.bfloat16),
    "float16": Cast(torch.float16),
    "int8": Blocks(8),
    "int4": Blocks(4),
    "fp8": Float8(),
    "nf4": NormalFloat4(),
}


def _copy(block: memoryview) -> Tensor:
    raw = torch.empty(len(block), dtype=torch.uint8)
    raw.numpy()[:] = np.frombuffer(block, np.uint8)
    return raw


def _largest(values: Tensor) -> float:
    low, high = map(float, torch.aminmax(values)) if values.numel() else (0.0, 0.0)
    largest = max(-low, high)
    if not np.isfinite(largest):
        raise ValueError(f"holds {largest}, and only finite entries can be rounded")
    return largest


def _rows(values: Tensor, block: int) -> Tensor:
    """Return (num_blocks, block) entries, zeros behind the last."""
    padding = -values.numel() % block
    return torch.cat([values, values.new_zeros(padding)]).view(-1, block)


def _short_scales(rows: Tensor, top: float) -> Tensor:
    """Return (num_blocks,) bfloat16 scales, rounded up, so that nothing exceeds `top` of them."""
    largest = rows.abs().amax(dim=1)
    scale = (largest / top).to(torch.bfloat16)
    short = scale.double() * top < largest.double()
    # The next larger one has the next larger bits.
    return (scale.view(torch.int16) + short).view(torch.bfloat16)


def _steps(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 1.0, scale.float())


def _read_short_scales(block: memoryview, number: int) -> tuple[Tensor, memoryview]:
    """Return (num_blocks,) float32 scales, and the bytes behind them."""
    scale = _copy(block[: 2 * number]).view(torch.bfloat16).float()
    if not bool((torch.isfinite(scale) & (scale >= 0)).all()):
        raise ValueError("a scale that is negative or not finite")
    return scale, block[2 * number :]


def _bytes_of(values: Tensor) -> bytes:
    raw: bytes = values.contiguous().view(torch.uint8).numpy().tobytes()
    return raw


def _pack(levels: Bytes) -> Bytes:
    return _pack_nibbles((levels + np.int8(8)).astype(np.uint8))


def _unpack(packed: Bytes, count: int) -> Bytes:
    return _nibbles(packed, count).astype(np.int8) - np.int8(8)


def _pack_nibbles(nibbles: Bytes) -> Bytes:
    """Return two to a byte, the first in the lower half; eight stands behind an odd number of them."""
    even = np.append(nibbles, np.full(nibbles.size % 2, 8, np.uint8))
    packed: Bytes = even[::2] | even[1::2] << 4
    return packed


def _nibbles(packed: Bytes, count: int) -> Bytes:
    return np.stack([packed & 15, packed >> 4], axis=1).reshape(-1)[:count]
