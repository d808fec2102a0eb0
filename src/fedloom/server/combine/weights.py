"""How much each of n updates counts, from their inner products alone: no update is read, however large it is."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedloom.server.combine.products import squared_distances
from fedloom.server.combine.sums import within

_TIE = 1e-6
"""Scores that differ by less, relatively, are equal: the first client's is taken, not that of the luckier rounding."""
_ROUNDS, _SETTLED = 1000, 1e-9
_SMOOTHING, _TINY = 1e-6, 1e-100
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
