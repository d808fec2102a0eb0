"""How LoRA's factors of unequal ranks are added up: SmolLM2 on Natural Instructions, a task a client.

    python benchmarks/real/ranks.py --data FOLDER [--model FILE] [--seeds 0,1,2] [--part 0/2] [--table]

FOLDER holds a file a task (`instruction`, `input`, `output`). Sixteen clients in four tiers, of ranks 2, 4, 8 and 16, eight in
a round; beside them the mean of factors where all have the least rank, and where all have the most. The same rows,
cohorts and steps at a seed; alpha is 16 for all. The error is the Frobenius norm of what the new adapter lacks of the
clients' sum, over that of the sum, at the mean of the rounds; with a frozen pair beside the adapter that is part of it.
"""

import statistics
from collections.abc import Mapping
from typing import Any

from runs import MODELS, Lines, Tree, beside, first, grid, last, main

from intervals import interval

TASKS = (
    *("dialogue_act_recognition_1504", "fill_in_the_blank_1300", "gender_classification_456"),
    *("information_extraction_1306", "information_extraction_1311", "language_identification_1160"),
    *("program_execution_730", "program_execution_834", "question_answering_699"),
    *("question_understanding_1101", "sentiment_analysis_991", "summarization_674"),
    *("translation_221", "translation_233", "translation_344", "translation_375"),
)
"""The shortest."""
RANKS = {"phone": 2, "tablet": 4, "laptop": 8}
BASE = "FedIT r16"


def arm(source: str, model: str, aggregate: str, lora: Mapping[str, Any]) -> Tree:
    """Return a recipe."""
    return {
        "model": {"name": model},
        "algorithm": {"fedlora": {"aggregate": aggregate}},
        "cohort": {"uniform": {"size": 8}},
        "data": {
            "source": source,
            "where": {"file": list(TASKS)},
            "partition": {"natural": {"by": "file"}},
            "tiers": {"phone": 0.25, "tablet": 0.25, "laptop": 0.25, "desk": 0.25},
            "sample": {"share": 0.125},
            "prompt": "plain",
            "max_length": 160,
            "truncate": "prompt",
            "fractions": [0.75, 0.0, 0.25],
        },
        "tune": {"lora": {"alpha": 16, "targets": "all-linear", "origin": "zero", **lora}},
        "local": {"optimizer": "adamw", "lr": 1e-3, "steps": 2, "batch_size": 2},
        "evaluation": {"every": 0, "validation": False, "generate": False},
        "run": {"rounds": 6, "samples": 0, "keep_checkpoints": 1},
    }


def arms(source: str, model: str) -> Mapping[str, Tree]:
    """Return the rows of the table."""
    mixed = {"rank": 16, "ranks": RANKS}
    beside_it = {**mixed, "side": 32}
    return {
        BASE: arm(source, model, "mean", {"rank": 16}),
        "FedIT r2": arm(source, model, "mean", {"rank": 2}),
        "pad (HetLoRA)": arm(source, model, "pad", mixed),
        "svd (FlexLoRA)": arm(source, model, "svd", mixed),
        "stack (FLoRA)": arm(source, model, "stack", beside_it),
        "residual (FedEx-LoRA)": arm(source, model, "residual", beside_it),
    }


def page(lines: Lines) -> str:
    """Return the table."""
    base = lines.get(BASE, {})
    rows = []
    for name, runs in lines.items():
        ended = list(runs.values())
        errors = [
            statistics.fmean(
                x["server/aggregation_error"]
                for x in one["server"]
                if "server/aggregation_error" in x
            )
            for one in ended
        ]
        rows.append(
            (
                name,
                str(len(ended)),
                f"{statistics.fmean(map(first, ended)):.3f}",
                interval([last(x) for x in ended]),
                "" if name == BASE else f"{interval(beside(runs, base), 1)} %",
                f"{statistics.fmean(errors):.3f}",
                f"{statistics.fmean(x['upload_bytes'] for x in ended) / 1e6:.1f}",
                f"{statistics.fmean(x['download_bytes'] for x in ended) / 1e6:.1f}",
            )
        )
    columns = (
        *("how", "seeds", "loss before", "loss after", f"beside {BASE}, paired", "error"),
        *("MB up", "MB down"),
    )
    return f"Test loss, nats a token of the answers, 80 rows of 16 tasks.\n\n{grid(columns, rows)}"


if __name__ == "__main__":
    main(
        "ranks",
        "Clients of four ranks on a real model: how their factors are added up",
        arms,
        page,
        model=str(MODELS / "smollm2.gguf"),
        data="natural_instructions/clients",
        doc=__doc__,
    )
