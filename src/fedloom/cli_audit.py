"""The command that audits what a run's own wire reveals."""

from typing import Annotated

import typer

from fedloom.cli_console import console as _console
from fedloom.cli_errors import about
from fedloom.cli_options import Anyway, RunFolder

Attacks = Annotated[
    list[str] | None,
    typer.Option(
        "--attack",
        help="Which attack; give it again for another. All but those that train anew if not given.",
    ),
]
Number = Annotated[
    int | None,
    typer.Option("--round", help="Which round; the first two and the last recorded if not given."),
]
Client = Annotated[
    str | None, typer.Option(help="Whose uploads; everybody's of those rounds if not given.")
]


def audit(
    folder: RunFolder,
    attack: Attacks = None,
    number: Number = None,
    client: Client = None,
    anyway: Anyway = False,
) -> None:
    """Attack a run made with `audit=record` as its own server could, and tell what that reveals of clients' data."""
    from fedloom.audit.conduct import audit as conduct
    from fedloom.audit.written import shown, write_audit

    about(folder)
    console = _console()
    found = conduct(
        folder, attack or [], console=console, round=number, client=client, anyway=anyway
    )
    console.print(shown(found))
    for name, why in found.silent.items():
        console.print(f"{name} says nothing: {why}", highlight=False)
    home = write_audit(folder, found)
    console.print(f"what each number says, what is assumed, and a picture: {home}", highlight=False)
