"""All laws over one algorithm."""

import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from fedloom.client.local_settings import LocalSettings
from fedloom.core.protocols import Algorithm
from fedloom.testing import calls, runs
from fedloom.testing.bench import Space
from fedloom.testing.subject import Subject
from fedloom.testing.watched import BrokenLaw

Law = Callable[[Subject], str | None]
LAWS: Mapping[str, Law] = {
    "protocol": calls.protocol,
    "number of replies": calls.number_of_replies,
    "checkpoint": calls.checkpoint,
    "random draws": calls.random_draws,
    "nothing stored": calls.nothing_stored,
    "arguments": calls.arguments,
    "repeats": calls.repeats,
    "order": runs.order,
    "server sees": calls.server_sees,
    "upload shape": calls.upload_shape,
    "still": runs.still,
    "deployed": runs.deployed,
    "absences": runs.absences,
    "resume": runs.resume,
    "engines": runs.engines,
    "batched": runs.batched,
    "lateness": runs.lateness,
}
"""Every law by name, in the order in which they are examined."""
BASIC = ("protocol", "number of replies", "checkpoint")
"""Without these no other can be examined."""


class AlgorithmError(AssertionError):
    """Laws that an algorithm does not keep."""

    def __init__(self, name: str, broken: Mapping[str, str]) -> None:
        """Take the algorithm's name, and a sentence for every broken law."""
        lines = [f"law {law!r}: {sentence}" for law, sentence in broken.items()]
        super().__init__(f"{name} breaks {len(broken)} of the laws\n" + "\n".join(lines))
        self.broken = broken


@dataclass(frozen=True)
class Report:
    """What an examination found that nothing failed in."""

    passed: tuple[str, ...]
    """Laws that hold."""
    inapplicable: Mapping[str, str]
    """Laws that say nothing of this algorithm, and why."""
    exempt: tuple[str, ...] = ()
    """Laws that were not examined, as was asked for."""


def check_algorithm(
    algorithm: Algorithm[Any],
    *,
    space: Space = "lora",
    num_clients: int = 8,
    rounds: int = 3,
    local: LocalSettings | None = None,
    exempt: Collection[str] = (),
) -> Report:
    """Examine an algorithm by every law that the built-in ones keep.

    Args:
        algorithm: Any object with the protocol, with the settings to examine.
        space: Where it trains: lora, or seeds for methods that know no other.
        num_clients: Clients on the bench, at least 4.
        rounds: Length of a run, at least 2.
        local: How clients learn; None: plain SGD.
        exempt: Laws that it breaks by design, see `fedloom.testing.examination.LAWS`.

    Returns:
        Which laws hold, and which say nothing of it.

    Raises:
        AlgorithmError: with a sentence for every law that it breaks.
        ValueError: for a setting that makes no examination.
    """
    if space not in get_args(Space):
        raise ValueError(f"space must be one of {', '.join(get_args(Space))}, got {space!r}")
    for name, number, least in (("num_clients", num_clients, 4), ("rounds", rounds, 2)):
        if number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}")
    if unknown := sorted(set(exempt) - LAWS.keys()):
        raise ValueError(f"exempt must be laws ({', '.join(LAWS)}), got {unknown[0]!r}")
    passed, inapplicable, broken = list[str](), dict[str, str](), dict[str, str]()
    with tempfile.TemporaryDirectory(prefix="fedloom-laws-") as folder:
        subject = Subject(algorithm, Path(folder), space, local, num_clients, rounds)
        for name in LAWS:
            if name in exempt:
                continue
            try:
                why = examine(subject, name)
            except BrokenLaw as error:
                broken[name] = str(error)
                if name in BASIC:
                    break
                continue
            if why is None:
                passed.append(name)
            else:
                inapplicable[name] = why
    if broken:
        raise AlgorithmError(type(algorithm).__name__, broken)
    return Report(tuple(passed), inapplicable, tuple(name for name in LAWS if name in exempt))


def examine(subject: Subject, law: str) -> str | None:
    """Return why a law says nothing of a subject; None where it holds.

    Raises:
        BrokenLaw: where it does not.
    """
    own = replace(subject, folder=subject.folder / law.replace(" ", "_"))
    try:
        return LAWS[law](own)
    except BrokenLaw:
        raise
    except Exception as error:
        raise BrokenLaw(f"the examination raised {type(error).__name__}: {error}") from error
