"""A run that is there already, opened again: with its data or without, and only with what it was begun with."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from fedloom.data.data_settings import DataSettings
from fedloom.data.encoding import Tokenizer
from fedloom.data.federation import Federation, federate
from fedloom.objectives.objective import Objective
from fedloom.objects import PYTHON, Objects, only_here, rebuilt
from fedloom.recipe import apply_overrides, load_recipe
from fedloom.recipe_text import to_tree
from fedloom.rounds.binding import compare
from fedloom.rounds.inputs import note_text, write_note
from fedloom.rounds.loop import Run
from fedloom.rounds.reading import read_recipe_text, require_run
from fedloom.rounds.recipe_settings import Recipe
from fedloom.rounds.restore import newest
from fedloom.rounds.session import Federate, Session, build

_FREE = (
    "name",
    "description",
    # A model is known by the hash of its weights, wherever it lies.
    "model.name",
    "model.file",
    "model.revision",
    # So are rows by theirs; metrics are a section, and what is called after a round decides no number.
    "objects",
    "objects.data",
    "objects.model",
    "objects.metrics",
    "objects.callbacks",
    "run.trackers",
    "run.baselines",
    "run.samples",
    "run.keep_checkpoints",
    "run.patience_seconds",
    "engine.flower.deadline",
    "engine.flower.patience",
    "evaluation.by",
    "audit",
)
"""Settings that may differ at resume because no number of the run depends on them."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A run as its newest good checkpoint has it."""

    session: Session
    run: Run[Any]


def as_begun(recipe: Recipe, folder: Path) -> Recipe:
    """Return the recipe with the batch size that `auto` was found to be by the run in a folder, if there is one."""
    if recipe.local.batch_size != "auto" or not (folder / "recipe.yaml").is_file():
        return recipe
    begun = load_recipe(folder / "recipe.yaml").local.batch_size
    return dataclasses.replace(recipe, local=dataclasses.replace(recipe.local, batch_size=begun))


def flatten(tree: Any, path: str = "") -> dict[str, Any]:
    """Return settings by dotted path, for comparing recipes."""
    if isinstance(tree, Mapping) and tree:
        return {
            k: v
            for key, item in tree.items()
            for k, v in flatten(item, f"{path}.{key}" if path else str(key)).items()
        }
    if isinstance(tree, list) and any(isinstance(item, Mapping) for item in tree):
        if any(isinstance(item, Mapping) and len(item) > 1 for item in tree):
            # Settings in a list, which are told apart by their places, as layers and metrics are by their names.
            places = {str(at): item for at, item in enumerate(tree)}
            return flatten(places, path)
        named = (item if isinstance(item, Mapping) else {item: True} for item in tree)
        return {k: v for item in named for k, v in flatten(item, path).items()}
    return {path: tree}


def binding_of(recipe: Recipe) -> dict[str, Any]:
    """Return the settings that a checkpoint is bound to, by dotted path."""
    bound = {k: v for k, v in flatten(to_tree(recipe)).items() if k not in _FREE}
    if recipe.local.schedule == "constant" and not recipe.local.warmup_rounds:
        bound.pop("run.rounds")
    return bound


def recipe_of(
    folder: Path, overrides: Sequence[str] = (), *, objects: Objects | None = None
) -> Recipe:
    """Return the recipe in a run's folder, with overrides.

    Args:
        folder: The run's.
        overrides: As on the command line.
        objects: Given in the place of what the recipe says, as when the run was begun.

    Raises:
        ValueError: where there is no run, its recipe is not whole, or its algorithm is one that only Python has.
    """
    require_run(folder)
    text, tree = read_recipe_text(folder)
    # A run writes every section, `run` last: half a file would be filled up with defaults.
    if "run" not in tree or not text.endswith("\n"):
        raise ValueError(
            f"{folder / 'recipe.yaml'} ends too early: put back the one this run was begun with"
        )
    objects = objects or Objects()
    applied = apply_overrides(dict(tree), overrides)
    if objects.algorithm is None:
        for name in (name for layer in applied["algorithm"] for name in layer if only_here(name)):
            raise ValueError(
                f"the run in {folder} was begun from Python with an algorithm that cannot be imported, {name}: give it"
                f' to fedloom.run("{folder / "recipe.yaml"}", "{folder}", algorithm=...) to go on, or to'
                f' fedloom.open_run("{folder}", algorithm=...) to use what came of it'
            )
    return rebuilt(applied, overrides, objects)


def open_session(
    folder: Path,
    command: str,
    *,
    console: Console,
    objects: Objects | None = None,
    data: bool = False,
    anyway: bool = False,
    model: Path | None = None,
) -> Opened:
    """Return a run's session at its newest good checkpoint.

    Args:
        folder: The run's.
        command: What asks, for the notes of what it was told to accept.
        console: Where it is said that a damaged checkpoint was passed over.
        objects: Given in the place of what the recipe says, as when the run was begun; a trainer is not needed.
        data: Whether the data is read.
        anyway: Go on although data or model are not what the run was begun with, and write that down.
        model: Where the base model is now; where the recipe says if not given.

    Raises:
        ValueError: where something is missing, damaged, or not what the run was begun with.
    """
    objects = objects or Objects()
    recipe = recipe_of(folder, objects=objects)
    if model is not None:
        # Which file of a folder or a repository says nothing of another file.
        file = None if model.expanduser().is_file() else recipe.model.file
        moved = dataclasses.replace(recipe.model, name=str(model), file=file)
        recipe = dataclasses.replace(recipe, model=moved)
    _check_there(recipe, objects, folder, data=data)
    makers = objects.makers()
    if data and not recipe.elsewhere and makers.federation is None:
        makers = dataclasses.replace(makers, federation=_needed(command))
    session = build(recipe, folder, makers=makers, data=data)
    differences = compare(session, anyway=anyway)
    found = newest(session, binding_of(recipe))
    for reason in found.damaged:
        _say(console, f"this is round {found.run.number}, as a newer one is damaged: {reason}")
    if differences:
        _say(console, note_text(write_note(folder, command, differences)))
    return Opened(session, found.run)


def _check_there(recipe: Recipe, objects: Objects, folder: Path, *, data: bool) -> None:
    """Refuse to look for a model or for rows that only Python has."""
    for name, where, given in (
        ("model", recipe.model.name, objects.model),
        ("data", recipe.data.source if data else "", objects.data),
    ):
        if given is None and where.startswith(PYTHON):
            raise ValueError(
                f"the {name} of the run in {folder} was given from Python, {where.removeprefix(PYTHON)}: open it with"
                f' fedloom.open_run("{folder}", {name}=...)'
            )


def _needed(command: str) -> Federate:
    def read(settings: DataSettings, tokenizer: Tokenizer, objective: Objective) -> Federation:
        try:
            return federate(settings, tokenizer, objective)
        except (ValueError, OSError) as error:
            raise ValueError(
                f"{command} reads the data of the run again, as chat, export and route do not: {error}"
            ) from error

    return read


def _say(console: Console, sentence: str) -> None:
    console.print(sentence, style="yellow", markup=False, highlight=False, soft_wrap=True)
