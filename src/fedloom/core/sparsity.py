"""Which entries of Params are kept, and Params without the others."""

from typing import Literal

import torch
from torch import Tensor

from fedloom.core.params import flat, params_map
from fedloom.core.protocols import Params

Scope = Literal["global", "tensor"]
"""Whether all tensors compete for places, or each has its own."""

_DIGIT = 16
"""Bits that one pass over the magnitudes tells apart."""
_ORDERED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def keep_largest(params: Params, density: float, *, scope: Scope = "global") -> Params:
    """Return `params` with zeros where `largest` is False; at density 1 the same object."""
    if density == 1:
        return params
    return restrict(params, largest(params, density, scope=scope))


def largest(params: Params, density: float, *, scope: Scope = "global") -> Params:
    """Return where the max(1, floor(n * density)) entries of largest magnitude are, as bool.

    Of equal ones the first count, tensors in sorted order of their names; NaN is larger than
    any number, so that it is not hidden.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must lie in (0, 1], got {density}")
    if scope == "tensor":
        return params_map(lambda t: _largest(t.flatten(), density).view(t.shape), params)
    if not params:
        return {}
    names = sorted(params)
    sizes = [params[name].numel() for name in names]
    pieces = torch.split_with_sizes(_largest(flat(params), density), sizes)
    masks = dict(zip(names, pieces, strict=True))
    return {name: masks[name].view(tensor.shape) for name, tensor in params.items()}


def support(params: Params) -> Params:
    """Return where entries are not zero, as bool."""
    return params_map(lambda t: t != 0, params)


def restrict(params: Params, mask: Params) -> Params:
    """Return `params` with +0.0 where `mask` is False: a product would leave -0.0, and it travels."""
    return params_map(lambda t, kept: torch.where(kept, t, 0), params, mask)


def _largest(values: Tensor, density: float) -> Tensor:
    """Return (n,) bool for (n,)."""
    count = max(1, int(values.numel() * density))
    if count >= values.numel():
        return torch.ones_like(values, dtype=torch.bool)
    # Bits of floats without sign are integers in the order of their magnitudes, on any device.
    magnitudes = values.abs().view(_ORDERED[values.element_size()])
    threshold, num_spare = _kth_largest(magnitudes, count)
    mask = magnitudes >= threshold
    if num_spare:
        mask[(magnitudes == threshold).nonzero().view(-1)[-num_spare:]] = False
    return mask


def _kth_largest(numbers: Tensor, k: int) -> tuple[int, int]:
    """Return the k-th largest of numbers that are not negative, and how many more there are of it.

    Digit by digit, from the highest: a histogram finds the digit, and only the numbers that have
    it go on to the next. A pass is linear, where sorting and torch.topk are not.
    """
    prefix, top = 0, (1 << _DIGIT) - 1
    num_spare = 0
    for shift in reversed(range(0, 8 * numbers.element_size(), _DIGIT)):
        digits = numbers >> shift
        at_least = torch.bincount(digits, minlength=top + 1).flip(0).cumsum(0)
        place = int(torch.searchsorted(at_least, k))
        num_spare = int(at_least[place]) - k
        k -= int(at_least[place - 1]) if place else 0
        prefix = prefix << _DIGIT | top - place
        if shift:
            numbers = numbers[digits == top - place] & (1 << shift) - 1
    return prefix, num_spare
