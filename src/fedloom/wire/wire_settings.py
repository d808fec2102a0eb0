"""The recipe section `wire`: what travels, and how precisely."""

from dataclasses import dataclass
from typing import Literal, get_args

ValueType = Literal["float32", "bfloat16", "float16", "fp8", "int8", "nf4", "int4"]
Compression = Literal["none", "zstd"]

MAX_BYTES = 1 << 32
"""How large a decoded payload may be unless the recipe says otherwise."""


@dataclass(frozen=True, slots=True)
class WireSettings:
    """How payloads become bytes, on the network as in process."""

    download: ValueType = "float32"
    """How float32 tensors travel from the server; all other types travel exactly. With scales, fp8 (E4M3) takes 8.125 bits
    an entry, int8 8.25, nf4 (NormalFloat4) and int4 4.25; each block of entries (128, of nf4 64) has its own scale."""
    upload: ValueType = "float32"
    """How float32 tensors travel to the server; all other types travel exactly."""
    compression: Compression = "none"
    """Of whole messages, lossless; `zstd` needs the package zstandard."""
    max_bytes: int = MAX_BYTES
    """Largest decoded payload that is accepted, in bytes."""

    def __post_init__(self) -> None:
        """Refuse what no message can be written with."""
        for field, given in (("download", self.download), ("upload", self.upload)):
            if given not in get_args(ValueType):
                allowed = ", ".join(get_args(ValueType))
                raise ValueError(f"wire.{field} must be one of {allowed}, got {given!r}")
        if self.compression not in get_args(Compression):
            raise ValueError(f"wire.compression must be none or zstd, got {self.compression!r}")
        if self.max_bytes < 1:
            raise ValueError(f"wire.max_bytes must be at least 1, got {self.max_bytes}")
