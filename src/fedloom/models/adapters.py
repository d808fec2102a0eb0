"""LoRA through PEFT: attach it, name its tensors, write and read its folders."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedloom.core.randomness import derive, generator, seeded
from fedloom.models.build import clean
from fedloom.models.found import found
from fedloom.models.generation import keep_file
from fedloom.models.hf_logging import quiet
from fedloom.models.introspection import is_adapted, is_transposed
from fedloom.models.reach import unread, without_gradient
from fedloom.models.targets import choose_targets, left_frozen

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Adapter:
    """A PEFT adapter on the model's own layers."""

    def __init__(self, peft: "PeftModel", left_frozen: str) -> None:
        self._peft = peft
        self.left_frozen = left_frozen
        """What might have got an adapter and has none, in a sentence; empty where there is nothing."""

    def save(self, folder: Path, values: Mapping[str, Tensor]) -> None:
        """Write absolute values as a PEFT folder, which `PeftModel.from_pretrained(base, folder)` reads."""
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        full = {clean(n): n for n, p in self._peft.named_parameters() if p.requires_grad}
        state = {full[name]: value.detach().cpu().clone() for name, value in values.items()}
        config = copy.copy(self._peft.peft_config["default"])
        config.inference_mode = True
        with quiet():
            named = get_peft_model_state_dict(
                self._peft, state_dict=state, save_embedding_layers=False
            )
            folder.mkdir(parents=True, exist_ok=True)
            save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
            config.save_pretrained(str(folder))

    def save_merged(self, folder: Path, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Write a plain model that holds the adapter as the live tensors have it; those stay as they were."""
        with quiet():
            merged: Any = copy.deepcopy(self._peft).merge_and_unload()
            head, embedding = merged.get_output_embeddings(), merged.get_input_embeddings()
            if head is not None and head.weight is not embedding.weight:
                # A head that was tuned on its own would be tied to the embedding again when loaded.
                merged.config.tie_word_embeddings = False
            merged.save_pretrained(folder)
            keep_file(merged, folder)
            tokenizer.save_pretrained(folder)


def attach_lora(
    model: "PreTrainedModel",
    *,
    rank: int,
    alpha: float,
    dropout: float,
    rslora: bool,
    dora: bool,
    targets: str | Sequence[str],
    modules_to_save: Sequence[str],
    side: int,
    seed: int,
    base_name: str,
) -> Adapter:
    """Attach a fresh adapter, in place; the same seed gives the same one on any machine.

    The shape is the recipe's `tune.lora`, name by name; `base_name` is what folders of the adapter call the model.

    Raises:
        ValueError: where a target or a module to save does not exist, or a loss would have no gradient there.
    """
    from peft import LoraConfig, get_peft_model

    chosen = choose_targets(model, targets, saved=modules_to_save)
    width = rank + side
    _check_width(model, chosen.layers, rank=rank, side=side)
    config = LoraConfig(
        r=width,
        # The scale is that of `rank`, whatever stands beside the adapter.
        lora_alpha=alpha * (width / rank) ** (0.5 if rslora else 1.0),
        lora_dropout=dropout,
        use_rslora=rslora,
        use_dora=dora,
        target_modules=chosen.peft_targets,
        exclude_modules=chosen.peft_left_out or None,
        modules_to_save=_saved(model, modules_to_save),
        fan_in_fan_out=any(is_transposed(model.get_submodule(name)) for name in chosen.layers),
        task_type="CAUSAL_LM",
    )
    with found("tune cannot be had for this model"), seeded(derive(seed, "peft")):
        peft = get_peft_model(model, config)
    # PEFT may put adapters on fused experts instead of some of the layers.
    for parameter in without_gradient(model, waiting=chosen.layers).values():
        parameter.requires_grad_(False)
    left = left_frozen(model, targets, chosen, saved=modules_to_save)
    peft.peft_config["default"].base_model_name_or_path = base_name
    for name, parameter in trainable(model).items():
        wide = torch.promote_types(parameter.dtype, torch.float32)
        parameter.data = parameter.data.to(wide)
        if name.endswith("lora_A.weight"):
            # Kaiming-uniform as PEFT has it, but drawn on the CPU, so that devices agree.
            bound = parameter.shape[1] ** -0.5
            fresh = torch.empty((rank, parameter.shape[1]), dtype=torch.float32)
            fresh.uniform_(-bound, bound, generator=generator(seed, "lora", name))
            parameter.data.zero_()[:rank].copy_(fresh)
    model.eval()  # the adapter's own layers come in training mode
    return Adapter(peft, left)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what requires a gradient by its clean name, in the order of the model's layers; tied tensors once."""
    return {clean(name): p for name, p in model.named_parameters() if p.requires_grad}


@contextmanager
def scaled(model: nn.Module, gain: float) -> Iterator[None]:
    """Let what adapters add to their layers be multiplied by `gain` for a while.

    Raises:
        ValueError: where the model has none.
    """
    if gain == 1.0:
        yield
        return
    adapted: list[Any] = [module for module in model.modules() if is_adapted(module)]
    if not adapted:
        raise ValueError(
            "only low-rank adapters have a scale to change, got a model without: set tune to lora"
        )
    before = [module.scaling["default"] for module in adapted]
    for module, scaling in zip(adapted, before, strict=True):
        module.scaling["default"] = scaling * gain
    try:
        yield
    finally:
        for module, scaling in zip(adapted, before, strict=True):
            module.scaling["default"] = scaling


def _check_width(model: "PreTrainedModel", layers: Iterable[str], *, rank: int, side: int) -> None:
    width = rank + side
    for name in sorted(layers):
        module: Any = model.get_submodule(name)
        least = min(module.weight.shape)
        if width > least:
            what = f"tune.lora.rank + side {width}" if side else f"tune.lora.rank {width}"
            raise ValueError(
                f"{what} is above the size of {name}, {tuple(module.weight.shape)}: at most {least} has an effect there"
            )


def _saved(model: "PreTrainedModel", modules: Sequence[str]) -> list[str] | None:
    names = [name for name, _ in model.named_modules() if name]
    for module in modules:
        if not any(name == module or name.endswith(f".{module}") for name in names):
            known = sorted({name.rsplit(".", 1)[-1] for name in names if not name[-1].isdigit()})
            raise ValueError(
                f"tune.lora.modules_to_save must name modules of the model ({', '.join(known)}), got {module}"
            )
    if modules:
        silent = unread(model)
        for module in modules:
            own = {n for n, _ in model.named_parameters() if f".{module}." in f".{n}"}
            if own and own <= silent:
                raise ValueError(
                    f"tune.lora.modules_to_save must name modules that a pass over text reads, got {module}"
                )
    low = {p.dtype for p in model.parameters()} & {torch.bfloat16, torch.float16}
    if modules and low:
        raise ValueError(
            "tune.lora.modules_to_save tunes whole modules, which needs model.dtype float32,"
            f" got {str(low.pop()).removeprefix('torch.')}"
        )
    return list(modules) or None
