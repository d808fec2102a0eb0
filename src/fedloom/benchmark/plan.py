"""A plan of runs: methods, variants and seeds, in YAML; every run that it asks for as a recipe."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fedloom.baselines import check_baseline
from fedloom.core.files import file_name
from fedloom.recipe import (
    RecipeError,
    apply_overrides,
    build_recipe,
    dataclass_of,
    override_value,
    read_settings,
    read_tree,
    split_override,
)
from fedloom.recipe_yaml import suggest
from fedloom.results.suites import Asked, shown_sha256
from fedloom.rounds.recipe_settings import Baseline, Recipe

BEFORE = "before training"
"""The row of the model as it was."""
_SHARED = ("model", "data", "objective", "evaluation")
"""Sections that runs must have in common, apart from seeds, to be compared one by one."""


@dataclass(frozen=True, slots=True)
class Method:
    """A row of the table."""

    recipe: str = ""
    """A shipped recipe's name or a path; the plan's, if empty."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Values by path, such as `run.rounds: 5`, after the plan's own."""


@dataclass(frozen=True, slots=True)
class BenchPlan:
    """What is compared with what."""

    name: str
    """Of the table and its folder; the file's, if it says nothing else."""
    description: str = ""
    """What the table shows, in a sentence under its title."""
    recipe: str = "quickstart"
    """A shipped recipe's name or a path: of methods that have none of their own."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of all methods: values by path, such as `run.rounds: 5`."""
    methods: Mapping[str, Any] = field(default_factory=dict)
    """Rows by name: a recipe's name, settings by path, or both as {recipe, settings}."""
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Settings by name; with any, every method is a row with each of them."""
    seeds: Sequence[int] = (0, 1, 2)
    """Of `run.seed` and `data.seed`: all methods have the same rows and draws at a seed."""
    baselines: Sequence[Baseline] = ("local", "centralised")
    """Rows made of the first method: every client alone, and all data in one place, for instance."""
    beside: str = ""
    """The row that others are compared with, seed by seed; the first, if empty."""
    metrics: Sequence[str] = ()
    """Columns, such as test/loss; accuracy or exact match and the loss, if empty."""
    suites: Mapping[str, Any] = field(default_factory=dict)
    """Public tests that every run's model is asked, by name: a file, or {file, limit, shots, examples, sha256,
    allow_code}. A column each; the rows are compared item by item, by McNemar's test or a paired t-test."""

    def __post_init__(self) -> None:
        if not self.methods:
            raise ValueError(
                "methods must name at least one row, such as `FedAdam: fedadam` or `FedProx: {algorithm.fedavg.mu: 0.1}`"
            )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be whole numbers, each once, got {list(self.seeds)}")
        if min(self.seeds) < 0:
            raise ValueError(f"seeds must be at least 0, got {min(self.seeds)}")
        names = [*self.rows(), *self.baselines]
        for taken in names:
            if taken == BEFORE:
                raise ValueError(f"a row of every table is called {BEFORE!r}: rename the method")
            if names.count(taken) > 1:
                raise ValueError(f"two rows are called {taken!r}: rename the method")
        folders = [file_name(name) for name in names]
        for folder, name in zip(folders, names, strict=True):
            if folder == "baselines":
                raise ValueError(
                    f"a run keeps its baselines in a folder of the name {folder!r}: rename the row {name!r}"
                )
            if folders.count(folder) > 1:
                raise ValueError(f"the folder of two rows would be {folder!r}: rename {name!r}")
        if self.beside and self.beside not in names:
            raise ValueError(
                f"beside must be one of {', '.join(names)}, got {self.beside!r}{suggest(self.beside, names)}"
            )
        if len(set(self.metrics)) < len(self.metrics):
            raise ValueError(f"metrics must be different ones, got {list(self.metrics)}")

    def asked(self) -> Sequence[Asked]:
        """Return the suites, and how each is asked."""
        return [self._suite(str(name), given) for name, given in self.suites.items()]

    @staticmethod
    def _suite(name: str, given: Any) -> Asked:
        settings = {"file": given} if isinstance(given, str) else given
        if not isinstance(settings, Mapping) or "file" not in settings:
            raise RecipeError(f"suites.{name} must be a file, or have the key file, got {given!r}")
        paths = {
            key: Path(str(settings[key])).expanduser()
            for key in ("file", "examples")
            if settings.get(key) is not None
        }
        rest = {key: value for key, value in settings.items() if key not in paths}
        where = f"suites.{name}"
        try:
            asked: Asked = dataclass_of(Asked, rest, where, suite=name, **paths)
            shown_sha256(asked)
        except (ValueError, OSError) as error:
            raise RecipeError(f"{where}: {str(error).removeprefix(f'{where}: ')}") from error
        return asked

    @property
    def reference(self) -> str:
        """Return the row that others are compared with."""
        return self.beside or next(iter(self.rows()))

    def rows(self) -> Mapping[str, Method]:
        """Return recipe and overrides of every method with every variant."""
        methods = {
            str(name): self._method(str(name), given) for name, given in self.methods.items()
        }
        if not self.variants:
            return methods
        return {
            f"{name}, {variant}": dataclasses.replace(
                method, settings=_then(method.settings, settings)
            )
            for name, method in methods.items()
            for variant, settings in self.variants.items()
        }

    def _method(self, name: str, given: Any) -> Method:
        if isinstance(given, str):
            given = {"recipe": given}
        elif given is None:
            given = {}
        elif isinstance(given, Mapping) and not given.keys() & {"recipe", "settings"}:
            given = {"settings": given}
        method: Method = dataclass_of(Method, given, f"methods.{name}")
        return method

    def recipe_of(self, row: str, seed: int) -> Recipe:
        """Return the recipe of a row at a seed.

        Raises:
            RecipeError: naming the row, where the recipe does not take its overrides.
        """
        method = self.rows()[row]
        settings = _then(self.settings, method.settings)
        try:
            for path, key in _FIXED.items():
                section, _, name = path.partition(".")
                whole = settings.get(section)
                if path in settings or (isinstance(whole, Mapping) and name in whole):
                    raise RecipeError(f"{path} is set by the plan's key `{key}`")
            overrides = [f"{path}={as_override(value)}" for path, value in settings.items()]
            tree = apply_overrides(read_tree(method.recipe or self.recipe), overrides)
            data, run = tree.get("data") or {}, tree.get("run") or {}
            return build_recipe(
                {
                    **tree,
                    "name": row,
                    "data": {**data, "seed": seed},
                    "run": {**run, "seed": seed, "baselines": []},
                }
            )
        except RecipeError as error:
            raise RecipeError(f"row {row!r}: {error}") from error

    def check(self) -> None:
        """Refuse a plan of which some run could not begin.

        Raises:
            RecipeError: naming the row.
        """
        self.asked()
        for row in self.rows():
            if self.recipe_of(row, self.seeds[0]).elsewhere:
                raise RecipeError(
                    f"row {row!r}: its clients are at sites that join, and a plan is run on one machine: set engine.flower.nodes"
                )
        first = next(iter(self.rows()))
        for kind in self.baselines:
            try:
                check_baseline(self.recipe_of(first, self.seeds[0]), kind)
            except ValueError as error:
                raise RecipeError(f"baselines: {kind} of {first!r}: {error}") from error

    def unlike(self, row: str, other: str) -> Sequence[str]:
        """Return the sections in which a row's data or model are not those of another, so that runs do not pair.

        A baseline has those of the method it is made of.
        """
        rows = self.rows()
        methods = (name if name in rows else next(iter(rows)) for name in (row, other))
        own, its = (_task(self.recipe_of(name, self.seeds[0])) for name in methods)
        return [name for name in _SHARED if own[name] != its[name]]


_FIXED = {
    "run.seed": "seeds",
    "data.seed": "seeds",
    "run.baselines": "baselines",
    "name": "methods",
}


def _task(recipe: Recipe) -> Mapping[str, Any]:
    """Return the sections of a task, without what leaves it as it is: tiers, by which clients are sent something, and when is measured."""
    sections = {name: getattr(recipe, name) for name in _SHARED}
    # Each alone: of a whole recipe, other sections may name its tiers.
    return {
        **sections,
        "data": dataclasses.replace(recipe.data, tiers={}),
        "evaluation": dataclasses.replace(recipe.evaluation, every=1, before=True),
    }


def _then(first: Mapping[str, Any], last: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of which the last are applied after all others, those that set a whole section too."""
    return {**{path: value for path, value in first.items() if path not in last}, **last}


def as_override(value: Any) -> str:
    """Return a value as an override has it: YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf)
    return str(text).removesuffix("...\n").strip()


def read_plan(plan: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> BenchPlan:
    """Return the plan of a YAML file, or of what such a file holds.

    Args:
        plan: The file's path, or its content.
        overrides: Such as `data.source=mine.jsonl`, for all methods, and before their own settings.

    Raises:
        RecipeError: naming the key to change.
    """
    if isinstance(plan, Mapping):
        tree: dict[str, Any] = {"name": "bench", **plan}
    else:
        tree = read_settings(Path(plan), "plan", key="methods")
    read: BenchPlan = dataclass_of(BenchPlan, tree, "")
    read = dataclasses.replace(read, settings=_then(read.settings, _settings(overrides)))
    read.check()
    return read


def _settings(overrides: Sequence[str]) -> dict[str, Any]:
    pairs = map(split_override, overrides)
    return {path: override_value(path, text, path.split(".")) for path, text in pairs}
