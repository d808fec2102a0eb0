"""FedEx: chances by hand, the first round, a planted best arm, and what is refused."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedloom.algorithms.clustered import Clustered
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.fedex import FedEx
from fedloom.algorithms.private import Private
from fedloom.core.arms import Arm, ArmRule, Chances, gradient, stepped
from fedloom.core.protocols import ClientError, Done, Evaluate, Fit, Reply, Round, Task
from fedloom.recipe import RecipeError, load_recipe
from fedloom.reopen import binding_of

HALF = torch.tensor([0.5, 0.5], dtype=torch.float64)
ETA = math.sqrt(2 * math.log(2))
BOTH = [(0, 0.8, 3.0), (1, 0.4, 3.0)]


@pytest.mark.parametrize("baseline", [0.0, 0.6, 5.0])
def test_the_baseline_cancels_where_both_arms_were_drawn(baseline: float) -> None:
    """By hand: g = (.8 - b, .4 - b), and theta_1 = 1 / (1 + exp(1.17741 * .4))."""
    slope = gradient(HALF, BOTH, baseline)
    assert slope.tolist() == pytest.approx([0.8 - baseline, 0.4 - baseline])
    after = stepped(HALF.log(), slope, ETA).exp()
    assert after.tolist() == pytest.approx([0.384388, 0.615612], abs=1e-6)


@pytest.mark.parametrize("kind", ["round", "past"])
def test_chances_after_a_round_are_those_by_hand(kind: Any) -> None:
    rule = ArmRule(schedule="constant", floor=0.0, baseline=kind)
    after = rule.after(Chances.alike(2), BOTH)
    assert rule.drawn_by(after).tolist() == pytest.approx([0.384388, 0.615612], abs=1e-6)
    assert after.entropy < math.log(2)


def test_a_good_arm_that_alone_was_drawn_in_the_first_round_does_not_become_less_likely() -> None:
    good = [(1, 0.4, 1.0)]
    # What a baseline of 0 makes of it, and one of .6.
    assert float(stepped(HALF.log(), gradient(HALF, good, 0.0), ETA).exp()[1]) == pytest.approx(
        0.281, abs=1e-3
    )
    assert float(stepped(HALF.log(), gradient(HALF, good, 0.6), ETA).exp()[1]) == pytest.approx(
        0.615612, abs=1e-6
    )
    for kind in ("round", "past"):
        after = ArmRule(baseline=kind).after(Chances.alike(2), good)
        assert after.logits.exp().tolist() == pytest.approx([0.5, 0.5])
    # Later rounds are compared with what came before.
    past = ArmRule(schedule="constant", floor=0.0, baseline="past", discount=0.5)
    known = past.after(past.after(Chances.alike(2), [(0, 0.8, 1.0)]), [(0, 0.6, 1.0)])
    assert known.score / known.weight == pytest.approx((0.5 * 0.8 + 0.6) / 1.5)
    assert float(known.logits.exp()[0]) > 0.5


def test_what_a_step_is_divided_by() -> None:
    slope = gradient(HALF, BOTH, 0.6)
    largest = float(slope.abs().max())

    def moved(schedule: Any, rounds: int) -> float:
        rule, known = ArmRule(schedule=schedule, floor=0.0), Chances.alike(2)
        for _ in range(rounds):
            known = rule.after(replace(known, logits=Chances.alike(2).logits), BOTH)
        return float(known.logits[1] - known.logits[0])

    whole = ETA * 2 * largest
    assert moved("constant", 2) == pytest.approx(whole)
    assert moved("decaying", 2) == pytest.approx(whole / 2**0.5)
    assert moved("aggressive", 2) == pytest.approx(whole / largest)
    assert moved("adaptive", 2) == pytest.approx(whole / (2 * largest**2) ** 0.5)


def test_chances_have_a_floor_and_one_arm_may_be_drawn_for_good() -> None:
    sure = Chances(torch.tensor([math.log(0.999), math.log(0.001)], dtype=torch.float64))
    assert ArmRule(floor=0.02).drawn_by(sure).tolist() == pytest.approx([0.98902, 0.01098])
    settled = ArmRule(settled=0.1)
    assert settled.drawn_by(sure).tolist() == [1.0, 0.0]
    assert settled.after(sure, BOTH) is sure


@pytest.mark.parametrize("seed", range(5))
def test_the_planted_best_arm_is_found_within_fifteen_rounds(
    seed: int, world: Callable[..., Any], parabola: Any
) -> None:
    """Of learning rates 1e-6, 1e-1 and 1e+1 the first does nothing and the last diverges."""
    arms = (Arm(1e-5), Arm(1.0), Arm(100.0))
    losses = [parabola(center=4.0 + 0.1 * at, num_examples=2 + at) for at in range(6)]
    place = world(FedEx(FedAvg(), arms), losses, lr=0.1, steps=1)
    place.round = Round(1000 * seed, 0, {}, (), 1.0)
    place.play(15)
    known = place.state.known
    assert int(known.logits.argmax()) == 1
    assert known.entropy < math.log(3) / 2


def test_a_client_trains_as_its_arm_says_and_tells_what_came_of_it(
    drive: Callable[..., Any], task: Any
) -> None:
    algorithm = FedEx(FedAvg(mu=0.1), (Arm(0.5, 2.0, 3), Arm(4.0)))
    first = task(params=[1.0])
    sent = replace(
        first, download={**first.download, "fedex": {"chances": torch.tensor([1.0, 0.0])}}
    )

    def answer(work: Any) -> Done:
        if isinstance(work, Fit):
            return Done({"w": work.start["w"] + 1}, 7, metrics={"loss": 2.0})
        return Done({}, 4, metrics={"loss": float(work.params["w"])})

    reply, _, (fit, after, before) = drive(algorithm.client_update(sent, {}), answer)
    assert (fit.lr_factor, fit.decay_factor, fit.steps) == (0.5, 2.0, 3)
    assert fit.proximal.strength == 0.1
    assert (float(after.params["w"]), float(before.params["w"])) == (2.0, 1.0)
    told = {name: float(value) for name, value in reply.upload["fedex"].items()}
    assert told == {"arm": 0.0, "score": 2.0, "num_examples": 4.0}
    assert float(reply.upload["delta"]["w"]) == 1.0


def test_a_client_without_validation_data_learns_and_has_no_say(
    world: Callable[..., Any], parabola: Any
) -> None:
    place = world(FedEx(FedAvg(), (Arm(), Arm(2.0))), [parabola(center=1.0), parabola(center=2.0)])
    alike = place.state.known

    def nothing(client: str, work: Any, seed: int = 0) -> Done:
        if isinstance(work, Evaluate):
            raise ClientError("no validation examples")
        done: Done = place.trainer.run(client, work, seed)
        return done

    algorithm = place.algorithm
    population: dict[str, dict[str, str]] = {"c0": {}, "c1": {}}
    round = Round(1, 1, population, ("c0", "c1"), 1.0)
    replies = []
    for client, download in algorithm.broadcast(place.state, round).items():
        half = algorithm.client_update(Task("train", 1, client, 5, {}, download), {})
        try:
            work = next(half)
            while True:
                try:
                    done = nothing(client, work)
                except ClientError as refusal:
                    work = half.throw(refusal)
                else:
                    work = half.send(done)
        except StopIteration as stop:
            replies.append(stop.value[0])
    state, _ = algorithm.server_update(place.state, round, replies)
    assert torch.equal(state.known.logits, alike.logits)
    assert float(state.inner.params["w"]) != 0


def test_each_tier_has_chances_of_its_own() -> None:
    algorithm = FedEx(FedAvg(), (Arm(), Arm(2.0)), by_tier=True)
    population = {"a": {"tier": "phone"}, "b": {"tier": "desk"}, "c": {"tier": "desk"}}
    round = Round(1, 1, population, tuple(population), 1.0)
    params = {"w": torch.zeros(1)}
    state = algorithm.init(params, 0)
    sent = algorithm.broadcast(state, round)
    assert sent["b"] is sent["c"]

    def reply(client: str, arm: int, score: float) -> Reply:
        told = {
            "arm": torch.tensor(arm),
            "score": torch.tensor(score),
            "num_examples": torch.tensor(2.0),
        }
        return Reply(client, {"delta": params, "fedex": told})

    told = [reply("a", 0, 0.5), reply("b", 1, 0.9), reply("c", 0, 0.1)]
    after, metrics = algorithm.server_update(state, round, told)
    # Of phones one alone has told; of desks the first arm was better.
    assert metrics["phone/arm_1"] == pytest.approx(0.5)
    assert metrics["desk/arm_1"] > 0.8
    assert after.known == state.known
    chances = algorithm.broadcast(after, round)
    assert float(chances["b"]["fedex"]["chances"][0]) == pytest.approx(metrics["desk/arm_1"])


def test_no_arm_that_is_none_and_no_weight_beyond_what_was_declared() -> None:
    algorithm = FedEx(FedAvg(), (Arm(), Arm(2.0)), rule=ArmRule(schedule="constant"))
    population: dict[str, dict[str, str]] = {c: {"num_examples": "2"} for c in "abc"}
    population["d"] = {}  # has declared nothing
    round = Round(1, 1, population, tuple(population), 1.0)
    state = algorithm.init({"w": torch.zeros(1)}, 0)

    def after(*told: tuple[str, int, float, float]) -> list[float]:
        replies = [
            Reply(
                client,
                {
                    "delta": {"w": torch.zeros(1)},
                    "fedex": {
                        "arm": torch.tensor(arm),
                        "score": torch.tensor(score),
                        "num_examples": torch.tensor(weight),
                    },
                },
            )
            for client, arm, score, weight in told
        ]
        chances: list[float] = (
            algorithm.server_update(state, round, replies)[0].known.logits.exp().tolist()
        )
        return chances

    plain = after(("a", 0, 0.5, 2.0), ("b", 1, 1.0, 2.0))
    assert plain[0] > 0.5
    assert after(("a", 0, 0.5, 2.0), ("b", 1, 1.0, 1e9), ("c", 7, 0.0, 2.0)) == plain
    for weight in (math.inf, math.nan, -1.0):
        assert after(("a", 0, 0.5, 2.0), ("b", 1, 1.0, 2.0), ("d", 0, 0.1, weight)) == plain
    assert after(("a", 0, float("nan"), 2.0), ("b", 1, 1.0, 2.0))[0] < 0.01


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FedEx(FedAvg(), (Arm(),)), "fedex.arms must be 2 to 16 settings, got 1"),
        (lambda: FedEx(FedAvg(), (Arm(), Arm())), "must be different settings"),
        (lambda: Arm(lr=0.0), "fedex.arms: lr must be positive, got 0.0"),
        (lambda: Arm(steps=0), "fedex.arms: steps must be at least 1"),
        (lambda: Arm(weight_decay=-1.0), "weight_decay must be >= 0"),
        (lambda: ArmRule(floor=1.0), r"fedex.rule.floor must be in \[0, 1\), got 1.0"),
        (lambda: ArmRule(step=-1.0), "fedex.rule.step must be positive or left out"),
        (lambda: ArmRule(discount=0.5), "fedex.rule.discount has no effect with baseline round"),
        (
            lambda: FedEx(FedAvg(), (Arm(), Arm(2.0)), rule=ArmRule(settled=0.7)),
            "fedex.rule.settled must be below 0.693",
        ),
        (
            lambda: FedEx(Private(FedAvg(), 1.0, noise_multiplier=1.0), (Arm(), Arm(2.0))),
            "fedex cannot wrap a private algorithm",
        ),
        (
            lambda: FedEx(Clustered(FedEx(FedAvg(), (Arm(), Arm(2.0)))), (Arm(), Arm(3.0))),
            "fedex cannot be in itself: give one of them all arms",
        ),
        (
            lambda: Private(FedEx(FedAvg(), (Arm(), Arm(2.0))), 1.0, noise_multiplier=1.0),
            "private needs an algorithm whose server reads the mean of uploads, got FedEx",
        ),
    ],
)
def test_what_cannot_be_meant_is_one_sentence(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.fractions=[0.8, 0, 0.2]"], "fedex goes by validation loss, but data.fractions"),
        (["algorithm.fedex.by_tier=true"], "fedex.by_tier has no effect without data.tiers"),
        (
            ["algorithm.fedex.arms=[{weight_decay: 2}, {}]"],
            "weight_decay has no effect where local.weight_decay is 0",
        ),
        (
            [
                "algorithm=[{fedex: {arms: [{steps: 2}, {}]}}, fedkseed]",
                "tune=seeds",
                "local.steps=null",
            ],
            "steps have no effect beside fedkseed.steps",
        ),
        (
            ["algorithm.fedex.arms=[{rate: 2}, {}]"],
            "unknown key 'rate' in `algorithm.fedex.arms.0`",
        ),
    ],
)
def test_a_recipe_that_arms_do_not_go_with_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("fedex", overrides)


def test_rates_of_arms_are_none_of_seeds() -> None:
    algorithm = FedEx(FedAvg(), (Arm(), Arm(2.0)))
    with pytest.raises(ValueError, match="lr and weight_decay need adapters or weights"):
        algorithm.init({"coefficients": torch.zeros(4)}, 0)


def test_a_changed_arm_is_another_run() -> None:
    one, other = (
        binding_of(load_recipe("fedex", [f"algorithm.fedex.arms=[{{lr: {lr}}}, {{lr: 2.0}}]"]))
        for lr in (0.1, 0.2)
    )
    assert {key for key in one if one[key] != other[key]} == {"algorithm.fedex.arms.0.lr"}
