"""The table of a plan: what came of every row, as numbers; a pure function of the run folders."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from fedloom.benchmark.plan import BEFORE, BenchPlan
from fedloom.benchmark.runs import Outcomes
from fedloom.benchmark.suites import by_chance, columns_of, results_of
from fedloom.core.metrics import PLUGIN, Metric, MetricTable
from fedloom.report.run_folder import Results, read_results
from fedloom.results.statistics import Estimate, mean_of, of_share, paired
from fedloom.results.suite_results import SuiteResult
from fedloom.rounds.reading import metrics_of
from fedloom.tracking.metric_format import measures

When = Literal["before", "final"]
"""Which end of a run's course."""
_BESIDES_LOSS = ("exact_match", "preference_accuracy", "accuracy")


@dataclass(frozen=True)
class Row:
    """A row of the table."""

    name: str
    values: Mapping[str, Mapping[int, float]]
    """Of each metric, by seed."""
    estimates: Mapping[str, Estimate]
    """Their means."""
    beside: Mapping[str, Estimate] = field(default_factory=dict)
    """How far they are from those of the row that others are compared with, seed by seed."""
    bytes: float | None = None
    """Sent and received by all clients in a run, the mean over seeds."""
    fewer: float | None = None
    """How many times fewer those are than the compared row's."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Of training and of evaluation, the mean over seeds."""
    memory: float | None = None
    """Most bytes of memory of any of its runs."""
    failed: Mapping[int, str] = field(default_factory=dict)
    """Why runs failed, by seed."""
    waiting: Sequence[int] = ()
    """Seeds whose runs are missing."""
    chances: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    """Of each suite, by seed, how likely so uneven a split of the items that only one of the compared rows has right is by
    chance."""
    absent: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    """By seed, how many replies of clients there were not, and of how many, where some are missing."""
    unlike: Sequence[str] = ()
    """Sections in which it is another task than the compared row, so that nothing is paired."""
    is_method: bool = False
    """Whether it is among those of which the best is marked."""
    emulated: Sequence[str] = ()
    """Metrics, by title, that are of an emulator, beside which the whole model's were measured."""
    is_quiet: bool = False
    """Whether its runs tell nothing of what clients measured."""

    @property
    def seeds(self) -> int:
        """Return how many runs it is made of."""
        return max((len(found) for found in self.values.values()), default=0)


@dataclass(frozen=True)
class BenchTable:
    """A plan's rows and columns."""

    plan: BenchPlan
    metrics: Sequence[Metric]
    rows: Sequence[Row]

    def best(self, metric: Metric) -> str | None:
        """Return the method with the best mean; None where no other has one, as good ones do, or neither way is better."""
        found = {
            row.name: metric.cost(row.estimates[metric.name].mean)
            for row in self.rows
            if row.is_method
            and not row.unlike
            and metric.better != "none"
            and metric.name in row.estimates
        }
        found = {name: cost for name, cost in found.items() if math.isfinite(cost)}
        ordered = sorted(found, key=found.__getitem__)
        if len(ordered) < 2 or found[ordered[0]] == found[ordered[1]]:
            return None
        return ordered[0]


def table_of(plan: BenchPlan, outcomes: Mapping[str, Outcomes]) -> BenchTable:
    """Return the table of what has been run.

    Raises:
        ValueError: where no run has a metric that was asked for.
    """
    runs = {
        row: {seed: read_results(folder) for seed, folder in found.folders.items()}
        for row, found in outcomes.items()
    }
    metrics = [*_metrics(plan, runs, outcomes), *columns_of(plan)]
    reference = runs[plan.reference]
    suites = {row: _answered(plan, found) for row, found in outcomes.items()}
    before = _answered(plan, outcomes[plan.reference], base=True)
    untrained = [_before(reference, metrics, before)] if reference else []
    # Nothing is known of it where evaluation.before is false.
    rows = [row for row in untrained if row.estimates]
    base = _values(reference, metrics, "final", suites[plan.reference])
    spent = _bytes(plan, plan.reference, reference)
    for name, by_seed in runs.items():
        answered = suites[name]
        values = _values(by_seed, metrics, "final", answered)
        total = _bytes(plan, name, by_seed)
        unlike = plan.unlike(name, plan.reference)
        pairs = name != plan.reference and not unlike
        beside = _beside(values, base) if pairs else {}
        rows.append(
            Row(
                name,
                values,
                _estimates(by_seed, values, metrics, answered, "final"),
                beside,
                bytes=total,
                fewer=spent / total if spent and total else None,
                seconds=_seconds(by_seed),
                memory=max(
                    (run.summary["peak_memory_bytes"] for run in by_seed.values()), default=None
                ),
                failed=outcomes[name].failed,
                waiting=outcomes[name].waiting,
                chances={}
                if name == plan.reference
                else by_chance(answered, suites[plan.reference]),
                absent={seed: found for seed, run in by_seed.items() if (found := _absent(run))},
                unlike=unlike,
                is_method=name in plan.rows(),
                emulated=[m.title for m in metrics if _is_emulated(m, by_seed.values())],
                is_quiet=any("upload_bytes" not in run.summary for run in by_seed.values()),
            )
        )
    return BenchTable(plan, metrics, rows)


def _metrics(
    plan: BenchPlan,
    runs: Mapping[str, Mapping[int, Results]],
    outcomes: Mapping[str, Outcomes],
) -> Sequence[Metric]:
    folders = [folder for found in outcomes.values() for folder in found.folders.values()]
    # Each row may have metrics of its own.
    table = MetricTable({n: m for each in folders for n, m in metrics_of(each).own.items()})
    # A run with private.quiet tells of none, and has no say in what others are compared by.
    told = (set(run.summary["final"]) for row in runs.values() for run in row.values())
    measured = list(filter(None, told))
    there = set.union(*measured) if measured else set()
    shared = set.intersection(*measured) if measured else set()
    if plan.metrics:
        for name in plan.metrics:
            if measured and name not in there:
                raise ValueError(
                    f"metrics must be among what the runs measured ({', '.join(sorted(there))}), got {name!r}"
                )
        return [table.of(name) for name in plan.metrics]
    names = measures(shared, table)
    chosen = [n for n in names if n in {f"test/{known}" for known in (*_BESIDES_LOSS, "loss")}]
    return [table.of(name) for name in chosen or names[:1]]


Answered = Mapping[int, Mapping[str, SuiteResult]]
"""By seed and column, what a row's runs answered."""


def _answered(plan: BenchPlan, found: Outcomes, *, base: bool = False) -> Answered:
    return {seed: results_of(plan, folder, base=base) for seed, folder in found.folders.items()}


def _beside(
    own: Mapping[str, Mapping[int, float]], other: Mapping[str, Mapping[int, float]]
) -> dict[str, Estimate]:
    """Return how far values are above others, seed by seed, of each metric that both have at a seed."""
    found = {name: paired(own[name], other[name]) for name in own}
    return {name: estimate for name, estimate in found.items() if estimate is not None}


def _values(
    runs: Mapping[int, Results], metrics: Sequence[Metric], when: When, answered: Answered
) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for metric in metrics:
        told = {seed: run.summary[when] for seed, run in runs.items()}
        known = {seed: one[metric.name] for seed, one in told.items() if metric.name in one}
        known |= {s: one[metric.name].score for s, one in answered.items() if metric.name in one}
        # A summary has null for what was not finite, which a mean without it would hide.
        found[metric.name] = {s: math.nan if v is None else float(v) for s, v in known.items()}
    return found


def _estimates(
    runs: Mapping[int, Results],
    values: Mapping[str, Mapping[int, float]],
    metrics: Sequence[Metric],
    answered: Answered,
    when: When,
) -> dict[str, Estimate]:
    found: dict[str, Estimate] = {}
    for metric in metrics:
        by_seed = values[metric.name]
        if not by_seed:
            continue
        found[metric.name] = mean_of(list(by_seed.values()))
        if len(by_seed) == 1 and metric.is_share and metric.reduce == "examples":
            (seed,) = by_seed
            asked = answered.get(seed, {}).get(metric.name)
            split = metric.name.partition("/")[0]
            num = runs[seed].history.ends(f"{split}/num_examples")[when == "final"]
            if asked:
                found[metric.name] = _of_items(asked)
            elif num and math.isfinite(by_seed[seed]):
                found[metric.name] = of_share(by_seed[seed], round(num))
    return found


def _is_emulated(metric: Metric, runs: Iterable[Results]) -> bool:
    split, _, base = metric.name.rpartition("/")
    return any(f"{split}/{PLUGIN}{base}" in run.summary["final"] for run in runs)


def _absent(run: Results) -> tuple[int, int] | None:
    missing, there = (int(run.history.total(f"comm/num_{n}")) for n in ("absent", "replies"))
    return (missing, missing + there) if missing else None


def _before(runs: Mapping[int, Results], metrics: Sequence[Metric], answered: Answered) -> Row:
    values = _values(runs, metrics, "before", answered)
    return Row(BEFORE, values, _estimates(runs, values, metrics, answered, "before"))


def _of_items(result: SuiteResult) -> Estimate:
    return Estimate(result.score, result.low, result.high, 1)


def _bytes(plan: BenchPlan, row: str, runs: Mapping[int, Results]) -> float | None:
    if row in plan.baselines and row in ("local", "centralised"):
        # Messages of these are of nobody to nobody.
        return None
    told = [
        run.summary["upload_bytes"] + run.summary["download_bytes"]
        for run in runs.values()
        if "upload_bytes" in run.summary
    ]
    return sum(told) / len(told) if told else None


def _seconds(runs: Mapping[int, Results]) -> dict[str, float]:
    told = [run.summary for run in runs.values() if "train_seconds" in run.summary]
    if not told:
        return {}
    return {
        kind: sum(summary[f"{kind}_seconds"] for summary in told) / len(told)
        for kind in ("train", "evaluation")
    }
