"""What a run promises: its clip, and a budget or the noise itself; and what it asks of the rest of a recipe."""

import math
from dataclasses import dataclass, replace

from fedloom.core.description import MAX_UPDATE_NORM, Privacy, RecipeView
from fedloom.core.distributed_noise import NoiseShares
from fedloom.core.protocols import Metrics, Round
from fedloom.privacy.accountant import calibrate, check_installed
from fedloom.privacy.distributed_noise import check_room, share_of
from fedloom.privacy.mechanism import Mechanism
from fedloom.privacy.noise import secret_key

KNOWN_SEED = (
    "private.noise_seed is set: a known seed gives the noise away, so it protects nobody; leave it out where that is not a"
    " test"
)

OF_SUMS = (
    "It is of the models of all rounds and of the sums that they come from, for one client's updates or none in their place, as"
    " long as no client tells its share of the noise; who took part, metrics, counts and samples are not covered."
)


class BudgetSpent(ValueError):
    """One noisy mean more would be worth more than epsilon; the model so far stays within it."""


@dataclass(frozen=True, slots=True)
class Terms:
    """The settings of `private` that its noise follows from."""

    clip: float
    epsilon: float | None
    delta: float
    noise_multiplier: float | None
    rounds: int | None
    quantile: float | None
    noise: str = "central"
    noise_on: str = "everywhere"

    def __post_init__(self) -> None:
        if (self.epsilon is None) == (self.noise_multiplier is None):
            given = f"epsilon {self.epsilon} and noise_multiplier {self.noise_multiplier}"
            raise ValueError(f"private needs either epsilon or noise_multiplier, got {given}")
        if not self.clip > 0 or (self.noisy and self.clip == math.inf):
            raise ValueError(
                f"private.clip must be a positive number, as noise is a multiple of it, got {self.clip}"
            )
        for name, value, top in (
            ("epsilon", self.epsilon, math.inf),
            ("delta", self.delta, 1),
            ("quantile", self.quantile, 1),
        ):
            if value is not None and not 0 < value < top:
                raise ValueError(f"private.{name} must be above 0 and below {top}, got {value}")
        if self.noise_multiplier is not None and not 0 <= self.noise_multiplier < math.inf:
            raise ValueError(f"private.noise_multiplier must be >= 0, got {self.noise_multiplier}")
        if (on := self.noise_on) not in ("everywhere", "support"):
            raise ValueError(f"private.noise_on must be everywhere or support, got {on!r}")
        if self.noise not in ("central", "distributed"):
            raise ValueError(f"private.noise must be central or distributed, got {self.noise!r}")
        if self.distributed and not (self.noise_multiplier and self.quantile is None):
            raise ValueError(
                "private.noise distributed needs a noise_multiplier above 0, and neither epsilon nor quantile: what a client"
                " adds must follow from the recipe alone, as the server is not trusted with it"
            )
        if self.rounds is not None and self.rounds < 1:
            raise ValueError(f"private.rounds must be at least 1, got {self.rounds}")

    @property
    def distributed(self) -> bool:
        """Return whether clients add the noise, each a share."""
        return self.noise == "distributed"

    def shares(self, threshold: int) -> NoiseShares | None:
        """Return what a client adds in a sum of at least so many; None where it adds nothing."""
        if not (self.distributed and threshold):
            return None
        std = (self.noise_multiplier or 0.0) * self.clip
        return NoiseShares(share_of(std, threshold), self.rounds or 0)

    @property
    def noisy(self) -> bool:
        """Return whether there is anything to count."""
        return self.noise_multiplier != 0

    def promise(self, *, secret: bool, quiet: bool) -> Privacy:
        """Return what may be said of it; nothing is promised without noise, or with a key that is no secret."""
        if not secret:
            return Privacy(self.delta, "noise_seed is set", KNOWN_SEED, quiet)
        if not self.noisy:
            said = "private.noise_multiplier is 0, so no noise is added"
            return Privacy(self.delta, "noise_multiplier is 0", said, quiet)
        return Privacy(self.delta, explanation=OF_SUMS if self.distributed else "", quiet=quiet)

    def over(self, rounds: int) -> int | None:
        """Return over how many of a run's rounds a budget is spread; None where there is no budget.

        Raises:
            ValueError: where there are more than it was planned for.
        """
        if self.epsilon is None and not self.distributed:
            return self.rounds
        # Of the shares that a client adds too: it takes part in no more sums.
        if self.rounds is not None and self.rounds < rounds:
            raise ValueError(
                f"private.rounds must be at least run.rounds ({rounds}), got {self.rounds}"
            )
        return self.rounds or rounds

    def begin(self, noise_seed: int | None) -> Mechanism:
        """Return the mechanism before the first round.

        Raises:
            ValueError: where its epsilon could not be counted, or is for no number of rounds.
        """
        if self.noisy:
            check_installed()
        if self.epsilon is not None and self.rounds is None:
            raise ValueError("private.rounds must say how many rounds private.epsilon is for")
        return Mechanism(secret_key(noise_seed), self.clip, self.noise_multiplier)

    def fund(self, mechanism: Mechanism, round: Round) -> Mechanism:
        """Return the mechanism ready for a round, its noise calibrated if it has none yet.

        Raises:
            ValueError: where delta says nothing of so many clients.
        """
        if self.noisy and not self.delta * len(round.population) < 1:
            raise ValueError(
                f"private.delta must be below 1 / number of clients ({len(round.population)}),"
                f" got {self.delta}"
            )
        if self.epsilon is None or mechanism.noise_multiplier is not None:
            return mechanism
        rounds = self.rounds or 1
        z = calibrate(self.epsilon, self.delta, rate=round.rate, rounds=rounds)
        return replace(mechanism, noise_multiplier=z)

    def settle(self, mechanism: Mechanism, *, secret: bool = True) -> Metrics:
        """Return the epsilon that is spent with what `mechanism` has just released; nothing without noise.

        Args:
            mechanism: After a release.
            secret: Whether its key is one; a known key promises nothing, so that there is no epsilon.

        Raises:
            BudgetSpent: where that is more than was promised; the release must not be sent.
        """
        if not self.noisy:
            return {}
        spent = mechanism.ledger.epsilon(self.delta)
        if self.epsilon is None or spent <= self.epsilon:
            return {"epsilon": spent} if secret else {}
        raise BudgetSpent(
            f"private.epsilon {self.epsilon} is spent after {len(mechanism.released) - 1} noisy means,"
            " those of repeated rounds included: raise it, or plan for more with private.rounds"
        )


def check_sums(terms: Terms, recipe: RecipeView) -> int:
    """Return the fewest clients of a secure sum; 0 where there are no such sums.

    Args:
        terms: Of the noise.
        recipe: That the algorithm is part of.

    Raises:
        ValueError: where the terms and the sums do not go together.
    """
    secure = recipe.secure
    if secure is None:
        if terms.distributed:
            raise ValueError(
                "private.noise distributed is for secure sums, which hide the shares of single clients: add a section secure,"
                " or leave the noise to the server (central)"
            )
        return 0
    if terms.quantile is not None:
        raise ValueError(
            "private.quantile needs to know of single clients whether they were below the clip, which secure sums hide:"
            " leave private.quantile out, or secure"
        )
    if terms.distributed:
        if terms.noise_on != "everywhere":
            raise ValueError(
                f"private.noise_on must be everywhere where noise is distributed, got {terms.noise_on}"
            )
        check_room(
            terms.noise_multiplier or 0.0,
            norm=terms.clip,
            threshold=secure.threshold,
            bits=secure.bits,
            entry=secure.clip,
        )
    return secure.threshold


def check_recipe(recipe: RecipeView, *, quiet: bool) -> None:
    """Refuse what would tell of clients beside the noisy means.

    Args:
        recipe: That the algorithm is part of.
        quiet: Whether its folder is to hold what is covered only.

    Raises:
        ValueError: with the setting, and what it must be.
    """
    run = recipe.run
    if not recipe.cohort.independent:
        raise ValueError(
            "cohort must be poisson for private, whose epsilon holds for clients that are drawn"
            f" each on their own, got {type(recipe.cohort).__name__.lower()}; write for example"
            " `cohort: {poisson: {q: 0.1}}`"
        )
    if run.min_replies:
        raise ValueError(
            "run.min_replies must be 0 for private, as leaving out small rounds tells how many"
            f" clients took part, got {run.min_replies}"
        )
    if run.patience:
        raise ValueError(
            "run.patience must be 0 for private, as clients' held-out data would decide when to"
            f" stop, which no epsilon counts, got {run.patience}"
        )
    if run.max_update_norm != MAX_UPDATE_NORM:
        raise ValueError(
            "run.max_update_norm has no effect beside private, whose clip bounds what a client adds, got"
            f" {run.max_update_norm:g}"
        )
    for name, given, wanted, why in (
        ("run.samples", run.samples, "0", "samples are clients' own text"),
        ("run.baselines", list(run.baselines), "[]", "baselines are not private"),
        ("evaluation.by", recipe.evaluation.by, "null", "few clients may have a label"),
    ):
        if quiet and given:
            raise ValueError(f"{name} must be {wanted} for private.quiet, as {why}, got {given}")
