"""What clients' selectors prefer, taught to a model on the server: answers are judged, and DPO learns from the pairs."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from fedloom import experiment
from fedloom.core.files import write_atomic
from fedloom.core.protocols import Params
from fedloom.objectives.selector import Selector
from fedloom.recipe import apply_overrides, build_recipe
from fedloom.recipe_text import to_tree
from fedloom.result import Result, open_run
from fedloom.results.export import deliverables
from fedloom.results.judging import Judged, Writing, judge, judged, read_prompts
from fedloom.rounds.checkpoint import state_sha256
from fedloom.rounds.lock import held
from fedloom.rounds.reading import read_json
from fedloom.rounds.recipe_settings import Recipe

JUDGED, PAIRS, ORIGIN = "judged.jsonl", "pairs.jsonl", "align.json"
"""In the folder: answers and what each selector makes of them; what DPO learns from; what they were made of."""
ROUNDS = 5
"""Of DPO where no override says otherwise; the run's local steps each."""


def align(
    folder: Path | str,
    prompts: Path | str,
    out: Path | str | None = None,
    *,
    overrides: Sequence[str] = (),
    writing: Writing | None = None,
    console: Console | None = None,
    anyway: bool = False,
    moved: Path | None = None,
) -> Result:
    """Let a run's selectors judge answers to prompts, and a model learn from what they prefer; go on where that was ended.

    Args:
        folder: Of a run whose objective is `selector`. Each of its models has a vote.
        prompts: A .txt file of prompts, one a line, or a file of rows with `prompt` and, if they are given, `answers`.
        out: Folder of the run of DPO; beside the run's, with -aligned behind its name, if not given.
        overrides: Settings of that run, such as "local.lr=1e-5"; others are those of the selectors' run.
        writing: How answers are written that are not given.
        console: Where progress and notes go; nowhere if not given.
        anyway: Go on although the base model is not what the run was begun with, and write that down.
        moved: Where the base model is now, if it has moved.

    Returns:
        The run of DPO, as `fedloom.run` gives it.

    Raises:
        ValueError: where the run has no selectors, the prompts cannot be read, or the folder holds something else.
    """
    console, writing = console or Console(quiet=True), writing or Writing()
    folder, prompts = Path(folder), Path(prompts)
    home = Path(out) if out is not None else folder.with_name(f"{folder.resolve().name}-aligned")
    found = read_prompts(prompts)
    opened = open_run(folder, console=console, anyway=anyway, moved=moved).open("align")
    recipe = opened.session.recipe
    if not isinstance(recipe.objective, Selector):
        raise ValueError(
            f"align learns from what selectors prefer, but {folder} learnt another objective: begin a run with objective:"
            " selector, such as the recipe fedbiscuit"
        )
    # Whatever is wrong with the overrides is said before anything is judged.
    asked = aligned_recipe(recipe, home / PAIRS, overrides)
    origin = {
        "run": state_sha256(opened.run),
        "prompts": hashlib.sha256(prompts.read_bytes()).hexdigest(),
        "num_answers": writing.num_answers,
        "temperature": writing.temperature,
        "max_new_tokens": writing.max_new_tokens,
        "seed": writing.seed,
    }
    _begin(home, origin)
    with held(home):
        write_atomic(home / ORIGIN, (json.dumps(origin, indent=2) + "\n").encode())
        models: dict[str, Params] = {
            name: params for name, (params, _) in deliverables(opened.session, opened.run).items()
        }
        for done in judge(opened.session, models, found, writing, home / JUDGED):
            console.print(
                f"judged {done} of {len(found)} prompts by {len(models)} selectors", highlight=False
            )
        kept = _write_pairs(home, judged(home / JUDGED), console)
    if kept < 2:
        raise ValueError(
            f"{kept} of {len(found)} prompts have an answer that is preferred to another, which is too few to learn from:"
            f" give more prompts, or longer answers ({home / JUDGED} has them)"
        )
    del opened
    return experiment.run(asked, home, console=console)


def aligned_recipe(recipe: Recipe, pairs: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe of the run that learns from pairs in one place: model, adapter and training of the selectors' run.

    The server has the whole model: of offsite tuning the same layers learn, around all of the others.
    """
    given: dict[str, Any] = to_tree(recipe)
    data = {
        name: given["data"][name]
        for name in ("prompt", "system", "system_role", "max_length", "truncate", "seed")
    }
    tree = {
        "name": f"{recipe.name}-aligned",
        "model": given["model"],
        "tune": _in_one_place(given["tune"]),
        "local": given["local"],
        "algorithm": ["fedavg"],
        "objective": {"dpo": {"reference": "start" if recipe.tune.virtual_tokens else "base"}},
        "data": {
            **data,
            "source": str(pairs.resolve()),
            "num_clients": 1,
            "fractions": [0.9, 0.0, 0.1],
        },
        "evaluation": {"generate": False, "batch_size": given["evaluation"]["batch_size"]},
        "run": {"rounds": ROUNDS, "seed": given["run"]["seed"], "samples": 0},
    }
    return build_recipe(apply_overrides(tree, overrides))


def _in_one_place(tune: dict[str, Any]) -> dict[str, Any]:
    """Return a section `tune` without what is only of clients: smaller ranks, room for their sums, an emulator."""
    ((kind, fields),) = tune.items()
    if kind == "offsite":
        adapter = _in_one_place(fields["adapter"])
        fields = {**fields, "drop": 0.0, "int8": False, "factors": 0, "adapter": adapter}
    if kind == "lora":
        fields = {name: field for name, field in fields.items() if name not in ("ranks", "side")}
    return {kind: fields}


def _begin(home: Path, origin: dict[str, Any]) -> None:
    """Refuse a folder that holds something else than what this command has begun."""
    if not (home / ORIGIN).exists():
        experiment.new_folder(home.name, home)
        return
    before = read_json(home / ORIGIN, dict, remedy="take another folder with --out")
    if changed := sorted(name for name in origin if before.get(name) != origin[name]):
        raise ValueError(
            f"{home} holds what came of another {' and '.join(changed)}: take another folder with --out"
        )


def _write_pairs(home: Path, found: Sequence[Judged], console: Console) -> int:
    """Write the pairs that DPO learns from, and say how many there are."""
    pairs = [(each.prompt, each.pair) for each in found]
    # As turns, since an answer that a model wrote may look like a conversation.
    rows = [
        {
            "prompt": [{"role": "user", "content": prompt}],
            "chosen": [{"role": "assistant", "content": pair[0]}],
            "rejected": [{"role": "assistant", "content": pair[1]}],
        }
        for prompt, pair in pairs
        if pair
    ]
    write_atomic(home / PAIRS, "".join(json.dumps(row) + "\n" for row in rows).encode())
    console.print(f"{len(rows)} pairs in {home / PAIRS}", highlight=False, markup=False)
    return len(rows)
