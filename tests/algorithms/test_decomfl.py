"""DeComFL, BAFFLE and FeedSign: one walk for everybody."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from fedloom.algorithms.decomfl import DeComFL
from fedloom.algorithms.private import Private
from fedloom.core.protocols import Reply, Round
from fedloom.core.randomness import derive
from fedloom.core.rehearsal import play
from fedloom.core.seed_sequences import COEFFICIENTS, landed, uniform_seeds
from fedloom.rounds.loop import tasks
from fedloom.server.optimizers import SGD, Momentum
from fedloom.wire.format import encode_reply, encode_task
from fedloom.wire.wire_settings import WireSettings


def seeds(num_seeds: int = 16) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return {COEFFICIENTS: torch.randn(num_seeds, generator=g, dtype=torch.float64)}


@pytest.fixture
def losses(parabola: Any) -> list[Any]:
    return [parabola(center=a, num_examples=n) for a, n in ((1.0, 2), (-2.0, 5), (0.5, 1))]


@pytest.mark.parametrize("votes", [False, True])
def test_everybody_walks_the_same_way_and_every_round_another(
    votes: bool, world: Any, losses: Any
) -> None:
    place = world(DeComFL(steps=6, votes=votes), losses, seeds())
    place.play(2)
    walks = [work.seed_sequence[COEFFICIENTS] for work in place.asked]
    assert all(torch.equal(walk, walks[0]) for walk in walks[:3])
    assert all(torch.equal(walk, walks[3]) for walk in walks[3:])
    assert not torch.equal(walks[0], walks[3])


def test_the_server_takes_the_walk_by_the_mean_scalars(world: Any, losses: Any) -> None:
    place = world(DeComFL(steps=6), losses, seeds(), lr=0.1)
    place.play(1)
    walk = uniform_seeds(derive(1, "walk"), 6, 16)
    start = seeds()[COEFFICIENTS].float().double()
    expected = torch.zeros(16).double()
    for loss in losses:
        values = start.clone()
        for k in walk.tolist():
            values[k] -= 0.1 * loss.gradient(values[k])
        expected += (values - start) / 3
    assert torch.allclose(
        place.state.params[COEFFICIENTS] - seeds()[COEFFICIENTS], expected, atol=1e-7
    )


def test_with_equal_clients_it_is_one_of_them(world: Any, parabola: Any) -> None:
    place = world(DeComFL(steps=6, weighting="examples"), [parabola(1.0)] * 4, seeds())
    alone = world(DeComFL(steps=6), [parabola(1.0)], seeds())
    for one in (place, alone):
        one.play(3)
    assert torch.allclose(
        place.state.params[COEFFICIENTS], alone.state.params[COEFFICIENTS], atol=1e-7
    )


def test_baffle_measures_all_directions_at_the_start(world: Any, losses: Any) -> None:
    place = world(DeComFL(steps=40, at_start=True), losses, seeds(), lr=0.01)
    place.play(1)
    assert all(work.at_start for work in place.asked)
    walk = uniform_seeds(derive(1, "walk"), 40, 16)
    start = seeds()[COEFFICIENTS].float().double()
    slope = sum(loss.gradient(start) for loss in losses) / 3
    moved = place.state.params[COEFFICIENTS] - seeds()[COEFFICIENTS]
    assert torch.allclose(moved, -0.01 * landed(walk, slope[walk], 16), atol=1e-7)


def test_feedsign_moves_by_the_majority(world: Any, parabola: Any) -> None:
    """Two of three clients want all coefficients up: the third is outvoted, however far it is."""
    losses = [parabola(50.0), parabola(40.0), parabola(-1e6)]
    place = world(DeComFL(SGD(0.5), steps=9, votes=True), losses, seeds())
    place.play(1)
    assert all(work.at_start for work in place.asked)
    assert all(
        not r.metrics and r.upload["votes"][COEFFICIENTS].shape == (2,) for r in place.replies
    )
    walk = uniform_seeds(derive(1, "walk"), 9, 16)
    moved = place.state.params[COEFFICIENTS] - seeds()[COEFFICIENTS]
    assert torch.allclose(moved, 0.5 * landed(walk, torch.ones(9), 16))


def test_a_tie_moves_nothing_and_weights_break_it(world: Any, parabola: Any) -> None:
    losses = [parabola(50.0, num_examples=2), parabola(-50.0)]
    ends = {}
    for weighting in ("uniform", "examples"):
        algorithm = DeComFL(SGD(0.5), weighting=weighting, steps=9, votes=True)
        place = world(algorithm, losses, seeds())
        place.play(1)
        ends[weighting] = place.state.params[COEFFICIENTS] - seeds()[COEFFICIENTS]
    assert not ends["uniform"].any()
    assert float(ends["examples"].sum()) == pytest.approx(4.5)


def test_the_server_says_how_far_clients_agree(world: Any, parabola: Any) -> None:
    place = world(DeComFL(steps=8, votes=True), [parabola(50.0)] * 3 + [parabola(-50.0)], seeds())
    before = place.state
    place.play(1)
    _, told = place.algorithm.server_update(before, place.round, place.replies)
    assert told == {"agreement": 0.5}


def test_both_learn(world: Any, losses: Any) -> None:
    """The optimum of the mean loss is the mean of the centers."""
    for algorithm in (DeComFL(steps=32), DeComFL(steps=32, at_start=True)):
        place = world(algorithm, losses, seeds(), lr=0.1)
        place.play(40)
        assert float((place.state.params[COEFFICIENTS] + 1 / 6).abs().max()) < 0.05
    place = world(DeComFL(SGD(0.05), steps=8, votes=True), losses, seeds())
    place.play(200)
    assert float((place.state.params[COEFFICIENTS] - 0.5).abs().max()) < 0.2, (
        "the median, by majority"
    )


def test_the_mean_of_scalars_may_be_private(world: Any, losses: Any) -> None:
    inner = DeComFL(Momentum(0.5, 0.9), steps=6)
    place = world(Private(inner, 1.0, noise_multiplier=0.5, noise_seed=1), losses, seeds())
    place.play(3)
    assert bool(torch.isfinite(place.state.inner.params[COEFFICIENTS]).all())
    with pytest.raises(ValueError, match="DeComFL, which reads each"):
        Private(DeComFL(votes=True), 1.0, noise_multiplier=0.5)


@pytest.mark.parametrize(
    ("algorithm", "up"),
    [
        (DeComFL(SGD(1e-4), votes=True), 40),
        (DeComFL(SGD(1e-4), votes=True, steps=200), 60),
        (DeComFL(steps=1), 90),
        (DeComFL(steps=10), 126),
    ],
    ids=["a bit", "200 bits", "a scalar", "ten scalars"],
)
def test_uploads_take_tens_of_bytes(algorithm: Any, up: int) -> None:
    """FeedSign's whole message, of 200 steps too, in at most 60 bytes."""
    clients: dict[str, dict[str, str]] = {f"client-{i:03d}": {} for i in range(10)}
    round, wire = Round(2, derive(5, "round", 2), clients, tuple(clients), 1.0), WireSettings()
    state = algorithm.init(seeds(1024), 0)
    said = {"num_tokens": 12345.0, "skipped_steps": 0.0, "loss": 2.3456789012345}
    for task in tasks("train", round, algorithm.broadcast(state, round)):
        reply = play(algorithm.client_update(task, {}), task, noise=0.1)
        reply = reply if algorithm.votes else replace(reply, metrics=said)
        assert len(encode_reply(reply, settings=wire)) <= up
        assert len(encode_task(task, settings=wire)) <= 4096 + 100


def test_votes_come_back_from_their_bytes() -> None:
    """A vote is for the direction where the scalar is negative; a skipped step's is against it."""
    algorithm = DeComFL(votes=True, steps=11)
    state = algorithm.init({COEFFICIENTS: torch.zeros(1 << 20).double()}, 0)
    round = Round(1, 7, {"c": {}}, ("c",), 1.0)
    scalars = torch.tensor([-1.0, 2, -3, 0, 5, -6, 7, -8, -9, 10, -11]).double()
    (task,) = tasks("train", round, algorithm.broadcast(state, round))
    half = algorithm.client_update(task, {})
    work: Any = next(half)

    def done() -> Reply:
        from fedloom.core.protocols import Done

        try:
            half.send(Done(work.start, 3, 11, 1.0, {"scalars": {COEFFICIENTS: scalars}}))
        except StopIteration as stop:
            reply: Reply = stop.value[0]
            return reply
        raise AssertionError("one piece of work")

    after, _ = algorithm.server_update(state, round, [done()])
    moved = after.params[COEFFICIENTS][work.seed_sequence[COEFFICIENTS]]
    assert torch.equal(moved, torch.where(scalars < 0, 1.0, -1.0).double())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 0}, r"decomfl\.steps must be at least 1, got 0"),
        ({"weighting": "size"}, "decomfl.weighting must be examples or uniform, got 'size'"),
        ({"votes": True, "at_start": True}, "decomfl.at_start has no effect beside decomfl.votes"),
    ],
)
def test_what_cannot_be_meant_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeComFL(**given)


def test_it_says_what_space_it_needs() -> None:
    with pytest.raises(ValueError, match=r"needs tune: seeds, got lora_A"):
        DeComFL().init({"lora_A": torch.zeros(2)}, 0)
    with pytest.raises(ValueError, match=r"needs local\.weight_decay 0"):
        DeComFL().init({**seeds(), "base": torch.zeros(())}, 0)
