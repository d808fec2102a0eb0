"""The table of a payload: what each block of bytes means."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from fedloom.wire.compact import inflate, write_json
from fedloom.wire.positions import POSITION_CODECS
from fedloom.wire.quantize import VALUE_CODECS

DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.bool),
        *(torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
        *(torch.float8_e4m3fn, torch.float8_e5m2),
    )
}

MAX_JSON_BYTES = 1 << 22
"""Of a stranger's header or table: parsed JSON takes many times its length."""
_MAX_NAME_CHARACTERS = 1 << 24
_MAX_ENTRIES = 1 << 60
_MAX_AXES = 64


class WireError(ValueError):
    """A message that cannot be read, or a payload that cannot be written; names the tensor."""


@dataclass(frozen=True, slots=True)
class Block:
    """One tensor's bytes: positions, then values."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    values: str
    """Key in VALUE_CODECS."""
    count: int
    """Entries that travel."""
    positions: str | None = None
    """Key in POSITION_CODECS; None: all entries travel."""
    position_bytes: int = 0

    @property
    def size(self) -> int:
        """Return the number of entries."""
        return math.prod(self.shape)

    @property
    def decoded_bytes(self) -> int:
        """Return how much memory the tensor takes."""
        return self.size * DTYPES[self.dtype].itemsize

    @property
    def value_bytes(self) -> int:
        """Return the length of the values."""
        return VALUE_CODECS[self.values].num_bytes(self.count, DTYPES[self.dtype].itemsize)


Table = Mapping[str, Sequence[Block]]
"""Blocks by group, in the order of their bytes."""


def write_table(table: Table) -> bytes:
    """Return the table as deflated JSON.

    `[kinds, [[group, rows], ...]]`; a kind is `[dtype, values, shape]`, a row
    `[prefix, suffix, middle, kind]`, where prefix and suffix count the characters shared with the
    name before, followed by `positions, count, position_bytes` where not all entries travel.
    """
    kinds: dict[tuple[str, str, tuple[int, ...]], int] = {}
    groups: list[tuple[str, list[list[str | int]]]] = []
    previous = ""
    for group, blocks in table.items():
        rows: list[list[str | int]] = []
        for block in blocks:
            kind = kinds.setdefault((block.dtype, block.values, block.shape), len(kinds))
            row: list[str | int] = [*_shorten(previous, block.name), kind]
            if block.positions is not None:
                row += [block.positions, block.count, block.position_bytes]
            rows.append(row)
            previous = block.name
        groups.append((group, rows))
    return write_json([list(kinds), groups])


def read_table(data: memoryview, *, limit: int | None = MAX_JSON_BYTES) -> Table:
    """Return the table of a message, checked; `limit` is that of its text in bytes.

    Raises:
        WireError: where it is malformed or too large.
    """
    parsed = read_json(data, "table", limit=limit)
    table: dict[str, list[Block]] = {}
    previous, characters = "", 0
    match parsed:
        case [list(kinds), list(groups)]:
            known = [_read_kind(kind) for kind in kinds]
        case _:
            raise WireError("the table of the message is not [kinds, groups]")
    for entry in groups:
        match entry:
            case [str(group), list(rows)] if group not in table:
                table[group] = []
            case _:
                raise WireError(f"the table has a malformed or repeated group {_short(entry)}")
        names: set[str] = set()
        for row in rows:
            block = _read_row(row, previous, known, group)
            characters += len(block.name)
            if block.name in names or characters > _MAX_NAME_CHARACTERS:
                raise WireError(f"{group}/{block.name[:80]} is repeated, or names are too long")
            names.add(block.name)
            table[group].append(block)
            previous = block.name
    return table


def read_json(data: memoryview, what: str, *, limit: int | None) -> Any:
    """Return parsed JSON; `what` names it in the error, `limit` is that of its text in bytes."""
    try:
        text = inflate(data, limit)
    except ValueError as error:
        raise WireError(f"the {what} of the message is {error}") from None
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WireError(f"the {what} of the message is not JSON: {str(error)[:80]}") from None


@lru_cache(maxsize=1 << 12)
def _shorten(previous: str, name: str) -> tuple[int, int, str]:
    prefix = _num_common(previous, name)
    suffix = _num_common(previous[prefix:][::-1], name[prefix:][::-1])
    return prefix, suffix, name[prefix : len(name) - suffix]


def _num_common(a: str, b: str) -> int:
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def _read_kind(kind: Any) -> tuple[str, str, tuple[int, ...]]:
    match kind:
        case [str(dtype), str(values), list(shape)] if (
            dtype in DTYPES
            and values in VALUE_CODECS
            and (values in ("exact", "true") or dtype == "float32")
            and (values == "true") == (dtype == "bool")
            and len(shape) <= _MAX_AXES
            and all(type(length) is int and 0 <= length <= _MAX_ENTRIES for length in shape)
            # Zero hides no others: torch refuses strides beyond 63 bits even of empty tensors.
            and math.prod(max(length, 1) for length in shape) <= _MAX_ENTRIES
        ):
            return dtype, values, tuple(shape)
    raise WireError(f"the table has an unknown kind of tensor {_short(kind)}")


def _read_row(
    row: Any, previous: str, kinds: Sequence[tuple[str, str, tuple[int, ...]]], group: str
) -> Block:
    match row:
        case [int(prefix), int(suffix), str(middle), int(kind), *sparse] if (
            prefix >= 0
            and suffix >= 0
            and prefix + suffix <= len(previous)
            and 0 <= kind < len(kinds)
        ):
            name = previous[:prefix] + middle + previous[len(previous) - suffix :]
            dtype, values, shape = kinds[kind]
            size = math.prod(shape)
        case _:
            raise WireError(f"the table has a malformed row {_short(row)} in group {group[:80]}")
    match sparse:
        case []:
            return Block(name, dtype, shape, values, size)
        case [str(positions), int(count), int(position_bytes)] if (
            positions in POSITION_CODECS and 0 <= count <= size and position_bytes >= 0
        ):
            return Block(name, dtype, shape, values, count, positions, position_bytes)
    raise WireError(f"{group[:80]}/{name[:80]} has malformed positions {_short(sparse)}")


def _short(value: Any) -> str:
    return ascii(value)[:80]
