"""The same run in this process, over loopback messages, on Ray's actors and on Flower's nodes: are the bytes the same?

    python benchmarks/engines.py [--rounds 3] [--algorithms fedavg ...] [--engines inprocess ...]

Six clients of the bundled model and corpus. Ray has two actors, Flower three nodes, encrypted and with a key each. Clients
are trained one at a time, as how many share a batch decides the order of sums. `state` is the beginning of state_sha256.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import torch

from fedloom import experiment
from fedloom.recipe import build_recipe
from timing import about

ALGORITHMS: dict[str, dict[str, Any]] = {
    "fedavg": {"algorithm": "fedavg"},
    "scaffold": {"algorithm": "scaffold"},
    "flasc": {"algorithm": [{"flasc": {"download": 0.5, "upload": 0.25}}, "fedavg"]},
    "fedkseed": {
        "algorithm": {"fedkseed": {"steps": 2}},
        "tune": {"seeds": {"num_seeds": 64}},
        "local": {"lr": 5e-5, "steps": None},
    },
    "clustered": {"algorithm": ["clustered", "fedavg"]},
}
ENGINES: dict[str, Any] = {
    "inprocess": "inprocess",
    "loopback": "loopback",
    "ray": {"ray": {"actors": 2}},
    "flower": {"flower": {"nodes": 3}},
}
BASE: dict[str, Any] = {
    "data": {
        "num_examples": 240,
        "num_clients": 6,
        "where": {"language": ["en", "de", "es"]},
        "partition": {"shards": {"by": "language", "per_client": 1}},
        "max_length": 64,
    },
    "tune": {"lora": {"rank": 4}},
    "local": {"optimizer": "sgd", "lr": 0.1, "steps": 2, "batch_size": 4, "batched": "off"},
    "evaluation": {"every": 0, "generate": False, "max_examples": 2, "validation": False},
}


def recipe_of(algorithm: str, engine: str, rounds: int) -> Any:
    """Return the recipe of one cell of the table."""
    own = ALGORITHMS[algorithm]
    sections = {name: BASE.get(name, {}) | own.get(name, {}) for name in BASE.keys() - own.keys()}
    for name, section in own.items():
        sections[name] = {**BASE.get(name, {}), **section} if name == "local" else section
    run = {"rounds": rounds, "samples": 0}
    return build_recipe({**sections, "name": algorithm, "engine": ENGINES[engine], "run": run})


def main() -> None:
    """Print the table, a row as it comes; fail where two states differ."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--algorithms", nargs="*", choices=ALGORITHMS, default=list(ALGORITHMS))
    parser.add_argument("--engines", nargs="*", choices=ENGINES, default=list(ENGINES))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print(about(["torch", "flwr", "ray"]), "\n", sep="")
    print(f"{'algorithm':10} {'engine':10} {'state':14} {'up':>9} {'down':>9} absent seconds")
    apart = []
    for algorithm in asked.algorithms:
        states = set()
        for engine in asked.engines:
            began = time.perf_counter()
            with tempfile.TemporaryDirectory(prefix="fedloom-") as folder:
                told = experiment.run(
                    recipe_of(algorithm, engine, asked.rounds), Path(folder)
                ).summary
            states.add(told["state_sha256"])
            print(
                f"{algorithm:10} {engine:10} {told['state_sha256'][:12]:14}"
                f" {told['upload_bytes']:9} {told['download_bytes']:9} {told['num_absent']:6}"
                f" {time.perf_counter() - began:7.1f}",
                flush=True,
            )
        if len(states) > 1:
            apart.append(algorithm)
    if apart:
        raise SystemExit(f"states differ: {', '.join(apart)}")


if __name__ == "__main__":
    main()
