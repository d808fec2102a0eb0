"""Clients in this process, as many side by side as the trainer likes, on one base model."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedloom.client.memory import MemoryStore
from fedloom.client.worker import run_tasks
from fedloom.core.protocols import (
    Absence,
    Algorithm,
    ClientId,
    Delivery,
    Profile,
    Refusal,
    Reply,
    Task,
    Trainer,
)
from fedloom.engines.courier import Courier
from fedloom.wire.settings import WireSettings


@dataclass(frozen=True)
class InProcess:
    """The default engine: no network, but every message goes through the wire's bytes."""

    algorithm: Algorithm[Any]
    trainer: Trainer
    store: MemoryStore
    clients: Mapping[ClientId, Profile]
    wire: WireSettings = WireSettings()

    def population(self) -> Mapping[ClientId, Profile]:
        """Return all clients."""
        return {client: self.clients[client] for client in sorted(self.clients)}

    def run(self, tasks: Sequence[Task]) -> Iterator[Delivery]:
        """Run the tasks `trainer.width` at a time."""
        courier, width = Courier(self.algorithm, self.wire), self.trainer.width
        delivered = courier.deliver(tasks)
        for at in range(0, len(tasks), width):
            chunk = delivered[at : at + width]
            read = [task for task, _ in chunk]
            answers = run_tasks(self.algorithm, self.trainer, self.store, read)
            for (task, size), answer in zip(chunk, answers, strict=True):
                yield _returned(courier, task, size, answer)


def _returned(courier: Courier, task: Task, size: int, answer: Reply | Absence) -> Delivery:
    if isinstance(answer, Absence):
        return Delivery(answer, size)
    try:
        message = courier.send(answer)
    except Refusal as refusal:
        return Delivery(Absence(task.client, str(refusal)), size)
    return courier.receive(task, message, download_bytes=size)
