"""SQuAD's comparison of answers, by hand."""

import pytest

from fedloom.suites.squad import squad_exact, squad_f1


@pytest.mark.parametrize(
    ("answer", "references", "exact", "f1"),
    [
        ("The Panthers.", ["panthers"], 1, 1),
        ("in 1984", ["1984", "the year"], 0, 2 / 3),
        ("don't", ["dont"], 1, 1),
        ("a cat and the dog", ["dog and cat"], 0, 1),
        ("", ["the"], 1, 1),
        ("", ["dog"], 0, 0),
        ("dog dog", ["dog"], 0, 2 / 3),
        # A sign is no punctuation, and parts no word.
        ("\u00a330m", ["30m"], 0, 0),
        ("28.5\u00b0E", ["285 e"], 0, 0),
        ("Stra\u00dfe", ["strasse"], 0, 0),
        # Scripts without spaces by character, other scripts' punctuation left out.
        ("\u4e00\u4e8c\u3002", ["\u4e00\u4e8c"], 1, 1),
        ("\u4e00\u4e8c", ["\u4e8c\u4e09"], 0, 0.5),
        ("\u00bfQu\u00e9?", ["qu\u00e9"], 1, 1),
    ],
)
def test_answers_are_compared_as_squad_does(
    answer: str, references: list[str], exact: int, f1: float
) -> None:
    assert squad_exact(answer, references) == exact
    assert squad_f1(answer, references) == pytest.approx(f1)
