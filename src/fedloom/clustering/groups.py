"""Which rows belong together, and how many groups there are, by their cosines.

The tree is that of average linkage. A node of it is cut where its two sides are more similar inside than to one another by
more than the best of all ways to halve a group of its size would be by chance, and by enough to matter, or where the
silhouette is best (Rousseeuw, Silhouettes, Journal of Computational and Applied Mathematics 20, 1987) once one cut is so.
Inside is the geometric mean of both sides, so that what a client has in common with everybody, or is too noisy to have,
cancels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedloom.clustering.tree import Labels, Matrix, Sums, Tree, cut
from fedloom.core.randomness import generator

_CENTRE = 0.5
"""All of what updates share hides what tells them apart; taking all of it away sets the rows of one group against each other."""
_WEAK = 1.0
"""Groups that differ by less than this many standard errors are one."""
_LEAST_CONFIDENCE = 0.8
_BLOCKS = 16
"""Parts of the entries that are drawn again."""
_RESAMPLES = 10


@dataclass(frozen=True)
class Groups:
    """A grouping of rows and what it rests on."""

    labels: tuple[int, ...]
    """From 0 in the order of their first rows, of each row."""
    confidence: float
    """Share of the rows nearest to their own group when entries are drawn again, [0, 1]; 1 for one group."""
    noise: float
    """Standard deviation of a cosine that the tree leaves unexplained."""
    similarity: Tensor
    """(n, n) float32: cosines, half of what all rows share taken away."""
    merges: Tensor
    """(n - 1, 4) float64, the tree as scipy's dendrogram takes it."""


def cosines(rows: Tensor) -> Tensor:
    """Return the (n, n) cosines of (n, size) rows, by one matrix product; a row of zeros is like nothing, itself included."""
    unit = torch.nn.functional.normalize(rows.float(), dim=1)
    return unit @ unit.T


def find_groups(
    rows: Tensor,
    num_groups: int | None = None,
    *,
    current: Sequence[int | None] = (),
    hysteresis: float = 0.0,
) -> Groups:
    """Group rows, (n, size), in `num_groups`, or in as many as there are.

    Args:
        rows: An update each.
        num_groups: How many; None finds out.
        current: The present group of each row, None where it has none.
        hysteresis: By how many times the noise rows of one present group count as more similar.
    """
    if len(rows) < 2:
        nothing = torch.zeros(0, 4, dtype=torch.float64)
        return Groups((0,) * len(rows), 1.0, 0.0, cosines(rows), nothing)
    unit = torch.nn.functional.normalize(rows.float(), dim=1)
    unit = torch.nn.functional.normalize(unit - _CENTRE * unit.mean(0), dim=1)
    # One product, in parts, from which any resample of the parts follows.
    blocks = torch.stack([part @ part.T for part in unit.chunk(_BLOCKS, dim=1)])
    similarity = blocks.sum(0)
    cosine: Matrix = similarity.double().numpy()
    tree = Tree(cosine)
    noise = tree.noise
    if hysteresis and current:
        same = np.array([[a is not None and a == b for b in current] for a in current])
        cosine = cosine + hysteresis * noise * same
        tree = Tree(cosine)
    merges = torch.from_numpy(tree.merges.copy())
    if num_groups is not None:
        labels = tree.cut(num_groups)
        confidence = _confidence(blocks, labels)
    else:
        labels, confidence = _as_many_as_there_are(blocks, cosine, tree, noise)
    numbers = {label: at for at, label in enumerate(dict.fromkeys(labels.tolist()))}
    named = tuple(numbers[label] for label in labels.tolist())
    return Groups(named, confidence, noise, similarity, merges)


def ward_cut(similarity: Tensor, num_groups: int) -> tuple[int, ...]:
    """Cut Ward's tree of the rows of a similarity matrix, as points, into exactly `num_groups`: FedMLLM's rule."""
    from scipy.cluster.hierarchy import ward
    from scipy.spatial.distance import pdist

    if len(similarity) < 2:
        return (0,) * len(similarity)
    merges = ward(pdist(similarity.double().numpy()))
    return tuple(cut(merges, num_groups).tolist())


def adjusted_rand(a: Sequence[object], b: Sequence[object]) -> float:
    """Return the adjusted Rand index of two groupings (Hubert, Arabie, Journal of Classification 2, 1985); 1 is equal."""
    pairs = math.comb(len(a), 2)

    def together(labels: Sequence[object]) -> int:
        return sum(math.comb(labels.count(label), 2) for label in set(labels))

    both, of_a, of_b = (together(x) for x in (list(zip(a, b, strict=True)), list(a), list(b)))
    expected = of_a * of_b / pairs if pairs else 0.0
    most = (of_a + of_b) / 2
    return 1.0 if most == expected else (both - expected) / (most - expected)


def _as_many_as_there_are(
    blocks: Tensor, cosine: Matrix, tree: Tree, noise: float
) -> tuple[Labels, float]:
    labels = _attached(cosine, tree.leaves())
    sums = Sums(cosine, labels)
    while True:
        labels = sums.labels
        confidence = _confidence(blocks, labels)
        if sums.count == 1 or (sums.weakest(noise)[0] >= _WEAK and confidence >= _LEAST_CONFIDENCE):
            return labels, confidence
        sums.merge(*sums.weakest(noise)[1])


def _attached(cosine: Matrix, labels: Labels) -> Labels:
    """Give each row that is alone to the group it is most similar to: a single one cannot be told from a noisy one."""
    sizes = np.bincount(labels)
    groups = np.flatnonzero(sizes > 1)
    if not len(groups):
        return np.zeros_like(labels)
    member = (labels[:, None] == groups).astype(float)
    nearest = (cosine @ member / member.sum(0)).argmax(1)
    own = np.searchsorted(groups, labels)
    found: Labels = np.where(sizes[labels] > 1, own, nearest)
    return found


def _confidence(blocks: Tensor, labels: Labels) -> float:
    """Return the share of rows nearest to their own group, over resamples of blocks of the entries."""
    count = int(labels.max()) + 1
    if count == 1:
        return 1.0
    own = torch.from_numpy(labels)
    member = torch.nn.functional.one_hot(own).float()
    sizes = member.sum(0)
    alone = sizes[own] < 2
    confidence = 0.0
    for draw in range(_RESAMPLES):
        source = generator(0, "resample", draw)
        drawn = torch.bincount(
            torch.randint(len(blocks), (len(blocks),), generator=source), minlength=len(blocks)
        )
        products = torch.tensordot(drawn.float(), blocks, 1)
        lengths = products.diagonal().clamp_min(1e-20).sqrt()
        similarity = (products / lengths / lengths[:, None]).fill_diagonal_(0)
        mean = similarity @ member / (sizes - member).clamp_min(1)
        confidence += float(((mean.argmax(1) == own) | alone).float().mean())
    return confidence / _RESAMPLES
