"""A line a run: where it stands, how good it is, what it sent; read again only where a file has changed."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from fedloom.board.folder import HERE, Folder, told
from fedloom.rounds.failure import FILE as FAILED
from fedloom.rounds.failure import read_failure
from fedloom.rounds.lock import FILE as LOCK
from fedloom.rounds.lock import holder
from fedloom.rounds.reading import read_json, read_recipe_text
from fedloom.tracking.metric_format import change, duration, human_bytes, quality, shown
from fedloom.tracking.metrics_log import MetricsLog

State = Literal["running", "finished", "stopped", "failed"]
_READ = (
    *("metrics.jsonl", "recipe.yaml", "summary.json", "environment.json", "listen.json"),
    *(FAILED, LOCK),
)
_GONE = "remove it to go on without it"
_LONG = 500
"""Characters of a name or a note."""


@dataclass(frozen=True)
class Line:
    """What the list shows of a run."""

    id: str
    """Its path below the folder that is watched."""
    name: str
    state: State
    note: str
    """What more there is to say of the state, as a few words."""
    done: int
    """Rounds."""
    total: int
    """Rounds asked for; 0 where that is not known."""
    left: str
    """How long the other rounds take, in words; empty where that is not known."""
    metric: str
    """The headline's title; empty where nothing was measured."""
    before: str
    after: str
    change: str
    traffic: str
    """Bytes both ways."""
    began: str
    """Its date, as ISO 8601; empty where it did not say."""
    at: float
    """When a file of it changed last."""

    @property
    def share(self) -> int:
        """Return how much of the rounds is done, in per cent."""
        return 0 if not self.total else min(100, round(100 * self.done / self.total))

    @property
    def date(self) -> str:
        """Return the day and the minute it was begun; of one that did not say, of its last change."""
        try:
            when = (
                datetime.fromisoformat(self.began)
                if self.began
                else datetime.fromtimestamp(self.at, UTC)
            )
            return when.astimezone(UTC).strftime("%Y-%m-%d %H:%M")
        except (ValueError, OverflowError, OSError):  # of no year that there is
            return self.began[:16]


@dataclass
class Listing:
    """The runs in a folder, each remembered as long as its files stay as they are."""

    folder: Folder
    _known: dict[str, tuple[object, Line]] = field(default_factory=dict)

    def lines(self) -> list[Line]:
        """Return a line a run, those that run first, then the newest."""
        runs = self.folder.runs()
        self._known = {name: kept for name, kept in self._known.items() if name in runs}
        lines = [self.line(name, path) for name, path in runs.items()]
        return sorted(lines, key=lambda line: (line.state != "running", -line.at, line.id))

    def line(self, name: str, path: Path) -> Line:
        """Return the line of one run."""
        stamp, at = stamp_of(path)
        at_work = self._holder(path) if LOCK in stamp else None
        # Who is gone leaves no trace in a file.
        key = (stamp, at_work is not None)
        known = self._known.get(name)
        if known is None or known[0] != key:
            line = self._read(name, path, at_work, at)
            self._known[name] = known = (key, line)
        return known[1]

    def _holder(self, path: Path) -> Mapping[str, Any] | None:
        try:
            self.folder.check(path)
        except (ValueError, OSError):  # said in its line
            return None
        return holder(path)

    def _read(self, name: str, path: Path, at_work: Mapping[str, Any] | None, at: float) -> Line:
        try:
            self.folder.check(path)
            with told(path):
                return _line(name, path, at_work, at)
        except (ValueError, OSError) as error:
            title = path.name if name == HERE else name.rpartition("/")[2]
            state: State = "stopped" if at_work is None else "running"
            return Line(
                name, title, state, _short(str(error)), 0, 0, "", "", "", "", "", "", "", at
            )


def stamp_of(path: Path, names: Sequence[str] = _READ) -> tuple[Mapping[str, object], float]:
    """Return what tells whether files in a folder have changed, and when the last of them did."""
    stamp, at = dict[str, object](), 0.0
    for name in names:
        try:
            found = os.stat(path / name)
        except OSError:
            continue
        stamp[name] = (found.st_mtime_ns, found.st_size)
        if name != LOCK:
            at = max(at, found.st_mtime)
    return stamp, at


def _line(name: str, path: Path, at_work: Mapping[str, Any] | None, at: float) -> Line:
    recipe = read_recipe_text(path)[1] if (path / "recipe.yaml").exists() else {}
    summary, environment = (
        read_json(path / file, dict, remedy=_GONE) if (path / file).exists() else {}
        for file in ("summary.json", "environment.json")
    )
    history = MetricsLog.read(path / "metrics.jsonl")
    done = int(history.lines[-1]["round"]) if history.lines else 0
    total = _total(recipe, summary, done)
    state = _state(path, at_work, summary, done)
    headline = quality([{n for line in history.lines for n in line}])
    before, after = history.ends(headline) if headline else (None, None)
    metric = history.table.of(headline) if headline else None
    sent = sum(history.total(f"comm/{way}_bytes") for way in ("upload", "download"))
    title = path.name if name == HERE else name.rpartition("/")[2]
    return Line(
        id=name,
        name=_short(str(summary.get("name") or recipe.get("name") or title)),
        state=state,
        note=_short(_note(path, state, summary, history, done, total)),
        done=done,
        total=total,
        left=_left(history, total - done) if state == "running" else "",
        metric=metric.title if metric else "",
        before=shown(metric, before) if metric else "",
        after=shown(metric, after) if metric else "",
        change=change(metric, before, after) if metric else "",
        traffic=human_bytes(sent) if any("comm/upload_bytes" in x for x in history.lines) else "",
        began=str(environment.get("date") or ""),
        at=at,
    )


def _total(recipe: Mapping[str, Any], summary: Mapping[str, Any], done: int) -> int:
    section = recipe.get("run")
    asked = section.get("rounds") if isinstance(section, Mapping) else None
    if isinstance(asked, int) and not (summary.get("stopped_early") and done < asked):
        return max(asked, done)
    return done


def _state(
    path: Path, at_work: Mapping[str, Any] | None, summary: Mapping[str, Any], done: int
) -> State:
    if at_work is not None:
        return "running"
    told = summary.get("rounds", done)
    if summary and isinstance(told, int) and done <= told:
        return "finished"
    # A run that went on after it had failed, and was stopped then, has newer records.
    failed, later = (stamp_of(path, [file])[1] for file in (FAILED, "metrics.jsonl"))
    return "failed" if failed and failed >= later else "stopped"


def _note(
    path: Path,
    state: State,
    summary: Mapping[str, Any],
    history: MetricsLog,
    done: int,
    total: int,
) -> str:
    if state == "failed":
        return read_failure(path) or ""
    if state == "finished":
        return "ended early" if summary.get("stopped_early") else ""
    if state == "stopped":
        return ""
    if not history.lines:
        waiting = (path / "listen.json").exists() and not (path / "recipe.yaml").exists()
        return "waiting for sites" if waiting else "before round 1"
    return "baselines, then its report" if total and done >= total and summary else ""


def _short(text: str) -> str:
    """Return what of a text goes into a line."""
    return text if len(text) <= _LONG else f"{text[:_LONG]} \u2026"


_LATEST = 10
"""Rounds whose mean length is that of the next."""


def _left(history: MetricsLog, rounds: int) -> str:
    spent = [seconds for number, seconds in history.of("time/round_seconds") if number][-_LATEST:]
    return duration(sum(spent) / len(spent) * rounds) if spent and rounds > 0 else ""
