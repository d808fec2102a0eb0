"""Whole runs on a base in few bits: planned, resumed, used and exported as any other, and nearly as good."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from fedloom import experiment
from fedloom.cli import app
from fedloom.client.local_settings import LocalSettings
from fedloom.core.protocols import Fit, Job
from fedloom.models.build import fingerprint
from fedloom.models.hf_logging import quiet
from fedloom.models.quantized import quantize_, quantized_bytes
from fedloom.models.schemes import NF4
from fedloom.recipe import build_recipe
from fedloom.result import open_run
from fedloom.results.plan import make_plan
from fedloom.rounds.recipe_settings import Recipe
from fedloom.spaces.lora import LoRA
from fedloom.spaces.lora_xs import LoRAXS
from fedloom.spaces.scaling_vectors import IA3, VeRA
from fedloom.spaces.tune import Tune
from fedloom.spaces.virtual_tokens import Prefix, Prompt, PTuning
from fedloom.testing.bench import make_bench

Make = Callable[..., Recipe]
KINDS: dict[str, tuple[Tune, LocalSettings]] = {
    "lora": (LoRA(rank=2), LocalSettings(lr=0.01, steps=2)),
    "lora_xs": (LoRAXS(rank=4), LocalSettings(lr=0.01, steps=2)),
    "ia3": (IA3(), LocalSettings(lr=0.01, steps=2)),
    "vera": (VeRA(rank=8), LocalSettings(lr=0.01, steps=2)),
    "prompt": (Prompt(tokens=2), LocalSettings(lr=0.01, steps=2)),
    "prefix": (Prefix(tokens=2), LocalSettings(lr=0.01, steps=2)),
    "ptuning": (PTuning(tokens=2, hidden=8), LocalSettings(lr=0.01, steps=2)),
    "guessed lora": (
        LoRA(rank=2),
        LocalSettings(optimizer="sgd", lr=0.01, steps=2, order="zeroth"),
    ),
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_learns_on_nf4_and_leaves_its_bits_alone(
    tiny_llama: Callable[..., Any], kind: str
) -> None:
    model = tiny_llama().requires_grad_(False)
    quantize_(model, NF4())
    tune, local = KINDS[kind]
    bench = make_bench(tune, local, model=model)
    start, before = bench.space.start(), fingerprint(model)
    (done,) = bench.trainer.run([Job("c1", 1, 0, Fit(start))])
    assert any(bool((done.params[name] != start[name]).any()) for name in start)
    assert {t.dtype for t in done.params.values()} == {torch.float32}
    assert fingerprint(model) == before


@pytest.mark.slow
def test_a_run_on_nf4_is_planned_resumed_used_and_read_by_peft_beside_bitsandbytes(
    small_recipe: Make, tiny_folder: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    whole, again = tmp_path / "whole", tmp_path / "again"
    recipe = small_recipe(model={"name": str(tiny_folder), "quantize": "nf4"})
    plan = make_plan(recipe)
    assert plan.num_total == make_plan(small_recipe()).num_total
    assert " M weights in nf4, " in plan.base
    assert "in nf4 unpacked once a product, for all clients of a batch" in plan.products
    summary = experiment.run(recipe, whole).summary
    identity = json.loads((whole / "inputs.json").read_text())["identity"]
    assert identity["quantize"] == "nf4/64 double"
    assert {"bitsandbytes", "packed"} <= identity.keys()
    shutil.copytree(whole, again)
    *_, newest = sorted((again / "checkpoints").glob("*"), key=lambda file: file.stat().st_mtime)
    newest.unlink()
    (again / "summary.json").unlink()
    assert experiment.run(recipe, again).summary["state_sha256"] == summary["state_sha256"]
    for words in (["evaluate", str(whole)], ["chat", str(whole), "--prompt", "one"]):
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output
    opened = open_run(whole).open("export")
    space, (params, *_) = opened.session.space, opened.session.deployed(opened.run).values()
    space.save(tmp_path / "adapter", params)
    space.load(params)
    ids = torch.arange(12)[None]
    with torch.no_grad(), quiet():
        base = AutoModelForCausalLM.from_pretrained(
            tiny_folder,
            device_map="cpu",
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.float32,
            ),
        )
        # In training, else bitsandbytes packs weights for CPUs with bfloat16, which takes no rows as short as these.
        theirs: Tensor = (
            PeftModel.from_pretrained(base, str(tmp_path / "adapter")).train()(ids).logits
        )
        ours: Tensor = space.model.eval()(input_ids=ids).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    (folder,) = open_run(whole).export(form="nf4").values()
    assert (
        "in NF4 again: rounding again moves the weights by " in (folder / "README.md").read_text()
    )
    assert (folder / "config.json").exists()


@pytest.mark.slow
def test_twenty_rounds_end_within_three_percent_of_the_whole_model_in_a_third_of_the_memory(
    tmp_path: Path,
) -> None:
    """The bundled model, seed 0."""
    losses = {}
    for quantize in ("none", "nf4"):
        recipe = build_recipe(
            {
                "name": quantize,
                "algorithm": "fedavg",
                "model": {"quantize": quantize},
                "data": {"num_examples": 160, "num_clients": 2, "max_length": 64},
                "tune": {"lora": {"rank": 8, "alpha": 16, "targets": "all-linear"}},
                "local": {"optimizer": "adamw", "lr": 2e-3, "steps": 2, "batch_size": 4},
                "evaluation": {
                    "every": 20,
                    "validation": False,
                    "generate": False,
                    "max_examples": 8,
                },
                "run": {"rounds": 20, "samples": 0},
            }
        )
        result = experiment.run(recipe, tmp_path / quantize)
        losses[quantize] = result.summary["final"]["test/loss"]
    assert losses["nf4"] == pytest.approx(losses["none"], rel=0.03)
    model: Any = open_run(tmp_path / "nf4").open("evaluate").session.space.model
    weights, held = quantized_bytes(model)
    assert held <= 0.35 * 2 * weights
