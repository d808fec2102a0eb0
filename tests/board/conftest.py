"""A board over fabricated runs, asked without a network."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import ASGIApp
from tests.conftest import small_tree
from tests.report.conftest import fabricate

from fedloom import experiment
from fedloom.board.app import Board
from fedloom.board.guard import Door
from fedloom.recipe import build_recipe

__all__ = ["fabricate"]
HOME = "http://127.0.0.1:8642"
Make = Callable[..., Path]


class Asker:
    """A browser before an application, in this process."""

    def __init__(self, application: ASGIApp, url: str = HOME) -> None:
        self._application, self._url, self._cookies = application, url, httpx.Cookies()

    def get(self, url: str, **given: Any) -> httpx.Response:
        return asyncio.run(self._ask("GET", url, given))

    def post(self, url: str, **given: Any) -> httpx.Response:
        return asyncio.run(self._ask("POST", url, given))

    async def _ask(self, method: str, url: str, given: dict[str, Any]) -> httpx.Response:
        transport = httpx.ASGITransport(self._application)
        async with httpx.AsyncClient(
            transport=transport, base_url=self._url, cookies=self._cookies
        ) as client:
            answer = await client.request(method, url, **given)
            self._cookies = client.cookies
            return answer


def client_of(folder: Path) -> Asker:
    """Return a browser before a board."""
    return Asker(Board.of(folder).application(Door("127.0.0.1")))


def add_round(folder: Path, number: int, **metrics: float) -> None:
    """Let a run go on by one round."""
    row: dict[str, Any] = {"round": number, "seconds": float(number), **metrics}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


@pytest.fixture
def runs(tmp_path: Path, fabricate: Make) -> Path:
    """Return a folder of three runs: two finished ones and one that was stopped after two of nine rounds."""
    folder = tmp_path / "runs"
    fabricate("one", folder=folder / "one", top=0.8)
    fabricate("two", folder=folder / "deep" / "two", top=0.4)
    stopped = fabricate("cut", folder=folder / "cut", rounds=2, generate=False)
    (stopped / "summary.json").unlink()
    text = (stopped / "recipe.yaml").read_text()
    (stopped / "recipe.yaml").write_text(f"{text}run: {{rounds: 9}}\nlocal: {{steps: 7}}\n")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a small run of the bundled model, which answers more than its end."""
    folder = tmp_path_factory.mktemp("talk")
    sections = {"data": {"num_clients": 2}, "evaluation": {"max_new_tokens": 5, "generate": False}}
    local, run = {"steps": 1, "lr": 1e-3}, {"rounds": 1, "samples": 0}
    tree = small_tree(Path("builtin:tiny"), **sections, local=local, run=run)
    recipe = build_recipe(tree)
    experiment.run(recipe, folder / "run")
    return folder
