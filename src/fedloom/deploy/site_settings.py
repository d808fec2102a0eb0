"""What a site is started with: read by the process that joins, and by its worker's.

The first of the two only keeps programs running, so that nothing here loads torch.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fedloom.client.worker_settings import WorkerSettings
from fedloom.deploy.limits import Limits

if TYPE_CHECKING:
    from fedloom.core.protocols import ClientId
    from fedloom.rounds.recipe_settings import Recipe

ENDED = "the run has ended"
"""Said when the server says goodbye."""


@dataclass(frozen=True, slots=True)
class SiteSettings:
    """What a site is started with."""

    name: str
    folder: Path
    """Of the memory, and of the recipe that was agreed on."""
    data: Path | None = None
    """This site's text; None: the clients below, with their part of the recipe's data."""
    clients: "Sequence[ClientId]" = ()
    limits: Limits = Limits()
    recipe: Path | None = None
    """The only recipe that this site takes part in; None: any that its limits allow."""
    keys: Path | None = None
    """The folder that `fedloom keys add` made for it: its own key, and the others' public ones; for secure sums."""
    worker: WorkerSettings | None = None
    """How many processes train its client; None: as many as the recipe says."""

    @property
    def imports(self) -> Sequence[str] | None:
        """Return what a recipe may import here; None, all: on the server's own machine it is the run's own recipe."""
        return None if self.data is None else self.limits.allow

    def with_worker(self, recipe: "Recipe") -> "Recipe":
        """Return the recipe with this site's own number of processes.

        Raises:
            ValueError: where the recipe cannot be trained by so many.
        """
        return recipe if self.worker is None else replace(recipe, worker=self.worker)

    def write(self, file: Path) -> None:
        """Write it for the worker's process."""
        file.write_text(json.dumps(asdict(self), default=str))

    @classmethod
    def read(cls, file: Path) -> "SiteSettings":
        """Read what `write` wrote."""
        fields = json.loads(file.read_text())
        paths = {k: fields[k] and Path(fields[k]) for k in ("folder", "data", "recipe", "keys")}
        worker = fields["worker"] and WorkerSettings(**fields["worker"])
        return cls(**{**fields, **paths, "limits": Limits(**fields["limits"]), "worker": worker})
