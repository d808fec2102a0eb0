"""An emulator beside any algorithm, which the server moves towards the layers it stands in for (FedBiOT).

FedBiOT: LLM Local Fine-tuning in Federated Learning without Full Model. Wu, Li, Li, Ding, Gao, KDD 2024
(arXiv:2406.17706): the lower level trains the adapters at clients, on their data, the upper level the emulator at the
server, on public data. Distillation before training alone, `steps: 0`, is that of Offsite-Tuning (Xiao, Lin, Han 2023,
arXiv:2302.04870).

The inner algorithm knows what learns of the first and last layers alone: its state, client state and uploads hold nothing
else. The emulator's factors travel in every download, and are masked in a client's work. Gradients of the emulator's distance
from the whole model come from outside, as no algorithm sees a model: see `rounds.emulation`.

Deviations: the pull to the download is `fedavg.mu` of the inner algorithm, on the tensors that train, where the paper
pulls products of factors (and its code, whose term has no gradient, nothing); KL is that of the distributions, averaged
over the tokens that are asked for, where the code offers a mean difference of log-likelihoods that may be negative.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self, get_args

from fedloom.core.description import FILLED, RecipeView, check
from fedloom.core.emulation import Distance, HasEmulator, Match
from fedloom.core.params import scale
from fedloom.core.protocols import Algorithm, Params, State
from fedloom.core.split import Frozen, SplitState
from fedloom.server.optimizers import AdamW, Moments, ServerOptimizer
from fedloom.server.public import PublicText


@dataclass(frozen=True)
class FedBiOTState(SplitState[State]):
    """The inner state, the emulator's factors, and what the optimizer of their alignment remembers."""

    moments: Moments


@dataclass(frozen=True, slots=True)
class FedBiOT(Frozen[State]):
    """Sends an emulator along, and moves it at the server between rounds; the first of the list."""

    inner: Algorithm[State]
    """Trains the adapters."""
    public: PublicText
    """What the emulator is aligned on; refused where a client holds a row of it."""
    before: int = 50
    """Steps before round 1."""
    steps: int = 10
    """Steps after every round; 0 aligns before the first alone."""
    batch_size: int = 8
    """Public rows of a step."""
    optimizer: ServerOptimizer = AdamW(1e-3, weight_decay=0.0)
    """How a step goes; what it remembers lasts from round to round."""
    match: Match = "l2"
    """How states behind the middle are compared: by their squared distance over the whole model's mean square, by their
    angle, or by the first at every layer that is kept."""
    hidden: float = 1.0
    """Weight of that."""
    kd: float = 1.0
    """Weight of the KL divergence of the emulator's next tokens from the whole model's."""
    temperature: float = 1.0
    """That both are softened by."""
    left: int = field(default=0, metadata=FILLED)
    """tune.offsite.left"""
    right: int = field(default=0, metadata=FILLED)
    """tune.offsite.right"""

    def __post_init__(self) -> None:
        for name, value, least in (
            ("before", self.before, 0),
            ("steps", self.steps, 0),
            ("batch_size", self.batch_size, 1),
        ):
            if value < least:
                raise ValueError(f"fedbiot.{name} must be at least {least}, got {value}")
        if not self.before + self.steps:
            raise ValueError(
                "fedbiot.before or steps must be at least 1: without a step leave fedbiot and tune.offsite.factors out"
            )
        if self.match not in get_args(Match):
            raise ValueError(f"fedbiot.match must be l2, cosine or layers, got {self.match!r}")
        if not (self.hidden >= 0 and self.kd >= 0 and self.hidden + self.kd > 0):
            raise ValueError(
                f"fedbiot.hidden and kd must be weights of which one is above 0, got {self.hidden} and {self.kd}"
            )
        if not self.temperature > 0:
            raise ValueError(f"fedbiot.temperature must be positive, got {self.temperature}")

    def check(self, recipe: RecipeView, *, num_clients: int | None) -> Self:
        shape = recipe.tune.emulator if isinstance(recipe.tune, HasEmulator) else None
        if shape is None or not shape.factors:
            raise ValueError(
                "fedbiot moves the factors of an emulator, of which this recipe has none: set tune to offsite with factors"
            )
        inner = check(self.inner, recipe, num_clients=num_clients)
        return replace(self, inner=inner, left=shape.left, right=shape.right)

    def init(self, params: Params, seed: int) -> FedBiOTState[State]:
        adapters, factors = self.split(params)
        inner = self.inner.init(adapters, seed)
        return FedBiOTState(inner, factors, self.optimizer.init(factors))

    def split(self, params: Params) -> tuple[Params, Params]:
        """Return the tensors of the layers that learn, and the factors of those between them."""
        numbers = {name: _layer(name) for name in params}
        end = max(numbers.values()) + 1 - self.right
        factors = {n: t for n, t in params.items() if self.left <= numbers[n] < end}
        return {n: t for n, t in params.items() if n not in factors}, factors

    @property
    def distance(self) -> Distance:
        return Distance(self.match, self.hidden, self.kd, self.temperature)

    @property
    def text(self) -> Mapping[str, Any]:
        return asdict(self.public)

    def factors(self, state: FedBiOTState[State]) -> Params:
        """Return where the emulator's factors stand."""
        return state.others

    def moved(self, state: FedBiOTState[State], gradient: Params) -> FedBiOTState[State]:
        """Return the state after a step against the gradient of the emulator's distance."""
        factors, moments = self.optimizer.step(state.others, scale(gradient, -1.0), state.moments)
        return replace(state, others=factors, moments=moments)


def _layer(name: str) -> int:
    """Return the number of the layer that a tensor is in: the first in its name."""
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)
