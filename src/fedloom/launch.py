"""A recipe, run with its baselines: for the command line and for programs."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from fedloom.baselines import baseline_of
from fedloom.core.places import file_name, folder_at
from fedloom.deploy.connect import connect
from fedloom.deploy.listening import Listening
from fedloom.experiment import Job, conduct
from fedloom.recipe import to_tree, to_yaml
from fedloom.run.recipe_settings import Baseline, Recipe


def run_recipe(
    recipe: Recipe,
    folder: Path,
    *,
    console: Console | None = None,
    listening: Listening | None = None,
    anyway: bool = False,
) -> Mapping[str, Mapping[str, Any]]:
    """Run a recipe with its baselines, or go on with a run that is in the folder already.

    Args:
        recipe: What to run.
        folder: The run's folder, made if needed.
        console: Where progress and notes go; nowhere if not given.
        listening: Where sites from elsewhere come in; where they did before if not given.
        anyway: Go on although the data, or beneath adapters the base model, is not what the run was begun with.

    Returns:
        The summaries by name, as in summary.json; "" is the run's own, the others its baselines'.

    Raises:
        ValueError: where the data, the model or a checkpoint does not fit the recipe.
    """

    def baseline(kind: Baseline, summary: Mapping[str, Any]) -> Job:
        return job_of(baseline_of(recipe, kind, summary=summary))

    console = console or Console(quiet=True)
    if recipe.elsewhere and recipe.run.baselines:
        console.print("no baselines: the data is at the sites")
        recipe = dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, baselines=()))
    for kind in recipe.run.baselines:
        # What cannot be made is refused now, not after the run.
        baseline(kind, {"num_clients": 1, "num_clusters": 1})
    to_sites = partial(connect, listening=listening or Listening.read(folder))
    return conduct(
        job_of(recipe),
        folder,
        baseline=baseline,
        connect=to_sites,
        console=console,
        anyway=anyway,
    )


def new_folder(name: str, wanted: Path | None) -> Path:
    """Return the folder of a new run: `wanted`, or runs/NAME, numbered if a run is there already.

    Raises:
        ValueError: where `wanted` holds a run, or is no place for a folder.
    """
    if wanted is not None:
        if (wanted / "recipe.yaml").exists():
            raise ValueError(
                f"{wanted} holds a run already; `fedloom resume {wanted}` goes on with it, --out takes another folder"
            )
        return folder_at(wanted, "--out")
    folder, number = folder_at(Path("runs"), "the folder of runs") / file_name(name), 1
    while folder.exists():
        number += 1
        folder = folder.with_name(f"{name}-{number}")
    return folder


def job_of(recipe: Recipe) -> Job:
    """Return the recipe with its YAML and its flat settings."""
    return Job(recipe, to_yaml(recipe), flatten(to_tree(recipe)))


def flatten(tree: Any, path: str = "") -> dict[str, Any]:
    """Return settings by dotted path, for comparing recipes."""
    if isinstance(tree, Mapping) and tree:
        return {
            k: v
            for key, item in tree.items()
            for k, v in flatten(item, f"{path}.{key}" if path else str(key)).items()
        }
    if isinstance(tree, list) and any(isinstance(item, Mapping) for item in tree):
        named = (item if isinstance(item, Mapping) else {item: True} for item in tree)
        return {k: v for item in named for k, v in flatten(item, path).items()}
    return {path: tree}
