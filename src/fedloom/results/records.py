"""What a run wrote down, as records: a list of dicts, or a table where pandas is installed."""

import math
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from fedloom.tracking.metrics_log import MetricsLog
from fedloom.tracking.records import records


class Records(list[dict[str, Any]]):
    """One dict a row; rows need not have the same keys."""

    def to_pandas(self) -> Any:
        """Return a pandas DataFrame, a column a key.

        Raises:
            ValueError: where pandas is not installed.
        """
        try:
            pandas = import_module("pandas")
        except ImportError as error:
            raise ValueError(
                "to_pandas needs pandas, which is not installed: pip install pandas, or take the records as they are"
            ) from error
        return pandas.DataFrame.from_records(list(self))


def metric_records(folder: Path) -> Records:
    """Return a record a round from 0, the model before training; what was not finite is NaN."""
    return Records(map(dict, MetricsLog.read(folder / "metrics.jsonl").lines))


def client_records(folder: Path) -> Records:
    """Return a record an evaluation of a client: round, client, split, and its metrics by name."""
    return Records(_flat(records(folder / "clients.jsonl").rows()))


def _flat(rows: Iterable[Mapping[str, Any]]) -> Iterable[dict[str, Any]]:
    for row in rows:
        metrics = {n: math.nan if v is None else v for n, v in row["metrics"].items()}
        yield {"round": row["round"], "client": row["client"], "split": row["split"], **metrics}
