"""Offsite tuning on a real model: what clients have of SmolLM2, and what they learnt once it is plugged into the whole.

    python benchmarks/real/offsite.py --data FOLDER [--model FILE] [--seeds 0,1,2] [--part 0/2] [--table]

FOLDER holds `gsm8k/train.jsonl`, whose short answers eight clients share, four in a round, and `codealpaca/train.json`, which the server aligns the
emulator on. Two layers at each end learn, with or without the middle: all arms train the same tensors on the same rows.
"""

from collections.abc import Mapping

from runs import MODELS, Line, Lines, Tree, first, grid, last, main

from intervals import interval

DROPS = (0.2, 0.5)
FEDAVG = "FedAvg, same layers"
PLUGIN = "plugin/loss"


def arm(folder: str, model: str, *, drop: float, aligned: bool) -> Tree:
    """Return a recipe."""
    public = {
        "source": f"{folder}/codealpaca/train.json",
        "num_examples": 400,
    }
    align = {
        "public": public,
        "before": 20,
        "steps": 4,
        "batch_size": 2,
        "optimizer": {"adamw": {"lr": 1e-3, "weight_decay": 0.0}},
    }
    return {
        "model": {"name": model},
        "algorithm": [*([{"fedbiot": align}] if aligned else []), {"fedavg": {"mu": 0.01}}],
        "data": {
            "source": f"{folder}/gsm8k/train.jsonl",
            "shorter": {"answer": 200, "question": 200},
            "num_clients": 8,
            "num_examples": 800,
            "prompt": "plain",
            "max_length": 144,
            "fractions": [0.9, 0.0, 0.1],
            "partition": {"quantity": {"alpha": 2.0}},
        },
        "cohort": {"uniform": {"size": 4}},
        "tune": {
            "offsite": {
                "left": 2,
                "right": 2,
                "drop": drop,
                "factors": 8 if aligned else 0,
                "adapter": {"lora": {"rank": 8, "alpha": 16, "targets": "all-linear"}},
            }
        },
        "local": {"optimizer": "adamw", "lr": 1e-3, "steps": 4, "batch_size": 2},
        "evaluation": {"every": 0, "validation": False, "generate": False, "max_examples": 4},
        "run": {"rounds": 6, "samples": 0, "keep_checkpoints": 1},
    }


def arms(source: str, model: str) -> Mapping[str, Tree]:
    """Return a row for each share of layers that is left out, without and with alignment, and one with none left out."""
    made = {FEDAVG: arm(source, model, drop=0.0, aligned=False)}
    for drop in DROPS:
        made[f"FedOT, drop {drop}"] = arm(source, model, drop=drop, aligned=False)
        made[f"FedBiOT, drop {drop}"] = arm(source, model, drop=drop, aligned=True)
    return made


def page(lines: Lines) -> str:
    """Return the table."""
    rows = []
    for name, runs in lines.items():
        told, base = list(runs.values()), lines.get(FEDAVG, {})
        paired = [last(runs[s], PLUGIN) - last(base[s], PLUGIN) for s in runs if s in base]
        rows.append(
            (
                name,
                str(len(told)),
                f"{100 * told[0]['disclosed']:.1f} %",
                interval([first(line) for line in told]),
                interval([last(line) for line in told]),
                interval([first(line, PLUGIN) for line in told]),
                interval([last(line, PLUGIN) for line in told]),
                interval(paired) if paired and name != FEDAVG else "",
                f"{sum(map(moved, told)) / len(told) / 1e6:.1f} MB",
            )
        )
    columns = (
        *("arm", "seeds", "clients have", "emulator before", "after"),
        *("whole model before", "plugged in, after", "beside FedAvg, paired", "sent in all"),
    )
    return f"Test loss, nats a token of the answers.\n\n{grid(columns, rows)}"


def moved(line: Line) -> float:
    """Return the bytes of all messages."""
    return float(line["upload_bytes"] + line["download_bytes"])


if __name__ == "__main__":
    main(
        "offsite",
        "Offsite tuning of a real model",
        arms,
        page,
        model=str(MODELS / "smollm2.gguf"),
        data="data",
        doc=__doc__,
    )
