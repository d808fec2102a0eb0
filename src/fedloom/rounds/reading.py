"""The files of a run's folder, read: whatever is wrong with one is a sentence with its name and the remedy."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from fedloom.core.metrics import MetricTable
from fedloom.data.manifest import Manifest

T = TypeVar("T")
# Several times faster where PyYAML is built with it; what it makes of a file is the same.
_LOADER = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader
_MOST = 100_000
"""Values in a run's recipe, far more than one may hold that is begun."""
QUIET_MANIFEST = Path("checkpoints") / "manifest.json"
"""Below a run's folder: the whole manifest of a run that tells others little."""


def require_run(folder: Path) -> None:
    """Refuse what is no folder of a run.

    Raises:
        ValueError: saying what it is instead.
    """
    if folder.is_file():
        raise ValueError(f"{folder} is a file: give the folder of a run")
    try:
        found = (folder / "recipe.yaml").is_file()
    except OSError as error:
        raise ValueError(f"{folder} cannot be read: {error.strerror}") from error
    if not found:
        raise ValueError(f"{folder} holds no run: it has no recipe.yaml; `fedloom run` makes one")


def read_text(file: Path, *, remedy: str) -> str:
    """Return the text of a file; `remedy` ends the sentence where it cannot be read."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8 (byte {error.start}): {remedy}") from error
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror}): {remedy}") from error


def read_json(file: Path, kind: type[T], *, remedy: str) -> T:
    """Return what a JSON file holds, a dict or a list as `kind` says; `remedy` ends the sentence of an error."""
    text = read_text(file, remedy=remedy)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # also of numbers with too many digits
        raise ValueError(f"{file} is not JSON ({error}): {remedy}") from error
    if not isinstance(value, kind):
        wanted = "an object" if kind is dict else "a list"
        raise ValueError(f"{file} must hold {wanted}, got {type(value).__name__}: {remedy}")
    return value


def read_recipe_text(folder: Path) -> tuple[str, Mapping[str, Any]]:
    """Return recipe.yaml of a run as text and as a mapping.

    Raises:
        ValueError: where it is not the whole file that a run writes.
    """
    file, remedy = folder / "recipe.yaml", "put back the one this run was begun with"
    text = read_text(file, remedy=remedy)
    try:
        tree = yaml.load(text, _LOADER)  # both are safe
    except yaml.YAMLError as error:
        message = " ".join(str(error).split())
        raise ValueError(f"{file} is not YAML ({message}): {remedy}") from error
    if not isinstance(tree, dict):
        what = type(tree).__name__ if text.strip() else "an empty file"
        raise ValueError(f"{file} must hold the sections of a recipe, got {what}: {remedy}")
    _check_size(tree, file, remedy)
    for name in ("model", "tune", "data", "evaluation"):
        if not isinstance(tree.get(name) or {}, dict):
            raise ValueError(f"{file}: {name} must hold settings, got {tree[name]!r}: {remedy}")
    return text, tree


def _check_size(tree: Any, file: Path, remedy: str) -> None:
    """Refuse what aliases blow up, or turn into itself, before anybody walks through it."""
    waiting, met = [tree], 0
    while waiting:
        value, met = waiting.pop(), met + 1
        if met > _MOST:
            raise ValueError(f"{file} has more than {_MOST} values, with its aliases: {remedy}")
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def metrics_of(folder: Path) -> MetricTable:
    """Return the metrics of a run, users' own as its recipe.yaml declares them; without that, the package's."""
    if not (folder / "recipe.yaml").exists():
        return MetricTable()
    listed = (read_recipe_text(folder)[1].get("evaluation") or {}).get("metrics")
    try:
        return MetricTable.read(listed if isinstance(listed, list) else [])
    except ValueError as error:
        raise ValueError(f"{folder / 'recipe.yaml'}: {error}") from error


def manifest_of(folder: Path) -> Path:
    """Return the file that holds the whole manifest of a run: of a quiet one, it is the owner's alone."""
    quiet = folder / QUIET_MANIFEST
    return quiet if quiet.exists() else folder / "manifest.json"


def read_manifest(folder: Path, *, elsewhere: bool = False) -> Manifest:
    """Return the manifest of a run; of one whose data is `elsewhere`, sites tell their profiles again.

    Raises:
        ValueError: where it is not there, or not whole.
    """
    file, remedy = manifest_of(folder), f"`fedloom resume {folder}` writes it anew"
    content = read_json(file, dict, remedy=remedy)
    try:
        manifest = Manifest.from_json(content)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no manifest of a split ({error}): {remedy}") from error
    if not elsewhere and manifest.profiles.keys() != manifest.clients.keys():
        raise ValueError(f"{file} does not tell the profile of every client: {remedy}")
    return manifest
