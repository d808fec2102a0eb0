"""Clusters on real trainers: resumed through a change, and found on the bundled model and corpus."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.laws.conftest import in_seed_space

from fedloom import experiment
from fedloom.algorithms.clustered import Clustered
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.local import LocalOnly
from fedloom.algorithms.scaffold import Scaffold
from fedloom.clustering.modes import Auto
from fedloom.clustering.sharing import Sharing
from fedloom.core.description import describe
from fedloom.core.payloads import mean_upload
from fedloom.core.protocols import Reply, Round, Task
from fedloom.core.rehearsal import rehearse
from fedloom.core.seed_sequences import COEFFICIENTS
from fedloom.engines.inprocess import InProcess
from fedloom.recipe import build_recipe
from fedloom.report.run_folder import read_results
from fedloom.rounds.checkpoint import Checkpoints, state_sha256
from fedloom.rounds.loop import begin
from fedloom.server.optimizers import Adam
from fedloom.server.samplers import Full

LANGUAGES = ["en", "de", "es", "pt", "sv"]


@pytest.mark.parametrize(
    "share", [Sharing(pool="off"), Sharing(pool="on")], ids=["apart", "pooled"]
)
def test_a_run_resumed_before_it_regroups_ends_with_the_same_bytes(
    share: Sharing, bench: Callable[..., Any], tmp_path: Path
) -> None:
    """The change of clusters comes after the checkpoint."""
    it, algorithm = bench(), Clustered(FedAvg(Adam(0.1)), Auto(every=1, enough=0.5), share)
    engine = it.engine(InProcess, algorithm, tmp_path / "a")
    checkpoints = Checkpoints(tmp_path / "c", keep=9)
    whole, said = it.rounds(algorithm, engine, 6, after=checkpoints.save)
    changed = sorted(whole.state.grouping.changes)
    assert changed, "clients that count up and clients that count down are told apart"
    assert whole.state.cluster_states
    middle = changed[-1] - 1
    for late in range(middle + 1, 7):
        (tmp_path / "c" / f"round-{late:06d}.ckpt").unlink()
    run = begin(algorithm, it.space.start(), 5)
    if middle:
        run = checkpoints.load(run).run
        assert run.number == middle
    again, said_again = it.rounds(algorithm, engine, 6, run=run)
    assert state_sha256(again) == state_sha256(whole)
    assert said_again == said[middle:]


@pytest.mark.parametrize(
    "inner", [FedAvg(), FedAvg(Adam(0.1)), Scaffold()], ids=["fedavg", "fedadam", "scaffold"]
)
def test_one_cluster_is_the_inner_algorithm_to_the_bit(
    inner: Any, bench: Callable[..., Any], tmp_path: Path
) -> None:
    it = bench()
    plain, said = it.rounds(inner, it.engine(InProcess, inner, tmp_path / "a"), 3)
    algorithm = Clustered(inner, Auto(1))
    whole, told = it.rounds(algorithm, it.engine(InProcess, algorithm, tmp_path / "b"), 3)
    assert state_sha256(whole.state.global_state) == state_sha256(plain.state)
    for (ours, _), (theirs, _) in zip(told, said, strict=True):
        assert {name: ours[name] for name in theirs} == dict(theirs), "bytes too"


def test_who_says_it_averages_deltas_takes_their_mean_in_the_place_of_all(
    cases: dict[str, Any],
) -> None:
    """What pooled clusters rest on: one reply with a mean is as good as the replies it is of."""
    start = {"a.lora_A": torch.zeros(2, 3), "a.lora_B": torch.zeros(3, 2)}
    seeds = {COEFFICIENTS: torch.zeros(8, dtype=torch.float64)}
    people = {client: {"tier": "phone"} for client in "abcd"}
    saying = {n: one for n, one in cases.items() if describe(one).averages_deltas}
    assert {"fedavg", "fedyogi", "pfedme", "ditto(fedavg)", "freeze(fedavg)"} < saying.keys()
    assert {"flasc(fedadam)", "ditto(fedkseed)"} < saying.keys()
    for name, one in saying.items():
        state = one.init(seeds if in_seed_space(one) else start, 0)
        round = Round(1, 0, people, tuple("abcd"), 1.0)
        sent = one.broadcast(state, round)
        tasks = [Task("train", 1, c, at, people[c], sent[c]) for at, c in enumerate("abcd")]
        replies = [
            replace(rehearse(one, task, noise=0.1), weight=1.0 + at)
            for at, task in enumerate(tasks)
        ]
        assert all(reply.upload.keys() == {"delta"} for reply in replies), name
        whole, _ = one.server_update(state, round, iter(replies))
        mean = {"delta": mean_upload(replies)["delta"]}
        alone, _ = one.server_update(state, round, iter([Reply("pooled", mean)]))
        assert state_sha256(alone) == state_sha256(whole), name


def test_a_cluster_each_is_local_training(bench: Callable[..., Any], tmp_path: Path) -> None:
    it = bench(torch.float64)
    algorithm = Clustered(FedAvg(), Auto(8), Sharing(pool="off"))
    run = it.final(algorithm, tmp_path / "a", 3, sampler=Full())
    engine = it.engine(InProcess, LocalOnly(), tmp_path / "b")
    it.rounds(LocalOnly(), engine, 3, sampler=Full())
    assert len(run.state.cluster_states) == 8
    for client, cluster in run.state.grouping.assignment.items():
        alone = engine.store.load(client, 9)["personal"]
        for name, value in run.state.cluster_states[cluster].params.items():
            assert float((value - alone[name]).abs().max()) < 1e-13


@pytest.mark.slow
def test_five_languages_are_found_after_one_round_and_served_better_apart(tmp_path: Path) -> None:
    """Ten clients, ten local steps, nobody says how many languages there are.

    With 360 examples a client: of 120, a model for two clients is learnt by heart, and whether it or the one for all
    ends better is a matter of a machine's rounding.
    """
    loss = {}
    for name, algorithm in (
        ("clustered", [{"clustered": {"label": "language"}}, "fedavg"]),
        ("fedavg", "fedavg"),
    ):
        tree: Any = {
            "name": name,
            "algorithm": algorithm,
            "data": {
                "num_clients": 10,
                "num_examples": 3600,
                "where": {"language": LANGUAGES},
                "partition": {"shards": {"by": "language", "per_client": 1}},
                "max_length": 96,
            },
            "tune": {"lora": {"rank": 16, "alpha": 32, "targets": "all-linear"}},
            "local": {"optimizer": "adamw", "lr": 4e-3, "steps": 10, "batch_size": 8},
            "evaluation": {"every": 0, "generate": False, "validation": False, "by": "language"},
            "run": {"rounds": 4, "samples": 0},
        }
        loss[name] = experiment.run(build_recipe(tree), tmp_path / name).summary["final"][
            "test/loss"
        ]
    lines = read_results(tmp_path / "clustered").history.lines
    assert [line["server/num_clusters"] for line in lines[1:]] == [5] * 4
    assert [line["server/adjusted_rand"] for line in lines[1:]] == [1] * 4
    assert loss["clustered"] < loss["fedavg"]
    adapters = tmp_path / "clustered" / "adapters"
    folders = sorted(path.name for path in adapters.iterdir() if path.is_dir())
    assert folders == [f"cluster-{k}" for k in range(5)]
    told = read_results(tmp_path / "clustered")
    for language in LANGUAGES:
        models = told.by_label["models"]
        best = min(models, key=lambda model: model["metrics"][language]["loss"])
        spoken = [
            told.manifest["clients"][client]["labels"]["language"] for client in best["clients"]
        ]
        assert all(list(held) == [language] for held in spoken), "each is served best by its own"
