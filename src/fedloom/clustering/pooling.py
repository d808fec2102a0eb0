"""Partial pooling: how much of its own way each cluster goes, decided from rounds' uploads, tensor by tensor.

The model is one of random effects. A client's update is its cluster's mean plus noise of expected squared length s2 (`noise`),
a cluster's mean is everybody's plus a deviation of expected squared length tau2 (`spread`). Both are estimated by moments
(Henderson, Estimation of Variance and Covariance Components, Biometrics 9, 1953), and a cluster's deviation is shrunk by the
share of it that is no noise, an empirical Bayes estimate (Efron, Morris, Stein's Estimation Rule and Its Competitors, Journal
of the American Statistical Association 68, 1973): lambda 0 is one model for all, 1 a model for each.

With weights p_i that add up to 1, P_c those of cluster c together, q_i = p_i / P_c, D_c and D the means of a cluster and of
all, h_c = sum q_i^2, h = sum p_i^2 and S = sum P_c^2:

    noise  = sum_c sum_i p_i |u_i - D_c|^2 / sum_c P_c (1 - h_c)
    raw    = (sum_c |D_c - D|^2 - noise sum_c (h_c (1 - 2 P_c) + h)) / sum_c (1 - 2 P_c + S)
    spread = (spread + raw) / 2
    tau2   = max(0, spread) max(0, sum spread) / sum max(0, spread),  the sums over tensors
    lambda_c = gain tau2 / (gain tau2 + noise H_c),  and c moves by D + lambda_c (D_c - D)

H_c is how often the noise of one client is in the mean of all of the cluster's moves (`clustering.persistence`): h_c in its first
round, and less the more of the noise is new in each. The gain is 1 or more (`clustering.pace`). Under a server that makes another
step of the mean than the mean times a number, H_c is h_c and the gain 1.

Who replied and has no cluster counts as a cluster of its own in D, h and S only. A spread is unbiased as long as it may be
negative; cut off at 0, those of clusters made by chance would be above it in half of the tensors. So the cut ones are scaled
until all tensors have together what they had before: nearly nothing where there is nothing, everything where there is much.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedloom.clustering.pace import Pace, paced
from fedloom.clustering.persistence import Heard, Memory, remembered, sample_of
from fedloom.core.payloads import NoReplies, accumulator
from fedloom.core.protocols import ClientId, Params, Reply

ALIKE = 0.01
"""Clusters that go less of their own way than this go nearly all the way with everybody."""
_NOTHING = 1e-9
"""Sums of weights that are rounding alone."""


@dataclass(frozen=True)
class Variances:
    """What is known of the uploads so far, by tensor."""

    noise: Mapping[str, float] = field(default_factory=dict)
    """s2, the expected squared distance of a client's update from its cluster's mean; as of the last round that tells."""
    spread: Mapping[str, float] = field(default_factory=dict)
    """Of a cluster's mean from everybody's, recent rounds counting most; negative where noise explains more than all."""
    alike: int = 0
    """Rounds in a row in which clusters went nearly all the way with everybody, as their spread says."""
    memory: Memory = field(default_factory=Memory)
    """How much of the noise averages out over rounds."""
    pace: Pace = field(default_factory=Pace)
    """How much further than that clusters should go."""

    def tau2(self) -> Mapping[str, float]:
        """Return the spreads as they are used: cut off at 0, and scaled so that all add up to what they were."""
        cut = {name: max(0.0, spread) for name, spread in self.spread.items()}
        total = sum(cut.values())
        kept = max(0.0, sum(self.spread.values())) / total if total else 0.0
        return {name: spread * kept for name, spread in cut.items()}

    def own_shares(self) -> Mapping[str, float]:
        """Return the share of its own deviation that a single client keeps of each tensor: mu; 0 of those not in it."""
        return {name: own_share(t, self.noise[name]) for name, t in self.tau2().items() if t}

    def with_spread(self, name: str, raw: float) -> float:
        """Return the spread of a tensor with a round's estimate in it."""
        return (self.spread[name] + raw) / 2 if name in self.spread else raw


def own_share(tau2: float, noise: float) -> float:
    """Return the share of its own deviation that a mean keeps: lambda of a cluster, mu of one client.

    Args:
        tau2: Expected squared deviation of what the mean is of.
        noise: Of the mean.
    """
    return tau2 / (tau2 + noise) if tau2 else 0.0


@dataclass(frozen=True)
class Shares:
    """Weights of a round's replies, put together; all are shares of their sum."""

    of: Mapping[int, float]
    """P_c of each cluster that replied."""
    concentration: Mapping[int, float]
    """h_c of each: 1 / the number of clients that its mean is as good as."""
    all_concentration: float
    """h, of everybody."""
    squares: float
    """S, the sum of P_c^2."""

    @property
    def free(self) -> float:
        """Return how much of the noise is seen inside clusters: 0 where each that replied has one client."""
        return sum(share * (1 - self.concentration[k]) for k, share in self.of.items())

    @property
    def apart(self) -> float:
        """Return how often the spread is in the squared deviations of clusters: their number less 1 where they are alike."""
        return sum(1 - 2 * share + self.squares for share in self.of.values())

    @property
    def leaked(self) -> float:
        """Return how often the noise is in them."""
        return sum(
            self.concentration[k] * (1 - 2 * share) + self.all_concentration
            for k, share in self.of.items()
        )


def shares_of(replies: Sequence[Reply], cluster_of: Mapping[ClientId, int]) -> Shares:
    """Return how a round's replies, whose weights are positive, are spread over clusters."""
    total = sum(reply.weight for reply in replies)
    of, squares, alone = dict[int, float](), dict[int, float](), 0.0
    for reply in replies:
        share = reply.weight / total
        cluster = cluster_of.get(reply.client)
        if cluster is None:
            alone += share**2
        else:
            of[cluster] = of.get(cluster, 0.0) + share
            squares[cluster] = squares.get(cluster, 0.0) + share**2
    return Shares(
        of,
        {k: squares[k] / of[k] ** 2 for k in of},
        sum(squares.values()) + alone,
        sum(share**2 for share in of.values()) + alone,
    )


@dataclass(frozen=True)
class Pooled:
    """A round's uploads as the model for all and every cluster is taught them."""

    whole: Params
    """D, everybody's mean."""
    means: Mapping[int, Params]
    """D_c of each cluster that replied."""
    shares: Shares
    variances: Variances
    """With this round's."""
    tau2: Mapping[str, float]
    """Of them, by tensor; 0 of those that are not in it."""

    def keeps(self, cluster: int, name: str) -> float:
        """Return lambda of a cluster that replied, the share of its own deviation that it keeps of a tensor."""
        tau2, noise = self.tau2.get(name, 0.0), self.variances.noise.get(name, 0.0)
        memory, once = self.variances.memory, self.shares.concentration[cluster]
        noise *= memory.noise(cluster) if cluster in memory.rounds else once
        return own_share(tau2 * self.variances.pace.gain, noise)

    def move(self, cluster: int) -> Params:
        """Return the mean update that a cluster is taught."""
        if cluster in self.means:
            own = self.means[cluster]
            # Exact at both ends: everybody's mean at 0, the cluster's at 1.
            return {n: torch.lerp(t, own[n], self.keeps(cluster, n)) for n, t in self.whole.items()}
        return {name: tensor * self._follows(name, tensor) for name, tensor in self.whole.items()}

    def _follows(self, name: str, mean: Tensor) -> float:
        """Return how far a cluster without a reply goes along everybody's mean, in which others' deviations are."""
        deviations = self.tau2.get(name, 0.0) * self.shares.squares
        length = _squared(mean)
        return max(0.0, 1 - deviations / length) if deviations and length else 1.0

    @property
    def mean_lambda(self) -> float:
        """Return the mean of all clusters that replied."""
        return statistics.fmean(self.lambdas.values())

    @property
    def lambdas(self) -> Mapping[int, float]:
        """Return lambda of each cluster that replied, a mean over tensors by their sizes."""
        sizes = {name: tensor.numel() for name, tensor in self.whole.items()}
        total = sum(sizes.values())
        return {
            k: sum(size * self.keeps(k, name) for name, size in sizes.items()) / total
            for k in sorted(self.means)
        }


def pool(
    replies: Sequence[Reply],
    cluster_of: Mapping[ClientId, int],
    known: Variances,
    *,
    deciding: bool = False,
    by_itself: bool = False,
) -> Pooled:
    """Return what a round's replies teach, and the variances with it.

    Args:
        replies: Of the cohort; of their uploads only `delta` is read.
        cluster_of: The cluster of everybody who has one.
        known: Of the rounds before.
        deciding: Whether these very replies decided who is where. Clusters are then apart by choice, noise and all, so the
            spread stays what other rounds say.
        by_itself: Whether nothing is asked of other rounds but the spread: where a server's step is another than what it is
            taught times a number, moves are no sums of updates.

    Raises:
        NoReplies: where nobody replied, or all weights are zero.
    """
    told = [reply for reply in replies if reply.weight]
    if not told:
        raise NoReplies("no client replied")
    shares = shares_of(told, cluster_of)
    owners = [cluster_of.get(reply.client) for reply in told]
    weights = [reply.weight for reply in told]
    whole, means = dict[str, Tensor](), {k: dict[str, Tensor]() for k in sorted(shares.of)}
    noise, spread = dict(known.noise), dict(known.spread)
    for name in told[0].upload["delta"]:
        tensors = [reply.upload["delta"][name] for reply in told]
        whole[name], own, inside = _means(tensors, weights, owners)
        for k, mean in own.items():
            means[k][name] = mean
        if shares.free > _NOTHING:
            noise[name] = inside / shares.free
        if shares.apart > _NOTHING and name in noise and not deciding:
            between = sum(_squared(own[k] - whole[name]) for k in means)
            raw = (between - noise[name] * shares.leaked) / shares.apart
            spread[name] = known.with_spread(name, raw)
    memory, pace = known.memory, known.pace
    if not by_itself:
        memory, pace = _later(known, told, owners, whole, means, shares)
    variances = Variances(noise, spread, memory=memory, pace=pace)
    found = Pooled(whole, means, shares, variances, variances.tau2())
    if not means:
        return found
    went = found.mean_lambda
    # Before anything is known of the spread, clusters go with everybody for want of it.
    alike = known.alike + 1 if spread and went < ALIKE else 0
    pace = replace(pace, went=went)
    return replace(found, variances=replace(found.variances, alike=alike, pace=pace))


def _later(
    known: Variances,
    told: Sequence[Reply],
    owners: Sequence[int | None],
    whole: Params,
    means: Mapping[int, Params],
    shares: Shares,
) -> tuple[Memory, Pace]:
    """Return what is known of rounds together with a round's replies."""
    total = sum(reply.weight for reply in told)
    centres = {k: sample_of(mean) for k, mean in means.items()}
    heard = [
        Heard(
            reply.client,
            k,
            reply.weight / total / shares.of[k],
            sample_of(reply.upload["delta"]) - centres[k],
        )
        for reply, k in zip(told, owners, strict=True)
        if k is not None
    ]
    heard.sort(key=lambda reply: reply.client)
    parts = {reply.client: reply.weight / total for reply in told}
    middle = sample_of(whole)
    deviations = {k: centre - middle for k, centre in centres.items()}
    return remembered(known.memory, heard), paced(known.pace, heard, parts, deviations)


def pool_clients(
    replies: Sequence[Reply],
    cluster_of: Mapping[ClientId, int],
    told: Sequence[Mapping[str, float]],
    known: Variances,
) -> Variances:
    """Return the variances one level down, where each client is a cluster of its own inside its cluster.

    What `pool` calls noise, of clients about their cluster's mean, is there the sum of both: of the spread of clients and
    the noise of one client's update.

    Args:
        replies: Of the cohort; of their uploads only `delta` is read.
        cluster_of: The cluster of everybody, one for all where there are none.
        told: Estimates of the noise of one client's update, by tensor, of whoever made one.
        known: Of the rounds before.
    """
    both = pool(replies, cluster_of, Variances(), by_itself=True).variances.noise
    noise, spread = dict(known.noise), dict(known.spread)
    for name in dict.fromkeys(name for one in told for name in one):
        values = [one[name] for one in told if name in one]
        noise[name] = sum(values) / len(values)
    for name in both.keys() & noise.keys():
        spread[name] = known.with_spread(name, both[name] - noise[name])
    return Variances(noise, dict(sorted(spread.items())))


def _means(
    tensors: Sequence[Tensor], weights: Sequence[float], owners: Sequence[int | None]
) -> tuple[Tensor, dict[int, Tensor], float]:
    """Return the mean of one tensor, that of every cluster, and the mean squared distance from the latter.

    Tensor by tensor, so that a tensor is in the processor's cache for all of it; in the operations of `mean_upload` and
    their order, so that the means are its to the bit.
    """
    whole = accumulator(tensors[0])
    own = {k: accumulator(tensors[0]) for k in dict.fromkeys(owners) if k is not None}
    heavy = dict.fromkeys(own, 0.0)
    for tensor, weight, k in zip(tensors, weights, owners, strict=True):
        whole.add_(tensor, alpha=weight)
        if k is not None:
            own[k].add_(tensor, alpha=weight)
            heavy[k] += weight
    total = sum(weights)
    whole.mul_(1 / total)
    for k, mean in own.items():
        mean.mul_(1 / heavy[k])
    inside, difference = 0.0, torch.empty_like(whole)
    flat = difference.view(-1)
    for tensor, weight, k in zip(tensors, weights, owners, strict=True):
        if k is not None:
            torch.sub(tensor, own[k], out=difference)
            inside += weight * float(torch.dot(flat, flat))
    return whole, own, inside / total


def _squared(difference: Tensor) -> float:
    """Return the squared length of a tensor of our own: products of one that lies elsewhere may round otherwise."""
    flat = difference.flatten()
    return float(torch.dot(flat, flat))
