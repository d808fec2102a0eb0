"""Ways to hold a frozen weight in few bits: what is stored of it, and the weight that stands for.

NF4 with double quantisation is that of QLoRA: Efficient Finetuning of Quantized LLMs. Dettmers, Pagnoni, Holtzman,
Zettlemoyer, NeurIPS 2023 (arXiv:2305.14314), section 3, through bitsandbytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

Quantization = Literal["nf4", "int8", "int4"]
_TINY = torch.finfo(torch.float32).tiny


class Scheme(Protocol):
    """One way; a frozen value."""

    @property
    def name(self) -> str:
        """Return what recipes call it."""
        ...

    @property
    def package(self) -> str:
        """Return the package that packs, or nothing."""
        ...

    def __str__(self) -> str:
        """Return its name and its settings, in 16 characters at most, which is what messages show."""
        ...

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """Return integers called `weight`, and what they are multiplied by, of (out, in) float32 on the CPU."""
        ...

    def unpack(
        self, packed: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        """Return the weight that is stored, fresh, of `shape` (out, in)."""
        ...


@dataclass(frozen=True, slots=True)
class Int8:
    """Whole numbers from -127 to 127 with a scale a row, 8 bits a weight."""

    name = "int8"
    package = ""

    def __str__(self) -> str:
        return "int8 by row"

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        scale = weight.abs().amax(1).clamp(min=_TINY) / 127
        return {"weight": (weight / scale[:, None]).round().to(torch.int8), "scale": scale}

    def unpack(
        self, packed: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        wide = packed["weight"].to(torch.promote_types(dtype, torch.float32))
        return wide.mul_(packed["scale"][:, None]).to(dtype)


@dataclass(frozen=True, slots=True)
class Int4:
    """Whole numbers from -7 to 7 with a scale a block, 4.5 bits a weight."""

    block: int = 64
    """Weights that share a scale, side by side; an even number."""

    name = "int4"
    package = ""

    def __str__(self) -> str:
        return f"int4/{self.block}"

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        blocks = pad(weight.flatten(), (0, -weight.numel() % self.block)).view(-1, self.block)
        scale = blocks.abs().amax(1).clamp(min=_TINY) / 7
        levels = (blocks / scale[:, None]).round().add_(8).to(torch.uint8)
        # A byte holds two weights half a block apart, so that each half is written in one piece.
        first, second = levels.chunk(2, dim=1)
        return {"weight": first | (second << 4), "scale": scale}

    def unpack(
        self, packed: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        scale = packed["scale"]
        pairs = packed["weight"].view(len(scale), -1)
        wide = torch.promote_types(dtype, torch.float32)
        blocks = torch.empty(len(scale), self.block, dtype=wide, device=scale.device)
        first, second = blocks.chunk(2, dim=1)
        first.copy_(pairs & 15)
        second.copy_(pairs >> 4)
        blocks.sub_(8).mul_(scale[:, None])
        return blocks.flatten()[: shape[0] * shape[1]].view(shape).to(dtype)


@dataclass(frozen=True, slots=True)
class NF4:
    """Quantiles of the normal distribution times a magnitude a block, 4.13 bits a weight."""

    block: int = 64
    """Weights that share a magnitude, side by side."""
    double: bool = True
    """Whether magnitudes are held in 8 bits themselves, in blocks of 256."""

    name = "nf4"
    package = "bitsandbytes"

    def __str__(self) -> str:
        return f"nf4/{self.block}" + (" double" if self.double else "")

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        levels, state = bitsandbytes().quantize_4bit(
            weight, blocksize=self.block, compress_statistics=self.double, quant_type="nf4"
        )
        packed = {"weight": levels, "absmax": state.absmax}
        if self.double:
            packed |= {"absmax_scale": state.state2.absmax, "absmax_mean": state.offset.view(1)}
        return packed

    def unpack(
        self, packed: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        known = dtype if dtype in (torch.float32, torch.bfloat16, torch.float16) else torch.float32
        state = self.state(packed, shape, known)
        levels = packed["weight"].view(-1, 1)
        found: Tensor = bitsandbytes().dequantize_4bit(levels, state)
        return found.to(dtype)

    def state(
        self, packed: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> Any:
        """Return what bitsandbytes calls the state of a quantised weight."""
        library, magnitudes, beside = bitsandbytes(), packed["absmax"], dict[str, Any]()
        if self.double:
            nested = library.QuantState(
                absmax=packed["absmax_scale"],
                code=_dynamic_map(magnitudes.device),
                blocksize=256,
                dtype=torch.float32,
            )
            beside = {"offset": packed["absmax_mean"][0], "state2": nested}
        return library.QuantState(
            absmax=magnitudes,
            shape=torch.Size(shape),
            dtype=dtype,
            blocksize=self.block,
            quant_type="nf4",
            **beside,
        )

    def serialised(
        self, packed: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> Mapping[str, Tensor]:
        """Return what a folder holds beside a packed weight, as bitsandbytes names it; the weight is used in `dtype`."""
        state = self.state(packed, shape, dtype)
        _, of_anything = bitsandbytes().quantize_4bit(torch.zeros(self.block), quant_type="nf4")
        state.code = of_anything.code
        held: Mapping[str, Tensor] = state.to("cpu") or state.as_dict(packed=True)
        return held


SCHEMES: Mapping[str, Scheme] = {"nf4": NF4(), "int8": Int8(), "int4": Int4()}


@cache
def bitsandbytes() -> Any:
    """Return its functions.

    Raises:
        ValueError: where it is not installed.
    """
    try:
        import bitsandbytes.functional as functional
    except ImportError as error:
        raise ValueError(
            "model.quantize nf4 needs the package bitsandbytes: pip install 'fedloom[quant]', or take int8 or int4"
        ) from error
    return functional


@cache
def _dynamic_map(device: torch.device) -> Tensor:
    """Return the 256 numbers that magnitudes in 8 bits stand for."""
    numbers: Tensor = bitsandbytes().create_dynamic_map().to(device)
    return numbers


def identity_of(scheme: Scheme) -> Mapping[str, str]:
    """Return what both sides must have in common to read packed weights alike, see `spaces.handshake`."""
    of_package = {scheme.package: version(scheme.package)} if scheme.package else {}
    return {"quantize": str(scheme), **of_package}
