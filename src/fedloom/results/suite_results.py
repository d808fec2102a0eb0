"""What came of public tests: kept in a run's folder, compared item by item, shown as a table."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

from fedloom.core.files import write_atomic
from fedloom.results.statistics import mean_of, wilson
from fedloom.rounds.reading import read_json
from fedloom.suites.protocols import SUITES

FILE = "suites.json"


@dataclass(frozen=True)
class SuiteResult:
    """What came of a suite."""

    suite: str
    model: str
    """Which of the run's models; `base` before training."""
    num: int
    scores: Mapping[str, float]
    """From 0 to 1; the first is the one that is compared."""
    low: float
    high: float
    """95 % interval of the first: Wilson's of a share, Student's of another mean over items."""
    values: Sequence[float]
    """By item, of the first: 0 or 1 where it is right or wrong."""
    shots: int
    prompts_sha256: str
    """Of everything the model was shown: equal where the items, their order and the protocol are."""
    file_sha256: str
    seconds: float

    @property
    def score(self) -> float:
        """Return the score that is compared."""
        return next(iter(self.scores.values()))

    def is_like(self, other: "SuiteResult") -> bool:
        """Return whether another one is of the same questions, and judged by the same measure."""
        own, its = (
            (each.suite, each.prompts_sha256, next(iter(each.scores))) for each in (self, other)
        )
        return own == its


def keep(folder: Path, results: Sequence[SuiteResult]) -> Path:
    """Write results into a run's folder, in the place of those of the same questions and model."""
    before = [r for r in read_results(folder) if not any(_same(r, own) for own in results)]
    file = folder / FILE
    lines = [asdict(result) for result in (*before, *results)]
    write_atomic(file, (json.dumps(lines, indent=1) + "\n").encode())
    return file


def read_results(folder: Path) -> list[SuiteResult]:
    """Return the results that a run's folder holds."""
    file = folder / FILE
    if not file.exists():
        return []
    try:
        return [SuiteResult(**line) for line in read_json(file, list, remedy="remove it")]
    except TypeError as error:
        raise ValueError(
            f"{file} is not as `fedloom suite` writes it ({error}): remove it"
        ) from error


def _same(a: SuiteResult, b: SuiteResult) -> bool:
    return (a.suite, a.model, a.prompts_sha256) == (b.suite, b.model, b.prompts_sha256)


def is_share(values: Sequence[float]) -> bool:
    """Return whether every item is right or wrong, and nothing in between."""
    return all(value in (0, 1) for value in values)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the mean: Wilson's of a share, else Student's, within 0 and 1."""
    if is_share(values):
        return wilson(round(sum(values)), len(values))
    found = mean_of(values)
    if found.low is None or found.high is None:
        return 0.0, 1.0
    return max(found.low, 0.0), min(found.high, 1.0)


def chance(one: Sequence[float], other: Sequence[float]) -> float:
    """Return how likely two models that are as good as one another differ so on the same items, two-sided.

    McNemar's exact test where items are right or wrong, Student's paired t-test where they are more or less right.
    """
    from scipy.stats import binomtest, ttest_rel

    if list(one) == list(other):
        return 1.0
    if not is_share([*one, *other]):
        # Differences that are all the same have no spread, and come by chance as often as their signs.
        found = float(ttest_rel(one, other).pvalue) if len(one) > 1 else 1.0
        return found if found == found else 1.0
    won = sum(a > b for a, b in zip(one, other, strict=True))
    lost = sum(b > a for a, b in zip(one, other, strict=True))
    return float(binomtest(won, won + lost, 0.5).pvalue)


def named_test(values: Sequence[float]) -> str:
    """Return what the test of `chance` is called."""
    return "McNemar's p" if is_share(values) else "the paired t-test's p"


def compared(
    results: Sequence[SuiteResult], others: Mapping[str, Sequence[SuiteResult]]
) -> list[str]:
    """Return a sentence for each result and each other one that was asked the same.

    Args:
        results: Of one run.
        others: Of what they are compared with, by its name.
    """
    said = list[str]()
    for result in results:
        for name, known in others.items():
            for other in known:
                if not result.is_like(other) or other is result:
                    continue
                points = 100 * (result.score - other.score)
                said.append(
                    f"{SUITES[result.suite].title}: {result.model} {points:+.1f} points beside {name} on the same"
                    f" {result.num} items, {named_test([*result.values, *other.values])} {chance(result.values, other.values):.2g}"
                )
    return said


def suites_table(results: Sequence[SuiteResult]) -> Table:
    """Return a row a result and score."""
    table = Table(title="Public tests", title_justify="left")
    for name in ("suite", "model", "score"):
        table.add_column(name, overflow="fold")
    for name in ("items", "of 100", "95 %", "seconds"):
        table.add_column(name, justify="right")
    for result in results:
        for at, (score, value) in enumerate(result.scores.items()):
            first = (str(result.num), f"{100 * result.low:.1f} to {100 * result.high:.1f}")
            num, interval = ("", "") if at else first
            table.add_row(
                Text("" if at else SUITES[result.suite].title),
                Text("" if at else result.model),
                Text(score),
                num,
                f"{100 * value:.1f}",
                interval,
                "" if at else f"{result.seconds:.1f}",
            )
    return table
