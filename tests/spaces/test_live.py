from typing import Any, cast

import pytest
import torch

from fedloom.models.build import Base
from fedloom.models.hf_logging import quiet
from fedloom.spaces.full import Full, FullSpace
from fedloom.spaces.lora import LoRA
from fedloom.spaces.tune import TUNES

IDS = torch.arange(20).view(2, 10)


def space_of(model: Any, tokenizer: Any = None, *, space: str = "lora", **tune: Any) -> Any:
    base = Base(model.requires_grad_(False), tokenizer, "random")
    return TUNES[space](**tune).make_space(base, seed=1)


@pytest.fixture(params=["lora", "full"])
def kind(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


def test_coordinates_count_from_the_start_everybody_shares(tiny_llama, kind):
    space = space_of(tiny_llama(), space=kind, origin="initial")
    assert not any(t.any() for t in space.start().values())
    initial = {n: t.clone() for n, t in space.absolute(space.start()).items()}
    space.load({n: t + 0.5 for n, t in space.start().items()})
    live = space.layout.split(space.values)
    assert all(torch.equal(live[n], initial[n] + 0.5) for n in initial)
    torch.testing.assert_close(
        space.relative(live), {n: torch.full_like(t, 0.5) for n, t in initial.items()}
    )


def test_coordinates_from_zero_are_the_tensors_themselves(tiny_llama, kind):
    space = space_of(tiny_llama(), space=kind, origin="zero")
    start = space.start()
    live = space.layout.split(space.values)
    assert all(torch.equal(start[n], live[n]) for n in start)
    space.load({n: torch.zeros_like(t) for n, t in start.items()})
    assert not space.values.any()
    assert all(torch.equal(space.start()[n], start[n]) for n in start)
    assert all(torch.equal(space.relative(start)[n], start[n]) for n in start)


def test_loading_moves_the_model(tiny_llama, kind):
    model = tiny_llama()
    plain = model(input_ids=IDS).logits
    space = space_of(model, space=kind)
    assert torch.equal(model(input_ids=IDS).logits, plain)
    space.load({n: t + 0.1 for n, t in space.start().items()})
    assert not torch.allclose(model(input_ids=IDS).logits, plain)
    space.load(space.start())
    assert torch.equal(model(input_ids=IDS).logits, plain)


def test_what_a_space_gives_away_is_the_receivers(tiny_llama, kind):
    for origin in ("initial", "zero"):
        space = space_of(tiny_llama(), space=kind, origin=origin)
        before = space.values.clone()
        live = space.layout.split(space.values)
        for given in (space.start(), space.relative(live), space.absolute(space.start())):
            for t in given.values():
                t.fill_(9.0)
        assert torch.equal(space.values, before)
        space.load(space.start())
        assert torch.equal(space.values, before)


def test_params_of_another_space_are_refused(tiny_llama):
    space = space_of(tiny_llama())
    start = dict(space.start())
    name = next(iter(start))
    with pytest.raises(ValueError, match=r"params differ from the space in \['stranger'\]"):
        space.load({**start, "stranger": torch.zeros(1)})
    with pytest.raises(ValueError, match=rf"params of {name} must have shape .*, got \(3,\)"):
        space.load({**start, name: torch.zeros(3)})


def test_full_tuning_counts_a_tied_tensor_once(tiny_llama, tiny_tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=64,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    space = space_of(model, tiny_tokenizer, space="full")
    assert isinstance(space, FullSpace)
    assert "lm_head.weight" not in space.start()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    params = {n: t + 0.1 for n, t in space.start().items()}
    space.save(tmp_path, params)
    expected = model(input_ids=IDS).logits
    with quiet():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(theirs(input_ids=IDS).logits, expected)


def test_full_tuning_of_some_tensors_leaves_the_others(tiny_llama, tiny_tokenizer):
    space = space_of(tiny_llama(), tiny_tokenizer, space="full", weights=["mlp.down_proj", "norm"])
    names = set(space.start())
    assert names == {n for n, p in space.model.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[0].split(".")[-1] for name in names} == {"down_proj", "norm"}


def test_full_tuning_needs_full_precision(tiny_llama):
    with pytest.raises(ValueError, match=r"tune: full .* float32, got bfloat16; local.precision"):
        space_of(tiny_llama(dtype=torch.bfloat16), space="full")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoRA(rank=0), r"tune.lora.rank must be at least 1, got 0"),
        (lambda: LoRA(alpha=0.0), r"tune.lora.alpha must be positive, got 0.0"),
        (lambda: LoRA(dropout=1.0), r"tune.lora.dropout must be in \[0, 1\), got 1.0"),
        (
            lambda: LoRA(origin=cast(Any, "mean")),
            r"tune.lora.origin must be initial or zero, got mean",
        ),
        (lambda: LoRA(targets=[]), r"tune.lora.targets must be all-linear or name .*, got none"),
        (
            lambda: LoRA(modules_to_save="lm_head"),
            r"tune.lora.modules_to_save must be a list, got lm_head",
        ),
        (lambda: Full(weights="mlp"), r"tune.full.weights must be a list, got mlp"),
        (
            lambda: Full(origin=cast(Any, "mean")),
            r"tune.full.origin must be initial or zero, got mean",
        ),
    ],
)
def test_a_setting_that_cannot_be_meant_is_refused(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_identity_tells_base_start_and_tensors_apart(tiny_llama, kind):
    def identity(seed: int = 0, hidden: int = 32, **tune: Any) -> Any:
        return space_of(tiny_llama(seed=seed, hidden=hidden), space=kind, **tune).identity()

    moved = space_of(tiny_llama(), space=kind)
    moved.load({n: t + 0.5 for n, t in moved.start().items()})
    ours = identity()
    assert moved.identity() == ours
    other = identity(seed=1)
    # Under full tuning all of the base is where training starts.
    assert (other["base"] != ours["base"]) == (kind == "lora")
    assert (other["start"] != ours["start"]) == (kind == "full")
    assert other["tensors"] == ours["tensors"] != identity(hidden=16)["tensors"]
