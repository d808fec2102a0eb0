from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedloom.algorithms.ditto import Ditto
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.freeze import Freeze
from fedloom.algorithms.local import LocalOnly
from fedloom.algorithms.pfedme import PFedMe
from fedloom.algorithms.scaffold import Scaffold
from fedloom.core.protocols import Done, Evaluate, Payload, Reply, Round, Task
from fedloom.server.optimizers import Adam
from fedloom.wire.format import decode, encode

INNER = [FedAvg(), FedAvg(Adam(), mu=0.1), Scaffold(), PFedMe(), LocalOnly(), Ditto(Scaffold())]
IDS = ["fedavg", "fedadam with fedprox", "scaffold", "pfedme", "local", "ditto(scaffold)"]
LORA_A, LORA_B = "layers.0.lora_A.weight", "layers.0.lora_B.weight"


def lora() -> dict[str, torch.Tensor]:
    return {
        LORA_A: torch.zeros(4, 16, dtype=torch.float64),
        LORA_B: torch.zeros(16, 4, dtype=torch.float64),
    }


@pytest.mark.parametrize("inner", INNER, ids=IDS)
def test_only_b_is_trained_sent_and_kept(inner: Any, world: Any, parabola: Any) -> None:
    place = world(Freeze(inner), [parabola(center=1.0), parabola(center=3.0)], lora())
    place.play(3)
    for reply in place.replies:
        assert all(set(group) == {LORA_B} for group in reply.upload.values())
    for client_state in place.memories.values():
        assert all(set(group) == {LORA_B} for group in client_state.values())
    for payload in place.downloads.values():
        assert set(payload["params"]) == {LORA_A, LORA_B}
        assert all(set(group) == {LORA_B} for name, group in payload.items() if name != "params")
    for client in place.memories:
        deployed = place.deployed(client)
        assert deployed[LORA_A].shape == (4, 16)
        assert not bool(deployed[LORA_A].any())
    moved = place.memories.get("c0", {}).get("personal") or place.state.inner.params
    assert bool(moved[LORA_B].any())


@pytest.mark.parametrize("inner", INNER, ids=IDS)
def test_the_trainer_is_asked_for_every_name_and_moves_no_frozen_one(
    inner: Any, world: Any, parabola: Any
) -> None:
    place = world(Freeze(inner), [parabola(center=1.0)], lora())
    place.play(2)
    for fit in place.asked:
        extended = [fit.start, fit.mask]
        extended += [fit.proximal.center] if fit.proximal else []
        extended += [fit.gradient_offset] if fit.gradient_offset else []
        assert all(set(params) == {LORA_A, LORA_B} for params in extended)
        assert (float(fit.mask[LORA_A]), float(fit.mask[LORA_B])) == (0.0, 1.0)


@pytest.mark.parametrize("inner", INNER, ids=IDS)
def test_b_moves_as_it_would_without_a(inner: Any, world: Any, parabola: Any) -> None:
    losses = [parabola(center=1.0), parabola(center=3.0, curvature=0.2)]
    frozen = world(Freeze(inner), losses, lora())
    alone = world(inner, losses, {LORA_B: lora()[LORA_B]})
    for place in (frozen, alone):
        place.play(4)
    assert torch.equal(frozen.state.inner.params[LORA_B], alone.state.params[LORA_B])
    for client in alone.memories:
        assert torch.equal(frozen.deployed(client)[LORA_B], alone.deployed(client)[LORA_B])


@pytest.mark.parametrize("values", ["float32", "bfloat16", "int8", "int4"])
def test_both_messages_are_half_as_long_as_those_of_lora(
    values: Any, world: Any, parabola: Any
) -> None:
    start = {
        f"layers.{i}.lora_{x}.weight": torch.zeros(*shape)
        for i in range(4)
        for x, shape in (("A", (16, 256)), ("B", (256, 16)))
    }
    frozen, full = (
        world(algorithm, [parabola(center=1.0)], start)
        for algorithm in (Freeze(FedAvg()), FedAvg())
    )
    for place in (frozen, full):
        place.play(2)
    downloads = [len(encode(place.downloads["c0"], values=values)) for place in (frozen, full)]
    uploads = [len(encode(place.replies[0].upload, values=values)) for place in (frozen, full)]
    assert downloads[0] / downloads[1] == pytest.approx(0.5, abs=0.02)
    assert uploads[0] / uploads[1] == pytest.approx(0.5, abs=0.02)


def test_what_a_client_uses_survives_the_wire(world: Any, parabola: Any) -> None:
    place = world(Freeze(Scaffold()), [parabola(center=1.0)], lora())
    place.play(2)
    sent = place.downloads["c0"]
    arrived = place.algorithm.deployed(decode(encode(sent)), {})
    assert arrived.keys() == lora().keys()
    assert all(torch.equal(arrived[name], t) for name, t in place.deployed("c0").items())


def test_clients_that_share_a_model_share_one_object() -> None:
    algorithm = Freeze(FedAvg())
    state = algorithm.init(lora(), 0)
    sent = algorithm.broadcast(state, Round(1, 0, {"a": {}, "b": {}}, ("a", "b"), 1.0))
    assert sent["a"] is sent["b"]
    assert algorithm.deployed(sent["a"], {}) is algorithm.deployed(sent["b"], {})


@pytest.mark.parametrize("inner", INNER, ids=IDS)
def test_frozen_tensors_that_are_not_zero_stay_as_they_are(
    inner: Any, world: Any, parabola: Any
) -> None:
    drawn = torch.arange(64, dtype=torch.float64).view(4, 16)
    place = world(Freeze(inner), [parabola(center=1.0)], {**lora(), LORA_A: drawn})
    place.play(2)
    assert torch.equal(place.deployed("c0")[LORA_A], drawn)
    for fit in place.asked:
        assert torch.equal(fit.start[LORA_A], drawn)
        assert fit.proximal is None or torch.equal(fit.proximal.center[LORA_A], drawn)
        assert fit.gradient_offset is None or not bool(fit.gradient_offset[LORA_A].any())
    assert all(LORA_A not in group for group in place.replies[0].upload.values())


def test_frozen_names_nest(drive: Callable[..., Any]) -> None:
    algorithm = Freeze(Freeze(FedAvg(), ("layers.1",)), ("lora_A",))
    params = {f"layers.{i}.lora_{x}": torch.full((2,), 1.0 + i) for i in (0, 1) for x in "AB"}
    state = algorithm.init(params, 0)
    download = algorithm.broadcast(state, Round(1, 0, {"c": {}}, ("c",), 1.0))["c"]
    half = algorithm.client_update(Task("train", 1, "c", 0, {}, download), {})
    reply, _, (fit,) = drive(half, lambda fit: Done(fit.start, 1))
    assert {name for name, m in fit.mask.items() if float(m)} == {"layers.0.lora_B"}
    assert set(reply.upload["delta"]) == {"layers.0.lora_B"}
    for complete in (fit.start, algorithm.deployed(download, {})):
        assert complete.keys() == params.keys()
        assert all(torch.equal(complete[name], t) for name, t in params.items())


def test_an_evaluation_the_inner_algorithm_asks_for_gets_every_name(
    drive: Callable[..., Any],
) -> None:
    class Look:
        def client_update(self, task: Task, client_state: Payload) -> Any:
            done = yield Evaluate(task.download["params"], "test")
            return Reply(task.client, {}, done.num_examples), {}

    look: Any = Look()
    download = {"params": {LORA_A: torch.tensor([3.0]), LORA_B: torch.ones(2)}}
    half = Freeze(look).client_update(Task("train", 1, "c", 0, {}, download), {})
    _, _, (work,) = drive(half, lambda work: Done({}, 5))
    assert {name: t.tolist() for name, t in work.params.items()} == {
        LORA_A: [3.0],
        LORA_B: [1.0, 1.0],
    }
    assert work.split == "test"


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: Freeze(FedAvg(), ()), r"freeze\.names must be parts of names, none empty, got"),
        (lambda: Freeze(FedAvg(), ("",)), r"freeze\.names must be parts of names, none empty, got"),
        (
            lambda: Freeze(FedAvg(), ("lora_C",)).init(lora(), 0),
            r"freeze\.names must be parts of tuned .*, such as layers\.0\.lora_A.*, got 'lora_C'",
        ),
        (
            lambda: Freeze(FedAvg(), ("lora",)).init(lora(), 0),
            r"freeze\.names must leave a tensor to train, got \['lora'\]",
        ),
    ],
)
def test_misuse_is_one_sentence_that_says_where(act: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        act()
