"""Canaries on `private` itself: found without noise, hidden by it, and four ways to break it are caught."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.private import Private
from fedloom.audit.mechanism import MechanismAudit, audit_mechanism, most_canaries
from fedloom.core.params import norm
from fedloom.core.protocols import Payload
from fedloom.privacy import clipping, mechanism
from fedloom.privacy.clipping import NoisySum
from fedloom.privacy.mechanism import Mechanism
from fedloom.privacy.noise import normals

Break = Callable[[pytest.MonkeyPatch], None]
honest_mean = NoisySum.mean


def audited(seed: int, rate: float = 1.0, rounds: int = 1, **settings: Any) -> MechanismAudit:
    budget: dict[str, Any] = {} if "noise_multiplier" in settings else {"epsilon": 1.0}
    repeated = settings.pop("repeated", False)
    private = Private(FedAvg(), clip=0.5, delta=1e-5, noise_seed=seed, **budget, **settings)
    return audit_mechanism(private, rate=rate, rounds=rounds, seed=seed, repeated=repeated)


def test_without_noise_canaries_prove_a_large_epsilon() -> None:
    found = audited(1, noise_multiplier=0.0)
    assert found.guesses.canaries == 200
    assert found.guesses.epsilon_low > 2
    assert 3.8 < found.guesses.most < 3.9, "no more can be proved by so many"
    assert found.holds, "an infinite epsilon promises nothing"


def test_what_is_proved_of_epsilon_1_stays_within_it_in_19_of_20_seeds() -> None:
    found = [audited(seed) for seed in range(20)]
    assert all(0.99 < one.epsilon <= 1 for one in found)
    assert sum(one.guesses.epsilon_low <= 1 for one in found) >= 19


@pytest.mark.parametrize(
    "settings",
    [
        {"noise_on": "support"},
        {"quantile": 0.5, "rounds": 2},
        {"rate": 0.2, "rounds": 3},
        {"noise_multiplier": 5.0, "repeated": True},
    ],
    ids=["on the support", "adaptive clip", "sampled", "repeated"],
)
def test_every_setting_keeps_its_promise(settings: dict[str, Any]) -> None:
    found = [audited(seed, **settings) for seed in range(4)]
    assert found[0].epsilon == pytest.approx(1.0, abs=0.07)
    assert all(one.holds for one in found)


def too_little_noise(patch: pytest.MonkeyPatch) -> None:
    """Noise of the sum is divided by the root of the number of clients."""

    def mean(total: NoisySum, expected: float, *, std: float, **rest: Any) -> Payload:
        return honest_mean(total, expected, std=std / expected**0.5, **rest)

    patch.setattr(NoisySum, "mean", mean)


def a_share_a_tensor(patch: pytest.MonkeyPatch) -> None:
    """Each tensor gets its share of the standard deviation, as if it were a share of the upload's norm."""

    def mean(total: NoisySum, expected: float, *, std: float, **rest: Any) -> Payload:
        tensors = sum(len(sums) for sums in total.sums.values())
        return honest_mean(total, expected, std=std / tensors, **rest)

    patch.setattr(NoisySum, "mean", mean)


def clip_after_the_mean(patch: pytest.MonkeyPatch) -> None:
    """Uploads are added up as they come, and the mean is clipped."""

    def mean(total: NoisySum, expected: float, *, std: float, **rest: Any) -> Payload:
        plain = honest_mean(total, expected, std=0.0, **rest)
        clipped, noise = (
            clipping.clipped(plain, 0.5)[0],
            honest_mean(
                NoisySum(
                    {
                        group: {n: torch.zeros_like(t) for n, t in sums.items()}
                        for group, sums in total.sums.items()
                    },
                    total.dtypes,
                ),
                expected,
                std=std,
                **rest,
            ),
        )
        return {g: {n: t + noise[g][n] for n, t in params.items()} for g, params in clipped.items()}

    def unclipped(upload: Payload, clip: float) -> tuple[Payload, float]:
        return upload, norm(upload)

    patch.setattr("fedloom.algorithms.private.clipped", unclipped)
    patch.setattr(mechanism, "clipped", unclipped)
    patch.setattr(NoisySum, "mean", mean)


def the_same_noise_again(patch: pytest.MonkeyPatch) -> None:
    """Noise follows from the key and the round alone, not from what it covers."""

    def mean(total: NoisySum, expected: float, *, path: Any, **rest: Any) -> Payload:
        return honest_mean(total, expected, path=path[:2], **rest)

    patch.setattr(NoisySum, "mean", mean)


def the_same_noise_in_every_tensor(patch: pytest.MonkeyPatch) -> None:
    """Tensors of one shape get the same noise."""

    def shared(key: bytes, *path: str | int, shape: Any) -> torch.Tensor:
        return normals(key, *path[:-2], shape=shape)

    patch.setattr(clipping, "normals", shared)


def everybody_always(patch: pytest.MonkeyPatch) -> None:
    """The accountant counts with a chance of taking part, and nobody draws."""
    patch.setattr(Mechanism, "cohort", lambda _, round: tuple(sorted(round.population)))


@pytest.mark.parametrize(
    ("breaks", "settings"),
    [
        (too_little_noise, {}),
        (a_share_a_tensor, {}),
        (clip_after_the_mean, {}),
        (the_same_noise_again, {"noise_multiplier": 5.0, "repeated": True}),
        (the_same_noise_in_every_tensor, {}),
        (everybody_always, {"rate": 0.05, "rounds": 4, "noise_multiplier": 1.0}),
    ],
)
def test_a_broken_mechanism_is_caught(
    breaks: Break, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert audited(3, **settings).holds
    breaks(monkeypatch)
    found = audited(3, **settings)
    assert found.guesses.epsilon_low > found.epsilon
    assert not found.holds


def test_noise_that_clients_add_is_not_called_broken_where_there_are_none() -> None:
    shared = Private(
        FedAvg(), clip=0.5, noise_multiplier=5.0, noise="distributed", rounds=1, threshold=50
    )
    with pytest.raises(ValueError, match="clients add it within secure sums"):
        audit_mechanism(shared, rate=1.0, rounds=1, seed=1)


def test_promises_are_examined_by_as_many_canaries_as_delta_is_for() -> None:
    assert most_canaries(1e-5) == 200
    assert most_canaries(0.01) == 99
    with pytest.raises(
        ValueError, match=r"private.delta must be below 1 / number of clients \(200\)"
    ):
        audit_mechanism(
            Private(FedAvg(), clip=1.0, noise_multiplier=1.0, delta=0.01),
            rate=1.0,
            rounds=1,
            seed=0,
        )
