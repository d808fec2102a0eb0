"""What can be wrong with the files of a model, in one sentence each: its libraries say it in many ways."""

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedloom.models.hf_logging import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ADAPTER = "adapter_config.json"
_JSON = ("config.json", "tokenizer_config.json")


@contextmanager
def found(otherwise: str) -> Iterator[None]:
    """Turn whatever a library raises into a ValueError: a sentence of ours, and its own reason."""
    try:
        with quiet():
            yield
    except MemoryError:
        raise
    except Exception as error:  # what broken files make of a library's code has no class in common
        if "memory" in str(error).lower() and isinstance(error, RuntimeError):
            raise
        message = " ".join(str(error).split()).split(". ")[0][:300]
        kind = "" if isinstance(error, OSError | ValueError | ImportError) else type(error).__name__
        reason = ": ".join(part for part in (kind, message) if part)
        raise ValueError(f"{otherwise}: {reason or type(error).__name__}") from error


def check_folder(folder: Path, name: str) -> None:
    """Refuse a folder whose files do not make a model.

    Raises:
        ValueError: where it holds an adapter, a file is broken, or a part of the weights is missing.
    """
    if (folder / _ADAPTER).is_file():
        base = _object(folder / _ADAPTER, name).get("base_model_name_or_path")
        raise ValueError(
            f"model.name must be a model, but {name} holds an adapter ({_ADAPTER}); give its base model"
            f" ({base}), or merge the adapter into it first"
        )
    if not (folder / "config.json").is_file():
        raise ValueError(f"model.name must be a folder with a config.json or a Hub id, got {name}")
    for file in (*_JSON, *(index.name for index in sorted(folder.glob("*.index.json")))):
        if (folder / file).is_file():
            content = _object(folder / file, name)
            if file.endswith(".index.json"):
                _check_shards(folder, file, content, name)
    # A shard has a suffix that whole files do not have; without an index nobody knows what is in which.
    shards = sorted(path.name for path in folder.glob("*-of-*.safetensors"))
    whole = (folder / "model.safetensors").is_file() or any(folder.glob("*.index.json"))
    if shards and not whole:
        raise ValueError(
            f"model.name {name} holds {_some(shards)} without the model.safetensors.index.json that says what is in"
            " which; copy the model again"
        )


def check_loaded(model: "PreTrainedModel", loading: Any, name: str) -> None:
    """Refuse a model some of whose weights came from no file: they would be random numbers.

    Args:
        model: as it was loaded.
        loading: what transformers says of that.
        name: as the recipe gives it.

    Raises:
        ValueError: with the first of those weights.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(f"model.name must be a model, but {name} holds an adapter ({_ADAPTER})")
    if shapes := sorted(loading["mismatched_keys"]):
        tensor, has, asks = shapes[0]
        raise ValueError(
            f"model.name {name}: its weights are not those of its config.json, which asks for {tensor} of shape"
            f" {tuple(asks)}, got {tuple(has)}"
        )
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(
            f"model.name {name}: {_some(missing)} of {len(model.state_dict())} tensors are in none of its files and"
            f" would be random; give a whole checkpoint of a {type(model).__name__}"
        )


def check_plain(config: Any, name: str) -> None:
    """Refuse weights that come in few bits already, whose layers are another library's.

    Raises:
        ValueError: saying what to give instead.
    """
    held = getattr(config, "quantization_config", None) or {}
    how = held if isinstance(held, dict) else vars(held)
    if str(how.get("quant_method", "")).endswith("bitsandbytes"):
        raise ValueError(
            f"model.name {name} holds weights that bitsandbytes has quantised; give the model that was made from, and"
            " model.quantize nf4 or int8"
        )


def check_tokenizer(tokenizer: "PreTrainedTokenizerBase", name: str) -> None:
    """Refuse a tokenizer made of nothing, as transformers makes where the files are missing.

    Raises:
        ValueError: where it knows special tokens only.
    """
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise ValueError(
            f"model.name {name} has no tokenizer: save one beside its weights, with tokenizer.save_pretrained"
        )


def _check_shards(folder: Path, index: str, content: dict[str, Any], name: str) -> None:
    files = content.get("weight_map")
    if not isinstance(files, dict):
        raise ValueError(f"model.name {name}: its {index} has no weight_map; copy the model again")
    missing = sorted({str(file) for file in files.values() if not (folder / str(file)).is_file()})
    if missing:
        raise ValueError(
            f"model.name {name} lacks {_some(missing)}, which its {index} names; copy the model again"
        )


def _object(file: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"model.name {name}: its {file.name} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"model.name {name}: its {file.name} must hold a JSON object, got {type(content).__name__}"
        )
    return content


def _some(names: Collection[str]) -> str:
    first, *others = names
    return f"{first} and {len(others)} more" if others else first
