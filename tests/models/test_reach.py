import pytest
import torch
import transformers as t
from torch import nn

from fedloom.models.introspection import numberless
from fedloom.models.reach import linear_layers, reach, unread

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
}


def groups(names):
    return {numberless(name) for name in names}


def test_all_of_a_llama_learns(tiny_llama):
    model = tiny_llama().requires_grad_(False)
    found = reach(model)
    assert found.learning == linear_layers(model).keys() == found.layers
    assert len(found.learning) == 14
    assert not unread(model)


def test_gpt2s_layers_learn_too():
    model = t.GPT2LMHeadModel(t.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64)).eval()
    assert len(reach(model.requires_grad_(False)).learning) == 8
    assert not unread(model)


def test_a_layer_that_lends_its_weight_does_not_learn_but_is_read():
    config = t.JambaConfig(
        **SIZES,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=2,
        use_mamba_kernels=False,
        mamba_d_state=4,
    )
    model = t.JambaForCausalLM(config).eval().requires_grad_(False)
    assert groups(reach(model).idle) == {"model.layers.*.mamba.dt_proj"}
    assert not unread(model)


def gemma():
    eye = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = t.Gemma3Config(
        text_config={**SIZES, "head_dim": 16},
        vision_config=eye,
        mm_tokens_per_image=4,
        image_token_index=3,
        boi_token_index=2,
        eoi_token_index=4,
    )
    return t.Gemma3ForConditionalGeneration(config).eval().requires_grad_(False)


def test_a_vision_tower_takes_no_part_in_a_pass_over_text():
    model = gemma()
    found = reach(model)
    assert {name.split(".")[1] for name in found.learning} == {"language_model"}
    assert {name.split(".")[1] for name in found.idle} == {"vision_tower"}
    silent = unread(model)
    assert {name.split(".")[1] for name in silent} == {"vision_tower", "multi_modal_projector"}
    whole = {n for n, _ in model.named_parameters() if n.split(".")[1] != "language_model"}
    assert silent == whole - {"lm_head.weight"}


def test_experts_that_wait_for_their_tokens_are_part_of_the_model(tiny_routed):
    model = tiny_routed().requires_grad_(False)
    with torch.no_grad():  # all tokens to one of two experts of the first layer
        model.model.layers[0].mlp.router.weight[2:] -= (
            10 * model.model.layers[0].mlp.router.weight[:1]
        )
    found = reach(model)
    assert groups(found.odd) == {"model.layers.*.mlp.router"}
    assert sum("experts" in name for name in found.learning) == 16
    assert not found.idle
    assert not unread(model)


def test_a_layer_nobody_calls_is_idle_even_beside_others_of_its_list(tiny_llama):
    model = tiny_llama(layers=3).requires_grad_(False)
    model.config.num_hidden_layers = 2  # as many as its forward goes through
    assert {name.split(".")[2] for name in reach(model).idle} == {"2"}
    assert {name.split(".")[2] for name in unread(model)} == {"2"}


@pytest.mark.parametrize("fault", ["no gradient", "two inputs", "by name", "a pair"])
def test_a_layer_no_adapter_would_serve_is_told_apart(tiny_llama, fault):
    model = tiny_llama().requires_grad_(False)
    layer = model.model.layers[0].mlp

    class Odd(nn.Linear):
        def forward(self, x, *more):
            return (super().forward(x), 1) if fault == "a pair" else super().forward(x)

    odd = Odd(64, 32)
    layer.down_proj = odd.requires_grad_(False)

    def forward(x):
        wide = layer.act_fn(layer.gate_proj(x)) * layer.up_proj(x)
        if fault == "no gradient":
            return odd(wide).detach()
        if fault == "two inputs":
            return odd(wide, 1)
        return odd(x=wide) if fault == "by name" else odd(wide)[0]

    layer.forward = forward
    found = reach(model)
    kind = found.idle if fault == "no gradient" else found.odd
    assert kind >= {"model.layers.0.mlp.down_proj"}
    assert "model.layers.1.mlp.down_proj" in found.learning


def test_what_is_asked_leaves_no_trace(tiny_llama):
    model = tiny_llama(layers=3).requires_grad_(False)
    model.config.num_hidden_layers = 2
    before = {name: p.clone() for name, p in model.named_parameters()}
    reach(model)
    unread(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(p.requires_grad for p in model.parameters())
