"""Words and phrases of the built-in corpus, by language."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml

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
