"""A model for each client, as far its own as its uploads say: beside one model, models for clusters, and other personal ones.

    python benchmarks/personal.py --data FOLDER [--model NAME] [--settings tasks,languages,iid] [--seeds 0,1,2] [--rounds 6]
                                  [--tasks 36] [--arms "Ditto;alone"] [--lr 4e-3] [--part 0/2] [--table]
    python benchmarks/personal.py --settings languages,iid --strengths   Ditto's strength by hand, beside two levels

Settings, from where clients differ most to where nobody does. `tasks`: FOLDER holds tasks of Natural Instructions, a file each,
of which every file is a client (`--tasks` of them, evenly over all kinds); `languages`: ten clients of five languages of
builtin:polyglot, two each; `iid`: ten clients that all have all of them. Everybody takes part in every round and is judged by the
loss on own test rows. Runs of a seed have the same data, so that differences are paired; a finished run is not repeated, nor one that
`kept/personal.json` has.
The table has the mean over clients and the mean of the tenth that is served worst, over the
seeds with 95 % confidence intervals (Student's t), and how far both are from those of three levels, seed by seed; with
`--strengths` from those of two levels.
"""

import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import torch

import fedloom
from fedloom.recipe import build_recipe
from intervals import interval
from shares import parser_of, record, recorded, share_of
from timing import write_page

OURS = "three levels"
POOLED = {"clustered": {"share": {"pool": "on"}}}
ARMS: Mapping[str, Any] = {
    OURS: ["partial_pooling", POOLED, "fedavg"],
    "FedAvg": "fedavg",
    "alone": "local",
    "Ditto": ["ditto", "fedavg"],
    "two levels": ["partial_pooling", "fedavg"],
    "clusters, pooled": [POOLED, "fedavg"],
    # The shipped recipe's, with as many steps a round as Ditto takes.
    "pFedMe": {"pfedme": {"strength": 0.05, "local_rounds": 2, "lr": 10.0}},
    "clusters, apart": [{"clustered": {"share": {"pool": "off"}}}, "fedavg"],
}
"""What is compared, each with its default settings."""
TWO = "two levels"
STRENGTHS: Mapping[str, Any] = {
    TWO: ARMS[TWO],
    **{f"Ditto {x}": [{"ditto": {"strength": x}}, "fedavg"] for x in (0.01, 0.1, 1.0, 10.0)},
}
"""What is compared with `--strengths`; 0.1 is the default."""
SETTINGS = ("tasks", "languages", "iid")
ABOUT = """
Four steps of four examples a client and round, texts of 64 tokens at most (prompts of tasks are cut to that), 12 test rows a
client. Nothing was tuned: methods have their default settings, pFedMe those of its recipe with two local rounds.
"""
Line = Mapping[str, Any]


def files_of(asked: Any) -> list[str]:
    """Return the names of as many tasks as are asked for, evenly over all, which are sorted by kind."""
    names = sorted(path.stem for path in Path(asked.data).glob("*.json"))
    count = min(asked.tasks, len(names))
    return [names[at * len(names) // count] for at in range(count)]


def data_of(setting: str, asked: Any) -> dict[str, Any]:
    """Return what clients hold in a setting."""
    if setting == "tasks":
        return {
            "source": asked.data,
            "where": {"file": files_of(asked)},
            "partition": {"natural": {"by": "file"}},
            "truncate": "prompt",
        }
    apart = {"clusters": {"by": "language"}} if setting == "languages" else "iid"
    return {
        "where": {"language": ["en", "de", "es", "pt", "sv"]},
        "num_examples": 900,
        "num_clients": 10,
        "partition": apart,
    }


def recipe_of(arm: str, setting: str, seed: int, asked: Any) -> Any:
    """Return the recipe of one run: the same for all arms but for the algorithm."""
    tree = {
        "name": arm,
        "algorithm": {**ARMS, **STRENGTHS}[arm],
        "model": {"name": asked.model},
        "data": {
            **data_of(setting, asked),
            "fractions": [0.7, 0, 0.3],
            "max_length": 64,
            "seed": seed,
        },
        "cohort": "full",
        "tune": {"lora": {"rank": 8, "alpha": 16, "targets": "all-linear"}},
        "local": {"optimizer": "adamw", "lr": asked.lr, "steps": 4, "batch_size": 4},
        "evaluation": {"every": 0, "validation": False, "generate": False, "max_examples": 12},
        "run": {"rounds": asked.rounds, "samples": 0, "keep_checkpoints": 1, "seed": seed},
    }
    return build_recipe(tree)


def run(arm: str, setting: str, seed: int, asked: Any, folder: Path) -> None:
    """Run one arm unless its line is there."""
    kept = folder / "line.json"
    if kept.exists():
        return
    began = time.process_time()
    result = fedloom.run(recipe_of(arm, setting, seed, asked), folder)
    lines = [json.loads(text) for text in (folder / "clients.jsonl").read_text().splitlines()]
    last = max(line["round"] for line in lines)
    line = {
        "loss": {
            line["client"]: line["metrics"]["loss"]
            for line in lines
            if line["round"] == last and line["split"] == "test"
        },
        "mu": [x["server/mu"] for x in result.metrics if "server/mu" in x],
        "clusters": [
            x["server/num_clusters"] for x in result.metrics if "server/num_clusters" in x
        ],
        "lambda": [x["server/lambda"] for x in result.metrics if "server/lambda" in x],
        "upload_bytes": result.summary["upload_bytes"],
        "download_bytes": result.summary["download_bytes"],
        "seconds": time.process_time() - began,
    }
    kept.write_text(json.dumps(line))


def ends(line: Line) -> tuple[float, float]:
    """Return the mean over clients, and that of the tenth with the largest loss."""
    losses = sorted(line["loss"].values(), reverse=True)
    worst = losses[: max(1, round(len(losses) / 10))]
    return statistics.fmean(losses), statistics.fmean(worst)


def table(found: Mapping[str, Mapping[int, Line]], ours: str) -> str:
    """Return the table of what has ended, a row an arm, beside the one called `ours`."""
    base = found.get(ours, {})
    columns = (
        "",
        "seeds",
        "mean loss",
        "worst tenth",
        f"{ours} minus it, mean",
        "worst tenth",
    )
    lines = [f"| {' | '.join((*columns, 'MB, both ways', 'CPU s'))} |", "|---|" + "---:|" * 7]
    for arm, runs in found.items():
        both = {seed: ends(line) for seed, line in runs.items()}
        cells = [interval(column) for column in zip(*both.values(), strict=True)]
        apart = [
            [mine - theirs for mine, theirs in zip(ends(base[seed]), them, strict=True)]
            for seed, them in both.items()
            if seed in base and arm != ours
        ]
        cells += [interval(column) for column in zip(*apart, strict=True)] or ["", ""]
        sent = [(x["upload_bytes"] + x["download_bytes"]) / 1e6 for x in runs.values()]
        spent = [x["seconds"] for x in runs.values()]
        cells += [f"{statistics.fmean(sent):,.1f}", f"{statistics.fmean(spent):,.0f}"]
        lines.append(f"| {arm} | {len(runs)} | {' | '.join(cells)} |")
    said = [
        f"{arm}, seed {seed}, by round: mu {_course(line['mu'])}"
        + (f"; lambda {_course(line['lambda'])}" if line["lambda"] else "")
        + (
            f"; clusters {', '.join(f'{n:.0f}' for n in line['clusters'])}"
            if line["clusters"]
            else ""
        )
        for arm, runs in found.items()
        for seed, line in runs.items()
        if line["mu"]
    ]
    return "\n".join(lines) + "\n\n" + ".\n".join(said) + "."


def _course(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)


def main() -> None:
    """Run what is missing and write the table."""
    parser = parser_of(__doc__, "runs/personal-benchmark")
    parser.add_argument("--data", default="natural_instructions/clients", help="a folder")
    parser.add_argument("--model", default="builtin:tiny", help="what model.name takes")
    parser.add_argument("--lr", type=float, default=4e-3, help="of local training")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--settings", default=",".join(SETTINGS))
    parser.add_argument("--tasks", type=int, default=36, help="how many clients, a task each")
    parser.add_argument("--arms", help="of these alone, with ; between")
    parser.add_argument("--strengths", action="store_true", help="Ditto's instead, by hand")
    asked = parser.parse_args()
    compared, ours = (STRENGTHS, TWO) if asked.strengths else (ARMS, OURS)
    torch.set_num_threads(1)
    seeds = [int(seed) for seed in asked.seeds.split(",")]
    arms = asked.arms.split(";") if asked.arms else list(compared)
    settings = asked.settings.split(",")
    share = share_of(asked)
    known = ended(asked.runs)
    # Seed by seed, so that an interrupted benchmark has whole rows of fewer seeds.
    runs = [(a, s, seed) for seed in seeds for s in settings for a in arms]
    for run_of in share.of([one for one in runs if key_of(*one, asked) not in known]):
        print(", ".join(map(str, run_of)), flush=True)
        run(*run_of, asked, asked.runs / key_of(*run_of, asked))
    known = ended(asked.runs)
    found: dict[str, dict[str, dict[int, Line]]] = {}
    for arm, setting, seed in ((a, s, seed) for s in SETTINGS for a in compared for seed in seeds):
        line = known.get(key_of(arm, setting, seed, asked))
        if line is not None:
            found.setdefault(setting, {}).setdefault(arm, {})[seed] = line
    text = "\n\n".join(f"## {setting}\n\n{table(runs, ours)}" for setting, runs in found.items())
    print(text)
    if share.writes:
        record("personal", known)
        model = Path(asked.model).stem
        kind = "_strength" if asked.strengths else ""
        of = "" if asked.model.startswith("builtin:") else f"_{model}"
        name = f"personal{kind}{of}.md"
        title = f"A model for each client, {model}, {asked.rounds} rounds"
        title += ": Ditto's strength" if asked.strengths else f", tasks: {asked.tasks}"
        write_page(name, title, f"{ABOUT.strip()}\n\n{text}")


def key_of(arm: str, setting: str, seed: int, asked: Any) -> str:
    """Return what a run is called in the record, and where it is kept below `--runs`."""
    model = Path(asked.model).stem.replace(":", "-")
    named = f"{setting}-{asked.tasks}" if setting == "tasks" else setting
    return f"{model}-{asked.rounds}/{named}/{arm}/{seed}"


def ended(folder: Path) -> dict[str, Line]:
    """Return the lines of all runs that have ended: of earlier ones by the record, and of those in a folder."""
    found: dict[str, Line] = dict(recorded("personal"))
    for kept in folder.glob("*/*/*/*/line.json"):
        found["/".join(kept.parts[-5:-1])] = json.loads(kept.read_text())
    return found


if __name__ == "__main__":
    main()
