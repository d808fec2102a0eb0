"""Is it worth it to federate? SmolLM2 before and after, each client alone, and all data in one place.

    python benchmarks/real/instructions.py --data FOLDER [--model FILE] [--seeds 0,1,2] [--part 0/2] [--table]

FOLDER holds `gsm8k/train.jsonl` and `codealpaca/train.json`. Eight clients of unequal size; local training and the
centralised run have the same test rows and as many steps as a client takes, or as all take together.
"""

from collections.abc import Mapping

from runs import MODELS, Line, Lines, Tree, first, grid, last, main

from intervals import interval

SETS = {
    "GSM8K": {"source": "gsm8k/train.jsonl", "shorter": {"answer": 400}},
    "CodeAlpaca": {"source": "codealpaca/train.json", "shorter": {"output": 300}},
}


def arm(folder: str, model: str, data: Mapping[str, object]) -> Tree:
    """Return a recipe."""
    return {
        "model": {"name": model},
        "algorithm": "fedavg",
        "data": {
            **data,
            "source": f"{folder}/{data['source']}",
            "num_clients": 8,
            "num_examples": 800,
            "prompt": "chat",
            "max_length": 192,
            "fractions": [0.9, 0.0, 0.1],
            "partition": {"quantity": {"alpha": 2.0}},
        },
        "tune": {"lora": {"rank": 8, "alpha": 16, "targets": "all-linear"}},
        "local": {"optimizer": "adamw", "lr": 1e-3, "steps": 4, "batch_size": 2},
        "evaluation": {"every": 0, "validation": False, "generate": False},
        "run": {
            "rounds": 5,
            "samples": 0,
            "keep_checkpoints": 1,
            "baselines": ["local", "centralised"],
        },
    }


def arms(source: str, model: str) -> Mapping[str, Tree]:
    """Return a row a set."""
    return {name: arm(source, model, data) for name, data in SETS.items()}


def page(lines: Lines) -> str:
    """Return the table."""
    rows = []
    for name, runs in lines.items():
        told = list(runs.values())
        rows.append(
            (
                name,
                str(len(told)),
                interval([first(line) for line in told]),
                interval([last(line) for line in told]),
                *(
                    interval([ended(line, kind) for line in told])
                    for kind in ("local", "centralised")
                ),
                f"{interval([100 * (last(x) / ended(x, 'local') - 1) for x in told], 2)} %",
            )
        )
    columns = (
        *("set", "seeds", "before", "FedAvg", "local", "centralised"),
        "FedAvg beside local, paired",
    )
    return f"Test loss, nats a token of the answers.\n\n{grid(columns, rows)}"


def ended(line: Line, baseline: str) -> float:
    """Return the loss a baseline ends with."""
    return float(line["baselines"][baseline]["test/loss"])


if __name__ == "__main__":
    main(
        "instructions",
        "Federated, local and centralised training of a real model",
        arms,
        page,
        model=str(MODELS / "smollm2.gguf"),
        data="data",
        doc=__doc__,
    )
