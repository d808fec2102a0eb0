"""A plan of four methods and three seeds on a real model, made at one go and once more with two kills on the way.

    python benchmarks/real/bench.py --data FOLDER [--model FILE] [--runs FOLDER]

FOLDER holds `codealpaca/train.json` and `commonsense/ARC-Easy/test.json`. The process of `fedloom bench` is killed (SIGKILL) at two
moments that are drawn at random, and begun again with the same command each time. Both tables have to be equal byte for byte; what
was made at one go is kept.
"""

import argparse
import hashlib
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))  # where the other benchmarks keep what they share

import psutil
import yaml
from runs import MODELS, grid

from timing import write_page

TABLE = ("table.md", "table.tex", "table.csv", "table.json")
LORA = {"lora": {"rank": 8, "alpha": 16, "targets": "all-linear"}}


def plan(data: Path, model: str) -> dict[str, Any]:
    """Return what is compared with what."""
    return {
        "name": "methods",
        "description": "Four methods on SmolLM2",
        "settings": {
            "model.name": model,
            "algorithm": "fedavg",
            "data": {
                "source": str(data / "codealpaca" / "train.json"),
                "num_clients": 6,
                "num_examples": 240,
                "prompt": "chat",
                "max_length": 72,
                "shorter": {"output": 120},
                "fractions": [0.85, 0.0, 0.15],
                "partition": {"quantity": {"alpha": 2.0}},
            },
            "cohort": {"uniform": {"size": 3}},
            "tune": LORA,
            "local": {"optimizer": "adamw", "lr": 1e-3, "steps": 3, "batch_size": 2},
            "evaluation": {"every": 0, "validation": False, "generate": False},
            "run": {"rounds": 4, "samples": 0},
        },
        "methods": {
            "FedAvg": None,
            "FLASC 1/4, int8": {
                "algorithm": [{"flasc": {"download": 0.25, "upload": 0.25}}, "fedavg"],
                "wire": {"download": "int8", "upload": "int8"},
            },
            "FedSA-LoRA": {"algorithm": [{"personal": {"local": "lora_B"}}, "fedavg"]},
            "FedKSeed": {
                "algorithm": {"fedkseed": {"steps": 6}},
                "tune": {"seeds": {"num_seeds": 1024}},
                "local": {"optimizer": "sgd", "lr": 2e-5, "batch_size": 4},
            },
        },
        "seeds": [0, 1, 2],
        "baselines": [],
        "suites": {
            "arc": {"file": str(data / "commonsense" / "ARC-Easy" / "test.json"), "limit": 20}
        },
    }


def begun(file: Path, folder: Path) -> subprocess.Popen[bytes]:
    """Start the command."""
    with (folder.parent / f"{folder.name}.log").open("ab") as log:
        words = ("bench", str(file), "--out", str(folder))
        return subprocess.Popen(
            [sys.executable, "-m", "fedloom", *words], stdout=log, stderr=subprocess.STDOUT
        )


def finished(file: Path, folder: Path) -> float:
    """Run the command to its end, and return the seconds of processor time that it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    status = begun(file, folder).wait()
    if status:
        sys.exit(f"fedloom bench ended with {status}: see {folder}.log")
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before


def killed(file: Path, folder: Path, seconds: float) -> tuple[str, int, int]:
    """Kill the command after so many seconds of its own, and return that, and how many runs had ended and begun."""
    process = begun(file, folder)
    watched = psutil.Process(process.pid)
    while process.poll() is None and watched.cpu_times().user < seconds:
        time.sleep(0.05)
    if process.poll() is not None:
        sys.exit(f"fedloom bench ended before it was killed: see {folder}.log")
    process.kill()
    process.wait()
    runs = folder / "runs"
    ended = len(list(runs.rglob("summary.json")))
    return f"{seconds:.0f}", ended, len(list(runs.rglob("recipe.yaml")))


def digest(file: Path) -> str:
    """Return the beginning of a file's SHA-256."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def page(folder: Path, rows: Sequence[Sequence[str]], told: str) -> str:
    """Return the table and what was killed when."""
    columns = ("file", "at one go", "killed twice")
    table = (folder / "table.md").read_text().partition("\n")[2]
    return f"{table.strip()}\n\n## Killed twice\n\n{told}\n\n{grid(columns, rows)}"


def main() -> None:
    """Write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default=str(MODELS / "smollm2.gguf"))
    parser.add_argument("--runs", type=Path, default=Path("runs/real"))
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    said = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    folder = said.runs / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "plan.yaml"
    file.write_text(yaml.safe_dump(plan(said.data.resolve(), said.model), sort_keys=False))
    whole, parts = folder / "whole", folder / "parts"
    took = folder / "whole.seconds"
    if not took.exists():
        shutil.rmtree(whole, ignore_errors=True)
        took.write_text(f"{finished(file, whole):.0f}")
    seconds = float(took.read_text())
    shutil.rmtree(parts, ignore_errors=True)
    draws = random.Random(said.seed)
    moments = [killed(file, parts, draws.uniform(0.1, 0.4) * seconds) for _ in range(2)]
    finished(file, parts)
    rows = [(name, digest(whole / name), digest(parts / name)) for name in TABLE]
    differ = [name for name, one, other in rows if one != other]
    if differ:
        sys.exit(f"the tables differ in {', '.join(differ)}: {whole}, {parts}")
    kills = "; ".join(
        f"after {at} s, with {ended} runs ended and {began - ended} under way"
        for at, ended, began in moments
    )
    told = f"At one go it took {seconds:.0f} s of processor time. Killed {kills}. SHA-256 of the files, the same bytes:"
    write_page(
        "real_bench.md",
        "A plan of methods and seeds on a real model",
        page(whole, rows, told),
        packages=("torch", "transformers", "peft", "fedloom"),
    )


if __name__ == "__main__":
    main()
