"""Hyper-parameters of clients found while one model is trained, by any algorithm.

Federated Hyperparameter Tuning: Challenges, Baselines, and Connections to Weight-Sharing (FedEx). Khodak, Tu, Li, Li, Balcan,
Smith, Talwalkar, NeurIPS 2021 (arXiv:2106.04502), Algorithm 2. Every client draws an arm, a setting of its training, by chances
that all share, trains the shared model so and reports its validation loss; the server makes arms by which that fell less
likely, by exponentiated gradient. FedEx-LoRA (`fedlora`) is another method.

Deviations: the baseline is the round's own mean score, in the first round whatever is chosen: the code of FederatedScope
(arXiv:2204.05011) begins at 0, so that an arm which alone was drawn becomes less likely however good it is. `baseline: past` is
the paper's mean of earlier rounds, which after a round that went wrong calls every arm good. A score is the loss after training
over that before it, as clients differ in how hard their text is; `score: loss` is the paper's. Chances have a floor, without which
one client divides by nearly nothing; a score beyond 10, or not finite, counts 10. Arms are multiples of the recipe's rates, so
that its schedule holds, in one list. What the server does is no arm: `fedloom tune` searches that.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Generic, Self, get_args

import torch

from fedloom.core.arms import Arm, ArmRule, Chances, ScoreKind, Told, believed, drawn, scored, tried
from fedloom.core.description import Description, RecipeView, describe
from fedloom.core.payloads import once_each
from fedloom.core.protocols import (
    Algorithm,
    ClientId,
    ClientUpdate,
    Metrics,
    Params,
    Payload,
    Profile,
    Reply,
    Round,
    Sees,
    State,
    Task,
)
from fedloom.core.seed_sequences import COEFFICIENTS
from fedloom.core.wrapper import Enclosing, Wrapper, check_unmeasured, layers

MOST_ARMS = 16
_GROUP = "fedex"


@dataclass(frozen=True)
class FedExState(Generic[State]):
    """The inner state, and what is known of the arms."""

    inner: State
    known: Chances
    """Of everybody, or of a tier that nobody has told of."""
    tiers: Mapping[str, Chances] = field(default_factory=dict)
    """Of each tier, where they have their own."""


@dataclass(frozen=True, slots=True)
class FedEx(Enclosing[State]):
    """Lets every client train by one of several settings, and finds out which is best."""

    inner: Algorithm[State]
    """Trains."""
    arms: tuple[Arm, ...]
    """Two to sixteen settings, such as `[{lr: 0.1}, {lr: 1.0}, {lr: 10.0, steps: 5}]`."""
    score: ScoreKind = "ratio"
    """What is to become small: validation loss after training over that before, less it, or alone, as in the paper."""
    rule: ArmRule = ArmRule()
    """How chances follow from scores."""
    by_tier: bool = False
    """Whether each of `data.tiers` has chances of its own."""

    def __post_init__(self) -> None:
        if not 2 <= len(self.arms) <= MOST_ARMS:
            raise ValueError(f"fedex.arms must be 2 to {MOST_ARMS} settings, got {len(self.arms)}")
        if len({*self.arms}) < len(self.arms):
            raise ValueError("fedex.arms must be different settings, got one of them twice")
        if self.score not in get_args(ScoreKind):
            raise ValueError(f"fedex.score must be ratio, difference or loss, got {self.score!r}")
        if self.rule.settled >= (most := math.log(len(self.arms))):
            raise ValueError(
                f"fedex.rule.settled must be below {most:.3f}, the entropy of {len(self.arms)} arms that are as likely, got"
                f" {self.rule.settled}"
            )
        if self.inner.server_sees == "noisy mean":
            raise ValueError("fedex cannot wrap a private algorithm: no noise covers scores")
        if any(isinstance(layer, FedEx) for layer in layers(self.inner)):
            raise ValueError("fedex cannot be in itself: give one of them all arms")
        check_unmeasured(self.inner, "fedex lets clients of a round train by different settings")

    @property
    def server_sees(self) -> Sees:
        return "each" if self.inner.server_sees == "mean" else self.inner.server_sees

    def describe(self, state: FedExState[State] | None) -> Description:
        return replace(Wrapper.describe(self, state), averages_deltas=False)

    def check(self, recipe: RecipeView, *, num_clients: int | None) -> Self:
        found = Wrapper.check(self, recipe, num_clients=num_clients)
        inner = describe(found.inner)
        if inner.slices:
            raise ValueError(
                "fedex measures what a client trained, which of a smaller rank is no model of its own: leave"
                " tune.lora.ranks, side and fedlora.prune out"
            )
        if inner.steps and any(arm.steps for arm in self.arms):
            raise ValueError(
                f"fedex.arms: steps have no effect beside {inner.steps}: leave them out"
            )
        if not recipe.local.weight_decay and any(arm.weight_decay != 1 for arm in self.arms):
            raise ValueError(
                "fedex.arms: weight_decay has no effect where local.weight_decay is 0: set that, or leave it out"
            )
        if not recipe.data.fractions[1]:
            raise ValueError(
                "fedex goes by validation loss, but data.fractions leaves no validation data: give the second share more"
                " than 0"
            )
        if self.by_tier and not recipe.data.tiers:
            raise ValueError("fedex.by_tier has no effect without data.tiers: set them")
        return found

    def init(self, params: Params, seed: int) -> FedExState[State]:
        if COEFFICIENTS in params and any(arm.rates != (1, 1) for arm in self.arms):
            raise ValueError(
                "fedex.arms: lr and weight_decay need adapters or weights to be tuned, got tune: seeds"
            )
        return FedExState(self.inner.init(params, seed), Chances.alike(len(self.arms)))

    def broadcast(self, state: FedExState[State], round: Round) -> Mapping[ClientId, Payload]:
        tiers = sorted({self._tier(profile) for profile in round.population.values()})
        places = {c: float(tiers.index(self._tier(p))) for c, p in round.population.items()}

        def beside(payload: Payload, at: float) -> Payload:
            known = self._known(state, tiers[int(at)])
            return {**payload, _GROUP: {"chances": self.rule.drawn_by(known)}}

        return once_each(self.inner.broadcast(state.inner, round), places.__getitem__, beside)

    def client_update(self, task: Task, client_state: Payload) -> ClientUpdate:
        at = drawn(task.download[_GROUP]["chances"], task.seed)
        own = replace(task, download=_without(task.download))
        before = self.inner.deployed(own.download, client_state)
        half = self.inner.client_update(own, client_state)
        reply, new_state, after = yield from tried(self.arms[at], half)
        score, count = yield from scored(self.score, before, after)
        numbers = {"score": score, "num_examples": float(count)}
        told = {n: torch.tensor(value, dtype=torch.float64) for n, value in numbers.items()}
        upload = {**reply.upload, _GROUP: {"arm": torch.tensor(at), **told}}
        return replace(reply, upload=upload), new_state

    def deployed(self, download: Payload, client_state: Payload) -> Params:
        return self.inner.deployed(_without(download), client_state)

    def mask(self, download: Payload) -> Params | None:
        return Wrapper.mask(self, _without(download))

    def server_update(
        self, state: FedExState[State], round: Round, replies: Iterable[Reply]
    ) -> tuple[FedExState[State], Metrics]:
        told: dict[str, list[Told]] = {}

        def plain() -> Iterator[Reply]:
            for reply in replies:
                own = reply.upload[_GROUP]
                arm, profile = int(own["arm"]), round.population.get(reply.client, {})
                # As elsewhere, no client weighs more than the examples it declared.
                most = float(profile.get("num_examples", math.inf))
                weight = min(float(own["num_examples"]), most)
                if 0 <= arm < len(self.arms) and 0 < weight < math.inf:
                    one = (arm, believed(float(own["score"])), weight)
                    told.setdefault(self._tier(profile), []).append(one)
                yield replace(reply, upload=_without(reply.upload))

        inner, metrics = self.inner.server_update(state.inner, round, plain())
        found = {t: self.rule.after(self._known(state, t), each) for t, each in told.items()}
        after = replace(state, inner=inner, tiers={**state.tiers, **found})
        if not self.by_tier:
            after = replace(state, inner=inner, known=found.get("", state.known))
        return after, {**metrics, **self._metrics(after)}

    def _metrics(self, state: FedExState[State]) -> Metrics:
        told = dict[str, float]()
        for tier, known in ({**state.tiers} if self.by_tier else {"": state.known}).items():
            where = f"{tier}/" if tier else ""
            chances = self.rule.drawn_by(known).tolist()
            told |= {f"{where}arm_{k}": chance for k, chance in enumerate(chances, 1)}
            told[f"{where}arm_entropy"] = known.entropy
        return told

    def _tier(self, profile: Profile) -> str:
        return profile.get("tier", "") if self.by_tier else ""

    def _known(self, state: FedExState[State], tier: str) -> Chances:
        return state.tiers.get(tier, state.known)


def _without(payload: Payload) -> Payload:
    return {group: params for group, params in payload.items() if group != _GROUP}
