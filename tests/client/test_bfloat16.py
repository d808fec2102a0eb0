"""Training on a base in bfloat16, against the same in float32: eight bits of a number are 2^-9 = 0.2 % off at most."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from fedloom.client.fast import kernels
from fedloom.client.fast.functions import lora_linear, rms_norm
from fedloom.client.fast.kernels import (
    choose_kernels,
    make_fast,
    products_in_words,
    slow_type,
)
from fedloom.client.fast.products import PRODUCTS, UNKEPT, TorchProduct, rates
from fedloom.client.local_settings import LocalSettings
from fedloom.core.params import add, scale, sub
from fedloom.core.protocols import Fit, Job, Params
from fedloom.core.randomness import derive
from fedloom.data.tokens import Example
from fedloom.models.introspection import frozen_norms
from fedloom.objectives.head import fused_cross_entropy

BF16 = torch.bfloat16
KINDS = tuple(PRODUCTS)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def off(got: torch.Tensor | None, wanted: torch.Tensor | None) -> float:
    """Return how far off a tensor is, as a share of its norm."""
    assert got is not None
    assert wanted is not None
    got, wanted = got.detach().double(), wanted.detach().double()
    return float((got - wanted).norm() / wanted.norm())


def works_here(kind: str) -> None:
    """Skip where this machine cannot multiply so."""
    if kind not in {rate.kind for rate in rates(BF16)}:
        pytest.skip(f"this torch has no {kind} products in bfloat16")


def flat(params: Params) -> torch.Tensor:
    return torch.cat([params[name].flatten() for name in sorted(params)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ways", [PRODUCTS, UNKEPT], ids=["kept", "unkept"])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_way_to_multiply_is_a_product_up_to_rounding(kind, ways, transposed, monkeypatch):
    works_here(kind)
    monkeypatch.setattr("fedloom.client.fast.products.WIDE", 100)  # a weight in several parts
    weight = normal(40, 48).t().to(BF16) if transposed else normal(48, 40).to(BF16)
    x, g = normal(7, 9, 40, seed=1).to(BF16), normal(7, 9, 48, seed=2).to(BF16)
    product = ways[kind](weight)
    there, back = product.forward(x), product.backward(g)
    assert (there.dtype, back.dtype) == (BF16, BF16)
    assert off(there, x.float() @ weight.float().t()) < 0.004
    assert off(back, g.float() @ weight.float()) < 0.004


@pytest.mark.parametrize("lanes", [1, 3])
def test_float32_adapters_of_a_bfloat16_layer_have_float32_gradients(lanes):
    weight, x, g = normal(48, 40), normal(6, 2, 40, seed=1), normal(6, 2, 48, seed=2)
    weight, x, g = weight.to(BF16).float(), x.to(BF16).float(), g.to(BF16).float()
    a, b = normal(lanes, 4, 40, seed=3), normal(lanes, 48, 4, seed=4)

    def run(kind: torch.dtype) -> list[torch.Tensor]:
        own = [x.to(kind).requires_grad_(), a.clone().requires_grad_(), b.clone().requires_grad_()]
        out = lora_linear(own[0], TorchProduct(weight.to(kind)), own[1], own[2], 0.5)
        return [out, *torch.autograd.grad(out, own, g.to(kind))]

    low, high = run(BF16), run(torch.float32)
    assert [t.dtype for t in low] == [BF16, BF16, torch.float32, torch.float32]
    assert max(map(off, low[:2], high[:2])) < 0.006
    # Nothing of an adapter's own gradient is rounded: what comes in is the same, and sums are in float32.
    assert max(map(off, low[2:], high[2:])) < 1e-5


@pytest.mark.parametrize("biased", [False, True])
def test_the_fused_loss_of_bfloat16_states_sums_in_float32(biased):
    x, weight = normal(130, 32).to(BF16).requires_grad_(), normal(200, 32, seed=1).to(BF16)
    bias = normal(200, seed=2).to(BF16) if biased else None
    targets = torch.randint(0, 200, (130,), generator=torch.Generator().manual_seed(3))
    losses = fused_cross_entropy(x, TorchProduct(weight), bias, targets)
    (gradient,) = torch.autograd.grad(losses.mean(), x)
    wide = x.detach().float().requires_grad_()
    logits = functional.linear(wide, weight.float(), None if bias is None else bias.float())
    exact = functional.cross_entropy(logits, targets, reduction="none")
    (wanted,) = torch.autograd.grad(exact.mean(), wide)
    assert (losses.dtype, gradient.dtype) == (torch.float32, BF16)
    assert off(losses, exact) < 0.005
    assert abs(float(losses.detach().mean() / exact.detach().mean()) - 1) < 0.001
    assert off(gradient, wanted) < 0.01


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_a_frozen_norm_is_at_least_as_exact_as_the_models_own(family):
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    made: Any = LlamaRMSNorm(64) if family == "llama" else Gemma3RMSNorm(64)
    made.weight.data = normal(64, seed=1)
    module = made.to(BF16).requires_grad_(False)
    (norm,) = frozen_norms(module)
    x, g = 3 * normal(5, 7, 64).to(BF16), normal(5, 7, 64, seed=2).to(BF16)
    own, theirs, exact = (
        x.clone().to(kind).requires_grad_() for kind in (BF16, BF16, torch.double)
    )
    ours = rms_norm(own, norm.weight, norm.eps)
    model = module(theirs)
    truth = exact * (exact.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight
    ours.backward(g)
    model.backward(g)
    truth.backward(g.double())
    assert torch.equal(own.detach(), x)  # what came in is only read
    assert off(ours, truth) <= off(model, truth) * 1.001 < 0.004
    assert off(own.grad, exact.grad) <= off(theirs.grad, exact.grad) * 1.001 < 0.006


def test_norms_that_learn_or_are_none_are_left_alone(tiny_llama):
    model = tiny_llama(dtype=BF16).requires_grad_(False)
    assert len(frozen_norms(model)) == 2 * model.config.num_hidden_layers + 1
    model.model.norm.weight.requires_grad_(True)
    assert len(frozen_norms(model)) == 2 * model.config.num_hidden_layers
    assert not make_fast(tiny_llama().requires_grad_(False), LocalSettings()).norms


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_on_a_bfloat16_base_is_float32s_and_a_cohorts_is_its_clients(
    bench, tiny_llama, kind
):
    works_here(kind)
    local = {"optimizer": "sgd", "lr": 0.5, "steps": 1}

    def way(dtype: torch.dtype, **edits: Any) -> torch.Tensor:
        model = tiny_llama(dtype=BF16).to(dtype)  # the same weights
        one = bench(model=model, **{**local, **edits})
        return torch.cat([flat(sub(d.params, one.space.start())) for d in one.fit(["c1", "c5"])])

    exact = way(torch.float32, kernels="reference", batched="off")
    together = way(BF16, kernels=kind)
    alone = way(BF16, kernels=kind, batched="off")
    assert off(together, exact) < 0.03
    assert off(alone, exact) < 0.03
    assert off(together, alone) < 0.03


@pytest.mark.parametrize("kind", KINDS)
def test_after_thirty_steps_the_loss_is_within_a_hundredth_of_float32s(bench, tiny_llama, kind):
    works_here(kind)
    ends = []
    for dtype, chosen in ((torch.float32, "reference"), (BF16, kind)):
        model = tiny_llama(dtype=dtype)
        with torch.no_grad():
            model.lm_head.weight.mul_(8)  # a frozen random head cannot say much else
        one = bench(model=model, tune={"rank": 8}, kernels=chosen, lr=0.005, steps=5)
        params, losses = one.space.start(), []
        for number in range(1, 7):
            # All of them: how two clients end says by 1 to 3 % how bits were rounded on the way.
            jobs = [Job(f"c{i}", number, derive(number, f"c{i}"), Fit(params)) for i in range(6)]
            done = one.trainer.run(jobs)
            losses.append(sum(d.metrics["loss"] for d in done) / len(done))
            for d in done:
                params = add(params, scale(sub(d.params, params), 1 / len(done)))
        ends.append((losses[0], losses[-1]))
    (before, exact), (_, low) = ends
    assert exact < 0.8 * before  # it learns
    assert low == pytest.approx(exact, rel=0.01)


def test_where_bfloat16_is_slow_the_whole_model_computes_in_float32(tiny_llama):
    model = tiny_llama(dtype=BF16).requires_grad_(False)
    fast = make_fast(model, LocalSettings(kernels="widened"))
    ids = torch.arange(6)[None]
    before = model(input_ids=ids).logits
    with fast.installed():
        wide = model(input_ids=ids).logits
    exact = tiny_llama(dtype=BF16).float()(input_ids=ids).logits
    torch.testing.assert_close(wide, exact)
    after = model(input_ids=ids).logits
    assert torch.equal(before, after)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_model_that_insists_on_its_type_has_its_products_widened_alone(bench):
    from transformers import GPT2Config, GPT2LMHeadModel

    def gpt2() -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            sizes = {"vocab_size": 64, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2}
            no_dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
            config = GPT2Config(**sizes, **no_dropout)
            return GPT2LMHeadModel(config).to(BF16).eval().requires_grad_(False)

    assert make_fast(gpt2(), LocalSettings(kernels="widened")).wide is None
    local = {"optimizer": "sgd", "lr": 0.5, "steps": 1}
    one = bench(model=gpt2(), kernels="widened", **local)
    other = bench(model=gpt2().float(), kernels="reference", batched="off", **local)
    for low, exact in zip(one.fit(["c1", "c5"]), other.fit(["c1", "c5"]), strict=True):
        assert off(flat(low.params), flat(exact.params)) < 0.03


@pytest.mark.parametrize(
    ("kernels", "dtype", "message"),
    [
        ("widened", torch.float32, "local.kernels widened needs a bfloat16 or float16 model"),
        (
            "onednn_forward",
            torch.float16,
            "local.kernels onednn_forward needs a float32 or bfloat1",
        ),
    ],
)
def test_kernels_that_a_type_cannot_have_are_refused(tiny_llama, kernels, dtype, message):
    with pytest.raises(ValueError, match=message):
        choose_kernels(LocalSettings(kernels=kernels), tiny_llama(dtype=dtype))


def test_a_slow_type_is_said_in_one_sentence(tiny_llama, monkeypatch):
    monkeypatch.setattr(kernels, "native", lambda dtype: 30.0 if dtype == BF16 else 150.0)
    low, high = (tiny_llama(dtype=kind).requires_grad_(False) for kind in (BF16, torch.float32))
    assert slow_type("widened", low) == (
        "this CPU multiplies bfloat16 5.0 times slower than float32 (30 against 150 GFLOP/s a thread): so frozen"
        " weights are widened as they are used, and model.dtype float32 is faster still"
    )
    assert slow_type("torch", low).endswith("model.dtype float32 is faster")
    assert slow_type("torch", high) == ""
    assert products_in_words("onednn", low) == "oneDNN's, bfloat16, packed for both directions"
    assert products_in_words("torch", low.requires_grad_(True)) == ""
    monkeypatch.setattr(kernels, "native", lambda dtype: 200.0 if dtype == BF16 else 100.0)
    assert slow_type("onednn", low.requires_grad_(False)) == ""


@pytest.mark.slow
@pytest.mark.realmodel
def test_smollm2_in_bfloat16_learns_as_it_does_in_float32(bench, real_model, federation_of):
    from fedloom.models.build import ModelSettings, load_base

    path: Path = real_model("smollm2.gguf")
    ends = []
    for dtype in ("float32", "bfloat16"):
        base = load_base(ModelSettings(name=str(path), dtype=dtype))
        text = (Path(__file__).parents[2] / "ARCHITECTURE.md").read_text()
        ids = torch.tensor(base.tokenizer(text).input_ids)[: 2 * 8 * 64].view(2, 8, 64)
        data = federation_of([[Example(row, row.clone(), 0) for row in rows] for rows in ids])
        tune = {"rank": 8}
        one = bench(model=base.model, data=data, tune=tune, lr=5e-4, steps=16, batch_size=1)
        ends.append([done.metrics["loss"] for done in one.fit(["c0", "c1"])])
    assert ends[1] == pytest.approx(ends[0], rel=0.01)
