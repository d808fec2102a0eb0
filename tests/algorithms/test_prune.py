"""The mask baselines: clients train inside a mask, and values travel without positions."""

from typing import Any

import pytest
import torch

from fedloom.algorithms.ditto import Ditto
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.freeze import Freeze
from fedloom.algorithms.local import LocalOnly
from fedloom.algorithms.pfedme import PFedMe
from fedloom.algorithms.prune import Prune
from fedloom.algorithms.scaffold import Scaffold
from fedloom.core.protocols import Done, Evaluate, Reply, Round, Task
from fedloom.core.sparsity import Density
from fedloom.server.optimizers import Adam
from fedloom.wire.format import decode, encode

INNER = [FedAvg(), FedAvg(Adam(), mu=0.1), Scaffold(), PFedMe(), LocalOnly(), Ditto(Scaffold())]
IDS = ["fedavg", "fedadam with fedprox", "scaffold", "pfedme", "local", "ditto(scaffold)"]
START = {"a": torch.tensor([5.0, -7.0, 1.0, 0.5]), "b": torch.tensor([[6.0, -2.0], [3.0, 4.0]])}


def masks(place: Any) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in place.downloads["c0"].get("mask", {}).items()}


@pytest.mark.parametrize("inner", INNER, ids=IDS)
def test_at_density_one_it_is_its_inner(inner: Any, world: Any, parabola: Any) -> None:
    losses = [parabola(center=1.0, num_examples=2), parabola(center=-3.0, curvature=0.2)]
    whole, alone = (world(a, losses, START) for a in (Prune(inner, Density(1.0)), inner))
    for place in (whole, alone):
        place.play(4)
    assert whole.downloads["c0"].keys() == alone.downloads["c0"].keys()
    inner_state = whole.state.inner
    assert all(torch.equal(inner_state.params[n], t) for n, t in alone.state.params.items())
    for client in ("c0", "c1"):
        used, plain = whole.deployed(client), alone.deployed(client)
        assert all(torch.equal(used[name], t) for name, t in plain.items())


@pytest.mark.parametrize("inner", INNER, ids=IDS)
def test_outside_the_mask_nothing_is_used_trained_or_sent(
    inner: Any, world: Any, parabola: Any
) -> None:
    place = world(Prune(inner, Density(0.5)), [parabola(center=9.0), parabola(center=3.0)], START)
    place.play(3)
    mask = masks(place)
    assert {name: t.tolist() for name, t in mask.items()} == {
        "a": [True, True, False, False],
        "b": [[True, False], [False, True]],
    }
    for fit in place.asked:
        for name, kept in mask.items():
            assert torch.equal(fit.mask[name] != 0, kept)
            assert not bool(fit.start[name][~kept].any())
            assert fit.start[name].shape == kept.shape
    for client in ("c0", "c1"):
        assert all(not bool(t[~mask[n]].any()) for n, t in place.deployed(client).items())
    for reply in place.replies:
        assert {n: t.shape for n, t in reply.upload.get("delta", {}).items()} in (
            {},
            {"a": (2,), "b": (2,)},
        )
    outside = {name: t[~mask[name]] for name, t in START.items()}
    for name, values in outside.items():
        assert torch.equal(place.state.inner.params[name][~mask[name]], values)


def test_sparse_adapter_keeps_the_mask_of_its_first_dense_round(world: Any, parabola: Any) -> None:
    start = {"a": torch.zeros(4), "b": torch.zeros(4)}
    losses = [parabola(center=torch.tensor([4.0, 1.0, 3.0, 2.0]))]
    place = world(Prune(FedAvg(), Density(0.5, warm=1)), losses, start)
    place.play(1)
    assert not masks(place), "the first round is dense"
    place.play(1)
    first = masks(place)
    assert all(t.tolist() == [True, False, True, False] for t in first.values())
    place.trainer = type(place.trainer)({"c0": parabola(center=-9.0, curvature=5.0)}, lr=0.1)
    place.play(3)
    assert all(torch.equal(t, first[name]) for name, t in masks(place).items())


def test_adapter_lth_shrinks_inside_the_mask_before(world: Any, parabola: Any) -> None:
    start = {"w": torch.arange(1.0, 17.0)}
    falling = Density(1.0, decay=0.5, every=2, least=0.125)
    place = world(Prune(FedAvg(), falling), [parabola(slope=1.0)], start)
    before, counts = torch.ones(16, dtype=torch.bool), []
    for _ in range(9):
        place.play(1)
        mask = masks(place).get("w", torch.ones(16, dtype=torch.bool))
        assert not bool((mask & ~before).any())
        before = mask
        counts.append(int(mask.sum()))
    assert counts == [16, 16, 8, 8, 4, 4, 2, 2, 2]


def test_with_regrow_an_entry_comes_back_when_it_is_large_again() -> None:
    for regrow, kept in ((True, [2, 3]), (False, [0, 1])):
        algorithm = Prune(FedAvg(), Density(0.5), regrow=regrow)
        state = algorithm.init({"w": torch.tensor([4.0, 3.0, 2.0, 1.0])}, 0)
        round = Round(1, 0, {"c": {}}, ("c",), 1.0)
        sent = algorithm.broadcast(state, round)["c"]
        assert sent["params"]["w"].tolist() == [4.0, 3.0]
        reply = Reply("c", {"delta": {"w": torch.tensor([-3.9, -2.9])}})
        state, _ = algorithm.server_update(state, round, [reply])
        sent = algorithm.broadcast(state, Round(2, 0, {"c": {}}, ("c",), 1.0))["c"]
        assert sent["mask"]["w"].nonzero().flatten().tolist() == kept


def test_a_slice_has_the_size_of_the_clients_tier(drive: Any) -> None:
    algorithm = Prune(FedAvg(weighting="uniform"), Density(0.5, tiers={"phone": 0.25}), regrow=True)
    state = algorithm.init({"w": torch.tensor([4.0, 3.0, 2.0, 1.0])}, 0)
    population = {"a": {"tier": "phone"}, "b": {"tier": "desk"}, "c": {}}
    round = Round(1, 0, population, tuple("abc"), 1.0)
    sent = algorithm.broadcast(state, round)
    assert sent["b"] is sent["c"]
    replies = []
    for client, payload in sent.items():
        task = Task("train", 1, client, 0, population[client], payload)
        half = algorithm.client_update(task, {})

        def train(fit: Any) -> Done:
            return Done({"w": fit.start["w"] + 3.0 * fit.mask["w"]}, 1)

        replies.append(drive(half, train)[0])
    assert [reply.upload["delta"]["w"].tolist() for reply in replies] == [
        [3.0],
        [3.0] * 2,
        [3.0] * 2,
    ]
    state, metrics = algorithm.server_update(state, round, iter(replies))
    assert state.inner.params["w"].tolist() == [7.0, 5.0, 2.0, 1.0], "divided by the cohort"
    assert metrics["download_density"] == pytest.approx(5 / 12)


def test_the_one_reply_of_a_private_mean_is_filled_in_too() -> None:
    algorithm = Prune(FedAvg(), Density(0.5))
    state = algorithm.init({"w": torch.tensor([4.0, 3.0, 2.0, 1.0])}, 0)
    empty = Round(1, 0, {"a": {}, "b": {}}, (), 0.5)
    state, _ = algorithm.server_update(
        state, empty, [Reply("mean", {"delta": {"w": torch.tensor([1.0, -1.0])}})]
    )
    assert state.inner.params["w"].tolist() == [5.0, 2.0, 2.0, 1.0]


def test_while_nothing_has_moved_a_round_is_dense(world: Any, parabola: Any) -> None:
    for regrow in (False, True):
        place = world(
            Prune(FedAvg(), Density(0.5), regrow=regrow),
            [parabola(center=1.0)],
            {"w": torch.zeros(4)},
        )
        place.play(1)
        assert not masks(place)
        place.play(1)
        assert int(masks(place)["w"].sum()) == 2


def test_a_download_holds_its_values_and_one_mask_and_an_upload_no_position(
    world: Any, parabola: Any
) -> None:
    start = {"w": torch.randn(20_000, generator=torch.Generator().manual_seed(0))}
    place = world(Prune(FedAvg(), Density(0.25)), [parabola(center=1.0)], start)
    place.play(2)
    values = 4 * 5000
    assert values < len(encode(place.replies[0].upload)) < values + 200
    positions = 20_000 * 0.8113 / 8
    assert len(encode(place.downloads["c0"])) < values + 1.05 * positions + 300


def test_what_a_client_uses_survives_the_wire_even_rounded(world: Any, parabola: Any) -> None:
    place = world(Prune(Scaffold(), Density(0.5)), [parabola(center=1.0)], START)
    place.play(2)
    sent = place.downloads["c0"]
    arrived = decode(encode(sent))
    used = place.algorithm.deployed(arrived, {})
    assert all(torch.equal(used[name], t) for name, t in place.deployed("c0").items())
    rough = decode(encode(sent, values="int4"))
    assert all(torch.equal(t, sent["mask"][n]) for n, t in rough["mask"].items())


def test_it_nests_with_freeze_either_way(drive: Any) -> None:
    params = {"lora_A": torch.full((4,), 9.0), "lora_B": torch.tensor([4.0, 1.0, 3.0, 2.0])}
    round = Round(1, 0, {"c": {}}, ("c",), 1.0)
    outside: Any = Freeze(Prune(FedAvg(), Density(0.5)))
    inside: Any = Prune(Freeze(FedAvg()), Density(0.5))
    for algorithm, kept in ((outside, [True, False, True, False]), (inside, [False] * 4)):
        download = algorithm.broadcast(algorithm.init(params, 0), round)["c"]
        half = algorithm.client_update(Task("train", 1, "c", 0, {}, download), {})
        _, _, (fit,) = drive(half, lambda fit: Done(fit.start, 1))
        mask = {n: m.expand(4) != 0 for n, m in fit.mask.items()}
        assert not bool(mask["lora_A"].any())
        assert mask["lora_B"].tolist() == kept
        used = algorithm.deployed(download, {})
        assert used.keys() == params.keys()
        assert torch.equal(used["lora_A"], params["lora_A"])


def test_an_evaluation_the_inner_algorithm_asks_for_is_passed_on(drive: Any) -> None:
    class Look:
        def client_update(self, task: Task, client_state: Any) -> Any:
            done = yield Evaluate(task.download["params"])
            return Reply(task.client, {}, done.num_examples), {}

    look: Any = Look()
    download = {
        "params": {"w": torch.tensor([3.0])},
        "mask": {"w": torch.tensor([False, True])},
    }
    half = Prune(look).client_update(Task("train", 1, "c", 0, {}, download), {})
    _, _, (work,) = drive(half, lambda work: Done({}, 5))
    assert work.params["w"].tolist() == [0.0, 3.0]


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: Prune(FedAvg(), scope="row"), r"prune\.scope must be global or tensor, got 'row'"),  # type: ignore[arg-type]
        (
            lambda: Prune(FedAvg(), Density(tiers={"phone": 0.1})),
            r"prune\.density\.tiers needs prune\.regrow, got",
        ),
    ],
)
def test_misuse_is_one_sentence_that_says_where(act: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        act()
