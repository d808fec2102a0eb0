"""FLASC: the hand-computed round, its traps, and what it is where nothing is left out."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedloom.algorithms.ditto import Ditto
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.flasc import Flasc
from fedloom.algorithms.freeze import Freeze
from fedloom.algorithms.local import LocalOnly
from fedloom.algorithms.pfedme import PFedMe
from fedloom.algorithms.private import Private
from fedloom.algorithms.scaffold import Scaffold
from fedloom.core.protocols import Algorithm, Done, Params, Payload, Reply, Round, Task
from fedloom.core.sparsity import Density
from fedloom.server.optimizers import SGD, Adam, AdamW, ServerOptimizer

P = [0.8, -0.1, 0.05, -0.6, 0.0, 0.0, 0.3, 0.0]
ENDS = {
    "c0": [0.7, -0.1, 0.2, -0.6, 0.05, 0.0, 0.3, -0.01],
    "c1": [0.8, -0.4, 0.0, -0.6, 0.0, 0.1, 0.3, 0.0],
}
INNER = [FedAvg(), FedAvg(Adam(), mu=0.1), Scaffold(), PFedMe(), LocalOnly(), Ditto(Scaffold())]
IDS = ["fedavg", "fedadam with fedprox", "scaffold", "pfedme", "local", "ditto(scaffold)"]


def vector(values: list[float]) -> dict[str, torch.Tensor]:
    return {"w": torch.tensor(values, dtype=torch.float64)}


def example(server: ServerOptimizer, **fields: Any) -> Flasc[Any]:
    """Return half the entries down, a quarter up, and the paper's uniform mean."""
    inner = FedAvg(server, weighting="uniform")
    return Flasc(inner, Density(0.5), Density(0.25), **fields)


def play(algorithm: Algorithm[Any], drive: Any, state: Any = None) -> tuple[Any, Any, list[Reply]]:
    """Play the round of the example; return the state after it, what was sent and the replies."""
    state = algorithm.init(vector(P), 0) if state is None else state
    round = Round(1, 0, {c: {} for c in ENDS}, tuple(ENDS), 1.0)
    sent = algorithm.broadcast(state, round)
    replies = []
    for client, end in ENDS.items():
        half = algorithm.client_update(Task("train", 1, client, 0, {}, sent[client]), {})
        reply, _, _ = drive(half, lambda work, end=end: Done(vector(end), 1))
        replies.append(reply)
    state, _ = algorithm.server_update(state, round, iter(replies))
    return state, sent, replies


@pytest.mark.parametrize(
    ("server", "after"),
    [
        (SGD(), [0.75, -0.25, 0.15, -0.6, 0.0, 0.05, 0.3, 0.0]),
        (
            AdamW(1e-3),
            # Entry 4 stays: nobody sent it, and it has no momentum yet.
            [0.7989920002, -0.100998999933, 0.0509994999, -0.599994, 0, 0.0009999998, 0.299997, 0],
        ),
    ],
    ids=["sgd", "adamw"],
)
def test_the_round_computed_by_hand(server: Any, after: list[float], drive: Any) -> None:
    state, sent, replies = play(example(server), drive)
    assert sent["c0"]["params"]["w"].tolist() == [0.8, -0.1, 0, -0.6, 0, 0, 0.3, 0]
    deltas = [reply.upload["delta"]["w"].tolist() for reply in replies]
    assert deltas[0] == pytest.approx([-0.1, 0, 0.2, 0, 0, 0, 0, 0], abs=1e-15)
    assert deltas[1] == pytest.approx([0, -0.3, 0, 0, 0, 0.1, 0, 0], abs=1e-15)
    assert state.params["w"].tolist() == pytest.approx(after, abs=1e-9)
    # The step hits the dense vector: entry 2 was not sent and goes on from 0.05.
    round = Round(2, 0, {"c0": {}}, ("c0",), 1.0)
    again = example(server).broadcast(state, round)["c0"]["params"]["w"]
    assert again.nonzero().flatten().tolist() == [0, 1, 3, 6]


def test_what_nobody_sent_stays_under_sgd_and_moves_by_momentum_and_decay_under_adamw(
    drive: Any,
) -> None:
    """Check e: torch.optim.AdamW moves the untouched entries by the same formula."""
    state, _, _ = play(example(SGD()), drive)
    for at in (3, 4, 6, 7):
        assert float(state.params["w"][at]) == P[at]
    server = AdamW(1e-2)
    value = torch.nn.Parameter(vector(P)["w"])
    theirs = torch.optim.AdamW([value], lr=1e-2)
    params: Params = vector(P)
    moments = server.init(params)
    for delta in ([0.1] * 8, [0.0] * 8, [-0.3, 0, 0, 0, 0, 0, 0, 0.2]):
        params, moments = server.step(params, vector(delta), moments)
        value.grad = -vector(delta)["w"]
        theirs.step()
        assert torch.allclose(params["w"], value.detach(), rtol=0, atol=1e-15)


@pytest.mark.parametrize("inner", INNER, ids=IDS)
def test_at_density_one_it_is_its_inner(inner: Any, world: Any, parabola: Any) -> None:
    losses = [parabola(center=1.0, num_examples=2), parabola(center=-3.0, curvature=0.2)]
    start = {"a": torch.zeros(3), "b": torch.ones(2)}
    whole, alone = (
        world(a, losses, start) for a in (Flasc(inner, Density(1.0), Density(1.0)), inner)
    )
    for place in (whole, alone):
        place.play(4)
    assert whole.downloads["c0"].keys() == alone.downloads["c0"].keys()
    for client in ("c0", "c1"):
        used, plain = whole.deployed(client), alone.deployed(client)
        assert all(torch.equal(used[name], t) for name, t in plain.items())
    assert all(torch.equal(whole.state.params[n], t) for n, t in alone.state.params.items())


def test_equal_tiers_at_density_one_are_the_dense_algorithm(drive: Any) -> None:
    """Check h."""
    density = Density(0.5, tiers={"phone": 1.0})
    algorithm = Flasc(FedAvg(), density, density)
    state = algorithm.init(vector(P), 0)
    sent = algorithm.broadcast(state, Round(1, 0, {"c": {"tier": "phone"}}, ("c",), 1.0))
    assert sent["c"]["params"] is state.params
    half = algorithm.client_update(Task("train", 1, "c", 0, {"tier": "phone"}, sent["c"]), {})
    reply, _, _ = drive(half, lambda work: Done(vector(ENDS["c0"]), 1))
    assert int(reply.upload["delta"]["w"].count_nonzero()) == 4, "all that moved"


def test_each_tier_has_its_density_and_clients_of_one_share_one_payload(drive: Any) -> None:
    algorithm = Flasc(
        FedAvg(), Density(0.5, tiers={"phone": 0.125}), Density(0.5, tiers={"phone": 0.25})
    )
    state = algorithm.init(vector(P), 0)
    population = {
        c: {"tier": t} for c, t in zip("abcd", ("phone", "desk", "phone", ""), strict=True)
    }
    sent = algorithm.broadcast(state, Round(1, 0, population, tuple("abcd"), 1.0))
    assert sent["a"] is sent["c"]
    assert sent["b"] is sent["d"], "a tier without a share of its own has everybody's"
    kept = [int(sent[c]["params"]["w"].count_nonzero()) for c in "ab"]
    assert kept == [1, 4]
    for client, most in (("a", 2), ("b", 4)):
        task = Task("train", 1, client, 0, population[client], sent[client])
        half = algorithm.client_update(task, {})
        reply, _, _ = drive(half, lambda work: Done(vector([float(i) for i in range(8)]), 1))
        assert int(reply.upload["delta"]["w"].count_nonzero()) == most


def test_an_entry_that_only_one_tier_sends_is_divided_by_all(drive: Any) -> None:
    """Check h: the divisor is the cohort, never the number of those that sent the entry."""
    algorithm = Flasc(
        FedAvg(weighting="uniform"), Density(1.0), Density(1.0, tiers={"phone": 0.25})
    )
    state = algorithm.init(vector([0.0] * 4), 0)
    population = {"a": {"tier": "phone"}, "b": {}, "c": {}}
    round = Round(1, 0, population, tuple("abc"), 1.0)
    replies = []
    for client, payload in algorithm.broadcast(state, round).items():
        half = algorithm.client_update(Task("train", 1, client, 0, population[client], payload), {})
        replies.append(drive(half, lambda work: Done(vector([3.0, -6.0, 1.5, 0.75]), 1))[0])
    state, _ = algorithm.server_update(state, round, iter(replies))
    assert state.params["w"].tolist() == pytest.approx([2.0, -6.0, 1.0, 0.5])


def test_densities_follow_their_schedule_on_both_sides(world: Any, parabola: Any) -> None:
    start = {"w": torch.arange(1.0, 17.0)}
    falling = Density(0.5, decay=0.5, every=1, least=0.125, warm=1)
    place = world(Flasc(FedAvg(), falling, falling), [parabola(slope=1.0)], start)
    counts = []
    for _ in range(5):
        place.play(1)
        down, up = place.downloads["c0"]["params"], place.replies[0].upload["delta"]
        counts.append((int(down["w"].count_nonzero()), int(up["w"].count_nonzero())))
    assert counts == [(16, 16), (8, 8), (4, 4), (2, 2), (2, 2)]


def test_error_feedback_sends_in_the_end_what_was_left_out(drive: Any) -> None:
    algorithm = Flasc(FedAvg(), Density(1.0), Density(0.25), error_feedback=True)
    start, end = vector([0.0] * 4), vector([4.0, 3.0, 2.0, 1.0])
    client_state: Payload = {}
    total = torch.zeros(4, dtype=torch.float64)
    for _ in range(40):
        half = algorithm.client_update(
            Task("train", 1, "c", 0, {}, {"params": start}), client_state
        )
        reply, client_state, _ = drive(half, lambda work: Done(end, 1))
        assert int(reply.upload["delta"]["w"].count_nonzero()) == 1
        total += reply.upload["delta"]["w"]
    assert torch.equal(total + client_state["unsent"]["w"], 40 * end["w"])
    assert float(client_state["unsent"]["w"].abs().max()) <= 10.0, "one round's delta at most"


def test_without_error_feedback_a_client_keeps_nothing(drive: Any) -> None:
    half = example(SGD()).client_update(
        Task("train", 1, "c", 0, {}, {"params": vector([0.0] * 8)}), {"unsent": vector([9.0] * 8)}
    )
    reply, client_state, _ = drive(half, lambda work: Done(vector(ENDS["c0"]), 1))
    assert not client_state
    assert float(reply.upload["delta"]["w"].abs().max()) < 9


def test_what_is_deployed_is_what_was_sent(world: Any, parabola: Any) -> None:
    """Check f: the server's own vector is dense, and nobody uses it."""
    start = {"a": torch.arange(1.0, 9.0), "b": torch.arange(-8.0, 0.0)}
    place = world(Flasc(FedAvg(), Density(0.25)), [parabola(center=2.0)], start)
    place.play(3)
    used = place.deployed("c0")
    assert used is place.downloads["c0"]["params"]
    assert sum(int(t.count_nonzero()) for t in used.values()) == 4
    assert sum(int(t.count_nonzero()) for t in place.state.params.values()) > 4


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_tensors_compete_or_each_has_its_places(scope: Any) -> None:
    algorithm = Flasc(FedAvg(), Density(0.25), scope=scope)
    start = {"large": torch.arange(11.0, 19.0), "small": torch.arange(1.0, 9.0)}
    sent = algorithm.broadcast(algorithm.init(start, 0), Round(1, 0, {"c": {}}, ("c",), 1.0))
    kept = {name: int(t.count_nonzero()) for name, t in sent["c"]["params"].items()}
    assert kept == ({"large": 4, "small": 0} if scope == "global" else {"large": 2, "small": 2})


def test_the_server_says_what_share_of_each_tensor_it_sends_next() -> None:
    algorithm = Flasc(FedAvg(), Density(0.25))
    start = {"large": torch.arange(11.0, 19.0), "small": torch.arange(1.0, 9.0)}
    round = Round(1, 0, {"c": {}}, ("c",), 1.0)
    reply = Reply("c", {"delta": {n: torch.zeros(8) for n in start}})
    _, metrics = algorithm.server_update(algorithm.init(start, 0), round, [reply])
    assert metrics == {"download_density": 0.25, "density/large": 0.5, "density/small": 0.0}


def test_frozen_tensors_do_not_compete_where_freeze_is_outermost() -> None:
    start = {"lora_A": torch.full((8,), 9.0), "lora_B": torch.arange(1.0, 9.0)}
    algorithm = Freeze(Flasc(FedAvg(), Density(0.25)))
    sent = algorithm.broadcast(algorithm.init(start, 0), Round(1, 0, {"c": {}}, ("c",), 1.0))
    params = sent["c"]["params"]
    assert params["lora_B"].nonzero().flatten().tolist() == [6, 7]
    assert torch.equal(params["lora_A"], start["lora_A"])


def test_only_params_and_delta_are_thinned(world: Any, parabola: Any) -> None:
    start = {"w": torch.zeros(8)}
    place = world(Flasc(Scaffold(), Density(0.25), Density(0.25)), [parabola(center=1.0)], start)
    place.play(3)
    assert int(place.downloads["c0"]["params"]["w"].count_nonzero()) == 2
    assert int(place.downloads["c0"]["control"]["w"].count_nonzero()) == 8
    assert int(place.replies[0].upload["delta"]["w"].count_nonzero()) == 2


def test_zeros_that_are_left_out_are_positive(drive: Callable[..., Any]) -> None:
    """-0.0 would travel."""
    _, sent, replies = play(example(SGD()), drive)
    for tensor in (sent["c0"]["params"]["w"], replies[0].upload["delta"]["w"]):
        assert not bool(torch.signbit(tensor[tensor == 0]).any())


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: Flasc(FedAvg(), scope="layer"), r"flasc\.scope must be global or tensor, got"),  # type: ignore[arg-type]
        (lambda: Density(0.0), r"density's start must be in \(0, 1\], got 0\.0"),
    ],
)
def test_misuse_is_one_sentence_that_says_where(act: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        act()


def test_its_fields_are_plain_values() -> None:
    assert dataclasses.asdict(Density()) == {
        "start": 0.25,
        "decay": 1.0,
        "every": 1,
        "least": 0.0,
        "warm": 0,
        "tiers": {},
    }


def test_the_private_round_computed_by_hand(drive: Any) -> None:
    """The example of DP, C = 0.15 and no noise: clipped after thinning, divided by the cohort.

    The paper's code divides by C as well, hence the factor between its pseudo-gradient and this step.
    """
    clip, pseudo = 0.15, [0.05**0.5, 0.9**0.5 / 2, -(0.2**0.5), 0, 0, -(0.1**0.5) / 2, 0, 0]
    assert pseudo[:3] == pytest.approx([0.2236068, 0.4743416, -0.4472136], abs=1e-7)
    algorithm = Private(example(SGD()), clip, noise_multiplier=0.0, noise_seed=0)
    state, _, replies = play(algorithm, drive)
    for reply in replies:
        assert float(reply.upload["delta"]["w"].norm()) == pytest.approx(clip, rel=1e-6)
    moved = state.inner.params["w"] - vector(P)["w"]
    assert (-moved / clip).tolist() == pytest.approx(pseudo, abs=1e-9)
