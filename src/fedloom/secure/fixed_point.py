"""Numbers as whole steps modulo 2^R, which add up exactly, and their bytes.

A coordinate x in [-clip, clip] is a whole number of steps of clip * 2^-bits. A sum of n of them lies within n * 2^bits,
so R is one bit more than that takes. What is wide, such as a count, goes over several coordinates, `bits` bits in each.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedloom.core.bitpacking import pack, unpack

Words = np.ndarray[Any, np.dtype[np.uint32]]
"""(n,) whole numbers modulo 2^32; only the lowest R bits count."""
FRACTION = 32
"""Bits behind the point of a wide number."""
_WIDE_BITS = 96
LARGEST_WIDE = 2.0 ** (_WIDE_BITS - FRACTION)
"""What a wide number must stay below."""


def width(number: int, bits: int) -> int:
    """Return R: the bits that hold the sum of so many clients.

    Raises:
        ValueError: where that is more than 32.
    """
    found = (number << bits).bit_length() + 1
    if found > 32:
        raise ValueError(
            f"secure.bits {bits} leaves room for sums of {(1 << (31 - bits)) - 1} clients, got {number}: lower it"
        )
    return found


def rounded(values: Tensor, *, clip: float, bits: int, source: torch.Generator | None) -> Tensor:
    """Return (n,) int64, the values in steps, at most 2^bits of them.

    Args:
        values: (n,), clipped to [-clip, clip].
        clip: The largest.
        bits: A step is clip * 2^-bits.
        source: Rounds up or down by chance so that the mean stays; None rounds towards 0, which makes no norm longer.
    """
    steps = values.double().clamp(-clip, clip) * (2.0**bits / clip)
    if source is None:
        return steps.trunc().long()
    return steps.add_(torch.rand(steps.shape, dtype=torch.float64, generator=source)).floor().long()


def num_limbs(bits: int) -> int:
    """Return the coordinates of a wide number."""
    return math.ceil(_WIDE_BITS / bits)


def limbs(value: float, bits: int) -> list[int]:
    """Return a wide number's coordinates, lowest first, all of its sign.

    Raises:
        ValueError: where it is not finite, or too large.
    """
    if not abs(value) < LARGEST_WIDE:
        raise ValueError(f"a number of a secure sum must be below 2^64, got {value:g}")
    whole = round(abs(value) * 2.0**FRACTION)
    sign, low = (-1 if value < 0 else 1), (1 << bits) - 1
    return [sign * (whole >> bits * at & low) for at in range(num_limbs(bits))]


def unlimbed(sums: Tensor, bits: int) -> float:
    """Return the number whose coordinates were added up."""
    parts: list[int] = sums.tolist()
    whole = sum(part << bits * at for at, part in enumerate(parts))
    return whole / (1 << FRACTION)


def words(steps: Tensor) -> Words:
    """Return int64 modulo 2^32."""
    return steps.numpy().astype(np.uint32)


def signed(total: Words, number_bits: int) -> Tensor:
    """Return (n,) int64, what lies between -2^(R-1) and 2^(R-1) and is the same modulo 2^R."""
    shift = 32 - number_bits
    return torch.from_numpy((total << np.uint32(shift)).view(np.int32).astype(np.int64) >> shift)


def packed(total: Words, number_bits: int) -> bytes:
    """Return the lowest R bits of each, one after another."""
    low = torch.from_numpy((total & np.uint32((1 << number_bits) - 1)).astype(np.int64))
    return pack(low, 1 << number_bits).numpy().tobytes()


def unpacked(data: bytes | memoryview, number_bits: int, count: int) -> Words:
    """Return what was packed.

    Raises:
        ValueError: where there are more or fewer bytes than they take.
    """
    read = torch.from_numpy(np.frombuffer(bytearray(data), np.uint8))
    return words(unpack(read, 1 << number_bits, count))
