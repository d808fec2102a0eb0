"""DeComFL, BAFFLE and FeedSign: in a round everybody walks along the same directions.

Achieving Dimension-Free Communication in Federated Learning via Zeroth-Order Optimization. Li, Ying,
Liu, Dong, Yang, ICLR 2025 (arXiv:2405.15861), Algorithm 1: DeComFL. Clients send the scalar of every
step, the server the mean scalars, so that a direction is judged by the whole cohort.

Does Federated Learning Really Need Backpropagation? Feng, Pang, Du, Chen, Yan, Lin 2023
(arXiv:2301.12195): BAFFLE, with `at_start`. All directions are measured at the model of the round;
`local.lr` is the paper's divided by the number of directions.

FeedSign: Robust Full-parameter Federated Fine-tuning of Large Models with Extremely Low
Communication Overhead of One Bit. Cai, Chen, Zhu 2025 (arXiv:2501.17610): `votes`. A client sends
the sign of its scalar, a bit, and the model moves by the majority's; the step is the server's
`lr`, and a tie moves nothing. A round is one step, since the next begins where the vote led; of
`steps` more than one all are measured at the start.

Deviations: directions come from the K of the seed space, so that a client is sent K coefficients,
always, and never replays what it missed. DeComFL's code has forward differences too, BAFFLE's a
guided optimizer; here they are the recipe's, `local` and `server`. FeedSign sends the votes of one
step down as a bit; it has no word for a skipped step, which votes against its direction.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Self

import torch

from fedloom.core.bitpacking import pack, unpack
from fedloom.core.description import FILLED, Description, RecipeView
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
from fedloom.core.randomness import derive
from fedloom.core.seed_sequences import COEFFICIENTS as NAME
from fedloom.core.seed_sequences import landed, pace, uniform_seeds, widened
from fedloom.server.optimizers import SGD, Moments, ServerOptimizer


@dataclass(frozen=True)
class DeComFLState:
    """The coefficients, and what their optimizer remembers."""

    params: Params
    moments: Moments


@dataclass(frozen=True, slots=True)
class DeComFL:
    """Clients measure along one seed sequence; the server takes it by their mean, or by their majority."""

    server: ServerOptimizer = SGD()
    """How the server steps along the mean move; with `votes` along one of -1, 0 or 1 a direction."""
    weighting: Literal["examples", "uniform"] = "uniform"
    """Whether clients count by their training examples or alike."""
    steps: int = 1
    """Directions of a round, `local.directions` of them a step."""
    at_start: bool = False
    """Measure all of them at the model that was sent; False: each where the last one led."""
    votes: bool = False
    """Send signs instead of scalars; measured at the start."""
    added_up: bool = field(default=False, metadata=FILLED)
    """Whether votes travel as numbers, as `secure` adds them up."""

    def __post_init__(self) -> None:
        if self.weighting not in ("examples", "uniform"):
            allowed = "examples or uniform"
            raise ValueError(f"decomfl.weighting must be {allowed}, got {self.weighting!r}")
        if self.steps < 1:
            raise ValueError(f"decomfl.steps must be at least 1, got {self.steps}")
        if self.at_start and self.votes:
            raise ValueError("decomfl.at_start has no effect beside decomfl.votes: leave it out")

    @property
    def server_sees(self) -> Sees:
        return "each" if self.votes and not self.added_up else "mean"

    def describe(self, state: DeComFLState | None) -> Description:
        return Description(
            steps="decomfl.steps", current="the whole cohort measures along the seeds of one round"
        )

    def check(self, recipe: RecipeView, *, num_clients: int | None) -> Self:
        added_up = self.votes and recipe.secure is not None
        return self if added_up == self.added_up else replace(self, added_up=added_up)

    def init(self, params: Params, seed: int) -> DeComFLState:
        if NAME not in params:
            raise ValueError(f"decomfl needs tune: seeds, got {next(iter(params))} to tune")
        if len(params) > 1:
            raise ValueError("decomfl needs local.weight_decay 0, which no scalar tells of")
        return DeComFLState(params, self.server.init(params))

    def broadcast(self, state: DeComFLState, round: Round) -> Mapping[ClientId, Payload]:
        params = {name: tensor.float() for name, tensor in state.params.items()}
        seed = torch.tensor(self._seed(round))
        return to_all(round, {"params": params, "walk": {"seed": seed}})

    def client_update(self, task: Task, client_state: Payload) -> ClientUpdate:
        start = widened(task.download["params"])
        sequence = uniform_seeds(
            int(task.download["walk"]["seed"]), self.steps, start[NAME].numel()
        )
        done = yield Fit(
            start, seed_sequence={NAME: sequence}, at_start=self.at_start or self.votes
        )
        weight = done.num_examples if self.weighting == "examples" else 1.0
        scalars = done.record["scalars"][NAME]
        if self.added_up:
            votes = torch.where(scalars < 0, 1.0, -1.0).float()
            return Reply(task.client, {"votes": {NAME: votes}}, weight), {}
        if self.votes:  # and nothing else: metrics would be longer than they are
            return Reply(task.client, {"votes": {NAME: pack(scalars < 0, 2)}}, weight), {}
        moves = -pace(sub(done.params, start), sequence, scalars) * scalars
        return Reply(task.client, {"moves": {NAME: moves.float()}}, weight, done.metrics), {}

    def deployed(self, download: Payload, client_state: Payload) -> Params:
        return widened(download["params"])

    def server_update(
        self, state: DeComFLState, round: Round, replies: Iterable[Reply]
    ) -> tuple[DeComFLState, Metrics]:
        def read(reply: Reply) -> Reply:
            if not self.votes:
                moves = reply.upload["moves"][NAME].double()
            elif self.added_up:
                moves = reply.upload["votes"][NAME].double()
            else:
                moves = 2 * unpack(reply.upload["votes"][NAME], 2, self.steps).double() - 1
            return replace(reply, upload={"moves": {NAME: moves}})

        mean = mean_upload(map(read, replies))["moves"][NAME]
        moves = mean.sign() if self.votes else mean
        num_seeds = state.params[NAME].numel()
        sequence = uniform_seeds(self._seed(round), self.steps, num_seeds)
        delta = {NAME: landed(sequence, moves, num_seeds)}
        params, moments = self.server.step(state.params, delta, state.moments)
        agreed = {"agreement": float(mean.abs().mean())} if self.votes else {}
        return DeComFLState(params, moments), agreed

    def _seed(self, round: Round) -> int:
        return derive(round.seed, "walk")
