"""Command lines that start a Python script, read from a shell script as it would expand them; nothing is run."""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import PurePath

_ASSIGNMENT = re.compile(r"(?:export\s+)?([A-Za-z_]\w*)=(.*)", re.DOTALL)
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
_ONLY_SHELL = re.compile(r"`|\$\(|\$\{(?!\w+\})|\$[@*#?!$]")
"""What is not simply a variable's value: output of commands, defaults, arguments of the script."""
_PYTHON = re.compile(r"python[\d.]*")
_CALL = re.compile(r"\b(python[\d.]*|accelerate|torchrun|deepspeed)\s.*\.py\b")
_BETWEEN = ("&&", "||", "|", "|&", "&", ";")
_REDIRECTION = re.compile(r"[\d&]?(?:>>?|<)(\S*)")
_LAUNCHERS = ("accelerate", "torchrun", "deepspeed")


@dataclass(frozen=True, slots=True)
class Command:
    """A Python script and what it is called with."""

    script: str
    """The file's name."""
    options: Mapping[str, str | None]
    """By name, without the dashes; None where a name stands alone."""


def read_command(text: str) -> Command | None:
    """Return the one call of a Python script in a shell text; None where there is none.

    Raises:
        ValueError: where there are several, or it uses what only a shell can expand.
    """
    variables: dict[str, str] = {}
    found: list[Command] = []
    for line in re.sub(r"\\\r?\n", " ", text.rstrip().removesuffix("\\")).splitlines():
        for words in _simple(_words(line)):
            while words and (assignment := _ASSIGNMENT.fullmatch(words[0])):
                # What only a shell can work out is missed where it is used, and nowhere else.
                with suppress(ValueError):
                    variables[assignment[1]] = _expanded(assignment[2], variables)
                words.pop(0)
            if (place := _script(words)) is not None:
                rest = [_expanded(word, variables) for word in words[place + 1 :]]
                found.append(Command(PurePath(words[place]).name, _options(rest)))
    if len(found) > 1:
        raise ValueError(f"it holds {len(found)} calls of a Python script, which must be one")
    return found[0] if found else None


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line, comments=True)
    except ValueError as error:
        if not _CALL.search(line):
            return []
        raise ValueError(
            f"the line {line.strip()[:60]!r} is no command: {str(error).lower()}"
        ) from error


def _simple(words: Sequence[str]) -> Iterator[list[str]]:
    """Yield the commands of a line one by one, without where their output goes."""
    own: list[str] = []
    left = iter(words)
    for word in left:
        redirects = _REDIRECTION.fullmatch(word)
        if redirects:
            if not redirects[1]:
                next(left, None)
        elif word in _BETWEEN:
            yield own
            own = []
        elif word.endswith(";"):
            yield [*own, word[:-1]]
            own = []
        else:
            own.append(word)
    yield own


def _script(words: list[str]) -> int | None:
    """Return where the name of a script stands; None where the line calls none."""
    called = [
        PurePath(word).name in _LAUNCHERS or _PYTHON.fullmatch(PurePath(word).name)
        for word in words
    ]
    if not any(called):
        return None
    return next((at for at, word in enumerate(words) if word.endswith(".py")), None)


def _expanded(word: str, variables: Mapping[str, str]) -> str:
    if _ONLY_SHELL.search(word):
        raise ValueError(f"{word!r} is what only a shell can work out: write its value")

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in variables:
            raise ValueError(f"the variable {name} is used and not set: write its value")
        return variables[name]

    return _VARIABLE.sub(value, word)


def _options(words: list[str]) -> dict[str, str | None]:
    options: dict[str, str | None] = {}
    for at, word in enumerate(words):
        if not _is_name(word):
            if at == 0 or not _is_name(words[at - 1]) or "=" in words[at - 1]:
                raise ValueError(f"{word!r} belongs to no option")
            continue
        name, equals, text = word.lstrip("-").partition("=")
        following = words[at + 1] if at + 1 < len(words) else None
        alone = following is None or _is_name(following)
        value = text if equals else None if alone else following
        if name in options and options[name] != value:
            raise ValueError(f"--{name} is given twice, as {options[name]} and {value}")
        options[name] = value
    return options


def _is_name(word: str) -> bool:
    return bool(re.fullmatch(r"--?[A-Za-z][\w.-]*(=.*)?", word, re.DOTALL))
