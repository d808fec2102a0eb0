"""GGUF files: a whole model as transformers saved it, and a LoRA for llama.cpp's `--lora`."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedloom.core.files import PART
from fedloom.models.gguf_config import add_config
from fedloom.models.gguf_names import HEAD, GgufNames
from fedloom.models.gguf_tokenizer import add_tokenizer
from fedloom.models.hf_logging import quiet
from fedloom.models.lora_folder import LoraFactors

if TYPE_CHECKING:
    from gguf import GGUFReader

GgufType = Literal["f32", "f16", "q8_0"]
"""Of matrices; vectors are float32 whatever this says."""
_OF_THE_FILE = ("GGUF.", "split.", "quantize.", "general.quantization_version", "general.file_type")
"""Keys of a source that tell of its tensors, not of its model."""
_LARGEST_F16 = 65504.0


@dataclass(frozen=True)
class _Entry:
    """A tensor of the file, made when it is its turn."""

    name: str
    shape: tuple[int, ...]
    type: Any
    """gguf's."""
    make: Callable[[], NDArray[Any]]


def write_model_gguf(
    folder: Path, file: Path, *, type: GgufType, name: str, source: Path | None = None
) -> None:
    """Write a model as one GGUF file, a tensor in memory at a time.

    Args:
        folder: As `save_pretrained` wrote model and tokenizer.
        file: To write; whole or absent.
        type: Of matrices; those whose rows are no multiple of 32 are f16 in a file of q8_0.
        name: What the file calls the model, where there is no source.
        source: The GGUF file the base model came from, whose metadata, tokenizer and chat template are taken over.

    Raises:
        ValueError: where the architecture or the tokenizer is none that is written here, or a number does not fit.
    """
    from gguf import GGUFReader, GGUFWriter, LlamaFileType
    from transformers import AutoConfig

    names = GgufNames.of(AutoConfig.from_pretrained(folder))
    saved = _saved(folder, names)
    writer, more = GGUFWriter(None, names.architecture), list[_Entry]()
    entries = [_entry(names, tensor, held, type) for tensor, held in saved.items()]
    known = {entry.name for entry in entries}
    with quiet():
        if source is None:
            writer.add_type("model")
            writer.add_name(name)
            more = [_plain(n, _array(t)) for n, t in add_config(writer, names).items()]
            add_tokenizer(writer, folder, saved["model.embed_tokens.weight"].shape[0])
        else:
            reader = GGUFReader(source)
            _take_over(writer, reader)
            # Tensors that transformers computes, such as factors of rotary positions.
            more = [_copied(tensor) for tensor in reader.tensors if tensor.name not in known]
    kind = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}[type]
    writer.add_file_type(LlamaFileType[kind])
    writer.add_quantization_version(2)
    _write(writer, entries + more, file)


def write_lora_gguf(lora: LoraFactors, model_config: Any, file: Path) -> None:
    """Write a LoRA as a GGUF file for llama.cpp's `--lora`, in float32.

    Args:
        lora: What it adds.
        model_config: transformers' configuration of the base model.
        file: To write; whole or absent.

    Raises:
        ValueError: where llama.cpp has no such model, or adapts another tensor of it.
    """
    from gguf import GGUFWriter

    names = GgufNames.of(model_config)
    entries = []
    for layer, (a, b) in lora.layers.items():
        weight = f"{layer}.weight"
        if weight == HEAD and names.is_tied:
            raise ValueError(
                "llama.cpp has no head to adapt where it is the embedding (lm_head): export the whole model, with --for"
                " merged or --for gguf"
            )
        name = names.of_tensor(weight)
        rows = names.laid_out(weight, b)
        entries += [_plain(f"{name}.lora_a", _array(a)), _plain(f"{name}.lora_b", _array(rows))]
    writer = GGUFWriter(None, names.architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", lora.alpha)
    _write(writer, entries, file)


@dataclass(frozen=True)
class _Held:
    """A tensor in a file of safetensors."""

    file: Path
    name: str
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        from safetensors import safe_open

        with safe_open(self.file, "pt") as opened:
            tensor: Tensor = opened.get_tensor(self.name)
        return tensor.float()


def _saved(folder: Path, names: GgufNames) -> dict[str, _Held]:
    """Return the tensors of a saved model by name; a head that is the embedding is none."""
    from safetensors import safe_open

    found: dict[str, _Held] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # it is no mapping
                shape = tuple(opened.get_slice(name).get_shape())
                found[name] = _Held(file, name, shape)
    if names.is_tied:
        found.pop(HEAD, None)
    return found


def _entry(names: GgufNames, name: str, held: _Held, type: GgufType) -> _Entry:
    """Return a tensor of the model as the file has it."""
    from gguf import GGMLQuantizationType as Type
    from gguf import quantize

    kind = Type[type.upper()] if len(held.shape) > 1 else Type.F32
    if kind == Type.Q8_0 and held.shape[-1] % 32:
        kind = Type.F16

    def make() -> NDArray[Any]:
        array = _array(names.laid_out(name, held.read()))
        if kind == Type.F16 and np.abs(array).max(initial=0) > _LARGEST_F16:
            raise ValueError(f"{name} holds numbers that f16 has not: export with --type f32")
        return quantize(array, kind)

    return _Entry(names.of_tensor(name), held.shape, kind, make)


def _plain(name: str, array: NDArray[np.float32]) -> _Entry:
    from gguf import GGMLQuantizationType

    return _Entry(name, array.shape, GGMLQuantizationType.F32, lambda: array)


def _copied(tensor: Any) -> _Entry:
    """Return a tensor of the source as it is."""
    shape = tuple(int(size) for size in reversed(tensor.shape))
    return _Entry(tensor.name, shape, tensor.tensor_type, lambda: tensor.data)


def _array(tensor: Tensor) -> NDArray[np.float32]:
    return np.ascontiguousarray(tensor.float().cpu().numpy())


def _take_over(writer: Any, reader: "GGUFReader") -> None:
    """Add what a file says of its model, its tokenizer and its template."""
    from gguf import GGUFValueType

    for key, field in reader.fields.items():
        if key.startswith(_OF_THE_FILE) or key == "general.architecture":
            continue
        kind, value = field.types[0], field.contents()
        is_list = kind == GGUFValueType.ARRAY
        if value is None or (is_list and not value):
            continue
        writer.add_key_value(key, value, kind, sub_type=field.types[-1] if is_list else None)


def _write(writer: Any, entries: list[_Entry], file: Path) -> None:
    """Write header and tensors; the file is there when all went well, and only then."""
    from gguf import quant_shape_to_byte_shape

    for entry in entries:
        packed = quant_shape_to_byte_shape(entry.shape, entry.type)
        size = int(np.prod(packed))
        writer.add_tensor_info(entry.name, packed, np.dtype(np.uint8), size, raw_dtype=entry.type)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + PART)
    try:
        try:
            writer.write_header_to_file(part)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for entry in entries:
                writer.write_tensor_data(entry.make())
        finally:
            writer.close()
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
