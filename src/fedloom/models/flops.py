"""Floating-point operations of a model, by formula from its parameters and the tokens it reads; nothing is measured."""

from typing import TYPE_CHECKING

from torch import nn

from fedloom.models.introspection import embedding
from fedloom.models.quantized import num_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def forward_flops(model: "PreTrainedModel", length: float) -> float:
    """Return the operations by which a model reads one token of a row of so many tokens.

    A multiplication and an addition for every weight, and in each layer for every earlier token's key and value (Kaplan et
    al. 2020, arXiv:2001.08361, table 1). A table of embeddings is looked up; where the head shares it, it is multiplied
    once. A mixture of experts is counted as if all of them worked.
    """
    table, head = embedding(model), model.get_output_embeddings()
    tied = isinstance(head, nn.Module) and next(head.parameters()) is next(table.parameters())
    weights = num_weights(model) - (0 if tied else num_weights(table))
    config = model.config.get_text_config()
    attention = 2 * 2 * length * config.hidden_size * config.num_hidden_layers
    return float(2 * weights + attention)


def step_flops(
    model: "PreTrainedModel",
    length: float,
    *,
    num_trained: int,
    passes: int | None = None,
) -> float:
    """Return the operations by which a model learns from one token.

    Args:
        model: What learns.
        length: Tokens of a row.
        num_trained: Weights that have a gradient.
        passes: Forward passes of a step that has no backward pass; None: one forward and one backward pass, in which the
            gradient of every activation costs another forward pass, and the gradient of a weight two operations.
    """
    forward = forward_flops(model, length)
    return forward * passes if passes else 2 * forward + 2 * num_trained
