"""Products with a frozen weight, and the choice between them.

oneDNN multiplies faster with a weight packed once, on some CPUs twice as fast as the library behind torch's own
products; CPUs without instructions for bfloat16 multiply it several times slower than float32. So what a machine can
do is looked for, checked and timed; the packed operators are private to torch.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

from fedloom.objectives.head import Product

Kind = Literal["torch", "widened", "onednn_forward", "onednn"]
"""Ways to multiply, by the memory they take beside the weight."""
WIDE = 2**21
"""Entries of a weight that are in float32 at a time: they stay in a cache."""
NEARLY = 1.25
"""A way that takes less memory is taken if the fastest is no more than this many times faster: more than noise, so that
a run that is taken up chooses alike."""


class TorchProduct:
    """torch's own; any type, any device."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self._weight)

    def backward(self, gradient: Tensor) -> Tensor:
        return gradient @ self._weight


class WidenedProduct:
    """torch's own in float32, of a half-precision weight that is widened some rows at a time, as they are used."""

    def __init__(self, weight: Tensor) -> None:
        self._parts = torch.split(weight, max(1, WIDE // weight.shape[1]))
        self._out, self._in = weight.shape

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self._in).float()
        parts = [rows @ part.float().t() for part in self._parts]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return out.view(*x.shape[:-1], self._out).to(x.dtype)

    def backward(self, gradient: Tensor) -> Tensor:
        rows = gradient.reshape(-1, self._out).float()
        out = rows.new_zeros(len(rows), self._in)
        at = 0
        for part in self._parts:
            out.addmm_(rows[:, at : at + len(part)], part.float())
            at += len(part)
        return out.view(*gradient.shape[:-1], self._in).to(gradient.dtype)


class UnpackedForward(TorchProduct):
    """oneDNN's forwards, with the weight as it is; torch's own backwards."""

    def forward(self, x: Tensor) -> Tensor:
        return _packed_linear(x, self._weight)


class UnpackedProduct(UnpackedForward):
    """oneDNN's, with the weight as it is, which backwards is read across: no copy is made, not even for a while."""

    def backward(self, gradient: Tensor) -> Tensor:
        return _packed_linear(gradient, self._weight.t())


class PackedForward(TorchProduct):
    """oneDNN's forwards, with the weight once more in its own memory layout; torch's own backwards."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        self._there = _packed(weight)

    def forward(self, x: Tensor) -> Tensor:
        return _packed_linear(x, self._there)


class PackedProduct:
    """oneDNN's, in its own memory layout, on a CPU. Holds the weight twice more, once a direction."""

    def __init__(self, weight: Tensor) -> None:
        self._there, self._back = _packed(weight), _packed(weight.t())

    def forward(self, x: Tensor) -> Tensor:
        return _packed_linear(x, self._there)

    def backward(self, gradient: Tensor) -> Tensor:
        return _packed_linear(gradient, self._back)


class UnkeptProduct:
    """A product with a weight as it stands when called, of which nothing is kept: it moves, or is held in few bits."""

    def __init__(
        self, weight: Callable[[torch.dtype], Tensor], make: Callable[[Tensor], Product]
    ) -> None:
        """Take what returns the weight (out, in), for inputs of a type."""
        self._weight, self._make = weight, make

    def forward(self, x: Tensor) -> Tensor:
        return self._make(self._weight(x.dtype)).forward(x)

    def backward(self, gradient: Tensor) -> Tensor:
        return self._make(self._weight(gradient.dtype)).backward(gradient)


PRODUCTS: Mapping[Kind, Callable[[Tensor], Product]] = {
    "torch": TorchProduct,
    "widened": WidenedProduct,
    "onednn_forward": PackedForward,
    "onednn": PackedProduct,
}
UNKEPT: Mapping[Kind, Callable[[Tensor], Product]] = {
    "torch": TorchProduct,
    "widened": WidenedProduct,
    "onednn_forward": UnpackedForward,
    "onednn": UnpackedProduct,
}
"""The same with nothing kept of the weight, for one that moves or is held in few bits, and for a head, the largest of all, without
whose copies a round takes 1.5 % to 4 % longer (`benchmarks/results/head.txt`)."""
COPIES: Mapping[Kind, int] = {"torch": 0, "widened": 0, "onednn_forward": 1, "onednn": 2}
"""Of a weight that a way keeps; of a head, nothing."""


def _packed(weight: Tensor) -> Tensor:
    out: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
    return out


def _packed_linear(x: Tensor, weight: Tensor) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return out


@dataclass(frozen=True, slots=True)
class Rate:
    """How fast one way multiplies on this machine, on one thread."""

    kind: Kind
    gflops: float
    """Over both directions."""


@lru_cache(maxsize=4)
def rates(dtype: torch.dtype) -> tuple[Rate, ...]:
    """Return the ways that work on this CPU, by the memory they take; takes less than a second, once a process and type.

    Of float32 it is the plain and the packed products; of half precision the widened ones too.
    """
    noise = torch.Generator().manual_seed(0)
    weight = torch.randn(512, 512, generator=noise).to(dtype)
    x, gradient = (torch.randn(256, 512, generator=noise).to(dtype) for _ in range(2))
    low = dtype in (torch.bfloat16, torch.float16)
    found = {
        kind: product
        for kind in PRODUCTS
        if (kind != "widened" or low) and (product := _checked(kind, weight, x)) is not None
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        turns = [
            [_seconds(product, x, gradient) for product in found.values()] for _ in range(_TURNS)
        ]
    finally:
        torch.set_num_threads(threads)
    work = 2 * 2 * len(x) * weight.numel() / 1e9
    medians = map(statistics.median, zip(*turns, strict=True))
    return tuple(
        Rate(kind, work / max(seconds, 1e-9)) for kind, seconds in zip(found, medians, strict=True)
    )


_TURNS = 9


def native(dtype: torch.dtype) -> float:
    """Return GFLOP/s of products in a type itself, however they are made."""
    return max(rate.gflops for rate in rates(dtype) if rate.kind != "widened")


def fastest(dtype: torch.dtype, *, copies: int) -> Kind:
    """Return the way of the least memory that is nearly as fast as any, of those that keep up to `copies` of a weight.

    Where packed products beat torch's own on every processor tried it is not left to a clock: float32 on AMD, by 1.1
    to 2.2, and bfloat16 where the CPU has instructions for it, by up to 1.3.
    """
    known = [rate for rate in rates(dtype) if COPIES[rate.kind] <= copies]
    marks = {torch.float32: ("AuthenticAMD",), torch.bfloat16: ("avx512_bf16", "amx_bf16")}
    if known[-1].kind == "onednn" and any(mark in _cpu_info() for mark in marks.get(dtype, ())):
        return "onednn"
    best = max(rate.gflops for rate in known)
    return next(rate.kind for rate in known if NEARLY * rate.gflops >= best)


def _checked(kind: Kind, weight: Tensor, x: Tensor) -> Product | None:
    """Return a product that gives in both directions what it should."""
    exact = TorchProduct(weight.double())
    off = 1e-5 if weight.dtype == torch.float32 else 0.02
    try:
        product = PRODUCTS[kind](weight)
        there, back = product.forward(x), product.backward(x)
    except (AttributeError, RuntimeError):
        return None
    wide = x.double()
    near = (_off(there, exact.forward(wide)) < off, _off(back, exact.backward(wide)) < off)
    return product if all(near) else None


def _off(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm())


def _cpu_info() -> str:
    listed = Path("/proc/cpuinfo")
    return listed.read_text() if listed.exists() else ""


def _seconds(product: Product, x: Tensor, gradient: Tensor) -> float:
    """Return CPU seconds of this thread, which a busy machine hardly changes."""
    begin = time.thread_time()
    product.forward(x)
    product.backward(gradient)
    return time.thread_time() - begin
