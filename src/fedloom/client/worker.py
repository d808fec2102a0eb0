"""What runs on a client, whichever engine delivers the task.

Drives client halves in lockstep and feeds a trainer: each turn runs, in one call, the work that all unfinished clients
ask for. One message on a network node and a cohort in this process go through the same function.
"""

from collections.abc import Sequence
from typing import Any

from fedloom.client.client_state import ClientStateStore
from fedloom.core.protocols import (
    Algorithm,
    ClientError,
    ClientFailure,
    ClientUpdate,
    Done,
    Job,
    Reply,
    Task,
    Trainer,
    Work,
)
from fedloom.core.randomness import derive
from fedloom.core.rehearsal import Deployed, half_of


def run_tasks(
    algorithm: Algorithm[Any], trainer: Trainer, store: ClientStateStore, tasks: Sequence[Task]
) -> list[Reply | ClientFailure]:
    """Answer the tasks side by side, in their order; a refusal takes nobody else with it."""
    answers: dict[int, Reply | ClientFailure] = {}
    halves: dict[int, ClientUpdate] = {}
    deployed = Deployed(algorithm)
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
            Job(tasks[i].client, tasks[i].round, derive(tasks[i].seed, turn), work)
            for i, work in asked.items()
        ]
        done = dict(zip(asked, _attempt(trainer, jobs), strict=True))
        turn += 1
    return [answers[i] for i in range(len(tasks))]


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
