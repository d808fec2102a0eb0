"""Tables of whole runs on real models: arms that differ in a few settings, the same seeds for all, what they cost.

A run that was finished is kept, so that a table that was stopped goes on, and what it came to is in `kept`, so that it
goes on elsewhere; `--part i/n` takes every n-th run, so that n processes share the work; `--table` only writes the table, of
whatever there is.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
sys.path.append(str(Path(__file__).parents[1]))  # where the other benchmarks keep what they share

import torch

import fedloom
from fedloom.recipe import build_recipe
from shares import parser_of, record, recorded, share_of
from timing import write_page

Tree = Mapping[str, Any]
Line = Mapping[str, Any]
"""What is kept of a run."""
Lines = Mapping[str, Mapping[int, Line]]
"""By arm, by seed."""

MODELS = Path("~/.cache/fedloom/models").expanduser()
"""Where `make models` puts them."""


def with_seed(tree: Tree, seed: int) -> dict[str, Any]:
    """Return a recipe with a seed for its data and its draws."""
    return {
        **tree,
        "data": {**tree["data"], "seed": seed},
        "run": {**tree["run"], "seed": seed},
    }


def run_arm(name: str, tree: Tree, folder: Path) -> Line:
    """Return what a run came to, from its folder where it is finished."""
    kept = folder / "line.json"
    if not kept.exists():
        began = time.process_time()
        result = fedloom.run(build_recipe({"name": name, **tree}), folder)
        curve = [
            {key: line[key] for key in line if key == "round" or key.startswith("test/")}
            for line in result.metrics
            if "test/loss" in line
        ]
        summary = result.summary
        server = [
            {key: value for key, value in line.items() if key.startswith("server/")}
            for line in result.metrics
        ]
        ended = max((record["round"] for record in result.clients), default=0)
        by_client = {
            record["client"]: {k: v for k, v in record.items() if isinstance(v, float)}
            for record in result.clients
            if record["round"] == ended and record["split"] == "test"
        }
        by_label = folder / "by_label.json"
        line = {
            "curve": curve,
            "by_client": by_client,
            "models": json.loads(by_label.read_text())["models"] if by_label.exists() else [],
            "server": server,
            "baselines": {
                name: {k: v for k, v in other.summary["final"].items() if k.startswith("test/")}
                for name, other in result.baselines.items()
            },
            "disclosed": summary.get("disclosed", 1.0),
            "upload_bytes": summary.get("upload_bytes", 0),
            "download_bytes": summary.get("download_bytes", 0),
            "seconds": time.process_time() - began,
        }
        kept.write_text(json.dumps(line))
    found: Line = json.loads(kept.read_text())
    return found


def main(
    table: str,
    title: str,
    arms: Callable[[str, str], Mapping[str, Tree]],
    page: Callable[[Lines], str],
    *,
    model: str,
    data: str,
    doc: str,
) -> None:
    """Make a table: run what is missing, and write `results/real_TABLE.md`.

    Args:
        table: Its name.
        title: Of the page.
        arms: A recipe each, of data and model.
        page: What is written about the runs that there are.
        model: What `model.name` is where nobody says.
        data: What `data.source` is where nobody says.
        doc: Of the script.
    """
    parser = parser_of(doc, "runs/real")
    parser.add_argument("--data", default=data, help="a file or folder")
    parser.add_argument("--model", default=model, help="what model.name takes")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--arms", help="of these alone, with ; between")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    recipes = arms(asked.data, asked.model)
    names = asked.arms.split(";") if asked.arms else list(recipes)
    seeds = [int(seed) for seed in asked.seeds.split(",")]
    # Seed by seed, so that a table that was stopped has whole rows of fewer seeds.
    todo = [(arm, seed) for seed in seeds for arm in names]
    share = share_of(asked)
    folder = asked.runs / table
    known = ended(table, folder)
    for arm, seed in share.of(
        [(a, s) for a, s in todo if key_of(a.replace("/", "-"), s) not in known]
    ):
        print(f"{arm}, seed {seed}", flush=True)
        run_arm(arm, with_seed(recipes[arm], seed), place(folder, arm, seed))
    if share.writes:
        known = ended(table, folder)
        record(f"real_{table}", known)
        text = page(chosen(known, todo))
        print(text)
        write_page(
            f"real_{table}.md", title, text, packages=("torch", "transformers", "peft", "fedloom")
        )


def place(folder: Path, arm: str, seed: int) -> Path:
    """Return the folder of a run."""
    return folder / arm.replace("/", "-") / str(seed)


def key_of(arm: str, seed: int) -> str:
    """Return what a run is called in the record."""
    return f"{arm}, seed {seed}"


def ended(table: str, folder: Path) -> dict[str, Line]:
    """Return the lines of all runs that have ended: of earlier ones by the record, and of those in a folder."""
    found: dict[str, Line] = dict(recorded(f"real_{table}"))
    for kept in folder.glob("*/*/line.json"):
        line = json.loads(kept.read_text())
        # Of the curve its ends are read.
        found[key_of(kept.parts[-3], int(kept.parts[-2]))] = {
            **line,
            "curve": [line["curve"][0], line["curve"][-1]],
        }
    return found


def chosen(known: Mapping[str, Line], wanted: Sequence[tuple[str, int]]) -> Lines:
    """Return the lines of the runs that are asked for and have ended."""
    found: dict[str, dict[int, Line]] = {}
    for arm, seed in wanted:
        line = known.get(key_of(arm.replace("/", "-"), seed))
        if line is not None:
            found.setdefault(arm, {})[seed] = line
    return found


def last(line: Line, metric: str = "loss") -> float:
    """Return a test metric at the end of a run."""
    return float(line["curve"][-1][f"test/{metric}"])


def first(line: Line, metric: str = "loss") -> float:
    """Return it before training."""
    return float(line["curve"][0][f"test/{metric}"])


def beside(runs: Mapping[int, Line], base: Mapping[int, Line], metric: str = "loss") -> list[float]:
    """Return by how many percent a metric at the end differs from that of other runs, seed by seed."""
    return [
        100 * (last(runs[seed], metric) / last(base[seed], metric) - 1)
        for seed in sorted(runs.keys() & base.keys())
    ]


def grid(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown, its first column of words."""
    lines = [f"| {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
