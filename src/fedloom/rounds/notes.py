"""When a command was told to go on although a run's data or model had changed: kept in its folder, shown in its report."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedloom.rounds.inputs import now
from fedloom.rounds.reading import read_text
from fedloom.spaces.handshake import MEANING

FILE = "anyway.jsonl"


@dataclass(frozen=True, slots=True)
class Difference:
    """What is no longer as a run was begun."""

    key: str
    was: str
    now: str

    def __str__(self) -> str:
        """Return it as a part of a sentence."""
        return f"{MEANING.get(self.key, self.key)}, {self.was} then and {self.now} now"


def write_note(folder: Path, command: str, differences: Sequence[Difference]) -> Mapping[str, Any]:
    """Add a line and return it: which command, when, and what differed."""
    row = {"date": now(), "command": command, "differs": [asdict(each) for each in differences]}
    with (folder / FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return row


def read_notes(folder: Path) -> list[Mapping[str, Any]]:
    """Return the lines.

    Raises:
        ValueError: naming the line that no command writes.
    """
    file = folder / FILE
    if not file.exists():
        return []
    rows = []
    for number, line in enumerate(read_text(file, remedy="remove it").splitlines(), start=1):
        try:
            row = json.loads(line)
            said(row)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"line {number} of {file} is not what a command writes: remove it"
            ) from error
        rows.append(row)
    return rows


def said(row: Mapping[str, Any]) -> str:
    """Return a line as a sentence."""
    parts = "; ".join(str(Difference(**each)) for each in row["differs"])
    day = str(row["date"])[:16].replace("T", " ")
    return f"On {day} {row['command']} was told to go on although this had changed: {parts}."
