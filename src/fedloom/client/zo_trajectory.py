"""The arithmetic of zeroth-order steps along a seed sequence: how slopes become steps, and steps coefficients."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedloom.client.local_settings import LocalSettings
from fedloom.core.protocols import Fit, Params, Payload
from fedloom.core.seed_sequences import COEFFICIENTS, uniform_seeds
from fedloom.spaces.seed_space import BASE, SeedSpace


def drawn_seeds(fit: Fit, space: SeedSpace, *, steps: int, per_step: int, seed: int) -> Tensor:
    """Return (steps, per_step) int64 coordinates: as the work says, else drawn uniformly from the pool.

    Raises:
        ValueError: where the work's seed sequence is not one of this pool, or does not fit the settings.
    """
    if fit.seed_sequence is None:
        return uniform_seeds(seed, steps * per_step, space.num_seeds).view(steps, per_step)
    if fit.seed_sequence.keys() != {COEFFICIENTS}:
        raise ValueError(
            f"a seed sequence has {COEFFICIENTS} only, got {sorted(fit.seed_sequence)}"
        )
    sequence = fit.seed_sequence[COEFFICIENTS]
    if fit.steps is not None and len(sequence) != fit.steps * per_step:
        raise ValueError(
            f"a seed sequence of {len(sequence)} directions cannot take {fit.steps} steps"
        )
    if len(sequence) % per_step:
        raise ValueError(
            f"local.directions must divide the length of a seed sequence, {len(sequence)}, got {per_step}"
        )
    if len(sequence) and not 0 <= int(sequence.min()) <= int(sequence.max()) < space.num_seeds:
        raise ValueError(
            f"a seed sequence must stay below tune.seeds.num_seeds ({space.num_seeds})"
        )
    return sequence.view(-1, per_step)


@dataclass
class Trajectory:
    """Where a client is on its seed sequence: at shrink * start + moves."""

    fit: Fit
    space: SeedSpace
    local: LocalSettings
    lr: float
    shrink: float = 1.0
    """What weight decay has left of the start."""
    scalars: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._start = self.space.read(self.fit.start)
        self._moves = torch.zeros_like(self._start[COEFFICIENTS])
        pull, read = self.fit.proximal, self.space.read
        self._center = read(pull.center)[COEFFICIENTS] if pull else None
        self._offset = self._of(self.fit.gradient_offset)
        self._mask = self._of(self.fit.mask)
        self._decay = 1 - self.lr * self.local.weight_decay
        if self._mask is not None and self.local.weight_decay:
            raise ValueError(
                "local.weight_decay must be 0 where a mask freezes seeds: it shrinks all weights alike,"
                f" got {self.local.weight_decay}"
            )

    def _of(self, params: Params | None) -> Tensor | None:
        return None if params is None else self.space.read(params)[COEFFICIENTS]

    def edited(self, ks: Sequence[int], slopes: Sequence[float]) -> list[float] | None:
        """Return the slopes a step applies, float32 values, or nothing where one is not finite.

        As gradients are: pulled, offset, masked, cut; each acts on the coordinate that was drawn.
        """
        if not all(map(math.isfinite, slopes)):
            return None
        edited = []
        for k, slope in zip(ks, slopes, strict=True):
            g = slope
            if self.fit.proximal and self._center is not None:
                g += self.fit.proximal.strength * (self._at(k) - float(self._center[k]))
            if self._offset is not None:
                g += float(self._offset[k])
            if self._mask is not None:
                g *= float(self._mask[k])
            if self.local.max_slope is not None:
                g = max(-self.local.max_slope, min(g, self.local.max_slope))
            edited.append(float(torch.tensor(g / len(ks), dtype=torch.float64).float()))
        return edited if all(map(math.isfinite, edited)) else None

    def _at(self, k: int) -> float:
        here = float(self._start[COEFFICIENTS][k])
        return here if self.fit.at_start else self.shrink * here + float(self._moves[k])

    def skip(self, count: int) -> None:
        """Stay: a loss was not finite, or nothing was asked for."""
        self.scalars += [0.0] * count

    def step(self, ks: Sequence[int], slopes: Sequence[float]) -> tuple[list[float], float]:
        """Take a step; return how far along each direction, and what it leaves of the weights."""
        self.scalars += slopes
        by = [-self.lr * g for g in slopes]
        if self.fit.at_start:
            self.shrink += self._decay - 1
        else:
            self.shrink *= self._decay
            if self._decay != 1:
                self._moves.mul_(self._decay)
        for k, far in zip(ks, by, strict=True):
            self._moves[k] += far
        return by, self._decay

    def end(self) -> Params:
        """Return where it is, float64."""
        c = self._start[COEFFICIENTS]
        end = {COEFFICIENTS: (c if self.shrink == 1 else c * self.shrink) + self._moves}
        if BASE in self._start:
            end[BASE] = (1 + self._start[BASE]) * self.shrink - 1
        return end

    def record(self) -> Payload:
        """Return the slopes of all steps, as Done has them."""
        return {"scalars": {COEFFICIENTS: torch.tensor(self.scalars, dtype=torch.float64)}}
