"""What an algorithm may tell of uploads that are added up before anybody reads them; all of it is optional."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from fedloom.core.protocols import Algorithm, ClientId, Payload, Round


@runtime_checkable
class Supports(Protocol):
    """An algorithm whose clients may all leave out the same entries of an upload."""

    def support(self, download: Payload) -> Payload:
        """Return where entries of an upload may be other than 0, as bool by group and name; everywhere where it says
        nothing. It is the same for all who share a download."""
        ...


def support_of(algorithm: Algorithm[Any], download: Payload) -> Payload:
    """Return where uploads are not 0, see `Supports.support`."""
    return algorithm.support(download) if isinstance(algorithm, Supports) else {}


@runtime_checkable
class KeepsApart(Protocol):
    """An algorithm whose server reads a mean for each of several groups of clients."""

    def groups(self, state: Any, round: Round) -> Mapping[ClientId, str]:
        """Return whose uploads may be added up: those of clients of one group."""
        ...


def groups_of(algorithm: Algorithm[Any], state: Any, round: Round) -> Mapping[ClientId, str]:
    """Return the group of each client, see `KeepsApart.groups`; nobody's where all are one."""
    return algorithm.groups(state, round) if isinstance(algorithm, KeepsApart) else {}
