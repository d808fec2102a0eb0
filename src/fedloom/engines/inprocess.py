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
from fedloom.engines.sums import RUN, Played, sums_of, words_of
from fedloom.secure.fixed_point import Words
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
    sums: Played | None = None
    """How uploads are added up so that the server sees none; None: it receives each."""

    def population(self) -> Mapping[ClientId, Profile]:
        """Return all clients."""
        return {client: self.clients[client] for client in sorted(self.clients)}

    def run(self, tasks: Sequence[Task]) -> Iterator[Delivery]:
        """Run the tasks, and add their uploads up where the recipe says so."""
        if self.sums is None or not tasks or tasks[0].kind != "train":
            return self.each(tasks)
        return self._summed(self.sums, tasks)

    def _summed(self, sums: Played, tasks: Sequence[Task]) -> Iterator[Delivery]:
        codec = MessageCodec(self.algorithm, self.wire, self.metrics)
        bodies = codec.bodies(tasks)
        # What a client reads, as the wire may round it.
        read = dict(
            zip((t.client for t in tasks), (t for t, _ in codec.deliver(tasks)), strict=True)
        )
        every = sums_of(tasks, bodies, codec, sums.settings, RUN)
        heaviest = {task.client: one.heaviest for one in every for task in one.tasks}
        each, words = list[Delivery](), dict[ClientId, Words | str]()
        for delivery in self.each(tasks):
            answer = delivery.answer
            client = answer.client
            words[client] = (
                answer.reason
                if isinstance(answer, ClientFailure)
                else words_of(codec, read[client], answer, sums.settings, heaviest[client])
            )
            # No upload is kept.
            each.append(Delivery(ClientFailure(client, ""), delivery.download_bytes))
        for one in every:
            mine = {task.client for task in one.tasks}
            own = [delivery for delivery in each if delivery.answer.client in mine]
            yield from sums.deliveries(own, one, words)

    def each(self, tasks: Sequence[Task]) -> Iterator[Delivery]:
        """Run the tasks `trainer.width` at a time; yield the delivery of each."""
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
