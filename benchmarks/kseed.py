"""FedKSeed by distribution and sampling, beside LoRA at equal compute and at equal bytes, several seeds each.

    python benchmarks/kseed.py [--configs gaussian,pro,...] [--seeds 5] [--rounds 6] [--steps 40] [--part 0/2] [--table]

Every run is a recipe through `fedloom.run`, on the bundled model: the same data and cohorts at a seed. A step of a walk is
two forwards and one of gradient descent about three, so LoRA at equal compute takes two thirds of the steps. LoRA at equal
bytes sends a sixteenth of rank 1 as int8, for as many rounds as fit into all bytes of FedKSeed's run, and takes all its
steps in those. A finished run is not repeated; `--part i/n` takes every n-th run; `--table` only writes the table: means
over the seeds with 95 % confidence intervals of the mean (Student's t).
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import torch

from fedloom import experiment
from fedloom.recipe import build_recipe
from fedloom.results.plan import make_plan
from fedloom.rounds.recipe_settings import Recipe
from intervals import interval
from shares import parser_of, share_of
from timing import write_page

COHORT = 3
EQUAL_BYTES, FEW = "lora_equal_bytes", 2
"""Of six rounds of FedKSeed the bytes suffice for two of the thinnest LoRA that learns."""
INT8 = {"download": "int8", "upload": "int8"}
Tree = Mapping[str, Any]


def walk(steps: int, distribution: str = "gaussian", num_seeds: int = 4096, **fields: Any) -> Tree:
    """Return FedKSeed with `steps` steps a client and round."""
    return {
        "algorithm": [{"fedkseed": {"steps": steps, **fields}}],
        "tune": {"seeds": {"num_seeds": num_seeds, "distribution": distribution}},
        "local": {"optimizer": "sgd", "lr": 5e-5, "batch_size": 8},
    }


def lora(steps: int, rank: int, **rest: Any) -> Tree:
    """Return federated averaging of LoRA adapters by gradient descent."""
    return {
        "algorithm": ["fedavg"],
        "tune": {"lora": {"rank": rank, "targets": "all-linear"}},
        "local": {"optimizer": "adamw", "lr": 4e-3, "steps": steps, "batch_size": 8},
        **rest,
    }


def configs(steps: int, rounds: int) -> dict[str, Tree]:
    """Return what is compared, by name; two thirds of the steps is the same number of forwards."""
    thin = {
        "algorithm": [
            {"flasc": {"download": 1 / 16, "upload": 1 / 16}},
            # Of the steps 1 and 3 the longer was better, on a seed of its own.
            {"fedavg": {"server": {"sgd": {"lr": 3.0}}}},
        ],
        "wire": INT8,
    }
    few = round(steps * 2 / 3 * rounds / FEW)
    return {
        "gaussian": walk(steps),
        "rademacher": walk(steps, "rademacher"),
        "popcount": walk(steps, "popcount"),
        "lowrank": walk(steps, "lowrank"),
        "pro": walk(steps, num_seeds=1024, sampling="pro"),
        "lora_equal_compute": lora(round(steps * 2 / 3), 16),
        EQUAL_BYTES: lora(few, 1, **thin),
    }


def rounds_of(name: str, rounds: int) -> int:
    """Return how many rounds a configuration has."""
    return min(FEW, rounds) if name == EQUAL_BYTES else rounds


def recipe_of(name: str, tree: Tree, seed: int, rounds: int) -> Recipe:
    """Return the recipe of one run: the same for all configurations but for what they name."""
    return build_recipe(
        {
            "name": name,
            "data": {
                "num_clients": 10,
                "partition": {"dirichlet": {"by": "task", "alpha": 0.5}},
                "num_examples": 2000,
                "fractions": [0.6, 0.1, 0.3],
                "where": {
                    "task": ["capital", "opposite", "category", "plural", "sequence"],
                    "language": ["en", "de"],
                },
                "max_length": 64,
                "seed": seed,
            },
            "cohort": {"uniform": {"size": COHORT}},
            "evaluation": {"every": 0, "validation": False, "generate": False, "max_examples": 16},
            "run": {
                "rounds": rounds,
                "seed": seed,
                "samples": 0,
                "keep_checkpoints": 1,
            },
            **tree,
        }
    )


def run(recipe: Recipe, folder: Path) -> None:
    """Run one recipe unless its result is there."""
    if (folder / "result.json").exists():
        return
    summary = experiment.run(recipe, folder).summary
    slots = COHORT * summary["rounds"]
    told = {
        "before": summary["before"]["test/loss"],
        "after": summary["final"]["test/loss"],
        "bytes": (summary["upload_bytes"] + summary["download_bytes"]) / slots,
    }
    (folder / "result.json").write_text(json.dumps(told))


def table(folder: Path, names: list[str], seeds: int, rounds: int) -> str:
    """Return the table of all finished runs in Markdown."""
    lines = [
        "| configuration | seeds | test loss before | after | fall | least fall | bytes a client and round | all bytes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        files = [folder / name / str(seed) / "result.json" for seed in range(seeds)]
        runs = [json.loads(file.read_text()) for file in files if file.exists()]
        if runs:
            before, after = ([r[key] for r in runs] for key in ("before", "after"))
            falls = [100 * (1 - b / a) for a, b in zip(before, after, strict=True)]
            spent = sum(r["bytes"] for r in runs) / len(runs)
            means = (*map(interval, (before, after)), f"{interval(falls)} %")
            cells = (name, len(runs), *means, f"{min(falls):.1f} %")
            total = spent * COHORT * rounds_of(name, rounds)
            lines.append(f"| {' | '.join(map(str, cells))} | {spent:,.0f} | {total:,.0f} |")
    return "\n".join(lines)


def one_round() -> int:
    """Return the bytes of a round of all of rank 1 as int8, the thinnest LoRA that leaves nothing out."""
    plan = make_plan(recipe_of("dense", lora(1, 1, wire=INT8), 0, 1))
    return COHORT * (plan.download_bytes + plan.upload_bytes)


def main() -> None:
    """Run what is missing and write the table."""
    parser = parser_of(__doc__, "runs/kseed-benchmark")
    parser.add_argument("--configs", default="")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    trees = configs(arguments.steps, arguments.rounds)
    names = arguments.configs.split(",") if arguments.configs else list(trees)
    folder = arguments.runs / f"{arguments.rounds}x{arguments.steps}"
    share = share_of(arguments)
    # Seed by seed, so that an interrupted benchmark has whole rows of fewer seeds.
    runs = [(name, seed) for seed in range(arguments.seeds) for name in names]
    for name, seed in share.of(runs):
        print(f"{name}, seed {seed}", flush=True)
        rounds = rounds_of(name, arguments.rounds)
        run(recipe_of(name, trees[name], seed, rounds), folder / name / str(seed))
    text = table(folder, names, arguments.seeds, arguments.rounds)
    print(text)
    if share.writes:
        setting = (
            f"{arguments.rounds} rounds of {arguments.steps} steps, 3 of 10 clients, builtin:tiny"
        )
        said = f"One round of all of LoRA's rank 1 as int8 takes {one_round():,} bytes."
        title = f"FedKSeed: {setting}"
        write_page("kseed.md", title, f"{text}\n\n{said}", packages=["torch", "numba"])


if __name__ == "__main__":
    main()
