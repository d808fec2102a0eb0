"""Tensors that stay at their client."""

from typing import Any

import pytest
import torch

from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.local import LocalOnly
from fedloom.algorithms.personal import Personal
from fedloom.algorithms.scaffold import Scaffold
from fedloom.core.params import equal
from fedloom.core.protocols import Task
from fedloom.wire.format import encode_task
from fedloom.wire.wire_settings import WireSettings

A, B = "layers.1.lora_A.weight", "layers.1.lora_B.weight"
A10, B10 = "layers.10.lora_A.weight", "layers.10.lora_B.weight"
INNER = [FedAvg(), FedAvg(mu=0.1), Scaffold()]
IDS = ["fedavg", "fedprox", "scaffold"]


def lora() -> dict[str, torch.Tensor]:
    return {
        name: torch.full((2, 4) if "lora_A" in name else (4, 2), 0.5, dtype=torch.float64)
        for name in (A, B, A10, B10)
    }


@pytest.mark.parametrize("inner", INNER, ids=IDS)
def test_what_is_a_client_s_own_is_in_no_upload_and_no_server_state(
    inner: Any, world: Any, parabola: Any
) -> None:
    place = world(Personal(inner), [parabola(center=1.0), parabola(center=3.0)], lora())
    place.play(3)
    for reply in place.replies:
        assert all(set(group) == {A, A10} for group in reply.upload.values())
    assert set(place.state.inner.params) == {A, A10}
    assert equal(place.state.start, {B: lora()[B], B10: lora()[B10]})
    ends = [place.deployed(client) for client in place.memories]
    assert not torch.equal(ends[0][B], ends[1][B])
    # The download as everybody has it, not as the last client left it.
    assert equal(place.downloads["c0"]["params"], place.downloads["c1"]["params"])


def test_an_absent_client_s_own_waits_for_it_to_the_bit(world: Any, parabola: Any) -> None:
    place = world(Personal(FedAvg()), [parabola(center=float(i)) for i in range(10)], lora())
    place.play(1, cohort=["c0", "c1", "c2"])
    held = {n: t.clone() for n, t in place.memories["c0"]["local"].items()}
    place.play(1, cohort=["c3", "c4", "c5"])
    assert equal(place.memories["c0"]["local"], held)
    place.play(1, cohort=["c0", "c9"])
    began = place.asked[-2].start
    assert equal({n: began[n] for n in held}, held)
    # A client that nobody has asked yet begins as everybody did.
    assert torch.equal(place.asked[-1].start[B], lora()[B])


def test_the_shared_part_moves_as_it_would_alone(world: Any, parabola: Any) -> None:
    losses = [parabola(center=1.0), parabola(center=3.0, curvature=0.2)]
    both = world(Personal(FedAvg(mu=0.3)), losses, lora())
    alone = world(FedAvg(mu=0.3), losses, {A: lora()[A], A10: lora()[A10]})
    for place in (both, alone):
        place.play(3)
    assert equal(both.state.inner.params, alone.state.params)


def test_what_is_a_client_s_own_learns_as_in_local_training(world: Any, parabola: Any) -> None:
    losses = [parabola(center=1.0), parabola(center=3.0, curvature=0.2)]
    both, alone = world(Personal(FedAvg()), losses, lora()), world(LocalOnly(), losses, lora())
    for place in (both, alone):
        place.play(3)
    for client in both.memories:
        assert torch.equal(both.deployed(client)[B], alone.deployed(client)[B])


def test_layer_1_is_not_layer_10(world: Any, parabola: Any) -> None:
    place = world(Personal(FedAvg(), r"layers\.1"), [parabola(center=1.0)], lora())
    place.play(1)
    assert set(place.memories["c0"]["local"]) == {A, B}


def test_what_everybody_began_with_costs_no_bytes_where_it_is_zero() -> None:
    start = {A: torch.randn(8, 512), B: torch.zeros(512, 8)}
    algorithm = Personal(FedAvg())
    state = algorithm.init(start, 0)
    from_server = {"params": {**state.inner.params, **state.start}}
    sent = Task("train", 1, "c", 0, {}, from_server)
    assert len(encode_task(sent, settings=WireSettings())) < 4 * 8 * 512 + 300


@pytest.mark.parametrize(
    ("local", "said"),
    [
        (
            "lora_",
            r"must match some of the tuned tensors, such as layers\.1\.lora_A\.weight, got 'lora_'",
        ),
        ("lora_[AB]", "must leave a tensor to share"),
    ],
)
def test_a_pattern_of_nothing_or_of_all_is_refused(local: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Personal(FedAvg(), local).init(lora(), 0)


@pytest.mark.parametrize(
    ("local", "said"), [("(", "must be a regular expression"), ("", "got none")]
)
def test_what_is_no_pattern_is_refused(local: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Personal(FedAvg(), local)
