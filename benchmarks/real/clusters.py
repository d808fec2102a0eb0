"""Are languages found on a real model? Gemma 3 270M on XQuAD, two clients a language, all or half of them in a round.

    python benchmarks/real/clusters.py --data FOLDER [--model FILE] [--seeds 0,1,2] [--part 0/2] [--table]

FOLDER holds XQuAD, a file a language. Nobody says how many clusters there are. Only the groups are looked at: every
client is measured on one example, before and after.
"""

import statistics
from collections.abc import Mapping

from runs import MODELS, Line, Lines, Tree, grid, main

ROUNDS = 4


def arm(source: str, model: str, cohort: object, rounds: int) -> Tree:
    """Return a recipe."""
    return {
        "model": {"name": model},
        "algorithm": [{"clustered": {"label": "file"}}, "fedavg"],
        "data": {
            "source": source,
            "num_clients": 16,
            "num_examples": 1280,
            "partition": {"clusters": {"by": "file"}},
            "prompt": "plain",
            "max_length": 224,
            "truncate": "prompt",
            "fractions": [0.9, 0.0, 0.1],
        },
        "cohort": cohort,
        "tune": {"lora": {"rank": 8, "alpha": 16, "targets": "all-linear"}},
        "local": {"optimizer": "adamw", "lr": 1e-3, "steps": 4, "batch_size": 1},
        "evaluation": {"every": 0, "validation": False, "generate": False, "max_examples": 1},
        "run": {"rounds": rounds, "samples": 0, "keep_checkpoints": 1},
    }


def arms(source: str, model: str) -> Mapping[str, Tree]:
    """Return the two rows: everybody meets as often in both."""
    return {
        "all 16 in a round": arm(source, model, "full", ROUNDS),
        "8 of 16 in a round": arm(source, model, {"uniform": {"size": 8}}, 2 * ROUNDS),
    }


def page(lines: Lines) -> str:
    """Return the adjusted Rand index and the number of clusters after every second round."""
    rows = []
    for name, runs in lines.items():
        for seed, line in sorted(runs.items()):
            rows.append((name, str(seed), *(found(line, at) for at in range(1, 2 * ROUNDS + 1))))
        ends = [line["server"][-1]["server/adjusted_rand"] for line in runs.values()]
        rows.append(
            (
                name,
                f"mean at the end {statistics.fmean(ends):.3f}, least {min(ends):.3f}",
                *[""] * 2 * ROUNDS,
            )
        )
    columns = ("clients", "seed", *(f"round {at}" for at in range(1, 2 * ROUNDS + 1)))
    said = "The adjusted Rand index against the eight languages, and how many clusters there are."
    return f"{said}\n\n{grid(columns, rows)}"


def found(line: Line, at: int) -> str:
    """Return what a round's clusters are worth."""
    if at >= len(line["server"]) or "server/adjusted_rand" not in line["server"][at]:
        return ""
    told = line["server"][at]
    return f"{told['server/adjusted_rand']:.3f} ({told['server/num_clusters']:.0f})"


if __name__ == "__main__":
    main(
        "clusters",
        "Clusters on a real model: the languages of XQuAD",
        arms,
        page,
        model=str(MODELS / "gemma3-270m.gguf"),
        data="xquad",
        doc=__doc__,
    )
