"""What clients prefer, on a real model: DPO and KTO over eight clients, each alone, and all pairs in one place; then tastes
that differ, under one model for all, FedBiscuit's two, and as many as are found, pooled and apart.

    python benchmarks/real/preference.py --data FILE [--model FILE] [--seeds 0,1,2] [--part 0/2] [--table]

FILE holds pairs as LLaMA-Factory's `dpo_en.json` does: 200 of them. What is asked and answered is cut to so few words that
a pair takes half a second of one core. Local training and the centralised run have the same test pairs and as many steps as a
client takes, or as all take together. The tastes are planted: an answer stands beside its own beginning, three clients like
the short one and three the long one, so that the two are exactly opposed. About sixteen minutes of one core a seed.
"""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from runs import MODELS, Line, Lines, Tree, first, grid, last, main

from intervals import interval

METRICS = ("preference_accuracy", "preference_margin", "loss", "chosen_drift", "rejected_drift")
CLIENTS, OPPOSED_CLIENTS = 8, 6
ASKED, ANSWERED = 12, 16
"""Words of a question, from its end, and of an answer, from its beginning."""
BRIEF, THOROUGH = 4, 16
"""Words of the two answers of a planted pair."""
WRITTEN = Path("runs/real/preference")
OPPOSED = {
    "one model": "fedavg",
    "FedBiscuit": [{"clustered": {"mode": {"balanced": {"num_clusters": 2, "every": 1}}, "label": "taste"}}, "fedavg"],
    "automatic clusters": [{"clustered": {"label": "taste"}}, "fedavg"],
    "automatic clusters, apart": [{"clustered": {"share": {"pool": "off"}, "label": "taste"}}, "fedavg"],
}  # fmt: skip


# --- the pairs --------------------------------------------------------------------------------------


def cut(text: str, words: int) -> str:
    """Return so many words of a text: its first, or with a number below 0 its last."""
    parts = text.split()
    return " ".join(parts[:words] if words > 0 else parts[words:])


def pairs(file: str) -> list[dict[str, str]]:
    """Return the pairs of a file whose answers differ in what is taken of them."""
    made = []
    for row in json.loads(Path(file).read_text()):
        sides = {side: cut(row[side]["value"], ANSWERED) for side in ("chosen", "rejected")}
        if sides["chosen"] != sides["rejected"]:
            made.append({"prompt": cut(row["conversations"][-1]["value"], -ASKED), **sides})
    return made


def planted(file: str) -> list[dict[str, str]]:
    """Return pairs of clients that like brief answers, or thorough ones."""
    made = []
    answers = [row for row in pairs(file) if len(row["chosen"].split()) >= THOROUGH]
    for at, row in enumerate(answers):
        brief, thorough = (cut(row["chosen"], words) for words in (BRIEF, THOROUGH))
        taste = "brief" if at % 2 else "thorough"
        chosen, rejected = (brief, thorough) if at % 2 else (thorough, brief)
        client = f"{taste}-{at % OPPOSED_CLIENTS // 2}"
        prompt = cut(row["prompt"], -ASKED // 2)
        made.append(
            {"client": client, "taste": taste, "prompt": prompt}
            | {"chosen": chosen, "rejected": rejected}
        )
    return made


def written(name: str, rows: Iterable[Mapping[str, str]]) -> str:
    """Return the path of a file with these rows."""
    WRITTEN.mkdir(parents=True, exist_ok=True)
    file = WRITTEN / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


# --- the arms ---------------------------------------------------------------------------------------


def arm(
    model: str,
    objective: object,
    data: Tree,
    *,
    algorithm: object = "fedavg",
    baselines: Sequence[str] = (),
    rounds: int = 4,
    steps: int = 4,
    batch_size: int = 2,
) -> Tree:
    """Return a recipe."""
    return {
        "model": {"name": model},
        "algorithm": algorithm,
        "objective": objective,
        "data": {"prompt": "plain", "max_length": 96, "truncate": "prompt", **data},
        "tune": {"lora": {"rank": 8, "alpha": 16, "targets": "all-linear"}},
        "local": {"optimizer": "adamw", "lr": 1e-3, "steps": steps, "batch_size": batch_size},
        "evaluation": {"every": 0, "validation": False, "generate": False},
        "run": {"rounds": rounds, "samples": 0, "keep_checkpoints": 1, "baselines": baselines},
    }


def arms(source: str, model: str) -> Mapping[str, Tree]:
    """Return a row an objective, and one a way to serve two tastes."""
    alike = {
        "source": written("pairs", pairs(source)),
        "num_clients": CLIENTS,
        "fractions": [0.75, 0.0, 0.25],
    }
    apart = {
        "source": written("tastes", planted(source)),
        "partition": {"natural": {"by": "client"}},
        "labels": ["client", "taste"],
        "fractions": [0.6, 0.15, 0.25],
    }
    dpo = {"dpo": {"beta": 0.1}}
    return {
        "DPO": arm(model, dpo, alike, baselines=["local", "centralised"]),
        "KTO": arm(model, {"kto": {"beta": 0.1}}, alike),
        **{
            f"two tastes, {name}": arm(
                model, dpo, apart, algorithm=algorithm, rounds=6, steps=2, batch_size=4
            )
            for name, algorithm in OPPOSED.items()
        },
    }


# --- the page ---------------------------------------------------------------------------------------


def page(lines: Lines) -> str:
    """Return the tables of what was run."""
    parts = [f"Seeds: {', '.join(f'{name} {len(runs)}' for name, runs in lines.items())}."]
    about = (
        "Before training rewards are 0, and so a half of the pairs counts as right. The loss of KTO is another than that of"
        " DPO; the other columns compare. A drift is by how many nats an answer is likelier than before training."
    )
    if any(not name.startswith("two") for name in lines):
        parts += [about, objectives(lines)]
    return "\n\n".join([*parts, "## Tastes that differ", tastes(lines)])


def objectives(lines: Lines) -> str:
    """Return a row an objective and where it learns."""
    rows = []
    for name, runs in lines.items():
        if name.startswith("two"):
            continue
        told = list(runs.values())
        rows.append((f"{name}, before", *cells([[first(x, m) for x in told] for m in METRICS])))
        rows.append((f"{name}, FedAvg", *cells([[last(x, m) for x in told] for m in METRICS])))
        for kind in ("local", "centralised"):
            if all(kind in line["baselines"] for line in told):
                found = [[ended(line, kind, m) for line in told] for m in METRICS]
                rows.append((f"{name}, {kind}", *cells(found)))
    return grid(
        (
            "of the test pairs",
            "preferred rightly",
            "margin",
            "loss",
            "drift of the chosen",
            "of the rejected",
        ),
        rows,
    )


def tastes(lines: Lines) -> str:
    """Return a row a way to serve two tastes."""
    rows = []
    for name, runs in lines.items():
        if not name.startswith("two"):
            continue
        told = list(runs.values())
        found = [[of_taste(line, taste) for line in told] for taste in ("brief", "thorough")]
        least = [min(both) for both in zip(*found, strict=True)]
        grouped = [line["server"][-1].get("server/adjusted_rand") for line in told]
        rand = "" if None in grouped else interval(grouped)
        shares = [
            [x["server/lambda"] for x in line["server"][1:] if "server/lambda" in x]
            for line in told
        ]
        grew = [" to ".join(f"{each[at]:.2f}" for at in (1, -1)) for each in shares if each]
        rows.append((name.partition(", ")[2], *cells([*found, least]), rand, "; ".join(grew)))
    columns = (
        "preferred rightly",
        "brief",
        "thorough",
        "the worse of the two",
        "adjusted Rand index",
        "lambda, second round to last, by seed",
    )
    return grid(columns, rows)


def of_taste(line: Line, taste: str) -> float:
    """Return the mean accuracy of the clients of one taste."""
    clients = {c: found for c, found in line["by_client"].items() if c.startswith(taste)}
    return statistics.fmean(found["preference_accuracy"] for found in clients.values())


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
