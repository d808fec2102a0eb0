"""The command line for tables: many methods, many seeds, one command."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from fedloom.cli_console import console as _console


def bench(
    plan: Annotated[Path, typer.Argument(help="A YAML file: methods, variants, seeds.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Settings of all methods, such as data.source=mine.jsonl."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the runs and the table; runs/NAME if not given.")
    ] = None,
    part: Annotated[
        str, typer.Option(help="i/n: every n-th run from the i-th on, for n processes at once.")
    ] = "0/1",
    table: Annotated[
        bool, typer.Option("--table", help="Run nothing, write the table of what is there.")
    ] = False,
) -> None:
    """Run methods times seeds, and write one table; called again, it goes on where it was stopped."""
    from fedloom.benchmark.bench import bench as run_plan
    from fedloom.benchmark.written import shown_table

    first, slash, count = part.partition("/")
    if not slash or not (first.isdecimal() and count.isdecimal()) or int(first) >= int(count):
        raise ValueError(f"--part must be i/n with i below n, such as 0/2, got {part!r}")
    console = _console()
    made = run_plan(
        plan,
        out,
        overrides=overrides or [],
        part=int(first),
        parts=int(count),
        only_table=table,
        console=console,
    )
    console.print(shown_table(made.table))
    for row in made.table.rows:
        for seed, reason in row.failed.items():
            console.print(f"{row.name}, seed {seed}, failed: {reason}", style="red", markup=False)
    for name, file in made.files.items():
        console.print(f"{name}: {file}", markup=False, highlight=False)
    if any(row.failed for row in made.table.rows):
        sys.exit(2)
