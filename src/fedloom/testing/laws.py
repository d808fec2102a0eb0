"""What holds for every algorithm, on real trainers, engines and checkpoints: a function a law.

Each returns why it does not apply, or None where it holds, and raises a BrokenLaw where it does not.
"""

import copy
import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, get_args

import numpy as np
import torch

from fedloom.client.rehearsal import rehearse
from fedloom.client.worker import client_half
from fedloom.core.payloads import NoReplies, mean_upload
from fedloom.core.protocols import Algorithm, ClientFailure, Metrics, Reply, Sees, State, Task
from fedloom.core.randomness import generator
from fedloom.core.schema import difference, schema
from fedloom.core.standin import play_out
from fedloom.engines.inprocess import InProcess
from fedloom.engines.loopback import Loopback
from fedloom.plugins import is_frozen, missing_members
from fedloom.run.checkpoint import Checkpoints, state_sha256
from fedloom.run.loop import Run, begin, draw, measure
from fedloom.server.samplers import Full, Uniform
from fedloom.testing.bench import SEED, StillTrainer, drawn_start
from fedloom.testing.compare import attributes, distance, same
from fedloom.testing.subject import Played, Subject, played
from fedloom.testing.watched import BrokenLaw, Watched

Law = Callable[[Subject], str | None]
EXACT = 1e-12
"""By how much sums in float64 may differ that are added up in another order."""
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
        raise BrokenLaw(f"{kind.__name__} has no {missing[0]}: see fedloom.core.protocols.Algorithm")
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
        lambda given: _generators(),
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
        lambda given: copy.deepcopy(attributes(subject.algorithm)),
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
) -> None:
    bench, watched = subject.bench(), Watched(subject.algorithm, look, complaint)
    engine = bench.engine(InProcess, watched, subject.folder)
    run, _ = bench.rounds(watched, engine, 2, sampler=subject.cohort)
    clients = list(engine.population())
    measure(
        run, watched, engine, kind="test", population=engine.population(), clients=clients
    )


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


def order(subject: Subject) -> str | None:
    """Examine that it does not matter who is asked first."""

    class Backwards(Uniform):
        def draw(self, population: Any, seed: int) -> Any:
            return list(reversed(Uniform.draw(self, population, seed)))

    bench, algorithm, size = subject.bench(torch.float64), subject.algorithm, subject.cohort.size
    a = bench.final(algorithm, subject.folder / "a", sampler=Uniform(size))
    b = bench.final(algorithm, subject.folder / "b", sampler=Backwards(size))
    worst, _ = distance(a.state, b.state)
    if not worst < EXACT:
        raise BrokenLaw(
            f"with the cohort's clients in reverse order the state differs by {worst:.2g} after 3 rounds: let"
            " server_update treat replies alike, whichever comes first"
        )
    return None


def number_of_replies(subject: Subject) -> str | None:
    """Examine that server_update does not count replies: `round.rate` is the expected share."""

    def twice(replies: Sequence[Reply]) -> list[Reply]:
        return [reply for reply in replies for _ in range(2)]

    return _reads(
        subject,
        twice,
        "server_update reads the number of replies (with each of them twice, which has the same mean,"
        " the state differs by {worst:.2g}): take round.rate, the expected share of the population",
    )


def server_sees(subject: Subject) -> str | None:
    """Examine that what says that it reads the mean of uploads reads no single one."""

    def mean(replies: Sequence[Reply]) -> list[Reply]:
        return [Reply("mean of the cohort", mean_upload(replies))]

    return _reads(
        subject,
        mean,
        'server_sees is "mean", but server_update reads single uploads (with their mean in place of them'
        ' the state differs by {worst:.2g}): say "each", or read the mean alone, with'
        " fedloom.core.payloads.mean_upload",
    )


def _reads(
    subject: Subject, change: Callable[[Sequence[Reply]], list[Reply]], sentence: str
) -> str | None:
    algorithm = subject.algorithm
    if algorithm.server_sees != "mean":
        return f"server_sees is {algorithm.server_sees!r}"
    it = played(subject, algorithm, dtype=torch.float64)
    plain, _ = _updated(algorithm, it, it.replies)
    changed, _ = _updated(algorithm, it, change(it.replies))
    worst, _ = distance(plain, changed)
    step, _ = distance(plain, it.run.state)
    if not worst <= NEAR * step:
        raise BrokenLaw(sentence.format(worst=worst))
    return None


def _updated(
    algorithm: Algorithm[State], it: Played, replies: Sequence[Reply]
) -> tuple[State, Metrics]:
    try:
        return algorithm.server_update(it.run.state, it.round, iter(replies))
    except TypeError as error:
        if "has no len()" in str(error):
            raise BrokenLaw(
                "server_update takes len(replies), which stream by once: take round.rate, the expected share of the"
                " population"
            ) from error
        raise


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


def still(subject: Subject) -> str | None:
    """Examine that a model moves only where training moves it: not at a learning rate of 0."""
    bench, algorithm = subject.bench(), subject.without_noise()
    bench.trainer = StillTrainer()
    engine = bench.engine(InProcess, algorithm, subject.folder)
    run = begin(algorithm, drawn_start(bench.space, SEED), SEED)

    def models(run: Run[Any]) -> list[Any]:
        sent = algorithm.broadcast(run.state, draw(run, engine.population(), None))
        stored = {c: engine.store.load(c, before=run.number + 1) for c in sent}
        return [algorithm.deployed(sent[c], known) for c in sent for known in ({}, stored[c])]

    before = models(run)
    run, _ = bench.rounds(algorithm, engine, 2, run=run, sampler=Full())
    worst, _ = distance(before, models(run))
    if not worst < 1e-6:
        raise BrokenLaw(
            f"at a learning rate of 0 a model moved by {worst:.2g} in 2 rounds: let it move by what clients'"
            " training found, or exempt the law where it moves by design"
        )
    return None


def deployed(subject: Subject) -> str | None:
    """Examine that what clients use is what was sent, in the names and shapes of the space."""
    bench, algorithm = subject.bench(), subject.algorithm
    engine = bench.engine(InProcess, algorithm, subject.folder)
    start = bench.space.start()

    def check(run: Run[Any]) -> None:
        for client, sent in algorithm.broadcast(
            run.state, draw(run, engine.population(), None)
        ).items():
            client_state = engine.store.load(client, before=run.number + 1)
            for known in ({}, client_state):
                params = algorithm.deployed(sent, known)
                if {n: t.shape for n, t in params.items()} != {n: t.shape for n, t in start.items()}:
                    raise BrokenLaw(
                        f"deployed returns {', '.join(sorted(params)[:3])}, ... for {client}: return every tensor of the"
                        " space, in its shape"
                    )
            unknown = algorithm.deployed(sent, {})
            for name, value in sent.get("params", {}).items():
                if not torch.equal(unknown[name].double(), value.double()):
                    raise BrokenLaw(
                        f"what a client without a state deploys differs from what it was sent in {name}: return"
                        ' download["params"], as it arrived'
                    )

    fresh = begin(algorithm, bench.space.start(), SEED)
    check(fresh)
    bench.rounds(algorithm, engine, 2, run=fresh, sampler=subject.cohort, after=check)
    return None


def absences(subject: Subject) -> str | None:
    """Examine that lost clients are failures, and that too few replies change nothing."""
    bench, algorithm = subject.bench(), subject.algorithm
    everybody = frozenset(bench.federation.shards)
    engine = bench.engine(Loopback, algorithm, subject.folder / "a", lost=frozenset({"c3"}))
    _, reported = bench.rounds(algorithm, engine, 2, sampler=Full())
    if [failures for _, failures in reported] != [[ClientFailure("c3", "lost on the way")]] * 2:
        raise BrokenLaw(f"without c3 rounds ended with the failures {reported[0][1]}, not its alone")
    fresh = begin(algorithm, bench.space.start(), SEED)
    for lost, least in ((everybody, 1), (frozenset({"c3"}), subject.num_clients)):
        engine = bench.engine(Loopback, algorithm, subject.folder / f"b{least}", lost=lost)
        try:
            run, said = bench.rounds(
                algorithm, engine, 1, run=fresh, sampler=Full(), min_replies=least
            )
        except Exception as error:
            raise BrokenLaw(
                f"server_update raised {type(error).__name__} ({error}) where {len(lost)} of"
                f" {subject.num_clients} clients are lost: raise NoReplies for a mean of nobody, as mean_upload does"
            ) from error
        kept = said[0][0]["comm/round_kept"]
        if kept or run.number != 1 or not same(run.state, fresh.state):
            raise BrokenLaw(f"a round without enough replies ({len(lost)} lost) was kept")
    return None


def resume(subject: Subject) -> str | None:
    """Examine that a run goes on from every checkpoint as if it had never stopped.

    The disk from which it goes on has seen the rounds that follow.
    """
    bench, algorithm = subject.bench(), subject.algorithm
    engine = bench.engine(InProcess, algorithm, subject.folder, wire=subject.wire)
    checkpoints = Checkpoints(subject.folder / "checkpoints", keep=subject.rounds + 1)
    fresh = begin(algorithm, bench.space.start(), SEED)
    seen = [state_sha256(fresh)]

    def keep(run: Run[Any]) -> None:
        checkpoints.save(run)
        seen.append(state_sha256(run))

    checkpoints.save(fresh)
    sampler = subject.cohort
    _, said = bench.rounds(algorithm, engine, subject.rounds, run=fresh, sampler=sampler, after=keep)
    for number, path in reversed(list(enumerate(sorted(checkpoints.folder.glob("*.ckpt"))[:-1]))):
        (checkpoints.folder / f"round-{number + 1:06d}.ckpt").unlink()
        assert path.exists()
        middle = checkpoints.load(fresh).run
        again, repeated = bench.rounds(
            algorithm, engine, number + 1, run=middle, sampler=sampler
        )
        if state_sha256(again) != seen[number + 1] or repeated != said[number : number + 1]:
            raise BrokenLaw(
                f"round {number + 1} ended otherwise when the run went on from its checkpoint after round {number}:"
                " keep all that a round needs in the state, and on clients in their client state"
            )
    return None


def engines(subject: Subject) -> str | None:
    """Examine that in process and over messages, in any order of arrival, runs end with the same bytes."""
    algorithm, sampler = subject.algorithm, subject.cohort
    results = []
    for kind in (InProcess, Loopback):
        bench = subject.bench()
        engine = bench.engine(kind, algorithm, subject.folder / kind.__name__, wire=subject.wire)
        run, said = bench.rounds(algorithm, engine, subject.rounds, sampler=sampler)
        population = engine.population()
        clients = list(population)
        measured = [
            measure(run, algorithm, engine, kind=split, population=population, clients=clients)
            for split in ("validate", "test")
        ]
        results.append({"state": state_sha256(run), "metrics": said, "evaluation": measured})
    here, there = results
    if differing := [name for name in here if here[name] != there[name]]:
        raise BrokenLaw(
            f"in process and over messages runs ended with another {' and '.join(differing)}: let a client half read its"
            " task and client state only, and share no object with other clients or the server"
        )
    return None


def batched(subject: Subject) -> str | None:
    """Examine that clients trained in one batch are clients trained one by one."""
    if subject.space == "seeds":
        return "walks along seeds are taken one client at a time"
    one, many = (
        subject.bench(torch.float64, max_grad_norm=0.3, batched=how) for how in ("off", "auto")
    )
    if many.trainer.width < subject.num_clients or one.trainer.width != 1:
        return "these local settings train clients one at a time"
    algorithm = subject.without_noise()
    a = one.final(algorithm, subject.folder / "a", sampler=Full())
    b = many.final(algorithm, subject.folder / "b", sampler=Full())
    worst, _ = distance(a.state, b.state)
    if not worst < EXACT:
        raise BrokenLaw(
            f"clients trained in one batch end {worst:.2g} from clients trained one by one: let each client half work"
            " on its own tensors"
        )
    return None


LAWS: Mapping[str, Law] = {
    "protocol": protocol,
    "checkpoint": checkpoint,
    "random draws": random_draws,
    "nothing stored": nothing_stored,
    "arguments": arguments,
    "repeats": repeats,
    "order": order,
    "number of replies": number_of_replies,
    "server sees": server_sees,
    "upload shape": upload_shape,
    "still": still,
    "deployed": deployed,
    "absences": absences,
    "resume": resume,
    "engines": engines,
    "batched": batched,
}
"""Every law by name, in the order in which they are examined."""
BASIC = ("protocol", "checkpoint")
"""Without these no other can be examined."""
