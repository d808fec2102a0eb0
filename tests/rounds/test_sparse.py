"""What a sparse run deploys: the masked vector, in its numbers, its adapter folder and its summary."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedloom import experiment
from fedloom.results.export import deliverables
from fedloom.rounds.recipe_settings import Recipe
from fedloom.rounds.restore import last_run
from fedloom.rounds.session import build

Make = Callable[..., Recipe]
LAYERS: dict[str, list[dict[str, Any]]] = {
    "flasc": [{"flasc": {"download": 0.125, "upload": 0.25}}, {"fedavg": {"server": "adam"}}],
    "prune": [{"prune": {"density": {"start": 0.125, "warm": 1}}}, {"fedavg": {"server": "adam"}}],
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_exported_adapter_is_the_masked_vector_with_its_logits(
    name: str, small_recipe: Make, tiny_folder: Path, tmp_path: Path
) -> None:
    """Check f."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    recipe = small_recipe(
        algorithm=LAYERS[name], local={"lr": 5.0}, tune={"lora": {"origin": "zero"}}
    )
    summary = experiment.run(recipe, tmp_path).summary
    session = build(recipe, tmp_path)
    ((params, clients),) = deliverables(session, last_run(session)).values()
    assert len(clients) == 4, "one model, shared"
    count = sum(t.numel() for t in params.values())
    assert sum(int(t.count_nonzero()) for t in params.values()) == count // 8
    written = load_file(tmp_path / "adapters/global/adapter_model.safetensors")
    assert sum(int(t.count_nonzero()) for t in written.values()) == count // 8
    dense = last_run(session).state
    dense = getattr(dense, "inner", dense).params
    assert sum(int(t.count_nonzero()) for t in dense.values()) > count // 8
    session.space.load(params)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad(), warnings.catch_warnings():
        # PEFT 0.21 asks transformers under a name that version 6 will drop.
        warnings.simplefilter("ignore", FutureWarning)
        ours = session.space.model(input_ids=ids).logits
        base = AutoModelForCausalLM.from_pretrained(tiny_folder)
        theirs = PeftModel.from_pretrained(base, tmp_path / "adapters/global")(input_ids=ids).logits
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-6)
    assert summary["final"]["test/loss"] > 0


def test_the_summarys_bytes_are_the_sums_of_the_rounds_and_densities_are_on_record(
    small_recipe: Make, tmp_path: Path
) -> None:
    recipe = small_recipe(algorithm=LAYERS["flasc"], evaluation={"every": 0, "generate": False})
    summary = experiment.run(recipe, tmp_path).summary
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for direction in ("upload", "download"):
        counts = [line.get(f"comm/{direction}_bytes", 0) for line in lines]
        assert summary[f"{direction}_bytes"] == sum(counts) > 0
    last = lines[-1]
    assert last["server/download_density"] == pytest.approx(0.125, abs=1e-2)
    tensors = [name for name in last if name.startswith("server/density/")]
    assert len(tensors) == len(build(recipe, tmp_path).space.start())
    assert any("lora_A" in name for name in tensors)


def test_tiers_of_the_data_are_those_that_densities_go_by(
    small_recipe: Make, tmp_path: Path
) -> None:
    layers = [{"flasc": {"download": {"start": 1.0, "tiers": {"phone": 0.125}}}}, "fedavg"]
    recipe = small_recipe(algorithm=layers, data={"tiers": {"phone": 0.5, "desk": 0.5}})
    experiment.run(recipe, tmp_path)
    session = build(recipe, tmp_path)
    models = deliverables(session, last_run(session))
    assert sorted(len(clients) for _, clients in models.values()) == [2, 2]
    kept = {sum(int(t.count_nonzero()) for t in params.values()) for params, _ in models.values()}
    count = sum(t.numel() for t in session.space.start().values())
    assert min(kept) == count // 8 < max(kept)
    for tier in ("phone", "desk"):
        assert (tmp_path / f"adapters/tier-{tier}/adapter_model.safetensors").exists()
