"""The entries that travel, as bytes: exactly, or float32 rounded to fewer bits."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

Bytes = np.ndarray[Any, np.dtype[Any]]

BLOCK = 128
"""Entries that share one float32 scale."""


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
        rows = _rows(values)  # (num_blocks, BLOCK)
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
        rows = _rows(torch.from_numpy(levels.astype(np.float32)))
        limit = torch.finfo(torch.float32).max  # the scale was rounded up
        return (rows * scale[:, None]).clamp_(-limit, limit).flatten()[:count].to(dtype)


VALUE_CODECS: dict[str, ValueCodec] = {
    "exact": Exact(),
    "true": Ones(),
    "bfloat16": Cast(torch.bfloat16),
    "float16": Cast(torch.float16),
    "int8": Blocks(8),
    "int4": Blocks(4),
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


def _rows(values: Tensor) -> Tensor:
    padding = -values.numel() % BLOCK
    return torch.cat([values, values.new_zeros(padding)]).view(-1, BLOCK)


def _pack(levels: Bytes) -> Bytes:
    shifted = (np.append(levels, np.zeros(levels.size % 2, np.int8)) + 8).astype(np.uint8)
    packed: Bytes = shifted[::2] | shifted[1::2] << 4
    return packed


def _unpack(packed: Bytes, count: int) -> Bytes:
    levels = np.stack([packed & 15, packed >> 4], axis=1).reshape(-1)[:count]
    return levels.astype(np.int8) - np.int8(8)
