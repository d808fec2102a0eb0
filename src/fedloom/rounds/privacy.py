"""What a private run has released, and what it may say of its privacy: in its report, model card, summary and on the terminal."""

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fedloom.core.description import Accounts, Privacy, Release
from fedloom.core.files import DamagedFile, read_hashed, write_hashed
from fedloom.core.metrics import METRICS, PUBLIC
from fedloom.core.protocols import Algorithm, Metrics
from fedloom.rounds.loop import Run
from fedloom.rounds.reading import read_json
from fedloom.tracking.metric_format import shown
from fedloom.tracking.metrics_log import MetricsLog

FILE = "privacy.json"
"""What is promised, beside the run it is promised of."""
EPSILON = "server/epsilon"
"""The metric."""
_COVERED = (
    "It is of the models of all rounds, for one client more or less; metrics, counts, cohort sizes and samples are not"
    " covered."
)


def read_promise(folder: Path, *, remedy: str) -> Privacy | None:
    """Return what the run in a folder promised; None where it wrote nothing down.

    Raises:
        ValueError: where the file is damaged.
    """
    file = folder / FILE
    if not file.exists():
        return None
    found = read_json(file, dict, remedy=remedy)
    delta = found.get("delta")
    if found.keys() != asdict(Privacy()).keys() or not isinstance(delta, float | None):
        raise ValueError(f"{file} holds no promise as a run writes it: {remedy}")
    return Privacy(**found)


def privacy_record(promised: Privacy | None, history: MetricsLog) -> dict[str, Any] | None:
    """Return epsilon (None where nothing is promised), delta, and both in a short and a whole sentence.

    None where the run is not private.

    Args:
        promised: What the algorithm tells; None where that is not known.
        history: The run's metrics.
    """
    points, terms = history.of(EPSILON), promised or Privacy()
    if terms.void:
        return _record(None, terms, f"none: {terms.void}", f"None: {terms.explanation}.")
    if not points:
        return None
    number, epsilon = points[-1]
    at = f" at delta {terms.delta:g}" if terms.delta else ""
    value = shown(METRICS.of(EPSILON), epsilon)
    sentence = f"After round {number}, epsilon is {value}{at}. {terms.explanation or _COVERED}"
    return _record(epsilon, terms, f"epsilon {value}{at}", sentence)


def covered(metrics: Metrics) -> Metrics:
    """Return what follows from noisy means and public text; other evaluations, counts, bytes and times follow from who took part."""
    return {name: v for name, v in metrics.items() if name.startswith(("server/", PUBLIC))}


def _record(epsilon: float | None, terms: Privacy, short: str, sentence: str) -> dict[str, Any]:
    finite = epsilon is not None and math.isfinite(epsilon)
    return {
        "epsilon": epsilon if finite else None,
        "delta": terms.delta,
        "short": short,
        "said": sentence,
    }


@dataclass(frozen=True, slots=True)
class Releases:
    """A file that only grows: a state knows what was released before it, not what was after.

    Runs without `private` have none. It is written after a round's checkpoint and before anything of that round is
    sent, so that what is in it may have been seen, and what is not in it was not.
    """

    path: Path
    algorithm: Algorithm[Any]
    """Keeps the account, or holds who does."""

    def charge(self, run: Run[Any], *, fresh: bool) -> Run[Any]:
        """Return the run with all of the file on its account, and the file with all of the run's in it.

        Args:
            run: Before its next round.
            fresh: Whether it has no checkpoint yet, so that there need not be a file.

        Raises:
            ValueError: where the file is gone or damaged, so that nobody knows what was sent.
        """
        if self._released(run) is None:
            return run
        if fresh and not self.path.exists():
            self._write(set())
        sent = self._read()
        assert isinstance(self.algorithm, Accounts)
        charged = replace(run, state=self.algorithm.charge(run.state, sent))
        self.record(charged)
        return charged

    def record(self, run: Run[Any]) -> None:
        """Add what a state has released; on the disk when this returns."""
        released = self._released(run)
        if released is None:
            return
        known = self._read()
        if not known.issuperset(released):
            self._write(known | released)

    def _released(self, run: Run[Any]) -> set[Release] | None:
        if not isinstance(self.algorithm, Accounts):
            return None
        released = self.algorithm.released(run.state)
        return None if released is None else set(released)

    def _read(self) -> set[Release]:
        try:
            rows = map(json.loads, read_hashed(self.path).splitlines())
            return {(int(number), str(seal), float(q), float(z)) for number, seal, q, z in rows}
        except (DamagedFile, OSError, ValueError, TypeError) as error:
            raise ValueError(
                f"{self.path} says which noisy means were sent, and cannot be read ({error}): put it back, or begin a"
                " new run"
            ) from error

    def _write(self, releases: set[Release]) -> None:
        rows = "".join(json.dumps(release) + "\n" for release in sorted(releases))
        write_hashed(self.path, rows.encode(), private=self.path.parent)
