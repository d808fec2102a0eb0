"""Trains some tensors in one round and others in the next, in any algorithm; RoLoRA by default.

Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA. Chen, Guo, Ju, Dalal, Khisti 2025
(arXiv:2502.01755), Algorithm 1: A in one round, B in the next, so that what is averaged is linear in what is learnt: with
one factor shared by all, the mean of the products is the product of the mean.

Deviations: B goes first. It begins at zero, where A has no gradient, so that a first round of A would move nothing. The
names are the recipe's, in any space; a tensor with none of them is trained in every round.

What rests is no part of a message up: the server half fills in that it did not move. Its optimizer sees that zero, so
that one with a memory (momentum, Adam) goes on moving what rests, and the mean is exact with sgd only.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from fedloom.core.description import Description
from fedloom.core.protocols import (
    Algorithm,
    ClientId,
    ClientUpdate,
    Fit,
    Metrics,
    Params,
    Payload,
    Reply,
    Round,
    State,
    Task,
    Work,
)
from fedloom.core.wrapper import Wrapper, check_unmeasured


@dataclass(frozen=True, slots=True)
class Alternate(Wrapper[State]):
    """Lets tensors take turns: in round t those with `names[(t - 1) % len(names)]` in their name learn."""

    inner: Algorithm[State]
    """Trains."""
    names: tuple[str, ...] = ("lora_B", "lora_A")
    """Parts of the names of tensors, the first turn's first."""

    def __post_init__(self) -> None:
        if len(set(self.names)) < 2 or not all(self.names):
            raise ValueError(
                f"alternate.names must be two or more different parts of names, got {list(self.names)!r}"
            )

        check_unmeasured(self.inner, "alternate lets tensors rest")

    def describe(self, state: State | None) -> Description:
        # Another mean in the place of all would have to leave out the same names.
        inner = Wrapper.describe(self, state).current_only("tensors take turns by the round")
        return replace(inner, takes_turns=True)

    def init(self, params: Params, seed: int) -> State:
        for part in self.names:
            if not any(part in name for name in params):
                raise ValueError(
                    f"alternate.names must be parts of tuned tensors' names, such as {next(iter(params))}, got {part!r}"
                )
        return self.inner.init(params, seed)

    def broadcast(self, state: State, round: Round) -> Mapping[ClientId, Payload]:
        return self.inner.broadcast(state, round)

    def client_update(self, task: Task, client_state: Payload) -> ClientUpdate:
        half = self.inner.client_update(task, client_state)
        try:
            work = next(half)
            while True:
                work = half.send((yield self._in_turn(work, task.round)))
        except StopIteration as stop:
            reply, new_state = stop.value
        if "delta" not in reply.upload:
            return reply, new_state
        moved = {n: t for n, t in reply.upload["delta"].items() if self._learns(n, task.round)}
        return replace(reply, upload={**reply.upload, "delta": moved}), new_state

    def deployed(self, download: Payload, client_state: Payload) -> Params:
        return self.inner.deployed(download, client_state)

    def server_update(
        self, state: State, round: Round, replies: Iterable[Reply]
    ) -> tuple[State, Metrics]:
        # To everybody: a reply may stand for the whole cohort, or for an empty one.
        everybody = replace(round, cohort=tuple(round.population))
        sent = self.inner.broadcast(state, everybody)
        one = next(iter(sent.values()))

        def complete(reply: Reply) -> Reply:
            if "delta" not in reply.upload:
                return reply
            delta, params = reply.upload["delta"], sent.get(reply.client, one)["params"]
            still = {
                n: torch.zeros_like(t)
                for n, t in params.items()
                if not self._learns(n, round.number)
            }
            return replace(reply, upload={**reply.upload, "delta": {**delta, **still}})

        return self.inner.server_update(state, round, map(complete, replies))

    def _learns(self, name: str, round: int) -> bool:
        turn = self.names[(round - 1) % len(self.names)]
        return turn in name or not any(part in name for part in self.names)

    def _in_turn(self, work: Work, round: int) -> Work:
        if not isinstance(work, Fit):
            return work
        before = work.mask or {n: torch.ones((), dtype=t.dtype) for n, t in work.start.items()}
        mask = {n: t if self._learns(n, round) else torch.zeros_like(t) for n, t in before.items()}
        return replace(work, mask=mask)
