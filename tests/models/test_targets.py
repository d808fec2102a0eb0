import pytest
import torch
import transformers as t

from fedloom.models.build import Base
from fedloom.models.targets import choose_targets
from fedloom.spaces.lora import LoRA
from fedloom.spaces.tune import TUNES

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
}
EYE = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def made(name):
    configs = {
        "gemma3": lambda: t.Gemma3Config(
            text_config={**SIZES, "head_dim": 16},
            vision_config=EYE,
            mm_tokens_per_image=4,
            image_token_index=3,
            boi_token_index=2,
            eoi_token_index=4,
        ),
        "jamba": lambda: t.JambaConfig(
            **SIZES,
            attn_layer_period=2,
            attn_layer_offset=1,
            num_experts=2,
            use_mamba_kernels=False,
            mamba_d_state=4,
        ),
        "llama4": lambda: t.Llama4TextConfig(
            **SIZES, intermediate_size_mlp=64, num_local_experts=2, head_dim=16
        ),
        "mixtral": lambda: t.MixtralConfig(**SIZES, num_local_experts=2),
        "mamba": lambda: t.MambaConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4
        ),
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = t.AutoModelForCausalLM.from_config(configs[name]())
    return model.eval().requires_grad_(False)


def space_of(model, **tune):
    return LoRA(rank=2, **tune).make_space(Base(model, None, "a/model"), seed=0)


def ends(space):
    """Return the last two parts of the adapted layers' names, or what holds fused experts."""
    return {name.partition(".lora_")[0].rpartition(".")[2] for name in space.start()}


def without_gradient(space):
    space.model(input_ids=torch.arange(40)[None] % 60 + 4).logits.square().mean().backward()
    learning = [(n, p) for n, p in space.model.named_parameters() if p.requires_grad]
    assert len(learning) == len(space.start())
    return {name for name, p in learning if p.grad is None}


LEFT = {
    "gemma3": "model.vision_tower (31,104 weights), model.multi_modal_projector (",
    "jamba": "model.layers.*.mamba.dt_proj (",
    "llama4": "model.layers.*.feed_forward.experts (24,576 weights), model.layers.*.feed_forward.router (",
    "mixtral": "",
    "mamba": "backbone.layers.*.mixer.out_proj (4,096 weights), ",
}


@pytest.mark.parametrize("name", LEFT)
def test_every_tensor_of_an_adapter_has_a_gradient_and_what_is_frozen_is_named(name):
    space = space_of(made(name))
    assert not without_gradient(space)
    left = LEFT[name]
    assert left in space.left_frozen
    assert bool(left) == space.left_frozen.startswith("tune.lora.targets all-linear leaves frozen")


@pytest.mark.parametrize(
    ("name", "targets", "left"),
    [
        ("gemma3", ["q_proj", "v_proj"], "model.vision_tower.encoder.layers.*.self_attn.q_proj, "),
        ("jamba", ["in_proj", "q_proj"], ""),
        ("llama4", "q_proj", ""),
    ],
)
def test_layers_by_name_are_those_that_learn(name, targets, left):
    space = space_of(made(name), targets=targets)
    assert not without_gradient(space)
    assert ends(space) == ({targets} if isinstance(targets, str) else set(targets))
    assert left in space.left_frozen
    assert bool(left) == bool(space.left_frozen)


@pytest.mark.parametrize(
    ("name", "targets", "message"),
    [
        ("jamba", ["dt_proj"], r"\(.*q_proj.*\), got dt_proj, which a loss over text has no grad"),
        ("jamba", ["q_proj", "dt_proj"], r"got dt_proj, which a loss over text has no gradient in"),
        ("gemma3", "out_proj", r"got out_proj, which a loss over text has no gradient in"),
        ("llama4", ["router"], r"got router, which takes or gives something else than a linear"),
        (
            "llama4",
            ["experts"],
            r"tune.lora.targets must be all-linear or name linear .*, got experts$",
        ),
    ],
)
def test_a_target_without_a_gradient_is_refused(name, targets, message):
    with pytest.raises(ValueError, match=message):
        space_of(made(name), targets=targets)


def test_a_whole_module_no_pass_reads_is_refused():
    with pytest.raises(ValueError, match=r"tune.lora.modules_to_save .* reads, got vision_tower"):
        space_of(made("gemma3"), modules_to_save=["vision_tower"])


def test_a_model_without_a_layer_for_an_adapter_is_refused(tiny_llama):
    model = tiny_llama().requires_grad_(False)
    model.config.num_hidden_layers = 0
    with pytest.raises(
        ValueError, match=r"tune.lora.targets all-linear finds no linear layer that"
    ):
        space_of(model)


def test_an_ordinary_model_is_told_to_peft_as_the_recipe_has_it(tiny_llama):
    model = tiny_llama().requires_grad_(False)
    assert choose_targets(model, "all-linear", saved=()).peft_targets == "all-linear"
    assert choose_targets(model, ["q_proj"], saved=()).peft_targets == ["q_proj"]
    assert space_of(model).left_frozen == ""


@pytest.mark.parametrize("name", LEFT)
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "in_proj"]], ids=["all", "named"])
def test_plain_peft_reads_what_is_written(tmp_path, name, targets):
    from peft import PeftModel

    from fedloom.models.hf_logging import quiet

    model = made(name)
    if targets != "all-linear":
        targets = [end for end in targets if any(n.endswith(end) for n, _ in model.named_modules())]
    space = space_of(model, targets=targets)
    draw = torch.Generator().manual_seed(0)
    params = {n: v + 0.1 * torch.randn(v.shape, generator=draw) for n, v in space.start().items()}
    space.save(tmp_path, params)
    space.load(params)
    ids = torch.arange(20)[None] + 10
    expected = model(input_ids=ids).logits
    with quiet():
        theirs = PeftModel.from_pretrained(made(name), str(tmp_path)).eval()
    torch.testing.assert_close(theirs(input_ids=ids).logits, expected, rtol=0, atol=1e-4)
    assert not torch.allclose(made(name)(input_ids=ids).logits, expected, atol=1e-3)


@pytest.mark.parametrize("space", ["full", "seeds"])
def test_weights_no_pass_reads_are_not_learnt_whole_either(space):
    made_space = space_of_whole(space)
    shapes = made_space.layout.shapes if space == "full" else made_space.directions.shapes
    assert shapes
    assert not any("vision_tower" in name or "projector" in name for name in shapes)
    assert "stay frozen: model.multi_modal_projector" in made_space.left_frozen


def space_of_whole(space, **tune):
    base = Base(made("gemma3"), None, "a/model")
    return TUNES[space](**tune).make_space(base, seed=0)


@pytest.mark.parametrize("space", ["full", "seeds"])
def test_weights_by_a_name_no_pass_reads_are_refused(space):
    with pytest.raises(
        ValueError, match=rf"tune\.{space}\.weights must name .* reads, got vision_tower"
    ):
        space_of_whole(space, weights=["vision_tower"])
