"""The options of a benchmark whose runs are kept: which share of them this process makes, and whether it writes the table."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
_KEPT = Path(__file__).parent / "kept"


def parser_of(doc: str, runs: str) -> argparse.ArgumentParser:
    """Return a parser with `--part`, `--table` and `--runs`, for `share_of` to read.

    Args:
        doc: Of the script.
        runs: The folder where runs are kept unless another is named.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--part", default="0/1", help="i/n: every n-th run from the i-th")
    parser.add_argument("--table", action="store_true", help="only write the table")
    parser.add_argument("--runs", type=Path, default=Path(runs), help="where runs are kept")
    return parser


@dataclass(frozen=True)
class Share:
    """What one process does."""

    part: int
    parts: int
    only_table: bool

    def of(self, runs: Sequence[T]) -> Sequence[T]:
        """Return the runs to make."""
        return [] if self.only_table else runs[self.part :: self.parts]

    @property
    def writes(self) -> bool:
        """Return whether the table is written: not by one process of several."""
        return self.only_table or self.parts == 1


def share_of(asked: argparse.Namespace) -> Share:
    """Return what the options say."""
    part, parts = map(int, asked.part.split("/"))
    return Share(part, parts, asked.table)


def recorded(name: str) -> dict[str, Any]:
    """Return what earlier runs of a table came to, as `kept/NAME.json` keeps it; empty where there is none."""
    file = _KEPT / f"{name}.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return found


def record(name: str, values: Mapping[str, Any]) -> None:
    """Keep what runs came to, so that the table can go on elsewhere; a change of what is measured deletes the file."""
    lines = (f"{json.dumps(key)}: {json.dumps(values[key])}" for key in sorted(values))
    (_KEPT / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
