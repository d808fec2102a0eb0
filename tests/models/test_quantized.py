"""Weights in few bits: what they stand for, that layers compute with it, and what they do not go with."""

import builtins
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedloom.core.protocols import ClientError
from fedloom.models import schemes
from fedloom.models.build import Base, ModelSettings, load_base
from fedloom.models.hf_logging import quiet
from fedloom.models.quantized import (
    QuantizedLinear,
    dequantize_,
    num_weights,
    quantize_,
    quantized_bytes,
    quantized_identity,
    scheme_of,
)
from fedloom.models.schemes import NF4, SCHEMES, Int4, bitsandbytes
from fedloom.spaces.full import Full
from fedloom.spaces.handshake import agree
from fedloom.spaces.lora import LoRA
from fedloom.spaces.scaling_vectors import IA3, VeRA
from fedloom.spaces.seed_space import Seeds
from fedloom.spaces.tune import Tune

NAMES = sorted(SCHEMES)
QUANTILES = """-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334
-0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224
0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0"""
"""NF4's sixteen numbers, QLoRA's appendix E."""


def layer(seed: int = 0, shape: tuple[int, int] = (12, 24)) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(shape[1], shape[0])


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def decoded(packed: dict[str, Tensor], shape: tuple[int, int], *, block: int = 64) -> Tensor:
    """Return what NF4 with double quantisation stands for, by the paper: two weights a byte, magnitudes in 8 bits."""
    quantiles = torch.tensor([float(number) for number in QUANTILES.split()])
    exponents = torch.linspace(-6, 0, 7)
    # Dettmers et al. 2022, arXiv:2110.02861: a sign, zeros that say the power of ten, and a fraction between 0.1 and 1.
    positive = []
    for bits, exponent in enumerate(exponents):
        edges = torch.linspace(0.1, 1, 2**bits + 1)
        positive += [10**exponent * (a + b) / 2 for a, b in itertools.pairwise(edges)]
    numbers = sorted([*map(float, positive), *(-float(x) for x in positive), 0.0, 1.0])
    fractions = torch.tensor(numbers)[packed["absmax"].long()]
    nested = packed["absmax_scale"].repeat_interleave(256)[: len(fractions)]
    magnitudes = fractions * nested + packed["absmax_mean"]
    levels = packed["weight"].flatten()
    flat = quantiles[torch.stack([levels >> 4, levels & 15], 1).flatten().long()]
    flat = flat[: shape[0] * shape[1]]
    return (flat * magnitudes.repeat_interleave(block)[: len(flat)]).view(shape)


@pytest.mark.parametrize("shape", [(12, 24), (96, 256), (7, 33)], ids=str)
def test_nf4_is_what_the_paper_says(shape: tuple[int, int]) -> None:
    weight = 0.02 * noise(*shape)
    packed = NF4().pack(weight)
    found = NF4().unpack(packed, shape, torch.float32)
    torch.testing.assert_close(found, decoded(packed, shape), rtol=0, atol=1e-6)
    rounded = float((found - weight).norm() / weight.norm())
    assert 0.07 < rounded < 0.11  # 0.093 of normal weights


def test_nf4_has_the_bits_that_transformers_loads() -> None:
    import bitsandbytes as bnb

    plain, small = layer(shape=(64, 128)), QuantizedLinear(layer(shape=(64, 128)), NF4())
    theirs = bnb.nn.Linear4bit(128, 64, quant_type="nf4", compress_statistics=True)
    theirs.load_state_dict(plain.state_dict())
    theirs = theirs.to("cpu")
    state = theirs.weight.quant_state
    assert torch.equal(small.weight.flatten(), theirs.weight.flatten())
    assert torch.equal(small.packed["absmax"], state.absmax)
    x = noise(5, 128)
    torch.testing.assert_close(small(x), theirs(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_is_kept_to_half_a_level_of_its_block(name: str) -> None:
    plain = layer()
    with torch.no_grad():
        plain.weight[3] = 0
    small = QuantizedLinear(plain, SCHEMES[name])
    weight = plain.weight.detach()
    gap = (small.whole() - weight).abs()
    if name == "int8":
        assert bool((gap <= weight.abs().amax(1, keepdim=True) / 127 / 2 * 1.001).all())
    else:  # the widest step of NF4 is 0.3 magnitudes, of int4 a seventh
        step = 0.153 if name == "nf4" else 1 / 14
        flat = torch.nn.functional.pad(weight.flatten(), (0, 32)).view(-1, 64).abs().amax(1)
        most = flat.repeat_interleave(64)[: weight.numel()].view(weight.shape)
        assert bool((gap <= step * 1.02 * most + 1e-6).all())
    assert not bool(small.whole()[3].any())
    x = noise(5, 24)
    torch.testing.assert_close(small(x), x @ small.whole().T + plain.bias)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_gradients_pass_through_to_the_input(name: str, dtype: torch.dtype) -> None:
    small = QuantizedLinear(layer(), SCHEMES[name])
    small.bias = None  # type: ignore[assignment]  # torch's own says Tensor
    x = noise(5, 24).to(dtype).requires_grad_()
    small(x).square().sum().backward()
    other = x.detach().clone().requires_grad_()
    (other @ small.unpacked(dtype).T).square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad)


@pytest.mark.parametrize("name", NAMES)
def test_an_update_beside_the_weight_is_part_of_it(name: str) -> None:
    small = QuantizedLinear(layer(), SCHEMES[name])
    small.side = noise(12, 2), noise(24, 2)
    small.gain = 0.5
    x = noise(5, 24)
    torch.testing.assert_close(small(x), x @ small.whole().T + small.bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "bits"), [("nf4", 4.13), ("int4", 4.5), ("int8", 8.13)])
def test_weights_take_the_bits_that_are_promised(name: str, bits: float) -> None:
    small = QuantizedLinear(layer(shape=(256, 256)), SCHEMES[name])
    weights, held = quantized_bytes(nn.Sequential(small))
    assert weights == 2**16
    assert 8 * held / weights == pytest.approx(bits, abs=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_the_head_stays_and_lora_has_the_gradient_of_its_unpacked_twin(
    tiny_llama: Callable[..., Any], name: str
) -> None:
    model, twin = (tiny_llama().requires_grad_(False) for _ in range(2))
    plain = model(input_ids=torch.arange(8)[None]).logits
    for one in (model, twin):
        quantize_(one, SCHEMES[name])
    assert num_weights(model) == num_weights(tiny_llama())
    dequantize_(twin, torch.float32)
    assert (scheme_of(model), scheme_of(twin)) == (SCHEMES[name], None)
    assert type(model.lm_head) is nn.Linear
    close = model(input_ids=torch.arange(8)[None]).logits
    assert float((close - plain).norm() / plain.norm()) < {"int8": 0.02}.get(name, 0.3)
    gradients = []
    for one in (model, twin):
        space: Any = LoRA().make_space(Base(one, None, "random"), seed=0)
        gradient = space.gradient_vector()
        one(input_ids=torch.arange(8)[None]).logits.square().sum().backward()
        gradients.append(gradient)
    assert bool(gradients[0].any())
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("tune", "message"),
    [
        (Full(), "model.quantize must be none where tune is full, .*, got {}"),
        (LoRA(dora=True), "model.quantize must be none where tune.lora.dora is true, .*, got {}"),
        (LoRA(init="pissa"), "pissa .* needs model.dtype float32 and model.quantize none"),
        (
            Seeds(distribution="gaussian"),
            "tune.seeds.distribution must be auto or lowrank where .* is {}, got gaussian",
        ),
    ],
    ids=["full", "dora", "pissa", "seeds"],
)
def test_spaces_that_change_the_weights_themselves_are_refused(
    tiny_llama: Callable[..., Any], name: str, tune: Tune, message: str
) -> None:
    model = tiny_llama().requires_grad_(False)
    quantize_(model, SCHEMES[name])
    with pytest.raises(ValueError, match=message.format(name)):
        tune.make_space(Base(model, None, "random"), seed=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_asks_for_it(tiny_folder: Path, name: str) -> None:
    base = load_base(ModelSettings(str(tiny_folder), device="cpu", quantize=name))  # type: ignore[arg-type]
    assert scheme_of(base.model) == SCHEMES[name]
    assert f" M weights in {name}, " in base.described()


def test_only_schemes_are_one() -> None:
    with pytest.raises(ValueError, match=r"model.quantize must be none, nf4, int8, int4, got fp4"):
        ModelSettings(quantize="fp4")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (NF4(block=128), r"weights in few bits \(model.quantize\): .* nf4/64 double, .* nf4/128"),
        (NF4(double=False), r"\(model.quantize\): here nf4/64 double, there nf4/64"),
        (Int4(), r"\(model.quantize\): here nf4/64 double, there int4/64"),
        (None, r"\(model.quantize\): here nf4/64 double, there none"),
    ],
    ids=["block", "single", "int4", "plain"],
)
def test_sides_that_hold_weights_otherwise_are_refused(
    tiny_llama: Callable[..., Any], other: Any, says: str
) -> None:
    ours, theirs = (tiny_llama().requires_grad_(False) for _ in range(2))
    quantize_(ours, NF4())
    if other:
        quantize_(theirs, other)
    here, there = quantized_identity(ours), quantized_identity(theirs)
    with pytest.raises(ClientError, match=says):
        agree(here, there)
    same = tiny_llama().requires_grad_(False)
    quantize_(same, NF4())
    agree(here, quantized_identity(same))
    with pytest.raises(ClientError, match=r"weights in few bits .* there fp4/64"):
        agree(here, {**here, "quantize": "fp4/64 double"})
    with pytest.raises(ClientError, match="version of bitsandbytes"):
        agree(here, {**here, "bitsandbytes": "0.1"})
    # One bit of one weight.
    next(m for m in same.modules() if isinstance(m, QuantizedLinear)).weight[0, 0] ^= 1
    with pytest.raises(ClientError, match="bits of the quantised weights"):
        agree(here, quantized_identity(same))


def test_without_the_package_a_sentence_says_what_to_install(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("bitsandbytes"):
            raise ImportError(name)
        return whole(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    schemes.bitsandbytes.cache_clear()
    try:
        with pytest.raises(ValueError, match=r"nf4 needs the package bitsandbytes: .*\[quant\]"):
            load_base(ModelSettings(str(tiny_folder), device="cpu", quantize="nf4"))
    finally:
        monkeypatch.undo()
        schemes.bitsandbytes.cache_clear()
    assert bitsandbytes()


def test_a_model_without_plain_linear_layers_is_refused(tiny_folder: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    from fedloom.models.loaded import base_from

    base = load_base(ModelSettings(str(tiny_folder), device="cpu"))
    config = GPT2Config(
        vocab_size=len(base.tokenizer), n_positions=32, n_embd=16, n_layer=1, n_head=2
    )
    loaded = GPT2LMHeadModel(config), base.tokenizer
    with pytest.raises(ValueError, match=r"must be none for this model \(GPT2LMHeadModel\)"):
        base_from(loaded, ModelSettings("given", quantize="int4"))


def test_weights_that_are_quantised_already_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    import json
    import shutil

    folder = Path(shutil.copytree(tiny_folder, tmp_path / "quantised"))
    text = json.loads((folder / "config.json").read_text())
    text["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(text))
    with pytest.raises(ValueError, match="weights that bitsandbytes has quantised"):
        load_base(ModelSettings(str(folder), device="cpu", quantize="nf4"))


def test_schemes_are_values() -> None:
    assert replace(NF4(), block=128) != NF4()
    assert all(len(str(scheme)) <= 16 for scheme in SCHEMES.values())


def moved(base: Base, tune: Tune, far: float = 0.05) -> tuple[Any, Any]:
    """Return a space that stands away from its start, and where."""
    space: Any = tune.make_space(base, seed=0)
    there = {name: t + far * noise(*t.shape) for name, t in space.start().items()}
    space.load(there)
    return space, there


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=torch.arange(3, 19)[None], use_cache=False).logits
    return found


@pytest.mark.parametrize("tune", [LoRA(rank=4), IA3(), VeRA(rank=8)], ids=["lora", "ia3", "vera"])
@pytest.mark.parametrize("name", NAMES)
def test_a_merged_model_answers_as_the_adapter_on_weights_in_few_bits(
    tiny_folder: Path, tmp_path: Path, name: str, tune: Tune
) -> None:
    from transformers import AutoModelForCausalLM

    base = load_base(ModelSettings(str(tiny_folder), device="cpu", quantize=name))  # type: ignore[arg-type]
    space, there = moved(base, tune)
    space.save_merged(tmp_path / "merged", there)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(merged), logits_of(base.model), rtol=1e-4, atol=1e-4)
    assert scheme_of(base.model) == SCHEMES[name]
    # Merged into the model that was not rounded, the adapter is another model.
    whole, _ = moved(load_base(ModelSettings(str(tiny_folder), device="cpu")), tune)
    assert float((logits_of(merged) - logits_of(whole.model)).abs().max()) > 1e-3


def test_a_model_quantised_again_is_one_that_transformers_loads_and_says_what_that_has_moved(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    # Where a CPU multiplies bfloat16, bitsandbytes packs rows of 64 and more only.
    wide = tmp_path / "wide"
    tiny_llama(hidden=64, vocab=len(tiny_tokenizer)).save_pretrained(wide)
    tiny_tokenizer.save_pretrained(wide)
    base = load_base(ModelSettings(str(wide), device="cpu", quantize="nf4"))
    space, there = moved(base, LoRA(rank=4), 0.003)
    drift = space.save_requantized(tmp_path / "again", there)
    assert 0.01 < drift.weights < 0.12
    assert 0 < drift.learnt < 0.3
    assert str(drift).startswith("rounding again moves the weights by ")
    with quiet():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", device_map="cpu")
    assert type(again.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    merged = logits_of(base.model)
    far = (logits_of(again) - merged).norm() / merged.norm()
    assert 0 < float(far) < 3 * drift.logits + 0.01
    with pytest.raises(ValueError, match="weights that bitsandbytes has quantised"):
        load_base(ModelSettings(str(tmp_path / "again"), device="cpu"))
    int8 = load_base(ModelSettings(str(wide), device="cpu", quantize="int8"))
    other, there = moved(int8, LoRA())
    with pytest.raises(ValueError, match=r"must be nf4 for a model .* again, got int8"):
        other.save_requantized(tmp_path / "never", there)
