"""Adapters as vLLM reads them: a stand-in of its reader with the fields it knows and the checks it makes."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedloom.models.build import Base
from fedloom.models.hf_logging import quiet
from fedloom.models.introspection import is_adapted
from fedloom.models.lora_folder import read_lora, vllm_rank
from fedloom.spaces.lora import LoRA
from fedloom.spaces.lora_xs import LoRAXS
from fedloom.spaces.scaling_vectors import IA3, VeRA
from fedloom.spaces.virtual_tokens import Prompt

Llama = Callable[..., Any]
IDS = torch.arange(20).view(2, 10)


@dataclass
class PeftHelper:
    """The fields of vLLM's class of that name; what a configuration has beyond them is dropped without a word."""

    r: int
    lora_alpha: int
    target_modules: list[str] | str
    bias: str = "none"
    modules_to_save: list[str] | None = None
    use_rslora: bool = False
    use_dora: bool = False

    @classmethod
    def read(cls, folder: Path) -> "PeftHelper":
        config = json.loads((folder / "adapter_config.json").read_text())
        return cls(**{f.name: config[f.name] for f in fields(cls) if f.name in config})

    def refuse(self, max_lora_rank: int) -> None:
        assert max_lora_rank in (1, 8, 16, 32, 64, 128, 256, 320, 512)
        assert 0 < self.r <= max_lora_rank
        assert self.bias == "none"
        assert not self.modules_to_save
        assert not self.use_dora

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


def served(folder: Path) -> dict[str, torch.Tensor]:
    """Return what vLLM adds to each layer."""
    helper = PeftHelper.read(folder)
    helper.refuse(vllm_rank(helper.r))
    tensors, added = load_file(folder / "adapter_model.safetensors"), {}
    for name, a in tensors.items():
        layer, _, factor = name.removeprefix("base_model.model.").rpartition(".")[0].rpartition(".")
        if factor == "lora_A":
            assert len(a) == helper.r
            added[layer] = helper.scaling * tensors[name.replace("lora_A", "lora_B")] @ a
    return added


def live(model: Any) -> dict[str, torch.Tensor]:
    """Return what the adapters of a model add to each layer."""
    found = {}
    for name, module in model.named_modules():
        if is_adapted(module):
            found[name.removeprefix("base_model.model.")] = module.get_delta_weight(
                "default"
            ).detach()
    return found


def moved(space: Any) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {n: t + 0.1 * torch.randn(t.shape, generator=draw) for n, t in space.start().items()}


def space_of(tune: Any, model: Any) -> Any:
    return tune.make_space(Base(model.requires_grad_(False), None, "a/model"), seed=1)


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, delta in ours.items():
        torch.testing.assert_close(delta, theirs[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "tune",
    [LoRA(rank=4), LoRA(rank=4, rslora=True), LoRA(rank=4, side=2), LoRAXS(rank=4)],
    ids=["plain", "rslora", "side", "lora_xs"],
)
def test_vllm_adds_what_the_live_model_adds(tiny_llama: Llama, tmp_path: Path, tune: Any) -> None:
    space = space_of(tune, tiny_llama())
    params = moved(space)
    space.save(tmp_path / "peft", params)
    read_lora(tmp_path / "peft", server="vLLM").write(tmp_path / "vllm")
    space.load(params)
    same(live(space.model), served(tmp_path / "vllm"))


def test_vera_is_served_as_lora(tiny_llama: Llama, tmp_path: Path) -> None:
    space = space_of(VeRA(rank=8), tiny_llama())
    params = moved(space)
    space.save_as_lora(tmp_path / "lora", params)
    read_lora(tmp_path / "lora", server="vLLM").write(tmp_path / "vllm")
    space.load(params)
    with quiet():
        whole = space.model
        expected = whole(input_ids=IDS).logits
    model = tiny_llama()
    for layer, delta in served(tmp_path / "vllm").items():
        model.get_submodule(layer).weight.data += delta
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_stabilised_scale_is_in_alpha_and_factors_keep_their_bits(
    tiny_llama: Llama, tmp_path: Path
) -> None:
    space = space_of(LoRA(rank=8, alpha=16, rslora=True), tiny_llama())
    space.save(tmp_path / "peft", moved(space))
    read_lora(tmp_path / "peft", server="vLLM").write(tmp_path / "vllm")
    helper = PeftHelper.read(tmp_path / "vllm")
    assert helper.use_rslora is False
    assert helper.lora_alpha / helper.r == pytest.approx(16 / math.sqrt(8), rel=1e-12)
    before, after = (
        load_file(tmp_path / f / "adapter_model.safetensors") for f in ("peft", "vllm")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.fixture
def mixed(tiny_llama: Llama, tmp_path: Path) -> tuple[Any, Path]:
    """Return a model with adapters of several ranks and scales, and its folder as plain PEFT writes it."""
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(), quiet():
        torch.manual_seed(0)
        config = LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=["q_proj", "v_proj", "down_proj"],
            rank_pattern={"q_proj": 2, "layers.1.mlp.down_proj": 7},
            alpha_pattern={"v_proj": 3},
            init_lora_weights=False,
        )
        model = get_peft_model(tiny_llama(), config).eval()
        model.save_pretrained(str(tmp_path / "mixed"))
    return model, tmp_path / "mixed"


def test_mixed_ranks_and_scales_become_one(
    mixed: tuple[Any, Path], tiny_llama: Llama, tmp_path: Path
) -> None:
    from peft import PeftModel

    model, folder = mixed
    lora = read_lora(folder, server="vLLM")
    lora.write(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (lora.rank, config["r"]) == (7, 7)
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    same(live(model), served(tmp_path / "out"))
    with quiet():
        again = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "out")).eval()
        ours, theirs = (m(input_ids=IDS).logits for m in (model, again))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        (LoRA(rank=2, dora=True), r"vLLM has no DoRA \(tune\.lora\.dora\): export the whole model"),
        (
            LoRA(rank=2, modules_to_save=["lm_head"]),
            r"vLLM takes no modules that were tuned whole \(tune\.lora\.modules_to_save: lm_head\)",
        ),
        (
            LoRA(rank=2, modules_to_save=["embed_tokens"]),
            r"no modules that were tuned whole .*embed_tokens",
        ),
        (IA3(), r"vLLM takes adapters of LoRA alone, got ia3: export the whole model"),
        (
            Prompt(tokens=2),
            r"got prompt_tuning, which .* weights either: export it with --for peft",
        ),
    ],
    ids=["dora", "head", "embedding", "ia3", "prompt"],
)
def test_what_vllm_cannot_serve_is_refused(
    tiny_llama: Llama, tmp_path: Path, tune: Any, message: str
) -> None:
    space = space_of(tune, tiny_llama())
    space.save(tmp_path, space.start())
    with pytest.raises(ValueError, match=message):
        read_lora(tmp_path, server="vLLM")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"bias": "lora_only", "target_modules": ["q_proj"]},
            r"no biases of an adapter, got bias lo",
        ),
        (
            {"target_modules": ["embed_tokens"]},
            r"pairs of low-rank factors alone, got .*embed_tokens",
        ),
    ],
)
def test_a_folder_with_more_than_factors_is_refused(
    tiny_llama: Llama, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    from peft import LoraConfig, get_peft_model

    with quiet():
        get_peft_model(tiny_llama(), LoraConfig(r=2, **settings)).save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match=message):
        read_lora(tmp_path, server="vLLM")


def test_the_rank_that_vllm_must_be_started_with_is_one_it_knows() -> None:
    assert [vllm_rank(rank) for rank in (1, 2, 8, 9, 257, 512)] == [1, 8, 8, 16, 320, 512]
    with pytest.raises(ValueError, match=r"vLLM serves adapters of rank 512 at most, got 513"):
        vllm_rank(513)
