"""Where the files of a model are: in the package, in a folder, in a GGUF file, or on the Hub."""

from dataclasses import dataclass
from pathlib import Path

from fedloom.models.found import check_folder, found
from fedloom.models.gguf import converted, header_of

FETCHED = ("smollm2.gguf", "gemma3-270m.gguf")
"""Files that `make models` brings, and recipes name."""
_SUFFIX = ".gguf"
_WEIGHTS = ("*.safetensors", "*.bin")


@dataclass(frozen=True, slots=True)
class Place:
    """What transformers loads a model from."""

    path: str
    """A folder, or the Hub id."""
    gguf: Path | None = None
    """The GGUF file that the folder was converted from."""
    commit: str | None = None
    """Of a GGUF file on the Hub."""

    @property
    def holds(self) -> str:
        """Return what the GGUF file holds, in words; empty where there is none."""
        return header_of(self.gguf, self.gguf.name).described() if self.gguf else ""


def locate(name: str, file: str | None = None, revision: str | None = None) -> Place:
    """Return where transformers loads a model from; a GGUF file is converted where it has not been yet.

    Args:
        name: As the recipe's model.name.
        file: As its model.file: which GGUF of a folder or a Hub repository.
        revision: Of the repository.

    Raises:
        ValueError: where a folder or a file that is named holds no whole model.
    """
    gguf = gguf_file(name, file, revision)
    if gguf is not None:
        return Place(str(converted(gguf, name)), gguf, None if is_local(name) else _commit(gguf))
    if name.startswith("builtin:"):
        folder = Path(__file__).parent / name.removeprefix("builtin:")
        if not (folder / "config.json").is_file():
            raise ValueError(f"model.name: the only built-in model is builtin:tiny, got {name}")
        return Place(str(folder))
    if not is_local(name):
        return Place(name)
    folder = Path(name).expanduser()
    check_folder(folder, name)
    return Place(str(folder))


def gguf_file(name: str, file: str | None, revision: str | None) -> Path | None:
    """Return the GGUF file that a recipe means, None where it means none.

    Raises:
        ValueError: where it is not there, or there are several.
    """
    path = Path(name).expanduser()
    if name.startswith("builtin:"):
        return _without(file, None, name)
    if path.is_file():
        return _without(file, path, name)
    if name.lower().endswith(_SUFFIX):
        fetched = " `make models` in a checkout fetches it;" if path.name in FETCHED else ""
        raise ValueError(
            f"model.name: there is no file {name};{fetched} one on the Hub is named by model.name=OWNER/NAME and"
            " model.file=FILE.gguf"
        )
    if path.is_dir():
        return _in_folder(path, file, name)
    return None if file is None or is_local(name) else _on_the_hub(name, file, revision)


def is_local(name: str) -> bool:
    """Return whether a name is meant as a path."""
    return name.startswith((".", "/", "~")) or Path(name).expanduser().exists()


def _without(file: str | None, path: Path | None, name: str) -> Path | None:
    if file is not None:
        raise ValueError(
            f"model.file must be left out where model.name is no folder and no Hub id, got {file} with {name}"
        )
    return path


def _in_folder(folder: Path, file: str | None, name: str) -> Path | None:
    held = sorted(path.name for path in folder.iterdir() if path.name.lower().endswith(_SUFFIX))
    if file is not None:
        if not (folder / file).is_file():
            raise ValueError(
                f"model.file {file} is not in {name}, which holds {', '.join(held) or 'no GGUF file'}"
            )
        return folder / file
    if not held or any(path for kind in _WEIGHTS for path in folder.glob(kind)):
        return None
    if len(held) > 1:
        raise ValueError(f"model.name {name} holds {', '.join(held)}: choose one with model.file")
    return folder / held[0]


def _on_the_hub(name: str, file: str, revision: str | None) -> Path:
    from transformers.utils import cached_file

    with found(f"model.file {file} cannot be had from {name} (revision {revision or 'default'})"):
        path = cached_file(name, file, revision=revision)
    if path is None:
        raise ValueError(f"model.file {file} is not in {name} (revision {revision or 'default'})")
    return Path(path)


def _commit(file: Path) -> str | None:
    from transformers.utils.hub import extract_commit_hash

    # Of the path as the Hub's cache has it, not of the blob that it is a link to.
    commit = extract_commit_hash(str(file), None)
    return commit if isinstance(commit, str) else None
