"""Objects given from Python in the place of a recipe's sections: looked at, named in the recipe, and made parts of a session."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from fedloom.client.setup import TrainerParts
from fedloom.core.metrics import Metric
from fedloom.core.protocols import Algorithm, Trainer
from fedloom.data.data_settings import DataSettings
from fedloom.data.encoding import Tokenizer
from fedloom.data.federation import Federation
from fedloom.data.given import CLIENT, check_given, federate_given, ready_splits
from fedloom.engines.engine_settings import InProcessSettings, LoopbackSettings
from fedloom.evaluation.evaluation_settings import EvaluationSettings
from fedloom.models.build import Base, ModelSettings
from fedloom.models.loaded import base_from, check_loaded_pair, loaded_from
from fedloom.objectives.objective import Objective
from fedloom.plugins import is_frozen, missing_members
from fedloom.recipe import RecipeError, apply_overrides, build_recipe, read_tree
from fedloom.recipe_text import name_of, to_tree
from fedloom.recipe_text import to_yaml as yaml_of
from fedloom.rounds.recipe_settings import Recipe
from fedloom.rounds.session import Makers
from fedloom.rounds.training import Callback

PYTHON = "python:"
"""What the name of a model or of a data source begins with that only Python has."""
_TRAINER = ("width", "run")
_DATA = [
    "source",
    "config",
    "split",
    "revision",
    "num_examples",
    "where",
    "shorter",
    "shorter_in",
    "sample",
    "held_out",
    "held_out_sample",
    "num_clients",
    "partition",
]
"""Settings of `data` that say which rows are read and who holds them: the object says so itself."""
_UNSCORED = {"generate": False, "metrics": EvaluationSettings().metrics}
"""Of an evaluation none of whose scores is there."""
_MODEL = ["name", "revision", "dtype", "attention", "device", "trust_remote_code"]
"""Settings of `model` that say what is loaded, and how."""


@dataclass(frozen=True)
class Objects:
    """What was given from Python; None and empty: what the recipe says."""

    algorithm: Any = None
    data: Any = None
    model: Any = None
    trainer: Any = None
    metrics: Sequence[Metric] = ()
    callbacks: Sequence[Callback] = ()
    bases: Callable[[ModelSettings], Base] | None = None
    """Loads the model that the recipe names; None: as any run does."""

    def __post_init__(self) -> None:
        if self.algorithm is not None:
            _check_algorithm(self.algorithm)
        if self.data is not None and not isinstance(self.data, Federation):
            if not isinstance(self.data, Mapping):
                raise ValueError(
                    'data must map clients to rows, as in {"site-a": [{"prompt": "...", "completion": "..."}]}, or be'
                    f" a Federation, got {type(self.data).__name__}; a file or a folder is data.source of the recipe"
                )
            check_given(self.data)
        if self.model is not None:
            _check_model(self.model)
        if self.trainer is not None and not _is_trainer(self.trainer):
            _check_function(
                "trainer", self.trainer, "a Trainer (width and run), or a function that makes one"
            )
        for metric in self.metrics:
            if not isinstance(metric, Metric):
                raise ValueError(
                    "each of metrics must be a fedloom.Metric, whose score is a function of an answer and its"
                    f" references, got {type(metric).__name__}"
                )
        for callback in self.callbacks:
            _check_function("each of callbacks", callback, "a function of a finished round")

    def names(self) -> dict[str, str]:
        """Return module and qualified name of what was given, by section; an algorithm is in a section of its own."""
        given = {"data": self.data, "model": self.model, "trainer": self.trainer}
        if isinstance(self.model, tuple | list):
            given["model"] = self.model[0]
        named = {section: _named(value) for section, value in given.items() if value is not None}
        if self.callbacks:
            named["callbacks"] = ", ".join(map(_named, self.callbacks))
        return named

    def makers(self) -> Makers:
        """Return what makes a session's parts of the objects."""
        return Makers(
            federation=None if self.data is None else self._federation,
            base=self.bases if self.model is None else self._base,
            trainer=None if self.trainer is None else self._trainer,
        )

    def _federation(
        self, settings: DataSettings, tokenizer: Tokenizer, objective: Objective
    ) -> Federation:
        if not isinstance(self.data, Federation):
            return federate_given(self.data, settings, tokenizer, objective)
        if settings.pooled:
            raise ValueError(
                "run.baselines centralised needs rows, which a Federation has no more: leave it out, or give data as"
                " a mapping from clients to rows"
            )
        return self.data

    def _base(self, settings: ModelSettings) -> Base:
        # Adapters are put into the model: a baseline, and whoever gave it, needs one without.
        loaded = self.model() if callable(self.model) else tuple(map(copy.deepcopy, self.model))
        return base_from(loaded, settings)

    def _trainer(self, parts: TrainerParts) -> Trainer:
        made: Any = self.trainer if _is_trainer(self.trainer) else self.trainer(parts)
        if not _is_trainer(made):
            raise ValueError(
                f"trainer {_named(self.trainer)} must return a Trainer, an object with width and run, got"
                f" {type(made).__name__}"
            )
        trainer: Trainer = made
        return trainer


def recipe_with(recipe: str | Path | Recipe, overrides: Sequence[str], objects: Objects) -> Recipe:
    """Return a recipe by shipped name, path or object, with overrides, and objects named in the place of what they replace.

    Raises:
        RecipeError: where the recipe is none, or an override has no effect beside an object.
    """
    if isinstance(recipe, str | Path):
        tree = read_tree(recipe)
    elif isinstance(recipe, Recipe):
        tree = to_tree(recipe)
        # YAML has the names of their functions only.
        tree["evaluation"] = {**tree["evaluation"], "metrics": list(recipe.evaluation.metrics)}
    else:
        raise RecipeError(
            "recipe must be a shipped recipe's name, a path that ends in .yaml or a Recipe, got"
            f" {type(recipe).__name__}"
        )
    algorithm = objects.algorithm
    if isinstance(recipe, Recipe) and algorithm is None and not _override(overrides, "algorithm"):
        algorithm = recipe.algorithm
    return rebuilt(apply_overrides(tree, overrides), overrides, objects, algorithm=algorithm)


def rebuilt(
    tree: Mapping[str, Any], overrides: Sequence[str], objects: Objects, *, algorithm: Any = None
) -> Recipe:
    """Return the recipe of a tree to which overrides are applied already, with objects in their places."""
    algorithm = objects.algorithm if algorithm is None else algorithm
    if objects.algorithm is not None:
        _refuse(overrides, "algorithm", "")
    tree = {**tree, "objects": {**(tree.get("objects") or {}), **objects.names()}}
    if objects.data is not None:
        replaced = [*_DATA, "fractions"] if _is_cut(objects.data) else _DATA
        for name in replaced:
            _refuse(overrides, "data", name)
        rest = {k: v for k, v in (tree.get("data") or {}).items() if k not in replaced}
        place = {"source": PYTHON + _named(objects.data), "partition": {"natural": {"by": CLIENT}}}
        tree["data"] = {**rest, **place}
    if objects.model is not None:
        for name in _MODEL:
            _refuse(overrides, "model", name)
        rest = {k: v for k, v in (tree.get("model") or {}).items() if k not in _MODEL}
        tree["model"] = {**rest, "name": _model_name(objects)}
    tree["evaluation"] = _measured(tree.get("evaluation") or {}, objects.metrics)
    scores = _scores_of(tree["evaluation"])
    if scores:
        tree["objects"]["metrics"] = ", ".join(map(_named, scores))
    built = build_recipe(tree, algorithm=algorithm)
    _check_engine(built)
    return built


def require_objects(recipe: Recipe, objects: Objects, folder: Path) -> None:
    """Refuse to train with a recipe that names objects which are not given.

    Raises:
        ValueError: with the call that gives them.
    """
    there = {*objects.names(), "callbacks"}
    if any(metric.score for metric in recipe.evaluation.own):
        there.add("metrics")
    missing = recipe.objects.keys() - there
    if missing:
        named = ", ".join(f"{name} ({recipe.objects[name]})" for name in sorted(missing))
        given = ", ".join(f"{name}=..." for name in sorted(missing))
        raise ValueError(
            f"the run in {folder} was begun from Python with objects of its own, {named}: go on with"
            f' fedloom.run("{folder / "recipe.yaml"}", "{folder}", {given})'
        )


def _measured(evaluation: Mapping[str, Any], metrics: Sequence[Metric]) -> dict[str, Any]:
    """Return the section with the metrics that are given, less those whose function nobody can import."""
    listed = evaluation.get("metrics", EvaluationSettings().metrics)
    if not isinstance(listed, list | tuple):
        return dict(evaluation)
    given = {metric.name for metric in metrics}
    left = [item for item in listed if not _is_lost(item) and _names_of(item).isdisjoint(given)]
    found = {**evaluation, "metrics": [*left, *metrics]}
    return found if found["metrics"] or not listed else {**found, **_UNSCORED}


def _scores_of(evaluation: Mapping[str, Any]) -> list[Any]:
    """Return the functions of metrics that are there as objects."""
    listed = evaluation.get("metrics", ())
    found = listed if isinstance(listed, list | tuple) else ()
    return [metric.score for metric in found if isinstance(metric, Metric) and metric.score]


def _is_lost(item: Any) -> bool:
    """Return whether a metric of a recipe is scored by a function that only the program had which gave it."""
    return isinstance(item, Mapping) and any(
        isinstance(fields, Mapping) and only_here(str(fields.get("score", "")))
        for fields in item.values()
    )


def _names_of(item: Any) -> set[Any]:
    return set(item) if isinstance(item, Mapping) else set()


def to_yaml(recipe: Recipe) -> str:
    """Return the complete recipe as YAML.

    Raises:
        ValueError: where an object's setting is nothing that YAML can hold.
    """
    try:
        return yaml_of(recipe)
    except yaml.YAMLError as error:
        said = str(error.args[-1] if error.args else error)
        raise ValueError(
            f"algorithm {name_of(type(recipe.algorithm))} has a field that recipe.yaml cannot hold, {said!r}: its fields"
            " must be numbers, text, lists, mappings or dataclasses of these"
        ) from error


def _check_algorithm(algorithm: Any) -> None:
    if isinstance(algorithm, type):
        raise ValueError(
            f"algorithm must be an object, got the class {algorithm.__qualname__}: give {algorithm.__qualname__}()"
        )
    kind = type(algorithm)
    if missing := missing_members(kind, Algorithm):
        raise ValueError(
            f"algorithm must have the methods of fedloom.Algorithm, got a {kind.__name__} without {', '.join(missing)}"
        )
    if not is_frozen(kind):
        raise ValueError(
            f"algorithm must be a frozen dataclass, whose fields are its settings, got a {kind.__name__}: put"
            " @dataclass(frozen=True) above its class"
        )


def _check_model(model: Any) -> None:
    wanted = "model must be a pair (model, tokenizer), or a function without arguments that makes one, got"
    if isinstance(model, str | Path):
        raise ValueError(f"{wanted} {str(model)!r}: a name or a folder is model.name of the recipe")
    if isinstance(model, torch.nn.Module):
        raise ValueError(f"{wanted} a {type(model).__name__} alone: give its tokenizer too")
    if not callable(model):
        check_loaded_pair(model)


def _is_trainer(trainer: Any) -> bool:
    return not isinstance(trainer, type) and set(_TRAINER) <= set(dir(trainer))


def _check_function(what: str, function: Any, wanted: str) -> None:
    if not callable(function):
        raise ValueError(f"{what} must be {wanted}, got {type(function).__name__}")


def _check_engine(recipe: Recipe) -> None:
    here = [name for name in recipe.objects if name != "callbacks"]
    if only_here(name_of(type(recipe.algorithm))):
        here.append("algorithm")
    if here and not isinstance(recipe.engine, InProcessSettings | LoopbackSettings):
        kind = type(recipe.engine).__name__.removesuffix("Settings").lower()
        raise RecipeError(
            f"engine must be inprocess or loopback where {' and '.join(here)} is an object, which stays in this"
            f" process, got {kind}"
        )


def only_here(name: str) -> bool:
    """Return whether nobody can import what is called so by module and qualified name."""
    return name.startswith("__main__:") or "<" in name


def _named(value: Any) -> str:
    """Return module and qualified name of a function or a class, or of an object's class."""
    known = value if isinstance(value, type) or "__qualname__" in dir(value) else type(value)
    return f"{known.__module__}:{known.__qualname__}"


def _model_name(objects: Objects) -> str:
    """Return what a loaded model was loaded by, where it knows: it is the same one by the hash of its weights."""
    known = "" if callable(objects.model) else loaded_from(objects.model)
    return known or PYTHON + objects.names()["model"]


def _is_cut(data: Any) -> bool:
    return not isinstance(data, Federation) and ready_splits(data)


def _override(overrides: Sequence[str], section: str, name: str = "") -> str | None:
    """Return the override that sets a setting, or anything of a section."""
    wanted = [section, name] if name else [section]
    for override in overrides:
        path = override.partition("=")[0]
        if path.split(".")[: len(wanted)] == wanted:
            return path
    return None


def _refuse(overrides: Sequence[str], section: str, name: str) -> None:
    if (path := _override(overrides, section, name)) is not None:
        raise RecipeError(
            f"{path} has no effect where {section} is given as an object: leave the override out"
        )
