"""The file that says which of the exported models is whose."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedloom.results.routing import model_of, write_routing


def routing(folder: Path, users: dict[str, list[str]], *, quiet: bool = False) -> dict[str, Any]:
    written = {name: folder / name for name in users}
    write_routing(folder, written, users, quiet=quiet)
    return json.loads((folder / "routing.json").read_text())


def test_one_model_is_everybodys(tmp_path: Path) -> None:
    told = routing(tmp_path, {"global": ["a", "b"]})
    assert told["clients"] == {"a": "global", "b": "global"}
    assert told["newcomers"] == {"model": "global", "why": "it is the only one"}
    assert model_of(tmp_path, None) == model_of(tmp_path, "b") == tmp_path / "global"


def test_newcomers_get_the_model_for_all_or_the_one_most_use(tmp_path: Path) -> None:
    users = {"north": ["a"], "south": ["b", "c"]}
    told = routing(tmp_path, users)
    assert told["models"]["south"] == {"path": "south", "num_clients": 2, "share": 2 / 3}
    assert told["newcomers"]["model"] == "south"
    assert routing(tmp_path, {**users, "global": []})["newcomers"]["model"] == "global"
    with pytest.raises(ValueError, match="client must be one of a, b, c, got None"):
        model_of(tmp_path, None)


def test_a_quiet_run_tells_of_nobody(tmp_path: Path) -> None:
    told = routing(tmp_path, {"north": ["a"], "south": ["b", "c"]}, quiet=True)
    assert told["clients"] == {}
    assert told["models"] == {"north": {"path": "north"}, "south": {"path": "south"}}
    assert told["newcomers"]["model"] is None
    with pytest.raises(ValueError, match="client must be one of north, south, got 'a'"):
        model_of(tmp_path, "a")
