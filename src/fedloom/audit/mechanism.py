"""Whether `private` keeps what its accountant says: the mechanism itself, asked by users made to be seen.

Privacy Auditing with One (1) Training Run. Steinke, Nasr, Jagielski, NeurIPS 2023 (arXiv:2305.08846), whose gradient canaries
are examples with a gradient of one coordinate; One-shot Empirical Privacy Estimation for Federated Learning. Andrew, Kairouz,
Oh, Oprea, McMahan, Suriyakumar, ICLR 2024 (arXiv:2302.03098), who let whole users push along fixed directions.

Every canary is a user whose upload is far above the clip along a direction of its own, and is in or out by a coin. `Private`
itself, with all of its sampling, clipping on both sides, sums and noise, makes the noisy means of all rounds, around an
algorithm that trains nothing; what is guessed from is the inner product of their sum with each direction. No training blurs
that, so little is lost between what the mechanism gives away and what is found.

A direction has one coordinate in each of `TENSORS` tensors, with signs that take turns: noise that is too small in any tensor,
a clip for each tensor, and noise that tensors share, are all on the way of some canary.

Deviations: directions are coordinates, not drawn from a sphere, so that canaries are exactly orthogonal and only noise hides
one; epsilon is bounded by the theorem on guesses, which needs no assumption, not from a Gaussian fit to the scores.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from fedloom.algorithms.private import Private, PrivateState
from fedloom.audit.bounds import Guesses, best_guesses, promised
from fedloom.audit.findings import Finding
from fedloom.audit.records import Case
from fedloom.core.params import add, sub
from fedloom.core.payloads import to_all
from fedloom.core.protocols import (
    ClientId,
    ClientUpdate,
    Metrics,
    Params,
    Payload,
    Profile,
    Reply,
    Round,
    Sees,
    Task,
)
from fedloom.core.randomness import derive, generator
from fedloom.core.rehearsal import play
from fedloom.core.wrapper import layers
from fedloom.privacy.accountant import calibrate

CANARIES = 200
"""Enough to prove an epsilon of 3 to 4, where nothing hides them."""
TENSORS = 16
"""Even, so that the signs of a direction cancel; as many as a small adapter has."""
_FAR = 10.0
"""Norm of a canary's upload, in clips: a clip that does not hold shows."""
_FEWEST = 4
"""Canaries, of which a repeated round has half to guess."""
_OF_CLIENTS = "private.noise is distributed, so that clients add it within secure sums, which a whole run alone has"


@dataclass(frozen=True, slots=True)
class Promise:
    """Examines what the run's own settings of `private` promise, over as many rounds as it has."""

    title: str = "whether private's noise is worth its epsilon"
    assumes: str = (
        "whoever attacks sees every model of the run, and puts users into it whose uploads point wherever they like; nobody"
        " else takes part, which hides them less than a run does"
    )
    of_uploads: bool = False
    rounds: int = 20
    """The most rounds that are made; their noise is that of the whole run."""

    def silent(self, case: Case) -> str | None:
        private = _private(case)
        if private is None:
            return "the recipe has no algorithm private, so nothing is promised"
        if private.terms.distributed:
            return f"{_OF_CLIENTS}: ask for --attack canary"
        if most_canaries(private.delta) < _FEWEST:
            return f"a promise with a delta of {private.delta:g} is one to too few clients to examine it by"
        return None

    def findings(self, case: Case) -> Iterator[Finding]:
        private = _private(case)
        assert private is not None
        planned = private.rounds or case.recipe.run.rounds
        known = replace(private, noise_seed=derive(case.seed, "mechanism"), rounds=planned)
        rate = case.recipe.cohort.rate(len(case.session.learners))
        rounds = min(self.rounds, case.recipe.run.rounds)
        for view, repeated in (("models", False), ("models, rounds repeated", True)):
            found = audit_mechanism(
                known,
                rate=rate,
                rounds=rounds,
                seed=case.seed,
                canaries=most_canaries(private.delta),
                repeated=repeated,
            )
            measure, value = "epsilon proved", found.guesses.epsilon_low
            says = f"{found.releases} noisy means: {found.guesses.text()}; {found.text()}"
            yield Finding("promise", case.space, case.link, view, measure, value, 0.0, says)


def _private(case: Case) -> Private[Any] | None:
    """Return the layer of the run's algorithm that adds noise."""
    found = (layer for layer in layers(case.recipe.algorithm) if isinstance(layer, Private))
    return next(found, None)


@dataclass(frozen=True, slots=True)
class MechanismAudit:
    """What canaries found, beside what is promised."""

    guesses: Guesses
    epsilon: float
    """What the accountant says of the same releases; infinite without noise."""
    releases: int
    """Noisy means, those of repeated rounds among them."""

    @property
    def holds(self) -> bool:
        """Return whether what is proved is within what is promised."""
        return self.guesses.epsilon_low <= self.epsilon

    def text(self) -> str:
        """Return what is promised, and whether that is refuted."""
        return promised(self.epsilon, self.guesses)


def audit_mechanism(
    private: Private[Any],
    *,
    rate: float,
    rounds: int,
    seed: int,
    canaries: int = CANARIES,
    repeated: bool = False,
) -> MechanismAudit:
    """Release the noisy means of canaries, guess who was in, and bound epsilon from below.

    Args:
        private: Whose settings are examined; what is within it does not take part.
        rate: Chance of a client to be in a round's cohort, (0, 1].
        rounds: How many noisy means there are.
        seed: Of the coins; cohorts and noise come from the mechanism's own key.
        canaries: How many users, half of them in by chance.
        repeated: Every round is made twice, as by a server that lost what it had written, the second time without every
            other canary; these are guessed from the differences.

    Raises:
        ValueError: where delta is no promise to so many users, or where clients add the noise.
    """
    if private.terms.distributed:
        raise ValueError(_OF_CLIENTS)
    if repeated and private.epsilon is not None:
        # A budget would refuse the second of two means, which is how it is kept; here both are looked at.
        total = private.rounds or rounds
        z = calibrate(private.epsilon, private.delta, rate=rate, rounds=total)
        private = replace(private, epsilon=None, noise_multiplier=z)
    names = [f"canary-{i:04}" for i in range(canaries)]
    numbers = {name: i for i, name in enumerate(names)}
    tossed = torch.rand(canaries, generator=generator(seed, "coins"))
    coins = [bool(coin) for coin in tossed < 0.5]
    in_run = frozenset(name for name, coin in zip(names, coins, strict=True) if coin)
    norm = _FAR * private.clip if math.isfinite(private.clip) else 1.0
    examined = replace(private, inner=_Canaries(canaries, norm), rounds=private.rounds or rounds)
    state = examined.init({name: torch.ones(canaries) for name in _tensors()}, seed)
    population: Mapping[ClientId, Profile] = {name: {} for name in names}
    seen: Params = {}
    for number in range(1, rounds + 1):
        round = Round(number, derive(seed, number), population, (), rate)
        before = state
        state, mean = _release(examined, before, round, in_run)
        if repeated:
            again = examined.charge(before, examined.released(state))
            missing = frozenset(names[::2])
            state, other = _release(examined, again, round, in_run - missing)
            mean = sub(mean, other)
        seen = add(seen, mean) if seen else mean
    scores = [_score(seen, numbers[name]) for name in names]
    step = 2 if repeated else 1
    return MechanismAudit(
        best_guesses(scores[::step], coins[::step], delta=private.delta),
        state.mechanism.ledger.epsilon(private.delta),
        len(state.mechanism.released),
    )


def most_canaries(delta: float) -> int:
    """Return how many canaries a promise with this delta can be examined by: it has to be below one in so many."""
    return min(CANARIES, math.ceil(1 / delta) - 1)


@dataclass(frozen=True)
class _Seen:
    """The last noisy mean, which is all that anybody sees."""

    mean: Params
    params: Params
    """What is downloaded: nowhere zero, so that `noise_on: support` keeps all of it."""


@dataclass(frozen=True, slots=True)
class _Canaries:
    """Every client pushes along a direction of its own; the server keeps the mean as it comes."""

    server_sees: ClassVar[Sees] = "mean"

    count: int
    norm: float

    def init(self, params: Params, seed: int) -> _Seen:
        return _Seen({}, params)

    def broadcast(self, state: _Seen, round: Round) -> Mapping[ClientId, Payload]:
        return to_all(round, {"params": state.params})

    def client_update(self, task: Task, client_state: Payload) -> ClientUpdate:
        yield from ()
        pushed = _direction(_number(task.client), self.count, self.norm)
        return Reply(task.client, {"delta": pushed}), client_state

    def deployed(self, download: Payload, client_state: Payload) -> Params:
        return download["params"]

    def server_update(
        self, state: _Seen, round: Round, replies: Iterable[Reply]
    ) -> tuple[_Seen, Metrics]:
        (reply,) = replies
        return replace(state, mean=reply.upload["delta"]), {}


def _release(
    private: Private[_Seen],
    state: PrivateState[_Seen],
    round: Round,
    in_run: frozenset[ClientId],
) -> tuple[PrivateState[_Seen], Params]:
    """Return the state after a round in which these clients answer where they are asked, and its noisy mean."""

    def replies() -> Iterator[Reply]:
        for client, download in private.broadcast(state, round).items():
            if client in in_run:
                task = Task("train", round.number, client, 0, {}, download)
                yield play(private.client_update(task, {}), task)

    after, _ = private.server_update(state, round, replies())
    return after, after.inner.mean


def _tensors() -> list[str]:
    return [f"layer.{i}" for i in range(TENSORS)]


def _number(client: ClientId) -> int:
    return int(client.rpartition("-")[2])


def _direction(number: int, count: int, norm: float) -> Params:
    made = dict[str, torch.Tensor]()
    for i, name in enumerate(_tensors()):
        made[name] = torch.zeros(count, dtype=torch.float64)
        made[name][number] = (-1) ** i * norm / math.sqrt(TENSORS)
    return made


def _score(seen: Params, number: int) -> float:
    """Return the inner product with a canary's direction."""
    return math.fsum((-1.0) ** i * float(seen[name][number]) for i, name in enumerate(_tensors()))
