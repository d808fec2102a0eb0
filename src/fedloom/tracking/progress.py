"""Progress with an estimate of the time left on a terminal, a line a round elsewhere."""

from collections.abc import Callable, Iterator
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
    note: Callable[[str], object]
    """Takes what a terminal shows as a bar."""

    def advance(self, number: int, metrics: Metrics) -> None:
        """Move on to round `number` and show its numbers; a line of its own where there is no terminal."""
        line = _line(metrics)
        self.progress.update(self.task, completed=number, line=line)
        said = f"round {number} of {self.total}: {line}"
        if self.progress.disable:
            self.progress.console.print(said, highlight=False)
        else:
            self.note(said)

    def say(self, what: str) -> None:
        """Show what happens between rounds."""
        self.progress.update(self.task, line=what)
        self.note(what)


@contextmanager
def round_bar(
    console: Console,
    name: str,
    *,
    done: int,
    total: int,
    note: Callable[[str], object] = lambda _: None,
) -> Iterator[RoundBar]:
    """Show a bar over rounds, `done` of `total` behind it; `note` is told what it shows."""
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
        yield RoundBar(progress, task, total, note)


def _line(metrics: Metrics) -> str:
    shown = [
        ("train/loss", "train loss"),
        ("validation/loss", "validation loss"),
        ("test/exact_match", "exact match"),
        ("test/accuracy", "accuracy"),
    ]
    return " · ".join(f"{label} {metrics[name]:.3f}" for name, label in shown if name in metrics)
