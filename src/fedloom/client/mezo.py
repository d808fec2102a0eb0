"""Zeroth-order local training on live tensors: first-order training with guessed gradients.

Fine-Tuning Language Models with Just Forward Passes. Malladi, Gao, Nichani, Damian, Lee, Chen, Arora, NeurIPS 2023
(arXiv:2305.17333), Algorithm 1. On LoRA with fedavg it is FedMeZO (Ling et al. 2024, arXiv:2402.05926), on all weights
FedZO (Fang et al. 2022, arXiv:2201.09531). Deviations: weights are copied, not shifted back, so that no rounding adds
up; the guess goes through the optimizer of the recipe.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedloom.client.fast.kernels import FastPath
from fedloom.client.fit import fit
from fedloom.client.setup import Setup, Step
from fedloom.client.trainer import OneByOne
from fedloom.core.protocols import Done, Fit, Job
from fedloom.core.randomness import generator
from fedloom.models.adapters import scaled
from fedloom.objectives.batch import Batch
from fedloom.spaces.live import Live

EPS = 1e-3
"""How far to look, as in the paper."""


class GuessedLane:
    """The live tensors of the model as a lane of their own, whose gradient is guessed along random directions."""

    def __init__(self, setup: Setup[Live], fast: FastPath, seed: int) -> None:
        self._local, self._fast = setup.local, fast
        self.values = setup.space.values.unsqueeze(0)
        self._seed, self._step = seed, 0

    def gradients(self, steps: Sequence[Step]) -> tuple[Tensor, Tensor]:
        parts = list(self._fast.batches(steps, self._local.rows, self.values))
        stood = self.values.clone()
        eps = self._local.eps or EPS
        here = self._loss(parts) if self._local.difference == "forward" else math.nan
        gradient, losses = torch.zeros_like(stood), []
        for which in range(self._local.directions):
            z = self._direction(which)
            ahead = self._loss_at(torch.add(stood, z, alpha=eps), parts)
            if self._local.difference == "forward":
                slope, loss = (ahead - here) / eps, here
            else:
                behind = self._loss_at(torch.add(stood, z, alpha=-eps), parts)
                slope, loss = (ahead - behind) / (2 * eps), (ahead + behind) / 2
            losses.append(loss)
            gradient.add_(z, alpha=self._cut(slope) / self._local.directions)
        self.values.copy_(stood)
        self._step += 1
        return gradient, gradient.new_tensor([sum(losses) / len(losses)])

    def keep(self, lanes: Tensor) -> None:
        """Do nothing: the only lane stays until the end."""

    def _direction(self, which: int) -> Tensor:
        # Drawn on the CPU, so that devices agree.
        noise = generator(self._seed, "direction", self._step, which)
        return torch.randn(self.values.shape, generator=noise).to(self.values)

    def _cut(self, slope: float) -> float:
        most = self._local.max_slope
        if most is None or not math.isfinite(slope):
            return slope
        return max(-most, min(slope, most))

    def _loss_at(self, values: Tensor, parts: Sequence[Batch]) -> float:
        self.values.copy_(values)
        return self._loss(parts)

    def _loss(self, parts: Sequence[Batch]) -> float:
        return sum(float(self._fast.losses(part)) for part in parts)


@dataclass(frozen=True)
class Mezo(OneByOne[Live]):
    """The sequential trainer without backward passes, and without dropout."""

    def train(self, job: Job, work: Fit) -> Done:
        setup = self.setup
        setup.examples(job.client)
        setup.space.load(work.start)
        setup.space.model.eval()
        with (
            torch.no_grad(),
            self.fast.installed(),
            scaled(setup.space.model, work.gain),
        ):
            return fit([job], GuessedLane(setup, self.fast, job.seed), setup)[0]
