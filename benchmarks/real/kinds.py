"""Kinds of adapters on a real model: loss against bytes, SmolLM2 on CodeAlpaca.

    python benchmarks/real/kinds.py --data FILE [--model FILE] [--seeds 0,1,2] [--part 0/2] [--table]

FILE is CodeAlpaca's rows (`instruction`, `input`, `output`). Four clients of unequal size, all in a round; every kind has
the same rows and steps at a seed. Each has the best of a few learning rates, three to five times apart, that were tried for
sixteen steps of one client on a seed that is not in the table (prompt 0.03 was not tried, prefix between 0.03 and 0.15 neither).
"""

import statistics
from collections.abc import Mapping
from typing import Any

from runs import MODELS, Lines, Tree, beside, first, grid, last, main

from intervals import interval

BASE = "LoRA r8"
KINDS: Mapping[str, tuple[Mapping[str, Any], float]] = {
    BASE: ({"lora": {"rank": 8, "alpha": 16, "targets": "all-linear"}}, 2e-3),
    "VeRA r256": ({"vera": {"rank": 256}}, 1e-2),
    "IA3": ({"ia3": {}}, 5e-3),
    "prompt, 20 tokens": ({"prompt": {"tokens": 20}}, 1e-1),
    "prefix, 20 tokens": ({"prefix": {"tokens": 20}}, 3e-2),
    "P-tuning, 20 tokens": ({"ptuning": {"tokens": 20}}, 3e-3),
}
"""What is tuned, and its learning rate."""


def arm(source: str, model: str, tune: Mapping[str, Any], lr: float) -> Tree:
    """Return a recipe."""
    return {
        "model": {"name": model},
        "algorithm": "fedavg",
        "data": {
            "source": source,
            "num_clients": 4,
            "num_examples": 500,
            "prompt": "chat",
            "max_length": 128,
            "shorter": {"output": 300},
            "fractions": [0.9, 0.0, 0.1],
            "partition": {"quantity": {"alpha": 2.0}},
        },
        "tune": tune,
        "local": {"optimizer": "adamw", "lr": lr, "steps": 4, "batch_size": 2},
        "evaluation": {"every": 0, "validation": False, "generate": False},
        "run": {"rounds": 5, "samples": 0, "keep_checkpoints": 1},
    }


def arms(source: str, model: str) -> Mapping[str, Tree]:
    """Return the rows of the table."""
    return {name: arm(source, model, tune, lr) for name, (tune, lr) in KINDS.items()}


def page(lines: Lines) -> str:
    """Return the table."""
    base = lines.get(BASE, {})
    rows = []
    for name, runs in lines.items():
        told = list(runs.values())
        spent = statistics.fmean(x["upload_bytes"] + x["download_bytes"] for x in told)
        rows.append(
            (
                name,
                f"{KINDS[name][1]:g}",
                str(len(told)),
                f"{statistics.fmean(map(first, told)):.3f}",
                interval([last(x) for x in told]),
                "" if name == BASE else f"{interval(beside(runs, base), 1)} %",
                f"{spent / 1e6:.2f}",
            )
        )
    columns = (
        *("kind", "learning rate", "seeds", "loss before", "loss after"),
        *("beside LoRA, paired", "MB, both ways"),
    )
    return f"Test loss, nats a token of the answers.\n\n{grid(columns, rows)}"


if __name__ == "__main__":
    main(
        "kinds",
        "Kinds of adapters on a real model: loss against bytes on CodeAlpaca",
        arms,
        page,
        model=str(MODELS / "smollm2.gguf"),
        data="codealpaca/train.json",
        doc=__doc__,
    )
