"""A plan, run and written down."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from fedloom.benchmark.plan import read_plan
from fedloom.benchmark.runs import outcomes, run_all
from fedloom.benchmark.table import BenchTable, table_of
from fedloom.benchmark.written import write_all
from fedloom.core.files import file_name, folder_at
from fedloom.tracking.environment import collect


@dataclass(frozen=True)
class Bench:
    """What came of a plan."""

    table: BenchTable
    """Rows and columns as numbers."""
    files: Mapping[str, Path]
    """The table as Markdown, LaTeX, CSV, JSON and a page, and what it cost."""


def bench(
    plan: str | Path | Mapping[str, Any],
    folder: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    part: int = 0,
    parts: int = 1,
    only_table: bool = False,
    console: Console | None = None,
) -> Bench:
    """Run methods times seeds, and write one table; called again, it goes on where it was stopped.

    Args:
        plan: A YAML file with `methods`, `seeds` and what they have in common, or what such a file holds.
        folder: Of the runs and the table; runs/NAME if not given.
        overrides: Settings of all methods, such as "data.source=mine.jsonl".
        part: Which share of the runs this process makes, from 0.
        parts: Among how many processes the runs are shared.
        only_table: Run nothing.
        console: Where progress goes; nowhere if not given.

    Raises:
        ValueError: where the plan does not hold together, or the folder has runs of another one.
    """
    if not 0 <= part < parts:
        raise ValueError(f"part must be from 0 to below parts, got {part} of {parts}")
    asked = read_plan(plan, overrides)
    home = folder_at(Path(folder or Path("runs") / file_name(asked.name)), "the plan's folder")
    if not only_table:
        run_all(asked, home, part=part, parts=parts, console=console or Console(quiet=True))
    made = table_of(asked, outcomes(asked, home))
    return Bench(made, write_all(made, home, collect()))
