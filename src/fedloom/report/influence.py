"""The section of the page that says whom a robust rule rejected, and in which rounds."""

from collections.abc import Sequence
from typing import Any

from fedloom.report.run_folder import Results
from fedloom.rounds.server_metrics import REJECTED

_SPANS = 8
"""Stretches of rounds that are written out."""


def influence_section(own: Results) -> dict[str, Any] | None:
    """Return a row a client, the most rejected first; None where every client counted as it weighs."""
    if not own.influence:
        return None
    parts: dict[str, list[tuple[int, float]]] = {}
    for line in own.influence:
        for client, part in line["influence"].items():
            parts.setdefault(client, []).append((int(line["round"]), float(part)))
    rows = [_row(client, values) for client, values in parts.items()]
    rows.sort(key=lambda row: (-row["share"], row["client"]))
    return {
        "said": f"In {len(own.influence)} rounds the server combined updates by a rule that may leave clients out.",
        "rows": rows,
    }


def _row(client: str, values: Sequence[tuple[int, float]]) -> dict[str, Any]:
    rejected = [number for number, part in values if part < REJECTED]
    mean = sum(part for _, part in values) / len(values)
    return {
        "client": client,
        "share": len(rejected) / len(values),
        "rejected": f"{len(rejected)} of {len(values)}",
        "rounds": _spans(rejected),
        "influence": f"{100 * mean:.0f} %",
    }


def _spans(rounds: Sequence[int]) -> str:
    """Return rounds as 1 to 4, 7."""
    spans: list[list[int]] = []
    for number in rounds:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    texts = [f"{a} to {b}" if a < b else f"{a}" for a, b in spans[:_SPANS]]
    return ", ".join([*texts, "\u2026"] if len(spans) > _SPANS else texts)
