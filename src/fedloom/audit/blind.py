"""The blind baseline of membership inference: how far two groups of rows are apart without any model.

Blind Baselines Beat Membership Inference Attacks for Foundation Models. Das, Zhang, Tramèr, 2024 (arXiv:2406.16201): where a
classifier that sees the rows alone tells members from others, an attack on the model measures how the rows were chosen.

Here it is multinomial naive Bayes on token counts with add-one smoothing, whose scores are of folds that it has not seen.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedloom.core.randomness import derive
from fedloom.data.tokens import Example

FOLDS = 5
_Counts = np.ndarray[Any, np.dtype[np.float64]]


def blind_scores(
    first: Sequence[Example], second: Sequence[Example], *, seed: int
) -> tuple[list[float], list[float]]:
    """Return for each row how much more likely its tokens are in the first group than in the second, by other rows.

    Args:
        first: Rows of one group, such as members.
        second: Of the other.
        seed: Of the folds.
    """
    tokens = np.unique(np.concatenate([row.ids.numpy() for row in (*first, *second)]))
    groups = [np.stack([_counts(row, tokens) for row in group]) for group in (first, second)]
    draws = np.random.Generator(np.random.PCG64(derive(seed, "folds")))
    folds = [draws.permutation(len(group)) % FOLDS for group in groups]
    scores = [np.zeros(len(group)) for group in groups]
    for fold in range(FOLDS):
        known = [group[at != fold].sum(0) for group, at in zip(groups, folds, strict=True)]
        odds = _log_shares(known[0]) - _log_shares(known[1])
        for group, at, found in zip(groups, folds, scores, strict=True):
            found[at == fold] = group[at == fold] @ odds
    return scores[0].tolist(), scores[1].tolist()


def _counts(row: Example, tokens: np.ndarray[Any, Any]) -> _Counts:
    return np.bincount(np.searchsorted(tokens, row.ids.numpy()), minlength=len(tokens)).astype(
        np.float64
    )


def _log_shares(counts: _Counts) -> _Counts:
    smooth = counts + 1
    shares: _Counts = np.log(smooth / smooth.sum())
    return shares
