"""The base model: any Hugging Face causal language model, frozen, once per device; how large it is, and its folder."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from fedloom.models.found import check_loaded, check_plain, check_tokenizer, found
from fedloom.models.generation import PLAIN, ends_in_file, fresh, keep_file, settle_
from fedloom.models.hf_logging import quiet
from fedloom.models.place import Place, locate
from fedloom.models.probe import check_causal
from fedloom.models.quantized import quantize_, quantized_bytes, quantized_layers, scheme_of
from fedloom.models.schemes import SCHEMES, Quantization, bitsandbytes

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HASHING = 4
"""Tensors that are hashed at once."""
ATTENTION = ("auto", "eager", "sdpa", "flash_attention_2")


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """Which base model, and how it is held: the recipe's `model` section."""

    name: str = "builtin:tiny"
    """A Hub id, a folder, a GGUF file, or builtin:tiny."""
    file: str | None = None
    """Which GGUF file of a Hub repository or a folder; None: a folder's only one, where it holds no other weights."""
    revision: str | None = None
    """Branch, tag or commit on the Hub; None: the default branch."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the frozen weights, and of what is computed with them; adapters are float32 whatever this says."""
    quantize: Literal["none", Quantization] = "none"
    """Linear layers in few bits, but not the head: nf4 (QLoRA's, with double quantisation, by bitsandbytes), int8 (a scale a
    row) or int4 (a scale for 64); for adapters and prompts of any kind, or seeds of distribution lowrank."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """Implementation of attention; auto leaves the choice to transformers."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: about a third slower, much less memory."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda or cuda:N."""
    trust_remote_code: bool = False
    """Run the modelling code that a Hub repository brings along."""

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError(
                "model.name must be a Hub id, a folder, a GGUF file or builtin:tiny, got an empty one"
            )
        if self.file is not None and not self.file.lower().endswith(".gguf"):
            raise ValueError(f"model.file must be the name of a GGUF file, got {self.file!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"model.dtype must be one of {', '.join(DTYPES)}, got {self.dtype}")
        if self.quantize not in ("none", *SCHEMES):
            raise ValueError(
                f"model.quantize must be none, {', '.join(SCHEMES)}, got {self.quantize}"
            )
        if self.attention not in ATTENTION:
            raise ValueError(
                f"model.attention must be one of {', '.join(ATTENTION)}, got {self.attention}"
            )
        kind, _, index = self.device.partition(":")
        if kind not in ("auto", "cpu", "cuda") or (
            index and not (kind == "cuda" and index.isdigit())
        ):
            raise ValueError(f"model.device must be auto, cpu, cuda or cuda:N, got {self.device}")


@dataclass(frozen=True, slots=True)
class Base:
    """A frozen model and its tokenizer."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    name: str
    """As the recipe gives it; adapters refer to it."""
    gguf: str | None = None
    """Name of the GGUF file that it came from, in the folder or the repository."""
    holds: str = ""
    """Of that file: architecture, size and quantisation."""
    gguf_path: Path | None = None
    """Where that file is."""

    def described(self) -> str:
        """Return its name, and of a GGUF file which it is and what it holds."""
        file = f" ({self.gguf})" if self.gguf and not self.name.endswith(self.gguf) else ""
        named = f"{self.name}{file}: {self.holds}" if self.holds else self.name
        scheme = scheme_of(self.model)
        if scheme is None:
            return named
        weights, held = quantized_bytes(self.model)
        return f"{named}; {weights / 1e6:,.1f} M weights in {scheme.name}, {held / 1e6:,.1f} MB"


def load_base(settings: ModelSettings) -> Base:
    """Load model and tokenizer; nothing requires a gradient, and no embedding is resized.

    Raises:
        ValueError: where there is no such model, it is no whole or no causal one, or its tokenizer does not fit.
    """
    from transformers import AutoModelForCausalLM

    if settings.quantize == "nf4":
        bitsandbytes()  # before a model is loaded for nothing
    tokenizer = load_tokenizer(settings)
    check_plain(load_config(settings), settings.name)
    chosen = {} if settings.attention == "auto" else {"attn_implementation": settings.attention}
    device, place = _device(settings.device), where(settings)
    with found(_otherwise(settings)):
        model, loading = AutoModelForCausalLM.from_pretrained(
            dtype=DTYPES[settings.dtype],
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            generation_config=fresh(),
            **_place(settings),
            **PLAIN,
            **chosen,
        )
        settle_(model, ends_in_file(place.path, settings.revision))
    if place.commit is not None:
        model.config._commit_hash = place.commit
    check_loaded(model, loading, settings.name)
    base = freeze_(model, tokenizer, settings, settings.name, device)
    if place.gguf is None:
        return base
    return replace(base, gguf=place.gguf.name, holds=place.holds, gguf_path=place.gguf)


def freeze_(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    settings: ModelSettings,
    name: str,
    device: torch.device,
) -> Base:
    """Return a loaded model as a base: checked, and held as its settings say.

    Raises:
        ValueError: where the tokenizer does not fit, or the model is no causal one.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ValueError(
            f"model.name {name}: its tokenizer knows {len(tokenizer)} tokens, but its embedding has"
            f" {rows} rows; save the model with a tokenizer that fits"
        )
    model.requires_grad_(False)
    if settings.quantize != "none" and not quantize_(model, SCHEMES[settings.quantize]):
        raise ValueError(
            f"model.quantize must be none for this model ({type(model).__name__}), which has no plain linear layers,"
            f" got {settings.quantize}"
        )
    if settings.gradient_checkpointing:
        enable_checkpointing(model)
    model = model.to(device).eval()
    check_causal(model, name)
    return Base(model, tokenizer, name)


def load_tokenizer(settings: ModelSettings) -> "PreTrainedTokenizerBase":
    """Load the tokenizer alone; one without padding pads with a token of its own.

    Raises:
        ValueError: where there is no such model, or it has no tokenizer.
    """
    from transformers import AutoTokenizer

    load_config(settings)  # so that a model that is not there is no missing tokenizer
    with found(
        f"model.name {settings.name} has no tokenizer that can be read; save one beside its weights, with"
        " tokenizer.save_pretrained"
    ):
        tokenizer = AutoTokenizer.from_pretrained(**_place(settings))
    check_tokenizer(tokenizer, settings.name)
    pad_(tokenizer, settings.name)
    return tokenizer


def load_config(settings: ModelSettings) -> "PretrainedConfig":
    """Load the configuration alone: no weight is read.

    Raises:
        ValueError: where there is no such model.
    """
    from transformers import AutoConfig

    place = _place(settings)
    with found(_otherwise(settings)):
        return AutoConfig.from_pretrained(**place)


def where(settings: ModelSettings) -> Place:
    """Return where transformers loads the model from; a GGUF file is converted where it has not been yet.

    Raises:
        ValueError: where a folder or a file that is named holds no whole model.
    """
    return locate(settings.name, settings.file, settings.revision)


def _place(settings: ModelSettings) -> dict[str, Any]:
    """Return what tells transformers where to load from."""
    return {
        "pretrained_model_name_or_path": where(settings).path,
        "revision": settings.revision,
        "trust_remote_code": settings.trust_remote_code,
    }


def _otherwise(settings: ModelSettings) -> str:
    return (
        "model.name must be a causal language model on the Hub, in a folder or in a GGUF file, got"
        f' "{settings.name}"'
        f" (revision {settings.revision or 'default'})"
    )


def enable_checkpointing(model: "PreTrainedModel") -> None:
    """Let the model forget activations and compute them again in its backward pass, in training mode.

    Raises:
        ValueError: where its architecture cannot.
    """
    # transformers 5 renames the method within its major version.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    try:
        with quiet():
            enable({"use_reentrant": False})
    except ValueError as error:
        raise ValueError(
            f"model.gradient_checkpointing must be false for this model: {error}"
        ) from error


def disable_checkpointing(model: "PreTrainedModel") -> None:
    """Let the model keep its activations again."""
    # transformers 5 renames the method within its major version.
    getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()


def fingerprint(model: nn.Module) -> str:
    """Return the SHA-256 of the frozen weights and of the buffers kept with them: names, types, shapes and bytes.

    Adapters do not count, so a model has the same one before and after they are attached.
    """
    # The scales of quantised layers are buffers: integers alone say nothing of a weight's size.
    held = model.state_dict(keep_vars=True)
    frozen = {clean(n): t for n, t in held.items() if not t.requires_grad}
    names = sorted(frozen)
    # Each by itself, several at once: hashing lets go of the interpreter, and a gigabyte takes most of a second.
    with ThreadPoolExecutor(_HASHING) as pool:
        digests = pool.map(lambda name: _digest(name, frozen[name]), names)
        return hashlib.sha256(b"".join(digests)).hexdigest()


def _digest(name: str, weight: torch.Tensor) -> bytes:
    flat = weight.detach().cpu().contiguous().flatten()
    digest = hashlib.sha256(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
    digest.update(flat.view(torch.uint8).numpy().data)
    return digest.digest()


def clean(name: str) -> str:
    """Return a parameter's name without what PEFT's wrapping adds."""
    name = name.removeprefix("base_model.model.")
    for extra in (".original_module", ".modules_to_save.default", ".default"):
        name = name.replace(extra, "")
    # Fused experts are wrapped once for each of their tensors, so that only the nesting tells their adapters apart.
    return name if ".lora_" in name else name.replace(".base_layer", "")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"model.device must be a device of this machine, got {name} with {torch.cuda.device_count()} CUDA devices"
        )
    return device


def pad_(tokenizer: "PreTrainedTokenizerBase", name: str) -> None:
    """Give a tokenizer without padding one of its own tokens; masks and labels keep it out of the loss."""
    if tokenizer.pad_token_id is not None:
        return
    stand_in = tokenizer.eos_token or tokenizer.unk_token
    if stand_in is None:
        raise ValueError(
            f"model.name {name}: its tokenizer has no pad, eos or unk token; add one to its tokenizer_config.json"
        )
    tokenizer.pad_token = stand_in


def model_bytes(settings: ModelSettings) -> int:
    """Return the bytes of the weights at the recipe's dtype; tied weights count once.

    Raises:
        ValueError: where there is no such model.
    """
    width = DTYPES[settings.dtype].itemsize
    return sum(width * parameter.numel() for parameter in shapes_only(settings).parameters())


def shapes_only(settings: ModelSettings) -> "PreTrainedModel":
    """Return the model without values: no weight is read.

    Raises:
        ValueError: where there is no such model.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(settings)
    otherwise = f"model.name must be a causal language model, got {settings.name}"
    with found(otherwise), torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, trust_remote_code=settings.trust_remote_code
        )


def _with_own_storage(values: Tensor) -> Tensor:
    """Return the values where they are, but as no part of a larger vector, which safetensors takes for shared."""
    if values.device.type != "cpu" or not values.is_contiguous():
        return values.cpu().clone()
    raw = values.flatten().view(torch.uint8)
    return torch.from_numpy(raw.numpy()).view(values.dtype).view(values.shape)


def write_model(base: Base, folder: Path) -> None:
    """Write the model as its tensors stand, without adapters, and its tokenizer; quantised layers in the type of the others."""
    state, seen = dict[str, Tensor](), set[int]()
    for full_name, t in base.model.state_dict().items():
        if ".lora_" in full_name:
            continue
        name = clean(full_name)
        # Tied ones stay apart as they were; of the others there is no second copy.
        state[name] = t.clone().cpu() if t.data_ptr() in seen else _with_own_storage(t.detach())
        seen.add(t.data_ptr())
    for full_name, module in quantized_layers(base.model).items():
        name = clean(f"{full_name}.weight").removesuffix(".weight")
        for part in module.packed:
            del state[f"{name}.{part}"]
        state[f"{name}.weight"] = module.whole().to(base.model.dtype).cpu()
    with quiet():
        base.model.save_pretrained(folder, state_dict=state)
        keep_file(base.model, folder)
        base.tokenizer.save_pretrained(folder)
