"""Laws of whole runs: that they end alike whoever is asked first, on either engine, after any resume.

Each law is a function that returns why it does not apply, or None where it holds, and raises a BrokenLaw where it does not.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fedloom.core.description import describe
from fedloom.core.protocols import ClientFailure, Payload
from fedloom.engines.inprocess import InProcess
from fedloom.engines.loopback import Loopback
from fedloom.rounds.buffered import BufferedRun, advance_buffered, buffered
from fedloom.rounds.checkpoint import Checkpoints, state_sha256
from fedloom.rounds.clock import Clock, Durations
from fedloom.rounds.loop import Run, begin, draw, measure
from fedloom.server.buffering import Buffered
from fedloom.server.samplers import Full, Uniform
from fedloom.testing.bench import SEED, StillTrainer, drawn_start
from fedloom.testing.compare import distance, same
from fedloom.testing.subject import Subject
from fedloom.testing.watched import BrokenLaw

EXACT = 1e-12
"""By how much sums in float64 may differ that are added up in another order."""


def order(subject: Subject) -> str | None:
    """Examine that it does not matter who is asked first."""

    class Backwards(Uniform):
        def draw(self, population: Any, seed: int) -> Any:
            return list(reversed(Uniform.draw(self, population, seed)))

    bench, algorithm, size = subject.bench(torch.float64), subject.algorithm, subject.cohort.size
    a = bench.final(algorithm, subject.folder / "a", 2, sampler=Uniform(size))
    b = bench.final(algorithm, subject.folder / "b", 2, sampler=Backwards(size))
    worst, _ = distance(a.state, b.state)
    if not worst < EXACT:
        raise BrokenLaw(
            f"with the cohort's clients in reverse order the state differs by {worst:.2g} after 2 rounds: let"
            " server_update treat replies alike, whichever comes first"
        )
    return None


def still(subject: Subject) -> str | None:
    """Examine that a model moves only where training moves it: not at a learning rate of 0."""
    bench, algorithm = subject.bench(), subject.without_noise()
    bench.trainer = StillTrainer()
    engine = bench.engine(InProcess, algorithm, subject.folder)
    run = begin(algorithm, drawn_start(bench.space, SEED), SEED)

    def models(run: Run[Any]) -> list[Any]:
        sent = algorithm.broadcast(run.state, draw(run, engine.population(), None))
        stored = {c: engine.store.load(c, before=run.number + 1) for c in sent}
        unknown: Payload = {}
        return [algorithm.deployed(sent[c], known) for c in sent for known in (unknown, stored[c])]

    # As of the same round: what is sent of a model may change by schedule.
    before = models(dataclasses.replace(run, number=2))
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
            nothing: Payload = {}
            for known in (nothing, client_state):
                params = algorithm.deployed(sent, known)
                if {n: t.shape for n, t in params.items()} != {
                    n: t.shape for n, t in start.items()
                }:
                    raise BrokenLaw(
                        f"deployed returns {', '.join(sorted(params)[:3])}, ... for {client}: return every tensor of the"
                        " space, in its shape"
                    )
            unknown = algorithm.deployed(sent, nothing)
            for name, value in sent.get("params", {}).items():
                # Some send the entries under a mask, in one row; some several models under other names.
                known_shape = name in start and value.shape == start[name].shape
                if known_shape and not torch.equal(unknown[name].double(), value.double()):
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
        raise BrokenLaw(
            f"without c3 rounds ended with the failures {reported[0][1]}, not its alone"
        )
    fresh = begin(algorithm, bench.space.start(), SEED)
    for lost, least in ((everybody, 1), (frozenset({"c3"}), subject.num_clients)):
        engine = bench.engine(Loopback, algorithm, subject.folder / f"b{least}", lost=lost)
        try:
            run, reported = bench.rounds(
                algorithm, engine, 1, run=fresh, sampler=Full(), min_replies=least
            )
        except Exception as error:
            raise BrokenLaw(
                f"server_update raised {type(error).__name__} ({error}) where {len(lost)} of"
                f" {subject.num_clients} clients are lost: raise NoReplies for a mean of nobody, as mean_upload does"
            ) from error
        is_updated = reported[0][0]["comm/round_kept"]
        if is_updated or run.number != 1 or not same(run.state, fresh.state):
            raise BrokenLaw(f"a round without enough replies ({len(lost)} lost) was kept")
    return None


def resume(subject: Subject) -> str | None:
    """Examine that a run goes on from every checkpoint as if it had never stopped.

    The disk from which it goes on has seen the rounds that follow.
    """
    bench, algorithm = subject.bench(), subject.algorithm
    engine = bench.engine(InProcess, algorithm, subject.folder, wire=subject.wire)
    checkpoints = Checkpoints(subject.folder / "checkpoints", keep=subject.rounds)
    fresh = begin(algorithm, bench.space.start(), SEED)
    seen, files = dict[int, str](), dict[int, Path]()

    def keep(run: Run[Any]) -> None:
        files[run.number], seen[run.number] = checkpoints.save(run), state_sha256(run)

    sampler = subject.cohort
    _, reported = bench.rounds(
        algorithm, engine, subject.rounds, run=fresh, sampler=sampler, after=keep
    )
    for number in range(subject.rounds - 1, 0, -1):
        files[number + 1].unlink()
        middle = checkpoints.load(fresh).run
        again, repeated = bench.rounds(algorithm, engine, number + 1, run=middle, sampler=sampler)
        if state_sha256(again) != seen[number + 1] or repeated != reported[number : number + 1]:
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
        run, reported = bench.rounds(algorithm, engine, subject.rounds, sampler=sampler)
        population = engine.population()
        clients = list(population)
        measured = [
            measure(run, algorithm, engine, kind=split, population=population, clients=clients)
            for split in ("validate", "test")
        ]
        results.append({"state": state_sha256(run), "metrics": reported, "evaluation": measured})
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
    a = one.final(algorithm, subject.folder / "a", 2, sampler=Full())
    b = many.final(algorithm, subject.folder / "b", 2, sampler=Full())
    worst, _ = distance(a.state, b.state)
    if not worst < EXACT:
        raise BrokenLaw(
            f"clients trained in one batch end {worst:.2g} from clients trained one by one: let each client half work"
            " on its own tensors"
        )
    return None


def lateness(subject: Subject) -> str | None:
    """Examine that answers may be taken up late: at once they are a synchronous round's, and late ones resume to the bit."""
    algorithm, sampler = subject.algorithm, subject.cohort
    told = describe(algorithm)
    if not (told.averages_deltas or told.replays):
        return told.current or "its server reads more of uploads than the mean of `delta`"
    bench = subject.bench()
    fresh = begin(algorithm, bench.space.start(), SEED)
    engine = bench.engine(InProcess, algorithm, subject.folder / "waited", wire=subject.wire)
    waited, _ = bench.rounds(algorithm, engine, 2, run=fresh, sampler=sampler)
    alike = _steps(subject, buffered(fresh), 2, sampler.size, Clock(), lambda _: None)
    if not same(alike.state, waited.state):
        raise BrokenLaw(
            "where all clients take equally long and the server steps once all of them answered, the state is another than"
            " that of synchronous rounds: let server_update read nothing but the mean of `delta`, or say no averages_deltas"
        )
    checkpoints = Checkpoints(subject.folder / "checkpoints", keep=4)
    files, seen = dict[int, Path](), dict[int, str]()

    def keep(run: Run[Any]) -> None:
        files[run.number], seen[run.number] = checkpoints.save(run), state_sha256(run)

    slow = Clock(tiers={"phone": 3.5}, spread=0.1)
    _steps(subject, buffered(fresh), 4, 2, slow, keep)
    for number in (4, 3):
        files[number].unlink()
    middle = checkpoints.load(buffered(fresh)).run
    if not middle.flights or state_sha256(middle) != seen[2]:
        raise BrokenLaw("a run with clients in training is not what its checkpoint holds")
    again = _steps(subject, middle, 4, 2, slow, lambda _: None)
    if state_sha256(again) != seen[4]:
        raise BrokenLaw(
            "a run whose clients answer late ended otherwise when it went on from its checkpoint: keep all that a round needs"
            " in the state, and on clients in their client state"
        )
    return None


def _steps(
    subject: Subject,
    run: BufferedRun[Any],
    count: int,
    size: int,
    clock: Clock,
    after: Callable[[Run[Any]], object],
) -> BufferedRun[Any]:
    """Return a run after so many steps of the server, each on `size` answers."""
    name = "late" if clock.tiers else "alike"
    engine = subject.bench().engine(
        InProcess, subject.algorithm, subject.folder / name, wire=subject.wire
    )
    population = engine.population()
    while run.number < count:
        run, *_ = advance_buffered(
            run,
            subject.algorithm,
            engine,
            mode=Buffered(size),
            durations=Durations(clock, dict.fromkeys(population, 1)),
            population=population,
            sampler=subject.cohort,
        )
        after(run)
    return run
