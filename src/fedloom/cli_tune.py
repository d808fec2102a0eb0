"""The command line for searches: which settings are best, found by many trials, one command."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from fedloom.cli_console import console as _console
from fedloom.cli_console import show_files
from fedloom.cli_options import OnlyTable


def tune(
    recipe: Annotated[
        str, typer.Argument(help="A shipped recipe's name, or a path that ends in .yaml.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Settings of all trials, such as data.source=mine.jsonl."),
    ] = None,
    space: Annotated[
        Path | None,
        typer.Option(help="A YAML file: which settings and values, and how they are searched."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the trials and the table; runs/RECIPE-SPACE if not given."),
    ] = None,
    trials: Annotated[int | None, typer.Option(help="How many, whatever the file says.")] = None,
    budget: Annotated[
        str | None, typer.Option(help="rounds=N or bytes=N of all trials, whatever the file says.")
    ] = None,
    table: OnlyTable = False,
) -> None:
    """Search for the settings that are best on validation data; called again, it goes on where it was stopped."""
    from fedloom.search.tune import tune as search
    from fedloom.search.written import notes_of, shown_trials

    if space is None:
        raise ValueError(
            "--space must name a YAML file with the settings to search, such as examples/space.yaml"
        )
    console = _console()
    made = search(
        recipe,
        space,
        out,
        overrides=overrides or [],
        trials=trials,
        budget=None if budget is None else _budget(budget),
        only_table=table,
        console=console,
    )
    console.print(shown_trials(made.outcome))
    for note in notes_of(made.outcome):
        console.print(note, markup=False, highlight=False)
    show_files(made.files, console=console)
    if made.recipe is None:
        sys.exit(2)


def _budget(text: str) -> dict[str, float]:
    unit, _, number = text.partition("=")
    try:
        return {unit: int(number) if unit == "rounds" else float(number)}
    except ValueError:
        raise ValueError(
            f"--budget must be rounds=N or bytes=N, such as rounds=60, got {text!r}"
        ) from None
