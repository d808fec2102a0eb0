"""Zeroth-order local training in seed space: steps along directions of the pool, no backward pass.

Fine-Tuning Language Models with Just Forward Passes. Malladi, Gao, Nichani, Damian, Lee, Chen, Arora, NeurIPS 2023
(arXiv:2305.17333), Algorithm 1, with the directions of FedKSeed (arXiv:2312.06353). Deviations: weights are looked at
shifted and never shifted themselves, so that nothing is left of a look; a step with a loss that is not finite is left
out whole; weight decay shrinks all weights, those of norms and biases too, and is a coordinate of its own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from fedloom.client.perturbed_lowrank import PerturbedLowRank
from fedloom.client.perturbed_weights import Ground, PerturbedWeight, perturbed_weights_of
from fedloom.client.setup import Step, refuse_factors
from fedloom.client.trainer import OneByOne
from fedloom.client.zo_trajectory import Trajectory, drawn_seeds
from fedloom.core.protocols import ClientError, Done, Fit, Job
from fedloom.models.adapters import scaled
from fedloom.objectives.batch import Batch
from fedloom.spaces.seed_space import SeedSpace

EPS = 5e-4
"""How far to look, as in FedKSeed."""


@dataclass(frozen=True)
class ZerothOrder(OneByOne[SeedSpace]):
    """One client at a time walks in seed space."""

    @cached_property
    def leaves(self) -> Sequence[PerturbedWeight]:
        """Return the layers that tensors are read through; looked for once."""
        return perturbed_weights_of(self.setup.space)

    def train(self, job: Job, work: Fit) -> Done:
        refuse_factors(work)
        local, space = self.setup.local, self.setup.space
        examples = self.setup.examples(job.client)
        num_steps = local.num_steps(len(examples), work.steps)
        sequence = drawn_seeds(
            work, space, steps=num_steps, per_step=local.directions, seed=job.seed
        )
        course = Trajectory(work, space, local, local.lr_at(job.round, self.setup.num_rounds))
        losses: list[float] = []
        num_tokens = 0
        kind = PerturbedLowRank if space.directions.distribution == "lowrank" else Ground
        space.model.eval()
        with torch.no_grad(), self.fast.installed():
            stream = self.setup.steps(job, work.start, len(sequence))
        with (
            torch.no_grad(),
            self.fast.installed(),
            scaled(space.model, work.gain),
            kind(space, self.leaves).at(work.start) as ground,
        ):
            for ks in sequence.tolist():
                step = next(stream)
                num_tokens += sum(example.num_targets for example in step)
                slopes, loss = self._slopes(ground, step, ks)
                applied = course.edited(ks, slopes) if math.isfinite(loss) else None
                if applied is None:
                    course.skip(len(ks))
                    continue
                losses.append(loss)
                by, shrink = course.step(ks, applied)
                if not work.at_start:
                    ground.move_(ks, by, shrink=shrink)
        if len(sequence) and not losses:
            raise ClientError(f"{job.client}: no step had a finite loss")
        metrics = {
            "num_tokens": float(num_tokens),
            "skipped_steps": float(len(sequence) - len(losses)),
        }
        if losses:
            metrics["loss"] = math.fsum(losses) / len(losses)
        lr_sum = None if local.weight_decay else course.lr * len(losses)
        return Done(course.end(), len(examples), len(sequence), lr_sum, course.record(), metrics)

    def _slopes(self, ground: Ground, step: Step, ks: Sequence[int]) -> tuple[list[float], float]:
        """Return the slope along each direction, and the loss; not finite where nothing is asked for."""
        local = self.setup.local
        eps = local.eps or EPS
        if not self.fast.objective.count(step):
            return [], math.nan
        values = self.setup.space.values
        like = values.new_empty(0, dtype=torch.promote_types(values.dtype, torch.float32))
        parts = list(self.fast.batches([step], local.rows, like))
        here = math.nan
        if local.difference == "forward":
            here = self._loss(parts)
        slopes, losses = [], []
        for k in ks:
            with ground.looking([k], [eps]):
                ahead = self._loss(parts)
            if local.difference == "forward":
                slopes.append((ahead - here) / eps)
                continue
            with ground.looking([k], [-eps]):
                behind = self._loss(parts)
            slopes.append((ahead - behind) / (2 * eps))
            losses.append((ahead + behind) / 2)
        return slopes, sum(losses) / len(losses) if losses else here

    def _loss(self, parts: Sequence[Batch]) -> float:
        return sum(float(self.fast.losses(part)) for part in parts)
