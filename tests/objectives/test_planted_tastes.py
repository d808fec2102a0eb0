"""Clients of opposite taste: one model for all learns neither, clusters learn both."""

import json
from pathlib import Path
from typing import Any

import pytest

import fedloom
from fedloom.recipe import build_recipe

WORDS = [
    "red",
    "green",
    "blue",
    "small",
    "large",
    "warm",
    "cold",
    "old",
    "new",
    "dry",
    "wet",
    "soft",
    "hard",
]


def pairs(client: int, *, longer: bool) -> list[dict[str, str]]:
    """Return pairs of a short and a long answer, of which the client prefers one kind."""
    made = []
    for at in range(24):
        first = WORDS[(client * 7 + at * 3) % len(WORDS)]
        second = WORDS[(client + at * 5) % len(WORDS)]
        short, long = first, " ".join([first, second] * 3)
        chosen, rejected = (long, short) if longer else (short, long)
        prompt = f"{second} or {first}? {client} {at}"
        made.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return made


LAYERS: dict[str, list[Any]] = {
    "one model": ["fedavg"],
    "automatic clusters": [{"clustered": {}}, "fedavg"],
    "FedBiscuit": [
        {"clustered": {"mode": {"balanced": {"num_clusters": 2, "every": 1}}}},
        "fedavg",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_clusters_find_whose_taste_is_alike(name: str, tmp_path: Path) -> None:
    tree: dict[str, Any] = {
        "name": "tastes",
        "algorithm": LAYERS[name],
        "objective": "dpo",
        "data": {"max_length": 64, "fractions": [0.6, 0.15, 0.25]},
        "tune": {"lora": {"rank": 4, "alpha": 8}},
        "local": {"optimizer": "adamw", "lr": 2e-3, "steps": 6, "batch_size": 4},
        "evaluation": {"every": 0, "generate": False, "validation": False},
        "run": {"rounds": 5, "samples": 0},
    }
    data = {f"client-{k}": pairs(k, longer=bool(k % 2)) for k in range(8)}
    run = fedloom.run(build_recipe(tree), tmp_path, data=data)
    accuracy = run.summary["final"]["test/preference_accuracy"]
    if name == "one model":
        assert 0.35 < accuracy < 0.65
        return
    assert accuracy > 0.9
    found = json.loads((tmp_path / "clusters.json").read_text())["assignment"]
    tastes = [
        {int(client[-1]) % 2 for client in found if found[client] == k} for k in {*found.values()}
    ]
    assert sorted(tastes, key=str) == [{0}, {1}]
