"""Personal fine-tuning before an evaluation, clients that never train, how evenly clients are served, and what each spent."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fedloom import experiment
from fedloom.client.setup import batches
from fedloom.core.finetune import FineTune
from fedloom.core.metrics import METRICS
from fedloom.core.randomness import derive
from fedloom.data.data_settings import DataSettings
from fedloom.evaluation.evaluation_settings import EvaluationSettings
from fedloom.evaluation.fairness import fairness
from fedloom.models.flops import forward_flops, step_flops
from fedloom.recipe import RecipeError, build_recipe
from fedloom.results.evaluate import evaluate
from fedloom.rounds.costs import totals
from fedloom.rounds.loop import draw
from fedloom.rounds.recipe_settings import Recipe
from fedloom.rounds.restore import last_run
from fedloom.rounds.session import build

Make = Callable[..., Recipe]
STEPS = 3


def recipe(make: Make, *, finetune: int = STEPS, engine: str = "inprocess", **local: Any) -> Recipe:
    return make(
        data={"num_examples": 60, "num_clients": 5, "unseen": 0.4},
        evaluation={"every": 1, "generate": False, "finetune": {"steps": finetune}},
        local={"steps": 2, "schedule": "cosine", **local},
        run={"rounds": 2, "samples": 0},
        engine=engine,
    )


def rows(folder: Path, file: str = "clients.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / file).read_text().splitlines()]


@pytest.fixture(scope="module")
def done(small_recipe: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("personal")
    asked = recipe(small_recipe, batched="off")
    asked = replace(asked, run=replace(asked.run, baselines=("centralised",)))
    experiment.run(asked, folder / "run")
    return folder / "run"


def test_clients_never_train_and_are_told_apart(done: Path, small_recipe: Make) -> None:
    unseen = set(json.loads((done / "manifest.json").read_text())["unseen"])
    assert len(unseen) == 2
    measured = {split: {r["client"] for r in rows(done) if r["split"] == split} for split in SPLITS}
    assert measured["unseen"] == unseen
    assert not (measured["test"] | measured["validation"]) & unseen
    assert len(measured["test"]) == 3
    trained = {client for line in rows(done, "costs.jsonl") for client in line["costs"]}
    assert trained == measured["test"]
    summary = json.loads((done / "summary.json").read_text())
    assert (summary["num_clients"], summary["num_unseen"]) == (3, 2)
    for name in ("unseen/loss", "unseen/finetuned/loss", "test/finetuned/loss"):
        assert name in summary["final"], name
    # The same clients in any baseline, whose pool is without their rows.
    other = json.loads((done / "baselines/centralised/manifest.json").read_text())
    assert set(other["unseen"]) == unseen
    held = json.loads((done / "manifest.json").read_text())["clients"]
    seen = sum(held[client]["train"] for client in measured["test"])
    assert other["clients"]["pool"]["train"] == seen
    assert "unseen/finetuned/loss" in (done / "baselines/centralised/metrics.jsonl").read_text()
    session = build(recipe(small_recipe), done)
    run, before = last_run(session), torch.get_rng_state()
    told = evaluate(session, run)
    assert torch.equal(before, torch.get_rng_state())
    assert set(told.clients) == measured["test"] | unseen
    assert told.unseen is not None
    assert told.unseen["loss"] != told.metrics["loss"]


SPLITS = ("validation", "test", "unseen")


def test_what_is_fine_tuned_is_what_a_loop_by_hand_makes_of_it(
    done: Path, small_recipe: Make
) -> None:
    """A client's steps on the model it was sent, at the whole learning rate although the schedule has ended."""
    asked = recipe(small_recipe, batched="off")
    session = build(asked, done)
    run = last_run(session)
    client = session.unseen[0]
    round = draw(run, session.engine.population(), None)
    sent = session.deployed(run)[client]
    from fedloom.core.protocols import Evaluate, Fit, Job

    seed = derive(derive(round.seed, client), 1)
    (tuned,) = session.trainer.run([Job(client, 0, seed, Fit(sent, steps=STEPS))])
    assert tuned.num_steps == STEPS
    (after,) = session.trainer.run([Job(client, 1, 0, Evaluate(tuned.params, "test"))])
    (found,) = (
        row["metrics"]
        for row in rows(done)
        if (row["round"], row["client"], row["split"]) == (2, client, "unseen")
    )
    assert found["finetuned/loss"] == after.metrics["loss"]
    assert found["finetuned/loss"] != found["loss"]
    assert asked.local.lr_at(0, 2) == asked.local.lr > asked.local.lr_at(3, 2)


def test_nothing_of_it_reaches_a_round(done: Path, small_recipe: Make, tmp_path: Path) -> None:
    plain = experiment.run(
        recipe(small_recipe, finetune=0, batched="off"), tmp_path / "plain"
    ).summary
    assert plain["state_sha256"] == json.loads((done / "summary.json").read_text())["state_sha256"]
    own = [{n: v for n, v in r["metrics"].items() if "finetuned" not in n} for r in rows(done)]
    assert [row["metrics"] for row in rows(tmp_path / "plain")] == own
    # Nor does any of an evaluation.
    rarely = recipe(small_recipe, finetune=0, batched="off")
    rarely = replace(rarely, evaluation=EvaluationSettings(0, max_new_tokens=2))
    seldom = experiment.run(rarely, tmp_path / "seldom").summary
    assert seldom["state_sha256"] == plain["state_sha256"]


def test_it_is_the_same_over_messages(done: Path, small_recipe: Make, tmp_path: Path) -> None:
    experiment.run(recipe(small_recipe, engine="loopback", batched="off"), tmp_path)
    assert rows(tmp_path) == rows(done)
    keys = ("upload_bytes", "download_bytes", "flops")
    one, other = (totals(rows(folder, "costs.jsonl")) for folder in (done, tmp_path))
    assert {c: [own[k] for k in keys] for c, own in one.items()} == {
        c: [own[k] for k in keys] for c, own in other.items()
    }


def test_costs_add_up_to_the_rounds(done: Path) -> None:
    spent = totals(rows(done, "costs.jsonl"))
    summary = json.loads((done / "summary.json").read_text())
    for way in ("upload_bytes", "download_bytes"):
        assert sum(own[way] for own in spent.values()) == summary[way]
        assert summary["client_costs"][way]["total"] == summary[way]
    assert all(own["rounds"] == 2 and own["flops"] > 0 for own in spent.values())
    assert 0 < sum(own["seconds"] for own in spent.values()) <= summary["train_seconds"]
    page = (done / "report.html").read_text()
    assert 'id="costs"' in page
    assert 'id="fairness"' in page
    assert (
        "Unseen clients' fine-tuned loss" in page or "Unseen clients&#39; fine-tuned loss" in page
    )


def test_operations_by_formula_are_those_that_are_counted(done: Path, small_recipe: Make) -> None:
    """Beside torch's own counter, which counts products of matrices; the difference is norms and activations."""
    session = build(recipe(small_recipe, batched="off"), done)
    model, client = session.space.model, session.unseen[0]
    (row,) = next(batches(session.federation.shards[client].train, 1, 0))
    ids = row.ids.unsqueeze(0)
    model.train()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        loss = model(input_ids=ids, use_cache=False).logits.logsumexp(-1).sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    each = forward_flops(model, ids.shape[1])
    assert each * ids.numel() == pytest.approx(forward.get_total_flops(), rel=0.1)
    whole = forward.get_total_flops() + backward.get_total_flops()
    assert step_flops(model, ids.shape[1], num_trained=trained) * ids.numel() == pytest.approx(
        whole, rel=0.2
    )
    assert step_flops(model, 8.0, num_trained=trained, passes=2) == 2 * forward_flops(model, 8.0)


def test_fairness_by_hand() -> None:
    accuracy, loss = METRICS.of("test/exact_match"), METRICS.of("test/loss")
    found = fairness(accuracy, [0.0, 1.0, 0.0, 1.0])
    assert found == {
        "clients": 4,
        "mean": 0.5,
        "std": 0.5,
        "worst_decile": 0.0,
        "best_decile": 1.0,
        "jain": 0.5,
    }
    many = fairness(loss, [float(value) for value in range(1, 21)])
    assert (many["worst_decile"], many["best_decile"]) == (19.5, 1.5)
    assert many["jain"] == pytest.approx(210**2 / (20 * 2870))
    assert "jain" not in fairness(METRICS.of("test/preference_margin"), [-1.0, 1.0])


def test_what_learns_is_what_matches(small_recipe: Make, tmp_path: Path) -> None:
    session = build(recipe(small_recipe), tmp_path)
    start = session.space.start()
    mask = FineTune(2, "lora_B").mask(start)
    assert mask is not None
    assert {name for name, on in mask.items() if on} == {name for name in start if "lora_B" in name}
    with pytest.raises(
        ValueError, match=r"evaluation\.finetune\.only must match some of the tuned"
    ):
        FineTune(2, "head").mask(start)


def test_settings_that_mean_nothing_are_refused(small_recipe: Make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"finetune\.only has no effect where .*steps is 0"):
        FineTune(0, "lora_B")
    with pytest.raises(ValueError, match=r"data\.unseen must be a share .* got 1\.0"):
        DataSettings(unseen=1.0)
    few = small_recipe(data={"num_examples": 60, "num_clients": 3, "unseen": 0.1})
    with pytest.raises(ValueError, match=r"data\.unseen is 0\.1 of 3 clients that learn"):
        build(few, tmp_path)
    sections = {
        "tune": ({"seeds": {}}, r"evaluation\.finetune trains by gradients"),
        "algorithm": (["fedem", "fedavg"], r"evaluation\.finetune trains one model"),
    }
    for section, (value, said) in sections.items():
        with pytest.raises(RecipeError, match=said):
            small_recipe(evaluation={"finetune": {"steps": 1}}, **{section: value})
    with pytest.raises(RecipeError, match=r"data\.unseen draws among all clients before round 1"):
        build_recipe(
            {
                "name": "x",
                "algorithm": "fedavg",
                "engine": {"flower": {"nodes": 0}},
                "data": {"unseen": 0.5},
            }
        )
