"""What clients prefer, on a real model: DPO and KTO over eight clients, each alone, and all pairs in one place.

    python benchmarks/real/preference.py --data FILE [--model FILE] [--seeds 0,1,2] [--part 0/2] [--table]

FILE holds pairs in any form that `objective: dpo` reads, such as LLaMA-Factory's `dpo_en.json`: a few hundred. Answers are
compared by what of them fits in 128 tokens with the prompt. Local training and the centralised run have the same test pairs and
as many steps as a client takes, or as all take together. About a quarter of an hour of one core a seed.
"""

from collections.abc import Mapping

from runs import MODELS, Line, Lines, Tree, first, grid, last, main

from intervals import interval

METRICS = ("preference_accuracy", "preference_margin", "loss", "reference_kl")


def arm(source: str, model: str, objective: object, baselines: list[str]) -> Tree:
    """Return a recipe."""
    return {
        "model": {"name": model},
        "algorithm": "fedavg",
        "objective": objective,
        "data": {
            "source": source,
            "num_clients": 8,
            "prompt": "chat",
            "max_length": 128,
            "fractions": [0.75, 0.0, 0.25],
            "min_examples": 2,
        },
        "tune": {"lora": {"rank": 8, "alpha": 16, "targets": "all-linear"}},
        "local": {"optimizer": "adamw", "lr": 1e-3, "steps": 1, "batch_size": 2},
        "evaluation": {"every": 0, "validation": False, "generate": False, "max_examples": 3},
        "run": {"rounds": 4, "samples": 0, "keep_checkpoints": 1, "baselines": baselines},
    }


def arms(source: str, model: str) -> Mapping[str, Tree]:
    """Return a row an objective."""
    return {
        "DPO": arm(source, model, {"dpo": {"beta": 0.1}}, ["local", "centralised"]),
        "KTO": arm(source, model, {"kto": {"beta": 0.1}}, []),
    }


def page(lines: Lines) -> str:
    """Return the tables."""
    rows = []
    for name, runs in lines.items():
        told = list(runs.values())
        rows.append((f"{name}, before", *cells([[first(x, m) for x in told] for m in METRICS])))
        rows.append((f"{name}, FedAvg", *cells([[last(x, m) for x in told] for m in METRICS])))
        for kind in ("local", "centralised"):
            if all(kind in line["baselines"] for line in told):
                found = [[ended(line, kind, m) for line in told] for m in METRICS]
                rows.append((f"{name}, {kind}", *cells(found)))
    columns = ("of the test pairs", "preferred rightly", "margin", "loss", "KL, nats a token")
    seeds = ", ".join(f"{name} {len(runs)}" for name, runs in lines.items())
    about = (
        "Before training rewards are 0, and so a half of the pairs counts as right. The loss of KTO is another than that"
        " of DPO; the other columns compare. KL is estimated on the given answers."
    )
    return f"{about} Seeds: {seeds}.\n\n{grid(columns, rows)}"


def cells(found: list[list[float]]) -> list[str]:
    """Return a cell for each metric, over seeds."""
    return [interval(values) for values in found]


def ended(line: Line, baseline: str, metric: str) -> float:
    """Return the metric a baseline ends with."""
    return float(line["baselines"][baseline][f"test/{metric}"])


if __name__ == "__main__":
    main(
        "preference",
        "Federated, local and centralised learning of preferences on a real model",
        arms,
        page,
        model=str(MODELS / "smollm2.gguf"),
        data="data/preference/dpo_en.json",
        doc=__doc__,
    )
