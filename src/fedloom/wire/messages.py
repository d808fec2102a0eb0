"""Task, reply <-> message."""

import base64

from fedloom.core.metrics import METRICS, MetricTable, checked
from fedloom.core.protocols import Payload, Reply, Task
from fedloom.core.schema import Schema, num_bytes
from fedloom.wire.body import Piece, decode_body, encode_body, encode_pieces
from fedloom.wire.frame import frame_pieces, split
from fedloom.wire.table import MAX_JSON_BYTES, WireError
from fedloom.wire.wire_settings import MAX_BYTES, WireSettings

_HEADER_BYTES = 1 << 16
"""Of a reply: a name, a weight and a few metrics."""
_MAX_WEIGHT = 2.0**53
_SLACK = 1 << 16


def encode_task(task: Task, *, settings: WireSettings, body: Piece | None = None) -> bytes:
    """Return the message of a task; `body` is its download where that is encoded already."""
    if body is None:
        compression = settings.compression
        body = encode_body(task.download, values=settings.download, compression=compression)
    return task_head(task, body) + body


def task_head(task: Task, body: Piece) -> bytes:
    """Return what of a task's message comes before its body."""
    header = {
        "kind": task.kind,
        "round": task.round,
        "client": task.client,
        "seed": _digits(task.seed),
        "profile": dict(task.profile),
    }
    return b"".join(frame_pieces([body], header)[:-1])


def decode_task(
    data: Piece,
    *,
    body: Piece | None = None,
    download: Payload | None = None,
    max_bytes: int | None = MAX_BYTES,
) -> Task:
    """Return the task of a message.

    Args:
        data: The message, or its head alone.
        body: The body of a head.
        download: What is in that body, where it is decoded already.
        max_bytes: Limit of the decoded tensors; None trusts the sender.

    Raises:
        WireError: where the message is damaged, malformed or too large.
    """
    header, rest = split(data, body=body or None, max_bytes=max_bytes)
    match header:
        case {
            "kind": ("train" | "validate" | "test") as kind,
            "round": int(round),
            "client": str(client),
            "seed": str(digits),
            "profile": dict(profile),
            **others,
        } if not others and all(isinstance(value, str) for value in profile.values()):
            seed = _number(digits)
            if download is None:
                download = decode_body(rest, max_bytes=max_bytes)
            return Task(kind, round, client, seed, profile, download)
    raise WireError(f"the header of the task is malformed: {ascii(header)[:200]}")


def encode_reply(reply: Reply, *, settings: WireSettings) -> bytes:
    """Return the message of a reply."""
    return b"".join(reply_pieces(reply, settings=settings))


def reply_pieces(reply: Reply, *, settings: WireSettings) -> list[Piece]:
    """Return the pieces that are the message of a reply one after another, views of its tensors where they travel as they are."""
    header = {"client": reply.client, "weight": reply.weight, "metrics": dict(reply.metrics)}
    values, compression = settings.upload, settings.compression
    body = encode_pieces(reply.upload, values=values, compression=compression)
    return frame_pieces(body, header)


def most_reply_bytes(expected: Schema) -> int:
    """Return a length that no sound reply of these tensors exceeds, however it is encoded."""
    decoded = num_bytes(expected)
    return decoded + (decoded >> 6) + MAX_JSON_BYTES + _HEADER_BYTES + _SLACK


def decode_reply(
    data: Piece,
    *,
    expected: Schema | None = None,
    measured: bool = False,
    metrics: MetricTable = METRICS,
    max_bytes: int | None = MAX_BYTES,
) -> Reply:
    """Return the reply of a message; nothing is allocated for one that is not what was asked for.

    Args:
        data: The message.
        expected: The tensors that were asked for; None takes any.
        measured: Whether it answers an evaluation, whose metrics are averaged.
        metrics: Which ones there are.
        max_bytes: Limit of the decoded tensors; None trusts the sender.

    Raises:
        WireError: where the message is damaged, malformed, too large or of other tensors.
    """
    header, body = split(data, max_bytes=max_bytes, header_bytes=_HEADER_BYTES)
    match header:
        case {"client": str(client), "weight": weight, "metrics": dict(reported), **others} if (
            not others
        ):
            try:
                values = checked(reported, measured=measured, table=metrics)
                heavy = _weight(weight)
            except ValueError as error:
                raise WireError(f"the header of the reply is malformed: {error}") from None
            if expected is not None and max_bytes is not None:
                # A little more may come in, so that it is the wrong tensor that is named.
                max_bytes = min(max_bytes, num_bytes(expected) + _SLACK)
            upload = decode_body(body, max_bytes=max_bytes, expected=expected)
            return Reply(client, upload, heavy, values)
    raise WireError(f"the header of the reply is malformed: {ascii(header)[:200]}")


def _weight(weight: object) -> float:
    # Compared as it is: a whole number may be too large for a float.
    if type(weight) in (int, float) and 0 <= weight <= _MAX_WEIGHT:  # type: ignore[operator]
        return weight  # type: ignore[return-value]
    raise ValueError(f"weight must be a number in [0, {_MAX_WEIGHT:g}], got {ascii(weight)[:60]}")


def _digits(seed: int) -> str:
    """Return a seed of 64 bits to base 85: ten digits, which do not compress, for up to twenty."""
    return base64.b85encode(seed.to_bytes(8, "big")).decode()


def _number(digits: str) -> int:
    if len(digits) != 10:
        raise WireError(f"the seed of the task has {len(digits)} digits to base 85, not 10")
    try:
        return int.from_bytes(base64.b85decode(digits), "big")
    except ValueError as error:
        raise WireError(f"the seed of the task is not to base 85: {error}") from None
