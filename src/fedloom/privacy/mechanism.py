"""Noisy means: who is in one, how much noise it carries, and how its clip moves on."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from fedloom.core.payloads import NoReplies
from fedloom.core.protocols import ClientId, Metrics, Params, Payload, Round
from fedloom.privacy.accountant import Ledger
from fedloom.privacy.clipping import NoisySum, clipped, within
from fedloom.privacy.noise import normals, uniforms

SIGNAL = "private"
"""The group beside the algorithm's own: down the clip, up whether the norm was below it."""

_CLIP_LR = 0.2
"""eta_C of Andrew et al., the same in all their experiments."""


@dataclass(frozen=True, slots=True)
class Mechanism:
    """Where a run of noisy means stands."""

    key: bytes = field(repr=False)
    """Of cohorts and noise; secret."""
    clip: float
    """C: largest joint norm of an upload."""
    noise_multiplier: float | None
    """z: standard deviation of the noise on the sum, in units of C; None until it is calibrated."""
    ledger: Ledger = Ledger()

    def cohort(self, round: Round) -> tuple[ClientId, ...]:
        """Return who takes part: everybody on their own, with chance round.rate."""
        clients = sorted(round.population)
        draws = uniforms(self.key, "cohort", round.number, count=len(clients))
        return tuple(c for c, draw in zip(clients, draws, strict=True) if draw < round.rate)

    def release(
        self,
        uploads: Iterable[Payload],
        round: Round,
        *,
        kept: Params,
        quantile: float | None,
        nobodys: Callable[[], Payload],
    ) -> tuple[Payload, "Mechanism", Metrics]:
        """Return a noisy mean of clipped uploads, the mechanism after it, and what may be told of it.

        Args:
            uploads: Of those that replied; clipped again.
            round: Says how many were expected, by which the sum is divided.
            kept: Where uploads and noise may be, by name; everywhere for other names.
            quantile: Of the clients' norms, for the clip to follow; None keeps it.
            nobodys: Makes an upload of the right shape: the mean of nobody is noise.

        Raises:
            NoReplies: without noise, where nobody replied.
        """
        expected, z = round.rate * len(round.population), self.noise_multiplier or 0.0
        total, num_replies, num_below = NoisySum(), 0, 0
        for upload in uploads:
            numbers = {group: params for group, params in upload.items() if group != SIGNAL}
            total.add(clipped(within(numbers, kept), self.clip)[0])
            num_replies += 1
            num_below += quantile is not None and bool(upload[SIGNAL]["below"])
        if not num_replies:
            if not z:
                raise NoReplies("no client replied")
            total.add(clipped(nobodys(), 0.0)[0])
        # Andrew et al., theorem 1: bits less a half have sensitivity 1/2, and share z with the sum.
        bit_std = max(expected / 20, z) if z and quantile is not None else 0.0
        shared = z / math.sqrt(1 - (z / (2 * bit_std)) ** 2) if bit_std else z
        std = shared * self.clip if z else 0.0
        mean = total.mean(expected, std=std, key=self.key, round=round.number, kept=kept)
        told = {"clip": self.clip, "noise_std": std / expected}
        after = replace(self, ledger=self.ledger.spend(round.rate, z))
        if quantile is None:
            return mean, after, told
        noise = bit_std * float(normals(self.key, "bits", round.number, shape=(1,)))
        share = 0.5 + (num_below - num_replies / 2 + noise) / expected
        clip = self.clip * math.exp(-_CLIP_LR * (share - quantile))
        return mean, replace(after, clip=clip), {**told, "below_clip": share}
