"""Progress with an estimate of the time left on a terminal, a line a round elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fedloom.core.protocols import Metrics


@dataclass(frozen=True)
class RoundBar:
    """One bar over the rounds."""

    progress: Progress
    task: TaskID
    total: int

    def advance(self, number: int, metrics: Metrics) -> None:
        """Move on to round `number` and show its numbers; a line of its own where there is no terminal."""
        line = _line(metrics)
        self.progress.update(self.task, completed=number, line=line)
        if self.progress.disable:
            self.progress.console.print(f"round {number} of {self.total}: {line}", highlight=False)

    def say(self, what: str) -> None:
        """Show what happens between rounds."""
        self.progress.update(self.task, line=what)


@contextmanager
def round_bar(console: Console, name: str, *, done: int, total: int) -> Iterator[RoundBar]:
    """Show a bar over rounds, `done` of `total` behind it."""
    columns = (
        TextColumn("{task.description}", style="bold", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[line]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, completed=done, total=total, line="")
        yield RoundBar(progress, task, total)


def _line(metrics: Metrics) -> str:
    shown = [
        ("train/loss", "train loss"),
        ("validation/loss", "validation loss"),
        ("test/exact_match", "exact match"),
        ("test/accuracy", "accuracy"),
    ]
    return " · ".join(f"{label} {metrics[name]:.3f}" for name, label in shown if name in metrics)
