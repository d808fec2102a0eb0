"""The engine a recipe asks for, and all that it needs, started and ended around a run."""

from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec

from rich.console import Console

from fedloom.deploy.listening import Listening
from fedloom.engines.engine_settings import FlowerSettings, RaySettings
from fedloom.rounds.session import Session


def connect(
    session: Session, console: Console, *, listening: Listening | None = None
) -> AbstractContextManager[Session]:
    """Return the session with its engine, for as long as the context lasts.

    Raises:
        ValueError: where the engine's extra is not installed, or sites have nowhere to come to.
    """
    match session.recipe.engine:
        case FlowerSettings(nodes=nodes):
            _require("flwr", "flower")
            from fedloom.deploy.federation import here, sites

            if nodes:
                return here(session, console)
            if listening is None:
                raise ValueError(
                    "engine.flower.nodes 0 is for sites that join: start it with `fedloom serve`"
                )
            return sites(session, console, listening)
        case RaySettings() as settings:
            _require("ray", "ray")
            from fedloom.deploy.actors import actors

            return actors(session, settings)
    if session.recipe.worker.num_processes == 1:
        return nullcontext(session)
    from fedloom.deploy.group import grouped
    from fedloom.deploy.site_settings import SiteSettings

    return grouped(session, SiteSettings("here", session.folder.resolve()))


def _require(package: str, extra: str) -> None:
    if find_spec(package) is None:
        raise ValueError(
            f"engine {extra} needs the package {package}: pip install 'fedloom[{extra}]'"
        )
