"""Who may ask, and what a page may do: host names, the token, requests of other sites, headers.

A page of another site can make a browser ask this machine, by its address or by a name of its own that it points here.
So a request names this machine as its host, and what is sent comes from a page of the board. Wherever others reach the
board, whoever asks has its token.
"""

import hmac
import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedloom.board.markup import rendered
from fedloom.deploy.listening import is_loopback

LEAST = 16
"""Characters of a token."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
"""Of the board's pages: code from its own file alone; the figures have styles inside."""
INERT = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox"
"""Of a report, which is a file: whatever it holds, nothing of it runs, asks or is anybody's page."""
_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


@dataclass(frozen=True)
class Door:
    """Where the board is, and what opens it."""

    host: str
    """That it listens at."""
    token: str | None = None
    """None: whoever reaches this machine's loopback may look."""

    def __post_init__(self) -> None:
        """Refuse a board that others reach without a token."""
        if self.token is None and not is_loopback(self.host):
            raise ValueError(f"a board at {self.host} needs a token, as other machines reach it")
        if self.token is not None and (len(self.token) < LEAST or not self.token.isprintable()):
            raise ValueError(f"a token must have at least {LEAST} printable characters")

    def admits(self, given: str) -> bool:
        """Return whether this is the token, in a time that does not tell how much of it is right."""
        return self.token is None or hmac.compare_digest(given.encode(), self.token.encode())

    def answers_to(self, host: str) -> bool:
        """Return whether a `Host` header names this machine: no name that somebody else points here does."""
        name = _name(host)
        if is_loopback(name):
            return True
        if is_loopback(self.host):
            return False
        return _is_address(name) or name in (self.host.lower(), socket.gethostname().lower())


class Guard:
    """ASGI: lets requests in that may come in, and puts headers on every answer."""

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self.app, self.door = app, door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return

        async def dressed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in {**_HEADERS, "content-security-policy": POLICY}.items():
                    headers.setdefault(name, value)
            await send(message)

        refused = self._refusal(scope)
        await (refused or self.app)(scope, receive, dressed)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self.door.answers_to(hosts[0]):
            return refusal(421, "This address is not the board's: open the one it printed.")
        asks = scope["method"] in ("GET", "HEAD")
        if _is_embedded(headers) if asks else _is_foreign(headers, hosts[0]):
            return refusal(403, "This was sent by a page of another site.")
        if self.door.token is None:
            return None
        query = parse_qsl(scope["query_string"].decode("latin-1"))
        if any(name == "token" and self.door.admits(value) for name, value in query):
            return self._welcome(scope, [pair for pair in query if pair[0] != "token"])
        if any(map(self.door.admits, _given(headers, self._cookie(scope)))):
            return None
        return refusal(401, "This board is opened by its token: open the address it printed.")

    def _welcome(self, scope: Scope, query: Sequence[tuple[str, str]]) -> Response:
        """Return a redirection that leaves the token out of the address, and keeps it in a cookie."""
        # One slash: two would be the beginning of another host.
        path = "/" + scope["path"].lstrip("/")
        answer = RedirectResponse(path + (f"?{urlencode(query)}" if query else ""), 303)
        assert self.door.token is not None
        answer.set_cookie(self._cookie(scope), self.door.token, httponly=True, samesite="strict")
        return answer

    def _cookie(self, scope: Scope) -> str:
        """Return the cookie's name: cookies are not told apart by port."""
        server = scope.get("server") or ("", 0)
        return f"fedloom-board-{server[1]}"


def refusal(status: int, sentence: str) -> Response:
    """Return a page with one sentence."""
    return HTMLResponse(rendered("refused.html.j2", {"name": sentence, "status": status}), status)


def _is_foreign(headers: Headers, host: str) -> bool:
    """Return whether a browser says that a request is of a page of another site, or it could be a form of one."""
    if headers.get("sec-fetch-site", "same-origin") != "same-origin":
        return True
    origin = headers.get("origin")
    if origin is not None and origin.partition("://")[2].lower() != host.lower():
        return True
    # What a form can send, a browser sends without asking first.
    return headers.get("content-type", "").partition(";")[0].strip() != "application/json"


def _is_embedded(headers: Headers) -> bool:
    """Return whether a browser says that a page of another site loads this as a part of itself; links may lead here."""
    foreign = headers.get("sec-fetch-site", "none") in ("cross-site", "same-site")
    return foreign and headers.get("sec-fetch-dest") != "document"


def _given(headers: Headers, cookie: str) -> list[str]:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    given = [token.strip()] if scheme.lower() == "bearer" else []
    try:
        cookies = SimpleCookie(headers.get("cookie", ""))
    except CookieError:
        return given
    return [*given, *([cookies[cookie].value] if cookie in cookies else [])]


def _name(host: str) -> str:
    """Return a `Host` header without its port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
