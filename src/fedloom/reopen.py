"""A run that is there already, opened again: with its data or without, and only with what it was begun with."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from fedloom.data.data_settings import DataSettings
from fedloom.data.encoding import Tokenizer
from fedloom.data.federation import Federation, federate
from fedloom.launch import job_of
from fedloom.objectives.objective import Objective
from fedloom.recipe import apply_overrides, build_recipe
from fedloom.run.binding import compare
from fedloom.run.loop import Run
from fedloom.run.notes import said, write_note
from fedloom.run.reading import read_recipe_text, require_run
from fedloom.run.recipe_settings import Recipe
from fedloom.run.restore import newest
from fedloom.run.session import Federate, Session, build


@dataclass(frozen=True, slots=True)
class Opened:
    """A run as its newest good checkpoint has it."""

    session: Session
    run: Run[Any]


def recipe_of(folder: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe in a run's folder, with overrides.

    Raises:
        ValueError: where there is no run, or its recipe is not whole.
    """
    require_run(folder)
    text, tree = read_recipe_text(folder)
    # A run writes every section, `run` last: half a file would be filled up with defaults.
    if "run" not in tree or not text.endswith("\n"):
        raise ValueError(
            f"{folder / 'recipe.yaml'} ends too early: put back the one this run was begun with"
        )
    return build_recipe(apply_overrides(dict(tree), overrides))


def open_run(
    folder: Path,
    command: str,
    *,
    console: Console,
    data: bool = False,
    anyway: bool = False,
    model: Path | None = None,
) -> Opened:
    """Return a run's session at its newest good checkpoint.

    Args:
        folder: The run's.
        command: What asks, for the notes of what it was told to accept.
        console: Where it is said that a damaged checkpoint was passed over.
        data: Whether the data is read.
        anyway: Go on although data or model are not what the run was begun with, and write that down.
        model: Where the base model is now; where the recipe says if not given.

    Raises:
        ValueError: where something is missing, damaged, or not what the run was begun with.
    """
    recipe = recipe_of(folder)
    if model is not None:
        recipe = dataclasses.replace(
            recipe, model=dataclasses.replace(recipe.model, name=str(model))
        )
    own = _needed(command) if data and not recipe.elsewhere else None
    session = build(recipe, folder, own=own, data=data)
    differences = compare(session, anyway=anyway)
    found = newest(session, job_of(recipe).binding())
    for reason in found.damaged:
        _say(console, f"this is round {found.run.number}, as a newer one is damaged: {reason}")
    if differences:
        _say(console, said(write_note(folder, command, differences)))
    return Opened(session, found.run)


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
