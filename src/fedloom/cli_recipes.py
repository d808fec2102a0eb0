"""Its commands for recipes: list the shipped ones, copy one, make one of another framework's configuration."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from fedloom.cli_console import console

recipes_app = typer.Typer(
    help="List the shipped recipes, copy one to change it, or make one of another framework's file.",
    no_args_is_help=True,
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
    from fedloom.core.files import file_at
    from fedloom.recipe import SHIPPED, read_tree

    read_tree(name)
    target = to or Path(f"{name}.yaml")
    if target.exists():
        raise ValueError(f"{target} exists already; give another file name")
    file_at(target, "the file to write")
    target.write_bytes((SHIPPED / f"{name}.yaml").read_bytes())
    console().print(f"wrote {target}; run it with `fedloom run {target}`")


@recipes_app.command("import")
def recipes_import(
    file: Annotated[
        str,
        typer.Argument(
            help="A FlowerTune pyproject.toml, a FederatedScope-LLM YAML, or a script that calls OpenFedLLM, FedLLM-Bench,"
            " FedMLLM or FedKSeed; - reads it from the standard input."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="The file to write; printed if not given.")
    ] = None,
) -> None:
    """Make a recipe of another framework's configuration, with what became of each of its keys."""
    from fedloom.core.files import file_at
    from fedloom.importing.document import import_file, import_text

    if out is not None and out.exists():
        raise ValueError(f"{out} exists already; give another file name")
    if file == "-":
        imported = import_text(sys.stdin.read(), source="the standard input")
    else:
        imported = import_file(Path(file))
    if out is None:
        console().print(imported.text(), markup=False, highlight=False, soft_wrap=True, end="")
        return
    file_at(out, "the file to write", ends=(".yaml", ".yml"))
    out.write_text(imported.text(), encoding="utf-8")
    console().print(f"wrote {out}; what became of each key stands at its head")
