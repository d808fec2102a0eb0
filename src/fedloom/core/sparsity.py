"""Which entries of Params are kept, and what share that is by round and tier; Params without the others, and whole again."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fedloom.core.params import flat, params_map
from fedloom.core.protocols import Algorithm, Metrics, Params, Profile

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
    return params_map(lambda t, where: torch.where(where, t, 0), params, mask)


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


def pick(params: Params, mask: Params) -> Params:
    """Return each tensor's kept entries in their order, 1-D: `mask` says where they lie."""
    return params_map(lambda t, where: t[where], params, mask)


def fill(values: Params, mask: Params) -> Params:
    """Return whole tensors of what `pick` returned, +0.0 where nothing was kept."""

    def whole(entries: Tensor, where: Tensor) -> Tensor:
        return torch.zeros(where.shape, dtype=entries.dtype).masked_scatter_(where, entries)

    return params_map(whole, values, mask)


def num_nonzero(mask: Params) -> int:
    """Return the number of entries that are not zero."""
    return sum(int(t.count_nonzero()) for t in mask.values())


def densities(masks: Iterable[Params]) -> Metrics:
    """Return the share kept of all entries, and of each tensor's: means over the masks, one a client."""
    counts: dict[str, float] = {}
    sizes: dict[str, int] = {}
    counted: dict[int, dict[str, int]] = {}
    alive = []
    for mask in masks:
        # An id is unique only while its object lives.
        alive.append(mask)
        if id(mask) not in counted:
            counted[id(mask)] = {name: int(t.count_nonzero()) for name, t in mask.items()}
        for name, count in counted[id(mask)].items():
            counts[name] = counts.get(name, 0) + count
            sizes[name] = sizes.get(name, 0) + mask[name].numel()
    if not sum(sizes.values()):
        return {}
    tensors = {f"density/{name}": counts[name] / max(size, 1) for name, size in sizes.items()}
    return {"download_density": sum(counts.values()) / sum(sizes.values()), **tensors}


@dataclass(frozen=True, slots=True)
class Density:
    """A share of entries, (0, 1], that may change by round and differ by tier."""

    start: float = 0.25
    """Share of the entries that are kept; where `tiers` name a client's, theirs."""
    decay: float = 1.0
    """What the share is multiplied by after every `every` rounds, (0, 1]; 1 is constant."""
    every: int = 1
    """Rounds between two decays."""
    least: float = 0.0
    """The share never decays below this."""
    warm: int = 0
    """First rounds in which everything is kept; decay counts from the first round after them."""
    tiers: Mapping[str, float] = field(default_factory=dict)
    """Shares by the `tier` of a client's profile, in the place of `start`."""

    def __post_init__(self) -> None:
        shares = {"start": self.start, "decay": self.decay}
        shares |= {f"tiers.{tier}": share for tier, share in self.tiers.items()}
        for name, share in shares.items():
            if not 0 < share <= 1:
                raise ValueError(f"a density's {name} must be in (0, 1], got {share}")
        if not 0 <= self.least <= min(self.start, *self.tiers.values(), 1.0):
            raise ValueError(
                f"a density's least must be in [0, start], and below every tier's, got {self.least}"
            )
        if self.every < 1:
            raise ValueError(f"a density's every must be at least 1, got {self.every}")
        if self.warm < 0:
            raise ValueError(f"a density's warm must be a number of rounds, got {self.warm}")

    def at(self, round: int, profile: Profile) -> float:
        """Return the share of a client in a round, counted from 1: the same on both sides."""
        if round <= self.warm:
            return 1.0
        share = self.tiers.get(profile.get("tier", ""), self.start)
        return max(share * self.decay ** ((round - 1 - self.warm) // self.every), self.least)

    @property
    def thins(self) -> bool:
        """Return whether there may be a client in whose messages anything is left out."""
        return min(self.start, self.decay, *self.tiers.values()) < 1


def check_comparable(inner: Algorithm[Any], setting: str, *, apart: bool) -> None:
    """Refuse uploads of entries that differ by client where the server compares whole ones: what is missing is no zero."""
    if apart and inner.server_sees == "each in full":
        raise ValueError(
            f"{setting} gives every client a mask of its own, but a robust combine below it compares uploads entry by"
            " entry: take one share for all of them, or combine: mean"
        )
