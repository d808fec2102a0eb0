"""chrF: how many runs of characters two texts share. It asks for no words, so it reads every script.

chrF: character n-gram F-score for automatic MT evaluation. Popović, WMT 2015 (W15-3049): n-grams of up to 6 characters,
spaces left out, recall counting twice as much as precision (beta 2, WMT 2016). As in sacrebleu, precision and recall are
averaged over the lengths that both texts have.
"""

from collections import Counter

_LONGEST = 6
_BETA = 2


def chrf(reference: str, text: str) -> float:
    """Return the score of one text, [0, 1]."""
    want, got = ("".join(side.split()) for side in (reference, text))
    lengths = range(1, min(_LONGEST, len(want), len(got)) + 1)
    if not lengths:
        return 0.0
    precision = recall = 0.0
    for length in lengths:
        wanted, given = _runs(want, length), _runs(got, length)
        shared = (wanted & given).total()
        precision += shared / given.total() / len(lengths)
        recall += shared / wanted.total() / len(lengths)
    if not precision:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (_BETA**2 * precision + recall)


def _runs(text: str, length: int) -> Counter[str]:
    return Counter(text[at : at + length] for at in range(len(text) - length + 1))
