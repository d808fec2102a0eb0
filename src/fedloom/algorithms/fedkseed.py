"""FedKSeed and FedKSeed-Pro: full-parameter tuning through K coefficients, w = w_0 + sum_k c_k z_k.

Federated Full-Parameter Tuning of Billion-Sized Language Models with Communication Cost under 18
Kilobytes. Qin, Chen, Qian, Ding, Li, Deng, ICML 2024 (arXiv:2312.06353), Algorithm 1, and Pro with
`sampling: pro`: FedAvg in seed space, with the recipe's local work, zeroth-order. A client sends the
scalar of every step; both know whose, from the task's seed or, not uniform, from the server's draw.

Deviations: the paper sends pairs of seed and scalar, and for Pro all K chances. Coefficients, kept
in float64, travel as float32, which is what clients train from and deploy. Learning rates may have
a schedule: a client says its own. Pro's history is a sum and a count per seed, the same mean, its
code's extra zero included. `power` and `corrected` are not the paper's; the server corrects,
clients walk without. `uploads: delta` sends K numbers, for wrappers.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor

from fedloom.core.bitpacking import pack, unpack
from fedloom.core.description import Description, RecipeView, Seeds
from fedloom.core.params import sub
from fedloom.core.payloads import mean_upload, to_all
from fedloom.core.protocols import (
    ClientId,
    ClientUpdate,
    Fit,
    Metrics,
    Params,
    Payload,
    Reply,
    Round,
    Sees,
    Task,
)
from fedloom.core.randomness import derive, generator
from fedloom.core.seed_sequences import COEFFICIENTS as NAME
from fedloom.core.seed_sequences import landed, pace, uniform_seeds, widened
from fedloom.server.importance import Alike, SeedSampling
from fedloom.server.optimizers import SGD, Moments, ServerOptimizer, rescales


@dataclass(frozen=True)
class FedKSeedState:
    """The coefficients, and what is known of each seed."""

    params: Params
    moments: Moments
    sizes: Tensor
    """(K,) float64: sum of clipped |scalar|; zeros with uniform sampling."""
    draws: Tensor
    """(K,) float64: over how many steps."""


@dataclass(frozen=True, slots=True)
class FedKSeed:
    """Clients walk along seeds; the server adds their scalars up, seed by seed."""

    server: ServerOptimizer = SGD()
    """How the server steps along the mean move."""
    weighting: Literal["examples", "uniform"] = "examples"
    """Whether clients count by their training examples or alike."""
    steps: int = 200
    """Directions a client measures a round, `local.directions` of them a step."""
    sampling: SeedSampling = Alike()
    """How likely each seed is drawn: uniform, pro or power."""
    uploads: Literal["scalars", "delta"] = "scalars"
    """What clients send: a number for each step, or for each of the K seeds."""

    def __post_init__(self) -> None:
        if self.weighting not in ("examples", "uniform"):
            allowed = "examples or uniform"
            raise ValueError(f"fedkseed.weighting must be {allowed}, got {self.weighting!r}")
        if self.steps < 1:
            raise ValueError(f"fedkseed.steps must be at least 1, got {self.steps}")
        if self.uploads not in ("scalars", "delta"):
            raise ValueError(f"fedkseed.uploads must be scalars or delta, got {self.uploads!r}")
        if self.uploads == "delta" and not isinstance(self.sampling, Alike):
            name = type(self.sampling).__name__.lower()
            raise ValueError(f"fedkseed.sampling must be uniform with uploads delta, got {name}")

    @property
    def server_sees(self) -> Sees:
        return "each" if self.uploads == "scalars" else "mean"

    def describe(self, state: FedKSeedState | None) -> Description:
        chances = None if state is None else self.sampling.chances(state.sizes, state.draws)
        seeds = None if chances is None else Seeds(chances)
        alike = isinstance(self.sampling, Alike)
        return Description(
            seeds=seeds,
            steps="fedkseed.steps",
            averages_deltas=self.uploads == "delta",
            rescales=rescales(self.server),
            replays=alike,
            current="" if alike else "its clients draw seeds by chances that every step changes",
        )

    def check(self, recipe: RecipeView, *, num_clients: int | None) -> Self:
        if recipe.secure is not None and self.uploads == "scalars":
            raise ValueError(
                "fedkseed.uploads must be delta with secure, as scalars of steps along clients' own seeds do not add up,"
                " got scalars"
            )
        return self

    def init(self, params: Params, seed: int) -> FedKSeedState:
        if NAME not in params:
            raise ValueError(f"fedkseed needs tune: seeds, got {next(iter(params))} to tune")
        if self.uploads == "scalars" and len(params) > 1:
            raise ValueError("fedkseed.uploads must be delta for local.weight_decay, got scalars")
        nothing = torch.zeros(params[NAME].numel(), dtype=torch.float64)
        return FedKSeedState(params, self.server.init(params), nothing, nothing)

    def broadcast(self, state: FedKSeedState, round: Round) -> Mapping[ClientId, Payload]:
        sent: Payload = {"params": {name: t.float() for name, t in state.params.items()}}
        chances = self.sampling.chances(state.sizes, state.draws)
        if chances is None:
            return to_all(round, sent)
        sequences = {
            c: self._sequence(derive(round.seed, c), chances, len(chances)) for c in round.cohort
        }
        return {c: {**sent, "walk": {NAME: pack(w, len(chances))}} for c, w in sequences.items()}

    def client_update(self, task: Task, client_state: Payload) -> ClientUpdate:
        start = widened(task.download["params"])
        if "walk" in task.download:
            sequence = unpack(task.download["walk"][NAME], start[NAME].numel(), self.steps)
        else:
            sequence = self._sequence(task.seed, None, start[NAME].numel())
        done = yield Fit(start, seed_sequence={NAME: sequence})
        weight = done.num_examples if self.weighting == "examples" else 1.0
        delta = sub(done.params, start)
        if self.uploads == "delta":
            return Reply(task.client, {"delta": delta}, weight, done.metrics), {}
        scalars = done.record["scalars"][NAME]
        lr = torch.tensor(pace(delta, sequence, scalars), dtype=torch.float64)
        upload = {"scalars": {NAME: scalars.float(), "lr": lr}}
        return Reply(task.client, upload, weight, done.metrics), {}

    def deployed(self, download: Payload, client_state: Payload) -> Params:
        return widened(download["params"])

    def server_update(
        self, state: FedKSeedState, round: Round, replies: Iterable[Reply]
    ) -> tuple[FedKSeedState, Metrics]:
        chances = self.sampling.chances(state.sizes, state.draws)
        sizes, draws, num_seeds = state.sizes.clone(), state.draws.clone(), len(state.sizes)

        def added(reply: Reply) -> Reply:
            if chances is not None:
                sequence = self._sequence(derive(round.seed, reply.client), chances, num_seeds)
                scalars = reply.upload["scalars"][NAME].double()
                sizes.index_add_(0, sequence, scalars.abs().clamp(max=self.sampling.clip))
                draws.index_add_(0, sequence, (scalars != 0).double())
            return self.replayed(state, round, reply)

        delta = mean_upload(map(added, replies))["delta"]
        metrics: Metrics = {}
        if chances is not None:
            metrics = {"effective_seeds": 1 / float(chances.square().sum())}
            if self.sampling.corrected:
                delta = {NAME: delta[NAME] / (chances * num_seeds)}
        params, moments = self.server.step(state.params, delta, state.moments)
        return FedKSeedState(params, moments, sizes, draws), metrics

    def replayed(self, state: FedKSeedState, round: Round, reply: Reply) -> Reply:
        if "delta" in reply.upload:
            return reply
        chances, num_seeds = self.sampling.chances(state.sizes, state.draws), len(state.sizes)
        sequence = self._sequence(derive(round.seed, reply.client), chances, num_seeds)
        scalars, lr = reply.upload["scalars"][NAME].double(), reply.upload["scalars"]["lr"]
        return replace(reply, upload={"delta": {NAME: landed(sequence, -lr * scalars, num_seeds)}})

    def _sequence(self, seed: int, chances: Tensor | None, num_seeds: int) -> Tensor:
        """Return the seed sequence of the task of that seed; without chances as its first work would draw it."""
        if chances is None:
            return uniform_seeds(derive(seed, 0), self.steps, num_seeds)
        source = generator(seed, "walk")
        return torch.multinomial(chances, self.steps, replacement=True, generator=source)
