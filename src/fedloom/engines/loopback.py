"""Stands in for a network in tests: bytes both ways, the client's own copy of the algorithm, shuffled arrival, lost clients."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedloom.client.memory import MemoryStore
from fedloom.client.worker import run_tasks
from fedloom.core.protocols import (
    Absence,
    Algorithm,
    ClientId,
    Delivery,
    Profile,
    Refusal,
    Task,
    Trainer,
)
from fedloom.core.seeds import generator
from fedloom.engines.courier import Courier
from fedloom.wire.format import WireError, decode_task, encode_reply
from fedloom.wire.settings import WireSettings


def answer(
    algorithm: Algorithm[Any],
    trainer: Trainer,
    store: MemoryStore,
    message: bytes,
    *,
    wire: WireSettings,
) -> bytes:
    """Answer one message: all that a network node has to call.

    Raises:
        Refusal: where the client cannot do the task.
    """
    (reply,) = run_tasks(
        algorithm, trainer, store, [decode_task(message, max_bytes=wire.max_bytes)]
    )
    if isinstance(reply, Absence):
        raise Refusal(reply.reason)
    return encode_reply(reply, settings=wire)


@dataclass
class Loopback:
    """Answers messages one by one in a shuffled order and yields them in task order."""

    algorithm: Algorithm[Any]
    trainer: Trainer
    store: MemoryStore
    clients: Mapping[ClientId, Profile]
    wire: WireSettings = WireSettings()
    lost: frozenset[ClientId] = frozenset()
    """Clients whose messages never arrive."""
    tamper: Callable[[bytes], bytes] = bytes
    """Applied to every reply under way."""

    def population(self) -> Mapping[ClientId, Profile]:
        """Return all clients."""
        return {client: self.clients[client] for client in sorted(self.clients)}

    def run(self, tasks: Sequence[Task]) -> Iterator[Delivery]:
        """Deliver the tasks in a shuffled order."""
        courier = Courier(self.algorithm, self.wire)
        bodies = courier.bodies(tasks)
        arrived: dict[int, Delivery] = {}
        for i in torch.randperm(len(tasks), generator=generator(len(tasks), "arrival")).tolist():
            message = courier.message(tasks[i], bodies[id(tasks[i].download)])
            arrived[i] = self._exchange(courier, tasks[i], message)
        yield from (arrived[i] for i in range(len(tasks)))

    def _exchange(self, courier: Courier, task: Task, message: bytes) -> Delivery:
        if task.client in self.lost:
            return Delivery(Absence(task.client, "lost on the way"), len(message))
        client_side = copy.deepcopy(self.algorithm)
        try:
            back = answer(client_side, self.trainer, self.store, message, wire=self.wire)
        except (Refusal, WireError) as refusal:
            return Delivery(Absence(task.client, str(refusal)), len(message))
        return courier.receive(task, self.tamper(back), download_bytes=len(message))
