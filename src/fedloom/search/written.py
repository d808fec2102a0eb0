"""A search as Markdown, JSON and a page; what a machine took stands on the page alone."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from fedloom.benchmark.written import Cell, markdown
from fedloom.core.files import write_atomic
from fedloom.core.metrics import METRICS
from fedloom.report.search import Course, search_page
from fedloom.search.outcome import Outcome, Trial
from fedloom.search.space import told
from fedloom.tracking.metric_format import MINUS, duration, human_bytes, shown

BEST = "best.yaml"


def write_all(outcome: Outcome, folder: Path, environment: Mapping[str, Any]) -> Mapping[str, Path]:
    """Write the search in every form; return the files by what they are.

    `search.md` and `search.json` are the same bytes for the same search, however often it was stopped.
    """
    head, rows, notes = columns(outcome), trial_rows(outcome), notes_of(outcome)
    front_head, front = _front(outcome)
    machine = f"{environment['cpu']}, {environment['os']}, {environment['num_threads']} threads"
    tables = [
        {"title": "Trials", "head": head, "rows": rows, "notes": notes},
        {
            "title": f"{outcome.metric.title} by bytes",
            "head": front_head,
            "rows": front,
            "notes": ["Where a trial was better than all that had taken no more bytes."],
        },
        {"title": "Costs", "head": ["", "time"], "rows": _costs(outcome), "notes": [machine]},
    ]
    courses = [
        Course(f"trial {trial.number}", [(p.bytes, p.value) for p in trial.points])
        for trial in outcome.ranked
        if trial.points and not trial.failed
    ]
    about = outcome.search.description
    text = "\n".join(
        [
            markdown(outcome.title, about, head, rows, notes),
            markdown(f"{outcome.metric.title} by bytes", "", front_head, front, []),
        ]
    )
    page = search_page(
        outcome.title,
        about,
        tables,
        metric=outcome.metric,
        courses=courses,
        front=[(p.bytes, p.value) for _, p in outcome.front],
    )
    written = {"search.md": text, "search.json": _json(outcome), "search.html": page}
    for name, content in written.items():
        write_atomic(folder / name, content.encode())
    return {name: folder / name for name in written}


def shown_trials(outcome: Outcome) -> Table:
    """Return the trials as a table for a terminal."""
    table = Table(title=Text(outcome.title), title_justify="left")
    for at, name in enumerate(columns(outcome)):
        table.add_column(Text(name), justify="right" if at else "left")
    for row in trial_rows(outcome):
        table.add_row(*(Text(text, style="bold" if best else "") for text, best in row))
    return table


def columns(outcome: Outcome) -> list[str]:
    """Return the heads of the columns."""
    return [
        "trial",
        *outcome.search.settings,
        "rounds",
        outcome.metric.title,
        "bytes, both ways",
        "",
    ]


def trial_rows(outcome: Outcome) -> list[list[Cell]]:
    """Return a row a trial, the best first."""
    best = outcome.best
    rows = []
    for trial in outcome.ranked:
        is_best = best is not None and trial.number == best.number
        value = "" if trial.value is None else shown(outcome.metric, trial.value)
        cells = [str(trial.number), *trial.settings.values(), str(trial.rounds), value]
        cells += [human_bytes(trial.bytes) if trial.bytes else "", _state(outcome, trial)]
        rows.append([(cell, is_best) for cell in cells])
    return rows


def _state(outcome: Outcome, trial: Trial) -> str:
    if trial.failed:
        return "failed"
    if not trial.is_over:
        return "not done"
    reached = max(trial.rungs, default=0)
    return "" if reached >= outcome.rounds else f"stopped after round {reached}"


def notes_of(outcome: Outcome) -> list[str]:
    """Return what stands under the table."""
    rounds, sent = (sum(t.rounds for t in outcome.trials), sum(t.bytes for t in outcome.trials))
    whole = len(outcome.trials) * outcome.rounds
    notes = [
        f"{rounds} rounds and {human_bytes(sent)} in all; all trials to their end would be {whole} rounds."
    ]
    if outcome.best is not None:
        test = ", ".join(
            f"{METRICS.of(name).title.lower()} {shown(METRICS.of(name), value)}"
            for name, value in outcome.best.test.items()
            if name.rpartition("/")[2] in ("loss", "exact_match", "accuracy", "preference_accuracy")
        )
        beside = f"; {test}, by which nothing was chosen" if test else ""
        notes.append(
            f"Best is trial {outcome.best.number} ({told(outcome.best.settings)}){beside}."
        )
    for low, high, count, value in outcome.agreements():
        number = f"{value:.2f}".replace("-", MINUS)
        notes.append(
            f"The order after round {low} and that after round {high} agree by {number} (Spearman's correlation, {count} trials)."
        )
    spent = [trial.epsilon for trial in outcome.trials if trial.epsilon is not None]
    if spent:
        notes.append(
            f"Each trial spent privacy of the same clients: what was chosen is covered by no less than their sum, epsilon"
            f" {sum(spent):.2f}, where one trial alone says up to {max(spent):.2f}."
        )
    notes += [
        f"Trial {trial.number} failed: {trial.failed}" for trial in outcome.trials if trial.failed
    ]
    if outcome.waiting:
        notes.append(f"{outcome.waiting} trials were not begun.")
    if outcome.ended:
        notes.append(f"{outcome.ended[0].upper()}{outcome.ended[1:]}.")
    return notes


def _front(outcome: Outcome) -> tuple[list[str], list[list[Cell]]]:
    rows = [
        [
            (human_bytes(point.bytes), False),
            (shown(outcome.metric, point.value), False),
            (f"{trial.number}", False),
            (f"{point.round}", False),
            (told(trial.settings), False),
        ]
        for trial, point in outcome.front
    ]
    return ["bytes", outcome.metric.title, "trial", "round", "settings"], rows


def _costs(outcome: Outcome) -> list[list[Cell]]:
    return [
        [(f"trial {trial.number}", False), (duration(trial.seconds), False)]
        for trial in outcome.trials
    ]


def _json(outcome: Outcome) -> str:
    best = outcome.best
    trials = [
        {
            "trial": trial.number,
            "settings": dict(trial.settings),
            "rounds": trial.rounds,
            "bytes": trial.bytes,
            "rungs": {str(rung): value for rung, value in sorted(trial.rungs.items())},
            "points": [
                {"round": p.round, "value": p.value, "bytes": p.bytes} for p in trial.points
            ],
            "is_over": trial.is_over,
            "failed": trial.failed,
        }
        for trial in outcome.trials
    ]
    made = {
        "name": outcome.title,
        "objective": outcome.search.objective,
        "best": None if best is None else best.number,
        "front": [
            {"bytes": p.bytes, "value": p.value, "trial": t.number, "round": p.round}
            for t, p in outcome.front
        ],
        "agreement": [
            {"after": low, "and": high, "trials": count, "spearman": value}
            for low, high, count, value in outcome.agreements()
        ],
        "trials": trials,
        "not_begun": outcome.waiting,
    }
    return json.dumps(made, indent=1, ensure_ascii=False) + "\n"
