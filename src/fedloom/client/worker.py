"""What runs on a client, whichever engine delivers the task.

Drives client halves in lockstep and feeds a trainer: each turn runs, in one call, the work that all unfinished clients
ask for. One message on a network node and a cohort in this process go through the same function.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedloom.client.client_state import ClientStateStore
from fedloom.core.finetune import NO_FINETUNE, FineTune
from fedloom.core.protocols import (
    Algorithm,
    ClientError,
    ClientFailure,
    ClientUpdate,
    Done,
    Job,
    Reply,
    Spent,
    Task,
    Trainer,
    Work,
)
from fedloom.core.randomness import derive
from fedloom.core.rehearsal import Deployed, half_of


@dataclass
class Meter:
    """What each of some tasks has spent, by its place among them."""

    _spent: dict[int, Spent] = field(default_factory=dict)

    def note(self, done: Mapping[int, Done | ClientError | None], seconds: float) -> None:
        """Add work that was done side by side in so many seconds."""
        for at, one in done.items():
            before = self.of(at)
            steps = one.num_steps if isinstance(one, Done) else 0
            self._spent[at] = Spent(before.seconds + seconds / len(done), before.steps + steps)

    def of(self, at: int) -> Spent:
        """Return what the task at a place has spent."""
        return self._spent.get(at, Spent())


def run_tasks(
    algorithm: Algorithm[Any],
    trainer: Trainer,
    store: ClientStateStore,
    tasks: Sequence[Task],
    *,
    finetune: FineTune = NO_FINETUNE,
    meter: "Meter | None" = None,
) -> list[Reply | ClientFailure]:
    """Answer the tasks side by side, in their order; a refusal takes nobody else with it.

    Args:
        algorithm: Its client halves.
        trainer: Runs their work.
        store: What clients keep.
        tasks: Of different clients, or of one and the same kind.
        finetune: What clients do with a model before they measure it a second time.
        meter: Takes down what each task spent.
    """
    meter = meter or Meter()
    answers: dict[int, Reply | ClientFailure] = {}
    halves: dict[int, ClientUpdate] = {}
    deployed = Deployed(algorithm, finetune)
    for i, task in enumerate(tasks):
        try:
            client_state = store.load(task.client, before=task.round)
        except ClientError as refusal:
            answers[i] = ClientFailure(task.client, str(refusal))
            continue
        halves[i] = half_of(deployed, task, client_state)
    done: dict[int, Done | ClientError | None] = dict.fromkeys(halves)
    turn = 0
    while done:
        asked: dict[int, Work] = {}
        for i, last in done.items():
            try:
                asked[i] = _advance(halves[i], last)
            except StopIteration as stop:
                answers[i], client_state = stop.value
                if tasks[i].kind == "train":
                    store.save(tasks[i].client, tasks[i].round, client_state)
            except ClientError as refusal:
                answers[i] = ClientFailure(tasks[i].client, str(refusal))
        jobs = [
            Job(tasks[i].client, _round(tasks[i]), derive(tasks[i].seed, turn), work)
            for i, work in asked.items()
        ]
        began = time.perf_counter()
        done = dict(zip(asked, _attempt(trainer, jobs), strict=True))
        meter.note(done, time.perf_counter() - began)
        turn += 1
    return [answers[i] for i in range(len(tasks))]


def _round(task: Task) -> int:
    """Return the round of a task's work; 0 of what is trained for an evaluation, which no schedule is of."""
    return task.round if task.kind == "train" else 0


def _advance(half: ClientUpdate, last: Done | ClientError | None) -> Work:
    if isinstance(last, ClientError):
        return half.throw(last)
    return next(half) if last is None else half.send(last)


def _attempt(trainer: Trainer, jobs: Sequence[Job]) -> list[Done | ClientError]:
    """Run the jobs together; if one is refused, one by one, so that it takes nobody with it."""
    try:
        return list(trainer.run(jobs)) if jobs else []
    except ClientError as refusal:
        if len(jobs) == 1:
            return [refusal]
    return [answer for job in jobs for answer in _attempt(trainer, [job])]
