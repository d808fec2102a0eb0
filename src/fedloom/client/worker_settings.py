"""The recipe's `worker` section: how many processes train one client."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """Processes that train one client together, on one machine; each batch is shared out among them."""

    shards: int = 1
    """Processes among which the weights are split, layer by layer (FSDP2), for a model that one device is too small for;
    tune: lora or full."""
    replicas: int = 1
    """Processes with the whole model each, which add up their gradients."""
    deadline: float = 3600.0
    """Seconds until the processes of a client have trained it; who takes longer is absent, and they are started anew."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        for name, number in (("shards", self.shards), ("replicas", self.replicas)):
            if number < 1:
                raise ValueError(f"worker.{name} must be at least 1, got {number}")
        if self.shards > 1 and self.replicas > 1:
            raise ValueError(
                f"worker.shards and worker.replicas cannot both be above 1, got {self.shards} and {self.replicas}"
            )
        if not 1 <= self.deadline <= 1e6:
            raise ValueError(f"worker.deadline must be in [1, 1e6], got {self.deadline}")
        if self.num_processes == 1 and self.deadline != _DEADLINE:
            raise ValueError(
                "worker.deadline has no effect with one process: set worker.shards or worker.replicas"
            )

    @property
    def num_processes(self) -> int:
        """Return how many processes there are."""
        return self.shards * self.replicas

    @property
    def setting(self) -> str:
        """Return the setting that asks for several, with its value."""
        return (
            f"worker.shards {self.shards}"
            if self.shards > 1
            else f"worker.replicas {self.replicas}"
        )

    @property
    def device_of_whole(self) -> str | None:
        """Return where the process that speaks to the federation has its model; None: where the recipe says."""
        return None if self.num_processes == 1 else "cpu"


_DEADLINE = 3600.0
