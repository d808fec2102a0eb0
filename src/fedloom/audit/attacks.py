"""What an attack on a run is, and the table of them by name."""

from collections.abc import Iterable, Mapping
from typing import Protocol, runtime_checkable

from fedloom.audit.canaries import Canaries
from fedloom.audit.findings import Finding
from fedloom.audit.inversion import Inversion
from fedloom.audit.mechanism import Promise
from fedloom.audit.membership import Membership
from fedloom.audit.records import Case
from fedloom.audit.span import Span


class Attack(Protocol):
    """A frozen dataclass, whose fields are its settings and whose defaults are what the command uses."""

    @property
    def title(self) -> str:
        """Return what is found out, in a few words."""
        ...

    @property
    def assumes(self) -> str:
        """Return what whoever attacks has and knows, in one sentence."""
        ...

    @property
    def of_uploads(self) -> bool:
        """Return whether it looks at uploads, and so at those of the round and client that somebody asks for."""
        ...

    def silent(self, case: Case) -> str | None:
        """Return why it has nothing to say of a run, in one sentence; None where it has."""
        ...

    def findings(self, case: Case) -> Iterable[Finding]:
        """Yield what it finds of a run of which it is not silent; `finding.attack` is its name in the table."""
        ...


@runtime_checkable
class Costly(Protocol):
    """An attack that is made only where it is named, and says before it begins what it takes."""

    def cost(self, case: Case) -> str:
        """Return what it does and about how long that takes, in one sentence."""
        ...


ATTACKS: Mapping[str, Attack] = {
    "span": Span(),
    "inversion": Inversion(),
    "membership": Membership(),
    "promise": Promise(),
    "canary": Canaries(),
}
"""By name, in the order in which they are run."""
