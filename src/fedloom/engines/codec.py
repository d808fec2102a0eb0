"""Between server and clients: every message is encoded, counted, decoded and checked, on every engine alike."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fedloom.core.metrics import METRICS, MetricTable
from fedloom.core.protocols import (
    Algorithm,
    ClientError,
    ClientFailure,
    Delivery,
    Payload,
    Reply,
    Task,
)
from fedloom.core.rehearsal import rehearse
from fedloom.core.schema import Schema, check_finite, schema
from fedloom.engines.introductions import plain
from fedloom.wire.body import Piece, decode_body, encode_pieces
from fedloom.wire.format import (
    WireError,
    decode_reply,
    encode_reply,
    encode_task,
    most_reply_bytes,
    task_head,
)
from fedloom.wire.wire_settings import WireSettings


@dataclass
class MessageCodec:
    """Encodes a payload once however many clients share it, and refuses replies that are not what was asked for."""

    algorithm: Algorithm[Any]
    wire: WireSettings
    metrics: MetricTable = METRICS
    """What clients may report."""
    _schemas: dict[Any, Schema] = field(default_factory=dict)

    def bodies(
        self, tasks: Sequence[Task], *, joined: Callable[[Sequence[Piece]], Piece] = b"".join
    ) -> dict[int, Piece]:
        """Return the encoded payload of every distinct download, by its id.

        Args:
            tasks: What is to be sent.
            joined: Puts the pieces of one together, in memory or elsewhere.
        """
        distinct = {id(task.download): task.download for task in tasks}
        values, compression = self.wire.download, self.wire.compression
        return {
            key: joined(encode_pieces(payload, values=values, compression=compression))
            for key, payload in distinct.items()
        }

    def deliver(self, tasks: Sequence[Task]) -> list[tuple[Task, int]]:
        """Return each task as its client reads it, and the length of its message.

        Clients that share a payload share the decoded one too; client halves never write to a download.
        """
        bodies = self.bodies(tasks)
        limit = self.wire.max_bytes
        arrived: dict[int, Payload] = {
            key: decode_body(body, max_bytes=limit) for key, body in bodies.items()
        }
        return [
            (replace(task, download=arrived[key]), self.num_bytes(task, bodies[key]))
            for task, key in ((task, id(task.download)) for task in tasks)
        ]

    def message(self, task: Task, body: Piece) -> bytes:
        """Return the message of a task whose download is encoded already."""
        return encode_task(task, settings=self.wire, body=body)

    def num_bytes(self, task: Task, body: Piece) -> int:
        """Return the length of that message."""
        return len(task_head(task, body)) + len(body)

    def most_bytes(self, tasks: Sequence[Task]) -> int:
        """Return a length that no sound replies to tasks exceed."""
        return sum(most_reply_bytes(self.expected(task)) for task in tasks)

    def send(self, reply: Reply) -> bytes:
        """Return the message of a reply.

        Raises:
            ClientError: where the wire's value type cannot hold it.
        """
        try:
            return encode_reply(reply, settings=self.wire)
        except WireError as error:
            raise ClientError(str(error)) from error

    def receive(self, task: Task, message: Piece, *, download_bytes: int) -> Delivery:
        """Read a reply; one that is malformed, of the wrong shape or not finite is a failure that says so."""
        try:
            reply = decode_reply(
                message,
                expected=self.expected(task),
                measured=task.kind != "train",
                metrics=self.metrics,
                max_bytes=self.wire.max_bytes,
            )
            if reply.client != task.client:
                raise ClientError(f"a reply for {task.client} names {plain(reply.client, 80)}")
            check_finite(reply.upload)
        except (WireError, ClientError) as reason:
            return Delivery(ClientFailure(task.client, plain(reason)), download_bytes, len(message))
        return Delivery(reply, download_bytes, len(message))

    def expected(self, task: Task) -> Schema:
        """Return the tensors that a reply to a task must hold."""
        shape = frozenset(schema(task.download).items())
        key = (task.kind, task.round, tuple(task.profile.items()), shape)
        if key not in self._schemas:
            if len(self._schemas) > 64:
                self._schemas.clear()
            self._schemas[key] = schema(rehearse(self.algorithm, task).upload)
        return self._schemas[key]
