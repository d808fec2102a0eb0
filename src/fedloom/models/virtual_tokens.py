"""Learnt tokens before every row that a model reads, through PEFT's encoders: prompts, prefixes and P-tuning.

They are the model's own business: it is called with rows of text, and answers with as many places as they have tokens, in
training, in evaluation and while it generates. What is learnt are the encoder's parameters. PEFT's files hold what the
encoder makes of them, and put that into its place when they are read: good enough to use, wrong to train on.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedloom.core.randomness import derive, generator, seeded
from fedloom.models.adapters import Adapter, widen_, write_folder
from fedloom.models.build import Base
from fedloom.models.cache import cache_name
from fedloom.models.found import found
from fedloom.models.introspection import forgets_activations
from fedloom.models.positions import positions_of
from fedloom.models.reach import without_gradient

if TYPE_CHECKING:
    from peft import PeftModel, PromptLearningConfig


class VirtualTokens(Adapter):
    """An encoder whose output every row begins with."""

    def __init__(self, peft: "PeftModel", kind: str) -> None:
        super().__init__(peft)
        self._kind = kind

    def save(self, folder: Path, values: Mapping[str, Tensor]) -> None:
        """Write what the encoder makes of absolute values as a PEFT folder."""
        encoder = self._peft.prompt_encoder["default"]
        tokens = (
            self._peft.prompt_tokens["default"].unsqueeze(0).to(next(encoder.parameters()).device)
        )
        own = {name.removeprefix("prompt_encoder."): value for name, value in values.items()}
        with torch.no_grad():
            made: Tensor = functional_call(encoder, own, (tokens,))[0]
        write_folder(folder, {"prompt_embeddings": made.cpu().contiguous()}, self.config)

    def merged(self) -> Any:
        raise ValueError(
            f"tune: {self._kind} cannot be merged into a model, whose weights it leaves as they are: export the adapter"
            " alone"
        )


def attach_prompt(base: Base, *, tokens: int, init: str, text: str, seed: int) -> VirtualTokens:
    """Let every row begin with learnt embeddings, in place.

    Args:
        base: The model.
        tokens: How many.
        init: What they start as: vocabulary (tokens drawn from it), text, or normal (noise as large as embeddings are).
        text: The text, as often as it takes.
        seed: Of the draw.
    """
    from peft import PromptTuningConfig

    config = PromptTuningConfig(
        prompt_tuning_init="RANDOM", num_virtual_tokens=tokens, task_type="CAUSAL_LM"
    )
    peft = _attached(base, config, "prompt", seed)
    table = base.model.get_input_embeddings()
    draw, rows = generator(seed, "prompt"), table.weight.shape[0]
    if init == "text":
        ids = base.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ValueError(f"tune.prompt.text must hold a token of the model's, got {text!r}")
        chosen = torch.tensor((ids * -(-tokens // len(ids)))[:tokens])
    else:
        chosen = torch.randint(rows, (tokens,), generator=draw)
    with torch.no_grad():
        start = table(chosen.to(table.weight.device)).float()
        if init == "normal":
            everywhere = table(torch.arange(rows, device=table.weight.device)).float()
            start = torch.randn(start.shape, generator=draw).to(start) * everywhere.std()
        peft.prompt_encoder["default"].embedding.weight.copy_(start)
    return VirtualTokens(peft, "prompt")


def attach_ptuning(
    base: Base, *, tokens: int, encoder: str, hidden: int | None, layers: int, seed: int
) -> VirtualTokens:
    """Let every row begin with what an MLP or an LSTM makes of learnt vectors, in place.

    The shape is the recipe's `tune.ptuning`, name by name.
    """
    from peft import PromptEncoderConfig

    config = PromptEncoderConfig(
        num_virtual_tokens=tokens,
        encoder_reparameterization_type=encoder.upper(),
        encoder_hidden_size=hidden,
        encoder_num_layers=layers,
        task_type="CAUSAL_LM",
    )
    return VirtualTokens(_attached(base, config, "ptuning", seed), "ptuning")


def attach_prefix(
    base: Base, *, tokens: int, projection: bool, hidden: int | None, seed: int
) -> VirtualTokens:
    """Let every layer attend to learnt keys and values before every row, in place.

    The shape is the recipe's `tune.prefix`, name by name.

    Raises:
        ValueError: where the model keeps no keys and values while it trains.
    """
    from peft import PrefixTuningConfig

    if forgets_activations(base.model):
        raise ValueError(
            "model.gradient_checkpointing must be false where tune is prefix, whose keys and values it would drop"
        )
    config = PrefixTuningConfig(
        num_virtual_tokens=tokens,
        prefix_projection=projection,
        encoder_hidden_size=hidden,
        task_type="CAUSAL_LM",
    )
    return VirtualTokens(_attached(base, config, "prefix", seed), "prefix")


def _attached(base: Base, config: "PromptLearningConfig", kind: str, seed: int) -> "PeftModel":
    from peft import get_peft_model

    model: Any = base.model
    _check_room(base, config.num_virtual_tokens, kind)
    otherwise = f"tune: {kind} cannot be had for this model"
    with found(otherwise), seeded(derive(seed, "peft", kind)):
        peft = get_peft_model(model, config)
    peft.peft_config["default"].base_model_name_or_path = base.name
    # The model's own from here on: what is called is the model, and what learns is found in it.
    model.prompt_encoder = peft.prompt_encoder
    wide = torch.promote_types(model.dtype, torch.float32)
    model.prompt_encoder.to(wide).requires_grad_(True)
    widen_(model)
    backbone = model.base_model
    if backbone is model:
        raise ValueError(f"{otherwise}: its embeddings and its head are in one module")
    backbone.register_forward_pre_hook(_before(model, peft, kind), with_kwargs=True)
    if kind != "prefix":
        backbone.register_forward_hook(_without(config.num_virtual_tokens), with_kwargs=True)
    with found(otherwise):
        silent = without_gradient(model, waiting=())
    if silent:
        raise ValueError(f"{otherwise}: a loss over text has no gradient in {sorted(silent)[0]}")
    model.eval()
    return peft


def _check_room(base: Base, tokens: int, kind: str) -> None:
    positions = positions_of(base.model.config)
    if positions is not None and tokens >= positions:
        raise ValueError(
            f"tune.{kind}.tokens must be below {positions}, which is how many positions model.name {base.name} has,"
            f" got {tokens}"
        )


def _before(model: Any, peft: Any, kind: str) -> Any:
    """Return a hook that puts the virtual tokens before the rows that a backbone is called with."""
    num = int(peft.peft_config["default"].num_virtual_tokens)

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(args) > 1:
            raise TypeError("virtual tokens need a model that calls its backbone by names")
        given = dict(kwargs)
        if args:
            given["input_ids"] = args[0]
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        if positions is not None and mask is None and bool((positions.diff(dim=1) != 1).any()):
            raise TypeError("virtual tokens stand before whole rows, not inside of shared ones")
        name = "past_key_values" if "past_key_values" in given else cache_name()
        cache = given.get(name)
        begins = cache is None or not cache.get_seq_length()
        embedded = given.get("inputs_embeds")
        rows = len(given["input_ids"] if embedded is None else embedded)
        if mask is not None:
            given["attention_mask"] = torch.cat([mask.new_ones(rows, num), mask], dim=1)
        if positions is not None:
            given["position_ids"] = positions + num
        if begins and kind == "prefix":
            given[name] = _filled(cache, peft.get_prompt(1), rows, model)
        elif begins:
            if embedded is None:
                embedded = model.get_input_embeddings()(given.pop("input_ids"))
            prompts = peft.get_prompt(1).to(embedded).expand(rows, -1, -1)
            given["inputs_embeds"] = torch.cat([prompts, embedded], dim=1)
            if positions is not None:
                first = torch.arange(num, device=positions.device).expand(rows, -1)
                given["position_ids"] = torch.cat([first, positions + num], dim=1)
        return (), given

    return hook


def _without(num: int) -> Any:
    """Return a hook that leaves the virtual tokens' places out of what a backbone answers."""

    def hook(_: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        if kwargs.get("inputs_embeds") is not None:
            out.last_hidden_state = out.last_hidden_state[:, num:]
        return out

    return hook


def _filled(cache: Any, prefix: Any, rows: int, model: Any) -> Any:
    """Return an empty cache, or a fresh one, with the keys and values of PEFT's for every row."""
    from transformers import DynamicCache

    if cache is None:
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    for index, layer in enumerate(prefix.layers):
        keys, values = (t.expand(rows, -1, -1, -1) for t in (layer.keys, layer.values))
        cache.update(keys, values, index)
    return cache
