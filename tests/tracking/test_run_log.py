"""What a run said is in its folder: a line each, on a terminal or not, and why it failed until it gets farther."""

import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from fedloom import experiment
from fedloom.result import Result
from fedloom.results.chat import Chat
from fedloom.rounds.recipe_settings import Recipe
from fedloom.rounds.training import FinishedRound
from fedloom.tracking.run_log import FILE, RunLog, logged, tail

LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00 (.*)")


def said(folder: Path) -> list[str]:
    matches = [LINE.fullmatch(line) for line in tail(folder, 100)]
    return [match[1] for match in matches if match]


@pytest.mark.parametrize("quiet", [True, False])
def test_sentences_are_kept_whether_shown_or_not_and_tables_are_none(
    tmp_path: Path, quiet: bool
) -> None:
    console = Console(file=io.StringIO(), quiet=quiet, markup=False)
    with logged(console, tmp_path, quiet=False):
        console.print("a client [b]called\nso")
        console.print(Table("x"))
        console.print("")
    console.print("afterwards")
    assert said(tmp_path) == ["a client [b]called so"]


def test_a_run_that_may_tell_nothing_keeps_no_log(tmp_path: Path) -> None:
    console = Console(quiet=True)
    with logged(console, tmp_path, quiet=True) as log:
        console.print("client-1 is absent")
    assert log is None
    assert not (tmp_path / FILE).exists()


def test_the_end_of_a_long_log_begins_with_a_whole_line(tmp_path: Path) -> None:
    log = RunLog(tmp_path / FILE)
    for number in range(50):
        log.write(f"line {number}")
    assert said(tmp_path)[-1] == "line 49"
    assert len(tail(tmp_path, 3)) == 3
    cut = tail(tmp_path, 100, num_bytes=120)
    assert 0 < len(cut) < 5
    assert all(LINE.fullmatch(line) for line in cut)
    assert tail(tmp_path / "nowhere", 3) == []


def test_a_run_keeps_its_rounds_and_why_it_failed_until_it_is_finished(
    small_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = small_recipe(run={"samples": 0}, evaluation={"generate": False})
    console, terminal = (Console(file=io.StringIO(), force_terminal=t) for t in (False, True))

    def fail(finished: FinishedRound) -> None:
        if finished.number == 2:
            raise ZeroDivisionError("as it had to be")

    with pytest.raises(ZeroDivisionError):
        experiment.run(recipe, tmp_path, callbacks=[fail], console=console)
    assert (tmp_path / "failed.txt").read_text().startswith("as it had to be\n\nTraceback")
    experiment.run(recipe, tmp_path, callbacks=[fail], console=terminal)
    assert not (tmp_path / "failed.txt").exists()
    rounds = [line for line in said(tmp_path) if line.startswith("round")]
    assert [line.partition(":")[0] for line in rounds] == [f"round {n} of 3" for n in (1, 2, 3)]
    assert "going on after round 2" in said(tmp_path)
    opened = Result(tmp_path).open("chat")
    assert Chat.open(opened.session, "base").name == "base"
