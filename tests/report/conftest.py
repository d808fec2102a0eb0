"""A run directory as a finished run leaves it, without the run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LABELS = {"language": {"English": 30, "Dutch": 10}, "task": {"copy": 20, "count": 20}}
COUNTS = {
    "train": 32,
    "validation": 4,
    "test": 4,
    "rows": 32,
    "tokens": 900,
    "target_tokens": 300,
    "labels": LABELS,
}


@pytest.fixture
def fabricate(tmp_path: Path) -> Callable[..., Path]:
    """Return a maker of run directories; exact match ends at `top`, each round moves `traffic` bytes each way."""

    def make(
        name: str = "demo",
        *,
        folder: Path | None = None,
        rounds: int = 4,
        clients: int = 3,
        top: float = 0.8,
        traffic: int = 1000,
        generate: bool = True,
    ) -> Path:
        folder = folder or tmp_path / name
        folder.mkdir(parents=True)
        ids = [f"client-{at:03d}" for at in range(clients)]
        rows, measured = [], []
        for number in range(rounds + 1):
            done = number / rounds
            row: dict[str, Any] = {"round": number, "seconds": float(number)}
            row |= {"test/loss": 4.0 - 3.0 * done, "validation/loss": 4.2 - 3.0 * done}
            if generate:
                row |= {"test/exact_match": top * done, "test/rougeL": 0.5 * done}
            if number:
                row |= {"train/loss": 4.0 - 3.0 * done, "train/skipped_steps": 1.0}
                row |= {"comm/upload_bytes": traffic, "comm/download_bytes": traffic}
                row |= {"comm/num_absent": 2.0, "comm/total_bytes": 2 * traffic * number}
            rows.append(row)
            for at, client in enumerate(ids):
                metrics = {"loss": row["test/loss"] + at / 10, "num_examples": 4.0}
                if generate:
                    metrics["exact_match"] = row["test/exact_match"] * (1 - at / 100)
                line = {"round": number, "client": client, "split": "test", "metrics": metrics}
                measured.append(line)
        for file, lines in (("metrics.jsonl", rows), ("clients.jsonl", measured)):
            (folder / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
        pieces = {
            "manifest.json": manifest(ids),
            "summary.json": summary(name, clients),
            "environment.json": ENVIRONMENT,
            "samples.json": SAMPLES if generate else [],
        }
        for file, piece in pieces.items():
            (folder / file).write_text(json.dumps(piece))
        (folder / "recipe.yaml").write_text(RECIPE.format(name=name))
        return folder

    return make


def manifest(clients: list[str]) -> dict[str, Any]:
    return {
        "sha256": "5" * 64,
        "source": "builtin:polyglot",
        "partition": "dirichlet",
        "by": "language",
        "seed": 0,
        "max_length": 256,
        "num_rows": 120,
        "num_dropped": 7,
        "num_truncated": 11,
        "num_unassigned": 0,
        "clients": dict.fromkeys(clients, COUNTS),
    }


def summary(name: str, clients: int) -> dict[str, Any]:
    return {
        "name": name,
        "algorithm": "FedAvg",
        "num_clients": clients,
        "tune": "lora, rank 8",
        "num_trainable": 12345,
        "train_seconds": 92.0,
        "wall_seconds": 171.0,
        "peak_memory_bytes": 812_000_000,
        "state_sha256": "9f2b" * 16,
        "stopped_early": True,
    }


ENVIRONMENT = {
    "date": "2026-01-02T03:04:05+00:00",
    "command": "fedloom run demo",
    "python": "3.11.7",
    "os": "Linux",
    "versions": {"fedloom": "0.1.0", "torch": "2.13.0", "datasets": None},
    "cpu": "Some CPU",
    "num_cores": 2,
    "num_threads": 1,
    "memory_bytes": 25_000_000_000,
    "gpus": [{"name": "Some GPU", "memory_bytes": 80_000_000_000}],
}
SAMPLES = [
    {
        "client": "client-000",
        "labels": {"language": "English", "task": "count"},
        "prompt": "How many? <script>alert(1)</script>",
        "reference": "Twelve.",
        "before": "",
        "after": "twelve",
    },
    {
        "client": "client-001",
        "labels": {},
        "prompt": "Repeat it.",
        "reference": "x" * 900,
        "before": "y",
        "after": "z",
    },
]
RECIPE = """name: {name}
description: Three clients share an adapter.
model:
  name: builtin:tiny
tune:
  lora:
    rank: 8
data:
  source: builtin:polyglot
evaluation:
  extract: text
"""
