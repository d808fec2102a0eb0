"""Header and body <-> message: versioned, length- and checksum-checked, no pickle.

Layout, little endian: magic, version u16, header length u32, body length u64, CRC-32 u32 of all that
and the header, header as JSON, body (`fedloom.wire.body`). The body has a checksum of its own, so that
framing it for one more client costs no second pass over it.
"""

import json
import struct
import zlib
from collections.abc import Mapping
from typing import Any

from fedloom.wire.settings import MAX_BYTES
from fedloom.wire.table import MAX_JSON_BYTES, WireError, read_json

VERSION = 1
_MAGIC = b"FDLM"
_HEAD, _CHECKSUM = struct.Struct("<4sHIQ"), struct.Struct("<I")
_START = _HEAD.size + _CHECKSUM.size


def frame(body: bytes, header: Mapping[str, Any] | None = None) -> bytes:
    """Return the message of an encoded body."""
    text = json.dumps(dict(header or {}), separators=(",", ":")).encode()
    head = _HEAD.pack(_MAGIC, VERSION, len(text), len(body))
    checksum = zlib.crc32(text, zlib.crc32(head))
    return b"".join([head, _CHECKSUM.pack(checksum), text, body])


def split(
    data: bytes, *, max_bytes: int | None = MAX_BYTES
) -> tuple[Mapping[str, Any], memoryview]:
    """Return header and body, the inverse of `frame`; the body is not looked at.

    Raises:
        WireError: where the frame is damaged.
    """
    if len(data) < _START:
        raise WireError(f"the message is truncated to {len(data)} bytes")
    view = memoryview(data)
    magic, version, header_bytes, body_bytes = _HEAD.unpack_from(view)
    if magic != _MAGIC:
        raise WireError(f"the message begins with {magic!r}, not {_MAGIC!r}: not from fedloom")
    if version != VERSION:
        raise WireError(f"the message has wire version {version}, this fedloom reads {VERSION}")
    expected = _START + header_bytes + body_bytes
    if len(data) != expected:
        raise WireError(f"the message has {len(data)} bytes and announces {expected}")
    if max_bytes is not None and header_bytes > MAX_JSON_BYTES:
        raise WireError(f"the header has {header_bytes} bytes, allowed are {MAX_JSON_BYTES}")
    text = view[_START : _START + header_bytes]
    (stored,) = _CHECKSUM.unpack_from(view, _HEAD.size)
    if zlib.crc32(text, zlib.crc32(view[: _HEAD.size])) != stored:
        raise WireError("the header of the message does not match its checksum")
    header = read_json(bytes(text), "header")
    if not isinstance(header, dict):
        raise WireError(f"the header of the message is a {type(header).__name__}, not an object")
    return header, view[_START + header_bytes :]
