from typing import cast

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from fedloom.client.fast import products
from fedloom.client.fast.functions import frozen_linear, lora_linear
from fedloom.client.fast.kernels import choose_kernels, make_fast
from fedloom.client.fast.products import (
    Kind,
    PackedProduct,
    Rate,
    TorchProduct,
    UnpackedProduct,
    fastest,
    rates,
)
from fedloom.client.local_settings import LocalSettings
from fedloom.evaluation.scoring import evaluating
from fedloom.models.build import Base
from fedloom.objectives.head import fused_cross_entropy
from fedloom.spaces.lora import LoRA

HAS_PACKED = torch.backends.mkldnn.is_available() and hasattr(
    torch.ops.mkldnn, "_reorder_linear_weight"
)
needs_packed = pytest.mark.skipif(not HAS_PACKED, reason="this torch has no packed oneDNN products")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_a_frozen_product_has_the_derivative_of_a_linear_layer():
    x, weight = normal(2, 3, 5).requires_grad_(), normal(4, 5, seed=1)
    assert torch.autograd.gradcheck(lambda x: frozen_linear(x, TorchProduct(weight)), (x,))


@pytest.mark.parametrize("lanes", [1, 3])
def test_lora_lanes_have_the_derivatives_of_their_definition(lanes):
    x = normal(6, 2, 5).requires_grad_()
    a, b = (
        normal(lanes, 2, 5, seed=1).requires_grad_(),
        normal(lanes, 4, 2, seed=2).requires_grad_(),
    )
    weight = normal(4, 5, seed=3)

    def product(x, a, b):
        return lora_linear(x, TorchProduct(weight), a, b, 0.7)

    assert torch.autograd.gradcheck(product, (x, a, b))
    lane_rows = x.reshape(lanes, -1, 5)
    expected = x @ weight.t() + 0.7 * (lane_rows @ a.mT @ b.mT).reshape(6, 2, 4)
    torch.testing.assert_close(product(x, a, b), expected)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("count", [0, 1, 130])
def test_the_fused_loss_is_cross_entropy(biased, count):
    x = normal(count, 5).requires_grad_()
    weight, bias = normal(11, 5, seed=1), normal(11, seed=2) if biased else None
    targets = torch.randint(0, 11, (count,), generator=torch.Generator().manual_seed(3))
    weights = normal(count, seed=4)
    ours = fused_cross_entropy(x, TorchProduct(weight), bias, targets)
    (gradient,) = torch.autograd.grad((ours * weights).sum(), x)
    theirs = functional.cross_entropy(functional.linear(x, weight, bias), targets, reduction="none")
    (expected,) = torch.autograd.grad((theirs * weights).sum(), x)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


def test_the_fused_loss_takes_more_rows_at_once_where_it_is_told_to():
    rows = list[int]()

    class Counted(TorchProduct):
        def forward(self, x):
            rows.append(len(x))
            return super().forward(x)

    x, weight, targets = normal(130, 5), normal(11, 5, seed=1), torch.zeros(130, dtype=torch.int64)
    found = [
        fused_cross_entropy(x, Counted(weight), None, targets, times=times) for times in (1, 2)
    ]
    assert rows == [64, 64, 2, 128, 2]
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)


def test_the_fused_loss_survives_logits_that_overflow_exp():
    x = torch.tensor([[300.0, -300.0]], requires_grad=True)
    for target in (0, 1):
        loss = fused_cross_entropy(x, TorchProduct(torch.eye(2)), None, torch.tensor([target]))
        assert float(loss.detach()) == 600.0 * target


@needs_packed
@pytest.mark.parametrize("made", [PackedProduct, UnpackedProduct])
def test_packed_products_are_products(made):
    weight, x = normal(48, 40, dtype=torch.float32), normal(7, 9, 40, seed=1, dtype=torch.float32)
    plain, packed = TorchProduct(weight), made(weight)
    torch.testing.assert_close(packed.forward(x), plain.forward(x))
    g = normal(7, 9, 48, seed=2, dtype=torch.float32)
    torch.testing.assert_close(packed.backward(g), plain.backward(g))


@needs_packed
@pytest.mark.parametrize("batched", ["auto", "off"])
def test_packed_training_is_the_reference_up_to_rounding(bench, tiny_llama, distance, batched):
    local = {"optimizer": "sgd", "lr": 0.5}
    fast = bench(model=tiny_llama(), kernels="onednn", batched=batched, **local)
    slow = bench(model=tiny_llama(), kernels="reference", batched="off", **local)
    for one, other in zip(fast.fit(["c1", "c5"]), slow.fit(["c1", "c5"]), strict=True):
        assert distance(one.params, other.params) < 1e-5
        assert max(float(t.abs().max()) for t in one.params.values()) > 1e-3


@needs_packed
def test_packed_products_are_in_place_only_while_work_runs(tiny_llama):
    model = tiny_llama().requires_grad_(False)
    fast = make_fast(model, LocalSettings(kernels="onednn"))
    ids = torch.arange(6)[None]
    plain = model(input_ids=ids).logits
    with fast.installed():
        assert "forward" in vars(model.lm_head)
        torch.testing.assert_close(model(input_ids=ids).logits, plain)
    assert "forward" not in vars(model.lm_head)
    assert torch.equal(model(input_ids=ids).logits, plain)


def test_the_first_token_of_many_answers_is_one_product_with_the_head(tiny_llama):
    """Torch makes a product a row of the last states, which are a view, and reads the head once for each."""
    model = tiny_llama().requires_grad_(False)
    head, ids = model.lm_head.weight.shape[0], torch.arange(12).view(3, 4)
    fast = make_fast(model, LocalSettings(kernels="torch"))

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape[-1] == head:
                names.append(func.overloadpacket.__name__)
            return out

    names: list[str] = []
    with evaluating(model), fast.evaluating(), Products():
        logits = model(input_ids=ids, logits_to_keep=1).logits
    assert "mm" in names
    assert "bmm" not in names
    torch.testing.assert_close(logits, model(input_ids=ids).logits[:, -1:])
    assert "forward" not in vars(model.lm_head)


def test_onednn_cannot_be_had_for_other_types(tiny_llama):
    local = LocalSettings(kernels="onednn")
    with pytest.raises(ValueError, match=r"local.kernels onednn needs .* got float64 on cpu"):
        choose_kernels(local, tiny_llama(dtype=torch.float64))


def timed(monkeypatch, **gflops):
    """Let these be what was measured, of any type."""
    found = tuple(Rate(cast(Kind, kind), rate) for kind, rate in gflops.items())
    monkeypatch.setattr(products, "rates", lambda dtype: found)
    monkeypatch.setattr(products, "_cpu_info", lambda: "GenuineIntel")


def test_auto_takes_packed_products_where_they_are_faster(tiny_llama, monkeypatch):
    for packed, chosen in ((150.0, "onednn"), (105.0, "torch")):
        timed(monkeypatch, torch=100.0, onednn_forward=100.0, onednn=packed)
        assert choose_kernels(LocalSettings(), tiny_llama().requires_grad_(False)) == chosen
        low = tiny_llama(dtype=torch.bfloat16).requires_grad_(False)
        assert choose_kernels(LocalSettings(), low) == chosen
        assert choose_kernels(LocalSettings(), tiny_llama().requires_grad_(True)) == "torch"
        assert choose_kernels(LocalSettings(), tiny_llama(dtype=torch.float64)) == "torch"
        assert choose_kernels(LocalSettings(precision="bfloat16"), tiny_llama()) == "torch"


@pytest.mark.parametrize(
    ("gflops", "chosen"),
    [
        ({"torch": 30, "widened": 110, "onednn_forward": 30, "onednn": 31}, "widened"),
        ({"torch": 150, "widened": 80, "onednn_forward": 200, "onednn": 210}, "onednn_forward"),
        ({"torch": 150, "widened": 80, "onednn_forward": 160, "onednn": 210}, "onednn"),
        ({"torch": 200, "widened": 80, "onednn_forward": 205, "onednn": 210}, "torch"),
    ],
)
def test_the_fastest_way_wins_and_among_equals_the_one_of_the_least_memory(
    monkeypatch, gflops, chosen
):
    timed(monkeypatch, **gflops)
    assert fastest(torch.bfloat16, copies=2) == chosen


def test_auto_does_not_pack_a_model_of_gigabytes(tiny_llama, monkeypatch):
    timed(monkeypatch, torch=100.0, onednn_forward=140.0, onednn=200.0)
    model = tiny_llama().requires_grad_(False)
    room = sum(layer.weight.nbytes for layer in make_fast(model, LocalSettings()).layers)
    for copies, chosen in ((2, "onednn"), (1, "onednn_forward"), (0.5, "torch")):
        monkeypatch.setattr("fedloom.client.fast.kernels.PACKED_BYTES", int(copies * room))
        assert choose_kernels(LocalSettings(), model) == chosen


@needs_packed
def test_packed_float32_is_not_left_to_a_clock_on_amd(monkeypatch):
    timed(monkeypatch, torch=100.0, onednn_forward=101.0, onednn=102.0)
    monkeypatch.setattr(products, "_cpu_info", lambda: "AuthenticAMD")
    assert fastest(torch.float32, copies=2) == "onednn"
    assert fastest(torch.bfloat16, copies=2) == "torch"


@needs_packed
@pytest.mark.parametrize("flag", ["avx512_bf16", "amx_bf16"])
def test_packed_bfloat16_is_not_left_to_a_clock_where_the_cpu_has_instructions_for_it(
    monkeypatch, flag
):
    timed(monkeypatch, torch=100.0, onednn_forward=101.0, onednn=102.0)
    monkeypatch.setattr(products, "_cpu_info", lambda: f"flags: avx512f {flag} amx_tile")
    assert fastest(torch.bfloat16, copies=2) == "onednn"
    assert fastest(torch.float32, copies=2) == "torch"


def test_rates_are_medians_on_one_thread(monkeypatch):
    rates.cache_clear()
    threads, seen = torch.get_num_threads(), []

    def seconds(product, x, gradient):
        seen.append(torch.get_num_threads())
        return 2.0 if type(product) is TorchProduct else 1.0 + 50 * (len(seen) < 9)

    monkeypatch.setattr(products, "_seconds", seconds)
    try:
        slow, *others = rates(torch.float32)
        assert slow.kind == "torch"
        assert [other.gflops / slow.gflops for other in others] == [2.0] * len(others)
        assert (set(seen), torch.get_num_threads()) == ({1}, threads)
    finally:
        rates.cache_clear()


@pytest.mark.parametrize("trouble", ["absent", "wrong"])
def test_packed_products_that_do_not_work_are_not_used(monkeypatch, trouble):
    class Broken(TorchProduct):
        def __init__(self, weight):
            if trouble == "absent":
                raise AttributeError("_reorder_linear_weight")
            super().__init__(weight + 1)

    rates.cache_clear()
    broken = {"torch": TorchProduct, "onednn_forward": Broken, "onednn": Broken}
    monkeypatch.setattr(products, "PRODUCTS", broken)
    try:
        assert [rate.kind for rate in rates(torch.float32)] == ["torch"]
    finally:
        rates.cache_clear()


def test_the_loss_looks_at_targets_only_where_the_model_allows_it(tiny_llama):
    model = tiny_llama().requires_grad_(False)
    assert make_fast(model, LocalSettings()).forward.parts is not None
    assert make_fast(model, LocalSettings(kernels="reference")).forward.parts is None


def test_a_model_that_caps_its_logits_falls_back_to_its_own_forward(bench, distance):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    def capped():
        config = Gemma2Config(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            vocab_size=64,
            final_logit_softcapping=0.5,
            pad_token_id=0,
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return Gemma2ForCausalLM(config).double().eval().requires_grad_(False)

    assert make_fast(capped(), LocalSettings()).forward.parts is None
    local = {"optimizer": "sgd", "lr": 0.5}
    alone = bench(model=capped(), batched="off", kernels="reference", **local).fit(["c1", "c2"])
    together = bench(model=capped(), **local).fit(["c1", "c2"])
    for one, other in zip(alone, together, strict=True):
        assert distance(one.params, other.params) < 1e-6  # its attention computes in float32


@pytest.mark.parametrize("kernels", ["torch", pytest.param("onednn", marks=needs_packed)])
def test_an_evaluation_adds_adapters_in_place_and_leaves_no_trace(tiny_llama, kernels):
    space = LoRA(rank=4).make_space(
        Base(tiny_llama().requires_grad_(False), None, "random"), seed=1
    )
    model, ids = space.model, torch.arange(3, 21).view(2, 9)
    space.values.copy_(normal(len(space.values), dtype=torch.float32).mul_(0.1))
    fast = make_fast(model, LocalSettings(kernels=kernels))

    def logits():
        with torch.no_grad():
            return model(input_ids=ids).logits

    plain = logits()
    with fast.evaluating():
        inside = logits()
        space.values.mul_(2)  # another client's adapter
        moved = logits()
    assert len(fast.adapted) == 14
    torch.testing.assert_close(inside, plain, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(moved, plain, atol=1e-2)
    torch.testing.assert_close(moved, logits(), rtol=1e-4, atol=1e-5)
    assert all("forward" not in vars(module) for module in model.modules())
    assert not make_fast(model, LocalSettings(kernels="reference")).adapted
