"""A plan says before training what the run then costs, and refuses what cannot fit."""

import io
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from fedloom import experiment
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.fedlora import FedLoRA
from fedloom.client.fast import kernels
from fedloom.results.plan import _grouped, make_plan
from fedloom.rounds.recipe_settings import Recipe
from fedloom.server.combine.chosen import Krum
from fedloom.server.factors.pruning import RankPruning
from fedloom.server.samplers import Full
from fedloom.tracking.metrics_log import MetricsLog

Make = Callable[..., Recipe]


@pytest.mark.parametrize("algorithm", ["fedavg", "scaffold", "local"])
@pytest.mark.parametrize("upload", ["float32", "int8"])
def test_planned_bytes_are_the_bytes_of_the_run(
    algorithm: str, upload: str, small_recipe: Make, tmp_path: Path
) -> None:
    recipe = small_recipe(
        algorithm=algorithm, wire={"upload": upload}, evaluation={"generate": False}
    )
    plan = make_plan(recipe)
    experiment.run(recipe, tmp_path)
    line = MetricsLog.read(tmp_path / "metrics.jsonl").lines[-1]
    assert plan.cohort == 4
    assert plan.upload_bytes == pytest.approx(line["comm/upload_bytes"] / 4, rel=0.1, abs=100)
    assert plan.download_bytes == pytest.approx(line["comm/download_bytes"] / 4, rel=0.1, abs=100)


@pytest.mark.parametrize("around", [[], ["clustered"], ["ditto"]])
@pytest.mark.parametrize("rule", [{"krum": {"attackers": 1}}, {"trimmed_mean": {"share": 0.2}}])
def test_a_rule_that_needs_many_replies_is_planned_with_as_many(
    around: list[str], rule: dict[str, Any], small_recipe: Make
) -> None:
    recipe = small_recipe(
        algorithm=[*around, {"fedavg": {"combine": rule}}],
        tune={"lora": {"origin": "zero"}},
        data={"num_clients": 5},
    )
    plan, plain = make_plan(recipe), make_plan(replace(recipe, algorithm=FedAvg()))
    assert plan.upload_bytes >= plain.upload_bytes > 0
    few = replace(recipe, data=replace(recipe.data, num_clients=None), cohort=Full())
    with pytest.raises(ValueError, match="krum needs at least 43 replies a round, got a cohort of"):
        make_plan(replace(few, algorithm=FedAvg(combine=Krum(20))))


def test_a_plan_says_how_products_are_made_and_where_the_type_is_slow(
    small_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def row(recipe: Recipe) -> str:
        console = Console(file=io.StringIO(), width=200)
        console.print(make_plan(recipe).table())
        return console.file.getvalue()  # type: ignore[attr-defined]  # it is a StringIO

    plain = row(small_recipe(local={"kernels": "torch"}))
    assert re.search(r"frozen products +│ torch's, float32", plain)
    assert "slower than float32" not in plain
    monkeypatch.setattr(kernels, "native", lambda dtype: 30.0 if dtype.itemsize == 2 else 150.0)
    slow = row(small_recipe(local={"kernels": "torch"}, model={"dtype": "bfloat16"}))
    assert re.search(r"frozen products +│ torch's, bfloat16", slow)
    assert "this CPU multiplies bfloat16 5.0 times slower than float32 (30 against 150" in slow


def test_a_plan_counts_parameters_memory_and_time(small_recipe: Make) -> None:
    plan = make_plan(small_recipe())
    # 2 layers, q and v: A (2, 32) and B (32, 2) each
    assert plan.num_trainable == 2 * 2 * (2 * 32 + 32 * 2)
    assert plan.num_total > plan.num_trainable
    assert plan.train_seconds > 0
    assert plan.peak_memory_bytes > 1e8
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(plan.table())
    said = console.export_text()
    for row in (
        "trainable parameters",
        "upload per client and round",
        "peak memory",
        "training time",
    ):
        assert row in said
    assert "rebuild" not in said


def test_a_plan_of_seeds_says_how_they_are_drawn_and_what_a_rebuild_takes(
    small_recipe: Make,
) -> None:
    plan = make_plan(
        small_recipe(
            algorithm={"fedkseed": {"steps": 2}},
            tune={"seeds": {"num_seeds": 64}},
            local={"optimizer": "sgd", "lr": 1e-4, "steps": None},
        )
    )
    assert plan.rebuild.startswith("64 gaussian directions: ")
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(plan.table())
    said = console.export_text()
    assert re.search(r"rebuild of the weights .*64 gaussian directions: .* once for all", said)


def test_a_model_that_cannot_fit_is_refused_before_a_weight_is_read(
    small_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = psutil.virtual_memory()._replace(available=10_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    with pytest.raises(
        ValueError, match=r"needs .*kB for its weights alone, and 10\.0 kB are free"
    ):
        make_plan(small_recipe())


def test_bytes_of_tiers_are_their_mean(small_recipe: Make, tmp_path: Path) -> None:
    recipe = small_recipe(
        algorithm={"fedlora": {"aggregate": "svd"}},
        tune={"lora": {"rank": 8, "ranks": {"phone": 1}, "origin": "zero"}},
        data={"num_clients": 4, "tiers": {"phone": 0.75, "desk": 0.25}},
        evaluation={"generate": False},
    )
    plan = make_plan(recipe)
    experiment.run(recipe, tmp_path)
    line = MetricsLog.read(tmp_path / "metrics.jsonl").lines[-1]
    assert plan.upload_bytes == pytest.approx(line["comm/upload_bytes"] / 4, rel=0.1, abs=100)
    assert plan.download_bytes == pytest.approx(line["comm/download_bytes"] / 4, rel=0.1, abs=100)
    assert 0 < line["server/aggregation_error"] < 1
    # Of the ranks that clients begin with, which they may give up.
    assert isinstance(recipe.algorithm, FedLoRA)
    pruned = make_plan(replace(recipe, algorithm=replace(recipe.algorithm, prune=RankPruning(0.5))))
    assert pruned.download_bytes == plan.download_bytes
    assert 0 < pruned.upload_bytes - plan.upload_bytes < 100


def test_what_stays_at_clients_is_listed_with_its_counts(small_recipe: Make) -> None:
    algorithm = [{"personal": {"local": r"layers\.1\.self_attn"}}, "fedavg"]
    plan = make_plan(small_recipe(algorithm=algorithm, tune={"lora": {"rank": 2}}))
    assert len(plan.local) == 4
    assert all(".layers.1.self_attn." in name for name in plan.local)
    shown = io.StringIO()
    Console(width=140, file=shown).print(plan.table())
    said = shown.getvalue()
    assert "4 tensors, 256 numbers" in said
    assert "model.layers.1.self_attn.q_proj.lora_A.weight: 1 x 64" in said
    assert "stays with each client" in said


def test_names_that_differ_in_numbers_are_told_as_one() -> None:
    names = [f"layers.{i}.q.lora_B" for i in (0, 1, 2, 7, 11)] + ["norm"]
    assert _grouped(dict.fromkeys(names, 4)) == [
        "layers.[0-2, 7, 11].q.lora_B: 5 x 4",
        "norm: 1 x 4",
    ]
