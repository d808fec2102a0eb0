"""Whether clusters should go further their own way than their noise alone says: what they want again tells.

Shrinkage weighs squared lengths, as if noise in every entry of a model cost as much as what is missed of the cluster's own way.
What noise costs depends on the loss, and that no upload tells; but the next upload tells what is still missing. Where cluster c
went lambda of its deviation d_s of round s, its deviation of the next round t is along d_s as long as it has gone too short
and against it once it has gone too far, and noise that was followed is against it, too: the product of d_s and d_t is the slope of
the cluster's loss along d_s, times a step (hypergradient: Baydin et al., Online Learning Rate Adaptation with Hypergradient
Descent, ICLR 2018, arXiv:1703.04782). If a deviation falls by the share r, as <d_t, d_s> = r |d_s|^2, then d_s is used up at
lambda / (1 - r), the secant step of Barzilai and Borwein (IMA Journal of Numerical Analysis 8, 1988). The odds of lambda are
multiplied by a gain, 1 at first and never less, that goes that way by a factor of 2 a round at most, and only where the product
differs from 0 by more than twice its standard error.

Both sides are freed of noise. With p_i a client's part of everybody's mean and q_i of its cluster's (0 outside), the noise of a round
adds s2 sum_c sum_i (q_i - p_i)^2 to the squares, and what comes back of a client's own way in the next round adds
v sum_c sum_i (q_it - p_it) (q_is - p_is) to the products, where v is how much residuals about clusters' means agree in the two.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedloom.clustering.persistence import Heard
from fedloom.core.protocols import ClientId

MOST = 2.0
"""A round changes the gain by this factor at most, up or down."""
SURE = 2.0
"""Standard errors that count as a difference."""
_NOTHING = 1e-9
_FEWEST = 32
"""Entries that a standard error is told from."""
_LEAST = 0.01
"""Clusters that went less of their own way than this cannot have gone too far."""


@dataclass(frozen=True)
class Pace:
    """The gain, and the last round by which the next one will tell."""

    gain: float = 1.0
    """The odds of lambda are multiplied by it, >= 1."""
    went: float = 0.0
    """Mean lambda of the last round."""
    deviations: Mapping[int, Tensor] = field(default_factory=dict)
    """d_s of each cluster that replied, (entries sampled,)."""
    residuals: Mapping[ClientId, Tensor] = field(default_factory=dict)
    """Of whoever replied inside a cluster, (entries sampled,)."""
    owners: Mapping[ClientId, int] = field(default_factory=dict)
    """Their clusters; nothing of others."""
    shares: Mapping[ClientId, float] = field(default_factory=dict)
    """q_i of these."""
    parts: Mapping[ClientId, float] = field(default_factory=dict)
    """p_i of all."""


def paced(
    known: Pace,
    heard: Sequence[Heard],
    parts: Mapping[ClientId, float],
    deviations: Mapping[int, Tensor],
) -> Pace:
    """Return the gain with what a round tells of the one before, and what the next one will be compared with.

    Args:
        known: Of the round before.
        heard: Replies inside clusters.
        parts: p_i of everybody who replied.
        deviations: Of each cluster that replied, its mean less everybody's, (entries sampled,).
    """
    now = replace(
        known,
        deviations=deviations,
        residuals={reply.client: reply.residual for reply in heard},
        owners={reply.client: reply.cluster for reply in heard},
        shares={reply.client: reply.share for reply in heard},
        parts=parts,
    )
    share = _left(known, now) if known.went >= _LEAST else None
    if share is None:
        return now
    factor = min(max(1 / (1 - min(share, 1 - 1 / MOST)), 1 / MOST), MOST)
    return replace(now, gain=max(1.0, known.gain * factor))


def _left(before: Pace, now: Pace) -> float | None:
    """Return r, the share of clusters' deviations that is still there a round later; None where it cannot be told."""
    clusters = sorted(before.deviations.keys() & now.deviations.keys())
    both = [
        c
        for c in sorted(before.owners.keys() & now.owners.keys())
        if before.owners[c] == now.owners[c]
    ]
    pairs = sum(_pairs(before, now, c) for c in both)
    single = sum(_pairs(before, before, c) for c in sorted(before.owners))
    entries = sum(before.deviations[k].numel() for k in clusters[:1])
    if entries < _FEWEST or pairs < _NOTHING or single < _NOTHING:
        return None
    products = _sum_of(before.deviations[k] * now.deviations[k] for k in clusters)
    # What comes back of clients' own way: its products, as often as it is in those of clusters.
    own = _sum_of(before.residuals[c] * now.residuals[c] for c in both)
    products = products - own * (_leaked(before, now, clusters) / pairs)
    product = float(products.sum())
    error = math.sqrt(products.numel() * float(products.var(correction=0)))
    noise = sum(float(torch.dot(r, r)) for r in before.residuals.values()) / single
    squares = _sum_of(before.deviations[k].square() for k in clusters)
    wanted = float(squares.sum()) - noise * _leaked(before, before, clusters)
    if wanted <= 0 or abs(product) < SURE * error:
        return None
    return product / wanted


def _sum_of(tensors: Iterable[Tensor]) -> Tensor:
    """Return the sum of at least one tensor of one shape."""
    return torch.stack(list(tensors)).sum(0)


def _pairs(one: Pace, other: Pace, client: ClientId) -> float:
    """Return how often a client's variance is in the product of its residuals of two rounds."""
    k = one.owners[client]
    met = sum(
        q * other.shares.get(c, 0.0)
        for c, q in one.shares.items()
        if one.owners[c] == k == other.owners.get(c)
    )
    return 1 - one.shares[client] - other.shares[client] + met


def _leaked(one: Pace, other: Pace, clusters: Sequence[int]) -> float:
    """Return how often clients' variance is in the products of clusters' deviations of two rounds."""
    total = 0.0
    for k in clusters:
        for client in sorted(one.parts.keys() & other.parts.keys()):
            first, second = (
                (each.shares[client] if each.owners.get(client) == k else 0.0) - each.parts[client]
                for each in (one, other)
            )
            total += first * second
    return total
