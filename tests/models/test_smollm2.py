"""A language model that people use, through everything a run is: train, evaluate, export, chat, resume, two engines."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import small_tree

import fedloom
from fedloom.client.fast.products import fastest
from fedloom.models.build import ModelSettings, load_base
from fedloom.models.identity import identity
from fedloom.recipe import build_recipe

pytestmark = [pytest.mark.realmodel, pytest.mark.slow]
Find = Callable[[str], Path]


@pytest.fixture(scope="module")
def tree(real_model: Find) -> Callable[..., dict[str, Any]]:
    """Return a maker of recipes: two clients, two rounds."""
    file = real_model("smollm2.gguf")
    # What `auto` comes to is measured: once, as what ends alike has to be multiplied alike.
    kernels = fastest(torch.float32, copies=2)

    def make(**sections: Any) -> dict[str, Any]:
        return small_tree(
            file,
            **{
                "data": {"num_clients": 2, "num_examples": 40},
                # One by one: a batch of clients rounds differently, and sites have one client each.
                "local": {"lr": 2e-3, "optimizer": "adamw", "batched": "off", "kernels": kernels},
                "run": {"rounds": 2, "samples": 1},
                "evaluation": {"every": 1},
                **sections,
            },
        )

    return make


@pytest.fixture(scope="module")
def run(
    tree: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> fedloom.Result:
    return fedloom.run(build_recipe(tree()), tmp_path_factory.mktemp("smollm2") / "run")


def test_it_learns_and_is_measured_again_alike(run: fedloom.Result):
    first, *_, last = (line["test/loss"] for line in run.metrics if "test/loss" in line)
    assert last < first - 0.1
    again = run.evaluate("test")
    assert again.metrics["loss"] == pytest.approx(last, rel=1e-5)


QUESTIONS = ("What is the capital of France? Answer briefly.", "Name a fruit. Answer briefly.")


def answers(model: Any, tokenizer: Any) -> list[list[str]]:
    """Return the words that a model of transformers or peft answers, by its own `generate`."""
    found = []
    for question in QUESTIONS:
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        written = model.generate(**asked, max_new_tokens=8, do_sample=False)[0]
        answer = tokenizer.decode(written[asked["input_ids"].shape[1] :], skip_special_tokens=True)
        found.append(answer.split())
    return found


@pytest.fixture(scope="module")
def learnt(run: fedloom.Result) -> list[list[str]]:
    """Return what the run's chat answers to the same."""
    return [run.chat().answer(question).split() for question in QUESTIONS]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks for it
def test_plain_peft_answers_alike(run: fedloom.Result, learnt: list[list[str]], real_model: Find):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = real_model("smollm2.gguf")
    base = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    untrained = answers(base, tokenizer)
    model = PeftModel.from_pretrained(base, str(run.adapter())).eval()
    assert answers(model, tokenizer) == learnt
    assert untrained != learnt


def test_it_is_exported_whole(
    run: fedloom.Result, learnt: list[list[str]], real_model: Find, tmp_path: Path
):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = run.export(tmp_path / "merged", form="merged")["global"]
    whole = AutoModelForCausalLM.from_pretrained(folder)
    assert whole.num_parameters() == 134_515_008
    assert answers(whole, AutoTokenizer.from_pretrained(folder)) == learnt
    # The tokenizer and its template come along.
    exported = load_base(ModelSettings(name=str(folder)))
    assert identity(exported) == identity(
        load_base(ModelSettings(name=str(real_model("smollm2.gguf"))))
    )


@pytest.mark.parametrize("source", ["file", "folder"])
def test_as_gguf_it_answers_alike(
    run: fedloom.Result, learnt: list[list[str]], source: str, tmp_path: Path
):
    """By the metadata of the file it came from, and by those written for a model of a folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fedloom.models.gguf_write import write_model_gguf

    file = tmp_path / "global" / "global-f32.gguf"
    if source == "file":
        assert run.export(tmp_path, form="gguf", type="f32") == {"global": file}
    else:
        whole = run.export(tmp_path / "whole", form="merged")["global"]
        write_model_gguf(whole, file, type="f32", name="mine")
    there: dict[str, Any] = {"gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(file.parent, dtype="float32", **there)
    assert answers(model, AutoTokenizer.from_pretrained(file.parent, **there)) == learnt


def test_it_goes_on_to_the_bit(
    run: fedloom.Result, tree: Callable[..., dict[str, Any]], tmp_path: Path
):
    recipe = build_recipe(tree())
    with fedloom.session(recipe, tmp_path / "run") as session:
        for _ in session.rounds():
            break
    resumed = fedloom.run(recipe, tmp_path / "run")
    assert resumed.summary["state_sha256"] == run.summary["state_sha256"]


def test_flower_comes_to_the_same(
    run: fedloom.Result, tree: Callable[..., dict[str, Any]], tmp_path: Path
):
    there = fedloom.run(build_recipe(tree(engine={"flower": {"nodes": 2}})), tmp_path / "run")
    assert there.summary["state_sha256"] == run.summary["state_sha256"]
