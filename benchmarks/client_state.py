"""What clients' own state costs a round: a thousand clients, all of them in every round, training left out.

    python benchmarks/client_state.py [--clients 1000] [--rounds 5]

FedAvg keeps nothing; SCAFFOLD keeps a variate a client, Ditto a model. A trainer that stands in answers at once, and its
time is taken off, so that what is measured is messages, sums, and state written, read and cleared away. SCAFFOLD also
sends twice as much, both ways: so it stands beside a FedAvg that sends as much too, and beside itself with a memory
that forgets. Medians of interleaved rounds, CPU and wall clock, on one thread.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
from fedloom.core.payloads import to_all
from fedloom.core.protocols import ClientId, ClientUpdate, Done, Fit, Job, Payload, Round, Task
from fedloom.engines.inprocess import InProcess
from fedloom.models.build import ModelSettings, load_base
from fedloom.rounds.loop import Run, advance, begin
from fedloom.server.samplers import Full
from fedloom.spaces.lora import LoRA
from timing import write_page


class Twice(FedAvg):
    """Sends what SCAFFOLD does, both ways, and keeps nothing: what two tensor groups cost without any state."""

    def broadcast(self, state: Any, round: Round) -> Mapping[ClientId, Payload]:
        return to_all(round, {"params": state.params, "control": state.params})

    def client_update(self, task: Task, client_state: Payload) -> ClientUpdate:
        reply, kept = yield from FedAvg.client_update(self, task, client_state)
        return replace(reply, upload={**reply.upload, "control_delta": reply.upload["delta"]}), kept


class Forgetful(ClientStateStore):
    """Keeps nothing: what is left is the algorithm without its state."""

    def save(self, client: ClientId, round: int, client_state: Payload) -> None:
        """Let it go."""


TWICE = "FedAvg, sending twice"
DITTO, SCAFFOLD = Ditto(FedAvg(), strength=0.1), Scaffold()
METHODS: dict[str, tuple[Any, type[ClientStateStore]]] = {
    "FedAvg": (FedAvg(), ClientStateStore),
    "Ditto": (DITTO, ClientStateStore),
    "Ditto, forgetting": (DITTO, Forgetful),
    TWICE: (Twice(), ClientStateStore),
    "SCAFFOLD": (SCAFFOLD, ClientStateStore),
    "SCAFFOLD, forgetting": (SCAFFOLD, Forgetful),
}


@dataclass
class Standin:
    """Answers work at once; a few lanes at a time, as a cohort does."""

    width: int = 8
    cpu: float = 0.0
    """Seconds spent in here."""
    wall: float = 0.0

    def run(self, jobs: Sequence[Job]) -> list[Done]:
        cpu, wall = time.process_time(), time.perf_counter()
        done = [_done(job) for job in jobs]
        self.cpu += time.process_time() - cpu
        self.wall += time.perf_counter() - wall
        return done


def _done(job: Job) -> Done:
    assert isinstance(job.work, Fit)
    moved = params_map(lambda t: t + 1e-3, job.work.start)
    return Done(moved, 10, 1, 1.0, metrics={"loss": 1.0, "num_tokens": 10.0, "skipped_steps": 0.0})


@dataclass
class Trajectory:
    """One method's run, a round at a time."""

    algorithm: Any
    engine: InProcess
    trainer: Standin
    store: ClientStateStore
    run: Run[Any]

    def round(self) -> tuple[float, float]:
        """Return the CPU and wall seconds of the next round, without those of training."""
        spent = self.trainer.cpu, self.trainer.wall
        cpu, wall = time.process_time(), time.perf_counter()
        population = self.engine.population()
        self.run, _, failures = advance(
            self.run,
            self.algorithm,
            self.engine,
            population=population,
            sampler=Full(),
        )
        assert not failures
        self.store.flush()
        self.store.prune(below=self.run.number - 1)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        return cpu - (self.trainer.cpu - spent[0]), wall - (self.trainer.wall - spent[1])


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
        for name, (algorithm, kind) in METHODS.items():
            store, trainer = kind(Path(folder) / name), Standin()
            engine = InProcess(algorithm, trainer, store, profiles)
            courses[name] = Trajectory(
                algorithm, engine, trainer, store, begin(algorithm, start, 0)
            )
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in courses}
        memory = []
        for number in range(asked.rounds + 1):
            for name, course in courses.items():
                took = course.round()
                if number:
                    times[name].append(took)
            memory.append(psutil.Process().memory_info().rss)
        files = {n: sum(1 for p in (Path(folder) / n).rglob("*") if p.is_file()) for n in courses}
    cpu = {name: [c for c, _ in took] for name, took in times.items()}
    wall = {name: [w for _, w in took] for name, took in times.items()}
    rows = []
    for name in courses:
        mine, clock = statistics.median(cpu[name]), statistics.median(wall[name])
        alike = _of(cpu, name, TWICE) if name.startswith("SCAFFOLD") else ""
        stateless = _of(cpu, name, f"{name}, forgetting") if files[name] else ""
        rows.append(
            f"| {name} | {mine:.2f} s | {_of(cpu, name, 'FedAvg')} | {alike} | {stateless} | {clock:.2f} s"
            f" | {_of(wall, name, 'FedAvg')} | {files[name]:,} |"
        )
    text = "\n".join(
        [
            f"{asked.clients:,} clients with LoRA adapters of {numel:,} numbers, {asked.rounds} rounds after a first one.",
            "Training's own time is taken off. The ratios but the last are of CPU time.",
            "",
            f"| | CPU a round | of FedAvg | of {TWICE} | of itself, forgetting | wall | of FedAvg | files |",
            "|---|---|---|---|---|---|---|---|",
            *rows,
            "",
            f"Memory after each round, MB: {', '.join(f'{m / 1e6:.0f}' for m in memory)}.",
        ]
    )
    print(text)
    write_page("client_state.md", "State of clients", text)


def _of(seconds: Mapping[str, Sequence[float]], name: str, base: str) -> str:
    """Return how much longer a method takes than another one, round by round."""
    turns = zip(seconds[name], seconds[base], strict=True)
    return f"{statistics.median(mine / theirs for mine, theirs in turns):.2f}x"


if __name__ == "__main__":
    main()
