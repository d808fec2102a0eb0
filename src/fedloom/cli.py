"""The command line. Heavy imports wait inside the commands, so that help and errors are instant."""

import os
import signal
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedloom import (
    cli_audit,
    cli_bench,
    cli_board,
    cli_export,
    cli_recipes,
    cli_sites,
    cli_suites,
    cli_tune,
    cli_unlearn,
)
from fedloom.cli_console import complain, open_terminal, show_outcome
from fedloom.cli_console import console as _console
from fedloom.cli_errors import about, guard
from fedloom.cli_options import Anyway, ModelPath, RunFolder

if TYPE_CHECKING:
    from fedloom.rounds.recipe_settings import Recipe

app = typer.Typer(
    add_completion=False,
    suggest_commands=False,  # click does
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
PICTURES = (".png", ".svg", ".pdf")
NO_ANSWER = "(the model ended its answer at once)"

RecipeName = Annotated[
    str, typer.Argument(help="A shipped recipe's name, or a path that ends in .yaml.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Settings to change, such as run.rounds=5 or algorithm.fedavg.mu=0.1."),
]


def run(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; runs/NAME if not given.")
    ] = None,
) -> None:
    """Run a recipe: train, measure, compare with its baselines, report."""
    from fedloom.experiment import new_folder
    from fedloom.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    _conduct(loaded, new_folder(loaded.name, out))


def resume(folder: RunFolder, overrides: Overrides = None, anyway: Anyway = False) -> None:
    """Go on with a run from its last good checkpoint."""
    from fedloom.reopen import recipe_of

    _conduct(recipe_of(folder, overrides or []), folder, anyway=anyway)


def plan(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Predict parameters, bytes, memory and time without training, and refuse what cannot fit."""
    from fedloom.recipe import load_recipe
    from fedloom.results.plan import make_plan

    _console().print(make_plan(load_recipe(recipe, overrides or [])).table())


def data(
    recipe: RecipeName,
    overrides: Overrides = None,
    picture: Annotated[
        Path | None, typer.Option(help="Also draw the split into this PNG, SVG or PDF file.")
    ] = None,
) -> None:
    """Show the split, the tokens and the label mask before training."""
    from fedloom.core.files import file_at, file_name
    from fedloom.data.federation import federate
    from fedloom.data.preview import preview, split_figure
    from fedloom.models.build import load_tokenizer
    from fedloom.models.positions import check_length
    from fedloom.recipe import load_recipe
    from fedloom.spaces.seed_space import Seeds

    loaded = load_recipe(recipe, overrides or [])
    virtual = loaded.tune.virtual_tokens
    check_length(loaded.model, loaded.data.max_length, virtual_tokens=virtual)
    file = file_at(
        picture or Path(f"{file_name(loaded.name)}-split.png"), "--picture", ends=PICTURES
    )
    tokenizer = load_tokenizer(loaded.model)
    federation = federate(loaded.data, tokenizer, loaded.objective)
    console = _console()
    for part in preview(federation, tokenizer):
        console.print(part)
    if isinstance(loaded.tune, Seeds):
        console.print(f"rebuild of the weights along {loaded.tune.rebuild_cost(loaded.model)}")
    split_figure(federation.manifest.to_json()).savefig(file, dpi=150)
    console.print(f"picture of the split: {file}")


def evaluate(folder: RunFolder, anyway: Anyway = False, model: ModelPath = None) -> None:
    """Measure the deployed weights of a run on every client's test data."""
    from fedloom.result import open_run

    console = _console()
    about(folder)
    found = open_run(folder, console=console, anyway=anyway, moved=model)
    console.print(found.evaluate().table())


def report(
    folders: Annotated[
        list[Path], typer.Argument(help="Folders of runs; the first one's report is written.")
    ],
) -> None:
    """Write report.html anew, drawing the other runs given into it."""
    from fedloom.report.page import write_report
    from fedloom.rounds.reading import require_run

    for folder in folders:
        require_run(folder)
    _console().print(f"report: {write_report(folders[0], others=folders[1:])}")


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
    from fedloom.core.files import file_at
    from fedloom.report.compare import compare as compare_runs
    from fedloom.rounds.reading import require_run

    for folder in folders:
        require_run(folder)
    file_at(out, "--out")
    _console().print(compare_runs(folders, out=out, metric=metric))
    _console().print(f"figure: {out}")


def chat(
    folder: RunFolder,
    client: Annotated[
        str | None, typer.Option(help="Whose model; the shared one if not given.")
    ] = None,
    cluster: Annotated[
        str | None, typer.Option(help="Which model, or auto: what is asked chooses.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Answer this and stop, instead of asking.")
    ] = None,
    anyway: Anyway = False,
    model: ModelPath = None,
) -> None:
    """Talk to a run's deployed model."""
    from rich.text import Text

    from fedloom.result import open_run

    if client and cluster:
        raise ValueError(f"take --client or --cluster, got both ({client} and {cluster})")
    console = _console()
    about(folder)
    found = open_run(folder, console=console, anyway=anyway, moved=model)
    talk = found.chat(cluster or client)
    if prompt is not None:
        console.print(talk.answer(prompt) or NO_ANSWER, markup=False, highlight=False)
        if talk.route:
            complain(talk.route.reason)
        return
    console.print(f"{talk.name}; an empty line ends the chat")
    with suppress(EOFError):
        while text := console.input("[bold]you:[/] ").strip():
            line = Text.assemble(("model:", "bold"), f" {talk.answer(text) or NO_ANSWER}")
            console.print(line, highlight=False)
            if talk.route:
                console.print(Text(talk.route.reason, style="dim"), highlight=False)


def route(
    folder: RunFolder,
    probe: Annotated[Path, typer.Argument(help="Examples like data.source, or prompts in a .txt.")],
    num_examples: Annotated[int, typer.Option(min=1, help="How many are looked at.")] = 16,
    anyway: Anyway = False,
    model: ModelPath = None,
) -> None:
    """Find the model of a run that suits a new client, from a few examples without a label, and how sure that is."""
    from fedloom.result import open_run
    from fedloom.results.route import Router, read_probe, route_table

    console = _console()
    about(folder)
    found = open_run(folder, console=console, anyway=anyway, moved=model).open("route")
    examples = read_probe(found.session, probe, num_examples)
    console.print(route_table(Router.of(found.session, found.run), examples))


def align(
    folder: RunFolder,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Settings of the run of DPO, such as local.lr=1e-5 or run.rounds=10."),
    ] = None,
    prompts: Annotated[
        Path, typer.Option(help="Prompts, a line each in a .txt, or rows with prompt and answers.")
    ] = ...,  # type: ignore[assignment]  # typer's mark of what must be given
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run of DPO; RUN-aligned if not given.")
    ] = None,
    answers: Annotated[int, typer.Option(help="Answers to each prompt, if none are given.")] = 2,
    temperature: Annotated[float, typer.Option(help="At which they are drawn.")] = 0.7,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 60,
    anyway: Anyway = False,
    model: ModelPath = None,
) -> None:
    """Let the selectors of a run judge answers to prompts, and teach a model what they prefer by DPO."""
    from fedloom.alignment import align as align_run
    from fedloom.results.judging import Writing

    console = _console()
    about(folder)
    writing = Writing(answers, temperature, max_new_tokens)
    result = align_run(
        folder,
        prompts,
        out,
        overrides=overrides or [],
        writing=writing,
        console=console,
        anyway=anyway,
        moved=model,
    )
    show_outcome(result, console=console)


def doctor() -> None:
    """Show versions, devices and which extras are installed."""
    from fedloom.tracking.doctor import doctor as examine

    _console().print(examine())


COMMANDS = {
    "A run": (run, plan, data, resume),
    "Its outcome": (
        *(evaluate, report, compare, chat, route, align),
        *(
            cli_export.export,
            cli_export.apply,
            cli_suites.suite,
            cli_audit.audit,
            cli_unlearn.unlearn,
        ),
    ),
    "Many runs": (cli_bench.bench, cli_tune.tune, cli_bench.reproduce, cli_board.board),
    "Sites": (cli_sites.serve, cli_sites.join, cli_sites.status),
    "This machine": (doctor,),
}
"""In the order of the help, under its titles."""
for title, commands in COMMANDS.items():
    for each in commands:
        app.command(rich_help_panel=title)(each)
app.add_typer(cli_recipes.recipes_app, name="recipes", rich_help_panel="A run")
app.add_typer(cli_sites.keys_app, name="keys", rich_help_panel="Sites")


def _show_version(asked: bool) -> None:
    if asked:
        from fedloom import __version__

        typer.echo(f"fedloom {__version__}")
        raise typer.Exit


@app.callback(no_args_is_help=True)
def fedloom(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Show the version and exit.",
            is_eager=True,
            callback=_show_version,
        ),
    ] = False,
) -> None:
    """Fine-tune large language models across clients whose data never leaves them."""


def main() -> None:
    """Run the command line; a user's mistake is one sentence and exit code 2, a fault of ours one and exit code 1."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Threads that wait by spinning make a run several times slower on a machine that others use too.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # So that whatever a command started is ended, and its folders are cleared away.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    open_terminal()
    sys.exit(guard(partial(app, prog_name="fedloom"), sys.argv[1:]))


def _conduct(recipe: "Recipe", folder: Path, *, anyway: bool = False) -> None:
    from rich.text import Text

    from fedloom import experiment

    about(folder)
    console = _console()
    console.print(Text.assemble((recipe.name, "bold"), f" → {folder}"))
    result = experiment.run(recipe, folder, console=console, anyway=anyway)
    show_outcome(result, console=console)


if __name__ == "__main__":
    main()
