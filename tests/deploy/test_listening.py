"""Addresses, what a server tells of its sites, and what is missing for an engine."""

import io
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from fedloom.deploy import connect as connecting
from fedloom.deploy.listening import Listening, address, check_free, write_status
from fedloom.deploy.preview import status
from fedloom.engines.remote import SiteRecord
from fedloom.rounds.recipe_settings import Recipe
from fedloom.rounds.session import build


def test_addresses_are_read():
    assert address("127.0.0.1:9443", local_only=True) == ("127.0.0.1", 9443)
    assert address("localhost:80", local_only=True) == ("localhost", 80)
    assert address("[::1]:443", local_only=True) == ("::1", 443)
    assert address("server.example:9443") == ("server.example", 9443)


@pytest.mark.parametrize("text", ["9443", ":9443", "host:", "host:0", "host:70000", "host:x"])
def test_what_is_no_address_is_refused(text: str):
    with pytest.raises(ValueError, match="an address must look like HOST:PORT"):
        address(text)


@pytest.mark.parametrize("host", ["0.0.0.0", "10.1.2.3", "server.example", "[::]"])
def test_an_address_that_others_reach_must_be_meant(host: str):
    with pytest.raises(
        ValueError, match="can be reached from other machines: say so with --public"
    ):
        address(f"{host}:9443", local_only=True)


def test_where_a_server_listened_is_remembered(tmp_path: Path):
    assert Listening.read(tmp_path) is None
    listening = Listening("127.0.0.1", 9443, tmp_path / "keys")
    listening.write(tmp_path)
    assert Listening.read(tmp_path) == listening


def test_status_shows_every_site(tmp_path: Path):
    records = {"alba": SiteRecord(("alba",), 1.0, 2000, 3000), "brno": SiteRecord(num_absent=2)}
    records["brno"].last_absence = "its worker died"
    write_status(tmp_path, 3, records, {"alba": "1"})
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(status(tmp_path))
    shown = console.export_text()
    for words in ("alba", "2.00 kB", "3.00 kB", "yes", "brno", "never", "its worker died"):
        assert words in shown


def test_status_of_another_folder_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"has no status\.json: give the folder of a run"):
        status(tmp_path)


def test_a_missing_extra_is_named(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    session = build(recipe(engine="flower"), tmp_path)
    monkeypatch.setattr(connecting, "find_spec", lambda _: None)
    with pytest.raises(
        ValueError, match=r"needs the package flwr: pip install 'fedloom\[flower\]'"
    ):
        connecting.connect(session, Console(quiet=True))


def test_sites_cannot_join_a_plain_run(recipe: Callable[..., Recipe], tmp_path: Path):
    pytest.importorskip("flwr", reason="the extra `flower` is not installed")
    session = build(recipe(engine={"flower": {"nodes": 0}}), tmp_path)
    assert session.learners == {}
    with pytest.raises(ValueError, match="start it with `fedloom serve`"):
        connecting.connect(session, Console(quiet=True))


def test_a_port_that_another_program_listens_at_is_refused():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=f"--listen 127.0.0.1:{port} cannot be listened at"):
            check_free("127.0.0.1", port)
    check_free("127.0.0.1", port)
    with pytest.raises(ValueError, match=r"--listen 203\.0\.113\.1:9 cannot be listened at"):
        check_free("203.0.113.1", 9)
