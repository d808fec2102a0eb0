"""Privacy on real trainers, engines and checkpoints: secret, resumable, and what it is without noise."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.flasc import Flasc
from fedloom.algorithms.private import Private
from fedloom.core.protocols import Algorithm, Payload, Reply, Round
from fedloom.core.sparsity import Density
from fedloom.engines.inprocess import InProcess
from fedloom.privacy.accountant import Ledger
from fedloom.privacy.clipping import NoisySum, clipped, within
from fedloom.privacy.mechanism import SIGNAL, Mechanism
from fedloom.rounds.checkpoint import Checkpoints, state_sha256
from fedloom.rounds.loop import Run, begin, draw, tasks
from fedloom.server.samplers import Full, Poisson

FLASC = Flasc(FedAvg(), Density(0.25), Density(0.5))


def test_a_secret_run_resumes_to_the_bit_and_is_never_repeated(
    bench: Callable[..., Any], tmp_path: Path
) -> None:
    it, algorithm = bench(), Private(FLASC, 0.05, epsilon=2.0, delta=1e-2, rounds=4)
    engine = it.engine(InProcess, algorithm, tmp_path / "a")
    checkpoints = Checkpoints(tmp_path / "c", keep=9)
    whole, said = it.rounds(algorithm, engine, 4, sampler=Poisson(0.4), after=checkpoints.save)
    spent = [metrics["server/epsilon"] for metrics, _ in said]
    assert spent == sorted(spent)
    assert 0.998 * 2 <= spent[-1] <= 2
    for late in (3, 4):
        (tmp_path / "c" / f"round-{late:06d}.ckpt").unlink()
    middle = checkpoints.load(begin(algorithm, it.space.start(), 5)).run
    assert middle.state.mechanism.ledger.num_releases == 2
    again, said_again = it.rounds(algorithm, engine, 4, run=middle, sampler=Poisson(0.4))
    assert state_sha256(again) == state_sha256(whole)
    assert said_again == said[2:]
    ((rate, z, count),) = again.state.mechanism.ledger.releases
    assert (rate, count) == (0.4, 4)
    assert Ledger(((rate, z, 4),)).epsilon(1e-2) == spent[-1]
    other, _ = it.rounds(
        algorithm, it.engine(InProcess, algorithm, tmp_path / "b"), 4, sampler=Poisson(0.4)
    )
    assert state_sha256(other.state.inner) != state_sha256(whole.state.inner)


def test_what_clients_report_of_their_training_does_not_arrive(
    bench: Callable[..., Any], tmp_path: Path
) -> None:
    it, algorithm = bench(), Private(FLASC, 0.05, noise_multiplier=1.0, quantile=0.5)
    engine = it.engine(InProcess, algorithm, tmp_path)
    _, ((metrics, _),) = it.rounds(algorithm, engine, 1, sampler=Full())
    assert {name.partition("/")[0] for name in metrics} == {"comm", "server"}
    assert metrics["comm/num_replies"] == 8
    assert metrics["server/clip"] == 0.05
    assert 0 < metrics["server/epsilon"] < math.inf


def test_rounds_without_clients_release_noise_and_are_counted(
    bench: Callable[..., Any], tmp_path: Path
) -> None:
    it, algorithm = bench(), Private(FedAvg(), 0.05, noise_multiplier=1.0)
    engine = it.engine(InProcess, algorithm, tmp_path)
    run, said = it.rounds(algorithm, engine, 3, sampler=Poisson(1e-9))
    assert [metrics["comm/num_replies"] for metrics, _ in said] == [0, 0, 0]
    assert [metrics["comm/round_kept"] for metrics, _ in said] == [1, 1, 1]
    assert run.state.mechanism.ledger == Ledger(((1e-9, 1.0, 3),))
    assert all(bool(t.all()) for t in run.state.inner.params.values())


def test_without_clip_and_noise_it_is_the_uniform_mean(
    bench: Callable[..., Any], tmp_path: Path
) -> None:
    it = bench(torch.float64)
    inner = FedAvg(weighting="uniform")
    algorithm = Private(inner, math.inf, noise_multiplier=0.0)
    a = it.final(algorithm, tmp_path / "a", sampler=Full()).state.inner.params
    b = it.final(inner, tmp_path / "b", sampler=Full()).state.params
    assert max(float((a[name] - value).abs().max()) for name, value in b.items()) < 1e-15


def test_noise_on_the_support_stays_there_over_rounds(
    bench: Callable[..., Any], tmp_path: Path
) -> None:
    """After the first round, when nothing has left the origin, what is not sent never moves."""
    it = bench()
    algorithm = Private(FLASC, 0.05, noise_multiplier=1.0, noise_on="support")
    engine = it.engine(InProcess, algorithm, tmp_path)
    first, _ = it.rounds(algorithm, engine, 1, sampler=Poisson(0.5))
    start = first.state.inner.params
    second, _ = it.rounds(algorithm, engine, 2, run=first, sampler=Poisson(0.5))
    moved = sum(int((value != start[n]).sum()) for n, value in second.state.inner.params.items())
    assert moved == sum(value.numel() for value in start.values()) // 4


# --- the same round again -------------------------------------------------------------------------


CLIP, Z = 0.05, 1.0


def repeated(replies: Sequence[Reply]) -> dict[str, list[Reply]]:
    """Return other sets of replies to the same round."""
    first, *others = replies
    nudged = {
        group: {n: torch.nextafter(t, t + 1) for n, t in params.items()}
        if group != SIGNAL
        else params
        for group, params in first.upload.items()
    }
    nothing = {
        group: {n: torch.zeros_like(t) for n, t in params.items()} if group != SIGNAL else params
        for group, params in first.upload.items()
    }
    return {
        "one is absent": others,
        "another is absent": list(replies[:-1]),
        "one is all there is": [first],
        "one differs in the last bit": [dataclasses.replace(first, upload=nudged), *others],
        "one sends nothing": [dataclasses.replace(first, upload=nothing), *others],
        "one is there twice": [first, *replies],
        "nobody is there": [],
    }


def flat(payload: Payload) -> torch.Tensor:
    return torch.cat(
        [
            t.double().flatten()
            for _, params in sorted(payload.items())
            for _, t in sorted(params.items())
        ]
    )


class Told:
    """Sees the noisy means that the inner server half is handed, and takes their noise off again."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.noise: list[torch.Tensor] = []
        original = Mechanism.release

        def release(mechanism: Mechanism, uploads: Any, round: Round, **kwargs: Any) -> Any:
            uploads = list(uploads)
            out = original(mechanism, uploads, round, **kwargs)
            exact, kept = NoisySum(), kwargs["mask"]
            for upload in uploads or [kwargs["nobodys"]()]:
                numbers = {group: params for group, params in upload.items() if group != SIGNAL}
                exact.add(clipped(within(numbers, kept), CLIP if uploads else 0.0)[0])
            expected = round.rate * len(round.population)
            mean = exact.mean(expected, std=0.0, key=b"", path=(), mask={})
            noise = flat(out[0]) - flat(mean)
            self.noise.append(noise[noise != 0] / out[2]["noise_std"])
            return out

        patch.setattr(Mechanism, "release", release)


def test_a_repeated_round_has_the_same_noise_for_the_same_replies_and_its_own_for_others(
    averaged: Algorithm[Any],
    bench: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    it = bench()
    algorithm = Private(averaged, CLIP, noise_multiplier=Z, delta=0.1, quantile=0.5)
    engine = it.engine(InProcess, algorithm, tmp_path, alike=True)
    run, _ = it.rounds(algorithm, engine, 1, sampler=Full())
    round = draw(run, engine.population(), Full())
    asked = tasks("train", round, algorithm.broadcast(run.state, round))
    replies = [said.answer for said in engine.run(asked)]
    assert all(isinstance(reply, Reply) for reply in replies)
    told = Told(monkeypatch)
    first, _ = algorithm.server_update(run.state, round, replies)
    again, _ = algorithm.server_update(run.state, round, replies)
    assert state_sha256(first) == state_sha256(again)
    assert torch.equal(*told.noise)
    others = {
        what: algorithm.server_update(run.state, round, other)[0]
        for what, other in repeated(replies).items()
    }
    apart(told.noise[1:])
    for what, other in others.items():
        both = first.mechanism.charge(other.mechanism.released)
        assert [number for number, *_ in both.released] == [1, 2, 2], what
        assert both.charge(first.mechanism.released) == both
        assert both.ledger.epsilon(0.1) > first.mechanism.ledger.epsilon(0.1)


def apart(noises: Sequence[torch.Tensor]) -> None:
    """Fail where two of the noises are correlated, or where their difference is less than that of two draws."""
    most = min(n.numel() for n in noises)
    if most <= 30:  # scalars of a walk: too few for a correlation
        assert len({float(entry) for n in noises for entry in n}) == sum(n.numel() for n in noises)
        return
    for i, a in enumerate(noises):
        for b in noises[:i]:
            alike = float(torch.nn.functional.cosine_similarity(a[:most], b[:most], dim=0))
            assert abs(alike) < 5.5 / most**0.5
            assert float((a[:most] - b[:most]).square().mean()) > 2 - 5.5 * (8 / most) ** 0.5


def test_after_the_same_replies_a_run_is_the_same_to_the_bit_whenever_it_died(
    averaged: Algorithm[Any], bench: Callable[..., Any], tmp_path: Path
) -> None:
    algorithm, it = Private(averaged, CLIP, noise_multiplier=Z, delta=0.1), bench()
    engine = it.engine(InProcess, algorithm, tmp_path, alike=True)
    kept = list[Run[Any]]()
    whole, _ = it.rounds(algorithm, engine, 2, sampler=Full(), after=kept.append)
    with pytest.raises(KeyboardInterrupt):
        it.rounds(algorithm, Dying(engine, 3), 2, run=kept[0], sampler=Full())
    again, _ = it.rounds(algorithm, engine, 2, run=kept[0], sampler=Full())
    assert state_sha256(again) == state_sha256(whole)


@dataclasses.dataclass
class Dying:
    """An engine whose server dies after so many deliveries."""

    engine: InProcess
    delivered: int

    def population(self) -> Any:
        return self.engine.population()

    def run(self, asked: Any) -> Any:
        for number, delivery in enumerate(self.engine.run(asked)):
            yield delivery
            if number == self.delivered:
                raise KeyboardInterrupt
