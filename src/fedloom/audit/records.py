"""A run under audit: what its server received, read from the folder, beside what the audit holds it against.

Attacks are given what an honest but curious server has: uploads as it reads them, what it sent, recipe, base model and
seeds. The clients' data is read for the comparison alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from fedloom.core.description import replayed_by
from fedloom.core.params import sub
from fedloom.core.protocols import ClientId, Params, Reply, Round
from fedloom.core.wrapper import spelled
from fedloom.reopen import open_session, recipe_of
from fedloom.rounds.loop import Run, draw
from fedloom.rounds.received import Received, read_round, recorded_rounds
from fedloom.rounds.recipe_settings import Recipe
from fedloom.rounds.session import Session
from fedloom.server.buffering import Buffered


@dataclass(frozen=True)
class Case:
    """A run, opened for an audit."""

    session: Session
    """With the clients' data, which no attack looks at but to tell whether it was right."""
    run: Run[Any]
    """As the newest checkpoint has it."""
    rounds: Sequence[int]
    """That are looked at, of those recorded."""
    client: ClientId | None = None
    """Whose uploads are looked at; None: everybody's."""
    seed: int = 0
    """Of what attacks draw."""

    @property
    def recipe(self) -> Recipe:
        """Return the run's."""
        return self.session.recipe

    @property
    def space(self) -> str:
        """Return what is tuned, in words."""
        return self.recipe.tune.title

    @property
    def link(self) -> str:
        """Return what travels up, in words."""
        return link_of(self.recipe)

    def uploads(self, rounds: Sequence[int] | None = None) -> Iterator[Received]:
        """Yield what the server received of the clients that are looked at, round by round.

        Args:
            rounds: Which; `self.rounds` if not given.
        """
        for number in self.rounds if rounds is None else rounds:
            for received in read_round(self.session.folder, number):
                if self.client is None or self.client in received.clients:
                    yield received

    def delta(self, received: Received) -> Params:
        """Return an upload as the move in the space's coordinates that the server makes of it.

        Raises:
            ValueError: where the algorithm's server makes no move of one upload.
        """
        if "delta" in received.upload:
            return received.upload["delta"]
        number = received.round
        round = draw(Run(number - 1, self.run.seed, None), self.session.learners, None)
        reply = Reply(received.clients[0], received.upload, received.weight)
        return self._replayed(round, reply)

    def _replayed(self, round: Round, reply: Reply) -> Params:
        upload = replayed_by(self.recipe.algorithm, self.run.state, round, reply).upload
        if "delta" not in upload:
            raise ValueError(
                f"the audit takes uploads that are moves, got {', '.join(upload)} of {spelled(self.recipe.algorithm)}"
            )
        return upload["delta"]

    def releases(self) -> Iterator[Received]:
        """Yield, for each round that is looked at, how the one model that all clients are sent moved.

        That is what clients, and whoever gets the model, can see: the mean, with noise where `private` adds it. `upload`
        holds it as `delta`. Nothing is yielded where clients are sent models of their own, where a step was not kept, or
        where rounds wait for nobody: which answers such a step is of, some of older models, is not recorded.
        """
        if isinstance(self.recipe.run.mode, Buffered):
            return
        recorded = recorded_rounds(self.session.folder)
        for number in self.rounds:
            before = self._shared(number)
            later = number + 1
            after = self._shared(later) if later in recorded else self._newest(later)
            if before is None or after is None or before.keys() != after.keys():
                continue
            every = list(read_round(self.session.folder, number))
            clients = [client for one in every for client in one.clients]
            seeds = [seed for one in every for seed in one.seeds]
            moved = sub(after, before)
            if clients and any(bool(t.any()) for t in moved.values()):
                yield replace(
                    every[0], clients=clients, seeds=seeds, upload={"delta": moved}, num_bytes=0
                )

    def _shared(self, number: int) -> Params | None:
        """Return the one model that all clients of a recorded round were sent."""
        sent = {id(one.download): one.download for one in read_round(self.session.folder, number)}
        if len(sent) != 1:
            return None
        (download,) = sent.values()
        return download.get("params")

    def _newest(self, number: int) -> Params | None:
        """Return the one model that all clients would be sent now, where that is before round `number`."""
        if self.run.number != number - 1:
            return None
        downloads = self.recipe.algorithm.broadcast(
            self.run.state, draw(self.run, self.session.learners, self.session.sampler)
        )
        sent = {id(download): download for download in downloads.values()}
        return next(iter(sent.values())).get("params") if len(sent) == 1 else None


def open_case(
    folder: Path,
    *,
    console: Console,
    round: int | None = None,
    client: ClientId | None = None,
    anyway: bool = False,
) -> Case:
    """Return a run opened for an audit.

    Args:
        folder: Of the run.
        console: Where notes go.
        round: The round that is looked at; the first, second and last that were recorded if not given.
        client: Whose uploads are looked at; everybody's if not given.
        anyway: Go on although data or model are not what the run was begun with.

    Raises:
        ValueError: where nothing was recorded, or nothing of that round or client.
    """
    recipe = recipe_of(folder)
    if recipe.elsewhere:
        raise ValueError(
            f"{folder} cannot be audited: its clients were at sites, whose uploads are not kept; run its recipe here, with"
            " engine inprocess and audit: record"
        )
    rounds = recorded_rounds(folder)
    if not rounds:
        raise ValueError(
            f"{folder} cannot be audited: it kept none of what its server received; run its recipe again with audit=record"
        )
    opened = open_session(folder, "audit", console=console, data=True, anyway=anyway)
    # Of a round that did not end there may be some uploads.
    rounds = [number for number in rounds if number <= opened.run.number]
    if not rounds:
        raise ValueError(f"{folder} cannot be audited: none of the rounds that it kept has ended")
    if round is not None and round not in rounds:
        raise ValueError(f"--round must be one that was recorded, {_few(rounds)}, got {round}")
    known = opened.session.counts
    if client is not None and client not in known:
        raise ValueError(
            f"--client must be one of the run's {len(known)} clients ({', '.join(sorted(known)[:12])}), got {client!r}"
        )
    chosen = sorted({*rounds[:2], *rounds[-1:]}) if round is None else [round]
    case = Case(opened.session, opened.run, chosen, client, recipe.run.seed)
    if client is not None and not any(True for _ in case.uploads()):
        raise ValueError(
            f"--client must be one that answered in the rounds looked at ({_few(chosen)}), got {client!r}, who did not"
        )
    return case


def link_of(recipe: Recipe) -> str:
    """Return what travels up, in words: method, precision, and who sees it."""
    parts = [spelled(recipe.algorithm)]
    parts.append(recipe.wire.upload if recipe.secure is None else "secure sum")
    return ", ".join(parts)


def seen(received: Received) -> str:
    """Return what an attack is given, in words."""
    return "upload" if len(received.clients) == 1 else f"sum of {len(received.clients)}"


def _few(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return f"{shown} to {numbers[-1]}" if len(numbers) > 8 else shown
