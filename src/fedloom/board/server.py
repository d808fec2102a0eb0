"""The board as a server of one process, for as long as somebody wants it."""

import socket
from collections.abc import Callable

import uvicorn

from fedloom.board.app import Board
from fedloom.board.guard import Door


class BoardServer(uvicorn.Server):
    """Ends its streams before it waits for them."""

    def __init__(self, config: uvicorn.Config, board: Board) -> None:
        super().__init__(config)
        self._board = board

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close what is open."""
        self._board.closing.set()
        await super().shutdown(sockets)


def server(board: Board, door: Door) -> BoardServer:
    """Return a server that runs once it is given a socket."""
    config = uvicorn.Config(
        board.application(door),
        # Its own settings would close every handler that the process has.
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=3,
    )
    return BoardServer(config, board)


def opened(host: str, port: int) -> socket.socket:
    """Return a socket that listens; port 0 takes a free one.

    Raises:
        OSError: where nobody can listen there.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    door = socket.socket(family, socket.SOCK_STREAM)
    try:
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        door.bind((host, port))
        door.listen()
    except OSError:
        door.close()
        raise
    return door


def serve(board: Board, door: Door, port: int, *, say: Callable[[str], None]) -> None:
    """Serve until the process is told to end; `say` is told the address.

    Raises:
        OSError: where nobody can listen there.
    """
    with opened(door.host, port) as listening:
        host = f"[{door.host}]" if ":" in door.host else door.host
        address = f"http://{host}:{listening.getsockname()[1]}/"
        say(address if door.token is None else f"{address}?token={door.token}")
        server(board, door).run(sockets=[listening])
