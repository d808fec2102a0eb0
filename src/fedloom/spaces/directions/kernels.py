"""Which kernels a tensor is worked on with: numba's on a CPU, numpy's where numba is absent, Triton's on CUDA.

A CPU kernel takes contiguous float32 and float64; other tensors pass through it a million elements at a time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedloom.spaces.directions import reference
from fedloom.spaces.directions.stream import Distribution, Draw

AT_ONCE = 256
"""Pieces that are converted together: a million elements at most."""


class _Kernels(Protocol):
    """What `reference` and `compiled` offer, on arrays."""

    def add(self, draw: Draw, base: Any, out: Any, by: Any, scale: float, moves: int = 0) -> None:
        """Write scale * base + sum_k by_k z_k where the pieces lie; the first `moves` go to base itself before."""
        ...

    def add_exact(
        self, draw: Draw, base: Any, out: Any, quanta: Any, unit: float, scale: float
    ) -> None:
        """Write scale * base + unit * sum_k q_k n_k, the sum in integers; z = n, for popcount n / 2."""
        ...

    def fill(self, draw: Draw, out: Any) -> None:
        """Write z of every direction, (K, n) float32."""
        ...

    def project(self, draw: Draw, values: Any) -> NDArray[np.float64]:
        """Return (K,) z_k . values."""
        ...


@lru_cache(maxsize=1)
def on_cpu() -> _Kernels:
    """Return the fastest kernels this installation has."""
    if find_spec("numba") is None:
        return reference
    from fedloom.spaces.directions import compiled

    return compiled


def add(
    draw: Draw,
    base: Tensor,
    out: Tensor,
    by: Sequence[float],
    *,
    scale: float = 1.0,
    moves: int = 0,
) -> None:
    """Write scale * base + sum_k by_k z_k into `out`; flat tensors, which may be one and the same.

    The first `moves` directions are added to base itself before: in the same pass over memory on a CPU, where both are
    of the type of the sums, else in one of its own, with the same bits.
    """
    kind = _kind_of(out)
    if moves and (base.dtype != kind or out.dtype != kind or base.device.type != "cpu"):
        first, rest = (replace(draw, keys=keys) for keys in (draw.keys[:moves], draw.keys[moves:]))
        add(first, base, base, by[:moves])
        add(rest, base, out, by[moves:], scale=scale)
        return
    factors = np.asarray(by, np.float64 if kind == torch.float64 else np.float32)
    if _on_cuda(out):
        from fedloom.spaces.directions import cuda

        cuda.add(draw, base.to(out.device), out, factors, scale)
        return
    for some, given, result in _stretches(draw, base, out, kind):
        on_cpu().add(some, given, result, factors, scale, moves)


def largest_sum(distribution: Distribution, quanta: NDArray[np.float64]) -> int:
    """Return what a sum over directions of integers, each times its quanta, may come to.

    Raises:
        ValueError: where it may leave what float64 holds exactly.
    """
    most = int(np.abs(quanta).sum()) * (8 if distribution == "popcount" else 1)
    if most >= 2**53:
        raise ValueError(
            f"seed coefficients must stay below 2**53 quanta in sum, got 2**{most.bit_length()}"
        )
    return most


def add_exact(
    draw: Draw, base: Tensor, out: Tensor, quanta: NDArray[np.float64], *, unit: float, scale: float
) -> None:
    """Write scale * base + unit * sum_k q_k n_k into `out`, the sum in integers.

    Raises:
        ValueError: where the sum may leave what float64 holds exactly.
    """
    most = largest_sum(draw.distribution, quanta)
    # A sum that fits 32 bits has the same bits in 64, at half the speed.
    whole = quanta.astype(np.int32 if most < 2**31 else np.int64)
    if _on_cuda(out):
        from fedloom.spaces.directions import cuda

        cuda.add_exact(draw, base.to(out.device), out, whole, unit, scale)
        return
    for some, given, result in _stretches(draw, base, out, _kind_of(out)):
        on_cpu().add_exact(some, given, result, whole, unit, scale)


def fill(draw: Draw, out: Tensor) -> None:
    """Write z of every direction into (K, n) float32."""
    if _on_cuda(out):
        from fedloom.spaces.directions import cuda

        cuda.fill(draw, out)
        return
    drawn = out if out.device.type == "cpu" else torch.empty_like(out, device="cpu")
    on_cpu().fill(draw, drawn.numpy())
    if drawn is not out:
        out.copy_(drawn)


def project(draw: Draw, values: Tensor) -> Tensor:
    """Return z_k . values, (K,) float64 on the CPU."""
    if _on_cuda(values):
        from fedloom.spaces.directions import cuda

        return cuda.project(draw, values)
    moved = values.detach().to("cpu", _kind_of(values)).contiguous()
    return torch.from_numpy(on_cpu().project(draw, moved.numpy()))


def _kind_of(out: Tensor) -> torch.dtype:
    """Return the type of sums."""
    return torch.float64 if out.dtype == torch.float64 else torch.float32


def _on_cuda(tensor: Tensor) -> bool:
    return tensor.is_cuda and find_spec("triton") is not None


def _stretches(
    draw: Draw, base: Tensor, out: Tensor, kind: torch.dtype
) -> Iterator[tuple[Draw, NDArray[Any], NDArray[Any]]]:
    """Yield a draw, what it is added to and where the result goes, as arrays; write back what was converted."""
    base, out = base.detach(), out.detach()
    if not len(draw.pieces):
        return
    if base.dtype == out.dtype == kind and base.device.type == out.device.type == "cpu":
        yield draw, base.numpy(), out.numpy()
        return
    for first in range(0, len(draw.pieces), AT_ONCE):
        some = draw.pieces[first : first + AT_ONCE]
        here = slice(int(some[0, 2]), int(some[-1, 2] + some[-1, 3]))
        result = torch.empty(here.stop - here.start, dtype=kind)
        given = base[here].to("cpu", kind)
        yield draw.part(first, first + AT_ONCE), given.numpy(), result.numpy()
        out[here].copy_(result)
