"""A run of noisy means: the clip follows the clients, the ledger counts, absent clients change no denominator."""

from typing import Any

import pytest
import torch

from fedloom.core.protocols import Payload, Reply, Round
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
            said, round, mask={}, quantile=quantile, nobodys=nobodys
        )
        clips.append(told["clip"])
    assert sum(clips[-60:]) / 60 == pytest.approx(0.1 * 100**quantile, rel=0.1)
    assert mechanism.ledger == Ledger(((0.5, 1.0, 160),))


def test_rounds_without_anybody_are_counted_and_move_the_clip_by_noise_alone() -> None:
    mechanism: Any = Mechanism(secret_key(3), 1.0, 1.0)
    means = []
    for number in range(1, 401):
        round = Round(number, number, CLIENTS, (), 0.05)
        mean, mechanism, told = mechanism.release([], round, mask={}, quantile=0.5, nobodys=nobodys)
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


def released(*norms: float, mechanism: Mechanism | None = None, **fields: Any) -> Any:
    """Return the first of two rounds of half of all clients, with uploads of these norms."""
    said = [
        {
            "delta": {"w": torch.full((1,), norm, dtype=torch.float64)},
            SIGNAL: {"below": torch.tensor(norm < 1)},
        }
        for norm in norms
    ]
    round = Round(1, 1, CLIENTS, (), 0.5)
    mechanism = mechanism or Mechanism(secret_key(3), 2.0, 1.0)
    return mechanism.release(
        said, round, **{"mask": {}, "quantile": 0.5, "nobodys": nobodys, **fields}
    )


def test_sums_that_differ_have_noise_of_their_own_and_the_same_one_the_same() -> None:
    def noise(*norms: float) -> float:
        mean, _, _ = released(*norms)
        return float(mean["delta"]["w"]) * 100 - sum(norms)

    assert noise(0.5, 0.25) == noise(0.25, 0.5) == noise(0.75, 0.0), "one sum of as many"
    apart = [noise(0.5, 0.25), noise(0.5), noise(0.75), noise(0.5, 0.75), noise(), noise(0.0)]
    assert len({round(x, 6) for x in apart}) == len(apart)


def test_the_noise_of_the_bits_is_bound_to_the_sum_too() -> None:
    """Two sums of as many clients below the clip: their shares differ by noise."""
    shares = {released(*norms)[2]["below_clip"] for norms in ((0.5, 0.25), (0.5, 0.3), (0.5, 0.25))}
    assert len(shares) == 2


def test_a_release_is_on_the_account_once_and_another_of_its_round_beside_it() -> None:
    _, once, _ = released(0.5, 0.25)
    _, again, _ = released(0.5, 0.25, mechanism=once)
    assert again.released != once.released, "the clip has moved: another release"
    same = Mechanism(secret_key(3), 2.0, 1.0).charge(once.released)
    _, same, _ = released(0.5, 0.25, mechanism=same)
    assert same.released == once.released
    _, other, _ = released(0.5, mechanism=Mechanism(secret_key(3), 2.0, 1.0).charge(once.released))
    assert len(other.released) == 2
    ((rate, z, count),) = other.ledger.releases
    assert (rate, count) == (0.5, 1)
    assert z == pytest.approx(1 / 2**0.5)


def test_who_is_asked_does_not_depend_on_who_else_is_there() -> None:
    mechanism = Mechanism(secret_key(5), 1.0, 1.0)
    few = {client: CLIENTS[client] for client in list(CLIENTS)[50:90]}
    everybody = mechanism.cohort(Round(3, 0, CLIENTS, (), 0.25))
    assert mechanism.cohort(Round(3, 0, few, (), 0.25)) == tuple(c for c in everybody if c in few)


def test_a_weight_that_a_client_made_up_magnifies_nobody_in_a_sum() -> None:
    """Four whose sum is 3, as weights that add up to less than four make another mean of it."""
    means = []
    for weight in (4.0, 0.5):
        mean = {"delta": {"w": torch.full((1,), 3.0 / weight, dtype=torch.float64)}}
        found, _, _ = released(quantile=None, sums=[Reply("c000", mean, weight, count=4)])
        means.append(float(found["delta"]["w"]))
    assert means[0] == means[1]


def test_an_upload_without_noise_is_no_part_of_a_mean_whose_clients_add_it() -> None:
    with pytest.raises(ValueError, match="got a client's upload by itself, which has no noise"):
        released(0.5, quantile=None, distributed=True)
