"""The messages of a sum as bytes: JSON with a checksum, and what is of one length after another."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from fedloom.wire.frame import frame, split
from fedloom.wire.table import WireError

Step = Literal["advertise", "share", "upload", "consent", "reveal"]
"""What a client is asked for, in this order: its keys, shares of its secrets, its masked upload, its word on who is in
the sum, and its shares of the others' secrets."""
_HEADER_BYTES = 1 << 18


def message(header: Mapping[str, Any], parts: Sequence[bytes] = ()) -> bytes:
    """Return a message of plain values and byte strings."""
    return frame(b"".join(parts), {**header, "lengths": [len(part) for part in parts]})


def read(data: bytes | memoryview) -> tuple[dict[str, Any], list[bytes]]:
    """Return what is in a message.

    Raises:
        ValueError: where it is damaged or malformed.
    """
    header, body = split(data, header_bytes=_HEADER_BYTES)
    told = dict(header)
    lengths = told.pop("lengths", None)
    if not isinstance(lengths, list) or not all(type(n) is int and n >= 0 for n in lengths):
        raise WireError("a message of a secure sum is malformed: it has no lengths")
    if sum(lengths) != len(body):
        raise WireError(f"a message of a secure sum has {len(body)} bytes, not {sum(lengths)}")
    parts, at = list[bytes](), 0
    for length in lengths:
        parts.append(bytes(body[at : at + length]))
        at += length
    return told, parts


def only_part(data: bytes | memoryview) -> bytes:
    """Return the one byte string of a message.

    Raises:
        ValueError: where it is damaged, or has none or several.
    """
    _, parts = read(data)
    if len(parts) != 1:
        raise WireError(f"a message of a secure sum must have one part, got {len(parts)}")
    return parts[0]


def names_in(told: Mapping[str, Any], key: str, number: int | None = None) -> tuple[str, ...]:
    """Return the names under a key of a message, each once.

    Raises:
        ValueError: where they are none, or as many parts do not come with them.
    """
    names = told.get(key)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"a message of a secure sum names nobody in {key}")
    if len({*names}) != len(names) or (number is not None and len(names) != number):
        raise ValueError(f"a message of a secure sum must name each in {key} once, with one part")
    return tuple(names)
