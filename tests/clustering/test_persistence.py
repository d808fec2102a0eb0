"""What comes back of clients' noise, and whether clusters should go further: by hand, and on average."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.fedkseed import FedKSeed
from fedloom.algorithms.flasc import Flasc
from fedloom.clustering.pace import Pace, paced
from fedloom.clustering.persistence import SAMPLE, Heard, Memory, remembered, sample_of
from fedloom.clustering.pooling import Variances, pool
from fedloom.core.description import describe
from fedloom.core.protocols import Reply
from fedloom.server.optimizers import Adam, Momentum

PAIRS = {"a": 0, "b": 0, "c": 1, "d": 1}
SIZE = 400


def sent(values: Mapping[str, float | Tensor]) -> list[Reply]:
    """Return a reply a client, of one number or of a tensor."""
    return [
        Reply(c, {"delta": {"w": torch.as_tensor(v, dtype=torch.float64).reshape(-1)}}, 1.0)
        for c, v in values.items()
    ]


def after(*rounds: Mapping[str, float]) -> Variances:
    """Return what is known after rounds of clients a, b | c, d."""
    known = Variances()
    for values in rounds:
        known = pool(sent(values), PAIRS, known).variances
    return known


def four(a: float, b: float, c: float, d: float) -> dict[str, float]:
    return {"a": a, "b": b, "c": c, "d": d}


# --- what lasts -------------------------------------------------------------------------------------


def test_noise_that_comes_back_every_round_is_never_less() -> None:
    known = after(four(1, 3, -1, -3), four(1, 3, -1, -3))
    assert known.memory.lasting == pytest.approx(1)
    assert known.memory.noise(0) == pytest.approx(1 / 2)
    found = pool(sent(four(1, 3, -1, -3)), PAIRS, known)
    assert found.keeps(0, "w") == pytest.approx(7 / 8)


def test_noise_that_is_new_every_round_averages_out() -> None:
    known = after(four(1, 3, -1, -3), four(3, 1, -3, -1))
    assert known.memory.lasting == 0  # The products of residuals are negative.
    assert known.memory.noise(0) == pytest.approx(1 / 4)
    second = pool(sent(four(3, 1, -3, -1)), PAIRS, after(four(1, 3, -1, -3)))
    assert second.keeps(0, "w") == pytest.approx(7 / (7 + 2 / 4))


def test_until_two_rounds_can_be_compared_all_of_it_lasts() -> None:
    assert Memory().lasting == 1
    assert after(four(1, 3, -1, -3)).memory.lasting == 1


def test_clients_who_take_turns_are_more_than_one_that_always_replies() -> None:
    turns = remembered(Memory(), [Heard("a", 0, 1.0, torch.zeros(1))])
    turns = remembered(turns, [Heard("b", 0, 1.0, torch.zeros(1))])
    assert turns.noise(0) == pytest.approx(1 / 2)
    always = remembered(Memory(), [Heard("a", 0, 1.0, torch.zeros(1))])
    always = remembered(always, [Heard("a", 0, 1.0, torch.zeros(1))])
    assert always.noise(0) == pytest.approx(1)


def test_who_comes_to_another_cluster_begins_anew_there() -> None:
    memory = remembered(Memory(), [Heard("a", 0, 0.5, torch.ones(2))])
    moved = remembered(memory, [Heard("a", 1, 0.5, torch.ones(2))])
    assert moved.products == 0
    assert moved.replies == {"a": 1}
    assert moved.shares == {0: {"a": 0.5}, 1: {"a": 0.5}}


@pytest.mark.parametrize("turnout", [1.0, 0.6])
def test_what_lasts_is_right_on_average(turnout: float) -> None:
    draw = torch.Generator().manual_seed(1)

    def noise(variance: float) -> Tensor:
        return variance**0.5 * torch.randn(SIZE, generator=draw, dtype=torch.float64)

    cluster_of = {f"{k}{i}": k for k, many in enumerate((2, 3, 5)) for i in range(many)}
    found = []
    for _ in range(20):
        own = {client: noise(0.3) for client in cluster_of}
        known = Variances()
        for _ in range(8):
            drawn = torch.rand(len(cluster_of), generator=draw) < turnout
            here = [c for c, there in zip(cluster_of, drawn.tolist(), strict=True) if there]
            if here:
                replies = sent({c: own[c] + noise(0.7) for c in here})
                known = pool(replies, cluster_of, known).variances
        found.append(known.memory.lasting)
    assert sum(found) / len(found) == pytest.approx(0.3, abs=0.01)


def test_a_small_difference_that_comes_back_is_followed_the_further_the_longer() -> None:
    draw = torch.Generator().manual_seed(2)
    far = torch.randn(SIZE, generator=draw, dtype=torch.float64) * 0.3
    known, told = Variances(), []
    for _ in range(12):
        replies = {
            c: (far if k else -far) + torch.randn(SIZE, generator=draw, dtype=torch.float64)
            for c, k in PAIRS.items()
        }
        found = pool(sent(replies), PAIRS, replace(known, pace=Pace()))
        known = found.variances
        told.append(found.mean_lambda)
    truth = (
        2 * 0.09
    )  # Twice: each of the two is so far from their mean, whose own deviation has one degree of freedom.
    assert told[0] == pytest.approx(truth / (truth + 1 / 2), abs=0.12)
    assert told[-1] > 0.7


def test_of_large_updates_a_sample_is_kept() -> None:
    update = {"a": torch.arange(60_000.0).view(300, 200), "b": torch.tensor([7.0])}
    kept = sample_of(update)
    assert 0.9 * SAMPLE < len(kept) < 1.1 * SAMPLE
    assert kept[-1] == 7
    small = {"a": torch.arange(10.0)}
    assert sample_of(small).tolist() == list(range(10))


# --- how far to go ----------------------------------------------------------------------------------


def told(deviation: Tensor, residual: Tensor, known: Pace, *, went: float = 0.2) -> Pace:
    """Return the pace after a round of two clusters of two that are apart by twice a deviation."""
    heard = [Heard(c, k, 0.5, residual if c in "ac" else -residual) for c, k in PAIRS.items()]
    parts = dict.fromkeys(PAIRS, 0.25)
    return replace(paced(known, heard, parts, {0: deviation, 1: -deviation}), went=went)


def deviations(*shares: float) -> list[Tensor]:
    draw = torch.Generator().manual_seed(3)
    whole = torch.randn(SIZE, generator=draw)
    return [share * whole for share in shares]


def run(shares: Sequence[float], *, went: float = 0.2) -> list[float]:
    """Return the gain by round, where clients of a cluster agree and a share of a first deviation is left in each round."""
    known, gains = Pace(), []
    for each in deviations(*shares):
        known = told(each, torch.full((SIZE,), 1e-4), known, went=went)
        gains.append(known.gain)
    return gains


def test_a_deviation_that_is_still_there_is_followed_further() -> None:
    # A quarter is used up, then a third: by the factors 4 and 3, cut off at 2.
    assert run([1, 0.75, 0.5]) == pytest.approx([1, 2, 4])
    # 0.7 of it is used up: 1 / 0.7.
    assert run([1, 0.3]) == pytest.approx([1, 1 / 0.7], rel=1e-4)


def test_a_deviation_that_turned_round_is_followed_less_but_not_less_than_shrinkage_says() -> None:
    assert run([1, 0.75, -0.375]) == pytest.approx([1, 2, 2 / 1.5], rel=1e-4)
    assert run([1, -1]) == pytest.approx([1, 1])


def test_where_clusters_did_not_go_their_way_nothing_is_learnt_of_how_far_to_go() -> None:
    assert run([1, 1, 1], went=0.0) == [1, 1, 1]


def test_of_a_handful_of_entries_nothing_is_learnt() -> None:
    known = Pace()
    for _ in range(3):
        heard = [Heard(c, k, 0.5, torch.full((4,), 1e-4)) for c, k in PAIRS.items()]
        found = paced(
            known, heard, dict.fromkeys(PAIRS, 0.25), {0: torch.ones(4), 1: -torch.ones(4)}
        )
        known = replace(found, went=0.2)
    assert known.gain == 1


def test_what_clients_want_for_themselves_is_no_reason_to_go_further() -> None:
    draw = torch.Generator().manual_seed(4)
    gains = []
    for _ in range(30):
        own = {c: torch.randn(SIZE, generator=draw, dtype=torch.float64) for c in PAIRS}
        known = Variances()
        for _ in range(4):
            values = {
                c: own[c] + torch.randn(SIZE, generator=draw, dtype=torch.float64) for c in PAIRS
            }
            known = pool(sent(values), PAIRS, known).variances
            known = replace(known, pace=replace(known.pace, went=0.2))
        gains.append(known.pace.gain)
    assert sum(gain > 1 for gain in gains) <= 5


def test_where_the_server_makes_another_step_of_it_nothing_is_learnt_of_how_far_to_go() -> None:
    deviation = torch.randn(SIZE, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    own = {"a": 0.1, "b": -0.1, "c": 0.1, "d": -0.1}
    gains = {}
    for by_itself in (False, True):
        known = Variances()
        for _ in range(3):
            replies = sent(
                {c: (1 - 2 * k) * deviation + own[c] * deviation.roll(1) for c, k in PAIRS.items()}
            )
            known = pool(replies, PAIRS, known, by_itself=by_itself).variances
        gains[by_itself] = known.pace.gain
    assert gains == {False: pytest.approx(4), True: 1}
    assert known.memory == Memory(), "and each round is judged by itself"
    assert describe(FedAvg(server=Adam(0.01))).rescales
    assert describe(FedKSeed(server=Adam(0.01), uploads="delta")).rescales
    assert not describe(Flasc(FedAvg(server=Momentum()))).rescales


def test_lambda_follows_the_gain_that_is_known() -> None:
    known = Variances(noise={"w": 2.0}, spread={"w": 7.0}, pace=Pace(gain=4.0, went=0.5))
    found = pool(sent(four(1, 3, -1, -3)), PAIRS, known)
    assert found.keeps(0, "w") == pytest.approx(28 / (28 + 2 / 2))
    assert found.variances.pace.went == pytest.approx(28 / 29), "the next round asks how far"
