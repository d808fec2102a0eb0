"""Payload <-> message; the names that the rest of the package asks the wire for are found here.

A message is a frame (`frame`) around a body (`body`): a table (`table`) and the blocks it describes, each the
positions (`positions`) and values (`quantize`) of one tensor. Only +0.0 is left out, so masks are applied with
`torch.where`: a negative number times 0 is -0.0, and travels.
"""

from collections.abc import Mapping
from typing import Any

from fedloom.core.protocols import Payload
from fedloom.wire.body import decode_body, encode_body
from fedloom.wire.frame import frame, split
from fedloom.wire.messages import decode_reply as decode_reply
from fedloom.wire.messages import decode_task as decode_task
from fedloom.wire.messages import encode_reply as encode_reply
from fedloom.wire.messages import encode_task as encode_task
from fedloom.wire.messages import most_reply_bytes as most_reply_bytes
from fedloom.wire.messages import reply_pieces as reply_pieces
from fedloom.wire.messages import task_head as task_head
from fedloom.wire.table import WireError as WireError
from fedloom.wire.wire_settings import MAX_BYTES, Compression, ValueType


def encode(
    payload: Payload,
    header: Mapping[str, Any] | None = None,
    *,
    values: ValueType = "float32",
    compression: Compression = "none",
) -> bytes:
    """Return the message of `payload`; every type but float32 travels exactly, whatever `values`."""
    return frame(encode_body(payload, values=values, compression=compression), header)


def decode(data: bytes, *, max_bytes: int | None = MAX_BYTES) -> Payload:
    """Return the payload of a message; see `decode_with_header`."""
    return decode_with_header(data, max_bytes=max_bytes)[1]


def decode_with_header(
    data: bytes, *, max_bytes: int | None = MAX_BYTES
) -> tuple[Mapping[str, Any], Payload]:
    """Return header and payload.

    Args:
        data: The whole message.
        max_bytes: Limit of the decoded tensors; None trusts the sender.

    Raises:
        WireError: where the message is damaged, malformed or too large.
    """
    header, body = split(data, max_bytes=max_bytes)
    return header, decode_body(body, max_bytes=max_bytes)
