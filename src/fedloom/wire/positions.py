"""Which entries of a tensor travel, as bytes.

What is coded is the rarer side: the positions of the entries that travel, or, if more than half do, of the
others. Where one side is empty there is nothing to say, and a code takes no bytes.
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch

Positions = np.ndarray[Any, np.dtype[np.int64]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]
Index = Positions | Mask
"""What selects entries of a flat array: their positions, or, of more than half, a mask."""


def mask_of(index: Index, size: int, *, value: bool = True) -> Mask:
    """Return (size,) bool: `value` where `index` selects, the opposite elsewhere."""
    mask = np.full(size, not value)
    mask[index] = value
    return mask


@dataclass(frozen=True, slots=True)
class PlannedCode:
    """A code whose length is known before it is written."""

    num_bytes: int
    write: Callable[[], bytes]


class PositionCodec(Protocol):
    """Writes where the entries are that travel."""

    def plan(self, where: Positions, size: int) -> PlannedCode:
        """Return the code of ascending positions below `size`."""
        ...

    def decode(self, block: memoryview, size: int, count: int) -> Index:
        """Return what selects `count` of `size` entries.

        Memory is a small multiple of the block's length and `size`.

        Raises:
            ValueError: where the block does not say that, or could say it in fewer bytes.
        """
        ...


@dataclass(frozen=True, slots=True)
class Bitmap:
    """One bit an entry: shortest where about half of them travel."""

    def plan(self, where: Positions, size: int) -> PlannedCode:
        """Know the length from the size."""
        one_sided = where.size in (0, size)
        return PlannedCode(0 if one_sided else -(-size // 8), partial(self._encode, where, size))

    def decode(self, block: memoryview, size: int, count: int) -> Index:
        """Read the bits that are set."""
        if count in (0, size):
            return _one_sided(block, size, count)
        if len(block) != -(-size // 8):
            raise ValueError(f"a bitmap of {len(block)} bytes for {size} entries")
        bits = np.unpackbits(np.frombuffer(block, np.uint8))
        num_set = int(np.count_nonzero(bits))
        if num_set != count or bits[size:].any():
            raise ValueError(f"{num_set} bits set below or beyond {size} entries, not {count}")
        return bits[:size].view(np.bool_)

    def _encode(self, where: Positions, size: int) -> bytes:
        if where.size in (0, size):
            return b""
        return np.packbits(mask_of(where, size)).tobytes()


_DIVISORS = sorted({(4 + (code & 3)) << (code >> 2) >> 2 for code in range(240)})
"""1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20 ...: an index into them takes a byte."""


@dataclass(frozen=True, slots=True)
class Golomb:
    """Gaps between positions by a Golomb-Rice code, the divisor chosen tensor by tensor.

    A gap (the entries skipped) is a quotient in unary and a rest in truncated binary. Layout: the
    divisor's index u8, then bits, the last byte filled with zeros: all bits of the rests but the
    lowest, plane by plane; the lowest bit of those rests that have one; for every quotient so many
    zeros and a one. So nothing has to be read gap by gap.

    At random positions within 2 % of the entropy as long as the rarer side is at most a third.
    Golomb (1966); Gallager & van Voorhis (1975).
    """

    def plan(self, where: Positions, size: int) -> PlannedCode:
        """Find the divisor of fewest bits."""
        if where.size in (0, size):
            return PlannedCode(0, bytes)
        if 2 * where.size > size:
            where = np.flatnonzero(mask_of(where, size, value=False))
        gaps = _gaps(where)
        largest = int(gaps.max())
        index, num_bits = _best_divisor(gaps, size, largest)
        write = partial(self._encode, gaps, index, num_bits, largest)
        return PlannedCode(1 + -(-num_bits // 8), write)

    def decode(self, block: memoryview, size: int, count: int) -> Index:
        """Read planes, lowest bits and quotients, each at once."""
        number = min(count, size - count)
        if not number:
            return _one_sided(block, size, count)
        if len(block) < 2 or block[0] >= _num_divisors(number, size):
            raise ValueError(f"a Golomb code of {len(block)} bytes without a fitting divisor")
        divisor = _DIVISORS[block[0]]
        num_planes, num_short = _rest_bits(divisor)
        if (num_planes + 1) * number > 8 * (len(block) - 1):
            raise ValueError(f"a Golomb code of {len(block)} bytes for {number} gaps")
        bits = np.unpackbits(np.frombuffer(block, np.uint8, offset=1))
        rests = np.zeros(number, _narrow(divisor))
        at = 0
        for plane in range(num_planes):
            rests |= bits[at : at + number].astype(rests.dtype) << plane + 1
            at += number
        if num_short:
            is_long = rests >= 2 * num_short
            long = np.flatnonzero(is_long)
            # A slice that is too short here leaves too few quotients below.
            lowest = bits[at : at + long.size]
            rests[long[: lowest.size]] += lowest
            rests = (rests >> ~is_long) - is_long.astype(rests.dtype) * num_short
            at += long.size
        else:
            rests += bits[at : at + number]
            at += number
        ends = np.flatnonzero(bits[at:].view(np.bool_))
        if ends.size != number or bits.size - at - ends[-1] > 8:
            raise ValueError(f"a Golomb code of {ends.size} gaps, not {number}")
        if (int(ends[-1]) + 1 - number) * divisor > size:
            raise ValueError(f"a Golomb code of positions beyond {size} entries")
        # Quotients up to the i-th sum to ends[i] - i. Below 10 * size, so in 63 bits: of the rests
        # _num_divisors takes care.
        found = ends
        found *= divisor
        # A position less its quotient's place is divisor - 1 below, gap by gap but for the first.
        found += _running_sums(rests.astype(np.int64) - (divisor - 1))
        found += divisor - 1
        if found[-1] >= size:
            raise ValueError(f"a Golomb code of position {found[-1]} of {size} entries")
        return found if number == count else mask_of(found, size, value=False)

    def _encode(self, gaps: Positions, index: int, num_bits: int, largest: int) -> bytes:
        divisor, number = _DIVISORS[index], gaps.size
        num_planes, num_short = _rest_bits(divisor)
        gaps = gaps.astype(_narrow(max(largest, divisor)))
        quotients = gaps // divisor
        rests = gaps - quotients * divisor
        lowest = rests
        if num_short:
            is_long = rests >= num_short
            rests = (rests << ~is_long) + is_long.astype(rests.dtype) * num_short
            lowest = rests[np.flatnonzero(is_long)]
        bits = np.zeros(1 + num_bits, np.bool_)  # the first is not used
        at = 1
        for plane in range(num_planes):
            bits[at : at + number] = rests >> plane + 1 & 1
            at += number
        bits[at : at + lowest.size] = lowest & 1
        at += lowest.size
        bits[at - 1 :][_running_sums(quotients + 1)] = True
        return bytes([index]) + np.packbits(bits[1:]).tobytes()


def _best_divisor(gaps: Positions, size: int, largest: int) -> tuple[int, int]:
    """Return the index of the divisor that takes the fewest bits for all gaps, and these bits."""
    if largest < 4 * gaps.size + (1 << 16):
        numbers = np.bincount(gaps)
        values = np.flatnonzero(numbers > 0)
        numbers = numbers[values]
    else:
        values, numbers = np.unique(gaps, return_counts=True)
    # All divisors against all distinct gaps: of these there are at most sqrt(2 * size).
    divisors = np.array(_DIVISORS[: _num_divisors(gaps.size, size)])
    rest_bits = np.array([_rest_bits(int(divisor)) for divisor in divisors])
    quotients, rests = np.divmod(values, divisors[:, None])
    long = rests >= rest_bits[:, 1:]
    totals = (quotients + long + rest_bits[:, :1] + 1) @ numbers
    index = int(totals.argmin())
    return index, int(totals[index])


def _num_divisors(number: int, size: int) -> int:
    """Return how many divisors come into question for so many gaps: larger ones never pay."""
    return bisect_right(_DIVISORS, 8 * size // number)


def _rest_bits(divisor: int) -> tuple[int, int]:
    """Return the bits that every rest has, and how many of the smallest rests have no more."""
    if divisor == 1:
        return 0, 1
    num_bits = (divisor - 1).bit_length()
    return num_bits - 1, (1 << num_bits) - divisor


def _narrow(limit: int) -> np.dtype[Any]:
    """Return the narrowest type for numbers below `2 * limit`: arithmetic on it is fastest."""
    return np.min_scalar_type(2 * limit)


def _running_sums(numbers: Positions) -> Positions:
    """Return what numbers add up to so far: torch takes an eighth of the time of numpy's cumsum with a conversion."""
    return torch.cumsum(torch.from_numpy(numbers.astype(np.int64, copy=False)), 0).numpy()


def _gaps(where: Positions) -> Positions:
    """Return how many entries lie between each position and the one before."""
    gaps = np.empty_like(where)
    gaps[:1] = where[:1]
    np.subtract(where[1:], where[:-1], out=gaps[1:])
    gaps[1:] -= 1
    return gaps


def _one_sided(block: memoryview, size: int, count: int) -> Index:
    if len(block):
        raise ValueError(f"{len(block)} bytes of positions where all or no entries travel")
    return np.ones(size, np.bool_) if count else np.empty(0, np.int64)


POSITION_CODECS: dict[str, PositionCodec] = {"bitmap": Bitmap(), "golomb": Golomb()}
"""The shortest is taken, tensor by tensor."""
