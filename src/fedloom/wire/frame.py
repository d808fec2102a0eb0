"""Header and body <-> message: versioned, length- and checksum-checked, no pickle.

Layout: magic, version u8, lengths of header and body, CRC-32 u32 (little endian) of all that and the header,
header as JSON, body (`fedloom.wire.body`); lengths and JSON as in `fedloom.wire.compact`. The body has a checksum
of its own, so that framing it for one more client costs no second pass over it.
"""

import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from fedloom.wire.compact import read_lengths, write_json, write_lengths
from fedloom.wire.table import MAX_JSON_BYTES, WireError, read_json
from fedloom.wire.wire_settings import MAX_BYTES

VERSION = 1
_MAGIC = b"FDLM"
_HEAD, _CHECKSUM = struct.Struct("<4sB"), struct.Struct("<I")


def frame(body: bytes, header: Mapping[str, Any] | None = None) -> bytes:
    """Return the message of an encoded body."""
    return b"".join(frame_pieces([body], header))


def frame_pieces(
    body: Sequence[bytes | memoryview], header: Mapping[str, Any] | None = None
) -> list[bytes | memoryview]:
    """Return the pieces that are the message of a body in pieces: joined, or written, once."""
    text = write_json(dict(header or {}))
    head = _HEAD.pack(_MAGIC, VERSION) + write_lengths(len(text), sum(map(len, body)))
    checksum = zlib.crc32(text, zlib.crc32(head))
    return [head, _CHECKSUM.pack(checksum), text, *body]


def split(
    data: bytes | memoryview,
    *,
    body: bytes | memoryview | None = None,
    max_bytes: int | None = MAX_BYTES,
    header_bytes: int = MAX_JSON_BYTES,
) -> tuple[Mapping[str, Any], memoryview]:
    """Return header and body, the inverse of `frame`; the body is not looked at.

    Args:
        data: The whole message, or what of it comes before a body that lies elsewhere.
        body: That body.
        max_bytes: None trusts the sender with a header of any length.
        header_bytes: Limit of a stranger's header, as text.

    Raises:
        WireError: where the frame is damaged.
    """
    if len(data) < _HEAD.size:
        raise WireError(f"the message is truncated to {len(data)} bytes")
    view = memoryview(data)
    magic, version = _HEAD.unpack_from(view)
    if magic != _MAGIC:
        raise WireError(f"the message begins with {magic!r}, not {_MAGIC!r}: not from fedloom")
    if version != VERSION:
        raise WireError(f"the message has wire version {version}, this fedloom reads {VERSION}")
    try:
        (text_bytes, body_bytes), end = read_lengths(view, _HEAD.size, 2)
    except ValueError as error:
        raise WireError(f"the message of {len(data)} bytes begins with lengths: {error}") from None
    start = end + _CHECKSUM.size
    found = (len(data), 0) if body is None else (len(data) + len(body), len(body))
    announced = start + text_bytes + body_bytes
    if found != (announced, 0 if body is None else body_bytes):
        raise WireError(f"the message has {found[0]} bytes and announces {announced}")
    limit = None if max_bytes is None else header_bytes
    if limit is not None and text_bytes > limit:
        raise WireError(f"the header has {text_bytes} bytes, allowed are {limit}")
    text = view[start : start + text_bytes]
    (stored,) = _CHECKSUM.unpack_from(view, end)
    if zlib.crc32(text, zlib.crc32(view[:end])) != stored:
        raise WireError("the header of the message does not match its checksum")
    header = read_json(text, "header", limit=limit)
    if not isinstance(header, dict):
        raise WireError(f"the header of the message is a {type(header).__name__}, not an object")
    return header, view[start + text_bytes :] if body is None else memoryview(body)
