"""A folder of runs that somebody fills to break the board: one sentence about that run, and all others as they are."""

import asyncio
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.board.conftest import client_of

from fedloom.board.app import _STREAMS, Board
from fedloom.board.guard import Door
from fedloom.report.run_folder import read_results

ALIASES = "a0: &a0 [x, x]\n" + "".join(
    f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 30)
)


def huge(file: Path) -> None:
    """Make a file of a tebibyte that takes no disk."""
    with file.open("wb") as out:
        out.truncate(1 << 40)


def fifo(file: Path) -> None:
    file.unlink(missing_ok=True)
    os.mkfifo(file)


def text(content: str) -> Callable[[Path], Any]:
    return lambda file: file.write_text(content)


@pytest.mark.parametrize(
    ("file", "attack", "sentence"),
    [
        ("lock", fifo, "lock is neither a file nor a folder"),
        ("lock", lambda file: file.symlink_to("/dev/zero"), "lock is a link that leads out of"),
        ("lock", huge, "lock has 1100 GB, and the board reads files of at most 268 MB"),
        ("metrics.jsonl", huge, "metrics.jsonl has 1100 GB"),
        ("log.txt", lambda file: file.symlink_to("log.txt"), "symbolic links"),
        ("summary.json", text(f'{{"rounds": {"9" * 5000}}}'), "summary.json is not JSON"),
        ("recipe.yaml", text(f"{ALIASES}name: *a29"), "recipe.yaml has more than 100000 values"),
        ("recipe.yaml", text("name: &a [*a]"), "recipe.yaml has more than 100000 values"),
    ],
)
def test_a_file_that_breaks_whoever_reads_it_is_a_sentence(
    runs: Path, file: str, attack: Callable[[Path], Any], sentence: str
) -> None:
    attack(runs / "one" / file)
    client = client_of(runs)
    page = client.get("/")
    assert page.status_code == 200
    assert sentence in page.text
    assert "deep/two" in page.text
    for url in ("/run?run=one", "/report?run=one", "/compare?run=one&run=cut"):
        answer = client.get(url)
        assert answer.status_code in (200, 400)
        assert sentence in answer.text, url


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("lock", "[" * 100_000),
        ("lock", json.dumps({"host": os.uname().nodename, "pid": 1 << 80, "since": "2026-01-01"})),
        ("environment.json", '{"date": "0001-01-01T00:00:00+23:59"}'),
        ("environment.json", '{"date": "2026-01-01", "cpu": "c", "gpus": 3}'),
        ("status.json", '{"sites": {"a": 3}}'),
        ("summary.json", '{"name": "\\ud800", "num_trainable": []}'),
        ("summary.json", json.dumps({"name": "x" * 100_000})),
        ("manifest.json", '{"clients": {"client-000": {"labels": {"a": 3}}}, "by": "a"}'),
    ],
)
def test_a_value_that_no_run_writes_breaks_no_page(runs: Path, file: str, content: str) -> None:
    (runs / "one" / file).write_text(content)
    client = client_of(runs)
    for url in ("/chat", "/report?run=one"):
        assert client.get(url).status_code in (200, 400), url
    page = client.get("/")
    assert "deep/two" in page.text
    assert len(page.content) < 50_000


def test_a_name_that_is_no_text_is_spelled_out_and_its_page_is_found(runs: Path) -> None:
    os.rename(runs / "one", os.fsencode(runs) + b"/\xff")
    client = client_of(runs)
    assert "/run?run=%5Cxff" in client.get("/").text
    assert "Test loss" in client.get("/run", params={"run": "\\xff"}).text


def test_baselines_that_lead_back_to_their_run_are_read_once(runs: Path) -> None:
    (runs / "one" / "baselines").mkdir()
    for name in "ab":
        (runs / "one" / "baselines" / name).symlink_to(runs / "one")
    found = read_results(runs / "one").baselines
    assert found.keys() == {"a", "b"}
    assert not found["a"].baselines


def test_no_more_pages_are_told_of_changes_than_may_be_however_they_come(runs: Path) -> None:
    board = Board.of(runs)
    application, found = board.application(Door("127.0.0.1")), list[int]()
    scope = {"type": "http", "method": "GET", "path": "/events", "query_string": b"run=cut"}
    scope |= {"headers": [(b"host", b"127.0.0.1")]}

    async def ask() -> None:
        async def receive() -> dict[str, Any]:
            # A browser that goes once it has seen what it is told first.
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                await asyncio.sleep(0)
                found.append(message["status"])
                if len(found) == 3 * _STREAMS:
                    left.set()

        await application(dict(scope), receive, send)

    async def all_ask() -> None:
        await asyncio.wait_for(asyncio.gather(*(ask() for _ in range(3 * _STREAMS))), 60)

    left = asyncio.Event()
    asyncio.run(all_ask())
    assert found.count(200) == _STREAMS
    assert found.count(503) == 2 * _STREAMS
    assert board.streams == 0


def test_a_run_that_is_deleted_while_it_is_watched_is_a_sentence_and_comes_back(runs: Path) -> None:
    board = Board.of(runs)

    async def watch() -> list[str]:
        changes, told = board._changes(lambda: board.live.of_run("cut")), []
        told.append(await anext(changes))
        os.rename(runs / "cut", runs.parent / "away")
        told.append(await anext(changes))
        os.rename(runs.parent / "away", runs / "cut")
        told.append(await anext(changes))
        return told

    there, gone, again = asyncio.run(watch())
    assert json.loads(there[6:]).keys() == {"learning", "who", "state", "log"}
    assert "there is no run" in json.loads(gone[6:])["state"]
    assert "2 of 9 rounds" in json.loads(again[6:])["state"]
