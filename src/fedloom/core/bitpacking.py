"""Whole numbers below a limit, each in as many bits as the limit needs, lowest bit first."""

import torch
from torch import Tensor


def pack(values: Tensor, limit: int) -> Tensor:
    """Return (n,) whole numbers, bool or not, of [0, limit) as uint8; zeros fill the last byte."""
    bits = values.long()[:, None] >> torch.arange(_width(limit)) & 1
    bits = bits.flatten()
    whole = torch.cat([bits, bits.new_zeros(-len(bits) % 8)]).view(-1, 8)
    return (whole << torch.arange(8)).sum(1).to(torch.uint8)


def unpack(packed: Tensor, limit: int, count: int) -> Tensor:
    """Return the (count,) int64 that were packed.

    Raises:
        ValueError: where there are more or fewer bytes than they take.
    """
    width = _width(limit)
    if packed.shape != (-(-count * width // 8),):
        raise ValueError(
            f"{count} numbers below {limit} take {-(-count * width // 8)} bytes, got shape {tuple(packed.shape)}"
        )
    bits = (packed.long()[:, None] >> torch.arange(8) & 1).flatten()[: count * width]
    return (bits.view(count, width) << torch.arange(width)).sum(1)


def _width(limit: int) -> int:
    return max(1, (limit - 1).bit_length())
