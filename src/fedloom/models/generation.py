"""Answers, greedy or sampled, whatever a model's files say: of its generation settings only the end tokens are its own."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedloom.core.randomness import seeded
from fedloom.models.cache import cache_name, row_cache

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

    from fedloom.models.prefix import Prefix

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
    begin: "Prefix | None" = None,
    told: Callable[[Tensor], object] | None = None,
    over: Callable[[Sequence[int]], bool] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return what the model writes behind left-padded prompts, and for how many tokens of it there were numbers.

    The model's own generation settings are put aside for the call, so that neither a key of its file nor one that a
    later transformers knows has a say. Rows that have ended leave the batch, where the model's cache can drop them.

    Args:
        model: Answers.
        prompts: (rows, length) int64.
        mask: (rows, length), 0 where there is padding.
        max_new_tokens: Longest answer.
        ends: The tokens that end an answer.
        fill: The token behind an answer that has ended.
        begin: What all prompts begin with, where the model has read that already; each has more.
        told: Called before every further token with what was written so far, (1, tokens) int64, if there is one prompt;
            what it raises ends the writing.
        over: Whether an answer has ended with what was written of it; asked before every further token.

    Returns:
        (rows, at most max_new_tokens) int64, and (rows,) int64: the tokens of a row before its first logit that was
        NaN, where none is the most likely.

    Raises:
        ValueError: where the model cannot generate.
    """
    settings = _settings(max_new_tokens, ends, fill)
    return _alone(model, prompts, mask, settings, begin, told, over)


def write_sampled(
    model: "PreTrainedModel",
    prompts: Tensor,
    mask: Tensor,
    *,
    max_new_tokens: int,
    ends: list[int],
    fill: int,
    temperature: float,
    seed: int,
    begin: "Prefix | None" = None,
) -> tuple[Tensor, Tensor]:
    """Return what the model writes if each token is drawn from all of its distribution at a temperature; else as above."""
    settings = _settings(max_new_tokens, ends, fill)
    settings.do_sample, settings.temperature, settings.top_k = True, temperature, 0
    # transformers draws from torch's global generator.
    with seeded(seed):
        return _alone(model, prompts, mask, settings, begin)


def _alone(
    model: "PreTrainedModel",
    prompts: Tensor,
    mask: Tensor,
    settings: "GenerationConfig",
    begin: "Prefix | None",
    told: Callable[[Tensor], object] | None = None,
    over: Callable[[Sequence[int]], bool] | None = None,
) -> tuple[Tensor, Tensor]:
    """Write by these settings, the model's own put aside."""
    if not getattr(model, "generate", None):
        raise ValueError(
            f"evaluation.generate must be false for model.name {model.name_or_path}, which cannot generate"
        )
    own = model.generation_config
    model.generation_config = fresh()
    try:
        return _written(model, prompts, mask, settings, begin, told, over)
    finally:
        model.generation_config = own


def _settings(max_new_tokens: int, ends: list[int], fill: int) -> "GenerationConfig":
    ours = fresh()
    ours.max_new_tokens, ours.do_sample, ours.num_beams = max_new_tokens, False, 1
    ours.use_cache, ours.return_dict_in_generate = True, False
    ours.eos_token_id, ours.pad_token_id = ends or None, fill
    return ours


def _written(
    model: Any,
    ids: Tensor,
    mask: Tensor,
    settings: "GenerationConfig",
    begin: "Prefix | None",
    told: Callable[[Tensor], object] | None,
    over: Callable[[Sequence[int]], bool] | None,
) -> tuple[Tensor, Tensor]:
    """Return answers and for how many of their tokens there were numbers; `generate` goes on where rows have left."""
    from transformers import LogitsProcessorList, StoppingCriteriaList

    start, most = ids.shape[1], settings.max_new_tokens
    answers = ids.new_full((len(ids), most), settings.pad_token_id)
    # More than anything that is written.
    sound = torch.full((len(ids),), 2**62, device=ids.device)
    rows = torch.arange(len(ids), device=ids.device)
    cache = None
    if begin is not None:
        cache = row_cache(model, start - len(begin) + most)
        begin.fill_(cache, (mask == 0).sum(1))
    elif len(ids) > 1:
        cache = row_cache(model, most)
    kept = {} if cache is None else {cache_name(): cache}
    while True:
        watch = _Watch(start, len(ids), told if len(rows) == len(answers) == 1 else None)
        leave = _Leave(start, settings.eos_token_id, cache, over)
        ids = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=settings,
            logits_processor=LogitsProcessorList([watch]),
            stopping_criteria=StoppingCriteriaList([leave]),
            **kept,
        )
        if cache is None:
            return ids[:, start:].cpu(), watch.sound.cpu()
        written = ids.shape[1] - start
        answers[rows, :written] = ids[:, start:]
        sound[rows] = sound[rows].minimum(watch.sound.to(sound))
        going = (~leave.ended(ids)).nonzero().squeeze(1)
        if not leave.early or written >= most or not len(going):
            return answers[:, :written].cpu(), sound.cpu()
        cache.batch_select_indices(going)
        rows, ids, mask = rows[going], ids[going], mask[going]
        mask = nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
        settings.max_new_tokens = most - written


class _Watch:
    """Notes how many tokens each row had numbers for; a processor of logits that changes none."""

    def __init__(self, start: int, rows: int, told: Callable[[Tensor], object] | None) -> None:
        self._start, self._told = start, told
        self.sound = torch.full((rows,), 2**62)

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        written = ids.shape[1] - self._start
        if self._told is not None and written:
            self._told(ids[:, self._start :].cpu())
        # The largest of numbers of which one is NaN is NaN, which takes one pass over them.
        broken = logits.amax(-1).isnan()
        self.sound = self.sound.to(broken.device)
        self.sound = torch.where(broken, self.sound.clamp(max=written), self.sound)
        return logits


class _Leave:
    """Stops all rows as soon as enough have ended for the others to go on without them, or all have."""

    def __init__(
        self,
        start: int,
        ends: Sequence[int] | None,
        cache: object,
        over: Callable[[Sequence[int]], bool] | None,
    ) -> None:
        self._start, self._drops, self._over = start, cache is not None, over
        self._ends = torch.tensor(ends or [], dtype=torch.int64)
        self._said = set[int]()
        """Rows that are over by what they say."""
        self.early = False

    def ended(self, ids: Tensor) -> Tensor:
        """Return (rows,) whether an end token is among what was written, or the answer is over with it."""
        self._ends = self._ends.to(ids.device)
        found = torch.isin(ids[:, self._start :], self._ends).any(1)
        found[[*self._said]] = True
        return found

    def __call__(self, ids: Tensor, _scores: Any, **_: Any) -> Tensor:
        if self._over is not None:
            for row in (~self.ended(ids)).nonzero().squeeze(1).tolist():
                if self._over(ids[row, self._start :].tolist()):
                    self._said.add(row)
        ended = self.ended(ids)
        # Dropping rows copies the cache of the others, which is about what a token of theirs costs.
        self.early = self._drops and bool(ended.float().mean() >= _LEAVING)
        return torch.full((len(ids),), self.early or bool(ended.all()), device=ids.device)


_LEAVING = 1 / 8
"""Share of the rows that have to end before they are dropped."""


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
