"""The server's side: SuperLink, the handshake, and on one machine the sites too, for as long as a run takes."""

import dataclasses
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType

from rich.console import Console

from fedloom.client.fast.kernels import choose_kernels
from fedloom.core.description import describe
from fedloom.data.federation import Federation
from fedloom.deploy.beside import resident, supernode
from fedloom.deploy.greeting import EMULATOR, greeting, shared_recipe
from fedloom.deploy.handover import handed_over
from fedloom.deploy.listening import Listening, check_free, write_status
from fedloom.deploy.site_settings import SiteSettings
from fedloom.engines.arrivals import Arrivals
from fedloom.engines.engine_settings import FlowerSettings
from fedloom.engines.flower.keys import Keys
from fedloom.engines.flower.link import Link
from fedloom.engines.flower.processes import Keeper, Program, free_port, start
from fedloom.engines.flower.programs import SuperLink, wait_for
from fedloom.engines.parcels import Parcel
from fedloom.engines.remote import Remote
from fedloom.engines.requests import Requests
from fedloom.rounds.recipe_settings import Recipe
from fedloom.rounds.session import Session
from fedloom.secure.ciphers import Directory
from fedloom.server.buffering import Buffered
from fedloom.spaces.offsite import OffsiteSpace


@contextmanager
def here(session: Session, console: Console) -> Iterator[Session]:
    """Run server and sites on this machine, encrypted and with a key each, and leave nothing running."""
    settings, population = session.recipe.engine, list(session.engine.population())
    assert isinstance(settings, FlowerSettings)
    number = min(settings.nodes, len(population))
    names = [f"node-{i}" for i in range(number)]
    folder = session.folder.resolve() / "flower"
    with ExitStack() as stack:
        # Sockets need short paths, keys a folder that nobody else reads.
        private = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedloom-")))
        keys = Keys(private / "keys")
        keys.init(())
        site_keys = [keys.add(name) for name in names]
        workers = [
            SiteSettings(name, session.folder.resolve(), clients=population[i::number])
            for i, name in enumerate(names)
        ]
        sockets = [
            stack.enter_context(resident(settings, private / settings.name, folder, console))
            for settings in workers
        ]
        # What is left of large messages.
        stack.callback(shutil.rmtree, session.folder / "messages", ignore_errors=True)
        link = Link(SuperLink(folder / "server", keys, free_port()))
        stack.callback(shutil.rmtree, folder / "server" / "home", ignore_errors=True)
        stack.callback(link.close)
        link.open()
        for name, site_key, socket in zip(names, site_keys, sockets, strict=True):
            stack.callback(shutil.rmtree, folder / name / "home", ignore_errors=True)
            server = f"127.0.0.1:{link.superlink.port}"
            stack.enter_context(supernode(folder / name, server, site_key, socket))
        # What `auto` comes to is measured: once, and not by each worker.
        kernels = choose_kernels(session.recipe.local, session.space.model)
        local = dataclasses.replace(session.recipe.local, kernels=kernels)
        recipe = dataclasses.replace(session.recipe, local=local)
        remote = _remote(session, recipe, link, console)
        with console.status(f"connecting {number} nodes"):
            remote.meet(names, seconds=settings.patience)
        yield dataclasses.replace(session, engine=remote)


@contextmanager
def sites(session: Session, console: Console, listening: Listening) -> Iterator[Session]:
    """Let registered sites in at `listening`, and wait for all of them before round 1."""
    settings, keys = session.recipe.engine, Keys(listening.keys.resolve())
    assert isinstance(settings, FlowerSettings)
    keys.check()
    names = list(keys.sites())
    if not names:
        raise ValueError(
            f"{listening.keys} has no site: `fedloom keys add SITE` makes a key for one"
        )
    mode = session.recipe.run.mode
    if isinstance(mode, Buffered) and mode.size > len(names):
        raise ValueError(
            f"run.mode.buffered.size {mode.size} waits for so many different sites, and {listening.keys} has {len(names)}:"
            " lower it, or make keys for more with `fedloom keys add`"
        )
    check_free(listening.host, listening.port)
    folder = session.folder.resolve() / "flower" / "server"
    with ExitStack() as stack:
        link = Link(SuperLink(folder, keys, free_port()))
        stack.callback(shutil.rmtree, folder / "home", ignore_errors=True)
        stack.callback(link.close)
        link.open()
        proxy = Keeper(lambda: _proxy(folder, keys, listening, link.superlink.port))
        stack.callback(proxy.stop)
        proxy.start()
        wait_for(proxy.program, listening.port, host=listening.host)
        listening.write(session.folder)
        console.print(
            f"listening on {listening.host}:{listening.port}, waiting for {', '.join(names)}"
        )
        remote = _remote(session, session.recipe, link, console, files=_handed_over(session))
        remote.one_client = True
        recipe = session.recipe
        least = 0 if recipe.secure is None else recipe.secure.threshold
        remote.min_sites = max(
            recipe.run.min_replies, describe(recipe.algorithm).min_replies, least
        )
        public = {site: path.read_bytes() for site, path in keys.sites().items()}
        remote.secure, remote.directory = recipe.secure, Directory(public)
        remote.patience = session.recipe.run.patience_seconds
        remote.meet(names, seconds=settings.patience, patient=True)
        manifest = dataclasses.replace(
            session.federation.manifest, clients=remote.counts, profiles=remote.profiles
        )
        federation = Federation({}, remote.profiles, manifest)
        engine = Arrivals(remote) if isinstance(mode, Buffered) else remote
        yield dataclasses.replace(session, engine=engine, federation=federation)
        engine.part()


def _handed_over(session: Session) -> dict[str, Parcel]:
    """Return what sites are handed: an emulator of a model that they may not have, else nothing."""
    space, folder = session.space, session.folder / EMULATOR
    if not isinstance(space, OffsiteSpace):
        return {}
    shutil.rmtree(folder, ignore_errors=True)
    space.save_emulator(folder)
    return handed_over(folder)


def _remote(
    session: Session,
    recipe: Recipe,
    link: Link,
    console: Console,
    *,
    files: Mapping[str, Parcel] = MappingProxyType({}),
) -> Remote:
    settings = recipe.engine
    assert isinstance(settings, FlowerSettings)

    def warn(message: str) -> None:
        console.print(message, style="yellow", markup=False, highlight=False, soft_wrap=True)

    def note(remote: Remote, round: int) -> None:
        write_status(session.folder, round, remote.sites, remote.connected)

    session.folder.mkdir(parents=True, exist_ok=True)
    return Remote(
        recipe.algorithm,
        recipe.wire,
        Requests(link, on_trouble=warn),
        greeting(shared_recipe(recipe), session),
        settings.deadline,
        metrics=recipe.metrics,
        on_change=note,
        files=files,
        folder=session.folder / "flower" / "messages",
    )


def _proxy(folder: Path, keys: Keys, listening: Listening, port: int) -> Program:
    fields = {
        "listen_host": listening.host,
        "listen_port": listening.port,
        "port": port,
        "ca": str(keys.ca),
        "certificate": str(keys.certificate),
        "certificate_key": str(keys.certificate_key),
        "max_bytes": 64 << 20,
    }
    file = folder / "proxy.json"
    file.write_text(json.dumps(fields))
    command = [sys.executable, "-m", "fedloom.engines.flower.proxy", str(file)]
    return start("proxy", command, folder=folder, environment={})
