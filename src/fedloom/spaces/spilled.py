"""A vector in a file of its own: it takes memory only where a copy passes through."""

import mmap
import sys
import tempfile
from collections.abc import Iterator

import torch
from torch import Tensor

STRETCH = 1 << 24
"""Bytes in memory at a time; a multiple of every page size."""


class SpilledVector:
    """A vector of zeros in a temporary file without a name, which goes with this object."""

    def __init__(self, numel: int, dtype: torch.dtype) -> None:
        num_bytes = max(1, numel * dtype.itemsize)
        with tempfile.TemporaryFile() as file:
            file.truncate(num_bytes)
            self._map = mmap.mmap(file.fileno(), num_bytes)
        self._values = torch.frombuffer(self._map, dtype=dtype, count=numel)

    @classmethod
    def of(cls, values: Tensor) -> "SpilledVector":
        """Return a copy of a vector."""
        spilled = cls(values.numel(), values.dtype)
        spilled.write(values)
        return spilled

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of the values."""
        return self._values.dtype

    def get(self, here: slice) -> Tensor:
        """Return a copy of a stretch."""
        found = self._values[here].clone()
        self._let_go(here)
        return found

    def put(self, here: slice, values: Tensor) -> None:
        """Keep a stretch's values, of any type."""
        self._values[here].copy_(values)
        self._let_go(here)

    def write(self, values: Tensor) -> None:
        """Keep these values, of the same type and number."""
        for here in self.stretches():
            self.put(here, values[here])

    def read(self, out: Tensor) -> Tensor:
        """Copy what is kept into a vector of any type, and return that."""
        for here in self.stretches():
            out[here].copy_(self._values[here])
            self._let_go(here)
        return out

    def stretches(self) -> Iterator[slice]:
        """Yield the parts of the vector that are in memory at a time."""
        step = STRETCH // self._values.element_size()
        for first in range(0, len(self._values), step):
            yield slice(first, min(first + step, len(self._values)))

    def bytes_of(self, here: slice) -> memoryview:
        """Return the bytes of a stretch."""
        size = self._values.element_size()
        return memoryview(self._map)[here.start * size : here.stop * size]

    def _let_go(self, here: slice) -> None:
        # The file keeps what is written; the pages only stop counting as this process's memory.
        if sys.platform != "win32":
            size = self._values.element_size()
            start = here.start * size // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, start, here.stop * size - start)
