"""The command line for tables: many methods, many seeds, one command."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from fedloom.cli_console import console as _console
from fedloom.cli_console import show_files
from fedloom.cli_options import OnlyTable


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
        str, typer.Option(help="i/n: the i-th share of the runs, from 0, for n processes at once.")
    ] = "0/1",
    table: OnlyTable = False,
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
    show_files(made.files, console=console)
    if any(row.failed for row in made.table.rows):
        sys.exit(2)


def reproduce(
    name: Annotated[
        str | None, typer.Argument(help="A table's name, that of its file in benchmarks/results.")
    ] = None,
    listed: Annotated[
        bool, typer.Option("--list", help="Run nothing: list all tables, or show the one named.")
    ] = False,
) -> None:
    """Make a table of the pages anew: its command, our figures, and the papers' beside them where they are known."""
    from fedloom.benchmark.published import WHERE, benchmarks, find, published
    from fedloom.benchmark.published import reproduce as make

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    folder, console = benchmarks(), _console()
    if name is None:
        if not listed:
            raise ValueError("name a table, or give --list for all of them")
        for table in published(folder).values():
            beside = ", with figures of papers" if table.papers else ""
            say(f"{table.name}: {table.title}{beside}")
        if folder is None:
            say(WHERE)
        return
    table = find(name, folder)
    if folder is not None:
        for script, *words in table.commands():
            say(f"command: python {' '.join([script, *words])}")
        say(f"\nour figures, {table.file}:\n\n{table.text}\n")
    if table.papers:
        say("\n".join(["papers, on other models and data than ours:", *table.said()]))
    else:
        say("papers: no figures of theirs were found that are of the same")
    if folder is None:
        raise ValueError(f"{name} cannot be made here: {WHERE}")
    if not listed:
        say("\nmade anew:\n")
        sys.exit(make(table))
