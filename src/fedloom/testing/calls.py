"""Laws of single calls: what an algorithm's methods may read, change and return.

Each law is a function that returns why it does not apply, or None where it holds, and raises a BrokenLaw where it does not.
"""

import copy
import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, get_args

import numpy as np
import torch

from fedloom.core.payloads import mean_upload
from fedloom.core.protocols import Algorithm, Reply, Sees, Task
from fedloom.core.randomness import generator
from fedloom.core.rehearsal import client_half, play_out, rehearse
from fedloom.core.schema import difference, schema
from fedloom.engines.inprocess import InProcess
from fedloom.plugins import is_frozen, missing_members
from fedloom.rounds.checkpoint import Checkpoints, state_sha256
from fedloom.rounds.loop import Run, begin, draw, measure
from fedloom.server.samplers import Uniform
from fedloom.testing.bench import SEED
from fedloom.testing.compare import attributes, distance, same
from fedloom.testing.subject import Subject, played
from fedloom.testing.watched import BrokenLaw, Watched

NEAR = 1e-5
"""By how much results may differ, of a step's length, where clients send float32."""


def protocol(subject: Subject) -> str | None:
    """Examine that it is a frozen dataclass with the methods of an algorithm, and sends to whom was drawn."""
    algorithm, kind = subject.algorithm, type(subject.algorithm)
    if not is_frozen(kind):
        raise BrokenLaw(
            f"{kind.__name__} is no frozen dataclass: put @dataclass(frozen=True) above it, its settings as fields"
        )
    if missing := missing_members(kind, Algorithm):
        raise BrokenLaw(
            f"{kind.__name__} has no {missing[0]}: see fedloom.core.protocols.Algorithm"
        )
    if algorithm.server_sees not in get_args(Sees):
        raise BrokenLaw(
            f"server_sees must be one of {', '.join(get_args(Sees))}, got {algorithm.server_sees!r}"
        )
    bench = subject.bench()
    try:
        run = begin(algorithm, bench.space.start(), SEED)
    except ValueError as refusal:
        raise BrokenLaw(
            f"init refuses the space {subject.space} ({refusal}): give check_algorithm the space it is for"
        ) from refusal
    population = bench.engine(InProcess, algorithm, subject.folder).population()
    round = draw(run, population, subject.cohort)
    sent = list(algorithm.broadcast(run.state, round))
    if sent != list(round.cohort) and algorithm.server_sees != "noisy mean":
        raise BrokenLaw(
            f"broadcast sends to {', '.join(sent) or 'nobody'}, the cohort is {', '.join(round.cohort)}:"
            " its keys must be the cohort, in that order"
        )
    return None


def checkpoint(subject: Subject) -> str | None:
    """Examine that a checkpoint holds all of the state, and gives it back as it was."""
    bench, algorithm = subject.bench(), subject.algorithm
    fresh = begin(algorithm, bench.space.start(), SEED)
    _check_state(fresh.state)
    checkpoints = Checkpoints(subject.folder / "checkpoints", keep=subject.rounds)
    engine = bench.engine(InProcess, algorithm, subject.folder)

    def check(run: Run[Any]) -> None:
        try:
            checkpoints.save(run)
        except TypeError as error:
            raise BrokenLaw(f"after round {run.number} {error}: make the state of these") from error
        try:
            found = checkpoints.load(fresh).run
        except ValueError as error:
            raise BrokenLaw(
                f"the state after round {run.number} has a dataclass that is not in what init returned"
                f" ({error}): let init return one of every kind"
            ) from error
        if not same(found, run):
            raise BrokenLaw(
                f"the state after round {run.number} came back from its checkpoint as another: keep all that a"
                " round needs in fields that its constructor takes"
            )

    bench.rounds(algorithm, engine, 2, sampler=subject.cohort, after=check)
    return None


def _check_state(state: Any) -> None:
    if not is_frozen(type(state)):
        raise BrokenLaw(
            f"init returned a {type(state).__name__}: a state must be a frozen dataclass, which a checkpoint can hold"
        )
    for part in _dataclasses(state):
        kind = type(part)
        if not is_frozen(kind):
            raise BrokenLaw(f"{kind.__name__} in the state is not frozen: add frozen=True")
        hidden = [field.name for field in dataclasses.fields(part) if not field.init]
        if hidden:
            raise BrokenLaw(
                f"{kind.__name__}.{hidden[0]} is no argument of its constructor, so that no checkpoint holds it:"
                " make it a plain field"
            )


def _dataclasses(value: Any) -> Iterator[Any]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield value
        value = attributes(value)
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, tuple | list):
        for item in value:
            yield from _dataclasses(item)


def random_draws(subject: Subject) -> str | None:
    """Examine that no global generator is drawn from or seeded."""
    return _watch(
        subject,
        lambda _: _generators(),
        lambda method, names: (
            f"{method} moved the global generator of {' and '.join(names)}: draw from"
            " fedloom.core.randomness.generator(task.seed, ...), on the server from round.seed"
        ),
    )


def _generators() -> dict[str, Any]:
    of_numpy: Any = np.random.get_state(legacy=False)  # noqa: NPY002 # looked at, not drawn from
    numbers = of_numpy["state"]
    return {
        "torch": torch.random.get_rng_state(),
        "random": random.getstate(),
        "numpy": (numbers["key"].tobytes(), numbers["pos"], of_numpy["has_gauss"]),
    }


def nothing_stored(subject: Subject) -> str | None:
    """Examine that nothing is stored on the algorithm."""
    return _watch(
        subject,
        lambda _: copy.deepcopy(attributes(subject.algorithm)),
        lambda method, names: (
            f"{method} stored {', '.join(names)} on the algorithm: return it in the state, or on a client in its"
            " client state"
        ),
    )


def arguments(subject: Subject) -> str | None:
    """Examine that downloads, states, client states and replies are not written to."""
    return _watch(
        subject,
        lambda given: {name: state_sha256(value) for name, value in given.items()},
        lambda method, names: (
            f"{method} changed its argument {', '.join(names)} in place: make new tensors, others hold these"
        ),
    )


def _watch(
    subject: Subject,
    look: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    complaint: Callable[[str, Sequence[str]], str],
) -> str | None:
    bench, watched = subject.bench(), Watched(subject.algorithm, look, complaint)
    engine = bench.engine(InProcess, watched, subject.folder)
    run, _ = bench.rounds(watched, engine, 2, sampler=subject.cohort)
    clients = list(engine.population())
    measure(run, watched, engine, kind="test", population=engine.population(), clients=clients)
    return None


def repeats(subject: Subject) -> str | None:
    """Examine that the same arguments give the same results, whatever came between."""
    algorithm = subject.algorithm
    it = played(subject, algorithm)
    first = algorithm.server_update(it.run.state, it.round, iter(it.replies))
    for task in it.tasks[:3]:
        client_state = it.engine.store.load(task.client, before=task.round)
        once, again = (
            play_out(client_half(algorithm, task, client_state), task, noise=0.1) for _ in range(2)
        )
        if not same(once, again):
            raise BrokenLaw(
                f"client_update gave another result for the same task and client state of {task.client}: keep what"
                " it needs in its client state, in no variable outside"
            )
    second = algorithm.server_update(it.run.state, it.round, iter(it.replies))
    if not same(first, second):
        raise BrokenLaw(
            "server_update gave another result for the same state and replies: keep what it needs in the state, in"
            " no variable outside"
        )
    return None


def number_of_replies(subject: Subject) -> str | None:
    """Examine that server_update does not count replies: `round.rate` is the expected share."""

    def twice(replies: Sequence[Reply]) -> list[Reply] | None:
        return [reply for reply in replies for _ in range(2)]

    try:
        return _reads(
            subject,
            twice,
            "server_update reads the number of replies (with each of them twice, which has the same mean,"
            " the state differs by {worst:.2g}): take round.rate, the expected share of the population",
        )
    except TypeError as error:
        if "has no len()" not in str(error):
            raise
        raise BrokenLaw(
            f"server_update takes the length of replies, which stream by once ({error}): take round.rate, the"
            " expected share of the population"
        ) from error


def server_sees(subject: Subject) -> str | None:
    """Examine that what says that it reads the mean of uploads reads no single one."""

    def mean(replies: Sequence[Reply]) -> list[Reply] | None:
        shapes = [schema(reply.upload) for reply in replies]
        alike = all(shape == shapes[0] for shape in shapes)
        return [Reply("mean of the cohort", mean_upload(replies))] if alike else None

    return _reads(
        subject,
        mean,
        'server_sees is "mean", but server_update reads single uploads (with their mean in place of them'
        ' the state differs by {worst:.2g}): say "each", or read the mean alone, with'
        " fedloom.core.payloads.mean_upload",
    )


def _reads(
    subject: Subject, change: Callable[[Sequence[Reply]], list[Reply] | None], sentence: str
) -> str | None:
    algorithm = subject.algorithm
    it = played(subject, algorithm, dtype=torch.float64)
    if algorithm.server_sees != "mean":
        return f"server_sees is {algorithm.server_sees!r}"
    instead = change(it.replies)
    if instead is None:
        return "clients of one round send uploads of several shapes"
    plain, _ = algorithm.server_update(it.run.state, it.round, iter(it.replies))
    changed, _ = algorithm.server_update(it.run.state, it.round, iter(instead))
    worst, _ = distance(plain, changed)
    step, _ = distance(plain, it.run.state)
    if not worst <= NEAR * step:
        raise BrokenLaw(sentence.format(worst=worst))
    return None


def upload_shape(subject: Subject) -> str | None:
    """Examine that an upload's shape follows from the download's shape, the round and the profile alone."""
    algorithm = subject.algorithm
    it = played(subject, algorithm)
    for task, reply in zip(it.tasks, it.replies, strict=True):
        rehearsed = schema(rehearse(algorithm, task, noise=0.1).upload)
        client_state = it.engine.store.load(task.client, before=task.round)
        with_state, _ = play_out(client_half(algorithm, task, client_state), task, noise=0.1)
        somebody = dataclasses.replace(task, client="somebody", seed=task.seed + 1)
        for cause, upload in (
            ("who the client is", rehearse(algorithm, somebody, noise=0.1).upload),
            ("the client state", with_state.upload),
            ("the values of the download", rehearse(algorithm, _drawn(task), noise=0.1).upload),
            ("what training does", rehearse(algorithm, task, noise=0.0).upload),
            ("the client's data", reply.upload),
        ):
            if found := difference(schema(upload), rehearsed):
                raise BrokenLaw(
                    f"the shape of an upload depends on {cause} ({found}): it must follow from the shape of the"
                    " download, the round and the profile, so that the server knows it before"
                )
    bench = subject.bench()
    engine = bench.engine(InProcess, algorithm, subject.folder / "alike", alike=True)
    some = Uniform(subject.num_clients // 2)
    _, reported = bench.rounds(algorithm, engine, subject.rounds, sampler=some)
    for _, failures in reported:
        for failure in failures:
            raise BrokenLaw(
                f"the reply of {failure.client} was refused, where clients differ by their names only:"
                f" {failure.reason}"
            )
    return None


def _drawn(task: Task) -> Task:
    """Return the task with other values in its download."""
    source = generator(task.seed, "values")
    download = {
        group: {
            name: torch.rand(t.shape, generator=source).to(t.dtype) + 0.1
            if t.is_floating_point()
            else t
            for name, t in params.items()
        }
        for group, params in task.download.items()
    }
    return dataclasses.replace(task, download=download)
