"""The board in a browser, over a run that goes on meanwhile; its server is the command, as anybody starts it."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from tests.board.chromium import Browser, chromium
from tests.board.conftest import add_round
from tests.board.test_pages import HOSTILE, hostile

from fedloom.result import open_run
from fedloom.rounds.lock import held

CURVE = 'svg[aria-label="Train loss over the rounds"]'


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Yield the address of `fedloom board` over a folder; it ends by itself after ten minutes."""
    command = [sys.executable, "-m", "fedloom.cli", "board", str(folder), "--listen", "127.0.0.1:0"]
    timeout = shutil.which("timeout")
    assert timeout
    process = subprocess.Popen(
        [timeout, "--foreground", "600", *command], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    try:
        said = process.stdout.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+", said)
        assert address, said
        yield address[0]
    finally:
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(60) == 0, "Ctrl-C is how it ends"
        process.stdout.close()


@pytest.mark.slow
def test_a_browser_watches_a_run_compares_and_chats_and_runs_no_name(
    runs: Path, trained: Path, tmp_path: Path
) -> None:
    hostile(runs)
    shutil.copytree(trained / "run", runs / "run")
    with chromium(tmp_path / "profile") as browser, served(runs) as address:
        browser.open(address)
        assert browser.value("document.querySelectorAll('.runs tbody tr').length") == 4
        assert HOSTILE in browser.value("document.querySelector('.runs').textContent")
        _filters(browser)
        with held(runs / "cut"):
            _grows(browser, f"{address}/run?run=cut", runs / "cut")
        browser.open(f"{address}/run?run=one")
        browser.value("fill('log', document.getElementById('part-log').innerHTML)")
        _compares(browser, address)
        _chats(browser, address, runs / "run")
        assert browser.complaints() == []
        _is_sent(address, runs / "cut")


def _filters(browser: Browser) -> None:
    browser.value(
        "const f = document.getElementById('filter'); f.value = 'stopp';"
        " f.dispatchEvent(new Event('input', {bubbles: true}))"
    )
    shown = "[...document.querySelectorAll('.runs tbody tr')].filter((row) => !row.hidden).length"
    assert browser.value(shown) == 0, "it has failed"
    assert not browser.value("document.getElementById('none').hidden")


def _grows(browser: Browser, address: str, folder: Path) -> None:
    browser.open(address)
    points = f"document.querySelectorAll('{CURVE} use').length"
    before = browser.value(points)
    browser.value("window.same = 1")
    add_round(folder, 3, **{"train/loss": 0.5, "comm/num_absent": 1.0})
    browser.until(f"{points} === {before} + 2")  # a tick of the axis, and the point
    assert browser.until("document.body.textContent.includes('3 of 9 rounds')")
    assert browser.value("document.querySelector('.state').textContent") == "running"
    assert browser.value("window.same") == 1, "without being loaded again"


def _compares(browser: Browser, address: str) -> None:
    browser.open(address)
    for name in ("cut", "deep/two"):
        browser.value(f"document.querySelector('input[value=\"{name}\"]').click()")
    browser.value("document.querySelector('#choose button').click()")
    browser.until("location.pathname === '/compare' && document.readyState === 'complete'")
    assert browser.value("document.querySelectorAll('#figures svg').length") == 2
    assert browser.value("document.querySelector('#settings').textContent.includes('local.steps')")


def _chats(browser: Browser, address: str, folder: Path) -> None:
    browser.open(f"{address}/chat?run=run")
    chosen = "[...document.querySelectorAll('.side select')].map((s) => s.selectedOptions[0].text)"
    assert browser.value(chosen) == ["run: before training", "run: after training"]
    browser.value("document.getElementById('text').value = 'What is 2 + 2?'; ask.requestSubmit()")
    browser.until("!document.querySelector('#ask button').disabled")
    said = browser.value(
        "[...document.querySelectorAll('.said .assistant')].map((line) => line.textContent)"
    )
    own = open_run(folder)
    assert said == [own.chat(name).answer("What is 2 + 2?") for name in ("base", None)]
    assert said[0]


def _is_sent(address: str, folder: Path) -> None:
    """Show that an event comes for what changed, and for nothing else."""
    with httpx.stream("GET", f"{address}/events?run=cut", timeout=60) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        events = (line for line in stream.iter_lines() if line.startswith("data: "))
        assert set(httpx.Response(200, text=next(events)[6:]).json()) >= {"state", "learning"}
        (folder / "log.txt").write_text("2026-01-01 a word\n")
        assert list(httpx.Response(200, text=next(events)[6:]).json()) == ["log"]
