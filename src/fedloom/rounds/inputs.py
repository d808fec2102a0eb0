"""What a run was begun with: hashes and places of its files; and when a command went on although they had changed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedloom.data.data_settings import DataSettings
from fedloom.models.build import ModelSettings
from fedloom.rounds.reading import read_json, read_text
from fedloom.spaces.handshake import MEANING

FILE = "inputs.json"


@dataclass(frozen=True, slots=True)
class NamedPath:
    """A file or folder that a recipe names."""

    name: str
    """As the recipe has it; a relative one counts from wherever a command is started."""
    path: str
    """Where that was."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What inputs.json holds."""

    since: str
    """When the run was begun with these."""
    identity: Mapping[str, str]
    """Hashes by name, see `spaces.handshake`."""
    model: NamedPath | None = None
    data: NamedPath | None = None
    """None where the recipe names something built in, or on the Hub."""
    public: NamedPath | None = None
    """Of text of the server's own, likewise."""
    commit: str | None = None
    """Of a model on the Hub."""

    @classmethod
    def read(cls, folder: Path) -> "Inputs | None":
        """Return what a run's folder holds; None where there is none.

        Raises:
            ValueError: where the file is damaged.
        """
        file = folder / FILE
        if not file.exists():
            return None
        remedy = "put back the file as the run wrote it, or remove it and take what is there now with --anyway"
        fields = read_json(file, dict, remedy=remedy)
        try:
            fields = {"public": None, **fields}
            places = {n: fields[n] and NamedPath(**fields[n]) for n in ("model", "data", "public")}
            found = cls(**{**fields, **places})
            known = {str(key): str(value) for key, value in found.identity.items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is not what a run writes ({error}): {remedy}") from error
        return replace(found, identity=known)

    def to_json(self) -> dict[str, object]:
        """Return plain dictionaries and strings."""
        return asdict(self)


def now() -> str:
    """Return the time, as the files of a run have it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def named_path(name: str) -> NamedPath | None:
    """Return where a file or folder is now; None where there is none."""
    path = Path(name).expanduser()
    return NamedPath(name, str(path.resolve())) if path.exists() else None


def located(
    model: ModelSettings, data: DataSettings, folder: Path
) -> tuple[ModelSettings, DataSettings]:
    """Return both sections with paths that hold here: as they are, or where the run found them when it was begun.

    Raises:
        ValueError: where a folder that the run's model came from is gone.
    """
    known = Inputs.read(folder)
    if known is None:
        return model, data
    name, source = _found(model.name, known.model), _found(data.source, known.data)
    if known.model and name == known.model.path and not Path(name).exists():
        raise ValueError(
            f"model.name {model.name} was {name} when the run in {folder} was begun, and is gone: put it back,"
            " or say where it is now, with --model PATH (`fedloom resume`: model.name=PATH)"
        )
    return replace(model, name=name), replace(data, source=source)


def located_text(source: str, folder: Path) -> str:
    """Return where the server's own text is: as the recipe names it, or where the run found it when it was begun."""
    known = Inputs.read(folder)
    return _found(source, known.public) if known else source


def _found(name: str, known: NamedPath | None) -> str:
    if known is None or known.name != name or Path(name).expanduser().exists():
        return name
    return known.path


NOTES_FILE = "anyway.jsonl"


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
    with (folder / NOTES_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return row


def read_notes(folder: Path) -> list[Mapping[str, Any]]:
    """Return the lines.

    Raises:
        ValueError: naming the line that no command writes.
    """
    file = folder / NOTES_FILE
    if not file.exists():
        return []
    rows = []
    for number, line in enumerate(read_text(file, remedy="remove it").splitlines(), start=1):
        try:
            row = json.loads(line)
            note_text(row)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"line {number} of {file} is not what a command writes: remove it"
            ) from error
        rows.append(row)
    return rows


def note_text(row: Mapping[str, Any]) -> str:
    """Return a line as a sentence."""
    parts = "; ".join(str(Difference(**each)) for each in row["differs"])
    day = str(row["date"])[:16].replace("T", " ")
    return f"On {day} {row['command']} was told to go on although this had changed: {parts}."
