"""What a run delivers to the programs that serve it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import small_tree
from tests.models.test_lora_folder import served

from fedloom import experiment
from fedloom.models.hf_logging import quiet
from fedloom.recipe import build_recipe
from fedloom.report.card import Form
from fedloom.result import Result, open_run
from fedloom.rounds.recipe_settings import Recipe

Make = Callable[..., Recipe]
SHORT: dict[str, Any] = {
    "run": {"rounds": 1, "samples": 0},
    "data": {"num_examples": 40, "num_clients": 2},
    "evaluation": {"generate": False},
    "local": {"lr": 3.0},
}


def ran(recipe: Recipe, folder: Path) -> Result:
    experiment.run(recipe, folder)
    return open_run(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Return a run of one round on the bundled model, whose adapters are rank-stabilised."""
    tree = small_tree(Path("builtin:tiny"), **SHORT, tune={"lora": {"rslora": True}})
    return ran(build_recipe(tree), tmp_path_factory.mktemp("export") / "run")


@pytest.fixture(scope="module")
def deployed(run: Result) -> torch.Tensor:
    """Return the logits of the deployed model."""
    opened = run.open("export")
    space = opened.session.space
    space.load(next(iter(opened.session.deployed(opened.run).values())))
    with torch.no_grad():
        return space.model.eval()(input_ids=torch.arange(5, 25)[None]).logits


def test_a_whole_model_as_gguf_is_the_deployed_one(
    run: Result, deployed: torch.Tensor, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = run.export(tmp_path, form="gguf", type="f32")["global"]
    assert file == tmp_path / "global" / "global-f32.gguf"
    with quiet(), torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
        theirs = model.eval()(input_ids=torch.arange(5, 25)[None]).logits
    assert float((theirs - deployed).norm() / deployed.norm()) < 1e-6
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    assert tokenizer.chat_template == run.open("export").session.base.tokenizer.chat_template
    assert "llama-server -m global-f32.gguf" in (file.parent / "README.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"global", "routing.json"}


def test_vllm_and_llama_cpp_are_given_the_same_adapter(run: Result, tmp_path: Path) -> None:
    folder = run.export(tmp_path / "vllm", form="vllm")["global"]
    file = run.export(tmp_path / "gguf", form="gguf-lora")["global"]
    with pytest.raises(
        ValueError, match=r"holds a model of another form.*another folder with --out"
    ):
        run.export(tmp_path / "vllm", form="merged")
    assert not (folder / "config.json").exists()
    card = (folder / "README.md").read_text()
    assert "--enable-lora --max-lora-rank 8 --lora-modules global=." in card
    assert "--lora global-lora.gguf" in (file.parent / "README.md").read_text()
    reader = gguf.GGUFReader(file)
    alpha = reader.fields["adapter.lora.alpha"].contents()
    factors = {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}
    added = served(folder)
    assert len(factors) == 2 * len(added)
    for layer, delta in added.items():
        if layer.endswith("v_proj"):  # whose rows are where they were
            name = f"blk.{layer.split('.')[2]}.attn_v.weight"
            a, b = (factors[f"{name}.lora_{x}"] for x in "ab")
            torch.testing.assert_close(alpha / len(a) * b @ a, delta)
            assert delta.any()


@pytest.mark.slow
def test_clusters_are_a_folder_each_and_one_for_newcomers(
    small_recipe: Make, tmp_path: Path
) -> None:
    run = ran(small_recipe(**{**SHORT, "algorithm": [{"ditto": {}}, "fedavg"]}), tmp_path / "run")
    written = run.export(tmp_path / "out", form="vllm")
    assert set(written) == {"client-000", "client-001", "global"}
    routing = json.loads((tmp_path / "out" / "routing.json").read_text())
    assert routing["clients"] == {"client-000": "client-000", "client-001": "client-001"}
    assert routing["models"]["client-000"] == {"path": "client-000", "num_clients": 1, "share": 0.5}
    assert routing["models"]["global"]["num_clients"] == 0
    assert routing["newcomers"]["model"] == "global"
    for entry in routing["models"].values():
        assert served(tmp_path / "out" / entry["path"])
    own = json.loads((tmp_path / "run" / "adapters" / "routing.json").read_text())
    assert own["newcomers"]["model"] == "client-000"
    assert run.adapter("client-001") == tmp_path / "run" / "adapters" / "client-001"


def test_the_model_of_a_tier_is_called_so(tmp_path: Path) -> None:
    """A narrower pair is not that of all, and no cluster's."""
    tree = small_tree(
        Path("builtin:tiny"),
        **{
            **SHORT,
            "data": {
                "num_examples": 80,
                "num_clients": 4,
                "tiers": dict.fromkeys(("phone", "desk"), 0.5),
            },
        },
        algorithm={"fedlora": {"aggregate": "svd"}},
        tune={"lora": {"rank": 4, "origin": "zero", "ranks": {"phone": 2}}},
    )
    made = ran(build_recipe(tree), tmp_path / "run").export(tmp_path / "out")
    # A narrower pair is filled up with zeros.
    ranks = {
        name: max(
            int(tensor.any(1).sum())
            for key, tensor in load_file(folder / "adapter_model.safetensors").items()
            if "lora_A" in key
        )
        for name, folder in made.items()
    }
    assert ranks == {"tier-phone": 2, "tier-desk": 4, "global": 4}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tune", "refused"),
    [
        (
            {"prompt": {"tokens": 2}},
            {
                "vllm": "got prompt_tuning, .* export it with --for peft",
                "gguf": "cannot be merged into a",
            },
        ),
        (
            {"full": {}},
            {"gguf-lora": "LoRA alone, got tune: full", "seeds": "with tune: seeds, got"},
        ),
    ],
    ids=["prompt", "full"],
)
def test_what_a_server_cannot_take_is_refused_and_leaves_nothing(
    small_recipe: Make, tmp_path: Path, tune: dict[str, Any], refused: dict[Form, str]
) -> None:
    run = ran(small_recipe(**{**SHORT, "local": {"lr": 0.01}, "tune": tune}), tmp_path / "run")
    for form, message in refused.items():
        with pytest.raises(ValueError, match=message) as caught:
            run.export(tmp_path / form, form=form)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / form).exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"form": "onnx"},
            r"--for must be one of peft, lora, vllm, gguf-lora, merged, nf4, gguf, seeds, got",
        ),
        (
            {"form": "vllm", "type": "f16"},
            r"--type is that of whole models as GGUF, --for gguf, got",
        ),
        ({"form": "gguf", "type": "q4_0"}, r"--type must be one of f32, f16, q8_0, got q4_0"),
    ],
)
def test_forms_and_types_that_are_none_are_refused(
    run: Result, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run.export(**settings)
