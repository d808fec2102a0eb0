"""The commands about the recipes that ship with the package."""

from pathlib import Path
from typing import Annotated

import typer

from fedloom.cli_console import console

recipes_app = typer.Typer(
    help="List the shipped recipes, or copy one to change it.", no_args_is_help=True
)


@recipes_app.command("ls")
def recipes_ls() -> None:
    """List the shipped recipes."""
    from rich.table import Table

    from fedloom.recipe import read_tree, shipped

    table = Table("recipe", "what it runs")
    for name in shipped():
        table.add_row(name, str(read_tree(name).get("description", "")))
    console().print(table)


@recipes_app.command("cp")
def recipes_cp(
    name: Annotated[str, typer.Argument(help="A shipped recipe's name.")],
    to: Annotated[
        Path | None, typer.Argument(help="The file to write; ./NAME.yaml if not given.")
    ] = None,
) -> None:
    """Copy a shipped recipe to a file of your own."""
    from fedloom.core.places import file_at
    from fedloom.recipe import SHIPPED, read_tree

    read_tree(name)
    target = to or Path(f"{name}.yaml")
    if target.exists():
        raise ValueError(f"{target} exists already; give another file name")
    file_at(target, "the file to write")
    target.write_bytes((SHIPPED / f"{name}.yaml").read_bytes())
    console().print(f"wrote {target}; run it with `fedloom run {target}`")
