"""The command that takes a client out of a run."""

from pathlib import Path
from typing import Annotated

import typer

from fedloom.cli_console import console as _console
from fedloom.cli_errors import about
from fedloom.cli_options import Anyway, RunFolder


def unlearn(
    folder: RunFolder,
    client: Annotated[
        list[str], typer.Option(help="Who never answers; give it again for another.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the replay; RUN-without-NAME if not given.")
    ] = None,
    anyway: Anyway = False,
) -> None:
    """Replay a run as if a client had never answered: all others train anew from the same seeds."""
    from fedloom.unlearning import unlearn as replay

    about(folder)
    result = replay(folder, client, out, console=_console(), anyway=anyway)
    _console().print(f"without {', '.join(client)}: {result.folder}", highlight=False)
