"""The command line for the page that watches."""

import os
import secrets
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from fedloom.cli_console import console as _console

TOKEN = "FEDLOOM_BOARD_TOKEN"
"""The environment's variable that sets the token; if it is not set, a new one each time, or none on loopback."""


def board(
    folder: Annotated[
        Path, typer.Argument(help="The folder that holds runs, or one run's.")
    ] = Path("runs"),
    listen: Annotated[
        str, typer.Option(help="HOST:PORT of the page; port 0 takes a free one.")
    ] = "127.0.0.1:8642",
    public: Annotated[
        bool,
        typer.Option("--public", help="Allow a host that other machines reach, behind a token."),
    ] = False,
) -> None:
    """Watch runs in a browser: live, beside each other, their reports, and a chat with two models."""
    for package in ("starlette", "uvicorn"):
        if find_spec(package) is None:
            raise ValueError(f"the board needs the package {package}: pip install 'fedloom[board]'")
    from fedloom.board.app import Board
    from fedloom.board.guard import Door
    from fedloom.board.server import serve
    from fedloom.deploy.listening import address, check_free, is_loopback

    host, port = address(listen, local_only=not public, any_port=True)
    token = os.environ.get(TOKEN) or None
    if not is_loopback(host):
        token = token or secrets.token_urlsafe(32)
    door, watched = Door(host, token), Board.of(folder)
    if port:
        check_free(host, port)
    console = _console()

    def say(url: str) -> None:
        console.print(f"board of {watched.folder.root}: {url}", soft_wrap=True, highlight=False)
        console.print("Ctrl-C ends it; runs go on without it")

    # Ctrl-C is how it ends.
    with suppress(KeyboardInterrupt):
        serve(watched, door, port, say=say)
