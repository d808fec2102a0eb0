"""The stream's kernels in Triton, for tensors on CUDA: one program a piece, all directions in one pass over memory.

Integers, polynomials and the order of sums are those of `reference`, and products are not fused with sums, so that signs
and counts have its bits and normal deviates too wherever a root and a quotient are rounded as IEEE says.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: N803 - Triton's constants are written so

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from fedloom.spaces.directions.stream import BLOCK, CODES, Draw


@triton.jit
def _log(x):
    """Return the logarithm of float32 x in (0, 1]: Cephes' logf."""
    bits = x.to(tl.uint32, bitcast=True)
    power = (bits >> 23).to(tl.int32) - 127
    m = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    large = m > 1.41421356
    f = tl.where(large, m * 0.5, m) - 1.0
    s = f * f
    p = f * 7.0376836292e-2 - 1.1514610310e-1
    p = p * f + 1.1676998740e-1
    p = p * f - 1.2420140846e-1
    p = p * f + 1.4249322787e-1
    p = p * f - 1.6668057665e-1
    p = p * f + 2.0000714765e-1
    p = p * f - 2.4999993993e-1
    p = p * f + 3.3333331174e-1
    whole = (power + large.to(tl.int32)).to(tl.float32) * 0.693147181
    return whole + (f - s * 0.5 + p * f * s)


@triton.jit
def _normals(radii, angles):
    """Return two normal deviates of two words."""
    u = ((radii >> 8).to(tl.float32) + 0.5) * 5.9604644775390625e-8
    radius = tl.sqrt_rn(_log(u) * -2.0)
    quarter = angles >> 30
    y = (((angles & 0x3FFFFFFF) >> 6).to(tl.int32) - 8388608).to(tl.float32)
    y = y * 9.362675917827892e-08
    s = y * y
    p = s * -1.9515295891e-4 + 8.3321608736e-3
    sine = y * ((p * s - 1.6666654611e-1) * s + 1.0)
    p = s * 2.4433157e-5 - 1.388731625e-3
    cosine = (s * -0.5 + 1.0) + s * s * (p * s + 4.166664568e-2)
    odd = (quarter & 1) != 0
    first, second = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    first = (first.to(tl.uint32, bitcast=True) ^ (((quarter + 1) & 2) << 30)).to(
        tl.float32, bitcast=True
    )
    second = (second.to(tl.uint32, bitcast=True) ^ ((quarter & 2) << 30)).to(
        tl.float32, bitcast=True
    )
    return radius * first, radius * second


@triton.jit
def _counts(half):
    """Return heads less tails of sixteen coins, halved."""
    half = half - ((half >> 1) & 0x5555)
    half = (half & 0x3333) + ((half >> 2) & 0x3333)
    half = (half + (half >> 4)) & 0x0F0F
    return ((half + (half >> 8)) & 0x1F).to(tl.int32) - 8


@triton.jit
def _levels(words, row, CODE: tl.constexpr):
    """Return integer levels of a block's (row, lane) from words: signs, or twice the counts."""
    if CODE == 1:
        levels = 1 - 2 * ((words >> row.to(tl.uint32)) & 1).to(tl.int32)
    else:
        levels = _counts((words >> (16 * (row & 1)).to(tl.uint32)) & 0xFFFF)
    return levels


@triton.jit
def _draw(key, block, tensor, tag, row, lane, CODE: tl.constexpr, EXACT: tl.constexpr):
    """Return a block's elements, row * 128 + word * 32 + lane, as four (row, lane) tensors, one a word."""
    if CODE == 0:
        index = (block * 32 + row) * 32 + lane
    elif CODE == 1:
        index = block * 32 + lane + row * 0
    else:
        index = (block * 16 + row // 2) * 32 + lane
    low = (index & 0xFFFFFFFF).to(tl.uint32)
    high = (index >> 32).to(tl.uint32)
    third = low * 0 + tensor.to(tl.uint32)
    fourth = low * 0 + tag
    w0, w1, w2, w3 = tl.philox(key, low, high, third, fourth)
    if CODE == 0:
        a, b = _normals(w0, w1)
        c, d = _normals(w2, w3)
    elif EXACT:
        a, b = _levels(w0, row, CODE), _levels(w1, row, CODE)
        c, d = _levels(w2, row, CODE), _levels(w3, row, CODE)
    else:
        unit: tl.constexpr = 1.0 if CODE == 1 else 0.5
        a = _levels(w0, row, CODE).to(tl.float32) * unit
        b = _levels(w1, row, CODE).to(tl.float32) * unit
        c = _levels(w2, row, CODE).to(tl.float32) * unit
        d = _levels(w3, row, CODE).to(tl.float32) * unit
    return a, b, c, d


@triton.jit
def _store(base, out, sums, at, e, low, size, scale, unit, WIDE: tl.constexpr):
    inside = (e >= low) & (e < low + size)
    place = at + e - low
    given = tl.load(base + place, mask=inside, other=0.0)
    if WIDE:
        result = given.to(tl.float64) * scale + sums.to(tl.float64) * unit
    else:
        result = given.to(sums.dtype) + sums
    if out.dtype.element_ty.primitive_bitwidth == 16:
        result = result.to(tl.float32)
    tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add(
    base,
    out,
    scalars,
    pieces,
    keys,
    by,
    tag,
    num,
    CODE: tl.constexpr,
    EXACT: tl.constexpr,
    WIDE: tl.constexpr,
):
    piece = pieces + tl.program_id(0) * 4
    tensor, start = tl.load(piece), tl.load(piece + 1)
    at, size = tl.load(piece + 2), tl.load(piece + 3)
    row, lane = tl.arange(0, 32)[:, None].to(tl.int64), tl.arange(0, 32)[None, :].to(tl.int64)
    block, low = start // 4096, start % 4096
    zero = (row * 0 + lane * 0).to(by.dtype.element_ty)
    s0, s1, s2, s3 = zero, zero, zero, zero
    for k in range(num):
        key, factor = tl.load(keys + k), tl.load(by + k)
        a, b, c, d = _draw(key, block, tensor, tag, row, lane, CODE, EXACT)
        s0, s1 = s0 + a.to(by.dtype.element_ty) * factor, s1 + b.to(by.dtype.element_ty) * factor
        s2, s3 = s2 + c.to(by.dtype.element_ty) * factor, s3 + d.to(by.dtype.element_ty) * factor
    e, scale, unit = row * 128 + lane, tl.load(scalars), tl.load(scalars + 1)
    _store(base, out, s0, at, e, low, size, scale, unit, WIDE)
    _store(base, out, s1, at, e + 32, low, size, scale, unit, WIDE)
    _store(base, out, s2, at, e + 64, low, size, scale, unit, WIDE)
    _store(base, out, s3, at, e + 96, low, size, scale, unit, WIDE)


@triton.jit
def _fill(out, width, pieces, keys, tag, CODE: tl.constexpr):
    piece, k = pieces + tl.program_id(0) * 4, tl.program_id(1).to(tl.int64)
    tensor, start = tl.load(piece), tl.load(piece + 1)
    at, size = tl.load(piece + 2), tl.load(piece + 3)
    row, lane = tl.arange(0, 32)[:, None].to(tl.int64), tl.arange(0, 32)[None, :].to(tl.int64)
    low = start % 4096
    drawn = _draw(tl.load(keys + k), start // 4096, tensor, tag, row, lane, CODE, False)
    for word in tl.static_range(4):
        e = row * 128 + word * 32 + lane
        inside = (e >= low) & (e < low + size)
        tl.store(out + k * width + at + e - low, drawn[word], mask=inside)


def _arguments(draw: Draw, device: torch.device) -> tuple[Tensor, Tensor]:
    keys = draw.keys.astype(np.uint64)
    packed = (keys[:, 0] | keys[:, 1] << np.uint64(32)).view(np.int64)
    return torch.from_numpy(draw.pieces.copy()).to(device), torch.from_numpy(packed).to(device)


def add(draw: Draw, base: Tensor, out: Tensor, by: NDArray[Any], scale: float) -> None:
    """Write scale * base + sum_k by_k z_k where the pieces lie; sums in the type of `by`, in order."""
    _launch(draw, base, out, by, 1.0, scale, exact=False)


def add_exact(
    draw: Draw, base: Tensor, out: Tensor, quanta: NDArray[Any], unit: float, scale: float
) -> None:
    """Write scale * base + unit * sum_k q_k n_k where the pieces lie, the sum in integers."""
    _launch(draw, base, out, quanta, unit, scale, exact=True)


def fill(draw: Draw, out: Tensor) -> None:
    """Write z of every direction, (K, n) float32, where the pieces lie."""
    pieces, keys = _arguments(draw, out.device)
    code = CODES[draw.distribution]
    with torch.cuda.device_of(out):
        _fill[len(pieces), len(keys)](
            out, out.shape[1], pieces, keys, draw.tag, CODE=code, enable_fp_fusion=False
        )


def project(draw: Draw, values: Tensor) -> Tensor:
    """Return (K,) float64 z_k . values over the pieces, drawn a few directions and 256 blocks at a time."""
    total = torch.zeros(len(draw.keys), dtype=torch.float64, device=values.device)
    for first in range(0, len(draw.pieces), 256):
        some = draw.pieces[first : first + 256]
        here = values[int(some[0, 2]) : int(some[-1, 2] + some[-1, 3])]
        for k in range(0, len(draw.keys), 16):
            part = draw.part(first, first + 256)
            part = Draw(draw.distribution, draw.tag, draw.keys[k : k + 16], part.pieces)
            z = torch.empty(len(part.keys), len(here), device=values.device)
            fill(part, z)
            total[k : k + 16] += (z * here).sum(1, dtype=torch.float64)
    return total.cpu()


def _launch(
    draw: Draw,
    base: Tensor,
    out: Tensor,
    by: NDArray[Any],
    unit: float,
    scale: float,
    *,
    exact: bool,
) -> None:
    pieces, keys = _arguments(draw, out.device)
    # Passed as a tensor: a Python float would arrive as float32.
    scalars = torch.tensor([scale, unit], dtype=torch.float64, device=out.device)
    factors = torch.from_numpy(by).to(out.device)
    code, wide = CODES[draw.distribution], exact or scale != 1
    with torch.cuda.device_of(out):
        _add[len(pieces),](
            *(base, out, scalars, pieces, keys, factors, draw.tag, len(keys)),
            CODE=code,
            EXACT=exact,
            WIDE=wide,
            enable_fp_fusion=False,
        )


assert BLOCK == 4096  # written out in the kernels, where a name of this module would be no constant
