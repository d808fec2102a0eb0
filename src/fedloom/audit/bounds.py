"""What guesses at secret coins prove of a mechanism: a lower bound on its epsilon, from one run.

Privacy Auditing with One (1) Training Run. Steinke, Nasr, Jagielski, NeurIPS 2023 (arXiv:2305.08846), Theorem 5.2 and
Corollary 5.4: each of m canaries is in or out by a fair coin of its own; of r canaries the auditor guesses the coin, of the
others it says nothing. Under (epsilon, delta)-differential privacy, in which neighbours differ by one canary more or less,

    P[c or more are right] <= P[B >= c] + 2 m delta max_i P[c > B >= c - i] / i,   B ~ Binomial(r, e^epsilon / (1 + e^epsilon)),

so that every epsilon for which this is at most alpha is refuted with confidence 1 - alpha.

Deviation: `best_guesses` tries several r on the same scores and divides alpha by their number, which is valid; the paper's
experiments report the best of them without that.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

ALPHA = 0.05
"""Chance that a lower bound is too high."""
SHARES = (1.0, 0.5, 0.25)
"""Of the canaries that are guessed."""
_LARGEST = 64.0
"""Bounds end here: with any number of guesses that fits into a run they are far below."""


@dataclass(frozen=True, slots=True)
class Guesses:
    """What came of guessing, and what it proves."""

    canaries: int
    guesses: int
    correct: int
    delta: float
    alpha: float
    """Chance that `epsilon_low` is too high, all choices of `guesses` together."""
    epsilon_low: float
    """The mechanism is not (epsilon, delta)-private for any smaller epsilon; 0 where nothing is proved."""
    most: float
    """The bound had every guess been right: no more can be proved with so many canaries."""

    def text(self) -> str:
        """Return it in words."""
        proved = (
            f"epsilon is at least {self.epsilon_low:.2f}"
            if self.epsilon_low
            else "nothing is proved of epsilon"
        )
        return (
            f"{self.correct} of {self.guesses} guesses at {self.canaries} canaries are right, so that {proved} with"
            f" confidence {1 - self.alpha:.0%} (at most {self.most:.2f} can be, with so many)"
        )


def promised(epsilon: float, found: Guesses) -> str:
    """Return what an accountant says beside what is proved, in words."""
    if math.isinf(epsilon):
        return "no noise is added, so nothing is promised"
    said = f"the accountant says {epsilon:.2f} at delta {found.delta:g}"
    if found.epsilon_low <= epsilon:
        return f"{said}, which stands"
    return f"{said}, which is refuted: the mechanism is broken"


def p_value(canaries: int, guesses: int, correct: int, *, epsilon: float, delta: float) -> float:
    """Return the largest chance of so many correct guesses that an (epsilon, delta)-private mechanism allows."""
    from scipy.stats import binom

    right = 1 / (1 + math.exp(-epsilon))
    tail = float(binom.sf(correct - 1, guesses, right))
    if delta:
        steepest = within = 0.0
        # scipy is asked once for all: P[B = c - 1], P[B = c - 2], ...
        for i, mass in enumerate(binom.pmf(range(correct - 1, -1, -1), guesses, right), 1):
            within += float(mass)
            steepest = max(steepest, within / i)
        tail += 2 * canaries * delta * steepest
    return min(tail, 1.0)


@lru_cache(maxsize=1024)
def epsilon_low(
    canaries: int, guesses: int, correct: int, *, delta: float = 0.0, alpha: float = ALPHA
) -> float:
    """Return the largest epsilon that the guesses refute with confidence 1 - alpha, to 1e-6 and from below; 0 if none.

    Args:
        canaries: m, each in or out by a fair coin.
        guesses: r, how many coins were guessed.
        correct: c, how many of these guesses were right.
        delta: Of the claim that is examined.
        alpha: Chance that the bound is too high.

    Raises:
        ValueError: for counts that cannot be, or a chance that is none.
    """
    if not 0 <= correct <= guesses <= canaries:
        raise ValueError(
            "correct guesses, guesses and canaries must be 0 <= correct <= guesses <= canaries, got"
            f" {correct}, {guesses} and {canaries}"
        )
    if not 0 <= delta < 1 or not 0 < alpha < 1:
        raise ValueError(
            f"delta must be in [0, 1) and alpha in (0, 1), got delta {delta} and alpha {alpha}"
        )

    def refuted(epsilon: float) -> bool:
        return p_value(canaries, guesses, correct, epsilon=epsilon, delta=delta) <= alpha

    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while high < _LARGEST and refuted(high):
        low, high = high, 2 * high
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def best_guesses(
    scores: Sequence[float],
    coins: Sequence[bool],
    *,
    delta: float,
    alpha: float = ALPHA,
    shares: Sequence[float] = SHARES,
) -> Guesses:
    """Guess the coins of the canaries with the highest scores as in and of as many lowest ones as out.

    Args:
        scores: One a canary, high for those that seem to be in.
        coins: Whether each was in.
        delta: Of the claim that is examined.
        alpha: Chance that the bound is too high, divided by the number of shares.
        shares: Of the canaries to be guessed, tried in turn; the best bound stays.

    Raises:
        ValueError: where there are fewer than two canaries, or not a score for each.
    """
    if len(scores) != len(coins) or len(scores) < 2:
        raise ValueError(
            f"guessing needs at least 2 canaries with a score each, got {len(coins)} and {len(scores)} scores"
        )
    # Equal scores stay in the order of the canaries, which says nothing of their coins.
    order = sorted(range(len(scores)), key=lambda i: scores[i])
    each = alpha / len(shares)
    found = list[Guesses]()
    for share in shares:
        half = max(1, int(share * len(order) / 2))
        said_out, said_in = order[:half], order[len(order) - half :]
        correct = sum(not coins[i] for i in said_out) + sum(bool(coins[i]) for i in said_in)
        counts = (len(order), 2 * half, correct)
        low, most = (
            epsilon_low(len(order), 2 * half, right, delta=delta, alpha=each)
            for right in (correct, 2 * half)
        )
        found.append(Guesses(*counts, delta, alpha, low, most))
    return max(found, key=lambda one: one.epsilon_low)
