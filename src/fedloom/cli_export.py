"""The commands that bring a run's models to other programs."""

from pathlib import Path
from typing import Annotated

import typer

from fedloom.cli_console import console
from fedloom.cli_errors import about
from fedloom.cli_options import Anyway, ModelPath, RunFolder


def export(
    folder: RunFolder,
    out: Annotated[
        Path | None, typer.Option(help="Where to write; RUN/adapters if not given.")
    ] = None,
    form: Annotated[
        str,
        typer.Option(
            "--for",
            help="peft: adapters; lora: those of tune: vera as LoRA; vllm: LoRA as vLLM reads it; merged: whole models;"
            " nf4: those in NF4 again; gguf: those as GGUF; gguf-lora: LoRA for llama.cpp; seeds: seed files.",
        ),
    ] = "peft",
    type: Annotated[
        str | None,
        typer.Option("--type", help="Of --for gguf: f32, f16 (if not given) or q8_0."),
    ] = None,
    merged: Annotated[bool, typer.Option("--merged", help="Short for --for merged.")] = False,
    as_lora: Annotated[bool, typer.Option("--as-lora", hidden=True)] = False,
    anyway: Anyway = False,
    model: ModelPath = None,
) -> None:
    """Write the deployed models for the programs that serve them: folders of peft and transformers, GGUF files, seed files."""
    from fedloom.result import open_run
    from fedloom.results.export import check_form

    if as_lora:
        raise ValueError("--as-lora is --for lora now")
    if merged and form not in ("peft", "merged"):
        raise ValueError(f"--merged is short for --for merged, got --for {form} too")
    form = "merged" if merged else form
    wanted, numbers = check_form(form, type and type.lower())
    shown = console()
    found = open_run(folder, console=shown, anyway=anyway, moved=model)
    about(folder)
    for name, path in found.export(out, form=wanted, type=numbers).items():
        shown.print(f"{name}: {path}")


def apply(
    seeds: Annotated[Path, typer.Argument(help="A seed file, as `export --for seeds` writes it.")],
    base: Annotated[str, typer.Argument(help="Its base model, as a recipe's model.name.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder of the model; the seed file's name if not given."),
    ] = None,
) -> None:
    """Make the whole model that a seed file describes, of its base model."""
    from fedloom.results.seed_file import SUFFIX, apply_seeds

    target = out or Path(seeds.name.removesuffix(SUFFIX) + "-model")
    console().print(f"model: {apply_seeds(seeds, base, target)}")
