"""The runs of a plan: made where they are missing, gone on with where they were stopped, read where they are done."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from fedloom import experiment
from fedloom.baselines import baseline_of
from fedloom.benchmark.plan import BenchPlan
from fedloom.benchmark.suites import ask, is_asked
from fedloom.core.description import describe
from fedloom.core.files import file_name
from fedloom.models.shared import SharedBases
from fedloom.recipe_text import to_yaml
from fedloom.reopen import as_begun
from fedloom.rounds.failure import read_failure, write_failure
from fedloom.rounds.reading import read_json
from fedloom.rounds.recipe_settings import Recipe
from fedloom.tracking.metric_format import duration


@dataclass(frozen=True)
class Outcomes:
    """What came of a row."""

    folders: Mapping[int, Path]
    """Of the runs that are done, by seed."""
    failed: Mapping[int, str]
    """Why others are not, by seed."""
    waiting: Sequence[int] = field(default_factory=list)
    """Seeds whose runs are missing."""


def run_all(plan: BenchPlan, folder: Path, *, part: int, parts: int, console: Console) -> None:
    """Make the runs of a plan that are missing, seed by seed; one that fails does not stop the others.

    Args:
        plan: What to run.
        folder: Of the whole plan.
        part: Which share of the runs, from 0.
        parts: Among how many processes runs are shared.
        console: Where progress goes.
    """
    asked, bases = _shares(plan, parts)[part], SharedBases()
    spent = list[float]()
    for at, (row, seed) in enumerate(asked):
        place = _place(folder, row, seed)
        if _is_done(plan, folder, row, seed):
            continue
        left = (
            f", about {duration(sum(spent) / len(spent) * (len(asked) - at))} left" if spent else ""
        )
        console.print(
            Text.assemble(
                (row, "bold"), f", seed {seed}: run {at + 1} of {len(asked)}{left} → {place}"
            )
        )
        began = time.perf_counter()
        _make(plan, folder, row, seed, console, bases)
        spent.append(time.perf_counter() - began)


def outcomes(plan: BenchPlan, folder: Path) -> Mapping[str, Outcomes]:
    """Return what came of every row so far."""
    found: dict[str, Outcomes] = {}
    for row in [*plan.rows(), *plan.baselines]:
        folders, failed, waiting = dict[int, Path](), dict[int, str](), list[int]()
        for seed in plan.seeds:
            place = _place(folder, row, seed)
            if _is_done(plan, folder, row, seed):
                folders[seed] = place
            elif (reason := read_failure(place)) is not None:
                failed[seed] = reason
            else:
                waiting.append(seed)
        found[row] = Outcomes(folders, failed, waiting)
    return found


def _wanted(plan: BenchPlan) -> Iterator[tuple[str, int]]:
    # Seed by seed, so that a plan that is stopped has whole tables of fewer seeds.
    for seed in plan.seeds:
        for row in [*plan.rows(), *plan.baselines]:
            yield row, seed


def _shares(plan: BenchPlan, parts: int) -> list[list[tuple[str, int]]]:
    """Return the runs of each of several processes; baselines are with the run that they are made of."""
    first, *others = plan.rows()
    shares = [set[tuple[str, int]]() for _ in range(parts)]
    for seed in plan.seeds:
        for rows in [[first, *plan.baselines], *([row] for row in others)]:
            min(shares, key=len).update((row, seed) for row in rows)
    return [[one for one in _wanted(plan) if one in share] for share in shares]


def _place(folder: Path, row: str, seed: int) -> Path:
    return folder / "runs" / file_name(row) / str(seed)


def _is_done(plan: BenchPlan, folder: Path, row: str, seed: int) -> bool:
    """Return whether a run is finished; refuse one that is another than the plan's."""
    place, source = _place(folder, row, seed), _place(folder, _method_of(plan, row), seed)
    if not all((each / "summary.json").exists() for each in (place, source)):
        return False
    asked = to_yaml(as_begun(_recipe(plan, folder, row, seed), place))
    if (place / "recipe.yaml").read_text() != asked:
        raise ValueError(
            f"{place} was made with other settings than the plan has for {row!r}: take another folder with --out, or"
            " remove that one"
        )
    return is_asked(plan, place, base=_asks_base(plan, row, seed))


def _asks_base(plan: BenchPlan, row: str, seed: int) -> bool:
    """Return whether a run asks the model before training too, which is one for the whole table."""
    return (row, seed) == (plan.reference, plan.seeds[0])


def _make(
    plan: BenchPlan, folder: Path, row: str, seed: int, console: Console, bases: SharedBases
) -> None:
    place = _place(folder, row, seed)
    quiet = False
    try:
        recipe = _recipe(plan, folder, row, seed)
        quiet = describe(recipe.algorithm).quiet
        with bases.lent(recipe.shares_base, place) as load:
            if not (place / "summary.json").exists():
                experiment.run(recipe, place, console=console, bases=load)
            ask(plan, place, load, base=_asks_base(plan, row, seed))
    except Exception as error:  # noqa: BLE001 whatever one run meets, the others are made
        reason = write_failure(place, error, quiet=quiet)
        console.print(Text(f"{row}, seed {seed} failed: {reason}", style="red"))


def _method_of(plan: BenchPlan, row: str) -> str:
    """Return a method, or the one that a baseline is made of."""
    rows = plan.rows()
    return row if row in rows else next(iter(rows))


def _recipe(plan: BenchPlan, folder: Path, row: str, seed: int) -> Recipe:
    first = _method_of(plan, row)
    if row == first:
        return plan.recipe_of(row, seed)
    source = _place(folder, first, seed)
    summary = source / "summary.json"
    if not summary.exists():
        raise ValueError(f"it is made of the run of {first!r} at this seed, which is not done")
    told: Mapping[str, Any] = read_json(summary, dict, remedy="remove it to make the run again")
    kind = next(kind for kind in plan.baselines if kind == row)
    return baseline_of(as_begun(plan.recipe_of(first, seed), source), kind, summary=told)
