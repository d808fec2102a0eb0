"""The tensors of a run <-> bytes: all entries, or those that are not zero and where they are."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fedloom.wire.layout import TensorRun
from fedloom.wire.positions import POSITION_CODECS, PlannedCode, Positions, mask_of
from fedloom.wire.quantize import VALUE_CODECS
from fedloom.wire.table import DTYPES, Block, WireError

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_WORTH_BYTES = 48
"""A sparse tensor's row is longer by less."""


def write_run(
    group: str, run: TensorRun, tensors: Sequence[Tensor], *, sparse: bool
) -> tuple[Sequence[Block], list[bytes | memoryview]]:
    """Return how the tensors of a run are written, and their bytes in pieces.

    Raises:
        WireError: where one cannot be rounded as its block says.
    """
    entries = _side_by_side(tensors)
    if len(tensors) > 1 and _is_full(run, entries, sparse=sparse):
        return run.blocks, [VALUE_CODECS[run.blocks[0].values].encode(entries)]
    blocks: list[Block] = []
    pieces: list[bytes | memoryview] = []
    for block, (_, _, start) in zip(run.blocks, run.views, strict=True):
        own = entries[start : start + block.size]
        layout = _lay_out(block, own) if sparse or block.values == "true" else _Layout(block)
        try:
            pieces += _encode(layout, own)
        except ValueError as error:
            raise WireError(
                f"{group}/{block.name} cannot travel as {block.values}: it {error}"
            ) from None
        blocks.append(layout.block)
    return blocks, pieces


def read_run(group: str, run: TensorRun, data: memoryview) -> dict[str, Tensor]:
    """Return the tensors of a run by name, in memory of their own.

    Raises:
        WireError: where the bytes are no such tensors.
    """
    first = run.blocks[0]
    try:
        if first.positions is not None:
            return {first.name: _decode_sparse(first, first.positions, data)}
        entries = VALUE_CODECS[first.values].decode(data, run.count, DTYPES[first.dtype])
    except ValueError as error:
        raise WireError(f"{group}/{first.name} is malformed: {error}") from None
    named = zip(run.blocks, run.views, strict=True)
    return {block.name: entries.as_strided(*view) for block, view in named}


@dataclass(frozen=True, slots=True)
class _Layout:
    block: Block
    plan: PlannedCode | None = None
    """Of the positions `where`; None: all entries travel."""
    where: Positions | None = None


def _side_by_side(tensors: Sequence[Tensor]) -> Tensor:
    """Return (numel,) entries, side by side."""
    with torch.no_grad():
        flat = [tensor.cpu().reshape(-1) for tensor in tensors]
        return flat[0].detach() if len(flat) == 1 else torch.cat(flat)


def _is_full(run: TensorRun, entries: Tensor, *, sparse: bool) -> bool:
    if not sparse and run.blocks[0].values != "true":
        return True
    return int(np.count_nonzero(_bits(entries).numpy())) == run.count


def _lay_out(dense: Block, tensor: Tensor) -> _Layout:
    """Find the shortest way to write a tensor."""
    codec, width = VALUE_CODECS[dense.values], tensor.element_size()
    bits = _bits(tensor).numpy()
    travels = bits != 0
    count, size = int(np.count_nonzero(travels)), dense.size
    # The False of a mask are not written at all; other zeros are left out where that is shorter.
    limit = math.inf if dense.values == "true" else dense.value_bytes - _WORTH_BYTES
    num_bytes = codec.num_bytes(count, width)
    if count == size or num_bytes + min(count, size - count) // 8 >= limit:  # at least a bit each
        return _Layout(dense)
    where = np.flatnonzero(travels)
    plans = {key: code.plan(where, size) for key, code in POSITION_CODECS.items()}
    best = min(plans, key=lambda key: plans[key].num_bytes)
    if num_bytes + plans[best].num_bytes >= limit:
        return _Layout(dense)
    position_bytes = plans[best].num_bytes
    block = replace(dense, count=count, positions=best, position_bytes=position_bytes)
    return _Layout(block, plans[best], where)


def _encode(layout: _Layout, tensor: Tensor) -> tuple[bytes, bytes | memoryview]:
    codec, bits = VALUE_CODECS[layout.block.values], _bits(tensor)
    if layout.plan is None or layout.where is None:
        return b"", codec.encode(bits.view(tensor.dtype))
    entries = torch.empty(layout.block.count, dtype=bits.dtype)
    # All positions are within: clipping spares a copy in which they would be checked.
    np.take(bits.numpy(), layout.where, out=entries.numpy(), mode="clip")
    return layout.plan.write(), codec.encode(entries.view(tensor.dtype))


def _bits(tensor: Tensor) -> Tensor:
    """Return (numel,) integers: -0.0 is an entry then, and every type can be indexed."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(_BITS[tensor.element_size()])


def _decode_sparse(block: Block, positions: str, data: memoryview) -> Tensor:
    dtype = DTYPES[block.dtype]
    codec = POSITION_CODECS[positions]
    index = codec.decode(data[: block.position_bytes], block.size, block.count)
    if block.values == "true":
        return torch.from_numpy(mask_of(index, block.size)).reshape(block.shape)
    values = data[block.position_bytes :]
    entries = VALUE_CODECS[block.values].decode(values, block.count, dtype)
    bits = torch.zeros(block.size, dtype=_BITS[dtype.itemsize])
    where = index if index.dtype == np.int64 else np.flatnonzero(index)
    bits.scatter_(0, torch.from_numpy(where), entries.view(bits.dtype))
    return bits.view(dtype).reshape(block.shape)
