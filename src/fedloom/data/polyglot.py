"""The built-in corpus: short tasks with checkable answers in six languages, written from tables of words and phrases."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml

from fedloom.core.randomness import derive

LANGUAGES: tuple[str, ...] = ("en", "de", "es", "pt", "sv", "da")

_ARTICLES: Mapping[str, Mapping[str, str]] = {
    "de": {"m": "ein", "f": "eine", "n": "ein"},
    "es": {"m": "un", "f": "una"},
    "pt": {"m": "um", "f": "uma"},
}


@dataclass(frozen=True, slots=True)
class Noun:
    """A thing with its forms."""

    category: str
    one: str
    """The singular with its indefinite article."""
    singular: str
    plural: str


@dataclass(frozen=True, slots=True)
class Lexicon:
    """The words and phrases of one language; row k of a table means the same in every language."""

    nouns: list[Noun]
    categories: dict[str, tuple[str, str]]
    """Name of a category, and what one thing of it is called."""
    opposites: list[tuple[str, str]]
    capitals: list[tuple[str, str, str]]
    """Country, the country after "capital of", city."""
    sequences: list[list[str]]
    language_names: dict[str, str]
    names: list[str]
    things: list[str]
    colours: list[str]
    hobbies: list[str]
    tails: list[str]
    phrases: dict[str, dict[str, dict[str, str]]]


@cache
def lexicon(language: str) -> Lexicon:
    """Return the tables of one language."""
    words, phrases = _read("polyglot_words.yaml"), _read("polyglot_phrases.yaml")[language]
    column = LANGUAGES.index(language)

    def table(text: str) -> list[str]:
        return [line.split("|")[column].strip() for line in text.splitlines()]

    names = [tuple(table(text)[0].split(", ")) for text in words["categories"].values()]
    capitals = [cell.split(", ") for cell in table(words["capitals"])]
    return Lexicon(
        nouns=[
            _noun(language, category, cell)
            for category, text in words["nouns"].items()
            for cell in table(text)
        ],
        categories={c: (n, k) for c, (n, k) in zip(words["categories"], names, strict=True)},
        opposites=[(one, other) for one, other in map(str.split, table(words["opposites"]))],
        capitals=[(*_country(language, country), city) for country, city in capitals],
        sequences=[table(words[name]) for name in ("days", "months", "numbers")],
        language_names=dict(zip(LANGUAGES, table(words["languages"]), strict=True)),
        names=words["names"].split(),
        things=table(words["things"]),
        colours=table(words["colours"]),
        hobbies=table(words["hobbies"]),
        tails=phrases["tails"],
        phrases={task: v for task, v in phrases.items() if task != "tails"},
    )


def _noun(language: str, category: str, cell: str) -> Noun:
    if language == "en":
        singular, plural = cell.split()
        article = "an" if singular[0] in "aeiou" else "a"
    else:
        gender, singular, plural = cell.split()
        # The Scandinavian columns name the article itself.
        article = _ARTICLES.get(language, {}).get(gender, gender)
    return Noun(category, f"{article} {singular}", singular, plural)


def _country(language: str, country: str) -> tuple[str, str]:
    """Split the joining word from a country, or add it: ("Schweiz", "der Schweiz")."""
    joiners = {"de": ("der ",), "pt": ("da ", "do ", "de ")}.get(language, ())
    for joiner in joiners:
        if country.startswith(joiner):
            return country.removeprefix(joiner), country
    return country, f"von {country}" if language == "de" else country


@cache
def _read(name: str) -> Any:
    text = resources.files("fedloom.data").joinpath(name).read_text(encoding="utf-8")
    return yaml.safe_load(text)


TASKS: tuple[str, ...] = (
    "capital",
    "opposite",
    "translate",
    "sequence",
    "category",
    "plural",
    "reading",
    "arithmetic",
    "position",
    "choice",
)

Fields = dict[str, str]

# Beside English, a language is translated to and from its close relative.
_RELATIVES: Mapping[str, tuple[str, ...]] = {
    "en": ("de", "es", "pt", "sv", "da"),
    "de": ("en",),
    "es": ("en", "pt"),
    "pt": ("en", "es"),
    "sv": ("en", "da"),
    "da": ("en", "sv"),
}

_NUM_PLACES = 22  # European capitals: none of them needs an article after "in".
_LARGEST_TERM = 12


def rows(
    num_examples: int,
    seed: int,
    languages: Sequence[str] = LANGUAGES,
    tasks: Sequence[str] = TASKS,
) -> list[dict[str, str]]:
    """Write `num_examples` examples; example i depends on `seed`, i and the two selections only."""
    cells = _cells(languages, tasks)
    examples = []
    for i in range(num_examples):
        if i % len(cells) == 0:
            # Every block holds each language and task once, in an order of its own.
            block = random.Random(derive(seed, "polyglot block", i // len(cells)))
            order = block.sample(cells, len(cells))
        language, task = order[i % len(cells)]
        rng = random.Random(derive(seed, "polyglot", i))
        phrase, fields = _draw(language, task, rng)
        prompt = _render(rng.choice(phrase["ask"].splitlines()), fields)
        story = fields["story"] + " " if "story" in fields else ""
        examples.append(
            {
                "prompt": story + prompt + rng.choice(lexicon(language).tails),
                "completion": fields["answer"],
                "language": language,
                "task": task,
            }
        )
    return examples


def pairs(
    num_examples: int,
    seed: int,
    languages: Sequence[str] = LANGUAGES,
    tasks: Sequence[str] = TASKS,
) -> list[dict[str, str]]:
    """Write examples as `rows` does, each with its answer as `chosen` and a rambling one as `rejected`.

    What is rejected begins as the answer does and goes on with that to another question, of those with another answer.
    """
    made = rows(num_examples, seed, languages, tasks)
    examples = []
    for i, row in enumerate(made):
        rng = random.Random(derive(seed, "polyglot pair", i))
        chosen = row["completion"]
        others = (made[at]["completion"] for at in _wandering(rng, len(made)))
        # Of equal answers alone, it goes on with itself.
        more = next((other for other in others if other != chosen), chosen)
        rejected = f"{chosen} {more}"
        labels = {name: row[name] for name in ("language", "task")}
        examples.append({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected, **labels})
    return examples


def declarative(num_sentences: int, seed: int, languages: Sequence[str] = LANGUAGES) -> list[str]:
    """Write the facts behind the tasks as statements, never as questions or instructions."""
    cells = _cells(languages, _STATED)
    sentences = []
    for i in range(num_sentences):
        rng = random.Random(derive(seed, "polyglot statement", i))
        phrase, fields = _draw(*rng.choice(cells), rng)
        sentence = _render(rng.choice(phrase["say"].splitlines()), fields)
        sentences.append(f"{fields['story']} {sentence}" if "story" in fields else sentence)
    return sentences


def _wandering(rng: random.Random, count: int) -> Iterator[int]:
    """Yield every place once, from one that is drawn."""
    first = rng.randrange(count)
    yield from range(first, count)
    yield from range(first)


def _cells(languages: Sequence[str], tasks: Sequence[str]) -> list[tuple[str, str]]:
    for language in languages:
        if language not in LANGUAGES:
            raise ValueError(f"languages must be among {', '.join(LANGUAGES)}, got {language!r}")
    for task in tasks:
        if task not in TASKS:
            raise ValueError(f"tasks must be among {', '.join(TASKS)}, got {task!r}")
    if not languages or not tasks:
        raise ValueError(f"polyglot needs a language and a task, got {languages!r} and {tasks!r}")
    return [(language, task) for language in languages for task in tasks]


def _draw(language: str, task: str, rng: random.Random) -> tuple[dict[str, str], Fields]:
    """Draw one fact of a task, with the phrases that ask for it and state it."""
    variants = lexicon(language).phrases[task]
    variant = rng.choice(list(variants))
    return variants[variant], _DRAW[task](language, variant, rng)


def _render(phrase: str, fields: Fields) -> str:
    text = phrase.format_map(fields)
    return text[:1].upper() + text[1:]


def _capital(language: str, variant: str, rng: random.Random) -> Fields:
    country, of_country, city = rng.choice(lexicon(language).capitals)
    if variant == "city":
        return {"country": country, "of_country": of_country, "answer": city}
    return {"city": city, "answer": country, "of_answer": of_country}


def _opposite(language: str, _variant: str, rng: random.Random) -> Fields:
    word, answer = rng.sample(rng.choice(lexicon(language).opposites), 2)
    return {"word": word, "answer": answer}


def _translate(language: str, variant: str, rng: random.Random) -> Fields:
    here, other = lexicon(language), rng.choice(_RELATIVES[language])
    there = lexicon(other)
    k = rng.randrange(len(here.nouns))
    if variant == "into":
        name = here.language_names[other]
        return {
            "word": here.nouns[k].singular,
            "target": name,
            "answer": there.nouns[k].singular,
        }
    return {
        "word": there.nouns[k].singular,
        "source": here.language_names[other],
        "answer": here.nouns[k].singular,
    }


def _sequence(language: str, variant: str, rng: random.Random) -> Fields:
    words = rng.choice(lexicon(language).sequences)
    # Numbers do not begin again: leave out the pair that would join the last to the first.
    k = rng.randrange(len(words) if len(words) <= 12 else len(words) - 1)
    earlier, later = words[k], words[(k + 1) % len(words)]
    if variant == "after":
        return {"item": earlier, "answer": later}
    return {"item": later, "answer": earlier}


def _category(language: str, _variant: str, rng: random.Random) -> Fields:
    noun = rng.choice(lexicon(language).nouns)
    name, kind = lexicon(language).categories[noun.category]
    return {"word": noun.singular, "one": noun.one, "kind": kind, "answer": name}


def _plural(language: str, _variant: str, rng: random.Random) -> Fields:
    noun = rng.choice(lexicon(language).nouns)
    return {"word": noun.singular, "answer": noun.plural}


def _reading(language: str, variant: str, rng: random.Random) -> Fields:
    words = lexicon(language)
    # Two people, told about in different respects: what is asked has one place in the story.
    variants = words.phrases["reading"]
    respects = [variant, rng.choice([other for other in variants if other != variant])]
    sentences, people = [], rng.sample(words.names, 2)
    for name, respect in zip(people, respects, strict=True):
        one = {
            "name": name,
            "place": rng.choice(words.capitals[:_NUM_PLACES])[-1],
            "thing": rng.choice(words.things),
            "colour": rng.choice(words.colours),
            "hobby": rng.choice(words.hobbies),
        }
        sentences.append((_render(variants[respect]["tell"], one), one))
    asked = sentences[0][1]
    answer = asked[{"colour": "colour", "place": "place", "who": "name"}[variant]]
    rng.shuffle(sentences)
    return asked | {"answer": answer, "story": " ".join(text for text, _ in sentences)}


def _arithmetic(_language: str, variant: str, rng: random.Random) -> Fields:
    a, b = rng.randint(1, _LARGEST_TERM), rng.randint(1, _LARGEST_TERM)
    if variant == "plus":
        return {"a": str(a), "b": str(b), "answer": str(a + b)}
    return {"a": str(a + b), "b": str(b), "answer": str(a)}


def _position(language: str, variant: str, rng: random.Random) -> Fields:
    words = [noun.singular for noun in rng.sample(lexicon(language).nouns, 3)]
    return {"list": ", ".join(words), "answer": words[0 if variant == "first" else -1]}


def _choice(language: str, _variant: str, rng: random.Random) -> Fields:
    words = lexicon(language)
    kinds = rng.sample(list(words.categories), 3)
    chosen = [rng.choice([n for n in words.nouns if n.category == kind]) for kind in kinds]
    answer = rng.choice(chosen)
    return {
        "list": ", ".join(noun.singular for noun in chosen),
        "kind": words.categories[answer.category][1],
        "answer": answer.singular,
    }


_DRAW: Mapping[str, Callable[[str, str, random.Random], Fields]] = {
    "capital": _capital,
    "opposite": _opposite,
    "translate": _translate,
    "sequence": _sequence,
    "category": _category,
    "plural": _plural,
    "reading": _reading,
    "arithmetic": _arithmetic,
    "position": _position,
    "choice": _choice,
}

# Statements favour the tasks with the most to learn.
_STATED: tuple[str, ...] = (*TASKS, "translate", "reading", "arithmetic", "arithmetic", "position")
