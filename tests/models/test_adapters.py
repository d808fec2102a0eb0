import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fedloom.models.build import Base, fingerprint
from fedloom.models.hf_logging import quiet
from fedloom.spaces.adapter import AdapterSpace
from fedloom.spaces.lora import LoRA

IDS = torch.arange(20).view(2, 10)


def made(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return a random model of some architecture, the same one every time."""
    import transformers as t

    rotary = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 12,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 64,
        "max_position_embeddings": 64,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "gpt2":
            sizes = {"n_embd": 32, "n_layer": 12, "n_head": 2, "vocab_size": 64, "n_positions": 64}
            config = t.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
            model = t.GPT2LMHeadModel(config)
        elif name == "qwen2":
            model = t.Qwen2ForCausalLM(t.Qwen2Config(**rotary, tie_word_embeddings=True))
        else:
            model = t.LlamaForCausalLM(t.LlamaConfig(**rotary, tie_word_embeddings=name == "tied"))
        return model.to(dtype).eval().requires_grad_(False)


def space_of(model: Any, tokenizer: Any = None, seed: int = 1, **tune: Any) -> Any:
    return LoRA(rank=4, **tune).make_space(Base(model, tokenizer, "a/model"), seed=seed)


def moved(space: Any) -> dict[str, torch.Tensor]:
    """Return coordinates away from the start."""
    draw = torch.Generator().manual_seed(0)
    return {
        name: t + 0.1 * torch.randn(t.shape, generator=draw) for name, t in space.start().items()
    }


@pytest.mark.parametrize("name", ["llama", "tied", "gpt2", "qwen2"])
@pytest.mark.parametrize("origin", ["initial", "zero"])
def test_a_folder_gives_plain_peft_the_same_logits(tmp_path: Path, name: str, origin):
    from peft import PeftModel

    model = made(name)
    space = space_of(model, origin=origin)
    params = moved(space)
    space.save(tmp_path, params)
    space.load(params)
    expected = model(input_ids=IDS).logits
    with quiet():
        theirs = PeftModel.from_pretrained(made(name), str(tmp_path)).eval()
    assert torch.equal(theirs(input_ids=IDS).logits, expected)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "a/model"
    assert config["inference_mode"] is True


@pytest.mark.parametrize(
    "tune",
    [{"rslora": True}, {"dora": True}, {"modules_to_save": ["lm_head"]}, {"dropout": 0.3}],
    ids=["rslora", "dora", "modules to save", "dropout"],
)
def test_kinds_of_adapters_survive_their_folder(tmp_path: Path, tune):
    from peft import PeftModel

    model = made("llama")
    space = space_of(model, **tune)
    params = moved(space)
    space.save(tmp_path, params)
    space.load(params)
    expected = model(input_ids=IDS).logits
    with quiet():
        theirs = PeftModel.from_pretrained(made("llama"), str(tmp_path)).eval()
    torch.testing.assert_close(theirs(input_ids=IDS).logits, expected)


@pytest.mark.parametrize("name", ["llama", "tied", "gpt2"])
@pytest.mark.parametrize("saved", [(), ("lm_head",)], ids=["", "tuned head"])
def test_a_merged_model_needs_no_peft(tmp_path: Path, tiny_tokenizer, name, saved):
    from transformers import AutoModelForCausalLM

    model = made(name)
    space = space_of(model, tiny_tokenizer, modules_to_save=saved)
    params = moved(space)
    space.load(params)
    expected = model(input_ids=IDS).logits
    before = fingerprint(model)
    space.save_merged(tmp_path, params)
    assert fingerprint(model) == before
    assert torch.equal(model(input_ids=IDS).logits, expected)
    with quiet():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(theirs(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
    assert (tmp_path / "tokenizer_config.json").exists()


def test_names_are_the_models_own_in_the_order_of_its_layers():
    names = list(space_of(made("llama"), targets=["q_proj"]).start())
    assert names[:2] == [
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "model.layers.0.self_attn.q_proj.lora_B.weight",
    ]
    assert [int(name.split(".")[2]) for name in names[::2]] == list(range(12))


def test_modules_to_save_are_called_what_they_are():
    names = list(space_of(made("llama"), targets="q_proj", modules_to_save=["lm_head"]).start())
    assert names[-1] == "lm_head.weight"


def test_everything_that_learns_is_in_the_params():
    """Uploaded tensors are the trainable set."""
    model = made("gpt2")
    space = space_of(model, dora=True)
    learning = [p for p in model.parameters() if p.requires_grad]
    assert [t.shape for t in space.start().values()] == [p.shape for p in learning]
    assert len(learning) == 3 * 4 * 12


def test_the_seed_alone_decides_the_start():
    def start(seed: int) -> torch.Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(torch.seed() % 1000)
            return space_of(made("llama"), seed=seed, origin="zero").values

    assert torch.equal(start(1), start(1))
    assert not torch.equal(start(1), start(2))


def test_the_start_is_spread_as_peft_spreads_it():
    space = space_of(made("llama"), origin="zero")
    for name, t in space.start().items():
        if "lora_A" in name:
            bound = t.shape[1] ** -0.5
            assert float(t.abs().max()) <= bound
            assert float(t.std()) == pytest.approx(bound / 3**0.5, rel=0.25)
        else:
            assert not t.any()


def test_no_other_tensor_shares_the_start():
    values = space_of(made("llama"), origin="zero", targets=["q_proj"]).start()
    first = [t for name, t in values.items() if "lora_A" in name]
    assert not any(torch.equal(first[0], other) for other in first[1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_are_float32_on_a_base_of_any_type(dtype):
    model = made("llama", dtype)
    space = space_of(model)
    assert {t.dtype for t in space.start().values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {dtype}
    assert bool(torch.isfinite(model(input_ids=IDS).logits).all())


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        (
            {"targets": ["q_proj", "query"]},
            r"tune.lora.targets must be all-linear or .* \(down_proj, gate_proj, k_proj, o_proj, q_proj,"
            r" up_proj, v_proj\), got query",
        ),
        ({"targets": "lm_head"}, r"tune.lora.targets must be all-linear or .*, got lm_head"),
        (
            {"modules_to_save": ["head"]},
            r"tune.lora.modules_to_save must name modules .*lm_head.*, got head",
        ),
    ],
)
def test_layers_that_are_not_there_are_named_beside_those_that_are(tune, message: str):
    with pytest.raises(ValueError, match=message):
        space_of(made("llama"), **tune)


def test_whole_modules_need_full_precision():
    with pytest.raises(ValueError, match=r"tune.lora.modules_to_save .* float32, got bfloat16"):
        space_of(made("llama", torch.bfloat16), modules_to_save=["lm_head"])


def test_a_lora_space_is_what_tune_asks_for():
    space = space_of(made("llama"), dropout=0.5)
    assert isinstance(space, AdapterSpace)
    assert not any(module.training for module in space.model.modules())
