"""FedKSeed beside LoRA and full FedAvg on tasks that no client has: loss and ROUGE-L against bytes and compute.

    python benchmarks/real/kseed.py --data FOLDER [--model FILE] [--seeds 0,1,2] [--part 0/2] [--table]

FOLDER holds tasks of Natural Instructions, a file each: `clients`, of which every file is a client, and `unseen`, whose
tasks are judged on and never learnt. Three clients in a round. A first-order arm takes five steps a client and round, a
zeroth-order one fifteen, which is twice the compute. The zeroth-order learning rate lowered the loss on a seed that is not in the
table; no other was tried.
"""

import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runs import MODELS, Lines, Tree, beside, first, grid, last, main

from intervals import interval

BASE = "FedAvg, LoRA r8"
ROUNDS = 4
ZEROTH = {"optimizer": "sgd", "lr": 2e-5, "batch_size": 4}


def together(folder: Path) -> str:
    """Return a folder with the tasks of both kinds; the unseen are named so."""
    both = Path(tempfile.mkdtemp(prefix="fedloom-tasks-"))
    for kind, mark in (("clients", ""), ("unseen", "unseen_")):
        for file in sorted((folder / kind).glob("*.json")):
            (both / f"{mark}{file.name}").symlink_to(file.resolve())
    return str(both)


def arm(source: str, unseen: list[str], model: str, **more: Any) -> Tree:
    """Return a recipe."""
    return {
        "model": {"name": model},
        "data": {
            "source": source,
            "partition": {"natural": {"by": "file"}},
            "held_out": {"file": unseen},
            "held_out_sample": {"share": 0.2},
            "fractions": [1, 0, 0],
            "shorter": {"input": 400},
            "max_length": 128,
            "truncate": "prompt",
        },
        "cohort": {"uniform": {"size": 3}},
        "evaluation": {
            "every": 0,
            "validation": False,
            "max_new_tokens": 24,
            "metrics": ["rouge_l_paper"],
        },
        "run": {"rounds": ROUNDS, "samples": 0, "keep_checkpoints": 1},
        **more,
    }


def arms(folder: str, model: str) -> Mapping[str, Tree]:
    """Return the rows of the table."""
    source = together(Path(folder))
    unseen = sorted(path.stem for path in Path(source).glob("unseen_*"))

    def seeds(**fields: Any) -> dict[str, Any]:
        return {"tune": {"seeds": {"num_seeds": 1024, **fields}}, "local": ZEROTH}

    def kseed(**fields: Any) -> dict[str, Any]:
        return {"fedkseed": {"steps": 15, **fields}}

    of = {
        BASE: {
            "algorithm": "fedavg",
            "tune": {"lora": {"rank": 8, "alpha": 16, "targets": "all-linear"}},
            "local": {"optimizer": "adamw", "lr": 5e-4, "steps": 5, "batch_size": 4},
        },
        "FedAvg, all weights": {
            "algorithm": "fedavg",
            "tune": "full",
            "local": {"optimizer": "adamw", "lr": 1e-5, "steps": 5, "batch_size": 4},
        },
        "FedKSeed": {"algorithm": kseed(), **seeds(distribution="rademacher")},
        "FedKSeed-Pro": {"algorithm": kseed(sampling="pro"), **seeds(distribution="rademacher")},
        "FedKSeed, low-rank": {"algorithm": kseed(), **seeds(distribution="lowrank")},
    }
    return {name: arm(source, unseen, model, **more) for name, more in of.items()}


def page(lines: Lines) -> str:
    """Return the table."""
    base = lines.get(BASE, {})
    rows = []
    for name, runs in lines.items():
        told = list(runs.values())
        spent = [x["upload_bytes"] + x["download_bytes"] for x in told]
        rows.append(
            (
                name,
                str(len(told)),
                f"{statistics.fmean(map(first, told)):.3f}",
                interval([last(x) for x in told]),
                "" if name == BASE else f"{interval(beside(runs, base), 1)} %",
                f"{statistics.fmean(first(x, 'rouge_l_paper') for x in told):.3f}",
                interval([last(x, "rouge_l_paper") for x in told]),
                f"{statistics.fmean(spent) / 1e6:,.3f}",
                f"{statistics.fmean(x['seconds'] for x in told):,.0f}",
            )
        )
    columns = (
        *("arm", "seeds", "loss before", "loss after", "beside LoRA, paired"),
        *("ROUGE-L before", "after", "MB, both ways", "CPU seconds, evaluation too"),
    )
    said = f"Twelve unseen tasks, {ROUNDS} rounds of 3 of 36 clients."
    return f"{said}\n\n{grid(columns, rows)}"


if __name__ == "__main__":
    main(
        "kseed",
        "Seeds instead of weights, on a real model: unseen tasks of Natural Instructions",
        arms,
        page,
        model=str(MODELS / "smollm2.gguf"),
        data="natural_instructions",
        doc=__doc__,
    )
