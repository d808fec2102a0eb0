"""Payload <-> body: the part of a message that many clients may share.

Layout: compression u8, length of the table (`fedloom.wire.compact`), where compressed that of the content, CRC-32 u32
(little endian) of all else, content. The content, compressed or not, is the table and then the blocks it describes.
"""

import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from fedloom.core.protocols import Payload
from fedloom.core.schema import Schema
from fedloom.wire.compact import read_lengths, write_lengths
from fedloom.wire.layout import Layout, Run, dense_layout, read_layout
from fedloom.wire.positions import POSITION_CODECS, Plan, Positions, mask_of
from fedloom.wire.quantize import VALUE_CODECS
from fedloom.wire.settings import MAX_BYTES, Compression, ValueType
from fedloom.wire.table import (
    DTYPES,
    MAX_JSON_BYTES,
    Block,
    WireError,
    write_table,
)

Piece = bytes | memoryview

_CHECKSUM = struct.Struct("<I")
_COMPRESSIONS: tuple[Compression, ...] = ("none", "zstd")
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_WORTH_BYTES = 48
"""A sparse tensor's row is longer by less."""


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
            parts = _join(list(islice(tensors, len(run.blocks))))
            if len(run.blocks) > 1 and _is_full(run, parts, sparse=sparse):
                table[group] += run.blocks
                pieces.append(VALUE_CODECS[run.blocks[0].values].encode(parts))
                continue
            for block, (_, _, start) in zip(run.blocks, run.views, strict=True):
                part = parts[start : start + block.size]
                found, positions, entries = _write(group, block, part, sparse=sparse)
                table[group].append(found)
                pieces += [positions, entries]
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
    return _decode_blocks(layout, blocks)


def body_size(payload: Payload, *, values: ValueType = "float32") -> int:
    """Return the length of the uncompressed body without writing it.

    Of a tensor on the meta device only shape and type are known: it counts as if it had no zeros.
    """
    layout = dense_layout(payload, values)
    table: dict[str, list[Block]] = {}
    for group, params in payload.items():
        dense = zip(layout.table[group], params.values(), strict=True)
        table[group] = [block if t.is_meta else _lay_out(block, t).block for block, t in dense]
    blocks = [block for group in table.values() for block in group]
    rows = len(write_table(table))
    num_bytes = rows + sum(block.position_bytes + block.value_bytes for block in blocks)
    return 1 + len(write_lengths(rows)) + _CHECKSUM.size + num_bytes


def roundtrip(
    payload: Payload, *, values: ValueType = "float32", compression: Compression = "none"
) -> Payload:
    """Return what a receiver would hold."""
    body = encode_body(payload, values=values, compression=compression)
    return decode_body(body, max_bytes=None)


@dataclass(frozen=True, slots=True)
class _Layout:
    block: Block
    plan: Plan | None = None
    """Of the positions `where`; None: all entries travel."""
    where: Positions | None = None


def _join(tensors: Sequence[Tensor]) -> Tensor:
    """Return (numel,) entries, side by side."""
    with torch.no_grad():
        flat = [tensor.cpu().reshape(-1) for tensor in tensors]
        return flat[0].detach() if len(flat) == 1 else torch.cat(flat)


def _is_full(run: Run, entries: Tensor, *, sparse: bool) -> bool:
    if not sparse and run.blocks[0].values != "true":
        return True
    return int(np.count_nonzero(_bits(entries).numpy())) == run.count


def _write(
    group: str, block: Block, entries: Tensor, *, sparse: bool
) -> tuple[Block, bytes, Piece]:
    """Return how a tensor is written, its positions and its values."""
    layout = _lay_out(block, entries) if sparse or block.values == "true" else _Layout(block)
    try:
        return layout.block, *_encode_tensor(layout, entries)
    except ValueError as error:
        raise WireError(
            f"{group}/{block.name} cannot travel as {block.values}: it {error}"
        ) from None


def _lay_out(dense: Block, tensor: Tensor) -> _Layout:
    """Find the shortest way to write a tensor."""
    codec, width = VALUE_CODECS[dense.values], tensor.element_size()
    present = _bits(tensor).numpy() != 0
    count, size = int(np.count_nonzero(present)), dense.size
    # The False of a mask are not written at all; other zeros are left out where that is shorter.
    limit = math.inf if dense.values == "true" else dense.value_bytes - _WORTH_BYTES
    num_bytes = codec.num_bytes(count, width)
    if count == size or num_bytes + min(count, size - count) // 8 >= limit:  # at least a bit each
        return _Layout(dense)
    where = np.flatnonzero(present)
    plans = {key: code.plan(where, size) for key, code in POSITION_CODECS.items()}
    best = min(plans, key=lambda key: plans[key].num_bytes)
    if num_bytes + plans[best].num_bytes >= limit:
        return _Layout(dense)
    position_bytes = plans[best].num_bytes
    block = replace(dense, count=count, positions=best, position_bytes=position_bytes)
    return _Layout(block, plans[best], where)


def _encode_tensor(layout: _Layout, tensor: Tensor) -> tuple[bytes, Piece]:
    codec, bits = VALUE_CODECS[layout.block.values], _bits(tensor)
    if layout.plan is None or layout.where is None:
        return b"", codec.encode(bits.view(tensor.dtype))
    kept = torch.empty(layout.block.count, dtype=bits.dtype)
    # All positions are within: clipping spares a copy in which they would be checked.
    np.take(bits.numpy(), layout.where, out=kept.numpy(), mode="clip")
    return layout.plan.write(), codec.encode(kept.view(tensor.dtype))


def _bits(tensor: Tensor) -> Tensor:
    """Return (numel,) integers: -0.0 is an entry then, and every type can be indexed."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(_BITS[tensor.element_size()])


def _check_lengths(layout: Layout, num_bytes: int, max_bytes: int | None) -> None:
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


def _decode_blocks(layout: Layout, blocks: memoryview) -> Payload:
    payload: dict[str, Mapping[str, Tensor]] = {}
    start = 0
    for group, runs in layout.runs:
        params: dict[str, Tensor] = {}
        for run in runs:
            end = start + run.num_bytes
            first = run.blocks[0]
            try:
                if first.positions is None:
                    params |= _decode_run(run, blocks[start:end])
                else:
                    params[first.name] = _decode_sparse(first, blocks[start:end])
            except ValueError as error:
                raise WireError(f"{group}/{first.name} is malformed: {error}") from None
            start = end
        payload[group] = params
    return payload


def _decode_run(run: Run, data: memoryview) -> dict[str, Tensor]:
    first = run.blocks[0]
    entries = VALUE_CODECS[first.values].decode(data, run.count, DTYPES[first.dtype])
    named = zip(run.blocks, run.views, strict=True)
    return {block.name: entries.as_strided(*view) for block, view in named}


def _decode_sparse(block: Block, data: memoryview) -> Tensor:
    dtype = DTYPES[block.dtype]
    codec = POSITION_CODECS[block.positions or ""]
    index = codec.decode(data[: block.position_bytes], block.size, block.count)
    if block.values == "true":
        return torch.from_numpy(mask_of(index, block.size)).reshape(block.shape)
    values = data[block.position_bytes :]
    entries = VALUE_CODECS[block.values].decode(values, block.count, dtype)
    bits = torch.zeros(block.size, dtype=_BITS[dtype.itemsize])
    where = index if index.dtype == np.int64 else np.flatnonzero(index)
    bits.numpy()[where] = entries.view(bits.dtype).numpy()
    return bits.view(dtype).reshape(block.shape)


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
