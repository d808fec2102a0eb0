"""The deployed weights of a run, measured again on every client's held-out data."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from fedloom.core.metrics import WEIGHTS
from fedloom.core.protocols import ClientId, Metrics, Split
from fedloom.evaluation.measure import combine
from fedloom.rounds.loop import Run, measure
from fedloom.rounds.session import Session


@dataclass(frozen=True)
class Evaluation:
    """How good what clients use is, after a round."""

    name: str
    """Of the recipe."""
    round: int
    split: Split
    metrics: Metrics
    """Over the examples of all clients, but for those that never train."""
    clients: Mapping[ClientId, Metrics]
    unseen: Metrics | None = None
    """Over those of clients that never train; None where there are none."""

    def table(self) -> Table:
        """Return a row per client and one over all, with what fits a terminal of 80 columns; the other metrics, over all, below."""
        measured = [n for n in self.metrics if n not in WEIGHTS]
        shown = [n for n in measured if n.rpartition("/")[2] in _SHOWN]
        names = shown[:_MOST] or measured[:1]
        table = Table(
            title=Text(f"{self.name} after round {self.round}, {self.split} data"),
            title_justify="left",
        )
        longest = max(map(len, self.clients))
        table.add_column("client", min_width=min(longest, _NAME), overflow="fold")
        for name in ("num_examples", *names):
            # A word a line, so that a column is no wider than its numbers need.
            head = name.replace("/", "/\n").replace("_", "\n")
            table.add_column(head, justify="right", min_width=_WIDTH)
        last = list(self.clients)[-1]
        rows = {**self.clients, "all": self.metrics}
        if self.unseen is not None:
            rows["all that never train"] = self.unseen
        for client, metrics in rows.items():
            cells = (f"{metrics[n]:.4f}" if n in metrics else "" for n in names)
            count = f"{metrics['num_examples']:.0f}"
            table.add_row(Text(client), count, *cells, end_section=client == last)
        if others := [
            f"{name.replace('_', ' ')} {self.metrics[name]:.4f}"
            for name in measured
            if name not in names
        ]:
            table.caption, table.caption_justify = Text(f"all: {', '.join(others)}"), "left"
        return table


_SHOWN = ("exact_match", "preference_accuracy", "accuracy", "loss")
_MOST = 4
"""Of these, those of a second model that is measured among them."""
_WIDTH = 7
"""Of a loss with four decimals."""
_NAME = 16
"""Of a client's name that stands on one line."""


def evaluate(session: Session, run: Run[Any], split: Split = "test") -> Evaluation:
    """Measure what every client would use after a run's last round on its own held-out data.

    Raises:
        ValueError: where that data is at sites, or there is none.
    """
    if split not in ("validation", "test"):
        raise ValueError(f"split must be validation or test, got {split!r}")
    if session.recipe.elsewhere:
        raise ValueError(
            f"the test data of this run is at its sites; {session.folder / 'summary.json'} has what they measured last"
        )
    counts = session.counts
    held_out = {c: n.test if split == "test" else n.validation for c, n in counts.items()}
    clients = [c for c in session.judges if held_out[c]]
    if not clients:
        shares = ", ".join(f"{share:g}" for share in session.recipe.data.fractions)
        which = "second" if split == "validation" else "third"
        raise ValueError(
            f"no client of {session.folder} holds {split} data: data.fractions {shares} (training, validation, test)"
            f" left none, so begin a run with a larger {which} share"
        )
    measured, failures = measure(
        run,
        session.recipe.algorithm,
        session.engine,
        kind="test" if split == "test" else "validate",
        population=session.engine.population(),
        clients=clients,
    )
    if not measured:
        raise ValueError(f"no client could be measured: {failures[0].reason}")
    known, apart = session.recipe.evaluation.table, set(session.unseen)
    seen = [metrics for client, metrics in measured.items() if client not in apart]
    others = [metrics for client, metrics in measured.items() if client in apart]
    # Where none of those that train could be measured, what there is is told.
    total = combine(seen or others, known)
    unseen = combine(others, known) if others else None
    return Evaluation(session.recipe.name, run.number, split, total, measured, unseen)
