"""The table of a plan as Markdown, LaTeX, CSV, JSON and a page; what a machine took stands in files of its own."""

import csv
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from fedloom.benchmark.plan import BEFORE
from fedloom.benchmark.suites import PREFIX
from fedloom.benchmark.table import BenchTable, Row
from fedloom.core.files import write_atomic
from fedloom.core.metrics import Metric
from fedloom.report.bench import Point, bench_page
from fedloom.results.statistics import Estimate
from fedloom.tracking.metric_format import MINUS, duration, human_bytes
from fedloom.tracking.records import finite

_TEX = {c: rf"\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    # At the beginning of a row these would belong to the \\ before it.
    "[": "{[}",
    "*": "{*}",
    "±": r"$\pm$",
    MINUS: "$-$",
}


def write_all(
    table: BenchTable, folder: Path, environment: Mapping[str, Any]
) -> Mapping[str, Path]:
    """Write the table in every form; return the files by what they are.

    `table.*` are the same bytes for the same plan, however often it was stopped; `costs.md` has seconds, memory and the
    machine, and the page has both.
    """
    head, cells = columns(table), [row_cells(table, row) for row in table.rows]
    cost_head, costs = _costs(table)
    plan = table.plan
    title, notes = plan.name, notes_of(table)
    machine = f"{environment['cpu']}, {environment['os']}, {environment['num_threads']} threads"
    written = {
        "table.md": markdown(title, plan.description, head, cells, notes),
        "table.tex": _latex(title, head, cells, notes),
        "table.csv": _csv(table),
        "table.json": _json(table),
        "costs.md": markdown(f"{title}: costs", machine, cost_head, costs, []),
        "table.html": bench_page(
            title,
            plan.description,
            head,
            cells,
            notes,
            costs=(cost_head, costs, machine),
            points=_points(table),
            metric=table.metrics[0] if table.metrics else None,
        ),
    }
    for name, text in written.items():
        write_atomic(folder / name, text.encode())
    return {name: folder / name for name in written}


def shown_table(table: BenchTable) -> Table:
    """Return the table for a terminal: without differences and bytes, which would not fit."""
    shown = Table(title=Text(table.plan.name), title_justify="left")
    head = columns(table)
    values = [at for at in range(2, len(head) - 2) if at % 2 == 0]
    fitting = [0, 1, *values, len(head) - 1]
    for at in fitting:
        shown.add_column(Text(head[at]), justify="right" if at else "left")
    for row in table.rows:
        cells = row_cells(table, row)
        told = (
            Text(text, style="bold" if best else "")
            for text, best in map(cells.__getitem__, fitting)
        )
        shown.add_row(*told)
    return shown


def columns(table: BenchTable) -> list[str]:
    """Return the heads of the columns."""
    head = ["", "seeds"]
    for metric in table.metrics:
        head += [metric.title, f"beside {table.plan.reference}, paired"]
    return [*head, "bytes, both ways", "fewer bytes"]


Cell = tuple[str, bool]
"""A text, and whether it is the best of its column."""


def row_cells(table: BenchTable, row: Row) -> list[Cell]:
    """Return the cells of a row."""
    asked = len(table.plan.seeds)
    seeds = "" if row.name == BEFORE else str(row.seeds)
    if row.failed or row.waiting:
        seeds = f"{row.seeds} of {asked}"
    cells = [(row.name, False), (seeds, False)]
    for metric in table.metrics:
        value = row.estimates.get(metric.name)
        difference = row.beside.get(metric.name)
        best = table.best(metric) == row.name
        cells.append((estimated(metric, value) if value else "", best))
        told = differing(metric, difference) if difference else ""
        if (chances := row.chances.get(metric.name)) and told:
            told += f", p {', '.join(f'{chances[seed]:.2g}' for seed in sorted(chances))}"
        cells.append((told, False))
    cells.append((human_bytes(row.bytes) if row.bytes else "", False))
    cells.append((_times(row.fewer) if row.fewer and row.name != BEFORE else "", False))
    return cells


def _times(factor: float) -> str:
    return f"{factor:.1f}x" if factor < 1000 else f"{factor:,.0f}x"


def estimated(metric: Metric, value: Estimate) -> str:
    """Return a mean with its interval: shares in per cent, Wilson's as its two ends."""
    if not math.isfinite(value.mean):
        return "not finite"
    factor, digits, unit = (100, 1, " %") if metric.is_share else (1, 3, "")
    mean = f"{factor * value.mean:.{digits}f}"
    if value.low is None or value.high is None:
        return f"{mean}{unit}"
    if value.count == 1:
        return f"{mean}{unit} [{factor * value.low:.{digits}f}, {factor * value.high:.{digits}f}]"
    return f"{mean} ± {factor * (value.high - value.mean):.{digits}f}{unit}"


def differing(metric: Metric, value: Estimate) -> str:
    """Return a difference with its interval: of shares in points."""
    if not math.isfinite(value.mean):
        return "not finite"
    factor, digits, unit = (100, 1, " points") if metric.is_share else (1, 3, "")
    text = f"{factor * value.mean:+.{digits}f}"
    if value.half is not None:
        text += f" ± {factor * value.half:.{digits}f}"
    return f"{text}{unit}".replace("-", MINUS)


def notes_of(table: BenchTable) -> list[str]:
    """Return what stands under the table: how its numbers are made, what failed, what is missing, what does not pair."""
    many = len(table.plan.seeds) > 1
    notes = [
        "Means over seeds with 95 % intervals by Student's t; differences are taken seed by seed."
        if many
        else "One seed: shares have Wilson's 95 % interval, what more test rows alike would show."
    ]
    if any(row.chances for row in table.rows):
        each = ", seed by seed" if many else ""
        notes.append(
            f"p is that of McNemar's exact test on the same items{each}, and of a paired t-test where items are more or less right."
        )
    if table.plan.suites:
        apart = [
            row.name
            for row in table.rows
            if row.seeds
            and not any(name.startswith(PREFIX) and v for name, v in row.values.items())
        ]
        if apart:
            notes.append(
                f"{', '.join(apart)}: clients have models of their own, of which none is asked public tests."
            )
    for row in table.rows:
        if row.is_quiet:
            notes.append(
                f"{row.name}: what its clients measure is kept out of its runs' folders (private.quiet)."
            )
        if row.emulated:
            notes.append(
                f"{row.name}: {' and '.join(row.emulated)} with the emulator that clients have; test/plugin/loss and its like are with"
                " the whole model."
            )
        for seed, reason in sorted(row.failed.items()):
            notes.append(f"{row.name}, seed {seed}, failed: {reason}")
        for seed, (missing, asked) in sorted(row.absent.items()):
            notes.append(
                f"{row.name}, seed {seed}: {missing} of {asked} replies of clients are missing."
            )
        if row.waiting:
            seeds = ", ".join(map(str, row.waiting))
            notes.append(f"{row.name} was not run yet at seed {seeds}.")
        if row.unlike:
            notes.append(
                f"{row.name} has another {' and '.join(row.unlike)} than {table.plan.reference}: nothing is paired."
            )
    return notes


def _costs(table: BenchTable) -> tuple[list[str], list[list[Cell]]]:
    rows = [
        [
            (row.name, False),
            (duration(row.seconds["train"]), False),
            (duration(row.seconds["evaluation"]), False),
            (human_bytes(row.memory or 0.0), False),
        ]
        for row in table.rows
        if row.seconds
    ]
    return ["", "training", "evaluation", "most memory"], rows


def _points(table: BenchTable) -> list[Point]:
    if not table.metrics:
        return []
    name = table.metrics[0].name
    return [
        Point(row.name, row.bytes, value.mean, value.low, value.high)
        for row in table.rows
        if row.bytes and (value := row.estimates.get(name)) and math.isfinite(value.mean)
    ]


def markdown(
    title: str,
    about: str,
    head: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    notes: Sequence[str],
) -> str:
    """Return a table with its title, what it is about and the notes under it."""

    def escaped(text: str) -> str:
        return re.sub(r"([\\|<*`])", r"\\\1", text)

    lines = [f"| {' | '.join(map(escaped, head))} |", f"|---|{'---:|' * (len(head) - 1)}"]
    for row in rows:
        told = [f"**{escaped(text)}**" if best and text else escaped(text) for text, best in row]
        lines.append(f"| {' | '.join(told)} |")
    parts = [
        f"# {title}",
        about,
        "\n".join(lines),
        "\n".join(f"- {escaped(note)}" for note in notes),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _latex(
    title: str, head: Sequence[str], rows: Sequence[Sequence[Cell]], notes: Sequence[str]
) -> str:
    """Return a table as LaTeX with booktabs."""

    def escaped(text: str) -> str:
        return "".join(_TEX.get(c, c) for c in text)

    def line(cells: Sequence[str]) -> str:
        return f"    {' & '.join(cells)} \\\\"

    said = [text if text.endswith(".") else f"{text}." for text in (title, *notes)]
    told = [
        line([rf"\textbf{{{escaped(text)}}}" if best else escaped(text) for text, best in row])
        for row in rows
    ]
    return "\n".join(
        [
            r"% needs \usepackage{booktabs}",
            r"\begin{table}",
            r"  \centering",
            rf"  \begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
            r"    \toprule",
            line(list(map(escaped, head))),
            r"    \midrule",
            *told,
            r"    \bottomrule",
            r"  \end{tabular}",
            rf"  \caption{{{escaped(' '.join(said))}}}",
            r"\end{table}",
            "",
        ]
    )


def _csv(table: BenchTable) -> str:
    """Return a line a row, seed and metric."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["row", "seed", "metric", "value", "failed"])
    for row in table.rows:
        for metric in table.metrics:
            for seed, value in sorted(row.values.get(metric.name, {}).items()):
                writer.writerow([row.name, seed, metric.name, repr(value), ""])
        for seed, reason in sorted(row.failed.items()):
            writer.writerow([row.name, seed, "", "", reason])
    return out.getvalue()


def _json(table: BenchTable) -> str:
    def estimate(value: Estimate) -> dict[str, Any]:
        return {"mean": value.mean, "low": value.low, "high": value.high, "seeds": value.count}

    rows = [
        {
            "row": row.name,
            "values": {m: {str(s): v for s, v in by.items()} for m, by in row.values.items()},
            "estimates": {m: estimate(v) for m, v in row.estimates.items()},
            "beside": {m: estimate(v) for m, v in row.beside.items()},
            "p": {m: {str(s): p for s, p in by.items()} for m, by in row.chances.items()},
            "bytes": row.bytes,
            "failed": {str(s): reason for s, reason in row.failed.items()},
            "absent": {str(s): {"replies": m, "of": n} for s, (m, n) in row.absent.items()},
            "missing": list(row.waiting),
        }
        for row in table.rows
    ]
    told = {"name": table.plan.name, "beside": table.plan.reference, "rows": rows}
    return json.dumps(finite(told), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
