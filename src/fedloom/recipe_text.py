"""A recipe back to YAML: complete, with every default; reading it gives an equal recipe."""

import dataclasses
from collections.abc import Mapping
from types import FunctionType
from typing import Any

import yaml

from fedloom.algorithms import ALGORITHMS
from fedloom.core.description import settings_of
from fedloom.core.metrics import Metric
from fedloom.plugins import path_of
from fedloom.recipe_tables import GROUPS, TABLES
from fedloom.recipe_yaml import read_yaml
from fedloom.rounds.recipe_settings import Recipe


def to_tree(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as plain mappings, complete with every default: what `recipe.yaml` of a run holds."""
    tree = {
        f.name: _plain(getattr(recipe, f.name))
        for f in dataclasses.fields(recipe)
        if f.name != "algorithm"
    }
    return {"name": tree.pop("name"), "algorithm": _algorithm_tree(recipe.algorithm), **tree}


def name_of(algorithm: type[Any]) -> str:
    """Return what a class of algorithms is called in a recipe: its name in the table, else its import path."""
    names = {cls: name for name, cls in ALGORITHMS.items()}
    return names.get(algorithm) or path_of(algorithm)


def _algorithm_tree(algorithm: Any) -> list[dict[str, Any]]:
    fields = {f.name: getattr(algorithm, f.name) for f in settings_of(algorithm)}
    inner = fields.pop("inner", None)
    layer = {name_of(type(algorithm)): {name: _plain(value) for name, value in fields.items()}}
    return [layer, *(_algorithm_tree(inner) if inner is not None else [])]


def _metric_tree(metric: Metric) -> dict[str, Any]:
    """Return {name: settings} of what is not as by default; of a score its module and name."""
    fields = {
        f.name: _plain(value)
        for f in dataclasses.fields(metric)
        if f.name not in ("name", "score") and (value := getattr(metric, f.name)) != f.default
    }
    if metric.score is not None:
        made = metric.score if isinstance(metric.score, FunctionType) else type(metric.score)
        fields["score"] = f"{made.__module__}:{made.__qualname__}"
    return {metric.name: fields}


def _plain(value: Any) -> Any:
    if isinstance(value, Metric):
        return _metric_tree(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        for table in TABLES.values():
            for name, cls in table.items():
                if type(value) is cls:
                    return {name: fields}
        if any(isinstance(value, protocol) for protocol in GROUPS):
            return {path_of(type(value)): fields}
        return fields
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def to_yaml(recipe: Recipe) -> str:
    """Return the complete recipe as YAML; reading it back gives an equal recipe."""
    tree = to_tree(recipe)
    text = str(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))
    # Some rare spaces are only read back as they were if they are written by number.
    return text if read_yaml(text) == tree else str(yaml.safe_dump(tree, sort_keys=False))
