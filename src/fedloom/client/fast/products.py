"""Products with a frozen weight, and the choice between them.

On some CPUs oneDNN multiplies float32 matrices about twice as fast as the library behind torch's own products, and
more so with the weight packed once. The operators are private to torch, so they are looked for, checked and timed.
"""

import statistics
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

FASTER = 1.25
"""Packed products must be this much faster to be used where it is timed: more than noise, so that reruns choose alike."""


class TorchProduct:
    """torch's own; any type, any device."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self._weight)

    def backward(self, gradient: Tensor) -> Tensor:
        return gradient @ self._weight


class PackedProduct:
    """oneDNN's, in its own memory layout; float32 on a CPU. Holds the weight twice more, once a direction."""

    def __init__(self, weight: Tensor) -> None:
        pack = torch.ops.mkldnn._reorder_linear_weight
        self._there = pack(weight.contiguous(), None)
        self._back = pack(weight.t().contiguous(), None)

    def forward(self, x: Tensor) -> Tensor:
        return _packed_linear(x, self._there)

    def backward(self, gradient: Tensor) -> Tensor:
        return _packed_linear(gradient, self._back)


class MovingProduct:
    """oneDNN's with a layer's weight as it stands when called, not packed; float32 on a CPU."""

    def __init__(self, module: nn.Module, *, transposed: bool) -> None:
        self._module, self._transposed = module, transposed

    def forward(self, x: Tensor) -> Tensor:
        return _packed_linear(x, self._weight())

    def backward(self, gradient: Tensor) -> Tensor:
        return gradient @ self._weight()

    def _weight(self) -> Tensor:
        weight = self._module.get_parameter("weight")
        return weight.t().contiguous() if self._transposed else weight


def _packed_linear(x: Tensor, weight: Tensor) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return out


@lru_cache(maxsize=1)
def packed_is_faster() -> bool:
    """Return whether packed products work here and beat torch's own; takes some 20 ms, once a process.

    On AMD they did on every processor tried, by 1.1 to 2.2, so there it is not left to a clock.
    """
    noise = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(512, 512, generator=noise) for _ in range(2))
    plain = TorchProduct(weight)
    try:
        packed = PackedProduct(weight)
        if not torch.allclose(packed.forward(x), plain.forward(x), rtol=1e-4, atol=1e-3):
            return False
    except (AttributeError, RuntimeError):
        return False
    if "AuthenticAMD" in _cpu_info():
        return True
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = [(_seconds(plain.forward, x), _seconds(packed.forward, x)) for _ in range(5)]
    finally:
        torch.set_num_threads(threads)
    slow, fast = (statistics.median(column) for column in zip(*times, strict=True))
    return bool(slow > FASTER * fast)


def _cpu_info() -> str:
    listed = Path("/proc/cpuinfo")
    return listed.read_text() if listed.exists() else ""


def _seconds(product: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Return CPU seconds of this thread, which a busy machine hardly changes."""
    begin = time.thread_time()
    product(x)
    return time.thread_time() - begin
