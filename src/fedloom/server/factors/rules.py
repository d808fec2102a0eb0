"""How the low-rank factors of many clients become one pair, layer by layer; pure functions of factors.

Client i weighs p_i (sum 1) and adds s_i B_i A_i to a layer, s_i its scale. What is asked for is M = sum p_i s_i B_i A_i,
which has rank sum r_i, and is handed on as factors of rank r, or beside them as a frozen pair of factors.

mean: B = sum p_i B_i, A = sum p_i A_i, as FedAvg has it (FedIT, Zhang et al. 2024, arXiv:2305.05644): not M, as the
product of means is no mean of products.
pad: the mean of factors that zeros bring to one rank. Heterogeneous LoRA for Federated Fine-tuning of On-Device
Foundation Models. Cho, Liu, Xu, Fahrezi, Joshi, EMNLP 2024 (arXiv:2401.06432), section 4: `weights: norm` weighs clients
by the norm of what they add to the layer. Their pruning of ranks is in `pruning.py`.
svd: the nearest matrix of rank r. Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client
Resources. Bai, Chen, Qian, Yao, Li, NeurIPS 2024 (arXiv:2402.11505), FlexLoRA. By QR of the stacked factors, where theirs
decomposes a dense matrix; the root of the singular values goes to either side, where theirs puts all of them on B.
stack: M itself goes into the frozen pair; clients begin anew. FLoRA: Federated Fine-Tuning Large Language Models with
Heterogeneous Low-Rank Adaptations. Wang, Shen, He, Sun, Wang, Lyu, Li, NeurIPS 2024 (arXiv:2409.05976).
residual: the mean of factors, and what it lacks of M in the frozen pair. FedEx-LoRA: Exact Aggregation for Federated and
Efficient Fine-Tuning of Foundation Models. Singhal, Ponkshe, Vepakomma, ACL 2025 (arXiv:2410.09432). Theirs adds both to
the base model; here the base stays as it is, and the pair is cut to the rank there is room for.
fair: the mean of A, and the B that comes nearest to M with it, held near the mean of B by a ridge. LoRA-FAIR: Federated
LoRA Fine-Tuning with Aggregation and Initialization Refinement. Bian, Wang, Zhang, Xu, ICCV 2025 (arXiv:2411.14961). In
closed form, where theirs takes gradient steps on a cosine similarity.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch

from fedloom.server.factors.pair import Pair, difference, norm, singular, total


@dataclass(frozen=True, slots=True)
class Client:
    """What one client has learnt of a layer."""

    share: float
    """p_i, its part in the sum; all of them sum to 1."""
    pair: Pair
    """s_i B_i A_i, the scale in B, in units of that of the widest."""

    @property
    def part(self) -> Pair:
        """Return its part in the sum."""
        return self.pair.times(self.share)


@dataclass(frozen=True, slots=True)
class Combined:
    """What becomes of a layer."""

    learns: Pair | None
    """What clients go on from; None where they begin anew."""
    frozen: Pair | None
    """What is added to the frozen pair beside it, if anything."""
    error: float
    """Norm of what both lack of the sum."""
    size: float
    """Norm of the sum."""


class Aggregate(Protocol):
    """Makes one pair of many; a pure function of its arguments."""

    @property
    def rule(self) -> str:
        """Return what recipes call it."""
        ...

    @property
    def mixes(self) -> bool:
        """Return whether clients may have different ranks."""
        ...

    @property
    def beside(self) -> bool:
        """Return whether it needs a frozen pair beside what learns."""
        ...

    def combine(self, clients: Sequence[Client], before: Pair) -> Combined:
        """Return what becomes of a layer.

        Args:
            clients: At least one, in the order that they are added up in.
            before: What clients began at, of the rank that what learns has.
        """
        ...


def target(clients: Sequence[Client]) -> Pair:
    """Return M, the sum of what clients add to a layer."""
    return total([client.part for client in clients])


@dataclass(frozen=True, slots=True)
class Mean:
    """The mean of each factor, of clients of one rank."""

    rule: ClassVar[str] = "mean"
    mixes: ClassVar[bool] = False
    beside: ClassVar[bool] = False

    def combine(self, clients: Sequence[Client], before: Pair) -> Combined:
        return _lacking(clients, _mean(clients, before.rank))


@dataclass(frozen=True, slots=True)
class Pad:
    """HetLoRA: the mean of factors, brought to one rank by zeros."""

    weights: Literal["norm", "examples"] = "norm"
    """Whether clients count by the norm of what they add to the layer, or as the algorithm weighs them."""

    rule: ClassVar[str] = "pad"
    mixes: ClassVar[bool] = True
    beside: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.weights not in ("norm", "examples"):
            raise ValueError(f"pad.weights must be norm or examples, got {self.weights!r}")

    def combine(self, clients: Sequence[Client], before: Pair) -> Combined:
        counted = _by_norm(clients) if self.weights == "norm" else clients
        return _lacking(clients, _mean(counted, before.rank))


@dataclass(frozen=True, slots=True)
class SVD:
    """FlexLoRA: the nearest product of the rank there is; clients of a smaller one are sent its largest part."""

    split: Literal["balanced", "b"] = "balanced"
    """Whether singular values go to both factors by their root, or to B whole, so that rows of A have length 1."""

    rule: ClassVar[str] = "svd"
    mixes: ClassVar[bool] = True
    beside: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.split not in ("balanced", "b"):
            raise ValueError(f"svd.split must be balanced or b, got {self.split!r}")

    def combine(self, clients: Sequence[Client], before: Pair) -> Combined:
        found = singular(target(clients))
        held = min(found.rank, before.rank)
        near = found.balanced(held) if self.split == "balanced" else found.orthonormal(held)
        # A direction with zeros on both sides would never learn: it keeps the rows of A that it had.
        spare = Pair(torch.zeros_like(before.b[:, held:]), before.a[held:])
        return Combined(total([near, spare]), None, found.beyond(before.rank), found.beyond(0))


@dataclass(frozen=True, slots=True)
class Stack:
    """FLoRA: all of the sum becomes part of the frozen pair, and clients begin anew."""

    rule: ClassVar[str] = "stack"
    mixes: ClassVar[bool] = True
    beside: ClassVar[bool] = True

    def combine(self, clients: Sequence[Client], before: Pair) -> Combined:
        wanted = target(clients)
        return Combined(None, wanted, 0.0, norm(wanted))


@dataclass(frozen=True, slots=True)
class Residual:
    """FedEx-LoRA: the mean of factors, and what it lacks of the sum as part of the frozen pair."""

    rule: ClassVar[str] = "residual"
    mixes: ClassVar[bool] = True
    beside: ClassVar[bool] = True

    def combine(self, clients: Sequence[Client], before: Pair) -> Combined:
        mean, wanted = _mean(clients, before.rank), target(clients)
        return Combined(mean, difference(wanted, mean), 0.0, norm(wanted))


@dataclass(frozen=True, slots=True)
class Fair:
    """LoRA-FAIR: the mean of A, and the B that comes nearest to the sum with it."""

    ridge: float = 0.01
    """Weight of the squared distance of B from its mean."""

    rule: ClassVar[str] = "fair"
    mixes: ClassVar[bool] = True
    beside: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not (self.ridge > 0 and math.isfinite(self.ridge)):
            raise ValueError(f"fair.ridge must be a positive number, got {self.ridge}")

    def combine(self, clients: Sequence[Client], before: Pair) -> Combined:
        mean = _mean(clients, before.rank)
        lacks = difference(target(clients), mean)
        square = mean.a @ mean.a.T + self.ridge * torch.eye(mean.rank, dtype=mean.a.dtype)
        correction = torch.linalg.solve(square, (lacks.b @ (lacks.a @ mean.a.T)).T).T
        return _lacking(clients, Pair(mean.b + correction, mean.a))


AGGREGATES: dict[str, type[Aggregate]] = {
    "mean": Mean,
    "pad": Pad,
    "svd": SVD,
    "stack": Stack,
    "residual": Residual,
    "fair": Fair,
}


def _mean(clients: Sequence[Client], rank: int) -> Pair:
    padded = [(client.share, client.pair.padded(rank)) for client in clients]
    b = torch.stack([share * pair.b for share, pair in padded]).sum(0)
    return Pair(b, torch.stack([share * pair.a for share, pair in padded]).sum(0))


def _by_norm(clients: Sequence[Client]) -> list[Client]:
    norms = [norm(client.pair) for client in clients]
    whole = math.fsum(norms)
    if not whole:
        return list(clients)
    return [Client(n / whole, client.pair) for n, client in zip(norms, clients, strict=True)]


def _lacking(clients: Sequence[Client], pair: Pair) -> Combined:
    wanted = target(clients)
    return Combined(pair, None, norm(difference(wanted, pair)), norm(wanted))
