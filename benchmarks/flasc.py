"""Quality against bytes: FLASC, dense LoRA and the sparse baselines, several seeds each.

    python benchmarks/flasc.py [--configs dense_r16,flasc_4,...] [--seeds 5] [--rounds 24] [--part 0/2] [--table]

Every run is a recipe through `fedloom.run`, on the bundled model: the same data, cohorts and local training at a seed,
so that differences are paired. A finished run is not repeated; `--part i/n` takes every n-th run, so that n processes
share the work; `--table` only writes the table. `--data FILE` takes a real set (any source a recipe takes) in the place
of polyglot. The table holds means over the seeds with 95 % confidence intervals of the mean (Student's t).
"""

import argparse
import dataclasses
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import torch

from fedloom import experiment
from fedloom.evaluation.measure import combine
from fedloom.recipe import build_recipe
from fedloom.rounds.loop import measure
from fedloom.rounds.recipe_settings import Recipe
from fedloom.rounds.restore import last_run
from fedloom.rounds.session import build
from fedloom.tracking.metrics_log import MetricsLog
from intervals import interval
from shares import parser_of, share_of
from timing import write_page

TARGET = 1.1
"""The fixed quality: this times the loss that dense LoRA of rank 16 ends with, the mean over its seeds."""
RIVALS = ("flasc_r2_small", "dense_r1_int8", "flasc_r4_small", "dense_r1")
"""Whose whole spending all are compared at: what each had learnt when as many bytes were sent."""

INT8 = {"wire": {"download": "int8", "upload": "int8"}}
ZERO = {"tune": {"lora": {"origin": "zero"}}}
Tree = Mapping[str, Any]


def server(name: str, lr: float) -> Tree:
    """Return the layer that trains: the uniform mean, and a step of the server's optimizer."""
    return {"fedavg": {"server": {name: {"lr": lr}}, "weighting": "uniform"}}


def dense(lr: float = 1.0) -> list[Tree]:
    """Return FedAvg; of the steps 1 and 2 the first was better, and than FedAdam's at 5e-3, 1e-2 and 2e-2."""
    return [server("sgd", lr)]


def flasc(down: float, up: float, lr: float, **fields: Any) -> list[Tree]:
    """Return FedAvg between sparse links: the thinner the uploads, the longer the server's step."""
    return [{"flasc": {"download": down, "upload": up, **fields}}, server("sgd", lr)]


def prune(regrow: bool = False, **density: float) -> list[Tree]:
    """Return FedAvg inside a mask; of the steps 1 and 2 the second was better."""
    return [{"prune": {"density": density, "regrow": regrow}}, *dense(2.0)]


ADAPTER, LTH = {"start": 0.25, "warm": 1}, {"start": 1.0, "decay": 0.8, "every": 2, "least": 0.0625}

# alpha stays 16 at every rank: at rank 1 it was better than 1.
CONFIGS: dict[str, Tree] = {
    "dense_r16": {"algorithm": dense()},
    "dense_r1": {"algorithm": dense(), "tune": {"lora": {"rank": 1}}},
    "flasc_4": {"algorithm": flasc(1 / 4, 1 / 4, 3.0)},
    "flasc_small": {"algorithm": flasc(1 / 4, 1 / 4, 3.0), **INT8},
    "flasc_r4_small": {
        "algorithm": flasc(1 / 4, 1 / 4, 3.0),
        "tune": {"lora": {"rank": 4}},
        **INT8,
    },
    "flasc_r2_small": {
        "algorithm": flasc(1 / 4, 1 / 4, 3.0),
        "tune": {"lora": {"rank": 2}},
        **INT8,
    },
    "dense_r4_int8": {"algorithm": dense(), "tune": {"lora": {"rank": 4}}, **INT8},
    "dense_r1_int8": {"algorithm": dense(), "tune": {"lora": {"rank": 1}}, **INT8},
    "flasc_16": {"algorithm": flasc(1 / 16, 1 / 16, 20.0)},
    "flasc_16_magnitude": {"algorithm": flasc(1 / 16, 1 / 16, 10.0), **ZERO},
    "flasc_64": {"algorithm": flasc(1 / 64, 1 / 64, 20.0)},
    "flasc_64_magnitude": {"algorithm": flasc(1 / 64, 1 / 64, 20.0), **ZERO},
    "sparse_adapter": {"algorithm": prune(**ADAPTER)},
    "adapter_lth": {"algorithm": prune(**LTH)},
    "federated_select": {"algorithm": prune(regrow=True, **ADAPTER)},
    # On demand.
    "dense_r4": {"algorithm": dense(), "tune": {"lora": {"rank": 4}}},
    "dense_r16_int8": {"algorithm": dense(), **INT8},
    "dense_r16_adam": {"algorithm": [server("adam", 1e-2)]},
    "ffa_r16": {"algorithm": [{"freeze": {"names": ["lora_A"]}}, *dense()]},
    "flasc_4_adam": {"algorithm": [*flasc(1 / 4, 1 / 4, 1.0)[:1], server("adam", 2e-2)]},
    "flasc_4_paper": {"algorithm": [*flasc(1 / 4, 1 / 4, 1.0)[:1], server("adamw", 5e-3)], **ZERO},
    "flasc_4_16_int8": {"algorithm": flasc(1 / 4, 1 / 16, 5.0), **INT8},
    "flasc_8_16_int8": {"algorithm": flasc(1 / 8, 1 / 16, 5.0), **INT8},
    "flasc_8_16_feedback": {"algorithm": flasc(1 / 8, 1 / 16, 2.0, error_feedback=True), **INT8},
    "flasc_small_magnitude": {"algorithm": flasc(1 / 4, 1 / 4, 3.0), **INT8, **ZERO},
    "sparse_adapter_magnitude": {"algorithm": prune(**ADAPTER), **ZERO},
    "adapter_lth_magnitude": {"algorithm": prune(**LTH), **ZERO},
    "federated_select_magnitude": {"algorithm": prune(regrow=True, **ADAPTER), **ZERO},
}
DEFAULT = list(CONFIGS)[: list(CONFIGS).index("dense_r16_int8")]


def recipe_of(name: str, seed: int, arguments: argparse.Namespace) -> Recipe:
    """Return the recipe of one run: the same for all configurations but for what they name."""
    data: dict[str, Any] = {
        "num_clients": 10,
        "partition": {"dirichlet": {"by": "task", "alpha": 0.5}},
        "num_examples": 2000,
        "fractions": [0.6, 0.1, 0.3],
        "seed": seed,
    }
    if arguments.data:
        data |= {"source": arguments.data, "partition": "iid", "max_length": 128}
        data |= {"num_examples": 800, "fractions": [0.7, 0.1, 0.2]}
    else:
        data["where"] = {"task": ["capital", "opposite", "category", "plural", "sequence"]}
        data["where"]["language"] = ["en", "de"]
        data["max_length"] = 64
    tree = {
        "name": name,
        "data": data,
        "cohort": {"uniform": {"size": 5}},
        "local": {"optimizer": "adamw", "lr": 4e-3, "steps": 4, "batch_size": 8},
        "evaluation": {"every": 4, "validation": False, "generate": False, "max_new_tokens": 8},
        "run": {"rounds": arguments.rounds, "seed": seed, "samples": 0, "keep_checkpoints": 1},
        **CONFIGS[name],
    }
    lora = CONFIGS[name].get("tune", {}).get("lora", {})
    tree["tune"] = {"lora": {"rank": 16, "targets": "all-linear", **lora}}
    return build_recipe(tree)


def run(recipe: Recipe, folder: Path) -> None:
    """Run one recipe unless its result is there; answers are generated once, at the end."""
    result = folder / "result.json"
    if result.exists():
        return
    summary = experiment.run(recipe, folder).summary
    asking = dataclasses.replace(recipe.evaluation, generate=True)
    session = build(dataclasses.replace(recipe, evaluation=asking), folder)
    measured, _ = measure(
        last_run(session),
        recipe.algorithm,
        session.engine,
        kind="test",
        population=session.engine.population(),
        clients=[c for c in session.judges if session.federation.shards[c].test],
    )
    final = combine(measured.values())
    history = MetricsLog.read(folder / "metrics.jsonl")
    spent, curve = 0.0, []
    for line in history.lines:
        spent += line.get("comm/upload_bytes", 0.0) + line.get("comm/download_bytes", 0.0)
        if "test/loss" in line:
            curve.append((line["round"], spent, line["test/loss"]))
    told = {
        "exact_match": final["exact_match"],
        "loss": final["loss"],
        "upload_bytes": summary["upload_bytes"],
        "download_bytes": summary["download_bytes"],
        "curve": curve,
    }
    result.write_text(json.dumps(told))


def reached(curve: Sequence[Sequence[float]], target: float) -> tuple[float, float] | None:
    """Return (round, bytes) of the first evaluation at or below the target loss."""
    return next(((at, spent) for at, spent, loss in curve if loss <= target), None)


def at_bytes(curve: Sequence[Sequence[float]], spent: float) -> float | None:
    """Return the test loss when `spent` bytes had been sent, between two evaluations by proportion.

    Seeds differ by a percent or two in what they spend; that much beyond the end still counts as the end.
    """
    for (_, before, worse), (_, after, better) in pairwise(curve):
        if before <= spent <= after:
            return worse + (better - worse) * (spent - before) / (after - before)
    *_, (_, end, last) = curve
    return last if end < spent <= 1.02 * end else None


def table(folder: Path, configs: Sequence[str], seeds: int) -> str:
    """Return the table of all finished runs in Markdown."""
    found = {
        name: {
            seed: json.loads(file.read_text())
            for seed in range(seeds)
            if (file := folder / name / str(seed) / "result.json").exists()
        }
        for name in configs
    }
    base = found.get("dense_r16", {})
    targets = [1.0, TARGET * statistics.fmean(r["loss"] for r in base.values())] if base else [1.0]
    rivals = [name for name in RIVALS if found.get(name)]
    budgets = [statistics.fmean(map(_spent, found[name].values())) for name in rivals]
    columns = (
        *("configuration", "seeds", "exact match", "minus dense", "test loss"),
        *("MB up", "MB down", "fewer bytes"),
        *(
            f"loss at {budget / 1e6:.2f} MB (all of {n})"
            for n, budget in zip(rivals, budgets, strict=True)
        ),
        *(f"rounds and MB to loss {target:.3f}" for target in targets),
    )
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    whole = [_spent(r) for r in base.values()]
    for name, runs in found.items():
        if not runs:
            continue
        results = list(runs.values())
        paired = [r["exact_match"] - base[s]["exact_match"] for s, r in runs.items() if s in base]
        up, down = (
            statistics.fmean(r[f"{way}_bytes"] for r in results) / 1e6
            for way in ("upload", "download")
        )
        then = [[at_bytes(r["curve"], budget) for r in results] for budget in budgets]
        cells = (
            *(name, str(len(results)), interval([r["exact_match"] for r in results])),
            interval(paired) if paired else "",
            *(interval([r["loss"] for r in results]), f"{up:.2f}", f"{down:.2f}"),
            f"{statistics.fmean(whole) / 1e6 / (up + down):.1f}x" if whole else "",
            *(
                interval([x for x in losses if x is not None]) if all(losses) else ""
                for losses in then
            ),
            *(_to(target, results) for target in targets),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _spent(result: Mapping[str, float]) -> float:
    return result["upload_bytes"] + result["download_bytes"]


def _to(target: float, results: Sequence[Mapping[str, Any]]) -> str:
    there = [at for r in results if (at := reached(r["curve"], target))]
    if len(there) < len(results):
        return f"reached by {len(there)} of {len(results)}"
    rounds, spent = (statistics.fmean(column) for column in zip(*there, strict=True))
    return f"{rounds:.0f}, {spent / 1e6:.2f} MB"


def main() -> None:
    """Run what is missing and write the table."""
    parser = parser_of(__doc__, "runs/flasc-benchmark")
    parser.add_argument("--configs", default=",".join(DEFAULT))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--data", help="a file, folder or Hub id in the place of polyglot")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    configs = arguments.configs.split(",")
    source = Path(arguments.data or "polyglot").with_suffix("")
    set_name = "_".join(source.parts[-2:])
    folder = arguments.runs / f"{set_name}-{arguments.rounds}"
    share = share_of(arguments)
    # Seed by seed, so that an interrupted benchmark has whole rows of fewer seeds.
    runs = [(name, seed) for seed in range(arguments.seeds) for name in configs]
    for name, seed in share.of(runs):
        print(f"{name}, seed {seed}", flush=True)
        run(recipe_of(name, seed, arguments), folder / name / str(seed))
    text = table(folder, configs, arguments.seeds)
    print(text)
    if share.writes:
        page = "flasc.md" if not arguments.data else f"flasc_{set_name}.md"
        setting = (
            f"{set_name}, {arguments.rounds} rounds, 5 of 10 clients, LoRA r16 on builtin:tiny"
        )
        write_page(page, f"FLASC: {setting}", text)


if __name__ == "__main__":
    main()
