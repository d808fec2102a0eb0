"""Adapters on a model's own layers through PEFT, LoRA, IA3 and VeRA: attach them, name their tensors, write their folders."""

import copy
import hashlib
import math
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
from fedloom.models.pissa import beside_the_start, residual_
from fedloom.models.quantized import QuantizedLinear, dequantize_
from fedloom.models.reach import unread, without_gradient
from fedloom.models.targets import Targets, choose_targets, left_frozen

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Adapter:
    """A PEFT adapter on the model's own layers."""

    def __init__(
        self,
        peft: "PeftModel",
        *,
        left_frozen: str = "",
        start: Mapping[str, Tensor] | None = None,
        identity: Mapping[str, str] | None = None,
    ) -> None:
        self._peft = peft
        self.left_frozen = left_frozen
        """What might have got an adapter and has none, in a sentence; empty where there is nothing."""
        self.identity = identity or {}
        """Hashes of what the adapter holds beside what learns, see `spaces.handshake`."""
        self._start = start or {}
        """Factors whose product the base weights were lessened by."""

    @property
    def config(self) -> Any:
        """Return a copy of PEFT's configuration, for a folder."""
        config = copy.copy(self._peft.peft_config["default"])
        config.inference_mode = True
        return config

    def save(self, folder: Path, values: Mapping[str, Tensor]) -> None:
        """Write absolute values as a PEFT folder, which `PeftModel.from_pretrained(base, folder)` reads."""
        from peft import get_peft_model_state_dict

        config = self.config
        if self._start:
            values, config = beside_the_start(values, self._start, config)
        full = {clean(n): n for n, p in self._peft.named_parameters() if p.requires_grad}
        state = {full[name]: value.detach().cpu().clone() for name, value in values.items()}
        with quiet():
            named = get_peft_model_state_dict(
                self._peft, state_dict=state, save_embedding_layers=False
            )
        write_folder(folder, named, config)

    def save_as_lora(self, folder: Path, values: Mapping[str, Tensor]) -> None:
        """Write the same model as a PEFT folder of kind LoRA, for programs that read no other.

        Raises:
            ValueError: where what the adapter adds has no low rank.
        """
        if not self._projections:
            kind = str(self.config.peft_type.value).lower()
            raise ValueError(
                f"only an adapter of tune: vera can be written as LoRA, got {kind}: export it as it is"
            )
        from peft import LoraConfig

        config = self.config
        whole_a, whole_b = (p.cpu() for p in self._projections)
        layers = sorted({name.partition(".vera_")[0] for name in values})
        named: dict[str, Tensor] = {}
        for layer in layers:
            module: Any = self._peft.get_base_model().get_submodule(layer)
            b, d = (values[f"{layer}.vera_lambda_{x}"].cpu() for x in "bd")
            factors = {
                "A": d[:, None] * whole_a[:, : module.in_features],
                "B": b[:, None] * whole_b[: module.out_features],
            }
            for x, factor in factors.items():
                named[f"base_model.model.{layer}.lora_{x}.weight"] = factor.contiguous()
        lora = LoraConfig(
            r=config.r,
            lora_alpha=config.r,
            target_modules=layers,
            fan_in_fan_out=config.fan_in_fan_out,
            task_type="CAUSAL_LM",
            base_model_name_or_path=config.base_model_name_or_path,
            inference_mode=True,
        )
        write_folder(folder, named, lora)

    def save_merged(self, folder: Path, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Write a plain model that holds the adapter as the live tensors have it; those stay as they were."""
        with quiet():
            merged = self.merged()
            head, embedding = merged.get_output_embeddings(), merged.get_input_embeddings()
            if head is not None and head.weight is not embedding.weight:
                # A head that was tuned on its own would be tied to the embedding again when loaded.
                merged.config.tie_word_embeddings = False
            merged.save_pretrained(folder)
            keep_file(merged, folder)
            tokenizer.save_pretrained(folder)

    def merged(self) -> Any:
        """Return a plain model that holds the adapter as the live tensors have it, a copy.

        Weights in few bits are merged as they compute, in the type of the others.
        """
        whole: Any = copy.deepcopy(self._peft)
        with quiet():
            dequantize_(whole, self._peft.get_base_model().dtype)
            return whole.merge_and_unload()

    @property
    def _projections(self) -> tuple[Tensor, Tensor] | None:
        """Return VeRA's frozen A (rank, in) and B (out, rank) of the largest layers."""
        tuner: Any = self._peft.base_model
        held = getattr(tuner, "vera_A", None)
        return None if held is None else (held["default"], tuner.vera_B["default"])


def attach_lora(
    model: "PreTrainedModel",
    *,
    rank: int,
    alpha: float,
    dropout: float,
    rslora: bool,
    dora: bool,
    init: str,
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
    from peft import LoraConfig

    chosen = choose_targets(model, targets, saved=modules_to_save)
    width = rank + side
    setting = "tune.lora.rank + side" if side else "tune.lora.rank"
    check_width(model, chosen.layers, width, setting=setting)
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
        fan_in_fan_out=fan_in_fan_out(model, chosen),
        task_type="CAUSAL_LM",
    )
    peft = attached(model, config, chosen, seed=seed, base_name=base_name)
    left = left_frozen(model, targets, chosen, saved=modules_to_save)
    for name, parameter in trainable(model).items():
        if name.endswith("lora_A.weight"):
            # Kaiming-uniform as PEFT has it, but drawn on the CPU, so that devices agree.
            bound = parameter.shape[1] ** -0.5
            fresh = torch.empty((rank, parameter.shape[1]), dtype=torch.float32)
            fresh.uniform_(-bound, bound, generator=generator(seed, "lora", name))
            parameter.data.zero_()[:rank].copy_(fresh)
    start = residual_(model) if init == "pissa" else None
    return Adapter(peft, left_frozen=left, start=start)


def attach_ia3(
    model: "PreTrainedModel",
    *,
    targets: str | Sequence[str],
    feedforward: Sequence[str],
    seed: int,
    base_name: str,
) -> Adapter:
    """Attach vectors that scale what layers give, or take where they are `feedforward`, in place; all ones.

    Raises:
        ValueError: where a target does not exist, or is to be chosen for an architecture that PEFT does not know.
    """
    from peft import IA3Config

    if targets == "auto":
        targets, feedforward = _ia3_targets(model)
    chosen = choose_targets(model, targets, path="tune.ia3.targets")
    ahead = sorted(name for name in chosen.layers if _ends(name, feedforward))
    by_name = isinstance(chosen.peft_targets, list) and set(feedforward) <= set(chosen.peft_targets)
    config = IA3Config(
        target_modules=chosen.peft_targets if by_name else sorted(chosen.layers),
        exclude_modules=chosen.peft_left_out or None,
        feedforward_modules=list(feedforward) if by_name else ahead,
        fan_in_fan_out=fan_in_fan_out(model, chosen),
        task_type="CAUSAL_LM",
    )
    peft = attached(model, config, chosen, seed=seed, base_name=base_name)
    return Adapter(peft, left_frozen=left_frozen(model, targets, chosen, path="tune.ia3.targets"))


def attach_vera(
    model: "PreTrainedModel",
    *,
    rank: int,
    targets: str | Sequence[str],
    d_initial: float,
    seed: int,
    base_name: str,
) -> Adapter:
    """Attach vectors around frozen random projections that all layers share, in place; it starts at the base model.

    Raises:
        ValueError: where a target does not exist.
    """
    from peft import VeraConfig

    chosen = choose_targets(model, targets, path="tune.vera.targets")
    if chosen.peft_left_out:
        raise ValueError(
            "tune.vera.targets must name layers by ends that no other layer has, got one that"
            f" {sorted(chosen.peft_left_out)[0]} has too"
        )
    with quiet():  # it warns that projections are drawn anew, which is meant
        config = VeraConfig(
            r=rank,
            target_modules=chosen.peft_targets,
            projection_prng_key=derive(seed, "vera") >> 32,
            save_projection=False,
            d_initial=d_initial,
            fan_in_fan_out=fan_in_fan_out(model, chosen),
            task_type="CAUSAL_LM",
        )
    peft = attached(model, config, chosen, seed=seed, base_name=base_name)
    tuner: Any = peft.base_model
    digest = hashlib.sha256()
    draw = torch.Generator().manual_seed(config.projection_prng_key)
    for held in (tuner.vera_A, tuner.vera_B):
        # PEFT draws the same numbers, and rounds them to the base model's type.
        old = held["default"]
        fresh = _projection(old.shape, draw)
        held["default"] = fresh.to(old.device, torch.promote_types(old.dtype, torch.float32))
        digest.update(fresh.numpy().data)
    left = left_frozen(model, targets, chosen, path="tune.vera.targets")
    return Adapter(peft, left_frozen=left, identity={"projection": digest.hexdigest()})


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what requires a gradient by its clean name, in the order of the model's layers; tied tensors once."""
    return {clean(name): p for name, p in model.named_parameters() if p.requires_grad}


def widen_(model: nn.Module) -> None:
    """Let what learns be float32 at least."""
    for parameter in trainable(model).values():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))


def attached(
    model: "PreTrainedModel", config: "PeftConfig", chosen: Targets, *, seed: int, base_name: str
) -> "PeftModel":
    """Return PEFT's wrapping of the model, in place, its fresh tensors drawn from the seed."""
    from peft import get_peft_model

    with found("tune cannot be had for this model"), seeded(derive(seed, "peft")):
        peft = get_peft_model(model, config)
    widen_(model)
    # PEFT may put adapters on fused experts instead of some of the layers.
    for parameter in without_gradient(model, waiting=chosen.layers).values():
        parameter.requires_grad_(False)
    peft.peft_config["default"].base_model_name_or_path = base_name
    model.eval()  # the adapter's own layers come in training mode
    return peft


def write_folder(folder: Path, named: Mapping[str, Tensor], config: Any) -> None:
    """Write a PEFT folder."""
    from safetensors.torch import save_file

    with quiet():
        folder.mkdir(parents=True, exist_ok=True)
        save_file(dict(named), folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(str(folder))


def _projection(shape: torch.Size, draw: torch.Generator) -> Tensor:
    """Return (rows, columns) float32, Kaiming-uniform as PEFT's VeRA has it."""
    bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))
    return torch.empty(shape).uniform_(-bound, bound, generator=draw)


def fan_in_fan_out(model: "PreTrainedModel", chosen: Targets) -> bool:
    """Return whether chosen layers keep their weights transposed, as PEFT wants to know."""
    return any(is_transposed(model.get_submodule(name)) for name in chosen.layers)


def _ia3_targets(model: "PreTrainedModel") -> tuple[list[str], list[str]]:
    """Return what PEFT scales in a model of this architecture: layers, and those of them whose input it scales."""
    from peft.utils import constants

    kind = model.config.get_text_config(decoder=True).model_type
    targets = constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.get(kind)
    feedforward = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(kind)
    if targets is None or feedforward is None:
        raise ValueError(
            f"tune.ia3.targets must be named for a model of type {kind}, which PEFT has no choice for, such as"
            " [k_proj, v_proj, down_proj] with tune.ia3.feedforward [down_proj]; got auto"
        )
    return list(targets), list(feedforward)


def _ends(name: str, ends: Sequence[str]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)


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


def check_width(
    model: "PreTrainedModel", layers: Iterable[str], width: int, *, setting: str
) -> None:
    """Refuse factors wider than a layer, which say no more than narrower ones.

    Raises:
        ValueError: naming the setting and the layer.
    """
    for name in sorted(layers):
        module: Any = model.get_submodule(name)
        least = min(module.shape if isinstance(module, QuantizedLinear) else module.weight.shape)
        if width > least:
            raise ValueError(f"{setting} must be at most {least}, the size of {name}, got {width}")


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
