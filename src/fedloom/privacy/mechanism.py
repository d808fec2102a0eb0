"""Noisy means: who is in one, how much noise it carries, and how its clip moves on.

Noise is a function of a secret key and of what it covers: the round, the sum to the bit, the numbers
of replies and of norms below the clip, the denominator, the standard deviations and the support. That
function is pseudorandom (SHAKE-256 under a key of 256 bits, at a keyed hash of all these, the seal):

- For every input it is a draw of its own, so that each noisy sum is a Gaussian mechanism. Of two that
  differ in anything, be it the last bit, their difference carries the noise of both.
- A server that dies before it sent anything, and gets the same replies, releases the same model.
- The same sum with the same seal is one release, however often it is made: it tells nothing more. With
  another seal it is one release more, also in a round that has one already. `released` holds them by
  seal, so that adding one twice changes nothing, and can be given those of a course that was left.
- Who takes part in a round follows from the key, the round and the client alone, so that a repeat asks
  the same clients. Sums of one round are then not sampled anew, and are counted so: see `Ledger.of`.
- Bits below the clip have noise at the same seal: they and the sum are one query of one client.

What is left: who sees two releases of one round knows that something in it differed, if only who
replied, which no epsilon counts; hence a round is on the disk before it is sent, and is repeated only
where its checkpoint was lost. Two copies of a folder share key, cohorts and, where replies are equal,
models, never noise; each counts what it released itself, and both together have spent what a ledger
of the releases of both says. What the inner server half does with the mean (momentum, masks) follows
from what was released.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from fedloom.core.description import Release
from fedloom.core.params import scale
from fedloom.core.payloads import NoReplies
from fedloom.core.protocols import ClientId, Metrics, Params, Payload, Reply, Round
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
    released: tuple[Release, ...] = ()
    """All noisy sums so far, by round; of later rounds too where a run went back to an older state."""

    @property
    def ledger(self) -> Ledger:
        """Return what all of it together costs."""
        return Ledger.of(self.released)

    def charge(self, releases: Iterable[Release]) -> "Mechanism":
        """Return the mechanism with these releases on its account, those it knows counted once."""
        return replace(self, released=tuple(sorted({*self.released, *releases})))

    def cohort(self, round: Round) -> tuple[ClientId, ...]:
        """Return who takes part: everybody on their own, with chance round.rate."""

        def drawn(client: ClientId) -> bool:
            # Of nobody else: whoever comes or goes, the same clients are asked in a repeat.
            return uniforms(self.key, "cohort", round.number, client, count=1)[0] < round.rate

        return tuple(client for client in sorted(round.population) if drawn(client))

    def release(
        self,
        uploads: Iterable[Payload],
        round: Round,
        *,
        mask: Params,
        quantile: float | None,
        nobodys: Callable[[], Payload],
        sums: Sequence[Reply] = (),
        distributed: bool = False,
    ) -> tuple[Payload, "Mechanism", Metrics]:
        """Return a noisy mean of clipped uploads, the mechanism after it, and its metrics.

        Args:
            uploads: Of those that replied; clipped again.
            round: Says how many were expected, by which the sum is divided.
            mask: Where uploads and noise may be, by name; everywhere for other names.
            quantile: Of the clients' norms, for the clip to follow; None keeps it.
            nobodys: Makes an upload of the right shape: the mean of nobody is noise.
            sums: Means of several uploads each, which nobody has seen and their clients clipped; read after `uploads`.
            distributed: Whether clients have added the noise. A release then counts as one of everybody's: whoever has the
                sums knows who is in them, so that chance hides nobody.

        Raises:
            NoReplies: without noise of its own, where nobody replied.
            ValueError: where clients are to add the noise, and an upload came without any.
        """
        expected, z = round.rate * len(round.population), self.noise_multiplier or 0.0
        total, num_replies, num_below = NoisySum(), 0, 0
        for upload in uploads:
            if distributed:
                raise ValueError(
                    "private.noise distributed is for secure sums, got a client's upload by itself, which has no noise"
                )
            numbers = {group: params for group, params in upload.items() if group != SIGNAL}
            total.add(clipped(within(numbers, mask), self.clip)[0])
            num_replies += 1
            num_below += quantile is not None and bool(upload[SIGNAL]["below"])
        for reply in sums:
            # By the weight that it was divided by, which is its clients' word: so the sum is what they clipped, whatever they say.
            mean, weight = within(reply.upload, mask), reply.weight
            total.add({group: scale(params, weight) for group, params in mean.items()})
            num_replies += reply.count
        if not num_replies:
            if not z or distributed:
                raise NoReplies("no client replied")
            total.add(clipped(nobodys(), 0.0)[0])
        # Andrew et al., theorem 1: bits less a half have sensitivity 1/2, and share z with the sum.
        bit_std = max(expected / 20, z) if z and quantile is not None else 0.0
        shared = z / math.sqrt(1 - (z / (2 * bit_std)) ** 2) if bit_std else z
        std = shared * self.clip if z else 0.0
        counts, widths = (num_replies, num_below, expected), (self.clip, z, std, quantile, bit_std)
        used = (round.number, *counts, *widths)
        seal = total.seal(self.key, used, mask=mask)
        path = ("noise", round.number, seal)
        mean = total.mean(
            expected, std=0.0 if distributed else std, key=self.key, path=path, mask=mask
        )
        metrics = {"clip": self.clip, "noise_std": std / expected}
        after = self.charge([(round.number, seal, 1.0 if distributed else round.rate, z)])
        if quantile is None:
            return mean, after, metrics
        noise = bit_std * float(normals(self.key, "bits", round.number, seal, shape=(1,)))
        share = 0.5 + (num_below - num_replies / 2 + noise) / expected
        clip = self.clip * math.exp(-_CLIP_LR * (share - quantile))
        return mean, replace(after, clip=clip), {**metrics, "below_clip": share}
