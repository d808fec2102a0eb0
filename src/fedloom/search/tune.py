"""A search, run and written down: trials from rung to rung, gone on with wherever it was ended."""

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from fedloom.core.description import describe
from fedloom.core.files import file_name, folder_at, write_atomic
from fedloom.core.metrics import Metric
from fedloom.models.shared import SharedBases
from fedloom.recipe import RecipeError, apply_overrides, read_tree
from fedloom.recipe_text import to_tree, to_yaml
from fedloom.reopen import flatten
from fedloom.results.memory import open_to_probes
from fedloom.results.played import play
from fedloom.rounds.failure import write_failure
from fedloom.rounds.lock import InUse, held
from fedloom.rounds.recipe_settings import Recipe
from fedloom.rounds.session import Makers
from fedloom.search.brackets import Bracket, affordable, halved, hyperband, plain
from fedloom.search.outcome import Outcome, Trial
from fedloom.search.space import Search, Tried, read_search, told
from fedloom.search.study import Study, opened
from fedloom.search.trials import Course, go_on
from fedloom.search.written import BEST, write_all
from fedloom.tracking.environment import collect

_BYTES = "bytes_a_round"


@dataclass(frozen=True)
class Tuned:
    """What came of a search."""

    outcome: Outcome
    """Every trial, and which is best."""
    recipe: Recipe | None
    """The recipe with the best settings; None where no trial came to an end."""
    files: Mapping[str, Path]
    """The table as Markdown, JSON and a page, and the best recipe."""


class _Spent(Exception):
    """The budget has no bytes left for what would come next."""


def tune(
    recipe: str | Path,
    space: str | Path | Mapping[str, Any],
    folder: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    trials: int | None = None,
    budget: Mapping[str, float] | None = None,
    only_table: bool = False,
    console: Console | None = None,
) -> Tuned:
    """Search for the settings of a recipe that are best on validation data; called again, it goes on where it was stopped.

    Args:
        recipe: A shipped recipe's name, or a path that ends in .yaml.
        space: A YAML file with `space` and how it is searched, or what such a file holds.
        folder: Of the trials and the table; runs/RECIPE-NAME if not given.
        overrides: Settings of all trials, such as "data.source=mine.jsonl".
        trials: How many, in the place of the file's number.
        budget: {"rounds": N} or {"bytes": N}, in the place of the file's.
        only_table: Run nothing.
        console: Where progress goes; nowhere if not given.

    Raises:
        ValueError: where space and recipe do not go together, the budget is too small for one trial, or the folder has
            trials of another search.
    """
    search = read_search(space, trials=trials, budget=budget)
    tried = Tried.of(apply_overrides(read_tree(recipe), overrides), search)
    _check_objective(tried.recipe, search)
    name = file_name(f"{tried.recipe.name}-{search.name}")
    home = folder_at(Path(folder or Path("runs") / name), "the search's folder")
    console = console or Console(quiet=True)
    _check_size(search, tried.recipe)
    of_bytes = search.budget is not None and search.budget.bytes is not None
    if not of_bytes:
        # Nothing is made where the budget is too small; what bytes are enough for is not known so soon.
        _brackets(search, tried.recipe, 0.0)
    bases = SharedBases()
    with held(home), opened(home, search) as study:
        if of_bytes and _BYTES not in study.noted:
            study.note(_BYTES, sum(_forecast(tried.recipe, bases)) / tried.recipe.run.rounds)
        brackets = _brackets(search, tried.recipe, study.noted.get(_BYTES, 0.0))
        _check_same(study, home, search, tried.recipe, brackets)
        going = _Going(search, tried, study, home, brackets, console, bases)
        if not only_table:
            going.run()
        outcome = going.outcome()
    best = outcome.best
    made = tried.best(best.settings) if best else None
    if made:
        write_atomic(home / BEST, to_yaml(made).encode())
    files = write_all(outcome, home, collect())
    return Tuned(outcome, made, {**files, **({BEST: home / BEST} if made else {})})


def _check_objective(recipe: Recipe, search: Search) -> None:
    if describe(recipe.algorithm).quiet:
        raise ValueError(
            "a search goes by what clients measure, which private.quiet keeps out of runs' folders: set it to false"
        )
    metric = recipe.evaluation.table.of(search.objective)
    if metric.better == "none":
        raise ValueError(
            f"objective must be a metric of which one way is better, such as validation/loss, got {search.objective}"
        )


def _check_size(search: Search, recipe: Recipe) -> None:
    if (
        search.trials is None
        and search.budget is None
        and not search.halving
        and search.sampler != "grid"
    ):
        raise ValueError(
            f"a search by {search.sampler} needs trials: N, or budget: {{rounds: N}} of which a trial takes"
            f" {recipe.run.rounds}, to come to an end"
        )


def _brackets(search: Search, recipe: Recipe, bytes_a_round: float) -> list[Bracket]:
    """Return what is run, in this order; what a round takes is asked of a budget in bytes only.

    Raises:
        ValueError: where the budget has no rounds for it.
    """
    rounds, sizes = recipe.run.rounds, search.trials
    if search.halving and len(search.halving.rungs(rounds)) == 1:
        kind = "hyperband" if search.hyperband else "successive_halving"
        raise ValueError(
            f"{kind} compares trials before their end, and eta {search.halving.eta} with min_rounds"
            f" {search.halving.min_rounds} leaves no round to do so before the last of {rounds}: raise run.rounds, or lower one"
            " of them"
        )
    if search.sampler == "grid":
        sizes = len(search.grid())
    available, unit = _rounds(search, bytes_a_round)
    if search.hyperband:
        wanted = hyperband(search.hyperband, rounds)
    elif search.successive_halving and (sizes is not None or available is None):
        wanted = [halved(search.successive_halving, rounds, size=sizes)]
    elif search.successive_halving:
        wanted = _largest(search, rounds, available or 0)
    else:
        wanted = plain(rounds, count=(available or 0) // rounds if sizes is None else sizes)
    found = wanted if available is None else list(affordable(wanted, available))
    asked = search.trials is not None or search.sampler == "grid"
    if not found or (asked and len(found) < len(wanted)):
        least = (
            sum(bracket.cost for bracket in wanted)
            if asked
            else (wanted or [Bracket(1, (rounds,))])[0].cost
        )
        raise ValueError(
            f"budget.{unit} is enough for {available} rounds, and {'what is asked for' if asked else 'the least search'} takes {least}:"
            " raise it, or lower run.rounds or the number of trials"
        )
    return found


def _largest(search: Search, rounds: int, available: int) -> list[Bracket]:
    """Return the bracket of the most trials that the rounds are enough for."""
    assert search.successive_halving
    size = 0
    while halved(search.successive_halving, rounds, size=size + 1).cost <= available:
        size += 1
    return [halved(search.successive_halving, rounds, size=max(size, 1))]


def _rounds(search: Search, bytes_a_round: float) -> tuple[int | None, str]:
    """Return the rounds that the budget is enough for, None without one, and what it counts.

    Of bytes as many as the forecast of the recipe's messages says; the trials' own are looked at as they come.
    """
    if search.budget is None:
        return None, ""
    if search.budget.rounds is not None:
        return search.budget.rounds, "rounds"
    return int((search.budget.bytes or 0) // bytes_a_round), "bytes"


def _forecast(recipe: Recipe, bases: SharedBases) -> list[int]:
    """Return the bytes of every round's messages, both ways; later ones are like the last that was played."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        with bases.lent(recipe.shares_base, folder) as load:
            rounds = play(open_to_probes(recipe, folder, Makers(base=load))[0], None)
    found = [each.download_bytes + each.upload_bytes for each in rounds]
    return found + found[-1:] * (recipe.run.rounds - len(found))


def _check_same(
    study: Study, home: Path, search: Search, recipe: Recipe, brackets: Sequence[Bracket]
) -> None:
    """Refuse to go on with another search; more trials or a larger budget are the same one, but for successive halving."""
    tree = {k: v for k, v in to_tree(recipe).items() if k not in ("name", "description")}
    asked = {
        **flatten(tree),
        **{f"space.{path}": repr(values) for path, values in search.settings.items()},
        "sampler": search.sampler,
        "seed": search.seed,
        "objective": search.objective,
        "halving": repr(search.halving),
        "trials": brackets[0].size if search.successive_halving else None,
    }
    told = {key: repr(value) for key, value in asked.items()}
    before = study.noted.get("asked")
    if before is None:
        study.note("asked", told)
        return
    for key in sorted({*told, *before}):
        if told.get(key) != before.get(key):
            raise ValueError(
                f"{home} holds a search with another {key}: take another folder with --out, or give what it was begun with"
            )


class _Going:
    """A search under way."""

    def __init__(
        self,
        search: Search,
        tried: Tried,
        study: Study,
        home: Path,
        brackets: Sequence[Bracket],
        console: Console,
        bases: SharedBases,
    ) -> None:
        self.search, self.tried, self.study, self.home = search, tried, study, home
        self.brackets, self.console, self.bases = brackets, console, bases
        self.metric: Metric = tried.recipe.evaluation.table.of(search.objective)
        self.spent = ""

    def run(self) -> None:
        """Run what is missing; what is done is read."""
        try:
            for first, bracket in self._numbered():
                numbers = range(first, first + bracket.size)
                for number in numbers:
                    self.study.asked(number)
                self._compete(bracket, list(numbers))
        except _Spent as spent:
            self.spent = str(spent)
            self.console.print(Text(self.spent, "yellow"))

    def _numbered(self) -> Iterator[tuple[int, Bracket]]:
        first = 0
        for bracket in self.brackets:
            yield first, bracket
            first += bracket.size

    def _compete(self, bracket: Bracket, numbers: list[int]) -> None:
        """Let trials run to each rung, and the best of them to the next."""
        for at, rung in enumerate(bracket.rungs):
            for number in numbers:
                self._to(number, rung)
            sound = [number for number in numbers if not self.study.failure(number)]
            last = at + 1 == len(bracket.rungs)
            most = 0 if last else bracket.sizes[at + 1]
            ranked = sorted(sound, key=lambda number: (self.study.costs(number)[rung], number))
            for number in sound if last else ranked[most:]:
                self.study.end(number, stopped=not last)
            numbers = sorted(ranked[:most])

    def _to(self, number: int, rung: int) -> None:
        if self.study.failure(number) or rung in self.study.costs(number):
            return
        settings, folder = self.study.asked(number), self.folder(number)
        try:
            recipe = self.tried.trial(number, settings)
        except RecipeError as error:
            # Each value suits the recipe, and these do not suit one another.
            self._fail(number, write_failure(folder, error))
            return
        self._check_bytes(number, recipe, rung)
        self.console.print(
            Text.assemble((f"trial {number}", "bold"), f", to round {rung}: {told(settings)}")
        )
        try:
            if self.course(number).value(rung) is None:
                go_on(recipe, folder, until=rung, console=self.console, bases=self.bases)
        except (OSError, InUse):
            # Of the machine, not of the settings: the trial is gone on with next time.
            raise
        except Exception as error:  # noqa: BLE001 whatever one trial meets, the others are made
            self._fail(number, write_failure(folder, error))
            return
        # A trial may have ended before the rung by itself, by run.patience.
        value = self.course(number).value()
        if value is None:
            measured = ", ".join(
                n for n in self.course(number).lines.measured() if n.startswith("validation/")
            )
            raise ValueError(
                f"objective must be one of {measured or 'nothing, as no client has validation data'}, got"
                f" {self.search.objective}"
            )
        if not math.isfinite(value):
            self._fail(
                number,
                f"{self.search.objective} was not finite after round {self.course(number).rounds}",
            )
            return
        self.study.report(number, rung, self.metric.cost(value))

    def _fail(self, number: int, reason: str) -> None:
        self.console.print(Text(f"trial {number} failed: {reason}", style="red"))
        self.study.end(number, reason)

    def _check_bytes(self, number: int, recipe: Recipe, rung: int) -> None:
        """End the search where what comes next would pass the budget of bytes."""
        if self.search.budget is None or self.search.budget.bytes is None:
            return
        spent = sum(self.course(each).bytes for each in range(len(self.study)))
        ahead = _forecast(recipe, self.bases)[self.course(number).rounds : rung]
        if spent + sum(ahead) > self.search.budget.bytes:
            raise _Spent(
                f"the search ended before trial {number} went on to round {rung}, for which the budget of bytes is not enough"
            )

    def folder(self, number: int) -> Path:
        """Return the folder of a trial's run."""
        return self.home / "trials" / f"{number:04d}"

    def course(self, number: int) -> Course:
        """Return how a trial went."""
        return Course.read(self.folder(number), self.tried.recipe, self.search.objective)

    def outcome(self) -> Outcome:
        """Return what came of all trials so far."""
        wanted = sum(bracket.size for bracket in self.brackets)
        trials = [self._trial(number) for number in range(len(self.study))]
        return Outcome(
            f"{self.tried.recipe.name}: {self.search.name}",
            self.search,
            self.metric,
            trials,
            waiting=max(0, wanted - len(trials)),
            ended=self.spent,
            rounds=self.tried.recipe.run.rounds,
        )

    def _trial(self, number: int) -> Trial:
        course = self.course(number)
        costs = self.study.costs(number)
        return Trial(
            number,
            self.study.asked(number),
            self.folder(number),
            points=course.points,
            rounds=course.rounds,
            bytes=course.bytes,
            rungs={rung: self.metric.cost(cost) for rung, cost in costs.items()},
            is_over=self.study.is_over(number),
            failed=self.study.failure(number),
            test=course.final,
            epsilon=course.lines.ends("server/epsilon")[1],
            seconds=course.lines.total("time/round_seconds"),
        )
