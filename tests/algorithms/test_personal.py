"""Tensors that stay at their client."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from fedloom.algorithms.alternate import Alternate
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.freeze import Freeze
from fedloom.algorithms.local import LocalOnly
from fedloom.algorithms.personal import Personal
from fedloom.algorithms.scaffold import Scaffold
from fedloom.core.description import describe
from fedloom.core.params import equal
from fedloom.core.phases import Phase
from fedloom.core.protocols import Done, Fit, Reply, Round, Task
from fedloom.core.split import SplitState
from fedloom.recipe import RecipeError, build_recipe
from fedloom.recipe_text import to_tree
from fedloom.wire.format import encode_reply, encode_task
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
    assert equal(place.state.others, {B: lora()[B], B10: lora()[B10]})
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
    both, alone = (
        world(Personal(FedAvg(mu=0.3)), losses, lora()),
        world(LocalOnly(), losses, lora()),
    )
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
    from_server = {"params": {**state.inner.params, **state.others}}
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


def test_what_a_phase_may_train_is_said() -> None:
    with pytest.raises(ValueError, match="must be local, shared or all, got 'head'"):
        Phase("head")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("local", "said"), [("(", "must be a regular expression"), ("", "got none")]
)
def test_what_is_no_pattern_is_refused(local: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Personal(FedAvg(), local)


def test_what_is_a_client_s_own_is_in_no_byte_it_sends() -> None:
    """Its values are such as occur nowhere else, and are looked for in both messages."""
    start = {n: torch.zeros(t.shape) for n, t in lora().items()}
    algorithm, marked = Personal(FedAvg(), phases=REP), torch.tensor([1.2345e7, -7.654e6])
    state = algorithm.init(start, 0)
    round = Round(1, 1, {"c": {}}, ("c",), 1.0)
    download = algorithm.broadcast(state, round)["c"]
    held = {n: marked.expand(4, 2).clone() for n in (B, B10)}
    half = algorithm.client_update(Task("train", 1, "c", 0, {}, download), {"local": held})
    work = next(half)
    try:
        while True:
            assert isinstance(work, Fit)
            moved = {n: t + (0.5 if n in (A, A10) else 1e-3) for n, t in work.start.items()}
            work = half.send(Done(moved, 1, 1))
    except StopIteration as stop:
        reply: Reply = stop.value[0]
        kept = stop.value[1]["local"]
    sent = encode_reply(reply, settings=WireSettings())
    for tensor in (marked, *held.values(), *kept.values()):
        for value in tensor.flatten():
            assert value.numpy().tobytes() not in sent
    # What is shared moved by a half, in the phase that trains it.
    assert torch.tensor(0.5).numpy().tobytes() in sent
    assert {n for group in reply.upload.values() for n in group} == {A, A10}


# --- phases --------------------------------------------------------------------------------------

REP = (Phase("local", 3), Phase("shared", 5))


@pytest.mark.parametrize("inner", INNER, ids=IDS)
def test_in_each_phase_the_others_rest_to_the_bit(inner: Any, world: Any, parabola: Any) -> None:
    losses = [parabola(center=1.0), parabola(center=3.0)]
    place = world(Personal(inner, phases=REP), losses, lora())
    for _ in range(3):
        before = {n: t.clone() for n, t in place.state.inner.params.items()}
        memories = {c: m.get("local") for c, m in place.memories.items()}
        place.play(1)
        first, second = place.asked[-4:-2]
        assert (first.steps, second.steps) == (3, 5)
        # The shared tensors of the first phase are those of the download, and stay so.
        assert equal({n: first.start[n] for n in before}, before)
        assert equal({n: second.start[n] for n in before}, before)
        if memories.get("c0"):
            assert equal({n: first.start[n] for n in (B, B10)}, memories["c0"])
        own = place.memories["c0"]["local"]
        assert not torch.equal(first.start[B], own[B])
        assert equal({n: second.start[n] for n in own}, own)
        assert not torch.equal(place.state.inner.params[A], before[A])


def test_phases_that_train_nothing_local_leave_it_where_it_began(world: Any, parabola: Any) -> None:
    """FedBABU until its last rounds, where the head learns too."""
    late = (Phase("shared"), Phase("local", 4, from_round=3))
    place = world(Personal(FedAvg(), phases=late), [parabola(center=1.0)], lora())
    place.play(2)
    assert torch.equal(place.deployed("c0")[B], lora()[B])
    assert len(place.asked) == 2
    place.play(1)
    assert len(place.asked) == 4
    assert not torch.equal(place.deployed("c0")[B], lora()[B])


@pytest.mark.parametrize("phases", [(), REP[1:], (Phase("local", 3), Phase("shared"))])
def test_without_anything_of_its_own_it_is_the_inner_algorithm_to_the_bit(
    phases: tuple[Phase, ...], world: Any, parabola: Any
) -> None:
    losses = [parabola(center=1.0), parabola(center=3.0, curvature=0.2)]
    steps = phases[-1].steps if phases else None
    plain = world(FedAvg(mu=0.3), losses, lora(), steps=steps or 10)
    empty = world(Personal(FedAvg(mu=0.3), phases=phases), losses, lora())
    # A pattern of nothing is refused where a run begins.
    empty.algorithm = replace(empty.algorithm, local="nothing")
    empty.state = SplitState(FedAvg().init(lora(), 0), {})
    for place in (plain, empty):
        place.play(3)
    assert equal(empty.state.inner.params, plain.state.params)
    assert [r.metrics for r in empty.replies] == [r.metrics for r in plain.replies]


def test_what_the_inner_algorithm_is_told_is_of_the_phases_that_move_what_it_shares() -> None:
    algorithm = Personal(FedAvg(), phases=(*REP, Phase("all", 2)))
    task = Task("train", 1, "c", 0, {}, {"params": lora()})
    half = algorithm.client_update(task, {})
    work = next(half)
    for number, tokens in ((3, 30.0), (5, 50.0), (2, 20.0)):
        assert isinstance(work, Fit)
        assert work.steps == number
        told = {"loss": float(number), "num_tokens": tokens, "skipped_steps": 1.0}
        try:
            work = half.send(Done(dict(work.start), 7, number, 0.1 * number, metrics=told))
        except StopIteration as stop:
            reply = stop.value[0]
    assert reply.metrics == {"loss": 2.0, "num_tokens": 100.0, "skipped_steps": 3.0}
    assert reply.weight == 7


@pytest.mark.parametrize("outer", [Alternate, Freeze], ids=["alternate", "freeze"])
def test_a_wrapper_outside_that_knows_all_names_is_understood(
    outer: Any, world: Any, parabola: Any
) -> None:
    names = ("layers.1.", "layers.10.") if outer is Alternate else ("layers.10.",)
    place = world(outer(Personal(FedAvg()), names), [parabola(center=1.0)], lora())
    place.play(2)
    inner = place.state.inner if outer is Alternate else place.state.inner.inner
    assert set(inner.params) == ({A, A10} if outer is Alternate else {A})
    assert not torch.equal(inner.params[A], lora()[A])


def test_it_tells_what_stays_at_home() -> None:
    algorithm = Personal(FedAvg(), r"layers\.1")
    assert not describe(algorithm).local
    assert describe(algorithm, algorithm.init(lora(), 0)).local == {A: 8, B: 8}


def test_a_recipe_s_phases_are_read_and_written(small_recipe: Any) -> None:
    phases = [{"train": "local", "steps": 2}, {"train": "shared", "steps": 3, "from_round": 1}]
    algorithm = [{"personal": {"phases": phases}}, "fedavg"]
    recipe = small_recipe(algorithm=algorithm, local={"steps": None})
    assert recipe.algorithm.phases == (Phase("local", 2), Phase("shared", 3))
    assert build_recipe(to_tree(recipe)) == recipe
    with pytest.raises(ValueError, match=r"set algorithm\.personal\.phases\.steps"):
        small_recipe(algorithm=algorithm, local={"steps": 2})


@pytest.mark.parametrize(
    ("phases", "said"),
    [
        ("local", r"personal\.phases must be a list of settings, got 'local'"),
        ([{"train": "head"}], r"phases\.0\.train: input should be 'local', 'shared' or 'all'"),
        ([{"train": "shared", "step": 2}], r"unknown key 'step' in .*did you mean 'steps'"),
        ([{"steps": 2}], r"personal\.phases\.0 needs train"),
        ([{"train": "shared", "steps": 0}], r"personal\.phases steps must be at least 1, got 0"),
        (
            [{"train": "local"}, {"train": "shared", "from_round": 2}],
            r"must train what is shared in some phase of every round, got local from round 1, shared",
        ),
        (
            [{"train": "shared"}, {"train": "local", "from_round": 99}],
            r"personal\.phases\.1\.from_round must be at most run\.rounds, which is \d+, got 99",
        ),
    ],
)
def test_phases_that_cannot_be_meant_are_refused(phases: Any, said: str, small_recipe: Any) -> None:
    with pytest.raises(RecipeError, match=said):
        small_recipe(algorithm=[{"personal": {"phases": phases}}, "fedavg"])
