"""The board's addresses: the list, a run, its report, runs beside each other, a chat, and what changes meanwhile."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from fedloom.board.beside import beside
from fedloom.board.folder import HERE, Folder, Unknown, told
from fedloom.board.guard import INERT, Door, Guard, refusal
from fedloom.board.listing import Line, Listing
from fedloom.board.live import Live, Parts, title_of
from fedloom.board.markup import ASSETS, FOLDER, rendered
from fedloom.board.talk import Question, Stopped, Talk, models_of
from fedloom.report.page import FILE as REPORT
from fedloom.report.page import report_html

Seat = tuple[Line, str, str]
"""A run, one of its models, and what the page calls that."""
PERIOD = 0.5
"""Seconds between looks at the files; four times as long as a look took, if that is longer."""
_ALIVE = 15.0
"""Seconds after which a line is sent that says nothing, so that nobody between takes the connection for dead."""
_MOST = 1 << 20
"""Bytes of a question."""
_STREAMS = 64
"""Pages that are told of changes at once."""


class _Stream(StreamingResponse):
    """Server-sent events; `ended` is called however they end, begun or not."""

    def __init__(self, events: AsyncIterator[str], ended: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ended()


@dataclass
class Board:
    """Everything behind the pages."""

    folder: Folder
    live: Live
    talk: Talk
    closing: Event = field(default_factory=Event)
    """Set when the server ends: streams end then."""
    streams: int = 0
    """Pages that are told of changes now: counted when they ask, so that many at once are no more than allowed."""
    threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(8))

    @classmethod
    def of(cls, path: Path) -> "Board":
        """Watch a folder."""
        folder = Folder.at(path)
        return cls(folder, Live(folder, Listing(folder)), Talk(folder))

    def application(self, door: Door) -> ASGIApp:
        """Return the board as an ASGI application behind its door."""
        routes = [
            Route("/", self.runs),
            Route("/run", self.run),
            Route("/report", self.report),
            Route("/compare", self.compare),
            Route("/chat", self.chat),
            Route("/chat", self.answer, methods=["POST"]),
            Route("/events", self.events),
            *(Route(f"/{name}", self.asset) for name in ASSETS),
        ]
        handlers: dict[Any, Any] = {ValueError: _told, OSError: _told, HTTPException: _missing}
        return Guard(Starlette(routes=routes, exception_handlers=handlers), door)

    async def runs(self, request: Request) -> Response:
        """Show the list."""
        parts = await run_in_threadpool(self.live.of_list)
        return _page("list.html.j2", {"name": "Runs", "parts": parts, **self._shared})

    async def run(self, request: Request) -> Response:
        """Show one run."""
        name = request.query_params.get("run", HERE)
        parts = await run_in_threadpool(self.live.of_run, name)
        line = self.live.listing.line(name, self.folder.run(name))
        page = {"name": title_of(line), "parts": parts, **self._shared, "id": name}
        return _page("run.html.j2", page)

    async def report(self, request: Request) -> Response:
        """Show a run's report: the file it wrote at its end, before that what it would be now."""
        name = request.query_params.get("run", HERE)
        path = self.folder.run(name)
        file, line = path / REPORT, self.live.listing.line(name, path)
        headers = {"content-security-policy": INERT}
        if line.state == "finished" and file.exists():
            return FileResponse(file, media_type="text/html", headers=headers)
        text = await run_in_threadpool(self._drawn, path, lambda: report_html(path))
        return HTMLResponse(text, headers=headers)

    async def compare(self, request: Request) -> Response:
        """Show chosen runs beside each other."""
        names = list(dict.fromkeys(request.query_params.getlist("run")))
        metric = request.query_params.get("metric") or None
        lines = await run_in_threadpool(self.live.lines)
        page = {"name": "Compare", **self._shared, "lines": lines, "chosen": names}
        if len(names) < 2:
            return _page("compare_board.html.j2", {**page, "found": None, "reason": ""})
        paths = [self.folder.run(name) for name in names]
        try:
            found = await run_in_threadpool(
                self._drawn, self.folder.root, lambda: beside(paths, metric)
            )
        except (ValueError, OSError) as error:
            return _page("compare_board.html.j2", {**page, "found": None, "reason": str(error)})
        return _page("compare_board.html.j2", {**page, "found": found, "reason": "", **found})

    async def chat(self, request: Request) -> Response:
        """Show the page on which two models are asked."""
        seats = await run_in_threadpool(self._seats)
        first = request.query_params.getlist("run")
        sides = _sides(seats, first) if seats else []
        page = {"name": "Chat", **self._shared, "seats": seats, "sides": sides}
        return _page("chat.html.j2", page)

    def _seats(self) -> list[Seat]:
        """Return every model of every run that has any."""
        runs = self.folder.runs()
        return [
            (line, model, said)
            for line in self.live.lines()
            if line.id in runs and (line.done or line.state == "finished")
            for model, said in _models(self.folder, runs[line.id])
        ]

    async def answer(self, request: Request) -> Response:
        """Answer one question by one model, a line of JSON for everything that is told of it."""
        body = b""
        async for piece in request.stream():
            body += piece
            if len(body) > _MOST:
                return refusal(413, f"A question has at most {_MOST} bytes.")
        question = Question.read(body)
        self.folder.run(question.run)
        lines = self._told(question)
        return StreamingResponse(lines, media_type="application/x-ndjson")

    async def _told(self, question: Question) -> AsyncIterator[str]:
        loop, told = asyncio.get_running_loop(), asyncio.Queue[Mapping[str, str] | None]()
        stopped = Event()

        def say(what: Mapping[str, str] | None) -> None:
            loop.call_soon_threadsafe(told.put_nowait, what)

        def work() -> None:
            try:
                self.talk.answer(question, say, stopped)
            except Stopped:
                pass
            except Exception as error:  # noqa: BLE001 whatever a model meets, the page is told
                say({"error": " ".join(str(error).split()) or type(error).__name__})
            finally:
                say(None)

        self.threads.submit(work)
        try:
            while (what := await told.get()) is not None:
                yield json.dumps(what) + "\n"
        finally:
            stopped.set()

    async def events(self, request: Request) -> Response:
        """Send the parts of a page that change, as server-sent events."""
        name = request.query_params.get("run")
        if name is not None:
            self.folder.run(name)
        if self.streams >= _STREAMS:
            return refusal(503, f"{_STREAMS} pages are open already: close some.")
        parts = self.live.of_list if name is None else lambda: self.live.of_run(name)
        self.streams += 1
        return _Stream(self._changes(parts), self._ended)

    def _ended(self) -> None:
        self.streams -= 1

    async def _changes(self, parts: Callable[[], Parts]) -> AsyncIterator[str]:
        sent: Parts = {}
        told = time.monotonic()
        while not self.closing.is_set():
            began = time.monotonic()
            try:
                found = await run_in_threadpool(parts)
            except (ValueError, OSError) as error:
                found = {"state": rendered("damaged.html.j2", {"reason": str(error)})}
            now = time.monotonic()
            changed = {name: html for name, html in found.items() if sent.get(name) != html}
            if changed:
                sent |= changed
                yield f"data: {json.dumps(changed)}\n\n"
            elif now - told > _ALIVE:
                yield ": nothing new\n\n"
            told = now if changed or now - told > _ALIVE else told
            await asyncio.sleep(max(PERIOD, 4 * (now - began)))

    async def asset(self, request: Request) -> Response:
        """Send what pages load."""
        name = request.url.path.lstrip("/")
        return FileResponse(FOLDER / name, media_type=ASSETS[name])

    @property
    def _shared(self) -> Mapping[str, str]:
        return {"root": str(self.folder.root), "command": self.folder.command()}

    def _drawn(self, what: Path, draw: Callable[[], Any]) -> Any:
        with self.live.drawing, told(what):
            return draw()


def _models(folder: Folder, run: Path) -> list[tuple[str, str]]:
    try:
        folder.check(run)
        return list(models_of(run))
    except (ValueError, OSError):  # what is wrong with it stands on its own page
        return []


def _sides(seats: Sequence[Seat], runs: Sequence[str]) -> list[int]:
    """Return the seats that are chosen at first: two runs, or one before and after training."""
    places: dict[str, list[int]] = {}
    for at, (line, _, _) in enumerate(seats):
        places.setdefault(line.id, []).append(at)
    first, *others = [places[run] for run in dict.fromkeys([*runs, *places]) if run in places]
    second = others[0] if others and sum(run in places for run in runs) > 1 else None
    return [first[0], second[0]] if second else [first[-1], first[0]]


def _page(template: str, page: Mapping[str, Any]) -> Response:
    return HTMLResponse(rendered(template, page))


async def _told(_: Request, error: Exception) -> Response:
    return refusal(404 if isinstance(error, Unknown | FileNotFoundError) else 400, str(error))


async def _missing(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return refusal(error.status_code, f"There is no such page ({error.detail}).")
