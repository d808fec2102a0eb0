"""Ranks that clients give up while they train (HetLoRA, arXiv:2401.06432, section 4, "rank self-pruning").

A client of rank r trains with strength |B_t| |A_t| added to its loss, where B_t and A_t are the last columns of B and rows of
A, those from floor(gamma r) on, and the norms are Frobenius's. Where the sum of that over layers is smaller after training
than before, they are cut off: the client sends floor(gamma r) columns, and has that rank from then on.

The paper has one pair of factors a client and speaks of no layers: that layers are added up, and that a client has one rank for
all of them, is ours. So are the strength's default, which the paper names no value for that we know of, and that no rank falls
below `least`. As B begins at zero, nobody is cut in the first round.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fedloom.core.protocols import ClientId, Params, Reply, Tail
from fedloom.server.combine.products import pairs

RANK = "rank"
"""The group of an upload, and its one name, that say how many columns its sender keeps."""


@dataclass(frozen=True, slots=True)
class RankPruning:
    """Clients give up the last columns of their adapters where training makes them smaller."""

    gamma: float = 0.99
    """The share of a client's columns that is kept at a time, rounded down."""
    strength: float = 0.01
    """Of the pull of the others towards zero."""
    least: int = 1
    """The rank at which it ends."""

    def __post_init__(self) -> None:
        if not 0 < self.gamma < 1:
            raise ValueError(f"fedlora.prune.gamma must be above 0 and below 1, got {self.gamma}")
        if not (self.strength >= 0 and math.isfinite(self.strength)):
            raise ValueError(f"fedlora.prune.strength must be a number from 0, got {self.strength}")
        if self.least < 1:
            raise ValueError(f"fedlora.prune.least must be at least 1, got {self.least}")

    def kept(self, rank: int) -> int:
        """Return the rank that a client of this one has once it was cut; the same where it is cut no further."""
        return max(min(self.least, rank), math.floor(self.gamma * rank))

    def tail(self, params: Params, rank: int) -> Tail | None:
        """Return what pulls a client's last columns; None where none can be cut."""
        kept = self.kept(rank)
        return Tail(self.strength, tuple(pairs(params)), kept, rank) if kept < rank else None

    def after(self, began: Params, ended: Params, rank: int) -> int:
        """Return a client's rank after training: as before, or that of `kept`."""
        kept = self.kept(rank)
        smaller = tail_size(ended, kept, rank) < tail_size(began, kept, rank)
        return kept if smaller else rank

    def said(self, replies: Sequence[Reply], had: Mapping[ClientId, int]) -> dict[ClientId, int]:
        """Return the ranks that clients say they have from now on, as before where what they say cannot be."""
        found = {}
        for reply in replies:
            rank = int(reply.upload[RANK][RANK])
            before = had[reply.client]
            found[reply.client] = rank if rank == self.kept(before) else before
        return found


def tail_size(params: Params, first: int, last: int) -> float:
    """Return the sum over layers of |B[:, first:last]| |A[first:last]|."""
    norm = torch.linalg.matrix_norm
    return math.fsum(
        float(norm(params[b][:, first:last].double()) * norm(params[a][first:last].double()))
        for a, b in pairs(params)
    )


def without_tail(delta: Params, kept: int) -> Params:
    """Return what a client moved with zeros behind the columns that it keeps: they cost next to nothing to send."""
    changed = {}
    for a, b in pairs(delta):
        changed[a], changed[b] = delta[a].clone(), delta[b].clone()
        changed[a][kept:] = 0
        changed[b][:, kept:] = 0
    return {**delta, **changed}
