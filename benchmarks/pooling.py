"""Do pooled clusters lose to nothing? Beside one model for all and a model for each cluster, where either should win.

    python benchmarks/pooling.py [--settings conflict,turnout,adam,own,mixed,iid] [--seeds 5] [--rounds 10]
                                 [--modes fedavg,apart,fixed,pooled] [--part 0/2] [--table]

Ten clients of five languages on the bundled model. `conflict`: everybody asks in English and wants answers in the own
language; `turnout`: four of the ten a round; `adam`: the server steps by Adam; `own`: questions are in the own language too;
`mixed`: a fifth of each client's examples are of any language; `iid`: everybody has all languages, and clusters are drawn by
chance. Modes: one model for all (`fedavg`), a model for each cluster found (`apart`), the same mixed with three quarters of
the model for all (`fixed`), and pooled (`pooled`); `oracle` and `pooled oracle` are told the languages. Of `iid`, where nobody
should be apart, clusters are drawn by chance in all modes. Runs of a seed have the same data and local training, so that differences are paired. A
finished run is not repeated, nor one that `kept/pooling.json` has; `--part i/n` takes every n-th run; `--table` only writes the table: means over the seeds with
95 % confidence intervals (Student's t).
"""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import json

import torch

from fedloom.core.metrics import METRICS as TABLE
from fedloom.recipe import build_recipe
from fedloom.rounds.recipe_settings import Recipe
from intervals import interval
from languages import SPOKEN, TASKS, run, write_conflict
from shares import parser_of, record, recorded, share_of
from timing import write_page

SETTINGS = ("conflict", "turnout", "adam", "own", "mixed", "iid")
MODES = ("fedavg", "apart", "fixed", "oracle", "pooled", "pooled oracle")
METRICS = ("loss", "exact_match")
ESTIMATES = {"server/lambda": "lambda", "server/lasting": "rho", "server/gain": "gain"}
LABELS = {"mixed": "group", "iid": ""}
"""What clients are told apart by, where not by language."""


def algorithm_of(mode: str, setting: str, seed: int) -> Any:
    """Return the layers of a mode."""
    inner = {"fedavg": {"server": {"adam": {"lr": 4e-3}}}} if setting == "adam" else "fedavg"
    if mode == "fedavg":
        return [inner]
    label = LABELS.get(setting, "language")
    kinds: dict[str, Any] = {"oracle": {"given": {"by": label}}}
    grouped = kinds.get(mode.removeprefix("pooled "), "auto")
    if setting == "iid":
        grouped = {"random": {"num_clusters": len(SPOKEN), "seed": seed}}
    shares: dict[str, Any] = {"fixed": {"mix": 0.75}}
    pooled = {"pool": "on" if mode.startswith("pooled") else "off"}
    share = shares.get(mode, pooled)
    return [{"clustered": {"mode": grouped, "share": share, "label": label}}, inner]


def recipe_of(mode: str, setting: str, seed: int, arguments: argparse.Namespace) -> Recipe:
    """Return the recipe of one run: the same for all modes but for the algorithm."""
    data: dict[str, Any] = {"num_clients": 2 * len(SPOKEN), "seed": seed, "max_length": 48}
    data |= {"fractions": [0.5, 0.0, 0.5]}
    if setting in ("conflict", "turnout", "adam"):
        file = arguments.runs / f"conflict-{seed}.jsonl"
        if not file.exists():
            write_conflict(file, 180, seed)
        data |= {"source": str(file), "partition": {"clusters": {"by": "language"}}}
    else:
        share = {"mixed": {"share": 0.8}}.get(setting, {})
        apart: dict[str, Any] = {"clusters": {"by": "language", **share}}
        data |= {"where": {"language": list(SPOKEN), "task": list(TASKS)}, "num_examples": 900}
        data |= {"max_length": 64, "partition": "iid" if setting == "iid" else apart}
    return build_recipe(
        {
            "name": f"{setting} {mode}",
            "algorithm": algorithm_of(mode, setting, seed),
            "cohort": {"uniform": {"size": 4}} if setting == "turnout" else "full",
            "data": data,
            "tune": {"lora": {"rank": 16, "alpha": 32, "targets": "all-linear"}},
            "local": {"optimizer": "adamw", "lr": 4e-3, "steps": 10, "batch_size": 8},
            "evaluation": {
                "every": 0,
                "validation": False,
                "generate": False,
                "max_new_tokens": 12,
            },
            "run": {"rounds": arguments.rounds, "seed": seed, "samples": 0, "keep_checkpoints": 1},
        }
    )


def table(ends: Mapping[str, Any], seeds: int) -> str:
    """Return the tables of all finished runs in Markdown, also those of earlier calls, a row a mode."""
    parts = []
    for setting in SETTINGS:
        found = {
            mode: {
                seed: ends[key]
                for seed in range(seeds)
                if (key := f"{setting}/{mode}/{seed}") in ends
            }
            for mode in MODES
        }
        columns = ["", "seeds"]
        for metric in METRICS:
            name = TABLE.entry(metric).title or metric
            columns += [name, f"{name}, worst", f"pooled minus it, {name}"]
        lines = [f"| {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) - 1)}"]
        for mode, results in found.items():
            if results:
                cells = [
                    cell for metric in METRICS for cell in _cells(results, found["pooled"], metric)
                ]
                lines.append(f"| {mode} | {len(results)} | {' | '.join(cells)} |")
        if len(lines) > 2:
            parts.append(f"## {setting}\n\n" + "\n".join(lines))
            parts += _estimates(found["pooled"])
    return "\n\n".join(parts)


def _estimates(pooled: Mapping[int, Any]) -> list[str]:
    """Return what pooling estimated in the last round, over the seeds."""
    told = [result["server"] for result in pooled.values() if "server" in result]
    shown = []
    for name, title in ESTIMATES.items():
        values = [each[name] for each in told if name in each]
        if values:
            shown.append(f"{title} {min(values):.3f} to {max(values):.3f}")
    return [f"Pooled, in the last round of {len(told)} seeds: {', '.join(shown)}."] if shown else []


def _cells(results: Mapping[int, Any], pooled: Mapping[int, Any], metric: str) -> list[str]:
    """Return mean and worst language, and how far the pooled run of the same seed is from the mean."""
    ends = {seed: result[metric] for seed, result in results.items()}
    cells = [interval(column) for column in zip(*ends.values(), strict=True)]
    apart = [pooled[s][metric][0] - mean for s, (mean, _) in ends.items() if s in pooled]
    return [*cells, interval(apart) if apart and results is not pooled else ""]


def ended(folder: Path) -> dict[str, Any]:
    """Return the mean and the worst language of each run, by setting/mode/seed: of earlier ones, and of those in a folder."""
    found = recorded("pooling")
    for file in folder.glob("*/*/*/result.json"):
        languages = json.loads(file.read_text())["languages"].values()
        values = {metric: [one[metric] for one in languages] for metric in METRICS}
        found["/".join(file.parts[-4:-1])] = {
            metric: [sum(each) / len(each), max(each, key=TABLE.of(metric).cost)]
            for metric, each in values.items()
        }
        *_, last = (file.parent / "metrics.jsonl").read_text().splitlines()
        server = {name: value for name, value in json.loads(last).items() if name in ESTIMATES}
        if server:
            found["/".join(file.parts[-4:-1])]["server"] = server
    return found


def main() -> None:
    """Run what is missing and write the table."""
    parser = parser_of(__doc__, "runs/pooling-benchmark")
    parser.add_argument("--settings", default=",".join(SETTINGS))
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    share = share_of(arguments)
    settings, modes = arguments.settings.split(","), arguments.modes.split(",")
    # Seed by seed, so that an interrupted benchmark has whole rows of fewer seeds.
    runs = [(s, m, seed) for seed in range(arguments.seeds) for s in settings for m in modes]
    # By chance is by chance: in `iid` nobody is told anything, and a fixed weight is for clusters that were found.
    runs = [(s, m, seed) for s, m, seed in runs if s != "iid" or m in ("fedavg", "apart", "pooled")]
    folder = arguments.runs / f"rounds-{arguments.rounds}"
    known = ended(folder)
    for setting, mode, seed in share.of([r for r in runs if "/".join(map(str, r)) not in known]):
        print(f"{setting}, {mode}, seed {seed}", flush=True)
        recipe = recipe_of(mode, setting, seed, arguments)
        run(recipe, LABELS.get(setting, "language"), folder / setting / mode / str(seed))
    known = ended(folder)
    text = table(known, arguments.seeds)
    print(text)
    if share.writes:
        record("pooling", known)
        title = f"Pooled clusters beside one model and a model for each, {arguments.rounds} rounds"
        write_page("pooling.md", title, text)


if __name__ == "__main__":
    main()
