"""A line a run: its state, how far it is, and read again only where a file has changed."""

import os
import shutil
import time
from pathlib import Path

import pytest
from tests.board.conftest import Make, add_round

from fedloom.board.folder import Folder
from fedloom.board.listing import Line, Listing
from fedloom.rounds.failure import failure_kept, read_failure
from fedloom.rounds.lock import held
from fedloom.search.space import read_search
from fedloom.search.study import opened


def lines(folder: Path) -> dict[str, Line]:
    return {line.id: line for line in Listing(Folder.at(folder)).lines()}


def test_a_line_says_where_a_run_stands_and_what_came_of_it(runs: Path) -> None:
    found = lines(runs)
    assert found.keys() == {"one", "deep/two", "cut"}
    one, cut = found["one"], found["cut"]
    assert (one.state, one.name, one.done, one.total) == ("finished", "one", 4, 4)
    assert (one.metric, one.before, one.after) == ("Test exact match", "0.0 %", "80.0 %")
    assert (one.traffic, one.date) == ("8.00 kB", "2026-01-02 03:04")
    assert (cut.state, cut.done, cut.total, cut.share) == ("stopped", 2, 9, 22)
    assert (cut.metric, cut.after) == ("Test loss", "1.000")


def test_a_folder_that_is_itself_a_run_is_listed(runs: Path) -> None:
    assert list(lines(runs / "one")) == ["."]


def test_a_run_is_running_while_a_process_holds_it_and_says_how_long_it_takes(runs: Path) -> None:
    listing = Listing(Folder.at(runs))
    with held(runs / "cut"):
        add_round(runs / "cut", 3, **{"time/round_seconds": 20.0})
        first = listing.lines()[0]
        assert (first.id, first.state, first.left) == ("cut", "running", "2 min 00 s")
    (again,) = [line for line in listing.lines() if line.id == "cut"]
    assert again.state == "stopped"


def test_a_lock_that_a_killed_process_left_is_nobodys(runs: Path) -> None:
    (runs / "cut" / "lock").write_text('{"pid": 1, "host": "elsewhere", "since": "2026-01-01"}')
    assert lines(runs)["cut"].state == "running", "who is on another host cannot be asked"
    here = os.uname().nodename
    (runs / "cut" / "lock").write_text(
        f'{{"pid": {2**22 - 1}, "host": "{here}", "since": "2026-01-01T00:00:00+00:00"}}'
    )
    assert lines(runs)["cut"].state == "stopped"


def test_a_search_under_way_is_no_run_and_its_trials_are(runs: Path, fabricate: Make) -> None:
    pytest.importorskip("optuna")
    search = runs / "search"
    fabricate("0000", folder=search / "trials" / "0000")
    with held(search), opened(search, read_search({"space": {"local.steps": [1, 2]}})):
        assert "search/trials/0000" in lines(runs)
        assert "search" not in lines(runs)
        assert list(lines(search)) == ["trials/0000"]


def test_a_run_that_failed_says_why_until_it_gets_farther(runs: Path) -> None:
    cut = runs / "cut"
    with pytest.raises(ZeroDivisionError), failure_kept(cut, quiet=False):
        raise ZeroDivisionError("client-1 has\nno rows")
    assert (lines(runs)["cut"].state, lines(runs)["cut"].note) == ("failed", "client-1 has no rows")
    assert "Traceback" in (cut / "failed.txt").read_text()
    os.utime(cut / "failed.txt", (1, 1))
    assert lines(runs)["cut"].state == "stopped"
    with failure_kept(cut, quiet=False):
        pass
    assert read_failure(cut) is None


def test_whoever_stops_a_run_is_no_failure_and_a_quiet_one_keeps_the_kind_alone(
    tmp_path: Path,
) -> None:
    with pytest.raises(KeyboardInterrupt), failure_kept(tmp_path, quiet=False):
        raise KeyboardInterrupt
    assert read_failure(tmp_path) is None
    with pytest.raises(ValueError), failure_kept(tmp_path, quiet=True):  # noqa: PT011
        raise ValueError("client-1 has no rows")
    assert (tmp_path / "failed.txt").read_text() == "ValueError"


def test_a_finished_run_that_went_on_and_was_stopped_is_stopped(runs: Path) -> None:
    summary = (runs / "one" / "summary.json").read_text()
    (runs / "one" / "summary.json").write_text(summary.replace("{", '{"rounds": 4, ', 1))
    assert lines(runs)["one"].state == "finished"
    add_round(runs / "one", 5)
    assert lines(runs)["one"].state == "stopped"


def test_a_run_that_cannot_be_read_is_a_line_that_says_so(runs: Path) -> None:
    (runs / "one" / "metrics.jsonl").write_text('{"round": 0}\nnonsense\n{"round": 2}\n')
    (runs / "cut" / "recipe.yaml").write_text("{")
    found = lines(runs)
    assert "line 2 of" in found["one"].note
    assert "recipe.yaml is not YAML" in found["cut"].note
    assert found["deep/two"].state == "finished"


@pytest.mark.slow
def test_two_hundred_runs_are_listed_in_less_than_a_second_and_again_for_less(
    tmp_path: Path, fabricate: Make
) -> None:
    first = fabricate("r", folder=tmp_path / "all" / "0", rounds=40)
    for number in range(1, 200):
        shutil.copytree(first, tmp_path / "all" / str(number))
    listing = Listing(Folder.at(tmp_path / "all"))

    def seconds() -> float:
        # Of the processor: the machine may be busy with others.
        began = time.process_time()
        assert len(listing.lines()) == 200
        return time.process_time() - began

    cold, warm = seconds(), min(seconds() for _ in range(3))
    assert cold < 1
    assert warm < cold / 3
    add_round(tmp_path / "all" / "7", 41)
    assert {line.done for line in listing.lines()} == {40, 41}
