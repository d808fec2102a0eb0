"""An audit as a table of Markdown, as JSON and as a picture, beside the run."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.table import Table
from rich.text import Text

from fedloom.audit.conduct import Audit
from fedloom.audit.findings import Finding
from fedloom.core.files import write_atomic
from fedloom.report.leaks import Leak, leaks_picture

FOLDER = "audit"
_HEAD = ("attack", "client", "round", "seen", "measure", "value", "95 %", "chance")


def write_audit(folder: Path, audit: Audit) -> Path:
    """Write audit.md, audit.json and audit.png below a run's folder; return the folder they are in."""
    home = folder / FOLDER
    write_atomic(home / "audit.md", markdown(audit).encode(), private=home)
    content = json.dumps(asdict(audit), indent=2, ensure_ascii=False) + "\n"
    write_atomic(home / "audit.json", content.encode(), private=home)
    if audit.findings:
        picture = leaks_picture([leak(one) for one in audit.findings])
        write_atomic(home / "audit.png", picture, private=home)
    else:
        (home / "audit.png").unlink(missing_ok=True)
    return home


def markdown(audit: Audit) -> str:
    """Return the table, and below it what each number says, what is assumed and who said nothing."""
    lines = [
        f"# What the wire of {audit.name} reveals",
        "",
        f"Tuned: {audit.space}. Sent up: {audit.link}. Rounds looked at: {', '.join(map(str, audit.rounds))}.",
        "",
        *table(_HEAD, [row(one) for one in audit.findings]),
        "",
        *(f"- {one.attack}: {one.says}." for one in audit.findings),
        *(f"- {name} assumes: {text}." for name, text in audit.assumes.items()),
        *(f"- {name} says nothing: {why}." for name, why in audit.silent.items()),
    ]
    return "\n".join(lines) + "\n"


def shown(audit: Audit) -> Table:
    """Return the table as a terminal shows it; what else is told of an audit is in audit.md."""
    drawn = Table(title=f"what the wire of {audit.name} reveals", title_justify="left")
    for name in _HEAD:
        drawn.add_column(
            name, justify="left" if name in ("attack", "client", "seen", "measure") else "right"
        )
    for one in audit.findings:
        drawn.add_row(*map(Text, row(one)))
    return drawn


def row(finding: Finding) -> list[str]:
    """Return a finding's cells."""
    interval = finding.interval
    return [
        finding.attack,
        finding.client or "all",
        "all" if finding.round is None else str(finding.round),
        finding.seen,
        finding.measure,
        f"{finding.value:.3g}",
        "" if interval is None else f"{interval[0]:.3g} to {interval[1]:.3g}",
        f"{finding.chance:.3g}",
    ]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table of Markdown."""
    lines = [list(head), ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def leak(finding: Finding) -> Leak:
    """Return a finding as it is drawn."""
    where = [finding.client, None if finding.round is None else f"round {finding.round}"]
    label = ", ".join(filter(None, [*where, finding.seen]))
    return Leak(
        f"{finding.attack}: {finding.measure}",
        label,
        finding.value,
        finding.chance,
        finding.interval,
    )
