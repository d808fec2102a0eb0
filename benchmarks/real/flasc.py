"""FLASC on a real model: loss against bytes, SmolLM2 on CodeAlpaca.

    python benchmarks/real/flasc.py --data FILE [--model FILE] [--seeds 0,1,2] [--part 0/2] [--table]

FILE is CodeAlpaca's rows (`instruction`, `input`, `output`). Twelve clients of unequal size, four in a round; every arm
has the same rows, cohorts and steps at a seed. FLASC's uploads are thin, so the server's step is 2, the only one that was
tried, on a seed that is not in the table; dense LoRA is in it with the same step as well as with a whole mean.
"""

import statistics
from collections.abc import Mapping
from typing import Any

from runs import MODELS, Lines, Tree, beside, first, grid, last, main

from intervals import interval

BASE = "dense r16"
DENSE = {"fedavg": {"weighting": "uniform"}}
STEPPED = {"fedavg": {"server": {"sgd": {"lr": 2.0}}, "weighting": "uniform"}}
FLASC = [{"flasc": {"download": 0.25, "upload": 0.25}}, STEPPED]


def arm(source: str, model: str, rank: int, algorithm: Any, **more: Any) -> Tree:
    """Return a recipe."""
    return {
        "model": {"name": model},
        "algorithm": algorithm,
        "data": {
            "source": source,
            "num_clients": 12,
            "num_examples": 1200,
            "prompt": "chat",
            "max_length": 128,
            "shorter": {"output": 300},
            "fractions": [0.9, 0.0, 0.1],
            "partition": {"quantity": {"alpha": 2.0}},
        },
        "cohort": {"uniform": {"size": 4}},
        "tune": {"lora": {"rank": rank, "alpha": 16, "targets": "all-linear"}},
        "local": {"optimizer": "adamw", "lr": 2e-3, "steps": 4, "batch_size": 2},
        "evaluation": {"every": 4, "validation": False, "generate": False},
        "run": {"rounds": 8, "samples": 0, "keep_checkpoints": 1},
        **more,
    }


def arms(source: str, model: str) -> Mapping[str, Tree]:
    """Return the rows of the table."""
    int8 = {"wire": {"download": "int8", "upload": "int8"}}
    return {
        BASE: arm(source, model, 16, DENSE),
        "dense r16, step 2": arm(source, model, 16, STEPPED),
        "dense r1": arm(source, model, 1, DENSE),
        "FLASC 1/4": arm(source, model, 16, FLASC),
        "FLASC 1/4, int8": arm(source, model, 16, FLASC, **int8),
        "FLASC r4, 1/4, int8": arm(source, model, 4, FLASC, **int8),
    }


def page(lines: Lines) -> str:
    """Return the table."""
    base = lines.get(BASE, {})
    rows = []
    for name, runs in lines.items():
        spent = {s: r["upload_bytes"] + r["download_bytes"] for s, r in runs.items()}
        fewer = [
            (base[s]["upload_bytes"] + base[s]["download_bytes"]) / spent[s]
            for s in runs.keys() & base.keys()
        ]
        rows.append(
            (
                name,
                str(len(runs)),
                f"{statistics.fmean(map(first, runs.values())):.3f}",
                interval([last(r) for r in runs.values()]),
                "" if name == BASE else f"{interval(beside(runs, base), 2)} %",
                f"{statistics.fmean(r['upload_bytes'] for r in runs.values()) / 1e6:.2f}",
                f"{statistics.fmean(r['download_bytes'] for r in runs.values()) / 1e6:.2f}",
                f"{statistics.fmean(fewer):.1f}x" if fewer else "",
            )
        )
    columns = (
        *("arm", "seeds", "loss before", "loss after", "beside dense r16, paired"),
        *("MB up", "MB down", "fewer bytes"),
    )
    return grid(columns, rows)


if __name__ == "__main__":
    main(
        "flasc",
        "FLASC on a real model: loss against bytes on CodeAlpaca",
        arms,
        page,
        model=str(MODELS / "smollm2.gguf"),
        data="codealpaca/train.json",
        doc=__doc__,
    )
