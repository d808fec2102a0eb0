"""Whole numbers below a limit, each in as many bits as the limit needs, lowest bit first."""

import torch
from torch import Tensor

_BYTE = 8
"""Numbers of a group, which takes as many whole bytes as one number takes bits."""


def pack(values: Tensor, limit: int) -> Tensor:
    """Return (n,) whole numbers, bool or not, of [0, limit) as uint8; zeros fill the last byte."""
    width, count = _width(limit), values.numel()
    groups = values.long().new_zeros(-(-count // _BYTE), _BYTE)
    groups.view(-1)[:count] = values.long()
    out = torch.empty(len(groups), width, dtype=torch.uint8)
    for at in range(width):
        # Of the numbers that lie in this byte, the bits that do.
        first, last = _BYTE * at // width, (_BYTE * at + _BYTE - 1) // width
        byte = torch.zeros(len(groups), dtype=torch.int64)
        for number in range(first, last + 1):
            byte |= _shifted(groups[:, number], number * width - _BYTE * at)
        out[:, at] = byte & 0xFF
    return out.view(-1)[: -(-count * width // _BYTE)].clone()


def unpack(packed: Tensor, limit: int, count: int) -> Tensor:
    """Return the (count,) int64 that were packed.

    Raises:
        ValueError: where there are more or fewer bytes than they take.
    """
    width = _width(limit)
    if packed.shape != (-(-count * width // _BYTE),):
        raise ValueError(
            f"{count} numbers below {limit} take {-(-count * width // _BYTE)} bytes, got shape {tuple(packed.shape)}"
        )
    groups = torch.zeros(-(-count // _BYTE), width, dtype=torch.uint8)
    groups.view(-1)[: len(packed)] = packed
    out = torch.empty(len(groups), _BYTE, dtype=torch.int64)
    for number in range(_BYTE):
        first, last = number * width // _BYTE, (number * width + width - 1) // _BYTE
        whole = torch.zeros(len(groups), dtype=torch.int64)
        for at in range(first, last + 1):
            whole |= _shifted(groups[:, at].long(), _BYTE * at - number * width)
        out[:, number] = whole & (1 << width) - 1
    return out.view(-1)[:count].clone()


def _width(limit: int) -> int:
    return max(1, (limit - 1).bit_length())


def _shifted(numbers: Tensor, places: int) -> Tensor:
    """Return numbers that are not negative, up by so many places, or down."""
    return numbers << places if places >= 0 else numbers >> -places
