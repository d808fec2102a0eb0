"""A recipe, run with its baselines: for the command line and for programs."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from fedloom.algorithms import ALGORITHMS
from fedloom.algorithms.clustered import Clustered
from fedloom.algorithms.fedavg import FedAvg
from fedloom.core.places import file_name, folder_at
from fedloom.data.mixtures import Clusters, MultiDomain
from fedloom.data.partition import stratum
from fedloom.deploy.connect import connect
from fedloom.deploy.listening import Listening
from fedloom.engines.settings import FlowerSettings, InProcessSettings, RaySettings
from fedloom.recipe import to_tree, to_yaml
from fedloom.run.conduct import Job, conduct
from fedloom.run.settings import Baseline, Recipe
from fedloom.server.clustering_given import Given, Random
from fedloom.server.clustering_modes import Mode
from fedloom.server.clustering_sharing import Sharing
from fedloom.server.samplers import SAMPLERS

_UNBOUNDED = 1e30
"""A run.max_update_norm that no training reaches."""


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


def baseline_of(recipe: Recipe, kind: Baseline, *, summary: Mapping[str, Any]) -> Recipe:
    """Return the recipe of a baseline: the same data, model, seed and evaluation.

    `local` shares nothing; `centralised` trains one model on everybody's data, taking as many steps a round as the
    expected cohort takes together; `fedavg` is the recipe's own fedavg without what is around it, or a plain one;
    `oracle` and `random` are the recipe with clusters by a label, and with as many as it found by chance.

    Args:
        recipe: Of the run.
        kind: Which baseline.
        summary: Of the run: how many clients train, and how many clusters were found.

    Raises:
        ValueError: where there are no clusters to put others in place of, or no label to make them by.
    """
    quiet = dataclasses.replace(recipe.run, baselines=(), trackers=(), samples=0, min_replies=0)
    shared = dataclasses.replace(recipe, name=f"{recipe.name}-{kind}", run=quiet)
    if isinstance(recipe.engine, FlowerSettings | RaySettings):
        # Its clients are on this machine as they are in the run; only the messages are spared.
        shared = dataclasses.replace(shared, engine=InProcessSettings())
    if kind == "centralised":
        return _centralised(shared, summary["num_clients"])
    make: dict[Baseline, Callable[[], Any]] = {
        "local": ALGORITHMS["local"],
        "fedavg": lambda: _layer(recipe.algorithm, FedAvg) or FedAvg(),
        "oracle": lambda: _clustered(recipe.algorithm, Given(_label(recipe))),
        "random": lambda: _clustered(
            recipe.algorithm, Random(summary["num_clusters"], recipe.run.seed)
        ),
    }
    return dataclasses.replace(shared, algorithm=make[kind]())


def _centralised(recipe: Recipe, num_clients: int) -> Recipe:
    cohort = max(1, round(recipe.cohort.rate(num_clients) * num_clients))
    steps = None if recipe.local.steps is None else recipe.local.steps * cohort
    return dataclasses.replace(
        recipe,
        algorithm=ALGORITHMS["fedavg"](),
        cohort=SAMPLERS["full"](),
        data=dataclasses.replace(recipe.data, pooled=True),
        local=dataclasses.replace(recipe.local, steps=steps),
        # It goes as far in a round as a cohort would, and has no stranger to fear.
        run=dataclasses.replace(recipe.run, max_update_norm=_UNBOUNDED),
    )


def _layer(algorithm: Any, kind: type[Any]) -> Any:
    """Return the layer of a kind, however deep; None where there is none."""
    if isinstance(algorithm, kind):
        return algorithm
    names = {field.name for field in dataclasses.fields(algorithm)}
    return _layer(algorithm.inner, kind) if "inner" in names else None


def _clustered(algorithm: Any, mode: Mode) -> Any:
    """Return the algorithm with its clusters made in another way."""
    if _layer(algorithm, Clustered) is None:
        raise ValueError(
            "run.baselines takes oracle and random where the algorithm has clustered among its layers"
        )
    if isinstance(algorithm, Clustered):
        return dataclasses.replace(algorithm, mode=mode, share=Sharing())
    return dataclasses.replace(algorithm, inner=_clustered(algorithm.inner, mode))


def _label(recipe: Recipe) -> str:
    """Return the entry of clients' profiles that clusters are known by."""
    layer = _layer(recipe.algorithm, Clustered)
    if layer is not None and layer.label:
        return str(layer.label)
    if isinstance(recipe.data.partition, Clusters | MultiDomain):
        return "group"
    label = stratum(recipe.data.partition)
    if label is None:
        raise ValueError(
            "run.baselines oracle makes clusters by a label that all examples of a client share: name it in"
            " algorithm.clustered.label, or take a data.partition by a label"
        )
    return label


def flatten(tree: Any, path: str = "") -> dict[str, Any]:
    """Return settings by dotted path, for comparing recipes."""
    if isinstance(tree, Mapping) and tree:
        return {
            k: v
            for key, item in tree.items()
            for k, v in flatten(item, f"{path}.{key}" if path else str(key)).items()
        }
    if isinstance(tree, list) and any(isinstance(item, Mapping) for item in tree):
        return {k: v for item in tree for k, v in flatten(item, path).items()}
    return {path: tree}
