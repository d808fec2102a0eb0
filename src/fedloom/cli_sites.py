"""The commands of federations over several machines: keys, serve, join, status."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedloom.cli_console import console as _console
from fedloom.cli_console import show_outcome
from fedloom.cli_errors import about

if TYPE_CHECKING:
    from fedloom.client.worker_settings import WorkerSettings
    from fedloom.deploy.site_settings import SiteSettings

keys_app = typer.Typer(help="Make what server and sites know each other by.", no_args_is_help=True)
KeysFolder = Annotated[Path, typer.Option("--keys", help="The server's folder of keys.")]
SiteKeys = Annotated[
    Path, typer.Option(help="The folder that `fedloom keys add` made for this site.")
]
Shards = Annotated[int | None, typer.Option(help="Processes that the model is split over here.")]
Replicas = Annotated[
    int | None, typer.Option(help="Processes that share a batch out here, a whole model each.")
]
MinCohort = Annotated[
    int, typer.Option(help="Take part in secure sums of so many clients or more only.")
]
Words = Annotated[str | None, typer.Option(help="Comma-separated; all if not given.")]


@keys_app.command("init")
def keys_init(
    host: Annotated[
        list[str] | None,
        typer.Option(help="Name or address that sites connect to; repeat for several."),
    ] = None,
    keys: KeysFolder = Path("keys"),
) -> None:
    """Make an authority and the server's certificate."""
    from fedloom.engines.flower.keys import Keys

    Keys(keys).init(host or [])
    _console().print(f"wrote {keys}; `fedloom keys add SITE` makes a key for a site")


@keys_app.command("add")
def keys_add(
    site: Annotated[str, typer.Argument(help="The site's name.")],
    keys: KeysFolder = Path("keys"),
) -> None:
    """Make a site's key; the server reads it when it starts."""
    from fedloom.engines.flower.keys import Keys

    folder = Keys(keys).add(site)
    _console().print(f"wrote {folder}; hand it to {site} and keep it secret", soft_wrap=True)
    if others := [name for name in Keys(keys).sites() if name != site]:
        _console().print(
            f"for secure sums hand {', '.join(others)} the folder `peers` of theirs again: it holds the key of {site} now",
            soft_wrap=True,
        )


@keys_app.command("renew")
def keys_renew(
    host: Annotated[
        list[str] | None, typer.Option(help="A name besides those that the old one has.")
    ] = None,
    keys: KeysFolder = Path("keys"),
) -> None:
    """Make a new server certificate of the same authority; sites keep their folders."""
    from fedloom.engines.flower.keys import Keys

    Keys(keys).renew(host or [])
    _console().print(f"wrote {Keys(keys).certificate}; `fedloom serve` reads it when it starts")


def serve(
    recipe: Annotated[
        str, typer.Argument(help="A shipped recipe's name, or a path that ends in .yaml.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to change, such as run.rounds=5.")
    ] = None,
    listen: Annotated[str, typer.Option(help="HOST:PORT where sites come in.")] = "127.0.0.1:9443",
    public: Annotated[
        bool, typer.Option("--public", help="Allow a host that other machines reach.")
    ] = False,
    keys: KeysFolder = Path("keys"),
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; runs/NAME if not given.")
    ] = None,
) -> None:
    """Run a recipe on sites that join; a run that is in --out already goes on."""
    from fedloom.core.files import file_name, folder_at
    from fedloom.deploy.listening import Listening, address, check_free
    from fedloom.engines.flower.keys import Keys
    from fedloom.experiment import run
    from fedloom.recipe import load_recipe

    host, port = address(listen, local_only=not public)
    keyring = Keys(keys)
    keyring.check()
    if host not in ("0.0.0.0", "::") and not keyring.covers(host):
        raise ValueError(
            f"the certificate in {keys} does not name {host}: `fedloom keys init --host {host}`"
        )
    check_free(host, port)
    loaded = load_recipe(recipe, [*(overrides or []), "engine.flower.nodes=0"])
    folder = folder_at(out or Path("runs") / file_name(loaded.name), "--out")
    about(folder)
    console = _console()
    listening = Listening(host, port, keys)
    result = run(loaded, folder, console=console, listening=listening)
    show_outcome(result, console=console)


def join(
    server: Annotated[str, typer.Argument(help="HOST:PORT of `fedloom serve`.")],
    data: Annotated[Path, typer.Option(help="This site's text, a file that a recipe can read.")],
    name: Annotated[str, typer.Option(help="This site's name.")],
    keys: SiteKeys,
    folder: Annotated[
        Path | None, typer.Option(help="Memory and logs; sites/NAME if not given.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="Take part in this recipe only.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what --recipe would send, and send nothing.")
    ] = False,
    max_message_mb: Annotated[float, typer.Option(help="Largest message, in MiB.")] = 4096.0,
    algorithms: Words = None,
    spaces: Words = None,
    columns: Words = None,
    min_examples: Annotated[int, typer.Option(help="Take no part with fewer.")] = 20,
    clip: Annotated[float | None, typer.Option(help="Largest joint norm of an upload.")] = None,
    min_cohort: MinCohort = 0,
    allow: Annotated[str | None, typer.Option(help="Modules whose code a recipe may name.")] = None,
    shards: Shards = None,
    replicas: Replicas = None,
) -> None:
    """Let this site's data take part in a run, within limits that the server cannot change."""
    from fedloom.core.files import folder_at
    from fedloom.deploy.limits import Limits
    from fedloom.deploy.listening import address
    from fedloom.deploy.site_settings import SiteSettings

    host, port = address(server)
    if not data.exists():
        raise ValueError(f"--data {data} does not exist")
    limits = Limits(
        max_message_mb,
        _listed(algorithms),
        _listed(spaces),
        _listed(columns),
        min_examples,
        clip,
        _listed(allow),
        min_cohort,
    )
    home = folder_at(folder or Path("sites") / name, "--folder").resolve()
    agreed, worker, own = recipe and recipe.resolve(), _worker(shards, replicas), keys.resolve()
    settings = SiteSettings(name, home, data.resolve(), (), limits, agreed, own, worker)
    if dry_run:
        _show_dry_run(settings)
        return
    from fedloom.deploy.join import Visit

    Visit(settings, f"{host}:{port}", keys.resolve(), _console()).run()


def _worker(shards: int | None, replicas: int | None) -> "WorkerSettings | None":
    from fedloom.client.worker_settings import WorkerSettings

    given = {"shards": shards, "replicas": replicas}
    own = {name: number for name, number in given.items() if number is not None}
    return WorkerSettings(**own) if own else None


def _show_dry_run(settings: "SiteSettings") -> None:
    from fedloom.deploy.preview import site_preview
    from fedloom.deploy.site import agreed_recipe
    from fedloom.plugins import limited_to

    if settings.recipe is None:
        raise ValueError("--dry-run needs --recipe: the server's, as a file")
    with limited_to(settings.imports):
        for part in site_preview(settings, agreed_recipe(settings.recipe)):
            _console().print(part)


def status(
    folder: Annotated[Path, typer.Argument(help="The folder of a run, such as runs/xquad.")],
) -> None:
    """Show the sites of a running federation: last answers, bytes, failures."""
    about(folder)
    from fedloom.deploy.preview import status as shown

    _console().print(shown(folder))


def _listed(words: str | None) -> list[str]:
    return [word.strip() for word in (words or "").split(",") if word.strip()]
