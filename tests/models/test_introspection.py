import pytest
import torch

from fedloom.core.randomness import seeded
from fedloom.models.build import Base
from fedloom.models.introspection import (
    frozen_linears,
    keeps_rows_apart,
    listed_groups,
    lora_layers,
    readout,
)
from fedloom.models.probe import draws
from fedloom.spaces.full import Full
from fedloom.spaces.lora import LoRA


def adapted(model, tune=LoRA()):  # noqa: B008
    tune.make_space(Base(model.requires_grad_(False), None, "random"), seed=0)
    return model


def test_a_readout_is_the_model_in_two(tiny_llama):
    model = tiny_llama().requires_grad_(False)
    parts = readout(model)
    assert parts is not None
    assert parts.frozen is not None
    assert parts.head is model.lm_head
    ids = torch.arange(10).view(1, 10)
    assert torch.equal(parts.head(parts.hidden(input_ids=ids)), model(input_ids=ids).logits)


def test_a_head_that_learns_is_not_frozen(tiny_llama):
    parts = readout(tiny_llama().requires_grad_(True))
    assert parts is not None
    assert parts.frozen is None


def test_logits_that_are_more_than_the_head_are_seen(tiny_llama):
    model = tiny_llama()
    forward = model.forward

    def scaled(**inputs):
        out = forward(**inputs)
        out.logits = out.logits * 1.001
        return out

    model.forward = scaled
    assert readout(model) is None


def test_asking_leaves_the_mode_alone(tiny_llama):
    model = tiny_llama().train()
    readout(model)
    assert model.training


def test_frozen_layers_are_those_without_a_trainable_tensor(tiny_llama):
    assert len(frozen_linears(tiny_llama().requires_grad_(False))) == 2 * 7 + 1
    assert not frozen_linears(tiny_llama().requires_grad_(True))
    assert len(frozen_linears(adapted(tiny_llama()))) == 2 * 7 + 1


def test_plain_adapters_are_found_with_their_scale(tiny_llama):
    layers = lora_layers(adapted(tiny_llama(), LoRA(rank=4, alpha=6.0, targets=["q_proj"])))
    assert [layer.name for layer in layers] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
    ]
    assert {layer.scaling for layer in layers} == {1.5}


@pytest.mark.parametrize("tune", [LoRA(dora=True), LoRA(modules_to_save=["lm_head"]), Full()])
def test_other_things_that_learn_are_not_plain_adapters(tiny_llama, tune):
    assert not lora_layers(adapted(tiny_llama(), tune))


def test_dropout_is_found_in_adapters_and_in_the_base(tiny_llama):
    assert not draws(adapted(tiny_llama()))
    assert draws(adapted(tiny_llama(), LoRA(dropout=0.1)))
    model = tiny_llama()
    model.model.layers[0].self_attn.attention_dropout = 0.1
    assert draws(model)


def test_a_fork_of_the_global_generator_starts_at_its_seed_and_goes_back():
    before = torch.get_rng_state()
    draws = []
    for seed in (5, 5, 6):
        with seeded(seed):
            draws.append(float(torch.rand(())))
    assert draws[0] == draws[1] != draws[2]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_llama_keeps_rows_apart_that_share_one(tiny_llama, dtype):
    assert keeps_rows_apart(tiny_llama(dtype=dtype))


@pytest.mark.parametrize("fault", ["ignores positions", "takes none", "leaks"])
def test_a_model_that_mixes_rows_is_found_out(tiny_llama, fault):
    model = tiny_llama()
    forward = model.forward

    def faulty(input_ids, position_ids=None, use_cache=False):
        if fault == "takes none" and position_ids is not None:
            raise TypeError("unexpected keyword position_ids")
        if fault != "leaks":
            return forward(input_ids=input_ids, use_cache=use_cache)
        out = forward(input_ids=input_ids, position_ids=position_ids, use_cache=use_cache)
        out.logits = out.logits + 1e-6 * input_ids[:, :1, None]
        return out

    model.forward = faulty
    assert not keeps_rows_apart(model)


def test_groups_are_named_with_their_count():
    assert listed_groups(["a.1.q", "a.0.q", "b"]) == "a.*.q (2), b"
    assert listed_groups([f"{letter}.x" for letter in "abcdefgh"]).endswith("f.x and 2 more")
