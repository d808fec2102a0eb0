"""What commands have in common: a run's folder, what they go on in spite of, and tables of what is there already."""

from pathlib import Path
from typing import Annotated

import typer

RunFolder = Annotated[Path, typer.Argument(help="The folder of a run, such as runs/quickstart.")]
Anyway = Annotated[
    bool,
    typer.Option(
        "--anyway",
        help="Go on although data or model are not what the run was begun with; the report says so.",
    ),
]
OnlyTable = Annotated[
    bool, typer.Option("--table", help="Run nothing, write the table of what is there.")
]
ModelPath = Annotated[
    Path | None, typer.Option("--model", help="Where the base model is now, if it has moved.")
]
