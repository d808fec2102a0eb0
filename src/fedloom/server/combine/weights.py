"""How much each of n updates counts, from inner products alone; and updates added up by such shares."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedloom.core.protocols import Params
from fedloom.server.combine.products import squared_distances

_TINY = 1e-100
"""A bound of no length divides nothing by zero."""


def summed(deltas: Sequence[Params], shares: Sequence[float]) -> Params:
    """Return the sum of updates by shares, in at least float32; of no share not even a huge one counts."""
    found: dict[str, Tensor] = {}
    for name, first in deltas[0].items():
        dtype = torch.promote_types(first.dtype, torch.float32)
        total = torch.zeros(first.shape, dtype=dtype)
        for delta, share in zip(deltas, shares, strict=True):
            if share:
                total.add_(delta[name], alpha=share)
        found[name] = total
    return found


def relative(shares: Sequence[float], alike: Sequence[float]) -> list[float]:
    """Return shares in units of what each would have in a mean, 1 at most."""
    return [min(1.0, share / own) for share, own in zip(shares, alike, strict=True)]


def in_mean(weights: Sequence[float]) -> list[float]:
    """Return the share that each has in the weighted mean."""
    total = sum(weights)
    return [weight / total for weight in weights]


def within(lengths: Tensor, bound: float | None) -> Tensor:
    """Return the (n,) shares of themselves by which vectors are within a bound; None: their median, the lower of two."""
    most = max(float(lengths.median()), _TINY) if bound is None else bound
    return most / lengths.clamp_min(most)


_TIE = 1e-6
"""Scores that differ by less, relatively, are equal: the first client's is taken, not that of the luckier rounding."""
_ROUNDS, _SETTLED = 1000, 1e-9
_SMOOTHING = 1e-6
"""Least distance from the median that counts, as a share of the median distance: none is divided by zero."""


def krum_scores(distances: Tensor, attackers: int) -> Tensor:
    """Return each one's sum of the n - attackers - 2 smallest squared distances to others; (n, n) -> (n,)."""
    count = len(distances)
    others = distances.clone().fill_diagonal_(torch.inf).sort(dim=1).values
    return others[:, : max(count - attackers - 2, 1)].sum(1)


def best(scores: Tensor, count: int) -> list[int]:
    """Return the places of the `count` smallest scores, of equal ones the first."""
    left, taken = list(enumerate(scores.tolist())), list[int]()
    for _ in range(count):
        least = min(score for _, score in left)
        at = next(at for at, score in left if score <= least * (1 + _TIE))
        taken.append(at)
        left = [(other, score) for other, score in left if other != at]
    return taken


def picked_in_turn(distances: Tensor, attackers: int, count: int) -> list[int]:
    """Return the places of `count` updates, each Krum's choice among those that the earlier ones left."""
    left, taken = list(range(len(distances))), list[int]()
    for _ in range(count):
        among = distances[left][:, left]
        taken.append(left.pop(best(krum_scores(among, attackers), 1)[0]))
    return taken


def geometric_median(products: Tensor, weights: Sequence[float]) -> Tensor:
    """Return the (n,) shares, summing to 1, of the point whose weighted distances to all have the least sum (Weiszfeld)."""
    given = torch.tensor(weights, dtype=torch.float64)
    given = given / given.sum()
    # What most of them are apart: far ones do not set it.
    apart = squared_distances(products).sqrt().median(dim=1).values.median()
    floor, shares = max(float(apart) * _SMOOTHING, _TINY), given
    for _ in range(_ROUNDS):
        now = given / _distances(products, shares).clamp_min(floor)
        now = now / now.sum()
        # Relatively: that of a huge update has to shrink to nothing, and takes a while.
        if bool(((now - shares).abs() <= _SETTLED * now).all()):
            return now
        shares = now
    return shares


def centred_clip(
    products: Tensor, weights: Sequence[float], *, radius: float | None, iterations: int
) -> Tensor:
    """Return the (n,) shares of v after v <- v + mean(clip(x_i - v, radius)), from v = 0; what they lack of 1 is no change."""
    given = torch.tensor(weights, dtype=torch.float64)
    given = given / given.sum()
    shares = torch.zeros_like(given)
    for _ in range(iterations):
        step = given * within(_distances(products, shares), radius)
        shares = shares * (1 - step.sum()) + step
    return shares


def _distances(products: Tensor, shares: Tensor) -> Tensor:
    """Return every update's distance from the sum of them by `shares`."""
    # Those without a share are left out: zero times a huge one is not always zero in floats.
    used = shares != 0
    mixed = products[:, used] @ shares[used]
    square = products.diagonal() - 2 * mixed + shares[used] @ mixed[used]
    return square.clamp_min(0).sqrt()
