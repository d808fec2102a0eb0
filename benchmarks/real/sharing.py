"""Do pooled clusters lose to one model on a real one? Gemma 3 270M on XQuAD in four languages, two clients each.

    python benchmarks/real/sharing.py --data FOLDER [--model FILE] [--seeds 0,1,2] [--part 0/2] [--table]

FOLDER holds XQuAD, a file a language. One model for all, a model for each cluster that was found, and clusters that share
as much as their uploads say, with the same rows, cohorts and steps at a seed. The task is one in all languages, so one
model should win over clusters apart.
"""

import statistics
from collections.abc import Mapping
from typing import Any

from runs import MODELS, Lines, Tree, beside, first, grid, last, main

from intervals import interval

BASE = "one model (FedAvg)"
FILES = [f"xquad.{language}" for language in ("ar", "de", "ru", "zh")]


def arm(source: str, model: str, algorithm: Any) -> Tree:
    """Return a recipe."""
    return {
        "model": {"name": model},
        "algorithm": algorithm,
        "data": {
            "source": source,
            "where": {"file": FILES},
            "num_clients": 8,
            "num_examples": 800,
            "partition": {"clusters": {"by": "file"}},
            "prompt": "plain",
            "max_length": 224,
            "truncate": "prompt",
            "fractions": [0.8, 0.0, 0.2],
        },
        "tune": {"lora": {"rank": 8, "alpha": 16, "targets": "all-linear"}},
        "local": {"optimizer": "adamw", "lr": 1e-3, "steps": 4, "batch_size": 1},
        "evaluation": {"every": 0, "validation": False, "generate": False},
        "run": {"rounds": 8, "samples": 0, "keep_checkpoints": 1},
    }


def arms(source: str, model: str) -> Mapping[str, Tree]:
    """Return the rows of the table."""
    apart = {"clustered": {"share": {"pool": "off"}, "label": "file"}}
    pooled = {"clustered": {"share": {"pool": "on"}, "label": "file"}}
    return {
        BASE: arm(source, model, "fedavg"),
        "clusters, apart": arm(source, model, [apart, "fedavg"]),
        "clusters, pooled": arm(source, model, [pooled, "fedavg"]),
    }


def page(lines: Lines) -> str:
    """Return the table."""
    base = lines.get(BASE, {})
    rows = []
    for name, runs in lines.items():
        told = [one["server"] for one in runs.values()]
        found = [one[-1].get("server/adjusted_rand") for one in told]
        shares = [
            statistics.fmean(shown)
            for one in told
            if (shown := [line["server/lambda"] for line in one if "server/lambda" in line])
        ]
        rows.append(
            (
                name,
                str(len(runs)),
                interval([first(x) for x in runs.values()]),
                interval([last(x) for x in runs.values()]),
                "" if name == BASE else f"{interval(beside(runs, base), 1)} %",
                "" if None in found else f"{statistics.fmean(found):.2f}",
                f"{statistics.fmean(shares):.3f}" if shares else "",
            )
        )
    columns = (
        *("arm", "seeds", "loss before", "loss after", "beside one model, paired"),
        *("adjusted Rand", "lambda"),
    )
    return f"Test loss, nats a token of the answers, 160 rows.\n\n{grid(columns, rows)}"


if __name__ == "__main__":
    main(
        "sharing",
        "How much clusters share on a real model: XQuAD in four languages",
        arms,
        page,
        model=str(MODELS / "gemma3-270m.gguf"),
        data="xquad",
        doc=__doc__,
    )
