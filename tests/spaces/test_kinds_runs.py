"""Whole runs of every kind of adapter, and what is refused of them."""

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fedloom import experiment
from fedloom.models.build import Base, enable_checkpointing
from fedloom.models.hf_logging import quiet
from fedloom.recipe import RecipeError, build_recipe
from fedloom.report.card import Form
from fedloom.result import open_run
from fedloom.results.plan import make_plan
from fedloom.rounds.recipe_settings import Recipe
from fedloom.rounds.session import build
from fedloom.spaces.lora import LoRA
from fedloom.spaces.lora_xs import LoRAXS
from fedloom.spaces.scaling_vectors import IA3, VeRA
from fedloom.spaces.tune import Tune
from fedloom.spaces.virtual_tokens import Prefix, Prompt, PTuning
from fedloom.tracking.metrics_log import MetricsLog

Make = Callable[..., Recipe]
Llama = Callable[..., Any]
RUNS: dict[str, dict[str, Any]] = {
    "prompt": {"prompt": {"tokens": 3, "init": "text", "text": "one two"}},
    "prefix": {"prefix": {"tokens": 3, "projection": True}},
    "ptuning": {"ptuning": {"tokens": 3, "hidden": 8}},
    "ia3": {"ia3": {}},
    "vera": {"vera": {"rank": 8}},
    "lora_xs": {"lora_xs": {"rank": 4}},
    "pissa": {"lora": {"init": "pissa"}},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(RUNS))
def test_a_run_trains_measures_answers_resumes_and_is_what_was_planned(
    kind: str, small_recipe: Make, tmp_path: Path
) -> None:
    recipe, whole = small_recipe(tune=RUNS[kind]), tmp_path / "whole"
    plan = make_plan(recipe)
    summary = experiment.run(recipe, whole).summary
    lines = MetricsLog.read(whole / "metrics.jsonl").lines
    assert plan.num_trainable == summary["num_trainable"]
    assert plan.upload_bytes == pytest.approx(lines[-1]["comm/upload_bytes"] / 4, rel=0.1, abs=100)
    assert len(json.loads((whole / "samples.json").read_text())) == 2
    again = tmp_path / "again"
    shutil.copytree(whole, again)
    *_, newest = sorted((again / "checkpoints").glob("*"), key=lambda file: file.stat().st_mtime)
    newest.unlink()
    (again / "summary.json").unlink()
    assert experiment.run(recipe, again).summary["state_sha256"] == summary["state_sha256"]


PLAIN = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, out, *kinds = sys.argv[1:]
for kind in kinds:
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(model, f"{out}/{kind}").eval()
        logits = adapted(input_ids=torch.arange(12)[None]).logits[:, -12:]
    torch.save(logits, f"{out}/{kind}.pt")
"""


@pytest.mark.slow
def test_plain_peft_reads_every_exported_folder_in_a_process_of_its_own(
    small_recipe: Make, tiny_folder: Path, tmp_path: Path
) -> None:
    ours: dict[str, torch.Tensor] = {}
    for kind, tune in RUNS.items():
        experiment.run(small_recipe(tune=tune, run={"rounds": 1}), tmp_path / kind)
        run = open_run(tmp_path / kind)
        run.export(tmp_path / "out")["global"].rename(tmp_path / "out" / kind)
        opened = run.open("export")
        space = opened.session.space
        space.load(next(iter(opened.session.deployed(opened.run).values())))
        with torch.no_grad():
            ours[kind] = space.model.eval()(input_ids=torch.arange(12)[None]).logits
    # No fedloom on its path.
    subprocess.run(
        [sys.executable, "-I", "-c", PLAIN, str(tiny_folder), str(tmp_path / "out"), *RUNS],
        check=True,
        capture_output=True,
    )
    for kind, logits in ours.items():
        theirs = torch.load(tmp_path / "out" / f"{kind}.pt")
        torch.testing.assert_close(theirs, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_vera_is_exported_as_itself_as_lora_and_merged(
    small_recipe: Make, tiny_folder: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    recipe = small_recipe(tune=RUNS["vera"], local={"lr": 3.0})
    experiment.run(recipe, tmp_path / "run")
    run, ids = open_run(tmp_path / "run"), torch.arange(12)[None]
    logits = []
    with quiet():
        forms: tuple[Form, ...] = ("peft", "lora")
        for form in forms:
            base = AutoModelForCausalLM.from_pretrained(tiny_folder)
            before = base(input_ids=ids).logits
            folder = run.export(tmp_path / form, form=form)["global"]
            logits.append(PeftModel.from_pretrained(base, str(folder)).eval()(input_ids=ids).logits)
        folder = run.export(tmp_path / "merged", form="merged")["global"]
        logits.append(AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits)
    assert not torch.allclose(logits[0], before, atol=1e-4)
    for others in logits[1:]:
        torch.testing.assert_close(others, logits[0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_prompt_is_not_merged_and_leaves_no_folder(small_recipe: Make, tmp_path: Path) -> None:
    experiment.run(small_recipe(tune=RUNS["prompt"], run={"rounds": 1}), tmp_path / "run")
    run = open_run(tmp_path / "run")
    with pytest.raises(ValueError, match="tune: prompt cannot be merged into a model"):
        run.export(tmp_path / "merged", form="merged")
    with pytest.raises(ValueError, match="only an adapter of tune: vera can be written as LoRA"):
        run.export(tmp_path / "lora", form="lora")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        ({"prompt": {"tokens": 0}}, r"tune\.prompt\.tokens must be at least 1, got 0"),
        ({"prompt": {"init": "zero"}}, r"tune\.prompt\.init: .* got .zero"),
        ({"prompt": {"init": "text"}}, r"tune\.prompt\.text belongs to tune\.prompt\.init text"),
        ({"prompt": {"text": "hello"}}, r"tune\.prompt\.text belongs to tune\.prompt\.init text"),
        ({"prefix": {"tokens": -1}}, r"tune\.prefix\.tokens must be at least 1, got -1"),
        ({"prefix": {"hidden": 8}}, r"tune\.prefix\.hidden belongs to tune\.prefix\.projection"),
        ({"prefix": {"hidden": 0, "projection": True}}, r"tune\.prefix\.hidden must be at least 1"),
        ({"ptuning": {"layers": 3}}, r"tune\.ptuning\.layers belongs to .*encoder lstm, got 3"),
        ({"ptuning": {"layers": 0, "encoder": "lstm"}}, r"tune\.ptuning\.layers must be at least"),
        ({"ptuning": {"encoder": "gru"}}, r"tune\.ptuning\.encoder: .* got .gru"),
        ({"ptuning": {"hidden": 0}}, r"tune\.ptuning\.hidden must be at least 1, got 0"),
        ({"ia3": {"targets": "k_proj"}}, r"tune\.ia3\.targets must be auto, all-linear or a list"),
        ({"ia3": {"targets": []}}, r"tune\.ia3\.targets must be auto or name linear layers"),
        ({"ia3": {"feedforward": ["down_proj"]}}, r"tune\.ia3\.feedforward has no effect where"),
        (
            {"ia3": {"targets": ["k_proj"], "feedforward": ["down_proj"]}},
            r"tune\.ia3\.feedforward must be among tune\.ia3\.targets \(k_proj\), got down_proj",
        ),
        ({"vera": {"rank": 0}}, r"tune\.vera\.rank must be at least 1, got 0"),
        ({"vera": {"d_initial": 0.0}}, r"tune\.vera\.d_initial must be positive, got 0\.0"),
        ({"lora_xs": {"rank": 0}}, r"tune\.lora_xs\.rank must be at least 1, got 0"),
        ({"lora_xs": {"alpha": 0}}, r"tune\.lora_xs\.alpha must be positive, got 0"),
        ({"lora_xs": {"targets": []}}, r"tune\.lora_xs\.targets must be all-linear or name"),
        ({"vera": {"targets": []}}, r"tune\.vera\.targets must be all-linear or name"),
        ({"lora": {"init": "svd"}}, r"tune\.lora\.init: .* got .svd"),
        ({"lora": {"init": "pissa", "dora": True}}, r"tune\.lora\.dora must be false where"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tune: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_recipe({"name": "x", "tune": tune})


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        (
            Prompt(tokens=2000),
            r"tune\.prompt\.tokens must be below \d+, which is how many positions",
        ),
        (IA3(targets=["nose"]), r"tune\.ia3\.targets must be all-linear or name .* got nose"),
        (VeRA(targets=["nose"]), r"tune\.vera\.targets must be all-linear or name .* got nose"),
        (LoRAXS(rank=33), r"tune\.lora_xs\.rank must be at most 32, the size of .* got 33"),
        (LoRAXS(targets=["nose"]), r"tune\.lora_xs\.targets must be all-linear or .* got nose"),
        (
            LoRA(rank=33, init="pissa"),
            r"tune\.lora\.rank must be at most 32, the size of .* got 33",
        ),
    ],
)
def test_what_does_not_fit_a_model_is_refused(tune: Tune, message: str, tiny_llama: Llama) -> None:
    with pytest.raises(ValueError, match=message):
        tune.make_space(Base(tiny_llama(layers=1).requires_grad_(False), None, "random"), seed=0)


def test_ia3_asks_for_targets_where_peft_knows_none(tiny_llama: Llama) -> None:
    model = tiny_llama(layers=1).requires_grad_(False)
    model.config.model_type = "novel"
    with pytest.raises(
        ValueError, match=r"tune\.ia3\.targets must be named for a model of type novel"
    ):
        IA3().make_space(Base(model, None, "random"), seed=0)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_pissa_asks_for_whole_weights(precision: torch.dtype, tiny_llama: Llama) -> None:
    model = tiny_llama(layers=1, dtype=precision).requires_grad_(False)
    with pytest.raises(ValueError, match=r"tune\.lora\.init pissa .* needs model\.dtype float32"):
        LoRA(init="pissa").make_space(Base(model, None, "random"), seed=0)


@pytest.mark.parametrize("tune", [Prefix(tokens=2), Prefix(tokens=2, projection=True)])
def test_a_prefix_and_checkpointed_activations_are_refused(tune: Prefix, tiny_llama: Llama) -> None:
    model = tiny_llama(layers=1).requires_grad_(False)
    enable_checkpointing(model)
    with pytest.raises(
        ValueError, match=r"gradient_checkpointing must be false where tune is prefix"
    ):
        tune.make_space(Base(model, None, "random"), seed=0)


@pytest.mark.parametrize("tune", [Prompt(tokens=2), PTuning(tokens=2, hidden=4)])
def test_a_prompt_learns_with_checkpointed_activations(tune: Tune, tiny_llama: Llama) -> None:
    ids, gradients = torch.arange(8)[None], []
    for checkpointed in (False, True):
        model = tiny_llama(layers=2).requires_grad_(False)
        if checkpointed:
            enable_checkpointing(model)
        space = tune.make_space(Base(model, None, "random"), seed=0)
        model.train()
        model(input_ids=ids).logits.square().sum().backward()
        gradients.append([p.grad for p in space.model.parameters() if p.requires_grad])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


def test_virtual_tokens_take_positions_of_the_longest_row(
    small_recipe: Make, tmp_path: Path
) -> None:
    longest = small_recipe(data={"max_length": 1 << 20})
    with pytest.raises(ValueError, match=r"must be at most (\d+), which is how") as plain:
        build(longest, tmp_path)
    most = int(str(plain.value).split("at most ")[1].split(",")[0])
    taken = small_recipe(tune={"prompt": {"tokens": 5}}, data={"max_length": most})
    with pytest.raises(
        ValueError, match=rf"must be at most {most - 5}, as .* virtual tokens take 5"
    ):
        build(taken, tmp_path)
    fits = small_recipe(tune={"prompt": {"tokens": 5}}, data={"max_length": most - 5})
    assert build(fits, tmp_path).space.start()


def test_packed_rows_and_virtual_tokens_are_refused(small_recipe: Make, tmp_path: Path) -> None:
    recipe = small_recipe(
        tune={"prefix": {"tokens": 2}}, data={"packing": True}, evaluation={"generate": False}
    )
    with pytest.raises(
        ValueError, match=r"data\.packing must be false where tune has virtual tokens"
    ):
        build(recipe, tmp_path)


def test_bfloat16_precision_beside_an_adapter_is_refused(
    small_recipe: Make, tmp_path: Path
) -> None:
    recipe = small_recipe(tune={"ia3": {}}, local={"precision": "bfloat16"})
    with pytest.raises(ValueError, match=r"local\.precision bfloat16 is for weights that learn"):
        build(recipe, tmp_path)


def test_a_plan_says_what_is_tuned_and_how_many_tokens_are_virtual(small_recipe: Make) -> None:
    page = io.StringIO()
    plan = make_plan(small_recipe(tune={"prompt": {"tokens": 3}}, evaluation={"generate": False}))
    Console(file=page, width=160).print(plan.table())
    assert "prompt, 3 virtual tokens" in page.getvalue()
    assert "3 before each row of up to 192" in page.getvalue()
