"""A run of noisy means: the clip follows the clients, the ledger counts, absent clients change no denominator."""

from typing import Any

import pytest
import torch

from fedloom.core.protocols import Payload, Round
from fedloom.privacy.accountant import Ledger
from fedloom.privacy.clipping import clipped
from fedloom.privacy.mechanism import SIGNAL, Mechanism
from fedloom.privacy.noise import secret_key

CLIENTS: dict[str, dict[str, str]] = {f"c{i:03}": {} for i in range(200)}
NORMS = {client: 0.1 * 100 ** ((i + 0.5) / 200) for i, client in enumerate(CLIENTS)}
"""Log-uniform on [0.1, 10]."""


def nobodys() -> Payload:
    return {"delta": {"w": torch.ones(1, dtype=torch.float64)}}


def upload(client: str, clip: float) -> Payload:
    push = {"delta": {"w": torch.full((1,), NORMS[client], dtype=torch.float64)}}
    sent, size = clipped(push, clip)
    return {**sent, SIGNAL: {"below": torch.tensor(size <= clip)}}


@pytest.mark.parametrize(("quantile", "begin"), [(0.5, 0.01), (0.5, 50.0), (0.8, 1.0)])
def test_an_adaptive_clip_reaches_the_quantile_of_the_norms(quantile: float, begin: float) -> None:
    mechanism, clips = Mechanism(secret_key(3), begin, 1.0), []
    for number in range(1, 161):
        round = Round(number, number, CLIENTS, (), 0.5)
        said = [upload(client, mechanism.clip) for client in mechanism.cohort(round)]
        _, mechanism, told = mechanism.release(
            said, round, kept={}, quantile=quantile, nobodys=nobodys
        )
        clips.append(told["clip"])
    assert sum(clips[-60:]) / 60 == pytest.approx(0.1 * 100**quantile, rel=0.1)
    assert mechanism.ledger == Ledger(((0.5, 1.0, 160),))


def test_rounds_without_anybody_are_counted_and_move_the_clip_by_noise_alone() -> None:
    mechanism: Any = Mechanism(secret_key(3), 1.0, 1.0)
    means = []
    for number in range(1, 401):
        round = Round(number, number, CLIENTS, (), 0.05)
        mean, mechanism, told = mechanism.release([], round, kept={}, quantile=0.5, nobodys=nobodys)
        means.append(float(mean["delta"]["w"]) / told["noise_std"])
    assert mechanism.ledger == Ledger(((0.05, 1.0, 400),))
    assert torch.tensor(means).std() == pytest.approx(1, rel=0.1)
    assert 0.05 < mechanism.clip < 20, "a walk without drift"


def test_each_client_is_in_about_as_many_cohorts_as_its_chance_says() -> None:
    mechanism = Mechanism(secret_key(5), 1.0, 1.0)
    times = dict.fromkeys(CLIENTS, 0)
    for number in range(1, 401):
        cohort = mechanism.cohort(Round(number, 0, CLIENTS, (), 0.25))
        assert list(cohort) == sorted(cohort)
        for client in cohort:
            times[client] += 1
    shares = torch.tensor([count / 400 for count in times.values()])
    assert float(shares.mean()) == pytest.approx(0.25, abs=0.01)
    assert float(shares.std()) == pytest.approx((0.25 * 0.75 / 400) ** 0.5, rel=0.2)
    backwards = dict(reversed(CLIENTS.items()))
    assert mechanism.cohort(Round(3, 0, backwards, (), 0.25)) == mechanism.cohort(
        Round(3, 9, CLIENTS, (), 0.25)
    )
