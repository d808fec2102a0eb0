"""Public tests of a plan's runs: asked after each run, found again in its folder, compared item by item."""

from collections.abc import Callable, Mapping
from pathlib import Path

from fedloom.benchmark.plan import BenchPlan
from fedloom.core.metrics import Metric
from fedloom.models.build import Base, ModelSettings
from fedloom.objects import Objects
from fedloom.result import Result
from fedloom.results.suite_results import SuiteResult, chance, read_results
from fedloom.results.suites import BASE, Asked, shown_sha256
from fedloom.suites.protocols import SUITES

PREFIX = "suite/"
"""In front of a suite's name, where it is a column beside metrics."""


def columns_of(plan: BenchPlan) -> list[Metric]:
    """Return a metric a suite: the share of its items that are right, or what its answers are worth."""
    return [
        Metric(
            f"{PREFIX}{asked.suite}",
            SUITES[asked.suite].title,
            "%",
            better="higher",
            bounds=(0.0, 1.0),
        )
        for asked in plan.asked()
    ]


def ask(
    plan: BenchPlan, folder: Path, load: Callable[[ModelSettings], Base] | None, *, base: bool
) -> None:
    """Ask a run's model what it has not been asked yet.

    Args:
        plan: Which suites.
        folder: Of the run.
        load: Loads the base model; None: as any command does.
        base: Whether the model before training is asked too.
    """
    result = Result(folder, Objects(bases=load))
    for model in (BASE, None) if base else (None,):
        missing = [
            asked for asked in plan.asked() if not _result(folder, asked, base=model == BASE)
        ]
        if missing and (model == BASE or is_shared(folder)):
            result.suites(missing, base=model == BASE)


def is_asked(plan: BenchPlan, folder: Path, *, base: bool) -> bool:
    """Return whether a run has answered all of a plan's suites; of several models none is asked but the one before training."""
    kinds = [*([True] if base else []), *([False] if is_shared(folder) else [])]
    return all(_result(folder, asked, base=kind) for asked in plan.asked() for kind in kinds)


def is_shared(folder: Path) -> bool:
    """Return whether all clients of a run use one model."""
    try:
        Result(folder).adapter()
    except ValueError:
        return False
    return True


def results_of(plan: BenchPlan, folder: Path, *, base: bool = False) -> dict[str, SuiteResult]:
    """Return what a run's model answered, by the name of the column."""
    found = {f"{PREFIX}{a.suite}": _result(folder, a, base=base) for a in plan.asked()}
    return {name: result for name, result in found.items() if result is not None}


def _result(folder: Path, asked: Asked, *, base: bool) -> SuiteResult | None:
    # Of the file too: right answers are shown to nobody.
    wanted = asked.suite, shown_sha256(asked), asked.source.sha256, base
    for result in read_results(folder):
        shown, file = result.prompts_sha256, result.file_sha256
        if (result.suite, shown, file, result.model == BASE) == wanted:
            return result
    return None


def by_chance(
    own: Mapping[int, Mapping[str, SuiteResult]], other: Mapping[int, Mapping[str, SuiteResult]]
) -> dict[str, dict[int, float]]:
    """Return how likely two rows differ so on the same items by chance, by column and seed, see `chance`.

    Args:
        own: By seed, what a row's runs answered.
        other: The same of the row it is compared with.
    """
    found: dict[str, dict[int, float]] = {}
    for seed in sorted(own.keys() & other.keys()):
        for name in own[seed].keys() & other[seed].keys():
            one, beside = own[seed][name], other[seed][name]
            if not one.is_like(beside):  # own rows, by the metrics of each row's recipe
                continue
            p = chance(one.values, beside.values)
            found.setdefault(name, {})[seed] = p
    return found
