"""What holds for every algorithm of the table, with clients that are parabolas."""

import ast
import copy
import dataclasses
import importlib
import pickle
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fedloom.algorithms
from fedloom.algorithms import ALGORITHMS, WRAPPERS
from fedloom.algorithms.decomfl import DeComFL
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.fedbiot import FedBiOT
from fedloom.algorithms.fedex import FedEx
from fedloom.algorithms.fedkseed import FedKSeed
from fedloom.algorithms.fedlora import FedLoRA
from fedloom.algorithms.partial_pooling import PartialPooling
from fedloom.algorithms.private import Private
from fedloom.core.arms import Arm
from fedloom.core.params import params_map
from fedloom.core.protocols import Algorithm, Done, Evaluate, Fit, Losses, Payload, Task, Work
from fedloom.server.public import PublicText
from fedloom.testing.compare import same

# All of a cohort are asked the same, so that they are sent the same.
POOLING = PartialPooling(FedAvg(), replicates=1.0)
PRIVATE = Private(FedAvg(), 1.0, noise_multiplier=0.5, quantile=0.5, delta=0.1, noise_seed=1)
TRYING = FedEx(FedAvg(), (Arm(0.5), Arm(1.0, steps=3)))
ALIGNED = FedBiOT(FedAvg(), PublicText("builtin:polyglot"))
EVERY: dict[str, Algorithm[Any]] = {
    name: kind(FedAvg()) if name in WRAPPERS else kind()  # type: ignore[call-arg] # a protocol has no fields
    for name, kind in ALGORITHMS.items()
    if kind not in (Private, PartialPooling, FedBiOT, FedEx)
} | {"private": PRIVATE, "partial_pooling": POOLING, "fedbiot": ALIGNED, "fedex": TRYING}
MODULES = sorted(module.name for module in pkgutil.iter_modules(fedloom.algorithms.__path__))
PAPERS = Path(__file__).parents[2] / "PAPERS.md"
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
START = {"lora_A": torch.zeros(2, 3), "lora_B": torch.zeros(3, 2)}
FACTORS = {"lora_A": torch.ones(2, 3), "lora_B": torch.zeros(3, 2)}
SEEDS = {"coefficients": torch.zeros(16, dtype=torch.float64)}


def start_of(algorithm: Algorithm[Any]) -> dict[str, torch.Tensor]:
    """Return where a world of that algorithm begins: some have no meaning but in seed space, or where A is known."""
    if isinstance(algorithm, FedLoRA):
        return FACTORS
    return SEEDS if type(algorithm) in (FedKSeed, DeComFL) else START


def dataclasses_in(value: Any) -> set[type]:
    if dataclasses.is_dataclass(value):
        parts = [getattr(value, f.name) for f in dataclasses.fields(value)]
        return {type(value)}.union(*map(dataclasses_in, parts))
    parts = list(value.values()) if isinstance(value, dict) else []
    parts = list(value) if isinstance(value, tuple) else parts
    return set[type]().union(*map(dataclasses_in, parts))


@pytest.fixture(params=list(EVERY.values()), ids=list(EVERY))
def algorithm(request: pytest.FixtureRequest) -> Algorithm[Any]:
    """Return each algorithm of the table in turn."""
    found: Algorithm[Any] = request.param
    return found


@pytest.fixture
def place(algorithm: Algorithm[Any], world: Any, parabola: Any) -> Any:
    """Return three clients of that algorithm."""
    losses = [parabola(center=a, num_examples=n) for a, n in ((1.0, 2), (-2.0, 5), (0.5, 1))]
    return world(algorithm, losses, start_of(algorithm))


def test_an_algorithm_is_frozen_slotted_and_travels(algorithm: Any) -> None:
    assert pickle.loads(pickle.dumps(algorithm)) == algorithm
    assert "__dict__" not in dir(algorithm)
    with pytest.raises((AttributeError, TypeError)):
        algorithm.cache = 1
    for spec in dataclasses.fields(algorithm):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(algorithm, spec.name, None)


def test_a_server_update_is_a_pure_function(place: Any) -> None:
    place.play(2)
    state, replies = copy.deepcopy(place.state), copy.deepcopy(place.replies)
    first, metrics = place.algorithm.server_update(place.state, place.round, iter(place.replies))
    again, repeated = place.algorithm.server_update(state, place.round, iter(replies))
    assert same(first, again)
    assert metrics == repeated
    assert same(place.state, state)
    assert same(place.replies, replies)


def test_a_repeated_task_gives_the_same_reply_and_changes_nothing_it_was_given(place: Any) -> None:
    place.play(2)
    memories, downloads = copy.deepcopy(place.memories), copy.deepcopy(dict(place.downloads))
    first = [place.answer(client) for client in downloads]
    assert same(dict(place.downloads), downloads)
    place.memories = memories
    assert same(first, [place.answer(client) for client in downloads])


def test_an_uploads_table_depends_on_neither_data_nor_memory(
    algorithm: Any, place: Any, drive: Any
) -> None:
    place.play(1)

    def trained(work: Work, push: float) -> Done:
        if isinstance(work, Losses):
            each = torch.full((9,), push, dtype=torch.float64)
            return Done({}, 9, record={"losses": {"losses": each}})
        if isinstance(work, Evaluate):
            return Done({}, 9, metrics={"loss": push})
        assert isinstance(work, Fit)
        moved = params_map(lambda t: t + push, work.start)
        scalars = params_map(lambda t: t * push, work.seed_sequence or {})
        return Done(moved, 9, 1, 1.0, {"scalars": scalars})

    def table(client_state: Any, push: float) -> list[tuple[str, str, torch.dtype, torch.Size]]:
        task = Task("train", 2, "c0", 3, {}, place.downloads["c0"])
        reply, _, _ = drive(
            algorithm.client_update(task, client_state),
            lambda work: trained(work, push),
        )
        return [
            (group, name, t.dtype, t.shape)
            for group, params in reply.upload.items()
            for name, t in params.items()
        ]

    memories: list[Payload] = [{}, place.memories["c0"]]
    tables = [table(client_state, push) for client_state in memories for push in (0.0, 5.0)]
    assert all(other == tables[0] for other in tables)


def test_every_dataclass_of_a_state_occurs_in_the_first(algorithm: Any, place: Any) -> None:
    known = dataclasses_in(algorithm.init(start_of(algorithm), 0))
    place.play(3)
    assert dataclasses_in(place.state) <= known


def test_the_keys_of_a_broadcast_are_the_cohort_and_the_same_payload_is_one_object(
    place: Any,
) -> None:
    place.play(1, ["c0", "c2"])
    secret = place.algorithm.server_sees == "noisy mean"
    drawn = place.state.mechanism.cohort(place.round) if secret else ("c0", "c2")
    assert tuple(place.downloads) == drawn
    assert len({id(payload) for payload in place.downloads.values()}) == 1


def test_a_client_can_use_what_it_gets_before_and_after_training(place: Any) -> None:
    place.play(1)
    memories: list[Payload] = [{}, place.memories["c0"]]
    for client_state in memories:
        deployed = place.algorithm.deployed(place.downloads["c0"], client_state)
        assert {name: t.shape for name, t in deployed.items()} == {
            name: t.shape for name, t in start_of(place.algorithm).items()
        }


def test_wrappers_are_those_whose_first_field_is_inner() -> None:
    assert {"ditto", "freeze", "flasc", "prune", "private"} <= WRAPPERS
    for name, kind in ALGORITHMS.items():
        assert dataclasses.is_dataclass(kind)
        names = [f.name for f in dataclasses.fields(kind)]
        assert ("inner" in names) == (names[:1] == ["inner"]) == (name in WRAPPERS)


def test_every_file_is_in_the_table_under_its_own_name() -> None:
    assert {kind.__module__.rpartition(".")[2] for kind in ALGORITHMS.values()} == set(MODULES)
    assert set(ALGORITHMS) == set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_a_file_opens_with_its_paper_and_the_deviations_from_it(name: str) -> None:
    text = importlib.import_module(f"fedloom.algorithms.{name}").__doc__ or ""
    assert ARXIV.search(text)
    assert re.search(r"\bDeviations?: ", text)


@pytest.mark.parametrize("name", MODULES)
def test_papers_names_every_file_with_the_same_papers(name: str) -> None:
    text = importlib.import_module(f"fedloom.algorithms.{name}").__doc__ or ""
    rows = [
        row
        for row in PAPERS.read_text().splitlines()
        if row.startswith(f"| `algorithms/{name}.py`")
    ]
    assert rows, f"PAPERS.md has no row for algorithms/{name}.py"
    assert set(ARXIV.findall(text)) == set(ARXIV.findall("\n".join(rows)))


@pytest.mark.parametrize("name", MODULES)
def test_a_file_is_short_and_imports_only_the_core_and_the_server(name: str) -> None:
    module = importlib.import_module(f"fedloom.algorithms.{name}")
    assert module.__file__
    source = Path(module.__file__).read_text()
    assert len(source.splitlines()) <= 200
    imported = {
        node.module or ""
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom)
    }
    ours = {module for module in imported if module.startswith("fedloom")}
    below = ("fedloom.core", "fedloom.privacy", "fedloom.server", "fedloom.clustering")
    assert all(module.startswith(below) for module in ours)
