"""How many positions a model has, told from its configuration."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fedloom.models.build import ModelSettings, load_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_NAMES = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_sequence_length",
    "seq_length",
    "max_target_positions",
)
_STRETCHING = ("linear", "dynamic", "yarn")
"""Scalings of rotary positions that a file may add without a word on the new limit."""
_UNLIMITED = ("bloom", "rwkv")
"""Models whose files may name a length, of their training."""
_AFTER_PADDING = (
    "camembert",
    "data2vec-text",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)
"""Models that count positions from the one after the padding token's; OPT and its kin have rows to spare for that."""


def positions_of(config: "PretrainedConfig") -> int | None:
    """Return how many tokens a row may have, or None where nothing limits it, as with ALiBi and recurrent models."""
    text = config.get_text_config(decoder=True)
    if text.model_type in _UNLIMITED or _has_alibi(text):
        return None
    known = _declared(text)
    found = [getattr(text, name, None) for name in _NAMES if name in known]
    limits = [limit for limit in found if isinstance(limit, int) and limit > 0]
    if not limits:
        return None
    # A model whose tables are of different lengths ends with the shortest.
    limit = _stretched(min(limits), getattr(text, "rope_parameters", None))
    return limit - (text.pad_token_id or 0) - 1 if text.model_type in _AFTER_PADDING else limit


def check_length(settings: ModelSettings, max_length: int, *, virtual_tokens: int = 0) -> None:
    """Refuse rows that are longer than the model has positions, with the virtual tokens before them; no weight is read.

    Raises:
        ValueError: with the most that is allowed.
    """
    check_positions(load_config(settings), settings.name, max_length, virtual_tokens=virtual_tokens)


def check_positions(
    config: "PretrainedConfig", name: str, max_length: int, *, virtual_tokens: int = 0
) -> None:
    """Refuse rows that are longer than a model so configured and called has positions, with the virtual tokens before them.

    Raises:
        ValueError: with the most that is allowed.
    """
    limit = positions_of(config)
    if limit is None or max_length + virtual_tokens <= limit:
        return
    what = f"which is how many positions model.name {name} has"
    if virtual_tokens:
        what = f"as model.name {name} has {limit} positions, of which virtual tokens take {virtual_tokens}"
    most = limit - virtual_tokens
    raise ValueError(f"data.max_length must be at most {most}, {what}, got {max_length}")


def _has_alibi(config: Any) -> bool:
    inner = getattr(config, "attn_config", None)
    return any(getattr(part, "alibi", False) is True for part in (config, inner))


def _declared(config: "PretrainedConfig") -> set[str]:
    """Return the settings of this kind of model: a file may hold strange ones, which nobody reads."""
    declared: set[str] = set(config.attribute_map)
    for kind in type(config).__mro__:
        declared |= set(vars(kind).get("__annotations__", {}))
        code = getattr(vars(kind).get("__init__"), "__code__", None)
        declared |= (
            set(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]) if code else set()
        )
    return declared


def _stretched(limit: int, rope: Any) -> int:
    """Return the limit of rotary positions that are scaled beyond those of pretraining."""
    if not isinstance(rope, Mapping):
        return limit
    parts = [part for part in rope.values() if isinstance(part, Mapping)] or [rope]
    reach = [
        int(float(part["factor"]) * (part.get("original_max_position_embeddings") or limit))
        for part in parts
        if part.get("rope_type") in _STRETCHING and part.get("factor")
    ]
    return max([limit, *reach])
