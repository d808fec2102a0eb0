"""How much of clients' noise comes back round after round: what is new each time averages out over rounds, the rest does not.

A client's update is its cluster's mean plus noise of expected squared length s2. A part of it, `lasting`, is the client's own
way and the same in each round; the rest is new each time, batches drawn and orders. Over rounds a cluster's moves add up. With
q_it the weight of client i in its cluster's mean of round t (0 where it did not reply), A_i = sum over t of q_it and n rounds, the
noise in the mean of the cluster's n moves is

    s2 (lasting sum_i A_i^2 + (1 - lasting) sum_it q_it^2) / n^2

which is s2 h in the first round, and with k clients of equal weight who always reply, s2 (lasting + (1 - lasting) / n) / k. What
lasts is estimated by moments: residuals r_it = u_it - (its cluster's mean) of different rounds have an expected product of
lasting s2 (1 - q_it - q_is + sum_j q_jt q_js). Products are of a sample of an update's entries, so that what is kept of a client is small.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedloom.core.protocols import ClientId, Params

SAMPLE = 4096
"""Entries of an update that are remembered, about; of each tensor at least one."""
_NOTHING = 1e-9


@dataclass(frozen=True)
class Memory:
    """What earlier rounds leave: of clusters, of clients since they came to theirs, and of the products of residuals."""

    rounds: Mapping[int, int] = field(default_factory=dict)
    """In which somebody of a cluster replied: n."""
    shares: Mapping[int, Mapping[ClientId, float]] = field(default_factory=dict)
    """A_i in each cluster of whoever replied."""
    squares: Mapping[int, float] = field(default_factory=dict)
    """The sum of all q_it^2 of each cluster."""
    owners: Mapping[ClientId, int] = field(default_factory=dict)
    """The cluster of each client that replied, as of its last reply."""
    replies: Mapping[ClientId, int] = field(default_factory=dict)
    """How often it has replied there."""
    weights: Mapping[ClientId, float] = field(default_factory=dict)
    """The sum of its q_it there."""
    moved: Mapping[ClientId, Tensor] = field(default_factory=dict)
    """The sum of its residuals there, (entries sampled,)."""
    products: float = 0.0
    """Of residuals of two rounds, summed up."""
    pairs: float = 0.0
    """How often what lasts is in them."""
    squared: float = 0.0
    """Of residuals themselves, summed up."""
    singles: float = 0.0
    """How often the noise is in those."""

    @property
    def is_compared(self) -> bool:
        """Return whether two rounds could be compared."""
        return self.pairs >= _NOTHING and self.squared > 0

    @property
    def lasting(self) -> float:
        """Return the part of the noise that comes back, [0, 1]; 1 until two rounds can be compared."""
        if not self.is_compared:
            return 1.0
        return min(max(self.products / self.pairs / (self.squared / self.singles), 0.0), 1.0)

    def noise(self, cluster: int) -> float:
        """Return how often the noise of one client is in the mean of a cluster's moves so far."""
        always = sum(share**2 for share in self.shares[cluster].values())
        lasting = self.lasting
        both = lasting * always + (1 - lasting) * self.squares[cluster]
        return both / self.rounds[cluster] ** 2


@dataclass(frozen=True)
class Heard:
    """A client's reply inside its cluster."""

    client: ClientId
    cluster: int
    share: float
    """q, its part of the cluster's mean."""
    residual: Tensor
    """Its update less that mean, (entries sampled,)."""


def sample_of(update: Params) -> Tensor:
    """Return entries of an update, the same ones each time, (about SAMPLE,) float32."""
    # An odd step does not fall on one column of matrices whose width is a power of two.
    step = (sum(tensor.numel() for tensor in update.values()) // SAMPLE) | 1
    return torch.cat([tensor.flatten()[::step].float() for tensor in update.values()])


def remembered(memory: Memory, heard: Sequence[Heard]) -> Memory:
    """Return what is known with a round's replies."""
    own: dict[int, dict[ClientId, float]] = {}
    for reply in heard:
        own.setdefault(reply.cluster, {})[reply.client] = reply.share
    sums = {k: sum(share**2 for share in shares.values()) for k, shares in own.items()}
    products, pairs, squared, singles = 0.0, 0.0, 0.0, 0.0
    owners, moved = dict(memory.owners), dict(memory.moved)
    replies, weights = dict(memory.replies), dict(memory.weights)
    for reply in heard:
        c, k = reply.client, reply.cluster
        squared += float(torch.dot(reply.residual, reply.residual))
        singles += 1 - 2 * reply.share + sums[k]
        if owners.get(c) != k:
            owners[c], moved[c] = k, torch.zeros_like(reply.residual)
            replies[c], weights[c] = 0, 0.0
        elif replies[c]:
            products += float(torch.dot(reply.residual, moved[c]))
            pairs += _pairs_of(memory, reply, own[k])
        moved[c] = moved[c] + reply.residual
        replies[c], weights[c] = replies[c] + 1, weights[c] + reply.share
    past = {k: memory.shares.get(k, {}) for k in own}
    return Memory(
        {**memory.rounds, **{k: memory.rounds.get(k, 0) + 1 for k in own}},
        {
            **memory.shares,
            **{
                k: {**past[k], **{c: past[k].get(c, 0.0) + q for c, q in shares.items()}}
                for k, shares in own.items()
            },
        },
        {**memory.squares, **{k: memory.squares.get(k, 0.0) + sums[k] for k in own}},
        owners,
        replies,
        weights,
        moved,
        memory.products + products,
        memory.pairs + pairs,
        memory.squared + squared,
        memory.singles + singles,
    )


def _pairs_of(memory: Memory, reply: Heard, shares: Mapping[ClientId, float]) -> float:
    """Return how often what lasts is in the products of a residual and all earlier ones of its client.

    Exact where the same clients of a cluster always reply; else the others count as they do in all of its rounds.
    """
    k, known = reply.cluster, memory.replies[reply.client]
    met = sum(share * memory.shares[k].get(c, 0.0) for c, share in shares.items())
    others = known * (1 - reply.share + met / memory.rounds[k])
    return max(0.0, others - memory.weights[reply.client])
