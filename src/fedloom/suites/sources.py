"""Where the items of a public test are: a file, a folder of files, or a data set of the Hub."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fedloom.data.data_settings import DataSettings
from fedloom.data.readers import Row
from fedloom.data.sources import as_path, take_rows

_HUB = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]*))?(?::([\w.-]+))?")


@dataclass(frozen=True)
class Source:
    """A file, a folder whose files are read one after another, or `OWNER/NAME[:CONFIG[:SPLIT]]` of the Hub, `test` if no split is named."""

    name: str

    @cached_property
    def rows(self) -> Sequence[Row]:
        """Return its rows, SQuAD's articles and the tasks of Natural Instructions opened into one an item.

        Raises:
            ValueError: where there is nothing, or what is there cannot be read.
        """
        settings = self._settings()
        try:
            return take_rows(settings).rows
        except ValueError as error:
            raise ValueError(
                f"the suite's items: {str(error).removeprefix('data.source ')}"
            ) from error

    @cached_property
    def sha256(self) -> str:
        """Return the hash of a file, of all files of a folder, or of the rows that the Hub gave."""
        path = Path(self.name).expanduser()
        if path.is_file():
            return hashlib.sha256(path.read_bytes()).hexdigest()
        total = hashlib.sha256()
        for row in self.rows:
            total.update(json.dumps(row.values, sort_keys=True, default=str).encode())
        return total.hexdigest()

    def _settings(self) -> DataSettings:
        if Path(self.name).expanduser().exists():
            return DataSettings(source=as_path(self.name))
        found = _HUB.fullmatch(self.name)
        if found is None or re.search(r"\.(jsonl?|csv|tsv|parquet)(\.gz)?$", self.name):
            raise ValueError(f"the suite's file {self.name} does not exist")
        name, config, split = found.groups()
        return DataSettings(source=name, config=config or None, split=split or "test")
