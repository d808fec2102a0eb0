"""The program `flwr-clientapp` at a site: runs what is installed there, whatever code the server sends along.

Flower installs the app that the server ships and imports it. Here that step does nothing and the app is ours, so
that a server can ask a site for work and for nothing else. The two names put in its place are private to Flower.
"""

import sys
from collections.abc import Callable
from typing import Any

from flwr.clientapp import ClientApp
from flwr.supernode.cli import flwr_clientapp
from flwr.supernode.runtime import run_clientapp

from fedloom.engines.flower.app import client_app

PRIVATE = ("install_from_fab", "get_load_client_app_fn", "install_app_dependencies")


def main() -> None:
    """Answer one message, with the app that is installed here."""
    missing = [name for name in PRIVATE if name not in vars(run_clientapp)]
    if missing:
        raise ImportError(
            f"this version of flwr has no {missing[0]}: install one that `fedloom[flower]` allows"
        )
    sys.argv[0] = "flwr-clientapp"
    vars(run_clientapp).update(zip(PRIVATE, (_nothing, _loader, _nothing), strict=True))
    flwr_clientapp()


def _nothing(*given: Any, **named: Any) -> None:
    """Install nothing."""


def _loader(*given: Any, **named: Any) -> Callable[..., ClientApp]:
    return lambda *of_run: client_app


if __name__ == "__main__":
    main()
