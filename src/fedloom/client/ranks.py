"""One client trained by several processes: every process does the same work, each on its own part of every batch.

The processes are those of torch.distributed's default group. What one of them computes differs from the others by its rows of a
batch alone (and, where the weights are split, by its rows of them), so that they take the same steps: losses are shares of
the mean over the whole step's target tokens, whoever has how many of them, and are added up.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fedloom.client.fast.kernels import FastPath
from fedloom.client.fit import fit
from fedloom.client.optimizer import joint_norms
from fedloom.client.setup import Step
from fedloom.client.trainer import OneByOne, OneLane, training
from fedloom.core.protocols import Done, Fit, Job
from fedloom.core.randomness import derive
from fedloom.models.adapters import scaled
from fedloom.objectives.batch import Batch
from fedloom.spaces.live import Live
from fedloom.spaces.sharded import Sharded


class ReplicaLane(OneLane):
    """The live tensors of a model that every process has whole."""

    def gradients(self, steps: Sequence[Step]) -> tuple[Tensor, Tensor]:
        self._gradient.zero_()
        total = torch.zeros_like(self.values[:, 0])
        for batch, share in own_batches(steps[0], self._batch_size, self._fast, self.values):
            losses = self._fast.losses(batch) * share
            torch.autograd.backward(losses.sum())
            total += losses.detach()
        dist.all_reduce(self._gradient)
        dist.all_reduce(total)
        return self._gradient, total

    def norms(self, gradients: Tensor) -> Tensor:
        """Return the joint norm (lanes,)."""
        return joint_norms(gradients)


class ShardLane:
    """This process's rows of the live tensors of a model that is split."""

    def __init__(self, space: Sharded, fast: FastPath, batch_size: int) -> None:
        self.values = space.values.unsqueeze(0)
        self._space, self._fast, self._batch_size = space, fast, batch_size

    def gradients(self, steps: Sequence[Step]) -> tuple[Tensor, Tensor]:
        self._space.seat()
        total = torch.zeros_like(self.values[:, 0])
        for batch, share in own_batches(steps[0], self._batch_size, self._fast, self.values):
            losses = self._fast.losses(batch) * share
            # Of the processes' gradients FSDP takes the mean.
            torch.autograd.backward(losses.sum() * dist.get_world_size())
            total += losses.detach()
        dist.all_reduce(total)
        return self._space.gradient().unsqueeze(0), total

    def norms(self, gradients: Tensor) -> Tensor:
        """Return the joint norm (lanes,) over the rows of all processes."""
        squares = joint_norms(gradients).square()
        dist.all_reduce(squares)
        return squares.sqrt()

    def keep(self, lanes: Tensor) -> None:
        """Do nothing: the only lane stays until the end."""


def own_batches(
    step: Step, size: int, fast: FastPath, like: Tensor
) -> Iterator[tuple[Batch, float]]:
    """Yield this process's part of each batch of an optimizer step, every so many'th row, and what its loss counts.

    It counts 0 where a batch has too few rows for all: with split weights, a layer computes in all processes or in none.
    """
    counts, rank, world = [fast.objective.count(step)], dist.get_rank(), dist.get_world_size()
    for at in range(0, len(step), size):
        rows = step[at : at + size]
        mine = rows[rank::world]
        yield (
            fast.objective.batch([mine or rows[:1]], counts, like, pack=fast.packs),
            1.0 if mine else 0.0,
        )


@dataclass(frozen=True)
class RankTrainer(OneByOne[Live | Sharded]):
    """What trains in each of the processes."""

    def train(self, job: Job, work: Fit) -> Done:
        setup, space = self.setup, self.setup.space
        setup.examples(job.client)
        space.load(work.start)
        # Rows of their own, so that dropout has to draw numbers of its own.
        seed = derive(job.seed, "rank", dist.get_rank()) if dist.get_rank() else job.seed
        with training(space.model, seed), self.fast.installed(), scaled(space.model, work.gain):
            lane = self._lane()
            try:
                return fit([job], lane, setup, norms=lane.norms)[0]
            finally:
                space.drop_gradients()

    def _lane(self) -> ReplicaLane | ShardLane:
        space, size = self.setup.space, self.setup.local.rows
        if isinstance(space, Sharded):
            return ShardLane(space, self.fast, size)
        return ReplicaLane(space, self.fast, size)
