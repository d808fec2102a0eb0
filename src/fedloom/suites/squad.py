"""How answers about a text are compared: exact match and F1 of SQuAD 1.1.

SQuAD: 100,000+ Questions for Machine Comprehension of Text. Rajpurkar et al., arXiv:1606.05250; for XQuAD's languages after
MLQA: Evaluating Cross-lingual Extractive Question Answering. Lewis et al., arXiv:1910.07475.

Deviations: punctuation of every script is left out as ASCII's is; words of scripts without spaces are their characters. Articles are those of
English, which SQuAD's and XQuAD's published numbers go by; MLQA's own rules leave out those of other languages too.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

from fedloom.evaluation.text_metrics import is_unspaced, words

_ARTICLES = re.compile(r"\b(a|an|the)\b")


def squad_words(text: str) -> list[str]:
    """Return the words that are compared: in lower case, without punctuation and articles."""
    kept = "".join(c for c in text.lower() if not _is_punctuation(c))
    return [word for piece in _ARTICLES.sub(" ", kept).split() for word in _parted(piece)]


def _parted(piece: str) -> list[str]:
    return words(piece) if any(map(is_unspaced, piece)) else [piece]


def squad_exact(answer: str, references: Sequence[str]) -> float:
    """Return 1 where an answer is one of the references, else 0."""
    said = squad_words(answer)
    return float(any(said == squad_words(reference) for reference in references))


def squad_f1(answer: str, references: Sequence[str]) -> float:
    """Return the F1 of the words that an answer shares with the reference it is nearest to."""
    return max(_f1(squad_words(answer), squad_words(reference)) for reference in references)


def _f1(said: Sequence[str], wanted: Sequence[str]) -> float:
    if not said or not wanted:
        return float(said == wanted)
    return 2 * (Counter(said) & Counter(wanted)).total() / (len(said) + len(wanted))


def _is_punctuation(char: str) -> bool:
    return char in string.punctuation or unicodedata.category(char)[0] == "P"
