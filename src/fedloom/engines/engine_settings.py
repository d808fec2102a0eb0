"""The recipe section `engine`: where clients run, and their table."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class InProcessSettings:
    """Clients in this process, on one base model."""


@dataclass(frozen=True, slots=True)
class LoopbackSettings:
    """Clients in this process, behind messages that arrive in any order."""


@dataclass(frozen=True, slots=True)
class FlowerSettings:
    """Clients behind Flower: on this machine, or at sites that join over the network."""

    nodes: int = 3
    """SuperNodes on this machine that share the clients; 0: sites join from elsewhere, as with `fedloom serve`."""
    deadline: float = 3600.0
    """Seconds a round may take; who has not answered by then is absent."""
    patience: float = 600.0
    """Seconds to wait before round 1 until all are there, which includes loading the model."""

    def __post_init__(self) -> None:
        """Refuse what no round can be run with."""
        if self.nodes < 0:
            raise ValueError(f"engine.flower.nodes must be at least 0, got {self.nodes}")
        for name, seconds in (("deadline", self.deadline), ("patience", self.patience)):
            if not 1 <= seconds <= 1e6:
                raise ValueError(f"engine.flower.{name} must be in [1, 1e6], got {seconds}")


@dataclass(frozen=True, slots=True)
class RaySettings:
    """Clients on Ray actors, each of which keeps one base model."""

    actors: int = 2
    """How many share the clients."""
    gpus: float = 0.0
    """Of each actor; shares are allowed."""
    address: str | None = None
    """Of a cluster that is running; None starts one on this machine, for as long as the run takes."""

    def __post_init__(self) -> None:
        """Refuse what Ray cannot place."""
        if self.actors < 1:
            raise ValueError(f"engine.ray.actors must be at least 1, got {self.actors}")
        if not self.gpus >= 0:
            raise ValueError(f"engine.ray.gpus must be at least 0, got {self.gpus}")


EngineSettings = InProcessSettings | LoopbackSettings | FlowerSettings | RaySettings
ENGINES: dict[str, type[EngineSettings]] = {
    "inprocess": InProcessSettings,
    "loopback": LoopbackSettings,
    "flower": FlowerSettings,
    "ray": RaySettings,
}
