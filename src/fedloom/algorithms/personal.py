"""Some of the tuned tensors stay at their client, in any algorithm, and learn beside the shared ones or in turns with them.

FedPer: Federated Learning with Personalization Layers. Arivazhagan, Aggarwal, Singh, Choudhary 2019 (arXiv:1912.00818): a
pattern of the last layers as `local`.
FedSA-LoRA: Selective Aggregation for Low-Rank Adaptation in Federated Learning. Guo, Zeng, Wang, Fan, Wang, Qu, ICLR 2025
(arXiv:2410.01463): `local: lora_B`, the default. Both factors learn, A is shared, so that the mean of A is all that is averaged.
FedBN: Federated Learning on Non-IID Features via Local Batch Normalization. Li, Jiang, Zhang, Kamp, Dou, ICLR 2021
(arXiv:2102.07623): a pattern of norms, where those are tuned.
FedRep: Exploiting Shared Representations for Personalized Federated Learning. Collins, Hassani, Mokhtari, Shakkottai, ICML
2021 (arXiv:2102.07078), Algorithm 1: `phases`, first of the local tensors, then of the shared ones, each with the others still.
FedBABU: Towards Enhanced Representation for Federated Image Classification. Oh, Kim, Yun, ICLR 2022 (arXiv:2106.06042): the
head rests until the end, `phases: [{train: shared}, {train: local, from_round: N}]`.

The inner algorithm lives in the space of the shared names: they alone are in its state, its client_state and its uploads.
On a client its work is extended by the client's own tensors, which are kept in client_state; nothing pulls or offsets them. A
client that has trained nothing yet uses those that everybody began with, which downloads hold.

Deviations: the pattern is the recipe's, matched as whole components of a name, such as `layers\\.3` or `lora_B`. Phases are
local training as the recipe says, each with batches and moments of its own. FedBABU's head learns in rounds, not after them. A
reply that is lost loses what its client learnt of its own in that round, as it does all client state.
"""

import re
from dataclasses import dataclass, replace
from typing import Self

from fedloom.core.description import Description, RecipeView
from fedloom.core.phases import Phase, in_phases
from fedloom.core.protocols import Algorithm, ClientUpdate, Fit, Params, Payload, State, Task
from fedloom.core.split import Split, SplitState
from fedloom.core.wrapper import Wrapper, extended


@dataclass(frozen=True, slots=True)
class Personal(Split[State]):
    """Keeps tensors whose names match `local` at their client, where they learn beside the others or in phases."""

    inner: Algorithm[State]
    """Trains the others."""
    local: str = "lora_B"
    """A regular expression of whole components of a name: `layers.1` is not `layers.10`."""
    phases: tuple[Phase, ...] = ()
    """What learns in a round, one after another; none: all at once."""

    def __post_init__(self) -> None:
        try:
            re.compile(self.local)
        except re.error as error:
            raise ValueError(
                f"personal.local must be a regular expression, got {self.local!r} ({error})"
            ) from error
        if not self.local:
            raise ValueError("personal.local must match some of the tuned tensors, got none")
        always = [phase for phase in self.phases if phase.from_round == 1]
        if self.phases and all(phase.train == "local" for phase in always):
            raise ValueError(
                "personal.phases must train what is shared in some phase of every round, got"
                f" {', '.join(f'{p.train} from round {p.from_round}' for p in self.phases)}"
            )

    def describe(self, state: SplitState[State] | None) -> Description:
        inner = Wrapper.describe(self, state)
        own = {} if state is None else {n: t.numel() for n, t in state.others.items()}
        every = self.phases and all(phase.steps for phase in self.phases)
        steps = "personal.phases.steps" if every and not inner.steps else inner.steps
        return replace(inner, local={**inner.local, **own}, steps=steps)

    def check(self, recipe: RecipeView, *, num_clients: int | None) -> Self:
        for at, phase in enumerate(self.phases):
            if phase.from_round > recipe.run.rounds:
                raise ValueError(
                    f"personal.phases.{at}.from_round must be at most run.rounds, which is {recipe.run.rounds}, got"
                    f" {phase.from_round}"
                )
        return Wrapper.check(self, recipe, num_clients=num_clients)

    def init(self, params: Params, seed: int) -> SplitState[State]:
        shared, own = self.split(params)
        if not own or not shared:
            what = "leave a tensor to share" if own else "match some of the tuned tensors"
            raise ValueError(
                f"personal.local must {what}, such as {next(iter(params))}, got {self.local!r}"
            )
        return SplitState(self.inner.init(shared, seed), own)

    def client_update(self, task: Task, client_state: Payload) -> ClientUpdate:
        shared, start = self.split(task.download["params"])
        own = client_state.get("local", start)
        download = {**task.download, "params": shared}
        half = self.inner.client_update(replace(task, download=download), _without(client_state))
        try:
            work = next(half)
            while True:
                if isinstance(work, Fit):
                    done, own = yield from in_phases(self.phases, work, own, round=task.round)
                else:
                    done = yield extended(work, own, learns=True)
                work = half.send(done)
        except StopIteration as stop:
            reply, new_state = stop.value
        return reply, {**new_state, "local": own}

    def deployed(self, download: Payload, client_state: Payload) -> Params:
        shared, start = self.split(download["params"])
        inner = self.inner.deployed({**download, "params": shared}, _without(client_state))
        return {**inner, **client_state.get("local", start)}

    def split(self, params: Params) -> tuple[Params, Params]:
        """Return the shared and the client's own tensors."""
        pattern = re.compile(rf"(?:^|\.)(?:{self.local})(?:\.|$)")
        own = {n: t for n, t in params.items() if pattern.search(n)}
        return {n: t for n, t in params.items() if n not in own}, own


def _without(client_state: Payload) -> Payload:
    return {name: group for name, group in client_state.items() if name != "local"}
