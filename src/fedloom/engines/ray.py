"""Clients on Ray actors, on one host or many: each actor stays, with its own base model, and answers envelopes."""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError

from fedloom.engines.engine_settings import RaySettings
from fedloom.engines.requests import Envelope, Site, Ticket

Answer = Callable[
    [dict[str, Any], list[bytes]], tuple[dict[str, Any], Sequence[bytes | memoryview]]
]


class Actor:
    """What runs in a process of Ray's."""

    def __init__(self, make: Callable[[], Answer]) -> None:
        self._answer = make()

    def answer(
        self, header: dict[str, Any], pieces: list[bytes]
    ) -> tuple[dict[str, Any], list[bytes]]:
        """Answer one envelope."""
        said, told = self._answer(header, pieces)
        return said, list(map(bytes, told))


@dataclass
class Actors:
    """A Transport over Ray; an actor that died is started again by Ray and knows nothing of earlier envelopes."""

    settings: RaySettings
    make: Mapping[Site, Callable[[], Answer]]
    """Run once in each actor's process."""
    _actors: dict[Site, Any] = field(default_factory=dict)
    _waiting: dict[Ticket, Any] = field(default_factory=dict)
    _number: int = 0

    def open(self) -> None:
        """Start or find a cluster, and the actors in it."""
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        here = self.settings.address is None
        ray.init(
            address=self.settings.address,
            include_dashboard=False if here else None,
            log_to_driver=False,
            configure_logging=False,
        )
        remote = ray.remote(Actor)
        for site, make in self.make.items():
            options = remote.options(
                num_cpus=1 if here else 0, num_gpus=self.settings.gpus, max_restarts=-1
            )
            self._actors[site] = options.remote(make)

    def close(self) -> None:
        """End the actors, and a cluster that was started here."""
        for actor in self._actors.values():
            ray.kill(actor)
        self._actors.clear()
        ray.shutdown()

    def reopen(self) -> None:
        self.close()
        self.open()

    def sites(self) -> Mapping[Site, str]:
        return dict.fromkeys(self._actors, "")

    def send(self, envelopes: Mapping[Site, Envelope], *, seconds: float) -> Mapping[Site, Ticket]:
        tickets = {}
        for site, envelope in envelopes.items():
            self._number += 1
            tickets[site] = str(self._number)
            pieces = list(map(bytes, envelope.pieces))
            asked = self._actors[site].answer.remote(dict(envelope.header), pieces)
            self._waiting[tickets[site]] = asked
        return tickets

    def collect(self, tickets: Collection[Ticket]) -> Mapping[Ticket, Envelope | str]:
        of = {self._waiting[ticket]: ticket for ticket in tickets}
        ready: Sequence[Any] = ray.wait(list(of), num_returns=len(of), timeout=0)[0] if of else []
        out: dict[Ticket, Envelope | str] = {}
        for reference in ready:
            try:
                out[of[reference]] = Envelope(*ray.get(reference))
            except RayError as error:
                reason = " ".join(str(error).split())[:300]
                out[of[reference]] = f"its actor failed and is started again: {reason}"
            del self._waiting[of[reference]]
        return out
