"""The command line. Heavy imports wait inside the commands, so that help and errors are instant."""

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedloom import cli_recipes, cli_sites

if TYPE_CHECKING:
    from rich.console import Console

    from fedloom.run.session import Session
    from fedloom.run.settings import Recipe

app = typer.Typer(
    help="Fine-tune large language models across clients whose data never leaves them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cli_recipes.recipes_app, name="recipes")
app.add_typer(cli_sites.keys_app, name="keys")
for command in (cli_sites.serve, cli_sites.join, cli_sites.status):
    app.command()(command)

NO_ANSWER = "(the model ended its answer at once)"

RecipeName = Annotated[
    str, typer.Argument(help="A shipped recipe's name, or a path that ends in .yaml.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Settings to change, such as run.rounds=5 or algorithm.fedavg.mu=0.1."),
]
RunFolder = Annotated[Path, typer.Argument(help="The folder of a run, such as runs/quickstart.")]


@app.command()
def run(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; runs/NAME if not given.")
    ] = None,
) -> None:
    """Run a recipe: train, measure, compare with its baselines, report."""
    from fedloom.launch import new_folder
    from fedloom.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    _conduct(loaded, new_folder(loaded.name, out))


@app.command()
def resume(folder: RunFolder, overrides: Overrides = None) -> None:
    """Go on with a run from its last good checkpoint."""
    _conduct(_recipe_of(folder, overrides), folder)


@app.command()
def plan(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Predict parameters, bytes, memory and time without training, and refuse what cannot fit."""
    from fedloom.recipe import load_recipe
    from fedloom.run.plan import make_plan

    _console().print(make_plan(load_recipe(recipe, overrides or [])).table())


@app.command()
def data(
    recipe: RecipeName,
    overrides: Overrides = None,
    picture: Annotated[
        Path | None, typer.Option(help="Also draw the split into this PNG file.")
    ] = None,
) -> None:
    """Show the split, the tokens and the label mask before training."""
    from fedloom.data.federation import federate
    from fedloom.data.preview import preview, split_figure
    from fedloom.models.build import load_tokenizer
    from fedloom.models.positions import check_length
    from fedloom.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    check_length(loaded.model, loaded.data.max_length)
    tokenizer = load_tokenizer(loaded.model)
    federation = federate(loaded.data, tokenizer)
    console = _console()
    for part in preview(federation, tokenizer):
        console.print(part)
    file = picture or Path(f"{loaded.name}-split.png")
    split_figure(federation.manifest.to_json()).savefig(file, dpi=150)
    console.print(f"picture of the split: {file}")


@app.command()
def evaluate(folder: RunFolder) -> None:
    """Measure the deployed weights of a run on every client's test data."""
    from fedloom.run.answer import measure_again

    _console().print(measure_again(_opened(folder)))


@app.command()
def report(
    folders: Annotated[
        list[Path], typer.Argument(help="Folders of runs; the first one's report is written.")
    ],
) -> None:
    """Write report.html anew, drawing the other runs given into it."""
    from fedloom.run.report import write_report

    for folder in folders:
        _require_run(folder)
    _console().print(f"report: {write_report(folders[0], others=folders[1:])}")


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(help="Folders of runs.")],
    out: Annotated[Path, typer.Option(help="HTML file with table and figure.")] = Path(
        "compare.html"
    ),
    metric: Annotated[
        str | None, typer.Option(help="Such as test/exact_match; chosen if not given.")
    ] = None,
) -> None:
    """Put runs into one table and one figure: quality against bytes."""
    from fedloom.run.compare import compare as compare_runs

    for folder in folders:
        _require_run(folder)
    _console().print(compare_runs(folders, out=out, metric=metric))
    _console().print(f"figure: {out}")


@app.command()
def export(
    folder: RunFolder,
    out: Annotated[
        Path | None, typer.Option(help="Where to write; RUN/adapters if not given.")
    ] = None,
    merged: Annotated[
        bool, typer.Option("--merged", help="Write whole models instead of adapters.")
    ] = False,
) -> None:
    """Write the deployed models as folders that peft and transformers load."""
    from fedloom.run.answer import last_run
    from fedloom.run.export import export_models

    session = _opened(folder)
    target = out or folder / ("merged" if merged else "adapters")
    for name, written in export_models(session, last_run(session), target, merged=merged).items():
        _console().print(f"{name}: {written}")


@app.command()
def chat(
    folder: RunFolder,
    client: Annotated[
        str | None, typer.Option(help="Whose model; the shared one if not given.")
    ] = None,
    cluster: Annotated[
        str | None, typer.Option(help="Which model, or auto: the first message chooses.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Answer this and stop, instead of asking.")
    ] = None,
) -> None:
    """Talk to a run's deployed model."""
    from rich.markup import escape

    from fedloom.run.answer import Chat

    if client and cluster:
        raise ValueError(f"take --client or --cluster, got both ({client} and {cluster})")
    talk = Chat.open(_opened(folder), cluster or client)
    console = _console()
    if prompt is not None:
        console.print(talk.answer(prompt) or NO_ANSWER, markup=False, highlight=False)
        return
    console.print(f"{talk.name}; an empty line ends the chat")
    while text := console.input("[bold]you:[/] ").strip():
        console.print(f"[bold]model:[/] {escape(talk.answer(text) or NO_ANSWER)}", highlight=False)


@app.command()
def route(
    folder: RunFolder,
    probe: Annotated[Path, typer.Argument(help="Examples like data.source, or prompts in a .txt.")],
    num_examples: Annotated[int, typer.Option(min=1, help="How many are looked at.")] = 16,
) -> None:
    """Find the model of a run that suits a new client, from a few examples without a label."""
    from fedloom.run.answer import last_run
    from fedloom.run.export import deliverables
    from fedloom.run.route import Router, read_probe, route_table

    session = _opened(folder)
    found = read_probe(session, probe, num_examples)
    router = Router(session, deliverables(session, last_run(session)))
    _console().print(route_table(router, found))


@app.command()
def doctor() -> None:
    """Show versions, devices and which extras are installed."""
    from fedloom.run.doctor import doctor as examine

    _console().print(examine())


def main() -> None:
    """Run the command line; a user's mistake is one sentence and exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Threads that wait by spinning make a run several times slower on a machine that others use too.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # So that whatever a command started is ended, and its folders are cleared away.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        app()
    except (ValueError, OSError) as error:
        if os.environ.get("FEDLOOM_DEBUG"):
            raise
        _complain(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        _complain("stopped; `fedloom resume` goes on from the last finished round")
        sys.exit(130)


def _complain(sentence: str) -> None:
    print(f"fedloom: {sentence}", file=sys.stderr)  # noqa: T201


def _conduct(recipe: "Recipe", folder: Path) -> None:
    from fedloom.launch import run_recipe
    from fedloom.run.conduct import results_table

    console = _console()
    console.print(f"[bold]{recipe.name}[/] → {folder}")
    console.print(results_table(run_recipe(recipe, folder, console=console)))
    console.print(f"report: {folder / 'report.html'}", soft_wrap=True)


def _recipe_of(folder: Path, overrides: list[str] | None = None) -> "Recipe":
    from fedloom.recipe import load_recipe

    _require_run(folder)
    return load_recipe(folder / "recipe.yaml", overrides or [])


def _opened(folder: Path) -> "Session":
    from fedloom.run.session import build

    return build(_recipe_of(folder), folder)


def _require_run(folder: Path) -> None:
    if not (folder / "recipe.yaml").is_file():
        raise ValueError(f"{folder} holds no run: it has no recipe.yaml; `fedloom run` makes one")


def _console() -> "Console":
    from rich.console import Console

    return Console()


if __name__ == "__main__":
    main()
