"""Greedy answers whatever a model's files say: of its generation settings only the end tokens are its own."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

FILE = "generation_config.json"
PLAIN = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}
"""Of a model's configuration: what its outputs look like, which training and evaluation rely on."""


def fresh() -> "GenerationConfig":
    """Return settings of generation that nobody has touched; a model loaded with them reads no file of its own."""
    from transformers import GenerationConfig

    return GenerationConfig()


def settle_(model: "PreTrainedModel", ends: object) -> None:
    """Give every part of a loaded model plain outputs, and the model no settings but its own end tokens.

    Args:
        model: Changed in place.
        ends: A token or several; where they are none of its tokens, those of its configuration.
    """
    for module in model.modules():
        config = getattr(module, "config", None)
        for name, value in PLAIN.items():
            if hasattr(config, name) and getattr(config, name) is not value:
                setattr(config, name, value)
    model.config.is_encoder_decoder = False  # it answers as a decoder
    if model.can_generate():
        model.generation_config = fresh()
        model.generation_config.eos_token_id = _ends(model, ends) or None


def ends_in_file(place: str, revision: str | None) -> object:
    """Return the end tokens that a model's generation_config.json names, None where it names none."""
    return (_read(_file(place, revision)) or {}).get("eos_token_id")


def keep_file(model: "PreTrainedModel", folder: Path) -> None:
    """Put the model's own generation_config.json into a folder it was saved to, if transformers takes it."""
    from transformers import GenerationConfig

    text = _file(model.config._name_or_path, getattr(model.config, "_commit_hash", None))
    own = _read(text)
    if text is None or own is None:
        return
    try:
        GenerationConfig.from_dict(own)
    except (ValueError, TypeError, AttributeError, KeyError):
        return
    (folder / FILE).write_bytes(text)


def write_greedily(
    model: "PreTrainedModel",
    prompts: Tensor,
    mask: Tensor,
    *,
    max_new_tokens: int,
    ends: list[int],
    fill: int,
) -> tuple[Tensor, Tensor]:
    """Return what the model writes behind left-padded prompts, and for how many tokens of it there were numbers.

    The model's own generation settings are put aside for the call, so that neither a key of its file nor one that a
    later transformers knows has a say.

    Args:
        model: Answers.
        prompts: (rows, length) int64.
        mask: (rows, length), 0 where there is padding.
        max_new_tokens: Longest answer.
        ends: The tokens that end an answer.
        fill: The token behind an answer that has ended.

    Returns:
        (rows, at most max_new_tokens) int64, and (rows,) int64: the tokens of a row before its first logit that was
        NaN, where none is the most likely.

    Raises:
        ValueError: where the model cannot generate.
    """
    from transformers import LogitsProcessorList

    if not getattr(model, "generate", None):
        raise ValueError(
            f"evaluation.generate must be false for model.name {model.name_or_path}, which cannot generate"
        )
    ours = fresh()
    ours.max_new_tokens, ours.do_sample, ours.num_beams = max_new_tokens, False, 1
    ours.use_cache, ours.return_dict_in_generate = True, False
    ours.eos_token_id, ours.pad_token_id = ends or None, fill
    watch = _Watch(prompts)
    own = model.generation_config
    model.generation_config = fresh()
    try:
        whole: Tensor = model.generate(
            input_ids=prompts,
            attention_mask=mask,
            generation_config=ours,
            logits_processor=LogitsProcessorList([watch]),
        )
    finally:
        model.generation_config = own
    return whole[:, prompts.shape[1] :].cpu(), watch.sound.cpu()


class _Watch:
    """Notes how many tokens each row had numbers for; a processor of logits that changes none."""

    def __init__(self, prompts: Tensor) -> None:
        self._start = prompts.shape[1]
        # More than anything that is written.
        self.sound = torch.full((len(prompts),), 2**62, device=prompts.device)

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        written = ids.shape[1] - self._start
        broken = logits.isnan().any(-1)
        self.sound = torch.where(broken, self.sound.clamp(max=written), self.sound)
        return logits


def _ends(model: "PreTrainedModel", value: object) -> list[int]:
    """Return the end tokens that a model is told, or those of its configuration where there are none."""
    rows = model.get_input_embeddings().weight.shape[0]
    of_text = model.config.get_text_config(decoder=True)
    named = [value]
    named += [getattr(config, "eos_token_id", None) for config in (model.config, of_text)]
    for own in named:
        listed = own if isinstance(own, list | tuple) else [own]
        found = [e for e in listed if type(e) is int and 0 <= e < rows]
        if found:
            return found
    return []


def _read(text: bytes | None) -> dict[str, Any] | None:
    try:
        tree = json.loads(text or b"")
    except (ValueError, RecursionError):
        return None
    return tree if isinstance(tree, dict) else None


def _file(place: str, revision: str | None) -> bytes | None:
    """Return the model's generation_config.json as it stands, None where there is none."""
    from transformers.utils import cached_file

    if not place:  # it was made, not loaded
        return None
    if Path(place).is_dir():
        file = Path(place) / FILE
        return file.read_bytes() if file.is_file() else None
    found = cached_file(
        place,
        FILE,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return Path(found).read_bytes() if found else None
