"""First-order local training in seed space: all weights learn on a working copy, and the way they went is projected.

Ferret: Federated Full-Parameter Tuning at Scale for Large Language Models. Shu, Hu, Ng, Low, Yu, ICML 2025
(arXiv:2409.06277), Algorithm 1. Deviations: directions are the pool's, over all tensors at once, where the paper draws
truncated normals and shares them out over blocks by the size of their update; there is no clip of a coordinate.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedloom.client.fit import fit
from fedloom.client.setup import Setup, refuse_factors
from fedloom.client.trainer import OneByOne, OneLane, training
from fedloom.client.zo_trajectory import drawn_seeds
from fedloom.core.protocols import Done, Fit, Job, Params
from fedloom.core.seed_sequences import COEFFICIENTS
from fedloom.models.adapters import scaled
from fedloom.spaces.live import Layout
from fedloom.spaces.seed_space import SeedSpace


@dataclass(frozen=True)
class Projected(OneByOne[SeedSpace]):
    """One client at a time trains all weights and keeps their projection on the directions of its seed sequence."""

    def train(self, job: Job, work: Fit) -> Done:
        refuse_factors(work)
        if work.proximal or work.gradient_offset or work.mask or work.at_start:
            raise ValueError(
                "local.order must be zeroth where tune is seeds for an algorithm that edits gradients or measures"
                " at the start, got first: its gradients are those of weights, not of seeds"
            )
        local, space = self.setup.local, self.setup.space
        num_steps = local.num_steps(len(self.setup.examples(job.client)), work.steps)
        ks = self._sequence(work)
        space.load(work.start)
        lr = local.lr_at(job.round, self.setup.num_rounds)
        working = _Working(space, space.values.clone(), work.start, ks, lr)
        setup = Setup(
            working, self.setup.federation, local, self.setup.num_rounds, self.setup.references
        )
        plain = replace(job, work=Fit(work.start, steps=num_steps))
        with (
            training(space.model, job.seed),
            self.fast.installed(),
            scaled(space.model, work.gain),
        ):
            lane = OneLane(space.seated, self.fast, local.rows)
            try:
                done = fit([plain], lane, setup)[0]
            finally:
                space.seated.drop_gradients()
        return replace(done, record={"scalars": {COEFFICIENTS: working.scalars}})

    def _sequence(self, work: Fit) -> list[int]:
        """Return the directions to project on: the work's seed sequence, else each of the pool once."""
        if work.seed_sequence is None:
            return list(range(self.setup.space.num_seeds))
        plain = replace(work, steps=None)
        sequence = drawn_seeds(plain, self.setup.space, steps=0, per_step=1, seed=0)
        return [int(k) for k in sequence.flatten()]


@dataclass
class _Working:
    """All weights as coordinates while they learn; what they come to is said in seeds."""

    space: SeedSpace
    stood: Tensor
    """(numel,) at the start."""
    start: Params
    ks: Sequence[int]
    lr: float
    scalars: Tensor = torch.empty(0, dtype=torch.float64)
    """(len(ks),) slopes that zeroth-order steps with this learning rate would have applied."""

    @property
    def values(self) -> Tensor:
        return self.space.values

    @property
    def layout(self) -> Layout:
        return self.space.seated.layout

    def vector(self, params: Params) -> Tensor:
        """Return tensors by name as one vector."""
        return self.layout.flatten(params).to(self.values)

    def absolute_vector(self, params: Params) -> Tensor:
        """Return the same: coordinates are the values themselves."""
        return self.vector(params)

    def coordinates(self, values: Tensor) -> Params:
        """Return the start plus what the way from it is along the directions."""
        slopes = -self.space.project(values - self.stood, self.ks) / self.lr
        self.scalars = slopes.float().double().cpu()
        start = self.space.read(self.start)
        moves = torch.zeros_like(start[COEFFICIENTS])
        moves.index_add_(0, torch.tensor(self.ks), -self.lr * self.scalars)
        return {**start, COEFFICIENTS: start[COEFFICIENTS] + moves}
