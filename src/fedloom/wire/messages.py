"""Task, reply <-> message."""

import base64
import math

from fedloom.core.protocols import Metrics, Reply, Task
from fedloom.wire.body import decode_body, encode_body
from fedloom.wire.frame import frame, split
from fedloom.wire.settings import MAX_BYTES, WireSettings
from fedloom.wire.table import WireError


def encode_task(task: Task, *, settings: WireSettings, body: bytes | None = None) -> bytes:
    """Return the message of a task; `body` is its download where that is encoded already."""
    if body is None:
        compression = settings.compression
        body = encode_body(task.download, values=settings.download, compression=compression)
    header = {
        "kind": task.kind,
        "round": task.round,
        "client": task.client,
        "seed": _digits(task.seed),
        "profile": dict(task.profile),
    }
    return frame(body, header)


def decode_task(data: bytes, *, max_bytes: int | None = MAX_BYTES) -> Task:
    """Return the task of a message.

    Raises:
        WireError: where the message is damaged, malformed or too large.
    """
    header, body = split(data, max_bytes=max_bytes)
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
            download = decode_body(body, max_bytes=max_bytes)
            return Task(kind, round, client, seed, profile, download)
    raise WireError(f"the header of the task is malformed: {repr(header)[:200]}")


def encode_reply(reply: Reply, *, settings: WireSettings) -> bytes:
    """Return the message of a reply."""
    header = {"client": reply.client, "weight": reply.weight, "metrics": dict(reply.metrics)}
    values, compression = settings.upload, settings.compression
    return frame(encode_body(reply.upload, values=values, compression=compression), header)


def decode_reply(data: bytes, *, max_bytes: int | None = MAX_BYTES) -> Reply:
    """Return the reply of a message.

    Raises:
        WireError: where the message is damaged, malformed or too large.
    """
    header, body = split(data, max_bytes=max_bytes)
    match header:
        case {
            "client": str(client),
            "weight": (int() | float()) as weight,
            "metrics": dict(metrics),
            **others,
        } if not others and math.isfinite(weight) and _are_numbers(metrics):
            return Reply(client, decode_body(body, max_bytes=max_bytes), weight, metrics)
    raise WireError(f"the header of the reply is malformed: {repr(header)[:200]}")


def _are_numbers(metrics: Metrics) -> bool:
    return all(isinstance(value, int | float) for value in metrics.values())


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
