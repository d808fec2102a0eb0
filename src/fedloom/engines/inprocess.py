"""Clients in this process, as many side by side as the trainer likes, on one base model."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedloom.client.client_state import ClientStateStore
from fedloom.client.worker import Meter, run_tasks
from fedloom.core.finetune import NO_FINETUNE, FineTune
from fedloom.core.metrics import METRICS, MetricTable
from fedloom.core.protocols import (
    Algorithm,
    ClientError,
    ClientFailure,
    ClientId,
    Delivery,
    Profile,
    Reply,
    Task,
    Trainer,
)
from fedloom.engines.codec import MessageCodec
from fedloom.wire.wire_settings import WireSettings


@dataclass(frozen=True)
class InProcess:
    """The default engine: no network, but every message goes through the wire's bytes."""

    algorithm: Algorithm[Any]
    trainer: Trainer
    store: ClientStateStore
    clients: Mapping[ClientId, Profile]
    wire: WireSettings = WireSettings()
    metrics: MetricTable = METRICS
    """What clients may report."""
    finetune: FineTune = NO_FINETUNE
    """What clients do with a model before they measure it a second time."""

    def population(self) -> Mapping[ClientId, Profile]:
        """Return all clients."""
        return {client: self.clients[client] for client in sorted(self.clients)}

    def run(self, tasks: Sequence[Task]) -> Iterator[Delivery]:
        """Run the tasks `trainer.width` at a time."""
        codec, width = MessageCodec(self.algorithm, self.wire, self.metrics), self.trainer.width
        delivered = codec.deliver(tasks)
        for at in range(0, len(tasks), width):
            chunk = delivered[at : at + width]
            read = [task for task, _ in chunk]
            meter = Meter()
            answers = run_tasks(
                self.algorithm,
                self.trainer,
                self.store,
                read,
                finetune=self.finetune,
                meter=meter,
            )
            for i, ((task, size), answer) in enumerate(zip(chunk, answers, strict=True)):
                made = self.delivery(codec, task, answer, download_bytes=size)
                yield replace(made, spent=meter.of(i))

    def delivery(
        self,
        codec: MessageCodec,
        task: Task,
        answer: Reply | ClientFailure,
        *,
        download_bytes: int,
    ) -> Delivery:
        """Return a client's answer as it arrives at the server."""
        if isinstance(answer, ClientFailure):
            return Delivery(answer, download_bytes)
        try:
            message = codec.send(answer)
        except ClientError as refusal:
            return Delivery(ClientFailure(task.client, str(refusal)), download_bytes)
        return codec.receive(task, message, download_bytes=download_bytes)
