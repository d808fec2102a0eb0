"""Scores of one generated text, in every script: exact match, ROUGE and chrF."""

import re
import unicodedata
from collections import Counter
from decimal import Decimal
from functools import lru_cache

from fedloom.evaluation.evaluation_settings import Extract

# Scripts written without spaces count by character, a base with its marks.
_UNSPACED = ("CJK ", "HIRAGANA ", "KATAKANA ", "THAI ", "LAO ", "KHMER ", "MYANMAR ", "TIBETAN ")
_NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")
_FINAL = re.compile(r"####|the answer is", re.IGNORECASE)


@lru_cache(maxsize=65536)
def _kind(char: str) -> str:
    """Return whether a character is a letter, a character of its own, a mark, a gap or nothing."""
    category = unicodedata.category(char)
    if category[0] == "M":
        return "mark"
    if category == "Cf":  # joiners inside Indic and Arabic words
        return "nothing"
    if category[0] not in "LN":
        return "gap"
    return "single" if unicodedata.name(char, "").startswith(_UNSPACED) else "letter"


def is_unspaced(char: str) -> bool:
    """Return whether a character is of a script that is written without spaces."""
    return _kind(char) == "single"


def words(text: str) -> list[str]:
    """Split into lower-case words of letters, digits and marks; unspaced scripts by character.

    On ASCII text these are the tokens of Google's rouge-score without stemming.
    """
    found: list[str] = []
    before = "gap"
    for char in unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()):
        kind = _kind(char)
        if kind == "single" or (kind == "letter" and before != "letter"):
            found.append(char)
        elif kind == "letter" or (kind == "mark" and before != "gap"):
            found[-1] += char
        before = before if kind == "nothing" or (kind == "mark" and before != "gap") else kind
    return found


@lru_cache(maxsize=2)  # both scores of an answer are asked for one after the other
def rouge(reference: str, text: str) -> tuple[float, float]:
    """Return the F1 of ROUGE-1 and of ROUGE-L."""
    want, got = words(reference), words(text)
    if not want or not got:
        return 0.0, 0.0
    shared = (Counter(want) & Counter(got)).total()
    # F1 of n/len(got) and n/len(want), in one fraction.
    length = len(want) + len(got)
    return 2 * shared / length, 2 * _lcs(want, got) / length


def _lcs(a: list[str], b: list[str]) -> int:
    """Return the length of the longest common subsequence, one integer a row (Hyyro 2004)."""
    places: dict[str, int] = {}
    for at, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << at
    full = (1 << len(a)) - 1
    row = full
    for word in b:
        match = row & places.get(word, 0)
        row = ((row + match) | (row - match)) & full
    return len(a) - row.bit_count()


def paper_rouge(reference: str, text: str) -> float:
    """Return the F1 of ROUGE-L as the package rouge 1.0.1 has it.

    Words are what spaces part, case counts, sentences end at ".", and both sides are sets: the words of the longest
    common subsequences of any two sentences, each word once.
    """
    want, got = _sentences(reference), _sentences(text)
    shared: set[str] = set()
    for one in want:
        for other in got:
            shared |= _common(one, other)
    if not shared:
        return 0.0
    recall, precision = (
        len(shared) / len({word for sentence in side for word in sentence}) for side in (want, got)
    )
    return 2 * precision * recall / (precision + recall + 1e-8)


def _sentences(text: str) -> list[list[str]]:
    # A stretch of spaces is a sentence of one empty word there, and counts.
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def _common(a: list[str], b: list[str]) -> set[str]:
    """Return the words of the longest common subsequence that rouge 1.0.1 finds of the several there may be."""
    lengths = [[0] * (len(b) + 1)]
    for word in a:
        above, row = lengths[-1], [0]
        for at, other in enumerate(b):
            row.append(above[at] + 1 if word == other else max(above[at + 1], row[at]))
        lengths.append(row)
    found: set[str] = set()
    i, j = len(a), len(b)
    while i and j:
        if a[i - 1] == b[j - 1]:
            i, j = i - 1, j - 1
            found.add(a[i])
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found


def normalise(text: str) -> str:
    """Return the text in NFKC, case folded, spaces collapsed, without final punctuation."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    folded = " ".join(folded.split())
    end = len(folded)
    while end and unicodedata.category(folded[end - 1])[0] in "PZ":
        end -= 1
    return folded[:end] or folded


def extract(text: str, what: Extract) -> str:
    """Return what exact match compares, in one spelling."""
    if what == "number":
        return _number(unicodedata.normalize("NFKC", text)) or normalise(text)
    if what == "text":
        return normalise(text)
    lines = [line for line in text.splitlines() if line.strip()] or [""]
    return normalise(lines[0] if what == "first_line" else lines[-1])


def _number(text: str) -> str:
    """Return the first number after the last announced answer, else the last one, else nothing."""
    text = text.replace("\u2212", "-")
    announced = _FINAL.split(text)[-1] if _FINAL.search(text) else ""
    after, anywhere = _NUMBER.findall(announced), _NUMBER.findall(text)
    if not anywhere:
        return ""
    found = Decimal((after[0] if after else anywhere[-1]).replace(",", ""))
    return format(found.normalize() + 0, "f")


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
