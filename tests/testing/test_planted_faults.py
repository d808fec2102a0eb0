"""What is wrong with a method is found by the law it breaks, in a sentence that says what to do."""

import dataclasses
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.fedkseed import FedKSeed
from fedloom.client.local_settings import LocalSettings
from fedloom.core.description import Description
from fedloom.core.params import add, axpy, params_map, scale, sub, zeros_like
from fedloom.core.payloads import NoReplies, mean_upload, to_all
from fedloom.core.protocols import (
    ClientUpdate,
    Fit,
    Metrics,
    Params,
    Payload,
    Reply,
    Round,
    Sees,
    Task,
)
from fedloom.testing import AlgorithmError, check_algorithm
from fedloom.testing.examination import LAWS, examine
from fedloom.testing.subject import Subject
from fedloom.testing.watched import BrokenLaw


@dataclass(frozen=True)
class Plain:
    """FedAvg in its simplest form, whose faults are planted below."""

    lr: float = 1.0

    @property
    def server_sees(self) -> Sees:
        return "mean"

    def describe(self, state: Any) -> Description:
        return Description(averages_deltas=True)

    def init(self, params: Params, seed: int) -> Any:
        return Shared(params)

    def broadcast(self, state: Any, round: Round) -> Mapping[str, Payload]:
        return to_all(round, {"params": state.params})

    def client_update(self, task: Task, client_state: Payload) -> ClientUpdate:
        start = task.download["params"]
        done = yield Fit(start)
        return Reply(task.client, {"delta": sub(done.params, start)}, 1.0, done.metrics), {}

    def deployed(self, download: Payload, client_state: Payload) -> Params:
        return download["params"]

    def server_update(
        self, state: Any, round: Round, replies: Iterable[Reply]
    ) -> tuple[Any, Metrics]:
        delta = mean_upload(replies)["delta"]
        return dataclasses.replace(state, params=axpy(self.lr, delta, state.params)), {}


@dataclass(frozen=True)
class Shared:
    params: Params


def laws_broken_by(algorithm: Any, **settings: Any) -> Mapping[str, str]:
    with pytest.raises(AlgorithmError) as caught:
        check_algorithm(algorithm, **{"rounds": 2, **settings})
    assert all(
        f"law {law!r}: {said}" in str(caught.value) for law, said in caught.value.broken.items()
    )
    return caught.value.broken


@pytest.fixture
def broken(tmp_path: Path) -> Callable[[Any, str], str]:
    """Return `broken(algorithm, law)`: the sentence of that law."""

    def sentence(algorithm: Any, law: str) -> str:
        with pytest.raises(BrokenLaw) as caught:
            examine(Subject(algorithm, tmp_path, rounds=2), law)
        return str(caught.value)

    return sentence


def test_a_sound_method_passes_every_law() -> None:
    report = check_algorithm(
        Plain(), local=LocalSettings(optimizer="adamw", lr=1e-2), num_clients=5
    )
    assert report.passed == tuple(LAWS)
    assert not report.inapplicable


# --- what it reads --------------------------------------------------------------------------------


class TakesTheLength(Plain):
    def server_update(self, state: Any, round: Round, replies: Any) -> tuple[Any, Metrics]:
        share = len(replies) / len(round.population)
        return Shared(axpy(share, mean_upload(replies)["delta"], state.params)), {}


class CountsReplies(Plain):
    def server_update(self, state: Any, round: Round, replies: Iterable[Reply]) -> Any:
        arrived = list(replies)
        share = len(arrived) / len(round.population)
        return Shared(axpy(share, mean_upload(arrived)["delta"], state.params)), {}


@pytest.mark.parametrize(
    ("kind", "said"),
    [(TakesTheLength, "has no len()"), (CountsReplies, "reads the number of replies")],
)
def test_reading_the_number_of_replies(
    kind: type[Plain], said: str, broken: Callable[[Any, str], str]
) -> None:
    found = broken(kind(), "number of replies")
    assert said in found
    assert "round.rate, the expected share" in found


class TakesTheLargest(Plain):
    def server_update(self, state: Any, round: Round, replies: Iterable[Reply]) -> Any:
        deltas = [reply.upload["delta"] for reply in replies]
        largest = max(deltas, key=lambda delta: sum(float(t.norm()) for t in delta.values()))
        return Shared(axpy(1.0, largest, state.params)), {}


def test_reading_single_uploads_while_saying_mean(
    broken: Callable[[Any, str], str], tmp_path: Path
) -> None:
    said = broken(TakesTheLargest(), "server sees")
    assert 'server_sees is "mean", but server_update reads single uploads' in said
    assert examine(Subject(TakesTheLargest(), tmp_path), "number of replies") is None


class TakesTheFirst(Plain):
    @property
    def server_sees(self) -> Sees:
        return "each"

    def server_update(self, state: Any, round: Round, replies: Iterable[Reply]) -> Any:
        for reply in replies:
            return Shared(axpy(1.0, reply.upload["delta"], state.params)), {}
        raise NoReplies("no client replied")


def test_an_update_that_depends_on_the_order_of_replies(broken: Callable[[Any, str], str]) -> None:
    assert "in reverse order the state differs" in broken(TakesTheFirst(), "order")


# --- what it keeps where --------------------------------------------------------------------------


@dataclass(frozen=True)
class StoresAField(Plain):
    rounds: int = 0

    def server_update(self, state: Any, round: Round, replies: Iterable[Reply]) -> Any:
        object.__setattr__(self, "rounds", self.rounds + 1)
        return Plain.server_update(self, state, round, replies)


class BesideItsFields(Plain):
    def client_update(self, task: Task, client_state: Payload) -> ClientUpdate:
        object.__setattr__(self, "last", task.client)
        return (yield from Plain.client_update(self, task, client_state))


@pytest.mark.parametrize(("kind", "name"), [(StoresAField, "rounds"), (BesideItsFields, "last")])
def test_state_on_self(kind: type[Plain], name: str, broken: Callable[[Any, str], str]) -> None:
    assert f"stored {name} on the algorithm" in broken(kind(), "nothing stored")


CALLS = [0]


class InAGlobal(Plain):
    def server_update(self, state: Any, round: Round, replies: Iterable[Reply]) -> Any:
        CALLS[0] += 1
        delta = mean_upload(replies)["delta"]
        return Shared(axpy(1 / CALLS[0], delta, state.params)), {}


def test_state_in_a_global_of_the_server(broken: Callable[[Any, str], str]) -> None:
    said = broken(InAGlobal(), "repeats")
    assert "server_update gave another result for the same state and replies" in said
    assert "went on from its checkpoint" in broken(InAGlobal(), "resume")


VARIATES: dict[str, Params] = {}


class VariatesInAGlobal(Plain):
    def client_update(self, task: Task, client_state: Payload) -> ClientUpdate:
        start = task.download["params"]
        own = VARIATES.get(task.client, zeros_like(start))
        done = yield Fit(start, gradient_offset=own)
        VARIATES[task.client] = add(own, sub(start, done.params))
        return Reply(task.client, {"delta": sub(done.params, start)}), {}


def test_state_in_a_global_of_the_clients(broken: Callable[[Any, str], str]) -> None:
    assert "on clients in their client state" in broken(VariatesInAGlobal(), "resume")


class Bare:
    def __init__(self, params: Params) -> None:
        self.params = params


class StateOfNoDataclass(Plain):
    def init(self, params: Params, seed: int) -> Any:
        return Bare(params)


@dataclass(frozen=True)
class Counting:
    params: Params
    count: int = dataclasses.field(default=0, init=False)


class HiddenCounter(Plain):
    def init(self, params: Params, seed: int) -> Any:
        return Counting(params)


@dataclass(frozen=True)
class Loose:
    params: Params
    names: Any


class StateOfASet(Plain):
    def init(self, params: Params, seed: int) -> Any:
        return Loose(params, {"a", "b"})


class LateState(Plain):
    def init(self, params: Params, seed: int) -> Any:
        return Loose(params, None)

    def server_update(self, state: Any, round: Round, replies: Iterable[Reply]) -> Any:
        after, _ = Plain.server_update(self, state, round, replies)
        return dataclasses.replace(after, names=Shared({})), {}


class LosesItsAttribute(Plain):
    def server_update(self, state: Any, round: Round, replies: Iterable[Reply]) -> Any:
        after, _ = Plain.server_update(self, state, round, replies)
        object.__setattr__(after, "seen", round.number)
        return after, {}


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (StateOfNoDataclass, "init returned a Bare: a state must be a frozen dataclass"),
        (HiddenCounter, "Counting.count is no argument of its constructor"),
        (StateOfASet, "is a set, a checkpoint holds frozen dataclasses"),
        (LateState, "has a dataclass that is not in what init returned"),
        (LosesItsAttribute, "came back from its checkpoint as another"),
    ],
)
def test_a_state_that_no_checkpoint_holds(
    kind: type[Plain], said: str, broken: Callable[[Any, str], str]
) -> None:
    assert said in broken(kind(), "checkpoint")


# --- what it sends --------------------------------------------------------------------------------


class Shaped(Plain):
    """Sends one more tensor, of a size that something decides."""

    def size(self, task: Task, client_state: Payload, moved: Params, num_examples: int) -> int:
        return 1

    def client_update(self, task: Task, client_state: Payload) -> ClientUpdate:
        start = task.download["params"]
        done = yield Fit(start)
        delta = sub(done.params, start)
        size = self.size(task, client_state, delta, done.num_examples)
        more = {"w": torch.zeros(size)}
        return Reply(task.client, {"delta": delta, "more": more}), {"known": {"w": torch.ones(1)}}


class ByData(Shaped):
    def size(self, task: Task, client_state: Payload, moved: Params, num_examples: int) -> int:
        return num_examples


class ByTraining(Shaped):
    def size(self, task: Task, client_state: Payload, moved: Params, num_examples: int) -> int:
        return sum(int((t != 0).sum()) for t in moved.values())


class ByName(Shaped):
    def size(self, task: Task, client_state: Payload, moved: Params, num_examples: int) -> int:
        return len(task.client)


class ByClientState(Shaped):
    def size(self, task: Task, client_state: Payload, moved: Params, num_examples: int) -> int:
        return 1 + len(client_state)


class ByDownload(Shaped):
    def size(self, task: Task, client_state: Payload, moved: Params, num_examples: int) -> int:
        return sum(int((t > 0).sum()) for t in task.download["params"].values())


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        (ByData, "refused"),
        (ByTraining, "refused"),
        (ByName, "depends on who the client is (more/w: expected float32 (2,), got float32 (8,))"),
        (ByClientState, "refused"),
        (ByDownload, "depends on the values of the download"),
    ],
)
def test_an_upload_whose_shape_depends_on_more_than_the_download(
    kind: type[Plain], cause: str, broken: Callable[[Any, str], str]
) -> None:
    assert cause in broken(kind(), "upload shape")


# --- what it does besides -------------------------------------------------------------------------


class TorchDraw(Plain):
    def client_update(self, task: Task, client_state: Payload) -> ClientUpdate:
        noisy = params_map(lambda t: t + torch.randn(t.shape), task.download["params"])
        done = yield Fit(noisy)
        return Reply(task.client, {"delta": sub(done.params, noisy)}), {}


class NumpyDraw(Plain):
    def broadcast(self, state: Any, round: Round) -> Mapping[str, Payload]:
        np.random.rand()  # noqa: NPY002
        return Plain.broadcast(self, state, round)


class PythonDraw(Plain):
    def server_update(self, state: Any, round: Round, replies: Iterable[Reply]) -> Any:
        random.random()
        return Plain.server_update(self, state, round, replies)


class Seeds(Plain):
    def client_update(self, task: Task, client_state: Payload) -> ClientUpdate:
        torch.manual_seed(task.seed)
        return (yield from Plain.client_update(self, task, client_state))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (TorchDraw, "client_update moved the global generator of torch"),
        (NumpyDraw, "broadcast moved the global generator of numpy"),
        (PythonDraw, "server_update moved the global generator of random"),
        (Seeds, "client_update moved the global generator of torch"),
    ],
)
def test_a_global_random_draw(
    kind: type[Plain], said: str, broken: Callable[[Any, str], str]
) -> None:
    assert said in broken(kind(), "random draws")


class WritesDownload(Plain):
    def client_update(self, task: Task, client_state: Payload) -> ClientUpdate:
        start = task.download["params"]
        done = yield Fit(start)
        for name, t in start.items():
            t.sub_(done.params[name])
        return Reply(task.client, {"delta": scale(start, -1.0)}), {}


class WritesState(Plain):
    def server_update(self, state: Any, round: Round, replies: Iterable[Reply]) -> Any:
        for name, t in mean_upload(replies)["delta"].items():
            state.params[name].add_(t)
        return state, {}


class WritesClientState(Plain):
    def client_update(self, task: Task, client_state: Payload) -> ClientUpdate:
        reply, _ = yield from Plain.client_update(self, task, client_state)
        kept = client_state or {"count": {"n": torch.zeros(1)}}
        kept["count"]["n"].add_(1)
        return reply, kept


class WritesReplies(Plain):
    def server_update(self, state: Any, round: Round, replies: Iterable[Reply]) -> Any:
        arrived = list(replies)
        for reply in arrived:
            for t in reply.upload["delta"].values():
                t.mul_(0.5)
        return Plain.server_update(self, state, round, iter(arrived))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (WritesDownload, "client_update changed its argument download in place"),
        (WritesState, "server_update changed its argument state in place"),
        (WritesClientState, "client_update changed its argument client_state in place"),
        (WritesReplies, "server_update changed its argument replies in place"),
    ],
)
def test_an_argument_that_is_changed(
    kind: type[Plain], said: str, broken: Callable[[Any, str], str]
) -> None:
    assert said in broken(kind(), "arguments")


class Decays(Plain):
    def server_update(self, state: Any, round: Round, replies: Iterable[Reply]) -> Any:
        after, _ = Plain.server_update(self, state, round, replies)
        return Shared(scale(after.params, 0.9)), {}


@pytest.mark.slow
def test_a_model_that_moves_at_a_learning_rate_of_zero() -> None:
    found = laws_broken_by(Decays())
    assert list(found) == ["still"]
    assert "at a learning rate of 0 a model moved by" in found["still"]
    report = check_algorithm(Decays(), rounds=2, exempt=["still"])
    assert report.exempt == ("still",)
    assert "still" not in report.passed


class DeploysHalf(Plain):
    def deployed(self, download: Payload, client_state: Payload) -> Params:
        return scale(download["params"], 0.5)


class DeploysSome(Plain):
    def deployed(self, download: Payload, client_state: Payload) -> Params:
        return dict(list(download["params"].items())[1:])


@pytest.mark.parametrize(
    ("kind", "said"),
    [(DeploysHalf, "deploys differs from what it was sent"), (DeploysSome, "return every tensor")],
)
def test_another_model_deployed_than_was_sent(
    kind: type[Plain], said: str, broken: Callable[[Any, str], str]
) -> None:
    assert said in broken(kind(), "deployed")


class DividesByNobody(Plain):
    def server_update(self, state: Any, round: Round, replies: Iterable[Reply]) -> Any:
        arrived = list(replies)
        total = sum(reply.weight for reply in arrived)
        weights = [reply.weight / total for reply in arrived]
        assert abs(1 - sum(weights)) < 1e-9 or 1 / total
        return Plain.server_update(self, state, round, iter(arrived))


def test_a_mean_of_nobody(broken: Callable[[Any, str], str]) -> None:
    said = broken(DividesByNobody(), "absences")
    assert "server_update raised ZeroDivisionError" in said
    assert "raise NoReplies" in said


# --- what is none ---------------------------------------------------------------------------------


class Loud:
    """Neither frozen nor whole."""


@dataclass(frozen=True)
class Unfinished:
    lr: float = 1.0


@pytest.mark.parametrize(
    ("algorithm", "said"),
    [
        (Loud(), "Loud is no frozen dataclass"),
        (Unfinished(), "Unfinished has no server_sees"),
        (FedKSeed(), "init refuses the space lora (fedkseed needs tune: seeds"),
    ],
)
def test_what_is_no_algorithm(algorithm: Any, said: str) -> None:
    found = laws_broken_by(algorithm)
    assert list(found) == ["protocol"]
    assert said in found["protocol"]


class Breaks(Plain):
    def server_update(self, state: Any, round: Round, replies: Iterable[Reply]) -> Any:
        raise KeyError("delta")


def test_what_a_method_raises_itself_is_told_with_its_law(
    broken: Callable[[Any, str], str],
) -> None:
    assert "the examination raised KeyError: 'delta'" in broken(Breaks(), "checkpoint")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"space": "full"}, "space must be one of lora, seeds, got 'full'"),
        ({"num_clients": 3}, "num_clients must be at least 4, got 3"),
        ({"rounds": 1}, "rounds must be at least 2, got 1"),
        ({"exempt": ["resumes"]}, "exempt must be laws .*, got 'resumes'"),
    ],
)
def test_a_setting_that_makes_no_examination_is_refused(
    settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        check_algorithm(FedAvg(), **settings)
