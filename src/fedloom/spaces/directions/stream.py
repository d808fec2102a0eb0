"""The stream every direction is read from: Philox4x32-10, addressed by seed, direction, tensor and element.

Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". A counter and a key give four words of 32 bits, by
integer arithmetic alone, so a machine, a thread or a device that needs an element draws that element and no other.

    key      = the first two words at counter (k, 0, 0, tag of keys) under the noise seed
    counter  = (index low, index high, place of the tensor in the layout, tag of the distribution)
    index    = 32 * (element // span) + lane,   lane = element % 32,   word = element // 32 % 4

`span` is how many elements 32 counters serve: 128 normal deviates, 256 counts of sixteen bits, 4096 signs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

NOISE_VERSION = 1
"""Goes up whenever one element of one distribution changes: runs of different versions must not mix."""
Distribution = Literal["gaussian", "rademacher", "popcount", "lowrank"]
CODES: dict[Distribution, int] = {"gaussian": 0, "rademacher": 1, "popcount": 2, "lowrank": 3}
_OF_KEYS = 255
BLOCK = 4096
"""Elements a kernel holds at once; no piece crosses a multiple of it."""


@dataclass(frozen=True, slots=True)
class Draw:
    """Which directions, and which of their elements."""

    distribution: Distribution
    """Of the elements: gaussian, rademacher or popcount."""
    tag: int
    """Last word of the counter, see tag_of."""
    keys: NDArray[np.uint32]
    """(K, 2)"""
    pieces: NDArray[np.int64]
    """(P, 4): tensor, first element in it, where that lies in the flat vector, how many; within one block each."""

    def part(self, first: int, last: int) -> "Draw":
        """Return the draw of some pieces, which lie from 0 in a vector of their own."""
        pieces = self.pieces[first:last].copy()
        pieces[:, 2] -= pieces[0, 2]
        return Draw(self.distribution, self.tag, self.keys, pieces)


def tag_of(distribution: Distribution) -> int:
    """Return the last word of a distribution's counters."""
    return NOISE_VERSION << 8 | CODES[distribution]


def philox(counters: NDArray[np.uint32], key: tuple[int, int]) -> NDArray[np.uint32]:
    """Return (4, ...) words of (4, ...) counters."""
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    x0, x1, x2, x3 = counters.astype(np.uint64)
    k0, k1 = key
    for _ in range(10):
        p0, p1 = x0 * np.uint64(0xD2511F53), x2 * np.uint64(0xCD9E8D57)
        x0, x1 = (p1 >> half) ^ x1 ^ np.uint64(k0), p1 & low
        x2, x3 = (p0 >> half) ^ x3 ^ np.uint64(k1), p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack((x0, x1, x2, x3)).astype(np.uint32)


def keys_of(seed: int, ks: Sequence[int] | NDArray[np.int64]) -> NDArray[np.uint32]:
    """Return the (K, 2) keys of directions `ks` under a noise seed of 64 bits."""
    counters = np.zeros((4, len(ks)), np.uint32)
    counters[0] = np.asarray(ks, np.uint32)
    counters[3] = NOISE_VERSION << 8 | _OF_KEYS
    words = philox(counters, (seed & 0xFFFFFFFF, seed >> 32))
    return np.ascontiguousarray(words[:2].T)


def cut(tensors: Any, starts: Any, stops: Any, at: Any) -> NDArray[np.int64]:
    """Return the pieces of elements [start, stop) of each tensor, which lie from `at` in the flat vector."""
    tensors, starts, stops, at = np.broadcast_arrays(
        *(np.atleast_1d(np.asarray(column, np.int64)) for column in (tensors, starts, stops, at))
    )
    first = starts // BLOCK
    count = np.maximum(0, (stops + BLOCK - 1) // BLOCK - first)
    which = np.repeat(np.arange(len(starts)), count)
    block = np.arange(len(which)) - np.repeat(np.cumsum(count) - count, count) + first[which]
    begin = np.maximum(starts[which], block * BLOCK)
    end = np.minimum(stops[which], (block + 1) * BLOCK)
    return np.stack((tensors[which], begin, at[which] + begin - starts[which], end - begin), 1)
