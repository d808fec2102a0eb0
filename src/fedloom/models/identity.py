"""What a model is besides its weights: its tokenizer, its chat template, its configuration, each by a hash."""

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fedloom.models.build import Base

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_STATE = ("padding", "truncation")
"""What a tokenizer's JSON says of the last call instead of the tokenizer."""
_ELSEWHERE = (
    "_name_or_path",
    "_commit_hash",
    "transformers_version",
    "architectures",
    "auto_map",
    "dtype",
    "torch_dtype",
    "_attn_implementation",
    "_attn_implementation_autoset",
    "attn_implementation",
    "experts_implementation",
    "_experts_implementation",
    "use_cache",
)
"""Of a configuration: where a model came from, who wrote it and how it is held, which the recipe says itself."""


def identity(base: Base) -> dict[str, str]:
    """Return the SHA-256 of the tokenizer with its special tokens, of the chat template and of the configuration."""
    template = getattr(base.tokenizer, "chat_template", None)
    config = _plain(base.model.config.to_diff_dict())
    return {
        "tokenizer": _sha256(_tokenizer(base.tokenizer)),
        "template": _sha256(template),
        "config": _sha256(config),
    }


def commit(base: Base) -> str | None:
    """Return the commit that the Hub gave; None for a folder and a built-in model."""
    found = getattr(base.model.config, "_commit_hash", None)
    return found if isinstance(found, str) else None


def _tokenizer(tokenizer: "PreTrainedTokenizerBase") -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    lasting = {key: value for key, value in content.items() if backend is None or key not in _STATE}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return {"backend": lasting, "special": special}


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _plain(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in _ELSEWHERE
    }


def _sha256(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
