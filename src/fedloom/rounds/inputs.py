"""What a run was begun with: hashes of its split, its model and its tokenizer, and where their files were."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from fedloom.data.data_settings import DataSettings
from fedloom.models.base_model import ModelSettings
from fedloom.rounds.reading import read_json

FILE = "inputs.json"


@dataclass(frozen=True, slots=True)
class Place:
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
    model: Place | None = None
    data: Place | None = None
    """None where the recipe names something built in, or on the Hub."""
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
        told = read_json(file, dict, remedy=remedy)
        try:
            places = {n: told[n] and Place(**told[n]) for n in ("model", "data")}
            found = cls(**{**told, **places})
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


def place_of(name: str) -> Place | None:
    """Return where a file or folder is now; None where there is none."""
    path = Path(name).expanduser()
    return Place(name, str(path.resolve())) if path.exists() else None


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


def _found(name: str, known: Place | None) -> str:
    if known is None or known.name != name or Path(name).expanduser().exists():
        return name
    return known.path
