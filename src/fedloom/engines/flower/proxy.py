"""What a SuperLink shows to the network: the requests a SuperNode makes, and nothing else.

Its other interfaces share the port and ask nobody who they are: whoever reaches them can run code on every machine.
"""

import argparse
import json
import re
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

ALLOWED = frozenset(
    f"/v1/fleet/{call}"
    for call in (
        "activate-node",
        "deactivate-node",
        "send-node-heartbeat",
        "pull-messages",
        "push-messages",
        "get-run",
        "get-fab",
        "push-object",
        "pull-object",
        "confirm-message-received",
    )
)
"""Compared whole, before anything is decoded. Registering is not among them: names come from the keys here."""
_HOP = {"host", "connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade"}


def application(target: str, context: ssl.SSLContext, max_bytes: int) -> Starlette:
    """Return the proxy in front of `target`."""
    client = httpx.AsyncClient(base_url=target, verify=context, timeout=120, trust_env=False)

    @asynccontextmanager
    async def closing(_: Starlette) -> AsyncIterator[None]:
        yield
        await client.aclose()

    async def forward(request: Request) -> Response:
        path = request.scope["raw_path"].decode("latin-1")
        if request.method != "POST" or path not in ALLOWED or request.scope["query_string"]:
            return PlainTextResponse("not for you", 403)
        length = request.headers.get("content-length", "")
        if not re.fullmatch("[0-9]{1,12}", length) or int(length) > max_bytes:
            return PlainTextResponse("too large, or of no stated length", 413)
        try:
            body = await request.body()
        except ClientDisconnect:
            return PlainTextResponse("gone", 400)
        headers = [(k, v) for k, v in request.headers.items() if k not in _HOP]
        try:
            sent = client.build_request("POST", path, content=body, headers=headers)
            answer = await client.send(sent, stream=True)
        except httpx.HTTPError as error:
            return PlainTextResponse(f"the SuperLink does not answer: {error}", 502)
        passed = {k: v for k, v in answer.headers.items() if k not in _HOP}
        return StreamingResponse(
            answer.aiter_raw(), answer.status_code, passed, background=BackgroundTask(answer.aclose)
        )

    methods = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
    return Starlette(routes=[Route("/{path:path}", forward, methods=methods)], lifespan=closing)


def main() -> None:
    """Run the proxy with the settings in a file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("settings", type=Path)
    settings = json.loads(parser.parse_args().settings.read_text())
    context = ssl.create_default_context(cafile=settings["ca"])
    uvicorn.run(
        application(f"https://127.0.0.1:{settings['port']}", context, settings["max_bytes"]),
        host=settings["listen_host"],
        port=settings["listen_port"],
        ssl_certfile=settings["certificate"],
        ssl_keyfile=settings["certificate_key"],
        log_level="warning",
        access_log=False,
        server_header=False,
    )


if __name__ == "__main__":
    main()
