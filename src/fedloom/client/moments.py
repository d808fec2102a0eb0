"""How an optimizer's moments are held from one step to the next: in full, or in fewer bits.

Nearest rounding would stop a second moment, which a step at beta 0.999 changes by less than half a unit. So what is between
two numbers goes to either, by a fixed pattern that is right on average over the steps (Weyl's sequence). Nothing is drawn:
lanes side by side hold what each holds alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

BLOCK = 128
"""Entries of a lane that share one scale."""
WINDOW = 1 << 20
"""Entries of a lane that are in full at a time; a multiple of BLOCK."""
_COLUMN, _STEP = 2654435769, 1779033703
"""Fractions of 2^32: that of the golden ratio, and that of the root of two."""
_TOP = torch.finfo(torch.float8_e4m3fn).max
_LEAST = torch.finfo(torch.float8_e4m3fn).smallest_normal / 8


class Held(Protocol):
    """One moment of all lanes, in tensors whose first dimension is lanes."""

    @property
    def window(self) -> int | None:
        """Return how many entries of a lane are read at a time; None: all."""
        ...

    def zeros(self, values: Tensor) -> list[Tensor]:
        """Return a moment of zeros for (lanes, numel) values."""
        ...

    def read(self, parts: Sequence[Tensor], like: Tensor, first: int) -> Tensor:
        """Return the moment beside `like`, a (lanes, n) window of values that begins with entry `first`."""
        ...

    def write_(self, parts: Sequence[Tensor], moment: Tensor, first: int, step: int) -> None:
        """Keep a window of the moment after a lane's so many steps."""
        ...


@dataclass(frozen=True, slots=True)
class InFull:
    """As it is computed: changed in place."""

    window: None = None

    def zeros(self, values: Tensor) -> list[Tensor]:
        """Return zeros of the values' type."""
        return [torch.zeros_like(values)]

    def read(self, parts: Sequence[Tensor], like: Tensor, first: int) -> Tensor:
        """Return the tensor itself."""
        return parts[0][:, first : first + like.shape[1]]

    def write_(self, parts: Sequence[Tensor], moment: Tensor, first: int, step: int) -> None:
        """Do nothing: it was changed in place."""


@dataclass(frozen=True, slots=True)
class InBfloat16:
    """2 bytes an entry."""

    window: int = WINDOW

    def zeros(self, values: Tensor) -> list[Tensor]:
        """Return bfloat16 zeros."""
        return [torch.zeros_like(values, dtype=torch.bfloat16)]

    def read(self, parts: Sequence[Tensor], like: Tensor, first: int) -> Tensor:
        """Widen."""
        return parts[0][:, first : first + like.shape[1]].to(like.dtype, copy=True)

    def write_(self, parts: Sequence[Tensor], moment: Tensor, first: int, step: int) -> None:
        """Round up or down."""
        whole = _rounded(moment.float(), first, step, bits=16)
        parts[0][:, first : first + moment.shape[1]] = whole.bfloat16()


@dataclass(frozen=True, slots=True)
class InFloat8:
    """E4M3 with a scale for each BLOCK entries, 1.03 bytes an entry."""

    is_square: bool = False
    """Whether its root is kept, which a divisor has to be: never rounded to zero."""
    window: int = WINDOW

    def zeros(self, values: Tensor) -> list[Tensor]:
        """Return zeros, whole blocks of them, and their scales."""
        lanes, size = values.shape
        blocks = -(-size // BLOCK)
        # As bytes, which every kernel can index.
        codes = torch.zeros(lanes, blocks * BLOCK, dtype=torch.uint8, device=values.device)
        return [codes, torch.zeros(lanes, blocks, dtype=torch.float32, device=values.device)]

    def read(self, parts: Sequence[Tensor], like: Tensor, first: int) -> Tensor:
        """Widen, and multiply by the scales."""
        codes, scales = parts[0][:, first : first + self.window], parts[1]
        small = codes.contiguous().view(torch.float8_e4m3fn).float()
        rows = small.view(len(codes), -1, BLOCK) * self._of(scales, first)[..., None]
        found = rows.flatten(1)[:, : like.shape[1]].to(like.dtype)
        return found.square_() if self.is_square else found

    def write_(self, parts: Sequence[Tensor], moment: Tensor, first: int, step: int) -> None:
        """Divide by the largest of each block, and round up or down."""
        held = moment.sqrt().float() if self.is_square else moment.float()
        held = torch.nn.functional.pad(held, (0, -held.shape[1] % BLOCK))
        rows = held.view(len(held), -1, BLOCK)
        scales = rows.abs().amax(2) / _TOP
        small = rows / torch.where(scales == 0, 1.0, scales)[..., None]
        rounded = _rounded(small.flatten(1), first, step, bits=20).clamp_(-_TOP, _TOP)
        if self.is_square:
            rounded = torch.where(held > 0, rounded.clamp(min=_LEAST), rounded)
        codes = rounded.to(torch.float8_e4m3fn).view(torch.uint8)
        parts[0][:, first : first + self.window] = codes
        self._of(parts[1], first).copy_(scales)

    def _of(self, scales: Tensor, first: int) -> Tensor:
        return scales[:, first // BLOCK : (first + self.window) // BLOCK]


def _rounded(values: Tensor, first: int, step: int, *, bits: int) -> Tensor:
    """Return float32 numbers without their last bits, up or down by the pattern of their column and step."""
    columns = torch.arange(first, first + values.shape[1], device=values.device)
    pattern = (columns * _COLUMN + step * _STEP) & 0xFFFFFFFF
    up = (pattern >> (32 - bits)).to(torch.int32)
    # The bits of a magnitude are in its order, whatever its sign.
    return ((values.contiguous().view(torch.int32) + up) & -(1 << bits)).view(torch.float32)


def held(kind: str, *, is_square: bool) -> Held:
    """Return how a moment is held under the setting `local.moments`."""
    if kind == "float8":
        return InFloat8(is_square)
    return InBfloat16() if kind == "bfloat16" else InFull()
