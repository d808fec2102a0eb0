"""The tables of `robust.py`: losses, differences seed by seed with their intervals, costs."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from intervals import half_width

NONE, ABSENT = "none", "absent"
WITHIN = 0.05
_FAR = math.log(11)
"""Ten times more and above is harm, however much."""

Line = Mapping[str, Any]
Runs = Mapping[tuple[str, str], Mapping[int, Line]]
"""By rule and attack, by seed."""


def gathered(lines: Sequence[Line]) -> Runs:
    """Return the lines by rule and attack, and by seed."""
    found: dict[tuple[str, str], dict[int, Line]] = {}
    for line in lines:
        found.setdefault((line["rule"], line["attack"]), {})[line["seed"]] = line
    return found


def losses(runs: Runs, rules: Sequence[str], attacks: Sequence[str]) -> str:
    """Return the test loss and the share of right tokens, means over the seeds."""

    def cell(rule: str, attack: str) -> str:
        found = list(runs.get((rule, attack), {}).values())
        if not found:
            return ""
        if any(not math.isfinite(line["after"]) for line in found):
            return "not finite"
        loss = statistics.fmean(line["after"] for line in found)
        return f"{loss:.3f} ({100 * statistics.fmean(line['right'] for line in found):.0f} %)"

    return _grid(rules, attacks, cell)


def differences(
    runs: Runs,
    rules: Sequence[str],
    attacks: Sequence[str],
    beside: Callable[[str], tuple[str, str]],
) -> str:
    """Return how much larger the perplexity is than beside, seed by seed: the mean and its 95 % interval."""

    def cell(rule: str, attack: str) -> str:
        found, clean = runs.get((rule, attack), {}), runs.get(beside(rule), {})
        gaps = [found[seed]["after"] - clean[seed]["after"] for seed in found.keys() & clean.keys()]
        return "" if beside(rule) == (rule, attack) else told(gaps)

    return _grid(rules, attacks, cell)


def told(gaps: Sequence[float]) -> str:
    """Return differences of losses as one of perplexity, in bold where their mean is beyond what is allowed."""
    if not gaps:
        return ""
    if any(not math.isfinite(gap) for gap in gaps):
        return "**not finite**"
    mean = statistics.fmean(gaps)
    text = f"{_percent(mean)} %"
    if len(gaps) > 1:
        half = half_width(gaps)
        text += f" [{_percent(mean - half)}, {_percent(mean + half)}]"
    return f"**{text}**" if math.expm1(mean) > WITHIN else text


def costs(runs: Runs, rules: Sequence[str], attacks: Sequence[str]) -> str:
    """Return CPU seconds of a round without attackers beside the mean's, and who was rejected."""
    rows = ["| rule | CPU seconds a round | attackers rejected, by attack |", "|---|---:|---|"]
    for rule in rules:
        clean = runs.get((rule, NONE), {}).values()
        spent = f"{statistics.median(x['seconds'] for x in clean):.2f}" if clean else ""
        rejected = [
            f"{attack} {100 * statistics.fmean(x['rejected'] for x in found.values()):.0f} %"
            for attack in attacks
            if (found := runs.get((rule, attack))) and not rule.startswith("mean")
        ]
        rows.append(f"| {rule} | {spent} | {', '.join(rejected)} |")
    return "\n".join(rows)


def _percent(gap: float) -> str:
    return f"{100 * math.expm1(gap):+.1f}" if gap < _FAR else "> 1000"


def _grid(rules: Sequence[str], attacks: Sequence[str], cell: Callable[[str, str], str]) -> str:
    rows = [f"| rule | {' | '.join(attacks)} |", f"|---|{'---:|' * len(attacks)}"]
    for rule in rules:
        cells = [cell(rule, attack) for attack in attacks]
        if any(cells):
            rows.append(f"| {rule} | {' | '.join(cells)} |")
    return "\n".join(rows)
