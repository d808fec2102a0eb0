"""The command line for public tests of what a run delivers."""

from pathlib import Path
from typing import Annotated

import typer

from fedloom.cli_console import console as _console
from fedloom.cli_errors import about
from fedloom.cli_options import Anyway, ModelPath, RunFolder

Suites = Annotated[
    list[str],
    typer.Argument(
        help="NAME=FILE, such as mmlu=test.jsonl, NAME=OWNER/SET:CONFIG:SPLIT of the Hub, or NAME alone for the Hub's usual one."
    ),
]
Limit = Annotated[int | None, typer.Option(help="Ask the first so many items.")]
Shots = Annotated[
    int | None, typer.Option(help="Worked examples; as the suite's protocol has it if not given.")
]
Examples = Annotated[
    str | None,
    typer.Option(help="Where those are from; the first items of the file if not given."),
]
Sha256 = Annotated[str | None, typer.Option(help="What the file must be.")]
Client = Annotated[
    str | None, typer.Option(help="Whose model, or which; the shared one if not given.")
]
Base = Annotated[bool, typer.Option("--base", help="Also ask the model before training.")]
Beside = Annotated[
    list[Path] | None, typer.Option(help="Folders of runs that were asked the same.")
]
AllowCode = Annotated[
    bool, typer.Option("--allow-code", help="Run programs that the model writes, behind a fence.")
]


def suite(
    folder: RunFolder,
    suites: Suites,
    limit: Limit = None,
    shots: Shots = None,
    examples: Examples = None,
    sha256: Sha256 = None,
    client: Client = None,
    base: Base = False,
    beside: Beside = None,
    allow_code: AllowCode = False,
    anyway: Anyway = False,
    model: ModelPath = None,
) -> None:
    """Ask a run's model public tests (GSM8K, MMLU, HumanEval, XQuAD, Natural Instructions, ARC, OpenBookQA, BoolQ, HellaSwag), or
    rows of your own."""
    from fedloom.result import open_run
    from fedloom.results.suite_results import compared, read_results, suites_table
    from fedloom.results.suites import BASE, Asked
    from fedloom.suites.protocols import SUITES

    if sha256 and len(suites) > 1:
        raise ValueError("--sha256 is of one file: ask one suite at a time")
    asked, named = [], " ".join(suites)
    for word in suites:
        name, equals, file = word.partition("=")
        if equals and not file:
            raise ValueError(f"a suite must be NAME=FILE, such as mmlu=test.jsonl, got {word!r}")
        asked.append(Asked(name, file or None, limit, shots, examples, sha256, allow_code))
    if allow_code and not any(SUITES[each.suite].runs_code for each in asked):
        raise ValueError(f"--allow-code has no effect: {named} runs no program")
    for other in beside or ():
        if not read_results(other):
            raise ValueError(
                f"--beside {other} has no results of public tests: `fedloom suite {other} {named}` brings them"
            )
    console = _console()
    about(folder)
    found = open_run(folder, console=console, anyway=anyway, moved=model)
    results = found.suites(asked, client, base=base)
    console.print(suites_table(results))
    own = [r for r in results if r.model != BASE]
    others = {"the model before training": [r for r in results if r.model == BASE]}
    others |= {str(other): read_results(other) for other in beside or ()}
    for name, known in others.items():
        lines = compared(own, {name: known})
        if known and not lines:
            lines = [f"{name} was asked other questions, or in another form: nothing to compare"]
        for line in lines:
            console.print(line, markup=False, highlight=False)
