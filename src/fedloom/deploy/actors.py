"""A federation on Ray: actors that share the clients of a recipe, for as long as a run takes."""

import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from fedloom.client.fast.kernels import choose_kernels
from fedloom.deploy.greeting import greeting, shared_recipe
from fedloom.deploy.site import Site
from fedloom.deploy.site_settings import SiteSettings
from fedloom.engines.engine_settings import RaySettings
from fedloom.engines.ray import Actors, Answer
from fedloom.engines.remote import Remote
from fedloom.engines.requests import Requests
from fedloom.rounds.session import Session

_LONG = 1e6
"""Seconds: on one's own cluster nobody is late."""


@contextmanager
def actors(session: Session, settings: RaySettings) -> Iterator[Session]:
    """Start the actors, hand each its clients, and end them; what clients remember lies in the run's folder."""
    population = list(session.engine.population())
    number = min(settings.actors, len(population))
    sites = {
        f"actor-{i}": SiteSettings(
            f"actor-{i}", session.folder.resolve(), clients=population[i::number]
        )
        for i in range(number)
    }
    kernels = choose_kernels(session.recipe.local, session.space.model)
    local = dataclasses.replace(session.recipe.local, kernels=kernels)
    recipe = dataclasses.replace(session.recipe, local=local)
    transport = Actors(settings, {site: partial(_open, one) for site, one in sites.items()})
    terms = greeting(shared_recipe(recipe), session)
    remote = Remote(
        recipe.algorithm,
        recipe.wire,
        Requests(transport),
        terms,
        _LONG,
        metrics=recipe.metrics,
        folder=session.folder / "messages" / "server",
    )
    transport.open()
    try:
        remote.meet(list(sites), seconds=_LONG)
        yield dataclasses.replace(session, engine=remote)
    finally:
        transport.close()
        shutil.rmtree(session.folder / "messages", ignore_errors=True)


def _open(settings: SiteSettings) -> Answer:
    return Site(settings).answer
