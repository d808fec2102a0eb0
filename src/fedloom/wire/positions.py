"""Where a tensor is not zero, as bytes."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

Positions = np.ndarray[Any, np.dtype[np.int64]]


class PositionCodec(Protocol):
    """Writes the positions of the entries that travel."""

    def encode(self, where: Positions, size: int) -> bytes:
        """Return ascending positions below `size` as bytes."""
        ...

    def decode(self, block: memoryview, size: int, count: int) -> Positions:
        """Return the `count` positions.

        Raises:
            ValueError: where the block does not hold `count` ascending positions below `size`.
        """
        ...


@dataclass(frozen=True, slots=True)
class Bitmap:
    """One bit an entry."""

    def encode(self, where: Positions, size: int) -> bytes:
        """Set the bit of every position."""
        present = np.zeros(size, bool)
        present[where] = True
        return np.packbits(present).tobytes()

    def decode(self, block: memoryview, size: int, count: int) -> Positions:
        """Read the bits that are set."""
        if len(block) != -(-size // 8):
            raise ValueError(f"a bitmap of {len(block)} bytes for {size} entries")
        where = np.flatnonzero(np.unpackbits(np.frombuffer(block, np.uint8)))
        if where.size != count or (count and where[-1] >= size):
            raise ValueError(f"{where.size} bits set below or beyond {size} entries, not {count}")
        return where


@dataclass(frozen=True, slots=True)
class Index:
    """One unsigned integer a position: 2 bytes where all fit, else 4, else 8."""

    def encode(self, where: Positions, size: int) -> bytes:
        """Write every position."""
        return where.astype(_index_type(size)).tobytes()

    def decode(self, block: memoryview, size: int, count: int) -> Positions:
        """Read every position."""
        kind = _index_type(size)
        if len(block) != count * kind.itemsize:
            raise ValueError(f"{len(block)} bytes of indices for {count} entries")
        where = np.frombuffer(block, kind)
        if count and (where[-1] >= size or bool((where[1:] <= where[:-1]).any())):
            raise ValueError(f"indices that do not ascend below {size}")
        return where.astype(np.int64)


def _index_type(size: int) -> np.dtype[Any]:
    return np.dtype("<u2" if size <= 1 << 16 else "<u4" if size <= 1 << 32 else "<u8")


POSITION_CODECS: dict[str, PositionCodec] = {"bitmap": Bitmap(), "index": Index()}
"""The shortest is taken, tensor by tensor."""
