"""The same kernels in numpy: what the others are held against, and what runs where numba is absent."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedloom.spaces.directions.stream import BLOCK, Distribution, Draw, philox

_SPANS = {"gaussian": 128, "rademacher": 4096, "popcount": 256}


_F32 = np.float32


def _f(value: float) -> np.float32:
    return np.float32(value)


def _words(group: int, count: int, tensor: int, tag: int, key: Any) -> NDArray[np.uint32]:
    """Return (count, 128) words of counters 32 * group and on: word * 32 + lane."""
    index = np.arange(group * 32, (group + count) * 32, dtype=np.uint64)
    counters = np.zeros((4, len(index)), np.uint32)
    counters[0], counters[1] = index & np.uint64(0xFFFFFFFF), index >> np.uint64(32)
    counters[2], counters[3] = tensor, tag
    drawn = philox(counters, (int(key[0]), int(key[1])))
    return np.ascontiguousarray(drawn.reshape(4, count, 32).transpose(1, 0, 2)).reshape(count, 128)


def _log(x: NDArray[np.float32]) -> NDArray[np.float32]:
    bits = x.view(np.uint32)
    power = (bits >> 23).astype(np.int32) - 127
    m = ((bits & np.uint32(0x7FFFFF)) | np.uint32(0x3F800000)).view(np.float32)
    large = m > _f(1.41421356)
    f = np.where(large, m * _f(0.5), m) - _f(1)
    p = _f(7.0376836292e-2) * f - _f(1.1514610310e-1)
    for c in (1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1):
        p = p * f + _f(c)
    for c in (2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1):
        p = p * f + _f(c)
    s = f * f
    whole = (power + large).astype(np.float32) * _f(0.693147181)
    logarithm: NDArray[np.float32] = whole + (f - _f(0.5) * s + p * f * s)
    return logarithm


def _normals(drawn: NDArray[np.uint32]) -> NDArray[np.float32]:
    pairs = drawn.reshape(-1, 2, 2, 32)
    radii, angles = pairs[:, :, 0], pairs[:, :, 1]
    u = ((radii >> 8).astype(np.float32) + _f(0.5)) * _f(2**-24)
    radius = np.sqrt(_f(-2) * _log(u))
    quarter = angles >> 30
    y = (((angles & np.uint32(0x3FFFFFFF)) >> 6).astype(np.int32) - 8388608).astype(np.float32)
    y = y * _f(0.78539816339744831 / 8388608)
    s = y * y
    p = s * _f(-1.9515295891e-4) + _f(8.3321608736e-3)
    sine = y * (_f(1) + s * (p * s + _f(-1.6666654611e-1)))
    p = s * _f(2.4433157e-5) + _f(-1.388731625e-3)
    cosine = _f(1) - _f(0.5) * s + s * s * (p * s + _f(4.166664568e-2))
    odd = (quarter & np.uint32(1)) != 0
    first, second = np.where(odd, sine, cosine), np.where(odd, cosine, sine)
    first = (first.view(np.uint32) ^ (((quarter + np.uint32(1)) & np.uint32(2)) << 30)).view(_F32)
    second = (second.view(np.uint32) ^ ((quarter & np.uint32(2)) << 30)).view(_F32)
    return np.stack((radius * first, radius * second), 2).reshape(-1)


def draw_range(
    distribution: Distribution, tag: int, key: Any, tensor: int, start: int, size: int
) -> NDArray[np.float32]:
    """Return (size,) elements of one direction in one tensor."""
    span = _SPANS[distribution]
    group = start // span
    drawn = _words(group, (start + size + span - 1) // span - group, tensor, tag, key)
    if distribution == "gaussian":
        z = _normals(drawn)
    elif distribution == "rademacher":
        up = np.arange(31, -1, -1, dtype=np.uint32)[:, None]
        bits = np.left_shift(drawn[:, None, :], up)
        bits &= np.uint32(0x80000000)
        bits |= np.uint32(0x3F800000)
        z = bits.view(np.float32).reshape(-1)
    else:
        halves = np.stack((drawn & np.uint32(0xFFFF), drawn >> 16), 1)
        z = (np.bitwise_count(halves).astype(np.float32) - _f(8)).reshape(-1) * _f(0.5)
    low = start - group * span
    return z[low : low + size]


def add(draw: Draw, base: Any, out: Any, by: Any, scale: float, moves: int = 0) -> None:
    """Write scale * base + sum_k by_k z_k where the pieces lie; sums in the type of `by`, in order.

    The first `moves` directions are added to base itself before.
    """

    def summed(which: slice, *at: int) -> NDArray[Any]:
        sums = np.zeros(at[2], by.dtype)
        for key, factor in zip(draw.keys[which], by[which], strict=True):
            sums += factor * draw_range(draw.distribution, draw.tag, key, *at)
        return sums

    for tensor, start, at, size in _joined(draw.pieces):
        here = slice(at, at + size)
        if moves:
            base[here] += summed(slice(moves), tensor, start, size)
        sums = summed(slice(moves, None), tensor, start, size)
        out[here] = (
            base[here] + sums if scale == 1 else scale * base[here].astype(np.float64) + sums
        )


def add_exact(draw: Draw, base: Any, out: Any, quanta: Any, unit: float, scale: float) -> None:
    """Write scale * base + unit * sum_k q_k z_k, the sum in integers; `unit` is for z = n / 2 half of theirs."""
    for tensor, start, at, size in _joined(draw.pieces):
        sums = np.zeros(size, quanta.dtype)
        for key, q in zip(draw.keys, quanta, strict=True):
            z = draw_range(draw.distribution, draw.tag, key, tensor, start, size)
            levels = (z if draw.distribution == "rademacher" else z + z).astype(quanta.dtype)
            levels *= q
            sums += levels
        here = slice(at, at + size)
        out[here] = scale * base[here].astype(np.float64) + unit * sums.astype(np.float64)


def fill(draw: Draw, out: Any) -> None:
    """Write z of every direction, (K, n) float32, where the pieces lie."""
    for tensor, start, at, size in _joined(draw.pieces):
        for k, key in enumerate(draw.keys):
            out[k, at : at + size] = draw_range(
                draw.distribution, draw.tag, key, tensor, start, size
            )


def project(draw: Draw, values: Any) -> NDArray[np.float64]:
    """Return (K,) z_k . values, over the pieces."""
    sums = np.zeros(len(draw.keys))
    for tensor, start, at, size in _joined(draw.pieces):
        for k, key in enumerate(draw.keys):
            z = draw_range(draw.distribution, draw.tag, key, tensor, start, size)
            sums[k] += np.dot(z.astype(np.float64), values[at : at + size].astype(np.float64))
    return sums


def _joined(pieces: NDArray[np.int64]) -> list[tuple[int, int, int, int]]:
    """Return pieces that follow one another as one: up to 16 blocks, which stay in cache."""
    joined: list[tuple[int, int, int, int]] = []
    for tensor, start, at, size in pieces.tolist():
        if joined:
            last = joined[-1]
            follows = last[0] == tensor and last[1] + last[3] == start and last[2] + last[3] == at
            if follows and last[3] + size <= 16 * BLOCK:
                joined[-1] = (tensor, last[1], last[2], last[3] + size)
                continue
        joined.append((tensor, start, at, size))
    return joined
