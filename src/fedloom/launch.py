"""A recipe, run with its baselines: for the command line and for programs."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from fedloom.algorithms import ALGORITHMS
from fedloom.deploy.connect import connect
from fedloom.deploy.listening import Listening
from fedloom.engines.settings import FlowerSettings, InProcessSettings, RaySettings
from fedloom.recipe import flatten, to_tree, to_yaml
from fedloom.run.conduct import Job, conduct
from fedloom.run.settings import Baseline, Recipe
from fedloom.server.samplers import SAMPLERS


def run_recipe(
    recipe: Recipe,
    folder: Path,
    *,
    console: Console | None = None,
    listening: Listening | None = None,
) -> Mapping[str, Mapping[str, Any]]:
    """Run a recipe with its baselines, or go on with a run that is in the folder already.

    Args:
        recipe: What to run.
        folder: The run's folder, made if needed.
        console: Where progress and notes go; nowhere if not given.
        listening: Where sites from elsewhere come in; where they did before if not given.

    Returns:
        The summaries by name, as in summary.json; "" is the run's own, the others its baselines'.

    Raises:
        ValueError: where the data, the model or a checkpoint does not fit the recipe.
    """

    def baseline(kind: Baseline, num_clients: int) -> Job:
        return _job(baseline_of(recipe, kind, num_clients=num_clients))

    console = console or Console(quiet=True)
    if recipe.elsewhere and recipe.run.baselines:
        console.print("no baselines: the data is at the sites")
        recipe = dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, baselines=()))
    to_sites = partial(connect, listening=listening or Listening.read(folder))
    return conduct(_job(recipe), folder, baseline=baseline, connect=to_sites, console=console)


def _job(recipe: Recipe) -> Job:
    return Job(recipe, to_yaml(recipe), flatten(to_tree(recipe)))


def baseline_of(recipe: Recipe, kind: Baseline, *, num_clients: int) -> Recipe:
    """Return the recipe of a baseline: the same data, model, seed and evaluation.

    `local` shares nothing; `centralised` trains one model on everybody's data, taking as many steps a round as the
    expected cohort takes together.
    """
    quiet = dataclasses.replace(recipe.run, baselines=(), trackers=(), samples=0, min_replies=0)
    shared = dataclasses.replace(recipe, name=f"{recipe.name}-{kind}", run=quiet)
    if isinstance(recipe.engine, FlowerSettings | RaySettings):
        # Its clients are on this machine as they are in the run; only the messages are spared.
        shared = dataclasses.replace(shared, engine=InProcessSettings())
    if kind == "local":
        return dataclasses.replace(shared, algorithm=ALGORITHMS["local"]())
    cohort = max(1, round(recipe.cohort.rate(num_clients) * num_clients))
    steps = None if recipe.local.steps is None else recipe.local.steps * cohort
    return dataclasses.replace(
        shared,
        algorithm=ALGORITHMS["fedavg"](),
        cohort=SAMPLERS["full"](),
        data=dataclasses.replace(recipe.data, pooled=True),
        local=dataclasses.replace(recipe.local, steps=steps),
    )
