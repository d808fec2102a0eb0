"""An algorithm under examination, and the bench it is examined on."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedloom.algorithms.private import Private
from fedloom.client.local_settings import LocalSettings
from fedloom.core.protocols import Algorithm, Reply, Round, Task
from fedloom.core.wrapper import layers, stacked
from fedloom.engines.inprocess import InProcess
from fedloom.objectives.objective import Objective
from fedloom.objectives.sft import DEFAULT
from fedloom.rounds.loop import Run, draw, tasks
from fedloom.server.samplers import Uniform
from fedloom.testing.bench import LEARNING, Bench, Space, bench_for
from fedloom.testing.watched import BrokenLaw
from fedloom.wire.wire_settings import WireSettings


@dataclass(frozen=True)
class Subject:
    """What is examined, and how."""

    algorithm: Algorithm[Any]
    folder: Path
    """Where clients' states and checkpoints lie, each law's in a folder of its own."""
    space: Space = "lora"
    local: LocalSettings | None = None
    """How clients learn; None: SGD."""
    num_clients: int = 8
    rounds: int = 3
    wire: WireSettings = WireSettings()
    objective: Objective = DEFAULT
    """What clients learn."""

    @property
    def cohort(self) -> Uniform:
        """Return the sampler of most rounds: more than half of the clients."""
        return Uniform(5 * self.num_clients // 8)

    def bench(self, dtype: torch.dtype = torch.float32, **changes: Any) -> Bench:
        """Return a fresh bench that trains clients one by one, its local settings changed."""
        # In a batch sums are added up in another order, so that its bits follow from who is in it.
        changes = {"batched": "off", **changes}
        local = dataclasses.replace(self.local or LEARNING[self.space], **changes)
        return bench_for(
            self.algorithm,
            self.space,
            local,
            dtype=dtype,
            num_clients=self.num_clients,
            objective=self.objective,
        )

    def without_noise(self) -> Algorithm[Any]:
        """Return the algorithm without the noise of `private`, which is bound to the last bit of the sum it covers."""

        silent = [
            dataclasses.replace(layer, epsilon=None, noise_multiplier=0.0)
            if isinstance(layer, Private)
            else layer
            for layer in layers(self.algorithm)
        ]
        changed: Algorithm[Any] = stacked(silent)
        return changed


@dataclass(frozen=True)
class Played:
    """A round on the way: what was sent in it, and what came back."""

    bench: Bench
    engine: Any
    run: Run[Any]
    """Before it."""
    round: Round
    tasks: list[Task]
    replies: list[Reply]


def played(
    subject: Subject, algorithm: Algorithm[Any], *, dtype: torch.dtype = torch.float32
) -> Played:
    """Return the second round, on the way in process.

    Raises:
        BrokenLaw: where a client's reply was refused.
    """
    bench = subject.bench(dtype)
    engine = bench.engine(InProcess, algorithm, subject.folder)
    run, _ = bench.rounds(algorithm, engine, 1, sampler=subject.cohort)
    round = draw(run, engine.population(), subject.cohort)
    asked = tasks("train", round, algorithm.broadcast(run.state, round))
    replies = []
    for delivery in engine.run(asked):
        if not isinstance(delivery.answer, Reply):
            refused = delivery.answer
            raise BrokenLaw(f"the reply of {refused.client} was refused: {refused.reason}")
        replies.append(delivery.answer)
    return Played(bench, engine, run, round, asked, replies)
