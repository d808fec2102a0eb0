"""Which tensors are shared: SmolLM2 on ARC, BoolQ and OpenBookQA, eight clients with a mixture each.

    python benchmarks/real/commonsense.py --data FOLDER [--model FILE] [--seeds 0,1,2] [--part 0/2] [--table]

FOLDER holds a folder a set with `train.json` (`instruction`, `output`), as Fed-SB's repository has them. The model decides
between the choices by one token. Accuracy on own is that of what a client uses on its own test rows; on all, that of what a
client uses on the test rows of all clients, at the mean of the clients. With one model for all both are the same. Rates are
those of the shipped recipes, scaled to this model.
"""

import json
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runs import MODELS, Line, Lines, Tree, grid, last, main

from intervals import interval

SETS = {"ARC-Easy": "arc", "ARC-Challenge": "arc", "boolq": "boolq", "openbookqa": "openbookqa"}
CHOICES = {
    **{f"the correct answer is answer{number}": f"{number}" for number in (1, 2, 3, 4)},
    "the correct answer is true": "true",
    "the correct answer is false": "false",
}
"""What the rows answer, and the word that is decided for."""
LORA = {"lora": {"rank": 8, "alpha": 16, "targets": "all-linear", "origin": "initial"}}
METHODS: Mapping[str, tuple[Any, Mapping[str, Any], float]] = {
    "local": ("local", LORA, 1e-3),
    "FedIT": ("fedavg", LORA, 1e-3),
    "FFA-LoRA": ([{"freeze": {"names": ["lora_A"]}}, "fedavg"], LORA, 2e-3),
    "RoLoRA": (["alternate", "fedavg"], LORA, 1e-3),
    "FedSA-LoRA": ([{"personal": {"local": "lora_B"}}, "fedavg"], LORA, 1e-3),
    "Fed-SB r16": (
        "fedavg",
        {"lora_xs": {"rank": 16, "alpha": 16, "targets": "all-linear"}},
        1.5e-2,
    ),
}
"""How, what is tuned, and the learning rate."""


def rows_of(folder: str) -> Path:
    """Return a file with the rows of all sets that have one of the choices."""
    kept = []
    for name, label in SETS.items():
        for row in json.loads((Path(folder) / name / "train.json").read_text()):
            if row["output"] in CHOICES:
                question = row["instruction"] + "\n"
                kept.append({"prompt": question, "completion": row["output"], "set": label})
    file = Path(tempfile.gettempdir()) / "fedloom_commonsense.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in kept))
    return file


def arm(source: str, model: str, algorithm: Any, tune: Mapping[str, Any], lr: float) -> Tree:
    """Return a recipe."""
    alone = algorithm == "local" or "personal" in algorithm[0]
    return {
        "model": {"name": model},
        "algorithm": algorithm,
        "objective": {"classification": {"classes": CHOICES}},
        "data": {
            "source": source,
            "num_clients": 8,
            "num_examples": 512,
            "labels": ["set"],
            "shorter": {"prompt": 240},
            "prompt": "plain",
            "max_length": 96,
            "truncate": "prompt",
            "fractions": [0.85, 0.0, 0.15],
            "partition": {"dirichlet": {"by": "set", "alpha": 0.5}},
        },
        "tune": tune,
        "local": {"optimizer": "adamw", "lr": lr, "steps": 2, "batch_size": 3},
        # By label, so that every client's model is measured on the rows of all; one model for all has been.
        "evaluation": {"every": 0, "validation": False, **({"by": "set"} if alone else {})},
        "run": {"rounds": 5, "samples": 0, "keep_checkpoints": 1},
    }


def arms(folder: str, model: str) -> Mapping[str, Tree]:
    """Return the rows of the table."""
    source = str(rows_of(folder))
    return {name: arm(source, model, *method) for name, method in METHODS.items()}


def on_all(line: Line) -> float:
    """Return the accuracy on the test rows of all clients, at the mean of the clients."""
    if len(line["models"]) < 2:
        return last(line, "accuracy")
    found = []
    for model in line["models"]:
        by_set = model["metrics"].values()
        right = sum(one["accuracy"] * one["num_examples"] for one in by_set)
        found.append(right / sum(one["num_examples"] for one in by_set))
    return statistics.fmean(found)


def page(lines: Lines) -> str:
    """Return the table."""
    base = lines.get("FedIT", {})
    rows = []
    for name, runs in lines.items():
        ended = list(runs.values())
        more = [
            100 * (last(runs[seed], "accuracy") - last(base[seed], "accuracy"))
            for seed in sorted(runs.keys() & base.keys())
        ]
        rows.append(
            (
                name,
                str(len(ended)),
                interval([100 * float(x["curve"][0]["test/accuracy"]) for x in ended], 1),
                interval([100 * last(x, "accuracy") for x in ended], 1),
                "" if name == "FedIT" else f"{interval(more, 1)}",
                interval([100 * on_all(x) for x in ended], 1),
                interval([last(x) for x in ended]),
                f"{statistics.fmean(x['upload_bytes'] for x in ended) / 1e6:.2f}",
            )
        )
    columns = (
        *("method", "seeds", "before, %", "own, %", "own beside FedIT, points", "all, %"),
        *("own loss", "MB up"),
    )
    return f"Accuracy of the choice on test rows.\n\n{grid(columns, rows)}"


if __name__ == "__main__":
    main(
        "commonsense",
        "Which tensors are shared on a real model: ARC, BoolQ and OpenBookQA",
        arms,
        page,
        model=str(MODELS / "smollm2.gguf"),
        data="commonsense",
        doc=__doc__,
    )
