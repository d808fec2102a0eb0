"""Stands in for a network in tests: bytes both ways, the client's own copy of the algorithm, shuffled arrival, lost clients."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedloom.client.client_state import ClientStateStore
from fedloom.client.worker import run_tasks
from fedloom.core.metrics import METRICS, MetricTable
from fedloom.core.protocols import (
    Algorithm,
    ClientError,
    ClientFailure,
    ClientId,
    Delivery,
    Profile,
    Task,
    Trainer,
)
from fedloom.core.randomness import generator
from fedloom.engines.codec import MessageCodec
from fedloom.wire.format import WireError, decode_task, encode_reply
from fedloom.wire.wire_settings import WireSettings


def answer(
    algorithm: Algorithm[Any],
    trainer: Trainer,
    store: ClientStateStore,
    message: bytes,
    *,
    wire: WireSettings,
) -> bytes:
    """Answer one message: all that a network node has to call.

    Raises:
        ClientError: where the client cannot do the task.
    """
    (reply,) = run_tasks(
        algorithm, trainer, store, [decode_task(message, max_bytes=wire.max_bytes)]
    )
    if isinstance(reply, ClientFailure):
        raise ClientError(reply.reason)
    return encode_reply(reply, settings=wire)


@dataclass
class Loopback:
    """Answers messages one by one in a shuffled order and yields them in task order."""

    algorithm: Algorithm[Any]
    trainer: Trainer
    store: ClientStateStore
    clients: Mapping[ClientId, Profile]
    wire: WireSettings = WireSettings()
    metrics: MetricTable = METRICS
    """What clients may report."""
    lost: frozenset[ClientId] = frozenset()
    """Clients whose messages never arrive."""
    tamper: Callable[[bytes], bytes] = bytes
    """Applied to every reply under way."""

    def population(self) -> Mapping[ClientId, Profile]:
        """Return all clients."""
        return {client: self.clients[client] for client in sorted(self.clients)}

    def run(self, tasks: Sequence[Task]) -> Iterator[Delivery]:
        """Deliver the tasks in a shuffled order."""
        codec = MessageCodec(self.algorithm, self.wire, self.metrics)
        bodies = codec.bodies(tasks)
        arrived: dict[int, Delivery] = {}
        for i in torch.randperm(len(tasks), generator=generator(len(tasks), "arrival")).tolist():
            message = codec.message(tasks[i], bodies[id(tasks[i].download)])
            arrived[i] = self._exchange(codec, tasks[i], message)
        yield from (arrived[i] for i in range(len(tasks)))

    def _exchange(self, codec: MessageCodec, task: Task, message: bytes) -> Delivery:
        if task.client in self.lost:
            return Delivery(ClientFailure(task.client, "lost on the way"), len(message))
        client_side = copy.deepcopy(self.algorithm)
        try:
            back = answer(client_side, self.trainer, self.store, message, wire=self.wire)
        except (ClientError, WireError) as refusal:
            return Delivery(ClientFailure(task.client, str(refusal)), len(message))
        return codec.receive(task, self.tamper(back), download_bytes=len(message))
