"""A reply as coordinates that can be added up, and what a sum of them says."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fedloom.core.metrics import MIXTURE, PERSONAL, MetricTable, Reduction, checked
from fedloom.core.protocols import ClientError, Payload, Reply
from fedloom.core.randomness import generator
from fedloom.core.schema import Schema
from fedloom.privacy.distributed_noise import share_in_steps
from fedloom.secure.fixed_point import (
    FRACTION,
    Words,
    limbs,
    num_limbs,
    rounded,
    signed,
    unlimbed,
    words,
)

_COUNTS = ("weight", "clipped")
"""What is summed beside the tensors and the metrics: weights, and the entries that were clipped."""


@dataclass(frozen=True)
class Layout:
    """Which coordinate means what: the same for all whose uploads are added up."""

    tensors: Schema
    """Of an upload."""
    support: Payload
    """By group and name, where entries may be other than 0; everywhere where it says nothing."""
    metrics: MetricTable
    """What clients may report."""
    bits: int
    """Of a coordinate's fixed point."""
    clip: float
    """The largest entry of an upload."""
    heaviest: float
    """What no client weighs more than: entries count by their weight's share of it."""

    def __post_init__(self) -> None:
        """Refuse uploads that are no numbers to add up.

        Raises:
            ValueError: naming the tensor, or where there is none.
        """
        if not self.tensors:
            raise ValueError(
                "secure has nothing to add up where clients upload nothing: leave it out"
            )
        for (group, name), (dtype, _) in self.tensors.items():
            if not dtype.is_floating_point:
                kind = str(dtype).removeprefix("torch.")
                raise ValueError(
                    f"secure adds up floating-point numbers, got {kind} in {group}/{name} of an upload"
                )
        if not 0 < self.heaviest < math.inf:
            raise ValueError(f"a secure sum needs weights above 0, got at most {self.heaviest:g}")

    @cached_property
    def size(self) -> int:
        """Return the number of coordinates."""
        wide = len(_COUNTS) + 2 * len(self._names)
        return sum(self._sizes) + wide * num_limbs(self.bits)

    def coordinates(
        self, reply: Reply, *, seed: int, towards_zero: bool, noise: float = 0.0
    ) -> Words:
        """Return (size,) words of a client's reply.

        Args:
            reply: As it would be sent.
            seed: Of what is rounded up and what down.
            towards_zero: Round so that no norm grows.
            noise: Standard deviation of what this client adds to every entry, after all that bounds it; 0: nothing.

        Raises:
            ClientError: where its weight, or a metric, is not what may be added up.
        """
        weight = reply.weight
        if not 0 <= weight <= self.heaviest:
            raise ClientError(
                f"its weight must be from 0 to {self.heaviest:g}, which the server says is the heaviest, got {weight:g}"
            )
        values = torch.cat([self._picked(key, reply) for key in self._keys])
        num_clipped = int((values.abs() > self.clip).sum())
        source = None if towards_zero else generator(seed, "rounding")
        share, clip = weight / self.heaviest, self.clip
        # Clipped before it is weighed.
        steps = rounded(
            values.clamp(-clip, clip).mul_(share), clip=clip, bits=self.bits, source=source
        )
        if noise:
            steps += share_in_steps(len(steps), std=noise * 2.0**self.bits / clip)
        reported = Reduction(self.metrics)
        try:
            reported.add(checked(reply.metrics, measured=False, table=self.metrics))
            sums = reported.parts()
            if unknown := sums.keys() - {*self._names}:
                raise ValueError(f"it reports {min(unknown)}, which is none of a training")
            nothing = (0.0, 0.0)
            wide = [part for name in self._names for part in sums.get(name, nothing)]
            numbers = [limbs(value, self.bits) for value in (weight, float(num_clipped), *wide)]
        except ValueError as error:
            raise ClientError(f"its reply cannot be added up: {error}") from error
        return words(torch.cat([steps, torch.tensor(numbers, dtype=torch.int64).flatten()]))

    def read(self, total: Words, number_bits: int, *, client: str, count: int) -> tuple[Reply, int]:
        """Return the mean of so many replies as one reply, and how many entries were clipped.

        Args:
            total: (size,), the sum.
            number_bits: R.
            client: In whose name it stands.
            count: How many replies are in it.

        Raises:
            ValueError: where no such replies add up to it.
        """
        sums = signed(total, number_bits)
        entries = sum(self._sizes)
        steps, numbers = sums[:entries], sums[entries:]
        weight, num_clipped, *wide = (
            unlimbed(part, self.bits) for part in numbers.view(-1, num_limbs(self.bits))
        )
        # Each weight is a whole number of the smallest steps of a wide number.
        most = count * (self.heaviest + 2.0**-FRACTION)
        if not (0 <= weight <= most and 0 <= num_clipped <= count * entries):
            raise ValueError(
                f"what was added up is no sum of {count} replies: its weight is {weight:g} of at most {most:g}, and"
                f" {num_clipped:g} entries were cut"
            )
        scale = self.clip * 2.0**-self.bits * self.heaviest
        means = steps.double().mul_(scale / weight if weight else 0.0)
        upload: dict[str, dict[str, Tensor]] = {}
        for key, values in zip(self._keys, torch.split(means, self._sizes), strict=True):
            upload.setdefault(key[0], {})[key[1]] = self._placed(key, values)
        parts = zip(self._names, zip(wide[::2], wide[1::2], strict=True), strict=True)
        reported = Reduction.of({name: part for name, part in parts if part[1]}, self.metrics)
        return Reply(client, upload, weight, reported.result(), count=count), int(num_clipped)

    @cached_property
    def _keys(self) -> Sequence[tuple[str, str]]:
        return sorted(self.tensors)

    @cached_property
    def _names(self) -> Sequence[str]:
        own = [name for name in self.metrics.reported() if not name.startswith(MIXTURE)]
        return sorted([*own, *(PERSONAL + name for name in own)])

    @cached_property
    def _sizes(self) -> list[int]:
        """Return how many entries of each tensor are coordinates."""
        return [self._size(key) for key in self._keys]

    def _size(self, key: tuple[str, str]) -> int:
        where = self._where(key)
        return self.tensors[key][1].numel() if where is None else int(where.sum())

    def _where(self, key: tuple[str, str]) -> Tensor | None:
        group: Mapping[str, Tensor] = self.support.get(key[0], {})
        return group.get(key[1])

    def _picked(self, key: tuple[str, str], reply: Reply) -> Tensor:
        tensor, where = reply.upload[key[0]][key[1]], self._where(key)
        if where is None:
            return tensor.double().flatten()
        if bool(tensor[~where].any()):
            raise ClientError(
                f"{'/'.join(key)} of its upload has entries where the cohort's common mask has none"
            )
        return tensor[where].double()

    def _placed(self, key: tuple[str, str], values: Tensor) -> Tensor:
        (dtype, shape), where = self.tensors[key], self._where(key)
        if where is None:
            return values.view(shape).to(dtype)
        return torch.zeros(shape, dtype=dtype).masked_scatter_(where, values.to(dtype))
