"""A run without some of its clients: not what they sent taken out of a sum, but all others trained anew without them.

What is exact. The result is, to the bit on the same machine and versions, the run of the recipe in which these clients never
answered: everything that is random follows from seeds in the recipe, so that all others are asked in the same rounds, with
the same batches and draws, and only what they are sent differs. No row of a client that was left out is trained on or
measured, in any round.

Of a buffered run that holds of the recipe without them, not of its rounds: who answers first decides what the server steps
on and who begins next, so that without a client the others may begin at other steps than they did, from other models.

What is not. A sum of recorded uploads without a client's own is no such run: the others' uploads after its first one were
learnt from models that it had moved. So nothing is taken out here; runs keep no uploads of single clients, and need none for this.
How the data was dealt out, which may depend on labels of all rows, stays as it was.
"""

import dataclasses
import json
from collections.abc import Collection, Sequence
from pathlib import Path

from rich.console import Console

from fedloom import experiment
from fedloom.core.description import describe
from fedloom.core.files import file_name, write_atomic
from fedloom.core.protocols import ClientId
from fedloom.reopen import open_session, recipe_of
from fedloom.result import Result
from fedloom.rounds.checkpoint import state_sha256
from fedloom.rounds.loop import Run, draw
from fedloom.rounds.reading import read_json, read_manifest
from fedloom.rounds.recipe_settings import Recipe
from fedloom.rounds.session import Session
from fedloom.server.buffering import Buffered

FILE = "unlearned.json"
"""In the folder: of which run it is, and without whom."""


def unlearn(
    folder: Path | str,
    clients: Sequence[ClientId],
    out: Path | str | None = None,
    *,
    console: Console | None = None,
    anyway: bool = False,
) -> Result:
    """Replay a run as if some clients had never answered; go on where that was ended.

    Args:
        folder: Of a run whose data is on this machine.
        clients: Who is left out, at least one.
        out: Folder of the replay; beside the run's, with -without-NAME behind its name, if not given.
        console: Where progress and notes go; nowhere if not given.
        anyway: Go on although data or model are not what the run was begun with, and write that down.

    Returns:
        The replay, as `fedloom.run` gives it.

    Raises:
        ValueError: where it cannot be replayed, saying why.
    """
    console, folder = console or Console(quiet=True), Path(folder)
    recipe = recipe_of(folder)
    _check(recipe, folder, clients)
    home = Path(out) if out is not None else _beside(folder, clients)
    opened = open_session(folder, "unlearn", console=console, data=True, anyway=anyway)
    names_left_out = sorted(set(clients))
    origin = {
        "run": state_sha256(opened.run.state),
        "rounds": opened.run.number,
        "clients": names_left_out,
    }
    if (home / FILE).exists():
        if read_json(home / FILE, dict, remedy="take another folder with --out") != origin:
            raise ValueError(
                f"{home} holds what came of another run, or without other clients: take another folder with --out"
            )
    else:
        experiment.new_folder(home.name, home)
        write_atomic(home / FILE, (json.dumps(origin, indent=2) + "\n").encode())
    for client in names_left_out:
        console.print(_took_part(opened.session, opened.run.number, client), highlight=False)
    del opened
    return experiment.run(without(recipe, clients), home, console=console, anyway=anyway)


def without(recipe: Recipe, clients: Collection[ClientId]) -> Recipe:
    """Return the recipe of a run in which clients never answer, alone: baselines had them too."""
    left_out = tuple(sorted({*recipe.data.left_out, *clients}))
    return dataclasses.replace(
        recipe,
        name=f"{recipe.name}-without-{'-'.join(sorted(set(clients)))}"[:100],
        data=dataclasses.replace(recipe.data, left_out=left_out),
        run=dataclasses.replace(recipe.run, baselines=(), trackers=()),
    )


def _beside(folder: Path, clients: Collection[ClientId]) -> Path:
    names = "-".join(sorted(set(clients)))
    return folder.with_name(file_name(f"{folder.resolve().name}-without-{names}"))


def _check(recipe: Recipe, folder: Path, clients: Collection[ClientId]) -> None:
    """Refuse what cannot be replayed."""
    if not clients:
        raise ValueError("name a client with --client: nobody is to be left out")
    if recipe.elsewhere:
        raise ValueError(
            f"{folder} cannot be replayed here: its data is at sites, and what they learnt of models that this client had"
            " moved has to be learnt anew, by them; begin the run again with `fedloom serve`, and do not start this site"
        )
    if describe(recipe.algorithm).privacy is not None:
        raise ValueError(
            f"{folder} cannot be replayed: cohorts and noise of private come from a secret of that run, and a replay would"
            " release all others a second time; begin a run with data.left_out, whose epsilon adds to theirs"
        )
    given = [what for what, name in recipe.objects.items() if what in ("data", "model", "trainer")]
    if given:
        raise ValueError(
            f"{folder} was begun from Python with {' and '.join(given)} as objects: call fedloom.run with them, and with"
            f' overrides=["data.left_out=[{", ".join(clients)}]"]'
        )
    known = read_manifest(folder, elsewhere=False).clients
    for client in clients:
        if client not in known:
            raise ValueError(
                f"--client must be one of the run's {len(known)} clients ({', '.join(sorted(known)[:12])}), got {client!r}"
            )


def _took_part(session: Session, rounds: int, client: ClientId) -> str:
    """Return a sentence on what of a run was a client's."""
    if isinstance(session.recipe.run.mode, Buffered):
        return f"{client} may have trained from the start; everybody else learns anew from there"
    seed = session.recipe.run.seed
    drawn = [
        number
        for number in range(1, rounds + 1)
        if client in draw(Run(number - 1, seed, None), session.learners, session.sampler).cohort
    ]
    if not drawn:
        return f"{client} was drawn in no round: no model of the run holds anything of it"
    return (
        f"{client} was asked in {len(drawn)} of {rounds} rounds, first in round {drawn[0]}: models before it hold nothing of"
        " it, all after it do, and so do the other clients' updates"
    )
