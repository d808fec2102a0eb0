"""The header of a GGUF file: what it says of itself, and whether it is a whole language model."""

import mmap
import re
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32
"""Of the tensors, where a file does not say."""
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # fmt: skip
"""Types of values -> struct's letters."""
_SPLIT = re.compile(r"-\d{5}-of-(\d{5})\.gguf$", re.I)
_NO_TOKENIZER = (None, "", "none", "no_vocab")


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What stands before the weights."""

    values: Mapping[str, str | int | float]
    """By key; of a list, how long it is."""
    parameters: Mapping[str, int]
    """Type of tensors -> parameters held in it."""
    num_bytes: int
    """That the file must have."""

    @property
    def architecture(self) -> str:
        """The name that llama.cpp has for this kind of model."""
        return str(self.values.get("general.architecture", ""))

    @property
    def num_parameters(self) -> int:
        """Of all tensors."""
        return sum(self.parameters.values())

    def described(self) -> str:
        """Return what the file holds, the type of most parameters first."""
        types = sorted(self.parameters, key=lambda name: -self.parameters[name])
        return (
            f"{self.architecture}, {self.num_parameters:,} parameters as {types[0]}"
            f"{' with ' + ', '.join(types[1:]) if types[1:] else ''}"
        )


def read_header(file: Path, name: str) -> GgufHeader:
    """Return the header of a file that holds a whole language model with its tokenizer.

    Args:
        file: The GGUF file.
        name: As the recipe gives it.

    Raises:
        ValueError: saying what the file is instead, or what of it is missing.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        if opened.read(4) != _MAGIC:
            raise ValueError(
                f"model.name {name} is no GGUF file: give a file that ends in .gguf, a folder with a"
                " config.json or a Hub id"
            )
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                header = _parse(data, name)
            except (struct.error, UnicodeDecodeError, OverflowError) as error:
                raise ValueError(
                    f"model.name {name} ends or is damaged within its header: get the file again"
                ) from error
    _check(header, file, name)
    if size < header.num_bytes:
        raise ValueError(
            f"model.name {name} is truncated: it has {size:,} of {header.num_bytes:,} bytes; get the file again"
        )
    return header


def _check(header: GgufHeader, file: Path, name: str) -> None:
    """Refuse what is no language model by itself."""
    split = _SPLIT.search(file.name)
    parts = int(split[1]) if split else header.values.get("split.count", 1)
    if parts != 1:
        raise ValueError(
            f"model.name {name} is one of {parts} parts of a split GGUF: join them with"
            " `llama-gguf-split --merge FIRST_PART WHOLE.gguf`, and give that file"
        )
    kind = str(header.values.get("general.type", "model"))
    if kind != "model" or header.architecture in ("", "clip"):
        holds = kind if kind != "model" else header.architecture or "no architecture"
        raise ValueError(
            f"model.name {name} is a GGUF of no language model ({holds}): give the file of the model itself"
        )
    named, tokens = (header.values.get(f"tokenizer.ggml.{key}") for key in ("model", "tokens"))
    if named in _NO_TOKENIZER or not isinstance(tokens, int) or not tokens:
        raise ValueError(
            f"model.name {name} holds no tokenizer: give a GGUF with one, or a folder of safetensors with its"
            " tokenizer beside them"
        )
    if not header.num_parameters:
        raise ValueError(
            f"model.name {name} holds a tokenizer and no weights: give the GGUF of the whole model"
        )


class _Cursor:
    """Reads values one after another; past the end is struct.error."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def take(self, letters: str) -> tuple[int | float, ...]:
        layout = struct.Struct("<" + letters)
        found = layout.unpack_from(self.data, self.at)
        self.at += layout.size
        return found

    def number(self, letter: str) -> int:
        return int(self.take(letter)[0])

    def text(self) -> str:
        length = self.number("Q")
        raw = self.data[self.at : self.at + length]
        if len(raw) < length:
            raise struct.error("past the end")
        self.at += length
        return raw.decode()

    def value(self) -> str | int | float:
        """Return a value, or of a list its length."""
        kind = self.number("I")
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.take(self._letter(kind))[0]
        kind, count = self.number("I"), self.number("Q")
        if kind == _STRING:
            for _ in range(count):
                length = self.number("Q")  # which moves on too
                self.at += length
        else:
            self.at += count * struct.calcsize("<" + self._letter(kind))
        return count

    @staticmethod
    def _letter(kind: int) -> str:
        if kind not in _SCALARS:
            raise struct.error(f"a value of type {kind}")
        return _SCALARS[kind]


def _parse(data: mmap.mmap, name: str) -> GgufHeader:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    cursor = _Cursor(data)
    cursor.at = len(_MAGIC)
    version = cursor.number("I")
    if version not in _VERSIONS:
        raise ValueError(
            f"model.name {name} is a GGUF of version {version}, and versions {' and '.join(map(str, _VERSIONS))} are"
            " read (little-endian): convert the model again"
        )
    num_tensors, num_values = cursor.number("Q"), cursor.number("Q")
    values = {cursor.text(): cursor.value() for _ in range(num_values)}
    parameters: Counter[str] = Counter()
    end = 0
    for _ in range(num_tensors):
        tensor, count = cursor.text(), 1
        for size in cursor.take(f"{cursor.number('I')}Q"):
            count *= int(size)
        kind, offset = cursor.number("I"), cursor.number("Q")
        if kind not in {known.value for known in GGMLQuantizationType}:
            raise ValueError(
                f"model.name {name} holds {tensor} as type {kind}, which the package gguf here does not know: install a"
                " newer one, or give another quantisation of the model"
            )
        block, width = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        parameters[GGMLQuantizationType(kind).name] += count
        end = max(end, offset + count // block * width)
    alignment = values.get("general.alignment")
    alignment = alignment if isinstance(alignment, int) and alignment > 0 else _ALIGNMENT
    start = -(-cursor.at // alignment) * alignment
    return GgufHeader(values, dict(parameters), start + end)
