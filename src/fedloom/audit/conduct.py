"""An audit: attacks on a recorded run, and what they found."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console

from fedloom.audit.attacks import ATTACKS, Attack, Costly
from fedloom.audit.findings import Finding
from fedloom.audit.records import Case, open_case
from fedloom.core.protocols import ClientId
from fedloom.rounds.checkpoint import state_sha256

_NO_UPLOADS = "it looks at no uploads, which --round and --client choose, so leave those out"


@dataclass(frozen=True)
class Audit:
    """What attacks found of a run."""

    name: str
    """The run's."""
    space: str
    link: str
    rounds: Sequence[int]
    """That were looked at."""
    state: str
    """SHA-256 of the server's state at the end of what was audited."""
    findings: Sequence[Finding]
    assumes: Mapping[str, str] = field(default_factory=dict)
    """What each attack that was made assumes, by its name."""
    silent: Mapping[str, str] = field(default_factory=dict)
    """Why attacks said nothing, by their names."""


def audit(
    folder: Path,
    attacks: Sequence[str] = (),
    *,
    console: Console | None = None,
    round: int | None = None,
    client: ClientId | None = None,
    anyway: bool = False,
) -> Audit:
    """Return what attacks find of a run in a folder, see `open_case`.

    Args:
        folder: Of the run.
        attacks: By their names in the table; if none are named, all but those that are costly.
        console: Where notes go; nowhere if not given.
        round: Which is looked at.
        client: Whose uploads are looked at.
        anyway: Go on although data or model are not what the run was begun with.

    Raises:
        ValueError: where there is no such attack, or nothing that could be audited, or where one that is named looks at no
            uploads though `round` or `client` chooses some.
    """
    for name in attacks:
        if name not in ATTACKS:
            raise ValueError(f"--attack must be one of {', '.join(ATTACKS)}, got {name!r}")
    chosen = {
        name: attack
        for name, attack in ATTACKS.items()
        if name in attacks or not (attacks or isinstance(attack, Costly))
    }
    elsewhere = {}
    if round is not None or client is not None:
        elsewhere = {name: _NO_UPLOADS for name, one in chosen.items() if not one.of_uploads}
    if elsewhere and attacks:
        raise ValueError(f"--attack {next(iter(elsewhere))}: {_NO_UPLOADS}")
    console = console or Console(quiet=True)
    case = open_case(folder, console=console, round=round, client=client, anyway=anyway)
    made = {name: attack for name, attack in chosen.items() if name not in elsewhere}
    found = audited(case, made, console=console)
    if attacks:
        return found
    left = {
        name: f"it takes longer, so ask for it with --attack {name}"
        for name in ATTACKS.keys() - chosen.keys()
    }
    return replace(found, silent={**found.silent, **elsewhere, **dict(sorted(left.items()))})


def audited(case: Case, attacks: Mapping[str, Attack], *, console: Console) -> Audit:
    """Return what attacks find of a run that is open.

    Args:
        case: The run.
        attacks: By name.
        console: Where it is said which of them is made.
    """
    findings, assumes, silent = list[Finding](), dict[str, str](), dict[str, str]()
    for name, attack in attacks.items():
        if why := attack.silent(case):
            silent[name] = why
            continue
        console.print(f"{name}: {attack.title}", highlight=False)
        if isinstance(attack, Costly):
            console.print(f"{name}: {attack.cost(case)}", highlight=False)
        assumes[name] = attack.assumes
        findings += attack.findings(case)
    state = state_sha256(case.run.state)
    return Audit(
        case.recipe.name, case.space, case.link, case.rounds, state, findings, assumes, silent
    )
