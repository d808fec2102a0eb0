"""Embedding and head, the largest tensors of a small model, are in memory once, however many clients learn around them."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fedloom.client.fast.products import PackedForward, PackedProduct
from fedloom.spaces.scaling_vectors import IA3
from fedloom.spaces.tune import Tune

ROWS, WIDTH = 67, 32
"""No other tensor has this shape: the bench's tokens end at 63, its model is as wide."""


def of_a_table(model: nn.Module) -> set[object]:
    """Return every memory that holds as many numbers in the shape of an embedding or a head, either way round."""
    found = (x for x in gc.get_objects() if type(x) in (torch.Tensor, nn.Parameter))
    tables = [x for x in found if tuple(x.shape) in {(ROWS, WIDTH), (WIDTH, ROWS)}]
    return {id(x) if x.is_mkldnn else x.untyped_storage().data_ptr() for x in tables}


def watch(model: Any, seen: list[set[object]]) -> None:
    """Look in the middle of the first two forwards."""

    def look(*_: object) -> None:
        if len(seen) < 2:
            seen.append(of_a_table(model))

    model.model.norm.register_forward_hook(look)


@pytest.fixture
def model(tiny_llama: Callable[..., Any], request: pytest.FixtureRequest) -> Any:
    """Return a model whose head is the embedding, or a tensor of its own."""
    made = tiny_llama(vocab=ROWS, hidden=WIDTH)
    if request.param == "tied":
        made.config.tie_word_embeddings = True
        made.tie_weights()
        assert made.lm_head.weight is made.model.embed_tokens.weight
    gc.collect()
    return made


@pytest.mark.parametrize("model", ["tied", "apart"], indirect=True)
@pytest.mark.parametrize("tune", [None, IA3()], ids=["lora", "ia3"])
@pytest.mark.parametrize("batched", ["auto", "off"])
def test_clients_share_one_embedding_and_one_head(
    bench: Callable[..., Any], model: Any, tune: Tune | None, batched: str
) -> None:
    known, seen = of_a_table(model), list[set[object]]()
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert len(known) == (1 if tied else 2)
    local = {"optimizer": "adamw", "lr": 0.01, "steps": 2, "batch_size": 2, "kernels": "torch"}
    one = bench(model=model, tune=tune, batched=batched, **local)
    watch(model, seen)
    assert len(one.fit(["c1", "c3", "c5"])) == 3
    assert len(seen) == 2
    assert {frozenset(each) for each in [*seen, of_a_table(model)]} == {frozenset(known)}
    weights = [model.model.embed_tokens.weight, model.lm_head.weight]
    assert {w.untyped_storage().data_ptr() for w in weights} == known


@pytest.mark.skipif(
    not torch.backends.mkldnn.is_available()
    or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"),
    reason="this torch has no packed oneDNN products",
)
@pytest.mark.parametrize("kernels", ["onednn_forward", "onednn"])
@pytest.mark.parametrize("model", ["tied", "apart"], indirect=True)
def test_packed_kernels_hold_no_copy_of_the_head_whoever_learns(
    bench: Callable[..., Any], model: Any, kernels: str
) -> None:
    known, seen = of_a_table(model), list[set[object]]()
    one = bench(model=model, lr=0.01, steps=2, batch_size=2, kernels=kernels)
    products = one.trainer.sequential.fast.products.values()
    assert sum(isinstance(p, PackedForward | PackedProduct) for p in products) == len(products) - 1
    assert one.trainer.sequential.fast.forward.times == 2, "whose product is slow at few rows"
    watch(model, seen)
    one.fit(["c1", "c3", "c5"])
    assert [each - known for each in seen] == [set()] * 2
