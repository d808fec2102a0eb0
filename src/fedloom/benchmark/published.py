"""The tables that pages print: the command that makes each, what it came to, and what papers say of the same."""

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedloom.recipe_yaml import suggest

WHERE = (
    "the scripts in benchmarks/ and what they came to are in a clone of the repository and in the source distribution, not"
    " in the wheel: run `fedloom reproduce` there"
)
_COMMAND = re.compile(r"^command +python (\S.*)$", re.M)
_DATA = "FEDLOOM_DATA"
_TABLES = (".md", ".txt")
_CLONE = Path(__file__).resolve().parents[3]
"""Where this file is a clone's src/fedloom/benchmark/published.py."""


@dataclass(frozen=True)
class Said:
    """What a paper says."""

    where: str
    """Which, and where in it."""
    columns: Sequence[str]
    rows: Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Published:
    """A table."""

    name: str
    """Its file's, without the ending."""
    papers: Sequence[Said] = ()
    """On other models and data than ours; none where no paper has such figures, or none was found."""
    file: Path | None = None
    """Of our figures; None outside of a clone."""

    @property
    def text(self) -> str:
        """Return our figures, with machine, date and command."""
        return "" if self.file is None else self.file.read_text(encoding="utf-8").strip()

    @property
    def title(self) -> str:
        """Return its first line where that is a heading, and else that of the script that made it."""
        first = self.text.partition("\n")[0]
        if first.startswith("# ") or self.file is None:
            return first.removeprefix("# ") or self.name
        (script, *_), *_ = self.commands()
        told = ast.get_docstring(ast.parse(Path(script).read_text(encoding="utf-8"))) or self.name
        return told.partition("\n")[0].rstrip(".")

    def commands(self) -> list[list[str]]:
        """Return the words of the commands that made it, without the interpreter, the script first.

        Raises:
            ValueError: where the head names no script that is there.
        """
        assert self.file is not None, "outside of a clone there is no command"
        folder, found = self.file.parents[1], []
        for line in dict.fromkeys(_COMMAND.findall(self.text)):
            script, *rest = shlex.split(line, posix=True)
            path = folder.parent / script if "/" in script else folder / script
            if not path.is_file():
                raise ValueError(f"{self.file} was made by {script}, which is not in {folder}")
            found.append([str(path), *rest])
        if not found:
            raise ValueError(f"the head of {self.file} names no command")
        return found

    def said(self) -> list[str]:
        """Return a line a figure of the papers."""
        lines = []
        for paper in self.papers:
            lines.append(f"{paper.where}:")
            for row, values in paper.rows.items():
                told = ", ".join(
                    f"{value} ({column})" if len(values) > 1 else str(value)
                    for column, value in zip(paper.columns, values, strict=True)
                )
                lines.append(f"  {row}: {told}")
        return lines


def benchmarks() -> Path | None:
    """Return the folder of the scripts: where this package is a clone's, or where the command is started; None elsewhere."""
    for place in (_CLONE, Path.cwd()):
        if (place / "benchmarks" / "results").is_dir():
            return place / "benchmarks"
    return None


def published(folder: Path | None) -> dict[str, Published]:
    """Return the tables by name.

    Args:
        folder: Of the scripts; None: those of which papers say something.
    """
    papers = {name: [_said(one) for one in given] for name, given in _papers().items()}
    found = [] if folder is None else sorted((folder / "results").iterdir())
    files = {file.stem: file for file in found if file.suffix in _TABLES}
    names = papers if folder is None else files
    return {name: Published(name, papers.get(name, ()), files.get(name)) for name in sorted(names)}


def find(name: str, folder: Path | None) -> Published:
    """Return a table.

    Raises:
        ValueError: where there is none of this name.
    """
    known = published(folder)
    if name not in known:
        more = "" if folder else f"; {WHERE}"
        raise ValueError(
            f"no table is called {name!r}{suggest(name, known)}: `fedloom reproduce --list` has all{more}"
        )
    return known[name]


def reproduce(table: Published) -> int:
    """Run the commands that made a table, here, and return the exit code of the first that fails, or 0.

    Raises:
        ValueError: where its data is not there.
    """
    for script, *words in table.commands():
        command = [sys.executable, script, *(_found(word) for word in words)]
        code = subprocess.run(command, check=False).returncode
        if code:
            return code
    return 0


def _found(word: str) -> str:
    """Return a word of a command, a path of data as it is here."""
    is_file = "/" in word or re.search(r"\.(jsonl?|gguf|csv|parquet)$", word)
    if not is_file or "=" in word:
        return word
    given = os.environ.get(_DATA)
    places = [Path(word).expanduser(), *([Path(given) / word] if given else [])]
    for place in places:
        if place.exists():
            return str(place)
    raise ValueError(
        f"the command reads {word}, which is not here: start it where that is, or name the folder in {_DATA}"
    )


def _said(given: Mapping[str, Any]) -> Said:
    return Said(given["where"], given["columns"], given["rows"])


def _papers() -> Mapping[str, Any]:
    file = Path(__file__).with_name("published.yaml")
    told: Mapping[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return told
