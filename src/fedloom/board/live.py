"""What the page of a run shows, in parts that are sent again as soon as they change."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from threading import Lock
from typing import Any

from fedloom.board.folder import Folder, told
from fedloom.board.listing import Line, Listing, stamp_of
from fedloom.board.markup import rendered
from fedloom.report.page import live_sections
from fedloom.report.run_folder import Results, read_results
from fedloom.rounds.reading import read_json
from fedloom.rounds.server_metrics import FILE as INFLUENCE
from fedloom.tracking.metric_format import human_bytes
from fedloom.tracking.run_log import tail

Parts = dict[str, str]
"""HTML by the id of the element it fills."""
_SHOWN = (
    *("metrics.jsonl", "clients.jsonl", "recipe.yaml", "summary.json", "clusters.json"),
    *("privacy.json", "manifest.json", INFLUENCE, "status.json", "baselines"),
)
_LINES = 200
"""Of the log."""
_ABSENT = 12
"""Rounds with absent clients that are listed, the latest."""


@dataclass
class Live:
    """Parts of pages, made once for all who look, and again only where files have changed."""

    folder: Folder
    listing: Listing
    _made: dict[str, tuple[object, Parts]] = field(default_factory=dict)
    drawing: Lock = field(default_factory=Lock)
    """Held by whoever draws: matplotlib's settings are one for all threads."""

    def lines(self) -> list[Line]:
        """Return a line a run."""
        with self.drawing:
            return self.listing.lines()

    def of_list(self) -> Parts:
        """Return the parts of the list of runs."""
        lines = self.lines()
        counts = [(s, sum(x.state == s for x in lines)) for s in ("running", "failed")]
        said = [f"{len(lines)} run{'s' * (len(lines) != 1)}"]
        said += [f"{number} {state}" for state, number in counts if number]
        folder = self.folder
        page = {"lines": lines, "root": str(folder.root), "command": folder.command()}
        return {"said": ", ".join(said), "runs": rendered("runs.html.j2", page)}

    def of_run(self, name: str) -> Parts:
        """Return the parts of the page of a run.

        Raises:
            Unknown: where there is no such run.
            ValueError: where it may not be read.
        """
        path = self.folder.run(name)
        with self.drawing:
            line = self.listing.line(name, path)
            stamps = [stamp_of(path, _SHOWN)[0]]
            below = path / "baselines"
            if below.is_dir():
                stamps += [
                    stamp_of(each, ("metrics.jsonl",))[0] for each in sorted(below.iterdir())
                ]
            known = self._made.get(name)
            if known is None or known[0] != stamps:
                self._made[name] = known = (stamps, _sections(path))
            parts = dict(known[1])
        page = {"line": line, "folder": str(path), "resume": f"fedloom resume {quote(str(path))}"}
        parts["state"] = rendered("run_state.html.j2", page)
        parts["log"] = rendered("run_log.html.j2", {"lines": tail(path, _LINES), "line": line})
        return parts


def _sections(path: Path) -> Parts:
    """Return what is read of a run's records; a sentence where they are damaged."""
    empty = {"learning": "", "who": ""}
    if not (path / "metrics.jsonl").exists():
        return empty
    try:
        with told(path):
            own = read_results(path)
            if not own.history.lines:
                return empty
            page = live_sections(own)
            page |= {"absences": _absences(own), "sites": _sites(path)}
    except (ValueError, OSError) as error:
        return {**empty, "learning": rendered("damaged.html.j2", {"reason": str(error)})}
    return {
        "learning": rendered("run_learning.html.j2", page),
        "who": rendered("run_who.html.j2", page),
    }


def _absences(own: Results) -> dict[str, Any] | None:
    """Return in which rounds clients brought no reply; None where all did."""
    replies = dict(own.history.of("comm/num_replies"))
    rows = [
        {"round": number, "absent": int(count), "replies": int(replies.get(number, 0))}
        for number, count in own.history.of("comm/num_absent")
        if count
    ]
    total = sum(row["absent"] for row in rows)
    kept = own.history.of("comm/round_kept")
    unchanged = sum(not value for _, value in kept)
    if not rows and not unchanged:
        return None
    said = f"{total} client-round{'s' * (total != 1)} brought no reply"
    if unchanged:
        said += f"; {unchanged} of {len(kept)} rounds left the model as it was"
    return {"said": f"{said}.", "rows": rows[::-1][:_ABSENT], "more": max(0, len(rows) - _ABSENT)}


def _sites(path: Path) -> list[Mapping[str, str]]:
    """Return what the server of a federation knows of its sites; nothing of a run that has none."""
    file = path / "status.json"
    if not file.exists():
        return []
    found = read_json(file, dict, remedy="remove it and start the server again")
    return [
        {
            "site": str(site),
            "connected": "yes" if record["connected"] else "no",
            "down": human_bytes(record["download_bytes"]),
            "up": human_bytes(record["upload_bytes"]),
            "absent": str(record["num_absent"]),
            "reason": str(record["last_absence"]),
        }
        for site, record in sorted(found["sites"].items())
    ]


def title_of(line: Line) -> str:
    """Return what a page of a run is called."""
    return line.name if line.name == line.id else f"{line.name} ({line.id})"
