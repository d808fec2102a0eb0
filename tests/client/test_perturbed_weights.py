from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import nn

from fedloom.client.perturbed_lowrank import PerturbedLowRank
from fedloom.client.perturbed_weights import Ground, perturbed_weights_of
from fedloom.models.build import Base
from fedloom.models.quantized import quantize_
from fedloom.models.schemes import SCHEMES
from fedloom.spaces.seed_space import Seeds

NAME = "coefficients"
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def architectures():
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    rotary = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 64,
        "max_position_embeddings": 64,
    }
    gpt2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 64, "n_positions": 64}
    return {
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**gpt2, bos_token_id=0, eos_token_id=0)),
        "qwen2, tied": lambda: Qwen2ForCausalLM(Qwen2Config(**rotary, tie_word_embeddings=True)),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**rotary)),
    }


def make(name="llama", distribution="rademacher", dtype=torch.float32, *, scheme="", weights=()):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = architectures()[name]().to(dtype).eval().requires_grad_(False)
        for key, p in model.named_parameters():
            if key.endswith("bias"):  # zeros would hide their shift
                nn.init.normal_(p, std=0.1)
    if scheme:
        quantize_(model, SCHEMES[scheme])
    tune = Seeds(num_seeds=8, distribution=distribution, weights=weights)
    return tune.make_space(Base(model, None, "random"), seed=2)


def at(space, k, by):
    """Return params with one coefficient more."""
    params = space.start()
    params[NAME][1] = 0.02
    params[NAME][k] += by
    return params


@torch.no_grad()
def logits(space):
    return space.model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher", "popcount", "lowrank"])
@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("gpt2", ()),
        ("gpt2", ("bias",)),
        ("qwen2, tied", ()),
        ("qwen2, tied", ("k_proj.bias", "v_proj.weight", "embed_tokens")),
        ("llama", ()),
        ("llama", ("mlp", "norm")),
    ],
)
def test_a_model_seen_shifted_is_the_model_rebuilt_there(name, weights, distribution):
    space = make(name, distribution, torch.float64, weights=weights)
    kind = PerturbedLowRank if distribution == "lowrank" else Ground
    space.load(at(space, 3, 0.03))
    wanted = logits(space)
    with kind(space, perturbed_weights_of(space)).at(at(space, 3, 0)) as ground:
        plain = logits(space)
        with ground.looking([3], [0.03]):
            shifted = logits(space)
        assert torch.equal(logits(space), plain)
        ground.move_([3, 2], [0.02, 0.1], shrink=1.0)
        ground.move_([3, 2], [0.01, -0.1], shrink=1.0)
        moved = logits(space)
        ground.move_([3], [-0.02], shrink=1.0)
        with ground.looking([3], [0.02]):
            looked = logits(space)
    assert (shifted - plain).abs().max() > 1e-3
    # A Llama's norms and rotations are float32 in any model.
    torch.testing.assert_close(shifted, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moved, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(looked, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "distribution"),
    [
        ("bfloat16", "rademacher"),
        ("bfloat16", "lowrank"),
        ("float16", "rademacher"),
        ("float16", "lowrank"),
        ("int8", "lowrank"),
        ("nf4", "lowrank"),
        ("int4", "lowrank"),
    ],
)
def test_frozen_weights_of_few_bits_are_seen_shifted_too(kind, distribution):
    scheme = kind if kind in SCHEMES else ""
    dtype = torch.float32 if scheme else getattr(torch, kind)
    space = make("llama", distribution, dtype, scheme=scheme)
    ground_of = PerturbedLowRank if distribution == "lowrank" else Ground
    space.load(at(space, 3, 0.03))
    wanted = logits(space)
    stored = [p.clone() for p in space.tensors.values()]
    with ground_of(space, perturbed_weights_of(space)).at(at(space, 3, 0)) as ground:
        with ground.looking([3], [0.03]):
            shifted = logits(space)
        ground.move_([3], [0.015], shrink=0.5)
        ground.move_([3], [0.03 - 0.0075], shrink=0.5)
        ground.move_([1], [0.015], shrink=1.0)
        with ground.looking([], []):
            moved = logits(space)
    close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4} if scheme else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(shifted, wanted, **close)
    scaled = at(space, 3, 0.03)
    space.layout.shapes["base"] = torch.Size()
    space.load({**scaled, "base": torch.tensor(-0.75, dtype=torch.float64)})
    torch.testing.assert_close(moved, logits(space), **close)
    if scheme:
        same = zip(stored, space.tensors.values(), strict=True)
        assert all(torch.equal(a, b) for a, b in same if not a.is_floating_point())


def test_a_head_in_chunks_is_shifted_once(monkeypatch):
    space = make()
    asked = []
    original = type(space.directions).shift

    def shift(self, name, *given, **more):
        asked.append(name)
        return original(self, name, *given, **more)

    monkeypatch.setattr(type(space.directions), "shift", shift)
    with (
        Ground(space, perturbed_weights_of(space)).at(space.start()) as ground,
        ground.looking([1], [0.1]),
    ):
        hidden = space.model.model(input_ids=IDS).last_hidden_state
        for row in hidden[0]:
            space.model.lm_head(row[None])
    assert sorted(asked) == sorted(space.directions.shapes)


def test_a_model_that_reads_weights_from_outside_is_refused():
    space = make("qwen2, tied")
    model = space.model
    model.lm_head.forward = lambda x: x @ model.model.embed_tokens.weight.T
    perturbed_weights_of(space)  # tied, so the head owns what it reads
    untied = make("llama")
    untied.model.lm_head.forward = lambda x: x @ untied.model.model.embed_tokens.weight.T
    before = [p.clone() for p in untied.tensors.values()]
    with pytest.raises(ValueError, match=r"tune: seeds needs a model whose layers alone read"):
        perturbed_weights_of(untied)
    after = untied.tensors.values()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def peak_bytes(work):
    """Return the most bytes of tensors that lived at once, beyond those that lived before."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate((size for _, size in changes), initial=0))


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian", "lowrank"])
def test_a_walk_takes_the_memory_of_forwards_and_the_largest_layer(
    bench, tiny_llama, federation_of, rows, distribution
):
    """On the bytes torch allocates: 1.05 of two forwards and the largest layer."""
    model = tiny_llama(hidden=128, vocab=512)
    tune = Seeds(distribution=distribution)
    data = federation_of([rows(1, 2, (60, 64))])
    local = {"optimizer": "sgd", "lr": 1e-4, "steps": 3, "batch_size": 2, "precision": "float32"}
    one = bench(model=model, data=data, tune=tune, **local)
    one.fit(["c0"])
    step = torch.stack([row.ids[:60] for row in data.shards["c0"].train])
    weights = one.space.values.nbytes

    def forwards():
        with torch.inference_mode():
            for _ in range(2):
                model(input_ids=step, labels=step, use_cache=False)

    largest = max(p.nbytes for p in one.space.tensors.values())
    allowed = weights + peak_bytes(forwards) + largest
    assert weights + peak_bytes(lambda: one.fit(["c0"])) <= 1.05 * allowed


def test_a_step_passes_over_the_weights_twice(bench, tiny_llama, monkeypatch):
    """The look ahead takes the last step on its way, the look behind is the other pass; draws are counted elsewhere."""
    model = tiny_llama()
    one = bench(model=model, tune=Seeds(), optimizer="sgd", lr=1e-4, steps=4)
    passes = {"shift": 0, "advance": 0}
    kind = type(one.space.directions)

    def counted(method):
        original = getattr(kind, method)

        def called(self, name, values, *given, **more):
            passes[method] += values.numel()
            return original(self, name, values, *given, **more)

        monkeypatch.setattr(kind, method, called)

    for method in passes:
        counted(method)
    one.fit(["c1"])
    numel = one.space.values.numel()
    table = model.get_input_embeddings().weight.numel()
    # Three steps are taken by the look after them, the last one by itself; a table moves before its rows are read.
    assert passes["advance"] == 3 * (numel - table)
    assert sum(passes.values()) <= 4 * 2 * numel + numel + 4 * 3 * table
