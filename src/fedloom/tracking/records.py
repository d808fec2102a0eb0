"""A run's own numbers: files of one JSON object a line, each with its round."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from fedloom.core.files import write_atomic
from fedloom.core.metrics import CLIENT_SPLITS
from fedloom.core.protocols import Metrics

Wrong = Callable[[Mapping[str, Any]], str | None]
"""Says what is wrong with a line, if anything."""


class JsonLines:
    """A file of one JSON object a line, each with its round; a line may be cut short by a kill.

    Args:
        path: The file.
        wrong: Looks at what a line holds beside its round.
    """

    def __init__(self, path: Path, wrong: Wrong = lambda _: None) -> None:
        self.path = path
        self._wrong = wrong

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows and flush; NaN and infinite numbers become null, which any reader of JSON takes."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_lines(rows))

    def rows(self) -> list[dict[str, Any]]:
        """Return the complete rows; a half-written last one is left out.

        Raises:
            ValueError: naming the line that no run writes.
        """
        if not self.path.exists():
            return []
        rows: list[dict[str, Any]] = []
        try:
            lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        except OSError as error:
            raise ValueError(f"{self.path} cannot be read ({error.strerror})") from error
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                if number < len(lines):
                    raise ValueError(
                        f"line {number} of {self.path} is not JSON: remove it, or the file"
                    ) from error
                continue
            if wrong := _foreign(row, self._wrong):
                raise ValueError(f"line {number} of {self.path} {wrong}: remove it")
            rows.append(row)
        return rows

    def truncate_after(self, round: int) -> None:
        """Keep the rows of rounds up to `round`, in one atomic step."""
        if not self.path.exists():
            return
        remaining = [row for row in self.rows() if row["round"] <= round]
        write_atomic(self.path, _lines(remaining).encode())

    def log(self, round: int, metrics: Metrics) -> None:
        """Take the metrics of one round."""
        self.append([{"round": round, **metrics}])

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Do nothing: every line is on disk."""


def not_numbers(values: Mapping[str, Any]) -> str | None:
    """Return what is wrong where a value is neither a number nor null."""
    for name, value in values.items():
        if value is not None and type(value) not in (int, float):
            return f"has {name} {value!r}, which is no number"
    return None


def _no_client(row: Mapping[str, Any]) -> str | None:
    for name, kind in {"client": str, "split": str, "metrics": dict}.items():
        if not isinstance(row.get(name), kind):
            return f"has no {name} as a run writes it"
    return not_numbers(row["metrics"])


def _no_influence(row: Mapping[str, Any]) -> str | None:
    if not isinstance(row.get("influence"), dict):
        return "has no influence as a run writes it"
    if not all(type(part) in (int, float) for part in row["influence"].values()):
        return "has an influence that is no number"
    return None


def _no_costs(row: Mapping[str, Any]) -> str | None:
    costs = row.get("costs")
    if not isinstance(costs, dict) or not all(isinstance(own, dict) for own in costs.values()):
        return "has no costs as a run writes them"
    return next(filter(None, map(not_numbers, costs.values())), None)


RECORDS: Mapping[str, Wrong] = {
    "metrics.jsonl": not_numbers,
    "clients.jsonl": _no_client,
    "costs.jsonl": _no_costs,
    "influence.jsonl": _no_influence,
}
"""A line a round; a line a client and evaluation; a line a round of what clients spent; one of a robust rule."""


def records(file: Path) -> JsonLines:
    """Return one of a run's own files of records, by its name."""
    return JsonLines(file, RECORDS[file.name])


def unaccounted(
    line: Mapping[str, Any], clients: Iterable[Mapping[str, Any]]
) -> tuple[str, float, float] | None:
    """Return a split whose clients' own lines do not add up to a round's: its name, the examples found, those wanted.

    Args:
        line: Of a round, in metrics.jsonl.
        clients: The lines of that round in clients.jsonl.
    """
    found = dict.fromkeys((split[:-1] for split in CLIENT_SPLITS), 0.0)
    for row in clients:
        if row["split"] in found:
            found[row["split"]] += row["metrics"].get("num_examples") or 0
    for split, there in found.items():
        wanted = line.get(f"{split}/num_examples", 0)
        if wanted and there != wanted:
            return split, there, wanted
    return None


def _foreign(row: Any, wrong: Wrong) -> str | None:
    if not isinstance(row, dict) or type(row.get("round")) is not int or row["round"] < 0:
        return "is no object with the number of a round"
    return wrong(row)


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(finite(row), ensure_ascii=False) + "\n" for row in rows)


def finite(value: Any) -> Any:
    """Return a tree with null in place of every number that is not finite, as any reader of JSON takes it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return value
