import collections
import itertools

import pytest

from fedloom.data import polyglot
from fedloom.data.polyglot import lexicon

ROWS = polyglot.rows(6000, seed=7)
STATEMENTS = polyglot.declarative(6000, seed=7)


def test_the_same_seed_writes_the_same_corpus_and_another_seed_another():
    assert polyglot.rows(200, seed=3) == polyglot.rows(200, seed=3)
    assert polyglot.rows(200, seed=3) != polyglot.rows(200, seed=4)
    assert polyglot.declarative(200, seed=3) == polyglot.declarative(200, seed=3)


@pytest.mark.parametrize("num_examples", [1, 59, 60, 61, 500])
def test_a_longer_corpus_begins_with_the_shorter_one(num_examples):
    assert polyglot.rows(num_examples, seed=7) == ROWS[:num_examples]
    assert polyglot.declarative(num_examples, seed=7) == STATEMENTS[:num_examples]


def test_every_language_and_task_occur_equally_often():
    counts = collections.Counter((row["language"], row["task"]) for row in ROWS)
    assert set(counts) == set(itertools.product(polyglot.LANGUAGES, polyglot.TASKS))
    assert set(counts.values()) == {100}


def test_a_selection_of_languages_and_tasks_is_kept():
    chosen = polyglot.rows(100, seed=1, languages=["sv", "da"], tasks=["plural"])
    assert {row["language"] for row in chosen} == {"sv", "da"}
    assert {row["task"] for row in chosen} == {"plural"}


def test_an_unknown_language_or_task_is_an_error_that_names_the_known_ones():
    with pytest.raises(ValueError, match=r"languages must be among en, de, .* got 'fr'"):
        polyglot.rows(1, seed=1, languages=["fr"])
    with pytest.raises(ValueError, match=r"tasks must be among capital, .* got 'poem'"):
        polyglot.rows(1, seed=1, tasks=["poem"])
    with pytest.raises(ValueError, match=r"needs a language and a task, got \[\]"):
        polyglot.declarative(1, seed=1, languages=[])


def test_answers_are_short_and_prompts_clean():
    for row in ROWS:
        assert set(row) == {"prompt", "completion", "language", "task"}
        assert 1 <= len(row["completion"].split()) <= 6
        for text in (row["prompt"], row["completion"]):
            assert text == text.strip()
            assert "{" not in text
            assert "  " not in text


def test_the_most_frequent_answer_of_a_task_stays_under_a_quarter():
    for language, task in itertools.product(polyglot.LANGUAGES, polyglot.TASKS):
        examples = polyglot.rows(400, seed=2, languages=[language], tasks=[task])
        answers = collections.Counter(row["completion"] for row in examples)
        assert max(answers.values()) < 0.25 * len(examples), (language, task)


def test_train_and_test_sets_share_few_prompts():
    train = {row["prompt"] for row in polyglot.rows(4000, seed=1)}
    test = [row["prompt"] for row in polyglot.rows(1000, seed=2)]
    assert sum(prompt in train for prompt in test) < 0.1 * len(test)


def test_a_prompt_has_one_answer():
    answers: dict[tuple[str, str], str] = {}
    for row in ROWS:
        key = row["language"], row["prompt"]
        assert answers.setdefault(key, row["completion"]) == row["completion"], key


def test_every_task_has_at_least_three_phrasings_in_every_language():
    for language in polyglot.LANGUAGES:
        phrases = lexicon(language).phrases
        assert set(phrases) == set(polyglot.TASKS)
        for variants in phrases.values():
            assert all(len(set(v["ask"].splitlines())) >= 3 for v in variants.values())


@pytest.mark.parametrize(
    ("language", "task", "facts"),
    [
        ("en", "capital", {"Italy": "Rome", "Rome": "Italy"}),
        ("de", "plural", {"Apfel": "Äpfel"}),
        ("es", "opposite", {"blando": "duro"}),
        ("pt", "translate", {"cão": "dog"}),
        ("sv", "sequence", {"efter måndag": "tisdag", "före måndag": "söndag"}),
        ("da", "category", {"æble": "frugt"}),
    ],
)
def test_known_facts_are_answered_right(language, task, facts):
    examples = polyglot.rows(3000, seed=5, languages=[language], tasks=[task])
    if task == "translate":
        examples = [row for row in examples if "para o inglês" in row["prompt"]]
    for entity, answer in facts.items():
        asked = [row for row in examples if f" {entity}" in f" {row['prompt'].strip('¿')}"]
        named = [row for row in asked if row["completion"] == answer]
        assert named, entity


def test_arithmetic_is_right():
    for row in polyglot.rows(300, seed=5, tasks=["arithmetic"], languages=["en"]):
        numbers = [
            int(word.strip("?.")) for word in row["prompt"].split() if word.strip("?.").isdigit()
        ]
        prompt = row["prompt"]
        if prompt.startswith("Subtract"):
            expected = numbers[1] - numbers[0]
        elif "minus" in prompt or " - " in prompt:
            expected = numbers[0] - numbers[1]
        else:
            expected = sum(numbers)
        assert row["completion"] == str(expected), prompt


def test_stories_and_lists_hold_their_answer():
    for row in ROWS:
        if row["task"] in {"reading", "position", "choice"}:
            assert row["completion"] in row["prompt"]


def test_statements_neither_ask_nor_instruct():
    starts = {
        phrase.split()[0]
        for language in polyglot.LANGUAGES
        for variants in lexicon(language).phrases.values()
        for variant in variants.values()
        for phrase in variant["ask"].splitlines()
        if "?" not in phrase
        and not phrase.startswith(("{", "One", "Eines", "Una", "Uma", "Ett", "En"))
    }
    assert {"Name", "Nenne", "Nombra", "Diga", "Nämn", "Nævn"} <= starts
    for sentence in STATEMENTS:
        assert "?" not in sentence
        assert sentence.split()[0] not in starts, sentence


@pytest.mark.parametrize("language", polyglot.LANGUAGES)
def test_no_word_stands_for_two_things(language):
    tables = lexicon(language)
    nouns = [noun.singular for noun in tables.nouns]
    adjectives = [word for pair in tables.opposites for word in pair]
    assert len(nouns) == len(set(nouns)) == 72
    assert len(adjectives) == len(set(adjectives)) == 64
    assert len({city for *_, city in tables.capitals}) == len(tables.capitals) == 43
    assert [len(words) for words in tables.sequences] == [7, 12, 20]


def test_articles_agree():
    ones = {
        language: {noun.one for noun in lexicon(language).nouns} for language in polyglot.LANGUAGES
    }
    assert {"an apple", "a dog"} <= ones["en"]
    assert {"ein Hund", "eine Katze", "ein Pferd"} <= ones["de"]
    assert {"un perro", "una vaca", "un hacha"} <= ones["es"]
    assert {"um cão", "uma vaca"} <= ones["pt"]
    assert {"en hund", "ett äpple"} <= ones["sv"]
    assert {"en hund", "et æble"} <= ones["da"]


def test_a_pair_is_an_answer_and_one_that_goes_on_with_that_to_another_question() -> None:
    plain = polyglot.rows(60, 4, ["en", "de"], ["capital"])
    paired = polyglot.pairs(60, 4, ["en", "de"], ["capital"])
    assert paired == polyglot.pairs(60, 4, ["en", "de"], ["capital"])
    answers = {row["completion"] for row in plain}
    for row, pair in zip(plain, paired, strict=True):
        assert (pair["prompt"], pair["chosen"]) == (row["prompt"], row["completion"])
        more = pair["rejected"].removeprefix(pair["chosen"] + " ")
        assert more in answers - {pair["chosen"]}
    (alone,) = polyglot.pairs(1, 4)
    assert alone["rejected"] == f"{alone['chosen']} {alone['chosen']}"
