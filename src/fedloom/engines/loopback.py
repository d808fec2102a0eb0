"""Stands in for a network in tests: bytes both ways, the client's own copy of the algorithm, shuffled arrival, lost clients."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from fedloom.client.worker import Meter, run_tasks
from fedloom.core.protocols import ClientFailure, ClientId, Delivery, Task
from fedloom.core.randomness import generator
from fedloom.engines.codec import MessageCodec
from fedloom.engines.inprocess import InProcess
from fedloom.wire.format import WireError, decode_task


@dataclass(frozen=True)
class Loopback(InProcess):
    """Answers messages one by one in a shuffled order and yields them in task order."""

    lost: frozenset[ClientId] = frozenset()
    """Clients whose messages never arrive."""

    def each(self, tasks: Sequence[Task]) -> Iterator[Delivery]:
        """Deliver the tasks in a shuffled order."""
        codec = MessageCodec(self.algorithm, self.wire, self.metrics)
        bodies = codec.bodies(tasks)
        arrived: dict[int, Delivery] = {}
        for i in torch.randperm(len(tasks), generator=generator(len(tasks), "arrival")).tolist():
            message = codec.message(tasks[i], bodies[id(tasks[i].download)])
            arrived[i] = self._exchange(codec, tasks[i], message)
        yield from (arrived[i] for i in range(len(tasks)))

    def _exchange(self, codec: MessageCodec, task: Task, message: bytes) -> Delivery:
        size = len(message)
        if task.client in self.lost:
            return Delivery(ClientFailure(task.client, "lost on the way"), size)
        try:
            read = decode_task(message, max_bytes=self.wire.max_bytes)
        except WireError as refusal:
            return Delivery(ClientFailure(task.client, str(refusal)), size)
        client_side = copy.deepcopy(self.algorithm)
        meter = Meter()
        (answer,) = run_tasks(
            client_side, self.trainer, self.store, [read], finetune=self.finetune, meter=meter
        )
        made = self.delivery(codec, task, answer, download_bytes=size)
        return replace(made, spent=meter.of(0))
