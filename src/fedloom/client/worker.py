"""What runs on a client, whichever engine delivers the task.

Drives client halves in lockstep and feeds a trainer: each turn runs, in one call, the work that all unfinished clients
ask for. One message on a network node and a cohort in this process go through the same function.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fedloom.client.client_state import ClientStateStore
from fedloom.core.params import equal
from fedloom.core.protocols import (
    Algorithm,
    ClientError,
    ClientFailure,
    ClientUpdate,
    Done,
    Evaluate,
    Job,
    Params,
    Payload,
    Reply,
    Task,
    Trainer,
    Work,
)
from fedloom.core.randomness import derive


def client_half(algorithm: Algorithm[Any], task: Task, client_state: Payload) -> ClientUpdate:
    """Return the generator that answers the task."""
    return _half(Deployed(algorithm), task, client_state)


@dataclass
class Deployed:
    """What clients would use; those without client state that share a download share one object, measured once."""

    algorithm: Algorithm[Any]
    _shared: dict[int, tuple[Payload, Params]] = field(default_factory=dict)

    def of(self, download: Payload, client_state: Payload) -> Params:
        """Return what a client with this client state would use."""
        if client_state:
            return self.algorithm.deployed(download, client_state)
        if id(download) not in self._shared:
            params = self.algorithm.deployed(download, client_state)
            # Downloads may differ beside the model: in what a client alone has to know.
            alike = (known for _, known in self._shared.values() if equal(known, params))
            # The payload is kept beside it: an id is unique only while its object lives.
            self._shared[id(download)] = download, next(alike, params)
        return self._shared[id(download)][1]


def _half(deployed: Deployed, task: Task, client_state: Payload) -> ClientUpdate:
    if task.kind == "train":
        return deployed.algorithm.client_update(task, client_state)
    return _measure(deployed.of(task.download, client_state), task, client_state)


def _measure(params: Params, task: Task, client_state: Payload) -> ClientUpdate:
    split: Any = "test" if task.kind == "test" else "validation"
    done = yield Evaluate(params, split)
    return Reply(task.client, {}, done.num_examples, done.metrics), client_state


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
        halves[i] = _half(deployed, task, client_state)
    told: dict[int, Done | ClientError | None] = dict.fromkeys(halves)
    turn = 0
    while told:
        asked: dict[int, Work] = {}
        for i, last in told.items():
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
        told = dict(zip(asked, _attempt(trainer, jobs), strict=True))
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
