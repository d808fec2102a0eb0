"""What numba compiles: loops over pieces whose blocks stay in cache, over directions four at a time.

`fastmath` stays off, so no product and sum are fused: the bits are those of `reference`. Inner loops run from 0 to a
known length, else LLVM would not vectorise. All in one file: numba keeps what it compiled until the loop's file changes.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import float32, int32, njit, types, uint32, uint64
from numba.extending import intrinsic

_SIGN = np.uint32(0x80000000)
_ONE = np.uint32(0x3F800000)
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_MULTIPLY0, _MULTIPLY1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_STEP0, _STEP1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile when first called, and keep the result on disk where a disk can be written."""
    try:
        kernel: Callable[..., Any] = njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither beside this file nor in a user's cache
        kernel = njit(nogil=True)(function)
    return kernel


def _inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile into every caller: a call would keep LLVM from vectorising around it."""
    inlined: Callable[..., Any] = njit(inline="always")(function)
    return inlined


def _write_cast(context: Any, builder: Any, signature: Any, values: Any) -> Any:
    return builder.bitcast(values[0], context.get_value_type(signature.return_type))


def _write_level(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
    # Heads less tails of sixteen coins, halved: an integer in [-8, 8].
    return builder.sub(builder.ctpop(values[0]), values[0].type(8))


def _write_plus_signed(context: Any, builder: Any, signature: Any, values: Any) -> Any:
    (total, factor, word, row), kind = values, signature.return_type
    row = builder.trunc(row, word.type)
    if isinstance(kind, types.Integer):
        unset = builder.icmp_unsigned(
            "==", builder.and_(word, builder.shl(word.type(1), row)), word.type(0)
        )
        return builder.add(total, builder.select(unset, factor.type(0), factor))
    whole = builder.zext if kind.bitwidth > 32 else builder.bitcast
    sign = whole(
        builder.shl(word, builder.sub(word.type(31), row)),
        context.get_value_type(types.uint64 if kind.bitwidth > 32 else types.uint32),
    )
    sign = builder.and_(
        builder.shl(sign, sign.type(kind.bitwidth - 32)), sign.type(1 << kind.bitwidth - 1)
    )
    return builder.fadd(
        total, builder.bitcast(builder.xor(sign, builder.bitcast(factor, sign.type)), factor.type)
    )


def _instruction(result: Any, operand: Any, write: Callable[..., Any]) -> Any:
    return intrinsic(lambda _context, _value: (result(operand), write))


_as_float = _instruction(types.float32, types.uint32, _write_cast)
_as_bits = _instruction(types.uint32, types.float32, _write_cast)
_level = _instruction(types.int32, types.uint32, _write_level)


@intrinsic
def _plus_signed(_context: Any, _total: Any, factor: Any, _word: Any, _row: Any) -> Any:
    """Return total + factor or, where bit `row` of the word is set, total - factor.

    Integers: total or, where it is set, total + factor, modulo the range of their type.
    """
    return factor(factor, factor, types.uint32, types.int64), _write_plus_signed


@_inlined
def _words(out, o, group, tensor, tag, key):
    """Fill 128 words from `o`, lanes within words, of counters 32 * group and on.

    All in 64 bits, whose low half products read: truncated and widened again, words would change vectors twice a round.
    """
    first, key0, key1 = uint64(group) * uint64(32), uint64(key[0]), uint64(key[1])
    for lane in range(32):
        index = first + uint64(lane)
        x0, x1, x2, x3 = index & _LOW, index >> _HALF, uint64(tensor), uint64(tag)
        k0, k1 = key0, key1
        for _ in range(10):
            p0, p1 = (x0 & _LOW) * _MULTIPLY0, (x2 & _LOW) * _MULTIPLY1
            x0, x2 = (p1 >> _HALF) ^ x1 ^ k0, (p0 >> _HALF) ^ x3 ^ k1
            x1, x3 = p1, p0
            k0, k1 = (k0 + _STEP0) & _LOW, (k1 + _STEP1) & _LOW
        out[o + lane], out[o + lane + 32] = uint32(x0), uint32(x1)
        out[o + lane + 64], out[o + lane + 96] = uint32(x2), uint32(x3)


@_inlined
def _log(x):
    """Return the logarithm of float32 x in (0, 1]: Cephes' logf, without fused operations."""
    bits = _as_bits(x)
    power = int32(bits >> uint32(23)) - int32(127)
    m = _as_float(uint32((bits & uint32(0x7FFFFF)) | _ONE))
    large = m > float32(1.41421356)
    m = m * float32(0.5) if large else m
    power = power + int32(1) if large else power
    f = m - float32(1)
    s = f * f
    p = float32(7.0376836292e-2) * f - float32(1.1514610310e-1)
    p = (p * f + float32(1.1676998740e-1)) * f - float32(1.2420140846e-1)
    p = (p * f + float32(1.4249322787e-1)) * f - float32(1.6668057665e-1)
    p = (p * f + float32(2.0000714765e-1)) * f - float32(2.4999993993e-1)
    p = p * f + float32(3.3333331174e-1)
    return float32(power) * float32(0.693147181) + (f - float32(0.5) * s + p * f * s)


@_inlined
def _normals(z, words):
    """Fill (128,) normal deviates from (128,) words, Box-Muller: words 0, 2 the radius, 1, 3 the angle."""
    for half in range(2):
        radii, angles = words[half * 64 : half * 64 + 32], words[half * 64 + 32 : half * 64 + 64]
        first, second = z[half * 64 : half * 64 + 32], z[half * 64 + 32 : half * 64 + 64]
        for lane in range(32):
            u = (float32(int32(radii[lane] >> uint32(8))) + float32(0.5)) * float32(2**-24)
            radius = float32(math.sqrt(float32(-2) * _log(u)))
            x = angles[lane]
            quarter = x >> uint32(30)
            y = float32(int32((x & uint32(0x3FFFFFFF)) >> uint32(6)) - int32(8388608))
            y = y * float32(0.78539816339744831 / 8388608)
            s = y * y
            p = s * float32(-1.9515295891e-4) + float32(8.3321608736e-3)
            sine = y * (float32(1) + s * (p * s + float32(-1.6666654611e-1)))
            p = s * float32(2.4433157e-5) + float32(-1.388731625e-3)
            cosine = float32(1) - float32(0.5) * s + s * s * (p * s + float32(4.166664568e-2))
            odd = (quarter & uint32(1)) != 0
            a, b = sine if odd else cosine, cosine if odd else sine
            a = _as_float(
                uint32(_as_bits(a) ^ uint32(((quarter + uint32(1)) & uint32(2)) << uint32(30)))
            )
            b = _as_float(uint32(_as_bits(b) ^ uint32((quarter & uint32(2)) << uint32(30))))
            first[lane], second[lane] = radius * a, radius * b


@_inlined
def _block(z, words, code, block, rows, tensor, tag, key):
    """Fill rows of 128 elements, [rows[0], rows[1]) of a block's 32, of one direction."""
    if code == 1:
        _words(words, 0, block, tensor, tag, key)
    for t in range(rows[0], rows[1]):
        row = z[t * 128 : t * 128 + 128]
        if code == 0:
            _words(words, 0, block * 32 + t, tensor, tag, key)
            _normals(row, words)
        elif code == 1:
            up = uint32(31 - t)
            for i in range(128):
                row[i] = _as_float(uint32(uint32((words[i] << up) & _SIGN) | _ONE))
        else:
            if t % 2 == 0 or t == rows[0]:
                _words(words, 0, block * 16 + t // 2, tensor, tag, key)
            down = uint32(16 * (t % 2))
            for i in range(128):
                half = uint32((words[i] >> down) & uint32(0xFFFF))
                row[i] = float32(_level(half)) * float32(0.5)


@_inlined
def _sum_signs(sums, r, block, tensor, tag, keys, by):
    """Fill (4096,) sums of by_k z_k; of integers, sums over the set bits only."""
    sums[:] = 0
    four = len(by) // 4 * 4
    for k in range(0, four, 4):
        for j in range(4):
            _words(r, j * 128, block, tensor, tag, keys[k + j])
        c0, c1, c2, c3 = by[k], by[k + 1], by[k + 2], by[k + 3]
        for t in range(32):
            o = t * 128
            for i in range(128):
                s = _plus_signed(sums[o + i], c0, r[i], t)
                s = _plus_signed(s, c1, r[i + 128], t)
                s = _plus_signed(s, c2, r[i + 256], t)
                sums[o + i] = _plus_signed(s, c3, r[i + 384], t)
    for k in range(four, len(by)):
        _words(r, 0, block, tensor, tag, keys[k])
        for t in range(32):
            o = t * 128
            for i in range(128):
                sums[o + i] = _plus_signed(sums[o + i], by[k], r[i], t)


@_compiled
def _sum(sums, z, r, code, block, rows, tensor, tag, keys, by):
    """Fill rows of 128 elements, [rows[0], rows[1]) of a block's 32, with sums of by_k z_k."""
    if code == 1:
        _sum_signs(sums, r, block, tensor, tag, keys, by)
        return
    sums[rows[0] * 128 : rows[1] * 128] = 0
    for k in range(len(by)):
        factor = by[k]
        for t in range(rows[0] // 2 * 2, rows[1], 2):
            two = max(t, rows[0]), min(t + 2, rows[1])
            _block(z, r, code, block, two, tensor, tag, keys[k])
            here, drawn = sums[two[0] * 128 : two[1] * 128], z[two[0] * 128 : two[1] * 128]
            for i in range(len(here)):
                here[i] += factor * drawn[i]


@_compiled
def add(base, out, scale, moves, code, tag, keys, by, pieces):
    """Write scale * base + sum_k by_k z_k; the first `moves` directions are added to base itself before."""
    r, z, sums = np.empty(512, np.uint32), np.empty(4096, np.float32), np.empty(4096, by.dtype)
    for p in range(len(pieces)):
        tensor, start, at, size = pieces[p]
        low, block = start % 4096, start // 4096
        rows = low // 128, (low + size + 127) // 128
        given, result, summed = base[at : at + size], out[at : at + size], sums[low : low + size]
        if moves:
            _sum(sums, z, r, code, block, rows, tensor, tag, keys[:moves], by[:moves])
            for i in range(size):
                given[i] = given[i] + summed[i]
        _sum(sums, z, r, code, block, rows, tensor, tag, keys[moves:], by[moves:])
        if scale == 1.0:
            for i in range(size):
                result[i] = given[i] + summed[i]
        else:
            for i in range(size):
                result[i] = scale * np.float64(given[i]) + np.float64(summed[i])


@_compiled
def add_exact(base, out, scale, unit, code, tag, keys, quanta, pieces):
    """Write scale * base + unit * sum_k q_k n_k; only the sum of the two is rounded, and then to the type of out."""
    r, sums, total = np.empty(512, np.uint32), np.empty(4096, quanta.dtype), quanta.sum()
    for p in range(len(pieces)):
        tensor, start, at, size = pieces[p]
        low, block = start % 4096, start // 4096
        if code == 1:
            _sum_signs(sums, r, block, tensor, tag, keys, quanta)
            for i in range(4096):  # right also where 32 bits ran over on the way
                sums[i] = total - 2 * sums[i]
        else:
            sums[:] = 0
            for k in range(len(quanta)):
                q = quanta[k]
                for g in range(low // 256, (low + size + 255) // 256):
                    _words(r, 0, block * 16 + g, tensor, tag, keys[k])
                    here, next_ = sums[g * 256 : g * 256 + 128], sums[g * 256 + 128 : g * 256 + 256]
                    for i in range(128):
                        here[i] += q * _level(uint32(r[i] & uint32(0xFFFF)))
                        next_[i] += q * _level(uint32(r[i] >> uint32(16)))
        given, result, summed = base[at : at + size], out[at : at + size], sums[low : low + size]
        for i in range(size):
            result[i] = scale * np.float64(given[i]) + unit * np.float64(summed[i])


@_compiled
def fill(out, code, tag, keys, pieces):
    """Write z of every direction, (K, n)."""
    words, z = np.empty(128, np.uint32), np.empty(4096, np.float32)
    for p in range(len(pieces)):
        tensor, start, at, size = pieces[p]
        low = start % 4096
        rows = low // 128, (low + size + 127) // 128
        for k in range(len(keys)):
            _block(z, words, code, start // 4096, rows, tensor, tag, keys[k])
            out[k, at : at + size] = z[low : low + size]


@_compiled
def project(values, out, code, tag, keys, pieces):
    """Add to (K,) float64; 128 lanes are summed on their own, over the 32 rows of a block."""
    words, z, v = np.empty(128, np.uint32), np.empty(4096, np.float32), np.empty(4096, values.dtype)
    lanes = np.empty(128, values.dtype)
    for p in range(len(pieces)):
        tensor, start, at, size = pieces[p]
        low = start % 4096
        rows = low // 128, (low + size + 127) // 128
        v[rows[0] * 128 : rows[1] * 128] = 0
        v[low : low + size] = values[at : at + size]
        for k in range(len(keys)):
            _block(z, words, code, start // 4096, rows, tensor, tag, keys[k])
            lanes[:] = 0
            for t in range(rows[0], rows[1]):
                drawn, here = z[t * 128 : t * 128 + 128], v[t * 128 : t * 128 + 128]
                for i in range(128):
                    lanes[i] += drawn[i] * here[i]
            total = 0.0
            for i in range(128):
                total += lanes[i]
            out[k] += total
