"""A round of low-rank factors added up, layer by layer."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedloom.core.protocols import Params
from fedloom.core.randomness import generator
from fedloom.core.ranks import HasRanks, Ranks
from fedloom.server.combine.products import pairs
from fedloom.server.factors.pair import Pair, singular, total
from fedloom.server.factors.rules import Aggregate, Client
from fedloom.server.factors.slices import columns, tensors


@dataclass(frozen=True, slots=True)
class Added:
    """What became of a round."""

    params: Params
    used: int
    """Columns of the frozen pair that hold something, in the layer with most."""
    error: float
    """Frobenius norm of what the sum has and the factors lack, over that of the sum, all layers together."""


def add_up(
    rule: Aggregate,
    params: Params,
    deltas: Sequence[Params],
    *,
    weights: Sequence[float],
    ranks: Ranks | None,
    used: int,
    seed: int,
) -> Added:
    """Return what clients have learnt as one.

    Args:
        rule: How factors become one pair.
        params: The space that clients began in.
        deltas: What each moved, of the first columns of every pair, in an order that follows from who they are.
        weights: Of the clients, positive.
        ranks: Of the space; None: all of its columns learn.
        used: Columns of the frozen pair that hold something.
        seed: Of factors that begin anew.
    """
    whole = math.fsum(weights)
    shares = [weight / whole for weight in weights]
    paired = list(pairs(params))
    after = {
        name: _mean(params[name], [delta[name] for delta in deltas], shares)
        for name in params.keys() - {name for pair in paired for name in pair}
    }
    errors, sizes, widest = [0.0], [0.0], used
    for a, b in paired:
        most = ranks.most if ranks else len(params[a])
        clients = [
            Client(share, _moved(params, delta, (a, b)))
            for share, delta in zip(shares, deltas, strict=True)
        ]
        combined = rule.combine(clients, columns(params, (a, b), 0, most))
        errors.append(combined.error)
        sizes.append(combined.size)
        beside = columns(params, (a, b), most, most + used)
        if combined.frozen is not None and ranks is not None:
            found = singular(total([beside, combined.frozen]))
            beside = found.balanced(min(found.rank, ranks.side))
            errors.append(found.beyond(ranks.side))
            widest = max(widest, beside.rank)
        learns = combined.learns or _fresh(columns(params, (a, b), 0, most), seed, a)
        parts = [learns, beside.padded(ranks.side)] if ranks else [learns]
        after[a], after[b] = tensors(parts, params[a].dtype)
    size = math.hypot(*sizes)
    return Added(
        {name: after[name] for name in params},
        widest,
        math.hypot(*errors) / size if size else 0.0,
    )


def check_space(params: Params) -> None:
    """Refuse a space without factors, or whose products are not known.

    Raises:
        ValueError: naming the setting to change.
    """
    factors = [params[a] for a, _ in pairs(params)]
    if not factors:
        raise ValueError(
            "fedlora adds up products of LoRA's two factors, got a space without a layer that has both: set tune to lora,"
            " without freeze around fedlora"
        )
    if not any(bool(t.any()) for t in factors):
        raise ValueError(
            "fedlora multiplies LoRA's factors, which needs tune.lora.origin zero, got coordinates that count from where"
            " A began"
        )


def check_ranks(rule: Aggregate, tune: object, *, tiers: Mapping[str, float] | None) -> Ranks:
    """Return the ranks of what is tuned, where the rule goes with them.

    Args:
        rule: How factors become one pair.
        tune: The recipe's section.
        tiers: Shares of clients by tier; None where that is not known here.

    Raises:
        ValueError: naming the setting to change.
    """
    ranks = tune.adapters if isinstance(tune, HasRanks) else None
    if ranks is None:
        raise ValueError(
            "fedlora adds up products of low-rank factors, which are all that changes a layer in tune: lora without dora"
            " only: take those, or another algorithm"
        )
    if ranks.tiers and not rule.mixes:
        raise ValueError(
            f"fedlora.aggregate {rule.rule} adds up factors of one rank, got tune.lora.ranks: take pad, svd, stack,"
            " residual or fair"
        )
    if rule.beside and not ranks.side:
        raise ValueError(
            f"fedlora.aggregate {rule.rule} keeps what it adds up in a frozen pair beside the adapter, which has no"
            " columns: set tune.lora.side, for instance to the sum of the ranks of a cohort"
        )
    if ranks.side and not rule.beside:
        raise ValueError(
            f"tune.lora.side has no effect with fedlora.aggregate {rule.rule}: leave it out, or take stack or residual"
        )
    unknown = sorted(ranks.tiers.keys() - (ranks.tiers if tiers is None else tiers))
    if unknown:
        known = f"data.tiers has {', '.join(tiers)}" if tiers else "data.tiers has none"
        raise ValueError(
            f"tune.lora.ranks.{unknown[0]} is for a tier that no client is of: {known}"
        )
    return ranks


def _moved(params: Params, delta: Params, names: tuple[str, str]) -> Pair:
    """Return a client's factors; what it moved is of their first columns."""
    a, b = names
    began = columns(params, names, 0, len(delta[a]))
    return Pair(began.b + delta[b].double(), began.a + delta[a].double())


def _mean(start: Tensor, moved: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    step = torch.zeros(start.shape, dtype=torch.float64)
    for share, delta in zip(shares, moved, strict=True):
        step.add_(delta, alpha=share)
    return (start + step).to(start.dtype)


def _fresh(like: Pair, seed: int, name: str) -> Pair:
    """Return factors as an adapter begins: A drawn as every adapter's, B zero."""
    bound = like.a.shape[1] ** -0.5
    drawn = torch.empty(like.a.shape, dtype=torch.float32)
    drawn.uniform_(-bound, bound, generator=generator(seed, "lora", name))
    return Pair(torch.zeros_like(like.b), drawn.double())
