"""A model and a tokenizer that a program has loaded itself, as the base of a run."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fedloom.models.build import Base, ModelSettings, freeze_, pad_
from fedloom.models.found import check_tokenizer
from fedloom.models.generation import settle_

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def base_from(loaded: object, settings: ModelSettings) -> Base:
    """Return the base of a model and a tokenizer; both become the base's own.

    Of `settings`, the name, quantize and gradient_checkpointing count: the model stays on its device and in its type.

    Raises:
        ValueError: where they are no causal model and its tokenizer, or the model holds an adapter.
    """
    model, tokenizer = check_loaded_pair(loaded)
    name = type(model).__name__
    check_tokenizer(tokenizer, name)
    pad_(tokenizer, name)
    settle_(model, getattr(getattr(model, "generation_config", None), "eos_token_id", None))
    return freeze_(
        model, tokenizer, settings, loaded_from((model, tokenizer)) or settings.name, model.device
    )


def check_loaded_pair(loaded: object) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Return a model and a tokenizer, where they are that.

    Raises:
        ValueError: saying what they are instead.
    """
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    parts: Sequence[Any] = loaded if isinstance(loaded, tuple | list) else ()
    if (
        len(parts) != 2
        or not isinstance(parts[0], PreTrainedModel)
        or not isinstance(parts[1], PreTrainedTokenizerBase)
    ):
        kinds = ", ".join(type(part).__name__ for part in parts)
        given = f"({kinds})" if parts else type(loaded).__name__
        raise ValueError(
            "model must be a pair (model, tokenizer) of a transformers model and its tokenizer, or a function without"
            f" arguments that makes one, got {given}"
        )
    model, tokenizer = parts
    if getattr(model, "peft_config", None) or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"model must be without adapters, got a {type(model).__name__} that holds one: merge it in or unload it"
            " first"
        )
    return model, tokenizer


def loaded_from(loaded: Sequence[Any]) -> str:
    """Return the folder or the Hub id that a model was loaded from; empty where it was made."""
    return str(getattr(loaded[0], "name_or_path", "") or "")
