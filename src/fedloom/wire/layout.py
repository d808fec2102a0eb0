"""What follows from the names, types and shapes of a payload alone: found once for a thousand payloads alike.

Small tensors that lie side by side in a body are one run: what is done once a run costs its bytes, not its tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from fedloom.core.schema import Schema, difference
from fedloom.wire.table import DTYPES, Block, Table, WireError, read_table, write_table
from fedloom.wire.wire_settings import ValueType

_SMALL = 1 << 16
"""Entries above which a tensor is a run of its own: what it takes is its bytes anyway."""
_ALIGNED = 64
"""Bytes: where a tensor begins that shares memory with others, as if it had memory of its own."""
_REMEMBERED = 16
_MAX_REMEMBERED_BYTES = 1 << 16

_known: dict[bytes, "MessageLayout"] = {}
"""By the bytes of their table, what was read before from a trusted sender or was what was asked for."""


@dataclass(frozen=True, slots=True)
class TensorRun:
    """Tensors of one group that are written and read at once; one that is sparse, rounded or large is alone."""

    blocks: tuple[Block, ...]
    num_bytes: int
    count: int
    views: tuple[tuple[tuple[int, ...], tuple[int, ...], int], ...]
    """Shape, strides and first entry of each tensor."""


@dataclass(frozen=True, slots=True)
class MessageLayout:
    """A table, and what there is to know of it."""

    table: Table
    rows: bytes
    """The table as bytes."""
    runs: tuple[tuple[str, tuple[TensorRun, ...]], ...]
    """Of every group, in the order of their bytes."""
    schema: Schema
    num_bytes: int
    """Of all blocks."""
    decoded_bytes: int


def dense_layout(payload: Any, values: ValueType) -> MessageLayout:
    """Return the layout of a payload all of whose entries travel.

    Raises:
        WireError: where a tensor is of a type that cannot travel.
    """
    shapes = tuple(
        (group, tuple((name, t.dtype, t.shape) for name, t in params.items()))
        for group, params in payload.items()
    )
    return _dense_layout(shapes, values)


def read_layout(rows: memoryview, *, limit: int | None, expected: Schema | None) -> MessageLayout:
    """Return the layout of a message, checked.

    Args:
        rows: The table as bytes.
        limit: Of its text in bytes; None trusts the sender.
        expected: The tensors that must be in it; None takes any.

    Raises:
        WireError: where it is malformed, too large or of other tensors.
    """
    data = bytes(rows)
    layout = _known.get(data) or _layout(read_table(memoryview(data), limit=limit), data)
    if expected is not None and (wrong := difference(layout.schema, expected)):
        raise WireError(f"upload {wrong}")
    # A stranger's is kept only where it is what was asked for: nobody fills the memory with tables of his own.
    is_sound = limit is None or expected is not None
    if is_sound and data not in _known and len(data) <= _MAX_REMEMBERED_BYTES:
        if len(_known) >= _REMEMBERED:
            _known.clear()
        if not any(block.positions for blocks in layout.table.values() for block in blocks):
            _known[data] = layout
    return layout


@lru_cache(maxsize=_REMEMBERED)
def _dense_layout(
    shapes: tuple[tuple[str, tuple[tuple[str, torch.dtype, torch.Size], ...]], ...],
    values: ValueType,
) -> MessageLayout:
    table = {
        group: [_dense(group, name, dtype, shape, values) for name, dtype, shape in tensors]
        for group, tensors in shapes
    }
    return _layout(table, write_table(table))


def _dense(group: str, name: str, kind: torch.dtype, shape: torch.Size, values: ValueType) -> Block:
    dtype = str(kind).removeprefix("torch.")
    if dtype not in DTYPES:
        allowed = ", ".join(DTYPES)
        raise WireError(f"{group}/{name} is of type {dtype}, what can travel is {allowed}")
    lossy = values != "float32" and dtype == "float32"
    coded = "true" if dtype == "bool" else values if lossy else "exact"
    return Block(name, dtype, tuple(shape), coded, shape.numel())


def _layout(table: Table, rows: bytes) -> MessageLayout:
    runs = tuple((group, tuple(_runs(blocks))) for group, blocks in table.items())
    schema = {
        (group, block.name): (DTYPES[block.dtype], torch.Size(block.shape))
        for group, blocks in table.items()
        for block in blocks
    }
    num_bytes = sum(run.num_bytes for _, group in runs for run in group)
    decoded = sum(block.decoded_bytes for blocks in table.values() for block in blocks)
    return MessageLayout(table, rows, runs, schema, num_bytes, decoded)


def _runs(blocks: Sequence[Block]) -> list[TensorRun]:
    runs: list[list[Block]] = []
    num_bytes = 0
    for block in blocks:
        if runs and num_bytes % _ALIGNED == 0 and _go_together(runs[-1][-1], block):
            runs[-1].append(block)
            num_bytes += block.decoded_bytes
        else:
            runs.append([block])
            num_bytes = block.decoded_bytes
    return [_run(tuple(run)) for run in runs]


def _go_together(a: Block, b: Block) -> bool:
    return (
        a.dtype == b.dtype
        and a.values == b.values
        and a.values in ("exact", "true")
        and a.positions is None
        and b.positions is None
        and max(a.size, b.size) <= _SMALL
    )


def _run(blocks: tuple[Block, ...]) -> TensorRun:
    views = []
    count = 0
    for block in blocks:
        views.append((block.shape, _strides(block.shape), count))
        count += block.count
    num_bytes = sum(block.position_bytes + block.value_bytes for block in blocks)
    return TensorRun(blocks, num_bytes, count, tuple(views))


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor."""
    strides, stride = [], 1
    for length in reversed(shape):
        strides.append(stride)
        stride *= max(length, 1)
    return tuple(reversed(strides))
