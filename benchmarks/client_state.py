"""What clients' own state costs a round: a thousand clients, all of them in every round, training left out.

    python benchmarks/client_state.py [--clients 1000] [--rounds 5]

FedAvg keeps nothing; SCAFFOLD keeps a variate a client, Ditto a model. A trainer that stands in answers at once, so that
what is measured is messages, sums, and state written, read and cleared away. Medians of interleaved rounds, CPU and
wall clock, on one thread.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import psutil
import torch

from fedloom.algorithms.ditto import Ditto
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.scaffold import Scaffold
from fedloom.client.client_state import ClientStateStore
from fedloom.core.params import params_map
from fedloom.core.protocols import Done, Fit, Job
from fedloom.engines.inprocess import InProcess
from fedloom.models.base_model import ModelSettings, load_base
from fedloom.run.loop import Run, advance, begin
from fedloom.server.samplers import Full
from fedloom.spaces.lora import LoRA
from timing import write_page

METHODS: dict[str, Any] = {
    "FedAvg": FedAvg(),
    "SCAFFOLD": Scaffold(),
    "Ditto": Ditto(FedAvg(), strength=0.1),
}


class Standin:
    """Answers work at once; a few lanes at a time, as a cohort does."""

    width = 8

    def run(self, jobs: Sequence[Job]) -> list[Done]:
        return [_done(job) for job in jobs]


def _done(job: Job) -> Done:
    assert isinstance(job.work, Fit)
    moved = params_map(lambda t: t + 1e-3, job.work.start)
    return Done(moved, 10, 1, 1.0, metrics={"loss": 1.0, "num_tokens": 10.0, "skipped_steps": 0.0})


@dataclass
class Trajectory:
    """One method's run, a round at a time."""

    algorithm: Any
    engine: InProcess
    store: ClientStateStore
    run: Run[Any]

    def round(self) -> tuple[float, float]:
        """Return the CPU and wall seconds of the next round."""
        cpu, wall = time.process_time(), time.perf_counter()
        population = self.engine.population()
        self.run, _, failures = advance(
            self.run, self.algorithm, self.engine, population=population, sampler=Full()
        )
        assert not failures
        self.store.flush()
        self.store.prune(below=self.run.number - 1)
        return time.process_time() - cpu, time.perf_counter() - wall


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    space = LoRA(rank=4).make_space(load_base(ModelSettings()), seed=0)
    start = space.start()
    numel = sum(t.numel() for t in start.values())
    profiles = {f"client-{i:04d}": {"num_examples": "10"} for i in range(asked.clients)}
    with tempfile.TemporaryDirectory() as folder:
        courses = {}
        for name, algorithm in METHODS.items():
            store = ClientStateStore(Path(folder) / name)
            engine = InProcess(algorithm, Standin(), store, profiles)
            courses[name] = Trajectory(algorithm, engine, store, begin(algorithm, start, 0))
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in courses}
        memory = []
        for number in range(asked.rounds + 1):
            for name, course in courses.items():
                took = course.round()
                if number:
                    times[name].append(took)
            memory.append(psutil.Process().memory_info().rss)
        files = {n: sum(1 for p in (Path(folder) / n).rglob("*") if p.is_file()) for n in courses}
    cpu = {name: statistics.median(c for c, _ in took) for name, took in times.items()}
    wall = {name: statistics.median(w for _, w in took) for name, took in times.items()}
    rows = [
        f"| {name} | {cpu[name]:.2f} s | {cpu[name] / cpu['FedAvg']:.2f}x | {wall[name]:.2f} s |"
        f" {wall[name] / wall['FedAvg']:.2f}x | {files[name]:,} |"
        for name in courses
    ]
    text = "\n".join(
        [
            f"{asked.clients:,} clients with LoRA adapters of {numel:,} numbers, {asked.rounds} rounds after a first one.",
            "",
            "| | CPU a round | of FedAvg | wall clock | of FedAvg | files |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            f"Memory after each round, MB: {', '.join(f'{m / 1e6:.0f}' for m in memory)}.",
        ]
    )
    print(text)
    write_page("client_state.md", "State of clients", text)


if __name__ == "__main__":
    main()
