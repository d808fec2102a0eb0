from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fedloom.models.build import Base, ModelSettings, load_base
from fedloom.models.int8 import Int8Linear, is_quantized, quantize_
from fedloom.spaces.full import Full
from fedloom.spaces.lora import LoRA
from fedloom.spaces.seed_space import Seeds
from fedloom.spaces.tune import Tune


def layer(seed: int = 0) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(24, 12)


def test_a_weight_is_kept_to_half_a_level_of_its_row() -> None:
    plain = layer()
    with torch.no_grad():
        plain.weight[3] = 0
    small = Int8Linear(plain)
    gap = (small.whole() - plain.weight).abs()
    assert bool((gap <= plain.weight.abs().amax(1, keepdim=True) / 127 / 2 * 1.001).all())
    assert small.weight.dtype == torch.int8
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(small(x), x @ small.whole().T + plain.bias)


def test_gradients_pass_through_to_the_input() -> None:
    small = Int8Linear(layer())
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(1), requires_grad=True)
    small(x).square().sum().backward()
    other = x.detach().clone().requires_grad_()
    (other @ small.whole().T + small.bias).square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad)


def test_an_update_beside_the_weight_is_part_of_it() -> None:
    small = Int8Linear(layer())
    draw = torch.Generator().manual_seed(1)
    small.side = torch.randn(12, 2, generator=draw), torch.randn(24, 2, generator=draw)
    x = torch.randn(5, 24, generator=draw)
    torch.testing.assert_close(small(x), x @ small.whole().T + small.bias, rtol=1e-4, atol=1e-4)


def test_the_head_stays_and_lora_trains_on_top(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama().requires_grad_(False)
    plain = model(input_ids=torch.arange(8)[None]).logits
    quantize_(model)
    assert is_quantized(model)
    assert type(model.lm_head) is nn.Linear
    close = model(input_ids=torch.arange(8)[None]).logits
    assert float((close - plain).norm() / plain.norm()) < 0.02
    space: Any = LoRA().make_space(Base(model, None, "random"), seed=0)
    gradient = space.gradient_vector()
    model(input_ids=torch.arange(8)[None]).logits.square().sum().backward()
    assert bool(gradient.any())
    with pytest.raises(
        ValueError, match=r"model.quantize must be none for a merged model, got int8"
    ):
        space.save_merged("nowhere", space.start())


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        (Full(), r"model.quantize must be none where tune is full, .*, got int8"),
        (LoRA(dora=True), r"tune.lora.dora must be false where model.quantize is int8"),
        (
            Seeds(distribution="gaussian"),
            r"tune.seeds.distribution must be auto or lowrank where .* is int8, got gaussian",
        ),
    ],
    ids=["full", "dora", "seeds"],
)
def test_spaces_that_change_the_weights_themselves_are_refused(
    tiny_llama: Callable[..., Any], tune: Tune, message: str
) -> None:
    model = tiny_llama().requires_grad_(False)
    quantize_(model)
    with pytest.raises(ValueError, match=message):
        tune.make_space(Base(model, None, "random"), seed=0)


def test_a_recipe_asks_for_it(tiny_folder: Any) -> None:
    base = load_base(ModelSettings(str(tiny_folder), device="cpu", quantize="int8"))
    assert is_quantized(base.model)
    with pytest.raises(ValueError, match=r"model.quantize must be none or int8, got int4"):
        ModelSettings(quantize="int4")  # type: ignore[arg-type]
