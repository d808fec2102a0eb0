"""Average linkage of a matrix of cosines: where its tree is cut, and which groups are too alike to stay apart."""

import math

import numpy as np
from numpy.typing import NDArray

_CHANCE = 0.2
"""Of a cut too many anywhere, over the number of rows; an upper bound, as cuts of one tree exclude each other."""
_LEAST_EFFECT = 0.22
"""Of the similarity inside, what must be missing across: of many rows a difference too small to matter is beyond chance."""
_MOST_CUTS = 256
"""Groups of the finest cut whose silhouette is looked at."""
_SMALL = 100
"""Degrees of freedom below which the noise's own uncertainty counts."""

Matrix = NDArray[np.float64]
Labels = NDArray[np.int64]


class Tree:
    """Average linkage, node by node in the order of the merges."""

    def __init__(self, cosine: Matrix) -> None:
        from scipy.cluster.hierarchy import linkage
        from scipy.spatial.distance import squareform

        self.n, self.cosine = len(cosine), cosine
        n = self.n
        apart = np.maximum(1 - (cosine + cosine.T) / 2, 0)
        np.fill_diagonal(apart, 0)
        self.merges: Matrix = linkage(squareform(apart, checks=False), "average")
        self.kids = self.merges[:, :2].astype(int)
        self.sizes = np.concatenate([np.ones(n), self.merges[:, 3]])
        # An average height is the mean of what lies across, so that all sums follow from the tree.
        left, right = self.sizes[self.kids].T
        self.crossing = left * right
        self.across = 1 - self.merges[:, 2]
        inside = np.zeros(2 * n - 1)
        for m, (a, b) in enumerate(self.kids):
            inside[n + m] = inside[a] + inside[b] + self.across[m] * self.crossing[m]
        self.pairs = self.sizes * (self.sizes - 1) / 2
        self.inside = inside / np.maximum(self.pairs, 1)
        total = np.square(1 - squareform(apart, checks=False)).sum()
        left_over = max(float(total - (self.across**2 * self.crossing).sum()), 0.0)
        self.freedom = max(n * (n - 1) // 2 - (n - 1), 1)
        self.noise = math.sqrt(left_over / self.freedom)

    def cut(self, num_groups: int) -> Labels:
        """Undo the last merges until there are exactly `num_groups`."""
        return cut(self.merges, num_groups)

    def leaves(self) -> Labels:
        """Label rows by the nodes that stand: cut where a cut below or here is beyond chance, or by silhouette."""
        n = self.n
        beyond = np.zeros(2 * n - 1, dtype=bool)
        for m, (a, b) in enumerate(self.kids):
            clear = self._contrast(m) > self._threshold(int(self.sizes[n + m]))
            beyond[n + m] = beyond[a] or beyond[b] or clear
        if not beyond[-1]:
            return np.zeros(n, dtype=np.int64)
        undone = n - self.best_silhouette()
        labels = np.zeros(n, dtype=np.int64)
        stack, number = [(2 * n - 2, False)], 0
        while stack:
            node, whole = stack.pop()
            if node < n:
                labels[node] = number
                number += not whole
            else:
                stands = whole or not (beyond[node] or node - n >= undone)
                kids = [(int(kid), stands) for kid in self.kids[node - n]]
                if stands and not whole:
                    labels[self._members(node)] = number
                    number += 1
                elif not stands:
                    stack += kids
        return labels

    def best_silhouette(self) -> int:
        """Return the number of groups of the cut with the best mean silhouette; merge by merge, from the finest."""
        n, cosine = self.n, self.cosine
        count = max(min(n - 1, _MOST_CUTS), 1)
        nodes, labels = np.unique(_roots(self.merges, count), return_inverse=True)
        place = {int(node): at for at, node in enumerate(nodes)}
        member = np.eye(count)[labels]
        sums, sizes = cosine @ member, member.sum(0)
        best, chosen = -math.inf, 1
        while count > 1:
            score = _silhouette(sums[:, :count], sizes[:count], labels, np.diag(cosine))
            if score > best:
                best, chosen = score, count
            a, b = (place.pop(int(kid)) for kid in self.kids[n - count])
            for at, target in ((b, a), (count - 1, b)):
                labels[labels == at] = target
            sums[:, a] += sums[:, b]
            sizes[a] += sizes[b]
            sums[:, b], sizes[b] = sums[:, count - 1], sizes[count - 1]
            count -= 1
            place = {node: b if at == count else at for node, at in place.items()}
            place[2 * n - count - 1] = b if a == count else a
        return chosen

    def _members(self, node: int) -> list[int]:
        found, stack = [], [node]
        while stack:
            at = stack.pop()
            if at < self.n:
                found.append(at)
            else:
                stack += self.kids[at - self.n].tolist()
        return found

    def _contrast(self, m: int) -> float:
        """Return by how many standard errors both sides of a merge are more similar inside than across, if it matters."""
        a, b = self.kids[m]
        if min(self.sizes[a], self.sizes[b]) < 2:
            return -math.inf
        return float(
            _contrast(
                self.inside[a], self.inside[b], self.across[m],
                self.pairs[a], self.pairs[b], self.crossing[m], self.noise,
            )
        )  # fmt: skip

    def _threshold(self, size: int) -> float:
        """Return what the best way to cut one group in two, each at least two, exceeds by chance."""
        from scipy.special import ndtri_exp, stdtrit

        # Halvings less those that leave one alone; of 50 or more the powers of two are all that counts.
        ways = math.log(2 ** (size - 1) - 1 - size) if 4 <= size < 50 else (size - 1) * math.log(2)
        log_chance = math.log(_CHANCE / self.n) - ways
        if self.freedom < _SMALL:
            return -float(stdtrit(self.freedom, math.exp(log_chance)))
        return -float(ndtri_exp(log_chance))


class Sums:
    """Groups, the sums of the cosines between any two of them, and what becomes of them as groups join."""

    def __init__(self, cosine: Matrix, labels: Labels) -> None:
        self.labels = labels
        member = np.eye(labels.max() + 1)[labels]
        self.sizes = member.sum(0)
        self.between = member.T @ (cosine - np.diag(np.diag(cosine))) @ member

    @property
    def count(self) -> int:
        """Return the number of groups."""
        return len(self.sizes)

    def weakest(self, noise: float) -> tuple[float, tuple[int, int]]:
        """Return the least contrast of two groups, and which they are."""
        pairs = self.sizes * (self.sizes - 1) / 2
        inside = np.diag(self.between) / 2 / np.maximum(pairs, 1)
        crossing = np.outer(self.sizes, self.sizes)
        table = _contrast(
            inside[:, None], inside[None], self.between / crossing,
            pairs[:, None], pairs[None], crossing, noise,
        )  # fmt: skip
        table[np.tril_indices(self.count)] = np.inf
        a, b = np.unravel_index(int(np.argmin(table)), table.shape)
        return float(table[a, b]), (int(a), int(b))

    def merge(self, a: int, b: int) -> None:
        """Let group b join group a."""
        self.labels = np.where(self.labels == b, a, self.labels)
        self.labels = self.labels - (self.labels > b)
        self.sizes[a] += self.sizes[b]
        self.between[a] += self.between[b]
        self.between[:, a] += self.between[:, b]
        self.sizes = np.delete(self.sizes, b)
        self.between = np.delete(np.delete(self.between, b, 0), b, 1)


def _contrast(
    inside_a: Matrix, inside_b: Matrix, across: Matrix,
    pairs_a: Matrix, pairs_b: Matrix, crossing: Matrix, noise: float,
) -> Matrix:  # fmt: skip
    inside = np.sqrt(np.maximum(inside_a, 0) * np.maximum(inside_b, 0))
    variance = 0.25 / np.maximum(pairs_a, 1) + 0.25 / np.maximum(pairs_b, 1) + 1 / crossing
    errors = (inside - across) / (noise * np.sqrt(variance) + 1e-12)
    matters = across <= (1 - _LEAST_EFFECT) * inside
    found: Matrix = np.where(matters, errors, np.minimum(errors, 0))
    return found


def cut(merges: Matrix, num_groups: int) -> Labels:
    """Label the rows of a tree cut into exactly `num_groups`, whatever ties there are."""
    found: Labels = np.unique(_roots(merges, num_groups), return_inverse=True)[1].astype(np.int64)
    return found


def _roots(merges: Matrix, num_groups: int) -> Labels:
    """Return the node each row is below once all but the last merges are done, (n,)."""
    n = len(merges) + 1
    if not 1 <= num_groups <= n:
        raise ValueError(f"clusters must be between 1 and the {n} rows there are, got {num_groups}")
    above = np.arange(2 * n - 1)
    for m, kids in enumerate(merges[: n - num_groups, :2].astype(int)):
        above[kids] = n + m
    for node in reversed(range(2 * n - 1)):
        above[node] = above[above[node]]
    return above[:n]


def _silhouette(sums: Matrix, sizes: Matrix, labels: Labels, alone: Matrix) -> float:
    """Return the mean silhouette; sums are those of the cosines of each row with each group."""
    rows = np.arange(len(labels))
    own = sizes[labels]
    mean = sums / sizes
    mean[rows, labels] = -np.inf
    inside = 1 - (sums[rows, labels] - alone) / np.maximum(own - 1, 1)
    outside = 1 - mean.max(1)
    width = (outside - inside) / np.maximum(np.maximum(inside, outside), 1e-12)
    return float(np.where(own > 1, width, 0).mean())
