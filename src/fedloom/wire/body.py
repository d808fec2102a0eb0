"""Payload <-> body: the part of a message that many clients may share.

Layout: compression u8, length of the table (`fedloom.wire.compact`), where compressed that of the content, CRC-32 u32
(little endian) of all else, content. The content, compressed or not, is the table and then the blocks it describes.
"""

import struct
import zlib
from itertools import islice

from torch import Tensor

from fedloom.core.protocols import Payload
from fedloom.core.schema import Schema
from fedloom.wire.compact import read_lengths, write_lengths
from fedloom.wire.layout import MessageLayout, dense_layout, read_layout
from fedloom.wire.table import MAX_JSON_BYTES, Block, WireError, write_table
from fedloom.wire.tensors import read_run, write_run
from fedloom.wire.wire_settings import MAX_BYTES, Compression, ValueType

Piece = bytes | memoryview

_CHECKSUM = struct.Struct("<I")
_COMPRESSIONS: tuple[Compression, ...] = ("none", "zstd")


def encode_body(
    payload: Payload, *, values: ValueType = "float32", compression: Compression = "none"
) -> bytes:
    """Return the bytes of `payload`, to be framed once for each receiver.

    Raises:
        WireError: where a tensor cannot be written as `values`.
    """
    return b"".join(encode_pieces(payload, values=values, compression=compression))


def encode_pieces(
    payload: Payload,
    *,
    values: ValueType = "float32",
    compression: Compression = "none",
    sparse: bool = True,
) -> list[Piece]:
    """Return the pieces that are the body of `payload` one after another.

    Args:
        payload: What is said.
        values: How float32 tensors travel.
        compression: Of it all.
        sparse: Whether zeros are left out where that is shorter; False saves the time to look for them.

    Raises:
        WireError: where a tensor cannot be written as `values`.
    """
    layout = dense_layout(payload, values)
    table: dict[str, list[Block]] = {}
    pieces: list[Piece] = []
    for group, runs in layout.runs:
        table[group] = []
        tensors = iter(payload[group].values())
        for run in runs:
            own = list(islice(tensors, len(run.blocks)))
            blocks, written = write_run(group, run, own, sparse=sparse)
            table[group] += blocks
            pieces += written
    rows = layout.rows if table == layout.table else write_table(table)
    num_bytes = len(rows) + sum(map(len, pieces))
    content = [rows, *pieces]
    if compression == "zstd":
        content = [_compress(b"".join(content))]
    lengths = write_lengths(len(rows), *([] if compression == "none" else [num_bytes]))
    head = bytes([_COMPRESSIONS.index(compression)]) + lengths
    checksum = zlib.crc32(head)
    for piece in content:
        checksum = zlib.crc32(piece, checksum)
    return [head, _CHECKSUM.pack(checksum), *content]


def decode_body(
    body: bytes | memoryview,
    *,
    max_bytes: int | None = MAX_BYTES,
    expected: Schema | None = None,
) -> Payload:
    """Return the payload of a body, in memory of its own.

    Args:
        body: What `encode_body` returned.
        max_bytes: Limit of the decoded tensors; None trusts the sender.
        expected: The tensors that must be in it; None takes any.

    Raises:
        WireError: where the body is damaged, malformed or too large; nothing was allocated then.
    """
    view = memoryview(body)
    is_plain = not view or view[0] == _COMPRESSIONS.index("none")
    try:
        (table_bytes, *rest), end = read_lengths(view, 1, 1 if is_plain else 2)
    except ValueError as error:
        raise WireError(f"the body of the message, {len(body)} bytes, begins: {error}") from None
    start = end + _CHECKSUM.size
    if len(body) < start:
        raise WireError(f"the body of the message is truncated to {len(body)} bytes")
    (stored,) = _CHECKSUM.unpack_from(view, end)
    if zlib.crc32(view[start:], zlib.crc32(view[:end])) != stored:
        raise WireError("the body of the message does not match its checksum")
    (num_bytes,) = rest or [len(view) - start]
    if max_bytes is not None:
        if table_bytes > MAX_JSON_BYTES:
            raise WireError(f"the table has {table_bytes} bytes, allowed are {MAX_JSON_BYTES}")
        if num_bytes > table_bytes + max_bytes:
            raise WireError(f"the content has {num_bytes} bytes, wire.max_bytes is {max_bytes}")
    content = _content(view[start:], view[0], num_bytes)
    if table_bytes > len(content):
        raise WireError(f"the table has {table_bytes} bytes, the content only {len(content)}")
    limit = None if max_bytes is None else MAX_JSON_BYTES
    layout = read_layout(content[:table_bytes], limit=limit, expected=expected)
    blocks = content[table_bytes:]
    _check_lengths(layout, len(blocks), max_bytes)
    payload: dict[str, dict[str, Tensor]] = {}
    at = 0
    for group, runs in layout.runs:
        payload[group] = {}
        for run in runs:
            payload[group] |= read_run(group, run, blocks[at : at + run.num_bytes])
            at += run.num_bytes
    return payload


def roundtrip(
    payload: Payload, *, values: ValueType = "float32", compression: Compression = "none"
) -> Payload:
    """Return what a receiver would hold."""
    body = encode_body(payload, values=values, compression=compression)
    return decode_body(body, max_bytes=None)


def _check_lengths(layout: MessageLayout, num_bytes: int, max_bytes: int | None) -> None:
    within = max_bytes is None or layout.decoded_bytes <= max_bytes
    if layout.num_bytes == num_bytes and within:
        return
    expected = decoded = 0
    for group, blocks in layout.table.items():
        for block in blocks:
            expected += block.position_bytes + block.value_bytes
            decoded += block.decoded_bytes
            if expected > num_bytes:
                raise WireError(f"the message ends inside {group}/{block.name}")
            if max_bytes is not None and decoded > max_bytes:
                raise WireError(
                    f"{group}/{block.name} of shape {list(block.shape)} takes the payload beyond "
                    f"wire.max_bytes, {max_bytes} bytes"
                )
    raise WireError(f"the message has {num_bytes - expected} bytes after its last tensor")


def _compress(content: bytes) -> bytes:
    try:
        import zstandard
    except ImportError:
        raise ValueError(
            "wire.compression zstd needs the package zstandard: install it, or set none"
        ) from None
    return zstandard.ZstdCompressor().compress(content)


def _content(stored: memoryview, code: int, num_bytes: int) -> memoryview:
    if code >= len(_COMPRESSIONS):
        raise WireError(f"the body is compressed in the unknown way {code}")
    return stored if _COMPRESSIONS[code] == "none" else memoryview(_decompress(stored, num_bytes))


def _decompress(stored: memoryview, num_bytes: int) -> bytes:
    try:
        import zstandard
    except ImportError:
        raise WireError("the message is compressed, and zstandard is not installed") from None
    try:
        # The frame names its own size and would be believed.
        if zstandard.get_frame_parameters(stored).content_size != num_bytes:
            raise WireError(f"the compressed content does not have {num_bytes} bytes")
        return zstandard.ZstdDecompressor().decompress(stored, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise WireError(f"the content cannot be decompressed: {error}") from None
