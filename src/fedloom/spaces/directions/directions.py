"""Directions of a whole layout: added to values, projected on, and summed back into a model."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedloom.spaces.directions import kernels
from fedloom.spaces.directions.lowrank import Drawn, Factors, draw_all
from fedloom.spaces.directions.stream import Distribution, Draw, cut, keys_of, tag_of

_FEW = 8
"""Directions whose keys are kept, as each layer asks for the same."""


@dataclass(frozen=True, eq=False)
class Directions:
    """Directions z_k of unit variance in the tensors of a layout; nothing of them is kept.

    An element follows from the seed, k, the tensor's place in the layout and the element's place in the tensor: not
    from device, type, threads, or what else is drawn. Flat vectors are laid out as `spaces.live.Layout(shapes)`.
    Sums are float32 (float64 for float64 tensors), in the order of `ks`, and rounded once to the type of the result.
    """

    shapes: Mapping[str, torch.Size]
    _: KW_ONLY
    distribution: Distribution = "gaussian"
    """gaussian | rademacher (+-1) | popcount (sixteen coins, nearly normal) | lowrank (matrices of `rank`)."""
    seed: int = 0
    """Of the noise, 64 bits: the same on every machine of a run."""
    rank: int = 1
    """Of lowrank directions."""
    quantum: float = 2.0**-30
    """`rebuild` of rademacher and popcount rounds coefficients to multiples of this power of two."""

    def __post_init__(self) -> None:
        if self.distribution not in get_args(Distribution):
            raise ValueError(
                f"distribution must be one of {', '.join(get_args(Distribution))}, got {self.distribution}"
            )
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"the noise seed must be in [0, 2**64), got {self.seed}")
        if math.frexp(self.quantum)[0] != 0.5:
            raise ValueError(f"quantum must be a power of two, got {self.quantum}")

    @property
    def numel(self) -> int:
        """Return the length of a flat vector."""
        return self._offsets[-1]

    @property
    def exact(self) -> bool:
        """Return whether `rebuild` sums integers: to the bit in any order, and from any earlier point."""
        return self.distribution in ("rademacher", "popcount")

    @property
    def unit(self) -> float:
        """Return what one quantum of a coefficient adds, of an exact distribution, for each integer of a direction."""
        return self.quantum / (2 if self.distribution == "popcount" else 1)

    def quanta(self, coefficients: Tensor) -> NDArray[np.float64]:
        """Return (K,) coefficients as `rebuild` of an exact distribution rounds them, whole numbers."""
        return np.rint(coefficients.detach().cpu().double().numpy() / self.quantum)

    def sum_type(self, quanta: NDArray[np.float64]) -> torch.dtype:
        """Return the integers that hold sums of so many quanta of each direction.

        Raises:
            ValueError: where they may leave what float64 holds exactly.
        """
        fits = kernels.largest_sum(self.distribution, quanta) < 2**31
        return torch.int32 if fits else torch.int64

    def stretches(self) -> Iterator[tuple[slice, NDArray[np.int64]]]:
        """Yield the parts of a flat vector that are worked on at a time, a million elements at most, and their pieces."""
        for first in range(0, len(self._everything), kernels.AT_ONCE):
            pieces = self._everything[first : first + kernels.AT_ONCE].copy()
            here = slice(int(pieces[0, 2]), int(pieces[-1, 2] + pieces[-1, 3]))
            pieces[:, 2] -= here.start
            yield here, pieces

    def add_quanta(
        self,
        sums: Tensor,
        pieces: NDArray[np.int64],
        ks: NDArray[np.int64],
        quanta: NDArray[np.float64],
    ) -> None:
        """Add sum_i quanta_i n_{k_i} to float64 sums of a stretch, of an exact distribution: integers, without rounding."""
        kernels.add_exact(
            self._draw(self._keys(ks), pieces), sums, sums, quanta, unit=1.0, scale=1.0
        )

    @torch.no_grad()
    def shift(
        self,
        name: str,
        values: Tensor,
        ks: Sequence[int],
        by: Sequence[float],
        *,
        out: Tensor,
        rows: Tensor | None = None,
        drawn: Drawn | None = None,
    ) -> Tensor:
        """Write values + sum_i by_i z_{k_i}, of one tensor or of some rows of it, into `out`, and return that.

        `values` and `out` have the tensor's shape, or (len(rows), ...) where rows are given; `out` is contiguous.
        `drawn` are these directions of a lowrank matrix, where `thin` has drawn them.
        """
        place, shape, keys = self._places[name], self.shapes[name], self._keys(ks)
        rows = rows if rows is None else rows.detach().cpu()
        if self._matrix(shape):
            self._factors(name).add(
                keys,
                values.reshape(len(values), -1),
                out.view(len(out), -1),
                by,
                rows=rows,
                drawn=drawn,
            )
            return out
        if rows is None:
            pieces = _whole(place, shape.numel())
        else:
            width = shape[1:].numel()
            starts = rows.numpy() * width
            pieces = cut(place, starts, starts + width, np.arange(len(rows)) * width)
        kernels.add(self._draw(keys, pieces), values.reshape(-1), out.view(-1), by)
        return out

    @torch.no_grad()
    def advance(
        self,
        name: str,
        values: Tensor,
        ks: Sequence[int],
        by: Sequence[float],
        *,
        moves: int,
        out: Tensor,
    ) -> Tensor:
        """Add sum_{i < moves} by_i z_{k_i} to one tensor's values, and return them with the rest added, in `out`.

        `values` and `out` have the tensor's shape and are contiguous.
        """
        shape = self.shapes[name]
        if self._matrix(shape):
            self.shift(name, values, ks[:moves], by[:moves], out=values)
            return self.shift(name, values, ks[moves:], by[moves:], out=out)
        draw = self._draw(self._keys(ks), _whole(self._places[name], shape.numel()))
        kernels.add(draw, values.view(-1), out.view(-1), by, moves=moves)
        return out

    @torch.no_grad()
    def rebuild(
        self, base: Tensor, coefficients: Tensor, *, out: Tensor, scale: Tensor | float = 1.0
    ) -> Tensor:
        """Write scale * base + sum_k c_k z_k into `out` (numel,) and return that; coefficients (K,) float64.

        `base` (numel,) may be `out` and of any type. Under an exact distribution the sum is one of integers, without rounding.
        """
        weights = coefficients.detach().cpu().double().numpy()
        times = float(scale)
        if not self.exact:
            used = np.flatnonzero(weights)
            self._add(base, out, self._keys(used), weights[used].tolist(), scale=times)
            return out
        quanta = self.quanta(coefficients)
        used = np.flatnonzero(quanta)
        if not len(used):
            out.copy_(base.double() * times if times != 1 else base)
            return out
        kernels.add_exact(
            self._draw(self._keys(used), self._everything),
            base,
            out,
            quanta[used],
            unit=self.unit,
            scale=times,
        )
        return out

    @torch.no_grad()
    def dot(self, values: Tensor, ks: Sequence[int]) -> Tensor:
        """Return z_k . values of (numel,) values, (len(ks),) float64."""
        keys = self._keys(ks)
        if self.distribution != "lowrank":
            return kernels.project(self._draw(keys, self._everything), values)
        total = torch.zeros(len(keys), dtype=torch.float64)
        for name, shape, here in self._parts():
            if self._matrix(shape):
                matrix = values[here].view(shape[0], -1)
                total += self._factors(name).project(keys, matrix)
            else:
                pieces = _whole(self._places[name], shape.numel())
                total += kernels.project(self._draw(keys, pieces), values[here])
        return total

    def z(self, name: str, k: int) -> Tensor:
        """Return one direction of one tensor, float32."""
        zeros = torch.zeros(self.shapes[name])
        return self.shift(name, zeros, [k], [1.0], out=zeros)

    def factors(
        self, name: str, ks: Sequence[int], *, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return U (K, m, r) and V (K, n, r), float32 on the CPU, of a lowrank matrix: z_k = U_k V_k^T."""
        rows = torch.arange(self.shapes[name][0]) if rows is None else rows.detach().cpu()
        u, v = self._factors(name).draw(self._keys(ks), rows=rows, device=torch.device("cpu"))
        return u.mT, v.mT

    def thin(self, ks: Sequence[int]) -> dict[str, Drawn]:
        """Return U (K, r, m) and V (K, r, n), float32 on the CPU, of every matrix of a lowrank distribution."""
        names = [name for name, shape in self.shapes.items() if self._matrix(shape)]
        if not names:
            return {}
        matrices = [self._factors(name) for name in names]
        drawn = draw_all(matrices, self._keys(ks), device=torch.device("cpu"))
        return dict(zip(names, drawn, strict=True))

    def _add(
        self,
        base: Tensor,
        out: Tensor,
        keys: NDArray[np.uint32],
        by: Sequence[float],
        *,
        scale: float,
    ) -> None:
        if self.distribution != "lowrank":
            kernels.add(self._draw(keys, self._everything), base, out, by, scale=scale)
            return
        for name, shape, here in self._parts():
            if self._matrix(shape):
                given, result = (t[here].view(shape[0], -1) for t in (base, out))
                self._factors(name).add(keys, given, result, by, scale=scale)
            else:
                pieces = _whole(self._places[name], shape.numel())
                kernels.add(self._draw(keys, pieces), base[here], out[here], by, scale=scale)

    def _matrix(self, shape: torch.Size) -> bool:
        return self.distribution == "lowrank" and len(shape) > 1

    def _factors(self, name: str) -> Factors:
        shape = self.shapes[name]
        return Factors(self._places[name], (shape[0], shape[1:].numel()), self.rank)

    def _draw(self, keys: NDArray[np.uint32], pieces: NDArray[np.int64]) -> Draw:
        distribution: Distribution = (
            "gaussian" if self.distribution == "lowrank" else self.distribution
        )
        return Draw(distribution, tag_of(self.distribution), keys, pieces)

    def _keys(self, ks: Sequence[int] | NDArray[np.int64]) -> NDArray[np.uint32]:
        return keys_of(self.seed, ks) if len(ks) > _FEW else _few_keys(self.seed, tuple(ks))

    def _parts(self) -> list[tuple[str, torch.Size, slice]]:
        offsets = self._offsets
        return [
            (name, shape, slice(offsets[i], offsets[i + 1]))
            for i, (name, shape) in enumerate(self.shapes.items())
        ]

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.shapes)}

    @cached_property
    def _offsets(self) -> list[int]:
        return [0, *accumulate(shape.numel() for shape in self.shapes.values())]

    @cached_property
    def _everything(self) -> NDArray[np.int64]:
        sizes = np.diff(self._offsets)
        return cut(np.arange(len(sizes)), 0, sizes, self._offsets[:-1])


@lru_cache(maxsize=64)
def _few_keys(seed: int, ks: tuple[int, ...]) -> NDArray[np.uint32]:
    return keys_of(seed, ks)


@lru_cache(maxsize=4096)
def _whole(place: int, numel: int) -> NDArray[np.int64]:
    return cut(place, 0, numel, 0)
