"""Who may ask: this machine's own names, pages of the board, and elsewhere whoever has the token."""

from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from tests.board.conftest import Asker

from fedloom.board.guard import Door, Guard
from fedloom.cli_board import board

TOKEN = "a-token-of-some-length"
JSON = {"content-type": "application/json"}


def asked(door: Door, url: str = "http://127.0.0.1:8642") -> Asker:
    async def answer(request: Request) -> PlainTextResponse:
        return PlainTextResponse("in")

    routes = [Route("/{path:path}", answer, methods=["GET", "POST"])]
    return Asker(Guard(Starlette(routes=routes), door), url)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8642", 200),
        ("localhost", 200),
        ("LOCALHOST:9", 200),
        ("[::1]:8642", 200),
        ("evil.example:8642", 421),
        ("127.0.0.1.evil.example", 421),
        ("localhost.evil.example", 421),
        ("192.168.0.4", 421),
        ("", 421),
    ],
)
def test_a_name_that_somebody_points_here_is_refused(host: str, status: int) -> None:
    answer = asked(Door("127.0.0.1")).get("/", headers={"host": host})
    assert answer.status_code == status
    assert (answer.text == "in") == (status == 200)


def test_where_others_come_in_an_address_or_the_machines_own_name_is_asked_for() -> None:
    door = Door("board.lab", TOKEN)
    assert door.answers_to("board.lab:80")
    assert door.answers_to("10.0.0.3:80")
    assert not door.answers_to("evil.example")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (JSON, 200),
        ({**JSON, "origin": "http://127.0.0.1:8642"}, 200),
        ({**JSON, "origin": "http://evil.example"}, 403),
        ({**JSON, "origin": "http://127.0.0.1:9999"}, 403),
        ({**JSON, "origin": "null"}, 403),
        ({**JSON, "sec-fetch-site": "cross-site"}, 403),
        ({**JSON, "sec-fetch-site": "same-site"}, 403),
        ({"content-type": "text/plain"}, 403),
        ({"content-type": "application/x-www-form-urlencoded"}, 403),
        ({}, 403),
    ],
)
def test_what_another_sites_page_sends_is_refused(headers: dict[str, str], status: int) -> None:
    assert asked(Door("127.0.0.1")).post("/chat", headers=headers).status_code == status


@pytest.mark.parametrize(
    ("site", "dest", "status"),
    [
        ("cross-site", "image", 403),
        ("cross-site", "iframe", 403),
        ("same-site", "empty", 403),
        ("cross-site", "document", 200),
        ("same-origin", "empty", 200),
        ("none", "document", 200),
    ],
)
def test_another_sites_page_may_lead_here_but_load_nothing(
    site: str, dest: str, status: int
) -> None:
    headers = {"sec-fetch-site": site, "sec-fetch-dest": dest}
    assert asked(Door("127.0.0.1")).get("/events", headers=headers).status_code == status


def test_a_board_that_others_reach_must_have_a_token_that_nobody_guesses() -> None:
    with pytest.raises(ValueError, match="a board at 0\\.0\\.0\\.0 needs a token"):
        Door("0.0.0.0")
    with pytest.raises(ValueError, match="a token must have at least 16 printable characters"):
        Door("0.0.0.0", "short")


def test_a_token_of_ones_own_is_asked_for_on_loopback_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    doors = list[Door]()
    monkeypatch.setattr(
        "fedloom.board.server.serve", lambda _, door, *__, **___: doors.append(door)
    )
    monkeypatch.delenv("FEDLOOM_BOARD_TOKEN", raising=False)
    board(tmp_path, "127.0.0.1:0")
    monkeypatch.setenv("FEDLOOM_BOARD_TOKEN", TOKEN)
    board(tmp_path, "127.0.0.1:0")
    assert [door.token for door in doors] == [None, TOKEN]


def test_without_the_token_nothing_is_shown_and_with_it_it_leaves_the_address() -> None:
    client = asked(Door("0.0.0.0", TOKEN), "http://10.0.0.3:80")
    for headers in ({}, {"authorization": "Bearer no"}, {"cookie": "fedloom-board-80=no"}):
        assert client.get("/", headers=headers).status_code == 401
    assert client.get("/?token=wrong").status_code == 401
    assert client.get("/", headers={"authorization": f"Bearer {TOKEN}"}).text == "in"
    answer = client.get(f"http://10.0.0.3//evil.example/run?run=a%26b&run=c&token={TOKEN}")
    assert answer.status_code == 303
    assert answer.headers["location"] == "/evil.example/run?run=a%26b&run=c"
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "samesite=strict" in cookie.lower()
    assert client.get("/").text == "in"


def test_the_token_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def compare(left: bytes, right: bytes) -> bool:
        compared.append((left, right))
        return False

    monkeypatch.setattr("fedloom.board.guard.hmac.compare_digest", compare)
    assert not Door("0.0.0.0", TOKEN).admits("\u00e9")
    assert compared == [("\u00e9".encode(), TOKEN.encode())]


def test_every_answer_says_what_a_page_may_do() -> None:
    for answer in (
        asked(Door("127.0.0.1")).get("/"),
        asked(Door("127.0.0.1")).get("/", headers={"host": "evil.example"}),
    ):
        policy = answer.headers["content-security-policy"]
        assert "script-src 'self';" in policy
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
