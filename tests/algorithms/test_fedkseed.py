"""FedKSeed: FedAvg in seed space, of which a client sends one number a step."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from scipy.stats import chisquare

from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.fedkseed import FedKSeed
from fedloom.algorithms.flasc import Flasc
from fedloom.algorithms.private import Private
from fedloom.core.bitpacking import unpack
from fedloom.core.payloads import to_all
from fedloom.core.protocols import Done, Fit, Reply, Round, Task
from fedloom.core.randomness import derive
from fedloom.core.rehearsal import play
from fedloom.core.seed_sequences import COEFFICIENTS, landed, uniform_seeds
from fedloom.core.sparsity import Density
from fedloom.rounds.checkpoint import Checkpoints, state_sha256
from fedloom.rounds.loop import Run, begin, tasks
from fedloom.server.importance import Power, Pro
from fedloom.server.optimizers import Adam, Momentum
from fedloom.wire.format import encode_reply, encode_task
from fedloom.wire.wire_settings import WireSettings

PRO = Pro()


@dataclass(frozen=True, slots=True)
class FedAvgInFloat32(FedAvg):
    """FedAvg that sends what FedKSeed sends."""

    def broadcast(self, state: Any, round: Any) -> Any:
        return to_all(round, {"params": {n: t.float() for n, t in state.params.items()}})

    def client_update(self, task: Any, client_state: Any) -> Any:
        start = {n: t.double() for n, t in task.download["params"].items()}
        return FedAvg.client_update(self, replace(task, download={"params": start}), client_state)


def seeds(num_seeds: int = 64) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return {COEFFICIENTS: torch.randn(num_seeds, generator=g, dtype=torch.float64)}


@pytest.fixture
def losses(parabola: Any) -> list[Any]:
    return [parabola(center=a, num_examples=n) for a, n in ((1.0, 2), (-2.0, 5), (0.5, 1))]


@pytest.mark.parametrize("server", [FedAvg().server, Momentum(0.7, 0.9), Adam(0.1)])
@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_sending_vectors_it_is_fedavg_to_the_bit(
    server: Any, weighting: Any, world: Any, losses: Any
) -> None:
    ours = world(FedKSeed(server, weighting, 30, uploads="delta"), losses, seeds(), steps=30)
    theirs = world(FedAvgInFloat32(server, weighting=weighting), losses, seeds(), steps=30)
    for place in (ours, theirs):
        place.play(4)
    assert torch.equal(ours.state.params[COEFFICIENTS], theirs.state.params[COEFFICIENTS])
    assert state_sha256(ours.state.moments) == state_sha256(theirs.state.moments)
    assert not torch.equal(ours.state.params[COEFFICIENTS], seeds()[COEFFICIENTS])


@pytest.mark.parametrize("server", [FedAvg().server, Momentum(0.7, 0.9)])
def test_scalars_say_what_vectors_say(server: Any, world: Any, losses: Any) -> None:
    ends = []
    for uploads in ("scalars", "delta"):
        place = world(FedKSeed(server, steps=200, uploads=uploads), losses, seeds(), lr=0.01)
        place.play(4)
        ends.append(place.state.params[COEFFICIENTS])
    assert float((ends[0] - ends[1]).abs().max()) < 1e-7 * float(ends[1].abs().max())
    assert not torch.equal(ends[0], seeds()[COEFFICIENTS])


def test_a_round_is_the_weighted_mean_of_the_clients_models(world: Any, losses: Any) -> None:
    place = world(FedKSeed(steps=20), losses, seeds())
    place.play(1)
    ends = []
    for client, loss in place.trainer.clients.items():
        walk = uniform_seeds(derive(derive(1, client), 0), 20, 64)
        fit = Fit(
            {COEFFICIENTS: seeds()[COEFFICIENTS].float().double()},
            seed_sequence={COEFFICIENTS: walk},
        )
        moved = place.trainer.run(client, fit).params[COEFFICIENTS] - fit.start[COEFFICIENTS]
        ends.append(loss.num_examples / 8 * moved)
    assert torch.allclose(
        place.state.params[COEFFICIENTS], seeds()[COEFFICIENTS] + sum(ends), rtol=1e-12, atol=0
    )


def test_what_clients_use_is_what_they_were_sent(world: Any, losses: Any) -> None:
    place = world(FedKSeed(steps=20), losses, seeds())
    place.play(2)
    sent = place.downloads["c0"]["params"][COEFFICIENTS]
    assert sent.dtype is torch.float32
    assert torch.equal(place.deployed("c0")[COEFFICIENTS], sent.double())
    assert all(torch.equal(work.start[COEFFICIENTS], sent.double()) for work in place.asked[-3:])


def test_a_learning_rate_may_have_a_schedule(world: Any, losses: Any) -> None:
    place = world(FedKSeed(steps=20), losses, seeds())
    place.play(1)
    place.trainer = replace(place.trainer, lr=0.003)
    place.play(1)
    assert float(place.replies[0].upload["scalars"]["lr"]) == pytest.approx(0.003, rel=1e-12)


# --- Pro ------------------------------------------------------------------------------------------


def test_pro_sends_every_client_its_own_walk(world: Any, losses: Any) -> None:
    place = world(FedKSeed(steps=50, sampling=PRO), losses, seeds(1024))
    place.play(2)
    walks = {c: payload["walk"][COEFFICIENTS] for c, payload in place.downloads.items()}
    assert all(len(walk) == -(-50 * 10 // 8) for walk in walks.values()), "ten bits a direction"
    assert not torch.equal(walks["c0"], walks["c1"])
    for client, work in zip(walks, place.asked[-3:], strict=True):
        assert torch.equal(work.seed_sequence[COEFFICIENTS], unpack(walks[client], 1024, 50))


def test_pro_keeps_sums_and_counts_of_what_was_met(world: Any, losses: Any) -> None:
    """Every client counts alike, however it weighs; each step once."""
    place = world(FedKSeed(steps=50, sampling=Pro(clip=1.5)), losses, seeds(16))
    sizes, draws = torch.zeros(16).double(), torch.zeros(16).double()
    for _ in range(3):
        place.play(1)
        for reply in place.replies:
            walk = unpack(place.downloads[reply.client]["walk"][COEFFICIENTS], 16, 50)
            met = reply.upload["scalars"][COEFFICIENTS].double().abs().clamp(max=1.5)
            sizes += landed(walk, met, 16)
            draws += torch.bincount(walk, minlength=16)
    assert torch.allclose(place.state.sizes, sizes, rtol=1e-14)
    assert torch.equal(place.state.draws, draws)
    assert int(draws.sum()) == 450


def test_a_skipped_step_is_no_draw(task: Any, drive: Any) -> None:
    algorithm = FedKSeed(steps=4, sampling=PRO)
    state = algorithm.init({COEFFICIENTS: torch.zeros(8).double()}, 0)
    round = Round(1, 7, {"c": {}}, ("c",), 1.0)
    download = algorithm.broadcast(state, round)["c"]
    walk = unpack(download["walk"][COEFFICIENTS], 8, 4)
    scalars = torch.tensor([2.0, 0.0, -1.0, 3.0]).double()

    def train(work: Any) -> Done:
        moved = {
            COEFFICIENTS: work.start[COEFFICIENTS]
            - 0.5 * landed(work.seed_sequence[COEFFICIENTS], scalars, 8)
        }
        return Done(moved, 3, 4, 1.5, {"scalars": {COEFFICIENTS: scalars}})

    message = Task("train", 1, "c", derive(7, "c"), {}, download)
    reply, _, _ = drive(algorithm.client_update(message, {}), train)
    after, _ = algorithm.server_update(state, round, [reply])
    counted = torch.bincount(walk[scalars != 0], minlength=8)
    assert torch.equal(after.draws, counted.double())
    assert torch.allclose(after.params[COEFFICIENTS], -0.5 * landed(walk, scalars, 8))


def test_round_one_of_pro_is_uniform_and_later_ones_are_not(world: Any, losses: Any) -> None:
    place = world(FedKSeed(steps=50, sampling=PRO), losses, seeds(64))
    said = []
    for _ in range(3):
        state = place.state
        place.play(1)
        said.append(place.algorithm.server_update(state, place.round, place.replies)[1])
    assert said[0]["effective_seeds"] == pytest.approx(64, rel=1e-12)
    assert all(metrics["effective_seeds"] < 63.9 for metrics in said[1:])


@pytest.mark.parametrize("sampling", [PRO, Power(power=2.0)])
def test_walks_are_drawn_by_the_chances(sampling: Any) -> None:
    algorithm = FedKSeed(steps=1_000_000, sampling=sampling)
    sizes = torch.rand(256, generator=torch.Generator().manual_seed(0)).double()
    state = replace(algorithm.init(seeds(256), 0), sizes=sizes, draws=torch.ones(256).double())
    sent = algorithm.broadcast(state, Round(1, 3, {"c": {}}, ("c",), 1.0))["c"]["walk"][
        COEFFICIENTS
    ]
    expected = sampling.chances(state.sizes, state.draws) * algorithm.steps
    drawn = torch.bincount(unpack(sent, 256, algorithm.steps))
    assert chisquare(drawn.numpy(), expected.numpy()).pvalue > 1e-3


def test_corrected_steps_are_those_of_uniform_draws_in_the_mean() -> None:
    """A constant slope: the mean move along each seed is -lr * slope * steps / K, whatever the chances."""
    num_seeds, slope = 8, torch.arange(1.0, 9.0).double()
    fives = torch.full((8,), 5.0).double()
    means = {}
    for corrected in (False, True):
        algorithm = FedKSeed(steps=40_000, sampling=Power(mix=0.2, corrected=corrected))
        fresh = algorithm.init({COEFFICIENTS: torch.zeros(num_seeds).double()}, 0)
        state = replace(fresh, sizes=slope * 5, draws=fives)
        round = Round(1, 7, {"c": {}}, ("c",), 1.0)
        sent = algorithm.broadcast(state, round)["c"]["walk"][COEFFICIENTS]
        walk = unpack(sent, num_seeds, algorithm.steps)
        scalars = {COEFFICIENTS: slope[walk].float(), "lr": torch.tensor(0.1).double()}
        after, _ = algorithm.server_update(state, round, [Reply("c", {"scalars": scalars})])
        means[corrected] = after.params[COEFFICIENTS] / (-0.1 * slope * algorithm.steps / num_seeds)
    assert means[True].tolist() == pytest.approx([1.0] * 8, rel=0.06)
    assert float(means[False].max() / means[False].min()) > 3


# --- what it is built into ------------------------------------------------------------------------


def test_privacy_needs_vectors() -> None:
    with pytest.raises(ValueError, match="FedKSeed, which reads each"):
        Private(FedKSeed(), 1.0, noise_multiplier=1.0)
    assert Private(FedKSeed(uploads="delta"), 1.0, noise_multiplier=1.0).server_sees


def test_without_noise_privacy_is_the_plain_mean(world: Any, losses: Any) -> None:
    inner = FedKSeed(weighting="uniform", steps=30, uploads="delta")
    wrapped = world(Private(inner, 1e9, noise_multiplier=0.0, noise_seed=1), losses, seeds())
    plain = world(inner, losses, seeds())
    for place in (wrapped, plain):
        place.play(1)
    answered = {reply.client: reply for reply in plain.replies}
    drawn = [answered[reply.client] for reply in wrapped.replies]
    total = sum(reply.upload["delta"][COEFFICIENTS] for reply in drawn)
    moved = wrapped.state.inner.params[COEFFICIENTS] - seeds()[COEFFICIENTS]
    assert torch.allclose(moved, total / 3, atol=1e-12)


def test_a_thinned_vector_holds_the_largest_moves(world: Any, losses: Any) -> None:
    algorithm = Flasc(FedKSeed(steps=30, uploads="delta"), Density(1.0), Density(0.25))
    place = world(algorithm, losses, seeds())
    place.play(2)
    assert all(int((r.upload["delta"][COEFFICIENTS] != 0).sum()) == 16 for r in place.replies)


# --- bytes and resumption -------------------------------------------------------------------------

CLIENTS = {f"client-{i:03d}": {"num_examples": "69"} for i in range(10)}
SAID = {"num_tokens": 12345.0, "skipped_steps": 0.0, "loss": 2.345678901234567}


def messages(algorithm: Any, state: Any, number: int) -> tuple[Any, list[bytes], list[bytes]]:
    """Return the state after a round of ten clients that noise plays, and all its messages."""
    round = Round(number, derive(5, "round", number), CLIENTS, tuple(CLIENTS), 1.0)
    sent = tasks("train", round, algorithm.broadcast(state, round))
    replies = [play(algorithm.client_update(task, {}), task, noise=0.1) for task in sent]
    replies = [replace(r, weight=69, metrics=SAID) for r in replies]
    wire = WireSettings()
    state, _ = algorithm.server_update(state, round, replies)
    down = [encode_task(task, settings=wire) for task in sent]
    return state, down, [encode_reply(reply, settings=wire) for reply in replies]


@pytest.mark.parametrize(
    ("algorithm", "num_seeds", "limit"),
    [(FedKSeed(), 4096, 17_300), (FedKSeed(sampling=PRO), 1024, 5_260)],
    ids=["plain", "pro"],
)
def test_a_round_of_200_steps_takes_kilobytes(algorithm: Any, num_seeds: int, limit: int) -> None:
    """At most 18,000 bytes of whole messages, and 9,796 with Pro."""
    state = algorithm.init(seeds(num_seeds), 0)
    for number in (1, 2):
        state, down, up = messages(algorithm, state, number)
        assert max(map(len, down)) + max(map(len, up)) <= limit


def test_a_resumed_run_goes_on_with_the_same_bytes(tmp_path: Any) -> None:
    """From less than 100 kB."""
    for name, algorithm in (("plain", FedKSeed()), ("pro", FedKSeed(sampling=PRO))):
        checkpoints = Checkpoints(tmp_path / name)
        fresh = begin(algorithm, seeds(4096), 5)
        state = fresh.state
        for number in (1, 2, 3):
            state, _, _ = messages(algorithm, state, number)
        path = checkpoints.save(Run(3, 5, state))
        assert path.stat().st_size < 100_000
        again = checkpoints.load(fresh).run.state
        for number in (4, 5):
            state, down, up = messages(algorithm, state, number)
            again, same_down, same_up = messages(algorithm, again, number)
            assert (down, up) == (same_down, same_up)
        assert state_sha256(state) == state_sha256(again)


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 0}, r"fedkseed\.steps must be at least 1, got 0"),
        ({"weighting": "size"}, "fedkseed.weighting must be examples or uniform, got 'size'"),
        ({"uploads": "seeds"}, "fedkseed.uploads must be scalars or delta, got 'seeds'"),
        (
            {"uploads": "delta", "sampling": PRO},
            "fedkseed.sampling must be uniform with uploads delta, got pro",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FedKSeed(**given)


def test_it_says_what_space_it_needs() -> None:
    with pytest.raises(ValueError, match=r"needs tune: seeds, got lora_A"):
        FedKSeed().init({"lora_A": torch.zeros(2)}, 0)
    decaying = {**seeds(), "base": torch.zeros((), dtype=torch.float64)}
    with pytest.raises(ValueError, match=r"uploads must be delta for local\.weight_decay"):
        FedKSeed().init(decaying, 0)
    assert FedKSeed(uploads="delta").init(decaying, 0).params.keys() == {COEFFICIENTS, "base"}
