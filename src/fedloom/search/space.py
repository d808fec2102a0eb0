"""What is searched: settings of a recipe and their values, how they are chosen, and for how long; in YAML."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fedloom.benchmark.plan import as_override
from fedloom.evaluation.metrics import answer_metrics
from fedloom.recipe import (
    RecipeError,
    apply_overrides,
    build_recipe,
    dataclass_of,
    read_settings,
)
from fedloom.recipe_yaml import brief, suggest
from fedloom.rounds.recipe_settings import Recipe
from fedloom.search.brackets import Halving

Sampler = Literal["tpe", "random", "grid"]
SECTIONS = ("algorithm", "local", "tune", "wire")
"""Of a recipe, those that may differ between trials: the others would give them other data, cohorts or measures."""


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from `low` to `high`: whole ones where both are."""

    low: int | float
    high: int | float
    log: bool = False
    """Whether they are as likely by their logarithm."""
    step: int | float | None = None
    """From one to the next; None: 1 of whole numbers, any of others."""

    @property
    def is_whole(self) -> bool:
        """Return whether they are whole numbers."""
        return all(isinstance(n, int) for n in (self.low, self.high, self.step or 1))

    def grid(self, path: str) -> list[str]:
        """Return all of them.

        Raises:
            RecipeError: where there is no end of them.
        """
        step = self.step or (1 if self.is_whole else None)
        if step is None or self.log:
            raise RecipeError(
                f"space.{path} has no end of values for sampler grid: list them, or give a step without log"
            )
        count = round((self.high - self.low) / step) + 1
        return [as_override(self.low + at * step) for at in range(count)]


@dataclass(frozen=True, slots=True)
class Choice:
    """Some values, each as one line of YAML."""

    values: tuple[str, ...]

    def grid(self, path: str) -> list[str]:
        """Return all of them."""
        return [*self.values]


@dataclass(frozen=True, slots=True)
class Budget:
    """What all trials together may take, of one kind."""

    rounds: int | None = None
    bytes: float | None = None
    """Of all messages, both ways."""

    def __post_init__(self) -> None:
        if (self.rounds is None) == (self.bytes is None):
            raise ValueError("budget must be {rounds: N} or {bytes: N}, one of them")
        for name, value in (("rounds", self.rounds), ("bytes", self.bytes)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"budget.{name} must be above 0, got {value}")


@dataclass(frozen=True, slots=True)
class Search:
    """Which settings are tried, and for how long."""

    name: str
    """Of its folder and its page, behind the recipe's; the file's, if it says nothing else."""
    space: Mapping[str, Any]
    """Values by path: a list, or a range as {low, high, log, step}."""
    description: str = ""
    """What is looked for, in a sentence under the title."""
    sampler: Sampler = "tpe"
    """tpe: where results so far were good (Bergstra et al. 2011), after ten trials at random; random; grid: all there are."""
    trials: int | None = None
    """How many; None: as many as the budget, the halving or the grid have."""
    budget: Budget | None = None
    """Of all trials together."""
    successive_halving: Halving | None = None
    """All trials begin, and the best share of them go on, from rung to rung (Jamieson and Talwalkar 2016)."""
    hyperband: Halving | None = None
    """Several of these, from many trials that begin with few rounds to few that all end (Li et al. 2018)."""
    objective: str = "validation/loss"
    """What is to become better; of the validation split."""
    seed: int = 0
    """Of what the sampler draws; the trials' own are the recipe's, the same for all."""
    settings: Mapping[str, Range | Choice] = field(init=False)

    def __post_init__(self) -> None:
        found = {path: _values(path, given) for path, given in self.space.items()}
        object.__setattr__(self, "settings", found)
        if not found:
            raise ValueError(
                "space must name at least one setting, such as `local.lr: {low: 1.0e-4, high: 1.0e-2, log: true}`"
            )
        for narrow, wide in itertools.combinations(found, 2):
            if narrow.startswith(f"{wide}."):
                raise ValueError(
                    f"space.{narrow} has no effect before space.{wide}, which sets all of that: write it after"
                )
        if self.trials is not None and self.trials < 1:
            raise ValueError(f"trials must be at least 1, got {self.trials}")
        if self.successive_halving and self.hyperband:
            raise ValueError("successive_halving and hyperband are two ways: leave one of them out")
        if self.hyperband and self.trials is not None:
            raise ValueError(
                "trials has no effect beside hyperband, whose brackets say how many there are: leave it out"
            )
        if self.sampler == "grid" and self.trials is not None:
            raise ValueError(
                "trials has no effect with sampler grid, which tries all: leave it out"
            )
        if self.sampler == "grid" and self.hyperband:
            raise ValueError(
                "hyperband has no number of trials that a grid could have: take another"
            )
        if not self.objective.startswith("validation/"):
            raise ValueError(
                f"objective must be of the validation split, such as validation/loss, got {self.objective!r}: what is chosen"
                " by test data cannot be judged by it"
            )
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")

    @property
    def halving(self) -> Halving | None:
        """Return how trials are stopped early; None where they are not."""
        return self.successive_halving or self.hyperband

    def grid(self) -> list[dict[str, str]]:
        """Return all combinations; the last setting changes fastest."""
        values = [values.grid(path) for path, values in self.settings.items()]
        return [dict(zip(self.settings, each, strict=True)) for each in itertools.product(*values)]

    def corners(self) -> Iterator[tuple[str, dict[str, str]]]:
        """Yield each setting alone with each of its values, of ranges their two ends."""
        for path, values in self.settings.items():
            ends = (
                [as_override(values.low), as_override(values.high)]
                if isinstance(values, Range)
                else values.values
            )
            for text in ends:
                yield path, {path: text}


def _values(path: str, given: Any) -> Range | Choice:
    where = f"space.{path}"
    section = str(path).partition(".")[0]
    if section not in SECTIONS:
        raise RecipeError(
            f"{where} must be a setting of {', '.join(SECTIONS[:-1])} or {SECTIONS[-1]}{suggest(section, SECTIONS)}: all"
            " trials have the same model, data, cohorts, rounds and measures, so that they can be compared"
        )
    if isinstance(given, list):
        texts = tuple(map(as_override, given))
        if len({*texts}) < 2 or len({*texts}) < len(texts):
            raise RecipeError(f"{where} must list two or more different values, got {brief(given)}")
        return Choice(texts)
    if not isinstance(given, Mapping):
        raise RecipeError(
            f"{where} must be a list of values, or a range such as {{low: 1, high: 8}}, got {brief(given)}"
        )
    found: Range = dataclass_of(Range, given, where)
    if not -math.inf < found.low < found.high < math.inf:
        raise RecipeError(f"{where} must have low below high, got {found.low} and {found.high}")
    if found.log and (found.low <= 0 or found.step is not None):
        raise RecipeError(f"{where} with log must have low above 0 and no step, got {brief(given)}")
    if found.step is not None and not 0 < found.step <= found.high - found.low:
        raise RecipeError(
            f"{where}.step must be above 0 and at most high - low ({found.high - found.low:g}), got {found.step}"
        )
    steps = (found.high - found.low) / (found.step or 1)
    if found.step is not None and not math.isclose(steps, round(steps), rel_tol=1e-9):
        raise RecipeError(
            f"{where}.high must be reached from low by steps of {found.step}, got {found.low} and {found.high}"
        )
    return found


def read_search(
    space: str | Path | Mapping[str, Any],
    *,
    trials: int | None = None,
    budget: Mapping[str, float] | None = None,
) -> Search:
    """Return the search of a YAML file, or of what such a file holds; `trials` and `budget` take the place of its own.

    Raises:
        RecipeError: naming the key to change.
    """
    if isinstance(space, Mapping):
        tree: dict[str, Any] = {"name": "search", **space}
    else:
        tree = read_settings(Path(space), "space", key="space")
    # `hyperband:` with nothing behind it asks for it, with what is usual.
    tree |= {k: {} for k in ("successive_halving", "hyperband") if k in tree and tree[k] is None}
    if trials is not None:
        tree["trials"] = trials
    if budget is not None:
        tree["budget"] = dict(budget)
    found: Search = dataclass_of(Search, tree, "")
    return found


@dataclass(frozen=True)
class Tried:
    """The recipe that is searched around."""

    tree: Mapping[str, Any]
    """As nested mappings, overrides applied."""
    recipe: Recipe
    """The same as a recipe, as it is."""

    @classmethod
    def of(cls, tree: Mapping[str, Any], search: Search) -> "Tried":
        """Return it, with every end of the space looked at.

        Raises:
            RecipeError: naming the setting that the recipe does not take.
        """
        found = cls(tree, build_recipe(dict(tree)))
        if found.recipe.elsewhere:
            raise RecipeError(
                "the recipe's clients are at sites that join, and a search runs on one machine: set engine.flower.nodes"
            )
        if not found.recipe.evaluation.validation:
            raise RecipeError(
                f"objective {search.objective} is not measured where evaluation.validation is false: set it to true"
            )
        scored = answer_metrics(found.recipe.evaluation, written=not found.recipe.objective.classes)
        if search.objective.rpartition("/")[2] in {metric.name for metric in scored}:
            raise RecipeError(
                f"objective {search.objective} is not measured, as answers are written to test rows alone, by which nothing is"
                " chosen: take what the validation split has without them, such as validation/loss"
            )
        for path, settings in search.corners():
            try:
                found.with_settings(settings)
            except RecipeError as error:
                raise RecipeError(f"space.{path}: {error}") from error
        return found

    def with_settings(self, settings: Mapping[str, str]) -> Recipe:
        """Return the recipe with settings by path."""
        overrides = [f"{path}={text}" for path, text in settings.items()]
        return build_recipe(apply_overrides(dict(self.tree), overrides))

    def trial(self, number: int, settings: Mapping[str, str]) -> Recipe:
        """Return the recipe of a trial, which has no baselines and no samples."""
        made = self.with_settings(settings)
        run = dataclasses.replace(made.run, baselines=(), samples=0)
        return dataclasses.replace(made, name=f"trial-{number}", run=run)

    def best(self, settings: Mapping[str, str]) -> Recipe:
        """Return the recipe to go on with."""
        made = self.with_settings(settings)
        return dataclasses.replace(made, name=f"{made.name[:90]}-tuned")


def told(settings: Mapping[str, str]) -> str:
    """Return settings as a sentence has them."""
    return ", ".join(f"{path} {text}" for path, text in settings.items())
