"""The proxy forwards a SuperNode's requests and nothing else, however they are written."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the extra `flower` is not installed")

import httpx

from fedloom.engines.flower import proxy

SEEN: list[tuple[str, bytes]] = []


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Callable[..., httpx.Response]:
    """Return a caller of the proxy in front of a SuperLink that notes what it is asked."""

    def superlink(request: httpx.Request) -> httpx.Response:
        SEEN.append((request.url.raw_path.decode(), request.content))
        return httpx.Response(200, stream=httpx.ByteStream(b"answer"), headers={"x-own": "1"})

    real = httpx.AsyncClient

    def make(**settings: Any) -> httpx.AsyncClient:
        return real(base_url=settings["base_url"], transport=httpx.MockTransport(superlink))

    SEEN.clear()
    monkeypatch.setattr(httpx, "AsyncClient", make)
    app = proxy.application("https://127.0.0.1:1", ssl.create_default_context(), 1000)

    async def asked(method: str, path: str, **sent: Any) -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with real(base_url="https://server", transport=transport) as client:
            return await client.request(method, path, **sent)

    return lambda *words, **sent: asyncio.run(asked(*words, **sent))


@pytest.mark.parametrize("path", sorted(proxy.ALLOWED))
def test_a_supernodes_requests_pass(ask: Any, path: str):
    answer = ask("POST", path, content=b"body")
    assert (answer.status_code, answer.content, answer.headers["x-own"]) == (200, b"answer", "1")
    assert [(path, b"body")] == SEEN


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/list-nodes",
        "/v1/control/start-run",
        "/v1/fleet/register-node",
        "/v1/fleet/unregister-node",
        "/v1/fleet/pull-messages/",
        "/v1/fleet/pull-messages?x=1",
        "/v1/fleet/%70ull-messages",
        "/v1/fleet/%2e%2e/control/list-nodes",
        "/v1/runtime/acquire-task",
        "/docs",
        "/openapi.json",
        "/",
    ],
)
@pytest.mark.parametrize("method", ["POST", "GET", "PUT", "OPTIONS"])
def test_everything_else_is_refused(ask: Any, method: str, path: str):
    assert ask(method, path, content=b"x").status_code == 403
    assert SEEN == []


def test_other_methods_on_open_paths_are_refused(ask: Any):
    assert ask("GET", "/v1/fleet/pull-messages").status_code == 403
    assert SEEN == []


def test_what_is_too_large_or_of_no_stated_length_is_not_read(ask: Any):
    assert ask("POST", "/v1/fleet/push-object", content=bytes(1001)).status_code == 413
    assert ask("POST", "/v1/fleet/push-object", content=_endless()).status_code == 413
    assert SEEN == []


async def _endless() -> AsyncIterator[bytes]:
    yield b"x"


def test_headers_of_one_hop_are_not_forwarded():
    assert {"host", "connection", "transfer-encoding"} <= proxy._HOP
