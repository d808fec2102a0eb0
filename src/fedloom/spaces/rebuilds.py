"""Weights rebuilt from coefficients, on disk for all who ask for the same: clients, evaluation, the last report.

Where the directions are integers, so are their sums, exactly: of these a new point takes over what another has, and
adds the coefficients in which the two differ. The bits are those of a sum from nothing, whatever came before. Sums of
real directions depend on their order, so those are always taken from nothing.
"""

import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedloom.core.params import equal
from fedloom.core.protocols import Params
from fedloom.core.seed_sequences import COEFFICIENTS
from fedloom.spaces.directions.directions import Directions
from fedloom.spaces.spilled import SpilledVector

AT_MOST = 8
"""Points on disk at a time; fewer where they would take more than a quarter of what is free there."""


@dataclass
class Rebuilds(ABC):
    """The points asked for last; the one not asked for longest gives way."""

    numel: int
    points: list[tuple[Params, SpilledVector]] = field(default_factory=list, init=False)
    """The latest last."""

    def read(self, params: Params, out: Tensor) -> Tensor:
        """Write the weights at params into `out`, (numel,), and return that."""
        for i, (known, _) in enumerate(self.points):
            if self.same(known, params):
                self.points.append(self.points.pop(i))
                return self.again(self.points[-1][1], params, out)
        return self.first(params, out)

    def add(self, params: Params, dtype: torch.dtype) -> SpilledVector:
        """Return the place of a new point, whose values are anything."""
        size = max(1, self.numel * dtype.itemsize)
        room = shutil.disk_usage(tempfile.gettempdir()).free // 4 // size + len(self.points)
        while len(self.points) >= max(1, min(AT_MOST, room)):
            _, store = self.points.pop(0)
            if store.dtype == dtype:
                break
        else:
            store = SpilledVector(self.numel, dtype)
        self.points.append((params, store))
        return store

    @abstractmethod
    def same(self, known: Params, params: Params) -> bool:
        """Return whether what is on disk of one point serves another."""

    @abstractmethod
    def again(self, store: SpilledVector, params: Params, out: Tensor) -> Tensor:
        """Write the weights from what is on disk into `out`, and return that."""

    @abstractmethod
    def first(self, params: Params, out: Tensor) -> Tensor:
        """Rebuild into `out`, see that it is on disk, and return it."""


@dataclass
class WeightRebuilds(Rebuilds):
    """On disk are the weights."""

    dtype: torch.dtype
    rebuild: Callable[[Params, Tensor], Tensor]

    def same(self, known: Params, params: Params) -> bool:
        return equal(known, params)

    def again(self, store: SpilledVector, params: Params, out: Tensor) -> Tensor:
        return store.read(out)

    def first(self, params: Params, out: Tensor) -> Tensor:
        wide = out if out.dtype == self.dtype else torch.empty_like(out, dtype=self.dtype)
        self.rebuild(params, wide)
        self.add(params, self.dtype).write(wide)
        return out if wide is out else out.copy_(wide)


@dataclass
class SumRebuilds(Rebuilds):
    """On disk are the sums of integers, from which weights follow in one pass."""

    directions: Directions
    origin: SpilledVector
    scale: Callable[[Params], float]

    def same(self, known: Params, params: Params) -> bool:
        return bool((self._quanta(known) == self._quanta(params)).all())

    def again(self, store: SpilledVector, params: Params, out: Tensor) -> Tensor:
        for here, _ in self.directions.stretches():
            self._settle(store.get(here).double(), here, params, out)
        return out

    def first(self, params: Params, out: Tensor) -> Tensor:
        quanta = self._quanta(params)
        before, change = self._nearest(quanta)
        ks, width = np.flatnonzero(change), self.directions.sum_type(quanta)
        # Looked for first: the new place may be that of the point it starts from, read stretch by stretch before.
        store = self.add(params, width)
        for here, pieces in self.directions.stretches():
            size = here.stop - here.start
            sums = (
                torch.zeros(size, dtype=torch.float64)
                if before is None
                else before.get(here).double()
            )
            if len(ks):
                self.directions.add_quanta(sums, pieces, ks, change[ks])
            store.put(here, sums)
            self._settle(sums, here, params, out)
        return out

    def _quanta(self, params: Params) -> NDArray[np.float64]:
        return self.directions.quanta(params[COEFFICIENTS])

    def _nearest(
        self, quanta: NDArray[np.float64]
    ) -> tuple[SpilledVector | None, NDArray[np.float64]]:
        """Return the sums from which the fewest directions are missing, None for nothing, and the difference."""
        nearest: tuple[SpilledVector | None, NDArray[np.float64]] = None, quanta
        for params, store in self.points:
            change = quanta - self._quanta(params)
            if np.count_nonzero(change) < np.count_nonzero(nearest[1]):
                nearest = store, change
        return nearest

    def _settle(self, sums: Tensor, here: slice, params: Params, out: Tensor) -> None:
        """Write scale * base + unit * sums: rounded once to the type of sums of directions, then to that of `out`."""
        wide, scale = sums.mul_(self.directions.unit), self.scale(params)
        base = self.origin.get(here).double()
        wide.add_(base.mul_(scale) if scale != 1 else base)
        kind = torch.float64 if out.dtype == torch.float64 else torch.float32
        out[here].copy_(wide.to(kind))
