"""Private: what leaves a client is bounded, what the server passes on is noisy, and who took part is secret."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from fedloom.algorithms.ditto import Ditto
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.flasc import Flasc
from fedloom.algorithms.freeze import Freeze
from fedloom.algorithms.private import Private
from fedloom.algorithms.prune import Prune
from fedloom.algorithms.scaffold import Scaffold
from fedloom.core.params import norm
from fedloom.core.payloads import NoReplies
from fedloom.core.protocols import Algorithm, Done, Params, Reply, Round, Task
from fedloom.core.sparsity import Density
from fedloom.privacy.accountant import Ledger
from fedloom.server.optimizers import Adam

QUARTER = Density(0.25)
INNER: dict[str, Algorithm[Any]] = {
    "fedavg": FedAvg(),
    "fedadam with fedprox": FedAvg(Adam(), mu=0.1),
    "scaffold": Scaffold(),
    "flasc(fedavg)": Flasc(FedAvg(), Density(0.5), QUARTER),
    "prune(fedavg)": Prune(FedAvg(), Density(0.5)),
    "freeze(fedavg)": Freeze(FedAvg(), ("b",)),
    "ditto(scaffold)": Ditto(Scaffold()),
}
START = {
    "a": torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4),
    "b": torch.linspace(1, 2, 4, dtype=torch.float64),
}


def population(count: int) -> dict[str, dict[str, str]]:
    return {f"c{i:02}": {} for i in range(count)}


def everybody(count: int, number: int = 1, rate: float = 1.0) -> Round:
    clients = population(count)
    return Round(number, number, clients, tuple(clients), rate)


def replies(uploads: Sequence[Sequence[float]]) -> list[Reply]:
    return [
        Reply(f"c{i:02}", {"delta": {"w": torch.tensor(values, dtype=torch.float64)}})
        for i, values in enumerate(uploads)
    ]


def vector(values: Sequence[float]) -> Params:
    return {"w": torch.tensor(values, dtype=torch.float64)}


# --- on the client --------------------------------------------------------------------------------


def test_what_leaves_a_client_is_clipped_and_says_nothing_else(drive: Any, task: Any) -> None:
    half = Private(FedAvg(), 1.0, noise_multiplier=1.0).client_update(task(params=[0.0, 0.0]), {})
    reply, client_state, _ = drive(
        half, lambda fit: Done({"w": torch.tensor([3.0, 4.0])}, 777, 5, 0.1, metrics={"loss": 2.0})
    )
    assert reply.upload["delta"]["w"].tolist() == pytest.approx([0.6, 0.8])
    assert norm(reply.upload) <= 1 + 1e-6
    assert reply == Reply("c", reply.upload, weight=1.0, metrics={})
    assert client_state == {}


def test_a_short_upload_is_sent_as_it_is(drive: Any, task: Any) -> None:
    half = Private(FedAvg(), 9.0, noise_multiplier=1.0).client_update(task(params=[0.0]), {})
    reply, _, _ = drive(half, lambda fit: Done({"w": torch.tensor([0.25])}, 1))
    assert float(reply.upload["delta"]["w"]) == 0.25


def test_all_groups_are_clipped_as_one(drive: Any, task: Any) -> None:
    half = Private(Scaffold(), 0.1, noise_multiplier=1.0).client_update(
        task(params=[0.0, 0.0], control=[0.0, 0.0]), {}
    )
    reply, client_state, _ = drive(
        half, lambda fit: Done({"w": torch.tensor([3.0, 4.0])}, 1, 1, 0.5)
    )
    assert set(reply.upload) == {"delta", "control_delta"}
    assert norm(reply.upload) == pytest.approx(0.1, rel=1e-6)
    assert float(client_state["control"]["w"][0]) == -6, "what is kept is not clipped"


@pytest.mark.parametrize("name", INNER)
def test_no_upload_of_any_composition_is_longer_than_the_clip(
    name: str, world: Any, parabola: Any
) -> None:
    losses = [parabola(center=a, num_examples=n) for a, n in ((5.0, 2), (-9.0, 5), (4.0, 1))]
    for clip in (0.01, 1.0):
        algorithm = Private(INNER[name], clip, noise_multiplier=0.5, delta=0.1, noise_seed=1)
        place = world(algorithm, losses, START)
        for _ in range(3):
            place.play(1)
            assert all(norm(reply.upload) <= clip * (1 + 1e-6) for reply in place.replies)
            assert all(reply.weight == 1 and not reply.metrics for reply in place.replies)
        assert place.state.mechanism.ledger == Ledger(((1.0, 0.5, 3),))


# --- the noisy mean -------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", [FedAvg(weighting="uniform"), Scaffold(), FedAvg(Adam(0.1))])
def test_without_clip_and_noise_it_is_the_uniform_mean(
    inner: Any, world: Any, parabola: Any
) -> None:
    losses = [parabola(center=a) for a in (1.0, -2.0, 0.5, 3.0, -0.7)]
    with_private = world(Private(inner, math.inf, noise_multiplier=0.0), losses, START)
    without = world(inner, losses, START)
    for place in (with_private, without):
        place.play(4)
    for name, value in without.state.params.items():
        difference = (with_private.state.inner.params[name] - value).abs().max()
        assert float(difference) < 1e-15 * max(1.0, float(value.abs().max()))


def test_the_hand_computed_round_of_flasc_with_clip_and_without_noise() -> None:
    """flasc.md section 7: C = .15; the paper's code divides the sum by C, which ours does not."""
    sent = replies([[-0.1, 0, 0.2, 0, 0, 0, 0, 0], [0, -0.3, 0, 0, 0, 0.1, 0, 0]])
    assert [norm(r.upload) for r in sent] == pytest.approx([0.2236068, 0.3162278], abs=1e-7)
    algorithm = Private(FedAvg(), 0.15, noise_multiplier=0.0)
    start = vector([0.8, -0.1, 0.05, -0.6, 0, 0, 0.3, 0])
    after, told = algorithm.server_update(algorithm.init(start, 0), everybody(2), sent)
    theirs = [0.2236068, 0.4743416, -0.4472136, 0, 0, -0.1581139, 0, 0]
    moved = (after.inner.params["w"] - start["w"]).tolist()
    assert moved == pytest.approx([-0.15 * g for g in theirs], abs=1e-8)
    exact = [0.1 / math.sqrt(0.05), 0.3 / math.sqrt(0.1), -0.2 / math.sqrt(0.05), 0, 0]
    assert moved[:5] == pytest.approx([-0.15 * g / 2 for g in exact], abs=1e-12)
    assert told == {"clip": 0.15, "noise_std": 0.0}


def test_the_denominator_is_the_expected_cohort_whoever_replied() -> None:
    algorithm = Private(FedAvg(), 10.0, noise_multiplier=0.0)
    state = algorithm.init(vector([0.0]), 0)
    for count in (1, 2, 5):
        after, _ = algorithm.server_update(state, everybody(20, rate=0.1), replies([[3.0]] * count))
        assert float(after.inner.params["w"]) == pytest.approx(3 * count / 2, abs=1e-15)


def test_the_server_clips_what_a_client_did_not() -> None:
    algorithm = Private(FedAvg(), 0.5, noise_multiplier=0.0)
    state = algorithm.init(vector([0.0, 0.0]), 0)
    evil = replies([[3e6, 4e6], [0.1, 0.0], [math.nan, 1.0]])
    evil[0] = dataclasses.replace(evil[0], weight=1e9, metrics={"loss": -1e9})
    after, _ = algorithm.server_update(state, everybody(3), evil)
    assert (after.inner.params["w"] * 3).tolist() == pytest.approx([0.4, 0.4])


def test_noise_on_the_mean_is_sigma_c_over_the_expected_number_of_clients() -> None:
    algorithm = Private(FedAvg(), 0.2, noise_multiplier=1.5)
    state = algorithm.init({"w": torch.zeros(1_000_000)}, 0)
    upload = {"delta": {"w": torch.zeros(1_000_000)}}
    round = everybody(40, rate=0.25)
    after, told = algorithm.server_update(state, round, [Reply("c00", upload)])
    assert float(after.inner.params["w"].std()) == pytest.approx(1.5 * 0.2 / 10, rel=0.01)
    assert told["noise_std"] == pytest.approx(1.5 * 0.2 / 10)
    assert told["epsilon"] == Ledger(((0.25, 1.5, 1),)).epsilon(1e-5)


@pytest.mark.parametrize("name", INNER)
def test_a_mean_of_nobody_is_noise_of_the_right_shape(name: str, world: Any, parabola: Any) -> None:
    algorithm = Private(INNER[name], 0.5, noise_multiplier=1.0, delta=0.1, noise_seed=1)
    place = world(algorithm, [parabola(), parabola()], START)
    place.play(1)
    round = dataclasses.replace(place.round, number=2)
    after, _ = algorithm.server_update(place.state, round, [])
    before, now = place.state.inner, after.inner
    while "params" not in vars(now):
        before, now = before.inner, now.inner
    moved = {n: float((now.params[n] - t).abs().max()) for n, t in before.params.items()}
    assert all(0 < step < 10 for step in moved.values()), moved
    assert after.mechanism.ledger.num_releases == 2


def test_without_noise_a_mean_of_nobody_is_no_mean() -> None:
    algorithm = Private(FedAvg(), 0.5, noise_multiplier=0.0)
    with pytest.raises(NoReplies):
        algorithm.server_update(algorithm.init(vector([0.0]), 0), everybody(3), [])


def test_an_empty_cohort_is_broadcast_to_nobody() -> None:
    algorithm = Private(Flasc(FedAvg()), 0.5, noise_multiplier=1.0, noise_seed=0)
    state = algorithm.init(START, 0)
    sent = algorithm.broadcast(state, everybody(3, rate=1e-12))
    assert sent == {}
    after, told = algorithm.server_update(state, everybody(3, rate=1e-3), [])
    assert told["download_density"] > 0, "said of what everybody would be sent"
    assert after.inner.params["a"].shape == (3, 4)


# --- where the noise is ---------------------------------------------------------------------------


def test_on_the_support_nothing_moves_where_the_download_was_zero(drive: Any) -> None:
    algorithm = Private(
        Flasc(FedAvg(), QUARTER, Density(1.0)),
        1.0,
        noise_multiplier=1.0,
        noise_on="support",
        noise_seed=1,
    )
    state, round = algorithm.init(START, 0), everybody(2)
    sent = algorithm.broadcast(state, round)
    support = {n: t != 0 for n, t in sent["c00"]["params"].items()}
    assert sum(int(t.sum()) for t in support.values()) == 4
    task = Task("train", 1, "c00", 0, {}, sent["c00"])
    reply, _, _ = drive(
        algorithm.client_update(task, {}),
        lambda fit: Done({n: t + 1 for n, t in fit.start.items()}, 1),
    )
    outside = Reply("c01", {"delta": {n: torch.ones_like(t) for n, t in START.items()}})
    after, _ = algorithm.server_update(state, round, [reply, outside])
    for name, start in START.items():
        inside = support[name]
        assert bool(reply.upload["delta"][name][inside].all())
        assert not bool(reply.upload["delta"][name][~inside].any())
        assert torch.equal(after.inner.params[name][~inside], start[~inside])
        assert bool((after.inner.params[name] != start)[inside].all())


def test_on_the_support_of_an_unmoved_start_everything_may_move() -> None:
    algorithm = Private(FedAvg(), 1.0, noise_multiplier=1.0, noise_on="support", noise_seed=1)
    state = algorithm.init(vector([0.0, 0.0, 0.0]), 0)
    after, _ = algorithm.server_update(state, everybody(2), replies([[1.0, 0.0, 0.0]]))
    assert bool(after.inner.params["w"].all())


def test_tiers_share_the_support_of_the_densest() -> None:
    density = Density(0.5, tiers={"phone": 0.25})
    algorithm = Private(
        Flasc(FedAvg(), density), 1.0, noise_multiplier=1.0, noise_on="support", noise_seed=1
    )
    clients = {"a": {"tier": "phone"}, "b": {"tier": "desk"}}
    start = vector([1.0, 2.0, 3.0, 4.0])
    state = algorithm.init(start, 0)
    # Only the phone replies, which must not show.
    phone = replies([[0.0, 0.0, 1.0, 1.0]])
    after, _ = algorithm.server_update(state, Round(1, 1, clients, ("a",), 1.0), phone)
    assert (after.inner.params["w"] != start["w"]).tolist() == [False, False, True, True]


def test_a_start_of_which_a_part_could_never_move_is_refused() -> None:
    algorithm = Private(FedAvg(), 1.0, noise_multiplier=1.0, noise_on="support")
    with pytest.raises(
        ValueError, match=r"would never move lora_B, .* set the origin of tune to initial"
    ):
        algorithm.init({"lora_A": torch.ones(2), "lora_B": torch.zeros(2)}, 0)


# --- secrets --------------------------------------------------------------------------------------


def played(algorithm: Any, world: Any, parabola: Any) -> Any:
    place = world(algorithm, [parabola(center=1.0) for _ in range(3)])
    place.play(2)
    return place.state


def test_two_runs_of_one_recipe_differ_unless_a_seed_says_otherwise(
    world: Any, parabola: Any
) -> None:
    def last(seed: int | None) -> float:
        algorithm = Private(FedAvg(), 1.0, noise_multiplier=1.0, noise_seed=seed)
        return float(played(algorithm, world, parabola).inner.params["w"])

    assert last(None) != last(None)
    assert last(7) == last(7) != last(8)


def test_cohorts_are_poisson_draws_of_the_secret_key() -> None:
    def cohorts(seed: int | None) -> list[list[str]]:
        algorithm = Private(FedAvg(), 1.0, noise_multiplier=1.0, noise_seed=seed)
        state = algorithm.init(vector([0.0]), 0)
        return [list(algorithm.broadcast(state, everybody(50, n, 0.3))) for n in range(1, 81)]

    drawn = cohorts(1)
    assert drawn == cohorts(1)
    assert drawn != cohorts(2)
    assert cohorts(None) != cohorts(None)
    sizes = torch.tensor([float(len(cohort)) for cohort in drawn])
    assert float(sizes.mean()) == pytest.approx(15, abs=1.2)
    assert float(sizes.var()) == pytest.approx(50 * 0.3 * 0.7, rel=0.4), "not of one size"
    everyone = Private(FedAvg(), 1.0, noise_multiplier=1.0)
    assert len(everyone.broadcast(everyone.init(vector([0.0]), 0), everybody(50))) == 50


def test_the_inner_server_half_never_learns_who_took_part() -> None:
    seen = []

    class Nosy(FedAvg):
        def server_update(self, state: Any, round: Round, replies: Any) -> Any:
            heard = list(replies)
            seen.append((tuple(round.cohort), [r.client for r in heard]))
            return FedAvg.server_update(self, state, round, heard)

    algorithm = Private(Nosy(), 1.0, noise_multiplier=1.0)
    algorithm.server_update(
        algorithm.init(vector([0.0]), 0), everybody(3, rate=0.5), replies([[1.0], [2.0]])
    )
    assert seen == [(("c00", "c01", "c02"), ["mean of the cohort"])]


# --- the clip that follows the clients ------------------------------------------------------------


def test_clients_are_told_the_clip_and_say_whether_they_were_below_it(drive: Any) -> None:
    algorithm = Private(FedAvg(), 0.5, noise_multiplier=0.0, quantile=0.75)
    state = algorithm.init(vector([0.0]), 0)
    state = dataclasses.replace(state, mechanism=dataclasses.replace(state.mechanism, clip=0.3))
    sent, said = algorithm.broadcast(state, everybody(4)), []
    assert sent["c00"] is sent["c03"], "one payload"
    for push, (client, download) in zip((0.1, 0.3, 0.31, 9.0), sent.items(), strict=True):
        half = algorithm.client_update(Task("train", 1, client, 0, {}, download), {})
        reply, _, _ = drive(half, lambda fit, push=push: Done({"w": fit.start["w"] + push}, 1))
        assert norm({"delta": reply.upload["delta"]}) <= 0.3 * (1 + 1e-6)
        said.append(reply)
    assert [bool(reply.upload["private"]["below"]) for reply in said] == [True, True, False, False]
    after, told = algorithm.server_update(state, everybody(4), said)
    assert told == {"clip": 0.3, "noise_std": 0.0, "below_clip": 0.5}
    assert after.mechanism.clip == 0.3 * math.exp(-0.2 * (0.5 - 0.75))
    assert float(after.inner.params["w"]) == pytest.approx((0.1 + 3 * 0.3) / 4)


def test_the_noise_of_the_bits_is_in_the_budget() -> None:
    """Andrew et al., theorem 1: z^-2 = z_delta^-2 + (2 sigma_b)^-2, sigma_b of clients / 20, at least z."""
    for count, z, bit_std in ((1000, 2.0, 50.0), (20, 2.0, 2.0)):
        algorithm = Private(
            FedAvg(), 0.5, noise_multiplier=z, delta=1e-4, quantile=0.5, noise_seed=1
        )
        state = algorithm.init({"w": torch.zeros(400_000)}, 0)
        upload = {
            "delta": {"w": torch.zeros(400_000)},
            "private": {"below": torch.tensor(True)},
        }
        after, told = algorithm.server_update(state, everybody(count), [Reply("c00", upload)])
        std = float(after.inner.params["w"].std()) * count / 0.5
        assert std**-2 + (2 * bit_std) ** -2 == pytest.approx(z**-2, rel=0.01)
        assert told["noise_std"] * count / 0.5 == pytest.approx(std, rel=0.01)
        assert after.mechanism.ledger == Ledger(((1.0, z, 1),))


def test_a_client_can_only_say_yes_or_no() -> None:
    algorithm = Private(FedAvg(), 0.5, noise_multiplier=0.0, quantile=0.5)
    state, moved = algorithm.init(vector([0.0]), 0), []
    for below in (torch.tensor(True), torch.tensor(1e30)):
        upload = {"delta": vector([0.0]), "private": {"below": below}}
        after, _ = algorithm.server_update(state, everybody(1), [Reply("c00", upload)])
        moved.append(after.mechanism.clip)
    assert moved == [0.5 * math.exp(-0.2 * 0.5)] * 2


# --- what is refused ------------------------------------------------------------------------------


class SeesEach(FedAvg):
    server_sees = "each"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"inner": SeesEach()}, "reads the mean of uploads, got SeesEach, which reads each"),
        (
            {"inner": Private(FedAvg(), 1.0, noise_multiplier=1.0)},
            "reads the mean of uploads, got Private, which reads noisy mean",
        ),
        ({"clip": math.inf}, r"private\.clip must be a positive number"),
        ({"epsilon": 1.0}, "needs either epsilon or noise_multiplier"),
        ({"noise_on": "download"}, r"noise_on must be everywhere or support, got 'download'"),
    ],
)
def test_what_voids_the_guarantee_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Private(**{"inner": FedAvg(), "clip": 1.0, "noise_multiplier": 1.0, **fields})


def test_an_algorithm_that_chooses_its_own_clients_is_refused() -> None:
    class Choosy(FedAvg):
        def broadcast(self, state: Any, round: Round) -> Any:
            return {"c00": {"params": state.params}}

    algorithm = Private(Choosy(), 1.0, noise_multiplier=1.0)
    with pytest.raises(ValueError, match="private draws cohorts, got an algorithm below it"):
        algorithm.broadcast(algorithm.init(vector([0.0]), 0), everybody(3))


def test_a_wrapper_around_it_is_private_too() -> None:
    inner = Private(FedAvg(), 1.0, noise_multiplier=1.0)
    assert Ditto(inner).server_sees == Flasc(inner).server_sees == "noisy mean"
