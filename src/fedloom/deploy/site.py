"""A site: its own data, its limits, and the answers to the server's envelopes."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from fedloom.client.worker import Meter, run_tasks
from fedloom.core.protocols import ClientError, ClientFailure, Payload, Reply, Spent, Task
from fedloom.core.rehearsal import rehearse
from fedloom.data.data_settings import DataSettings
from fedloom.data.encoding import Tokenizer, lengths
from fedloom.data.federation import Federation, divide
from fedloom.data.formats import KNOWN_LABELS
from fedloom.data.partition import Natural
from fedloom.data.sources import take_rows
from fedloom.deploy.asked import asked_of, unquoted
from fedloom.deploy.greeting import EMULATOR, greeting, recipe_sha256, shared_recipe, versions
from fedloom.deploy.handover import Handover
from fedloom.deploy.site_settings import ENDED, SiteSettings
from fedloom.deploy.sums import Member, member_of
from fedloom.engines.engine_settings import FlowerSettings
from fedloom.engines.parcels import Piece
from fedloom.objectives.objective import Objective
from fedloom.plugins import limited_to
from fedloom.recipe import build_recipe, load_recipe
from fedloom.rounds.loop import begin, draw, tasks
from fedloom.rounds.recipe_settings import Recipe
from fedloom.rounds.session import Makers, Session, build
from fedloom.spaces.handshake import SERVER_AND_SITE, agree
from fedloom.spaces.offsite import Offsite, OffsiteSpace
from fedloom.wire.format import decode_task, reply_pieces

_LABEL = "site"
_UNMASKED = (
    "the recipe adds uploads up under masks, but the server asks for one by itself: nothing is sent"
)


@dataclass
class Site:
    """Answers envelopes; the model and the data of a recipe are loaded when it is first heard of."""

    settings: SiteSettings
    say: Callable[[str], None] = lambda _: None
    shared_out: Callable[[Session], Session] = lambda session: session
    """Returns a session whose clients are trained by as many processes as its recipe says."""
    _ready: dict[str, tuple[Session, Mapping[str, str]]] = field(default_factory=dict)
    _handover: Handover = field(init=False)
    _in_sums: Member | None = None

    def __post_init__(self) -> None:
        """Name the folders of what comes in frames."""
        folder = self.settings.folder
        self._handover = Handover(folder / EMULATOR, folder / "messages" / self.settings.name)

    def answer(
        self, header: dict[str, Any], pieces: Sequence[Piece]
    ) -> tuple[dict[str, Any], Sequence[Piece]]:
        """Return the answer to an envelope, or a refusal in one sentence; nothing is imported that is not allowed."""
        with limited_to(self.settings.imports):
            return self._answer(header, pieces)

    def _answer(
        self, header: dict[str, Any], pieces: Sequence[Piece]
    ) -> tuple[dict[str, Any], Sequence[Piece]]:
        try:
            if header["kind"] == "bye":
                self._handover.spool.clear()
                self.say(ENDED)
                return {}, []
            self._check_name(header)
            if header["kind"] == "fetch":
                return {}, self._handover.fetched(header["asks"])
            num_bytes = self._handover.num_bytes(header, pieces)
            self.settings.limits.check_size(num_bytes, "the message")
            if header["kind"] == "hello" and (wanted := self._lacking(header, pieces)):
                return {"asks": wanted}, []
            session = self._session(header)
            if header["kind"] == "hello":
                self.say(f"joined {session.recipe.name}")
                return self._introduction(header, session), []
            if header["kind"] == "sum":
                answer = self._member(header, session).answer(header, _piece(pieces, 0), self.say)
                return {"answers": [None]}, [answer]
            own = self._handover.take(header, pieces)
            if wanted := self._handover.lacking(header, "parcels"):
                return {"asks": wanted}, []
            return self._work(header, self._handover.whole(header, own), session)
        except (ValueError, OSError, ClientError) as error:
            self.say(f"refused: {error}")
            mine = isinstance(error, _OwnData)
            return {"refusal": unquoted(str(error)) if mine else str(error)}, []

    def _check_name(self, header: Mapping[str, Any]) -> None:
        known = header.get("site", self.settings.name)
        if known != self.settings.name:
            raise ValueError(
                f"the server knows the key in --keys as {known}, not as {self.settings.name}:"
                f" start `fedloom join` with --name {known}"
            )

    def _lacking(self, header: Mapping[str, Any], pieces: Sequence[Piece]) -> dict[str, Any] | None:
        """Return what is still to be handed over, of a recipe that this site takes part in."""
        if "files" not in header or header["recipe"] in self._ready:
            return None
        self._check_asked(header)
        self.settings.limits.check_recipe(build_recipe(yaml.safe_load(header["recipe"])))
        self._handover.take(header, pieces)
        wanted = self._handover.lacking(header, "files")
        if wanted is None and "frames" in header:
            self.say(f"received {', '.join(header['files'])}")
        return wanted

    def _check_asked(self, header: Mapping[str, Any]) -> None:
        known, asked = versions(), header["identity"]
        agree({name: asked.get(name) for name in known}, known, where=SERVER_AND_SITE)
        self._check_recipe(header["recipe"])

    def _session(self, header: Mapping[str, Any]) -> Session:
        text, asked = header["recipe"], header["identity"]
        if text not in self._ready:
            self._check_asked(header)
            self.say(f"asked for {asked_of(text)}")
            recipe = self.settings.with_worker(build_recipe(yaml.safe_load(text)))
            device = recipe.worker.device_of_whole
            session = self.shared_out(open_session(self.settings, recipe, device=device))
            for note in session.federation.manifest.left_out() if self.settings.data else ():
                self.say(note)
            self._ready = {text: (session, greeting(text, session)["identity"])}
            self._in_sums = None
        session, own = self._ready[text]
        agree(asked, own, where=SERVER_AND_SITE)
        return session

    def _check_recipe(self, text: str) -> None:
        agreed = self.settings.recipe
        if agreed and agreed_recipe(agreed) != text:
            raise ValueError(
                f"the server runs another recipe than {agreed}: start both with the same"
            )

    def _introduction(self, header: Mapping[str, Any], session: Session) -> dict[str, Any]:
        counts, population = session.counts, session.engine.population()
        hosted = self.settings.clients or list(population)
        # Nodes on the server's machine have its data: nothing is hidden from it.
        shown = session.federation.manifest.shown_labels if self.settings.data else dict
        return {
            "identity": self._ready[header["recipe"]][1],
            # How many of each label would tell more than the server needs.
            "clients": {
                client: {
                    "profile": shown(population[client]),
                    "counts": asdict(replace(counts[client], labels={}, num_values={})),
                }
                for client in hosted
            },
        }

    def _work(
        self, header: Mapping[str, Any], pieces: Sequence[Piece], session: Session
    ) -> tuple[dict[str, Any], Sequence[Piece]]:
        tasks = self._tasks(header, pieces, session)
        if session.recipe.secure is not None and any(task.kind == "train" for task in tasks):
            return self._masked(header, pieces, tasks, session)
        reasons: list[str | None] = []
        out: list[Piece] = []
        spent: list[list[float]] = []
        for task, (answer, took) in zip(tasks, self._answers(tasks, session), strict=True):
            spent.append([took.seconds, took.steps])
            try:
                out.append(self._message(task, answer, session))
                reasons.append(None)
            except ValueError as error:
                reasons.append(str(error))
        session.store.flush()
        self._forget(tasks, session)
        for task, reason in zip(tasks, reasons, strict=True):
            self.say(f"round {task.round}: {task.kind}, {reason or 'done'}")
        said, own = self._handover.left(out)
        return {"answers": reasons, "spent": spent, **said}, own

    def _masked(
        self,
        header: Mapping[str, Any],
        pieces: Sequence[Piece],
        tasks: Sequence[Task],
        session: Session,
    ) -> tuple[dict[str, Any], Sequence[Piece]]:
        """Return a masked upload; one without a mask is not sent, whoever asks for it."""
        if len(tasks) != 1 or "sum" not in header:
            raise ValueError(_UNMASKED)

        def trained() -> Reply:
            ((answer, _),) = self._answers(tasks, session)
            if isinstance(answer, ClientFailure):
                raise ClientError(answer.reason)
            return self.settings.limits.bounded(answer)

        task, (_, body), asked = tasks[0], header["tasks"][0], _piece(pieces, header["sum"])
        upload = self._member(header, session).upload(asked, task, pieces[body], trained)
        self.settings.limits.check_size(len(upload), "the reply")
        session.store.flush()
        self._forget(tasks, session)
        self.say(f"round {task.round}: {task.kind}, done and masked")
        said, own = self._handover.left([self._handover.spool.joined([upload])])
        return {"answers": [None], **said}, own

    def _member(self, header: Mapping[str, Any], session: Session) -> Member:
        """Return this site in secure sums, under the recipe that is ready; it reads its keys for every attempt."""
        if header.get("step") == "advertise":
            self._in_sums = None
        if self._in_sums is None:
            own, run = self.settings, recipe_sha256(header["recipe"])
            least, recipe = own.limits.min_cohort, session.recipe
            self._in_sums = member_of(own.name, own.keys, recipe, run, least, folder=own.folder)
        return self._in_sums

    @staticmethod
    def _tasks(header: Mapping[str, Any], pieces: Sequence[Piece], session: Session) -> list[Task]:
        """Return the tasks of an envelope; a body that they share is decoded once, as nobody writes to a download."""
        limit = session.recipe.wire.max_bytes
        decoded: dict[int, Payload] = {}
        tasks = []
        for head, body in header["tasks"]:
            known = decoded.get(body)
            task = decode_task(pieces[head], body=pieces[body], download=known, max_bytes=limit)
            decoded[body] = task.download
            tasks.append(task)
        return tasks

    def _answers(
        self, tasks: Sequence[Task], session: Session
    ) -> Iterator[tuple[Reply | ClientFailure, Spent]]:
        hosted = self.settings.clients or list(session.engine.population())
        if strangers := [task.client for task in tasks if task.client not in hosted]:
            raise ValueError(f"{strangers[0]} is no client of {self.settings.name}")
        algorithm, width = session.recipe.algorithm, session.watched.width
        for at in range(0, len(tasks), width):
            meter = Meter()
            answers = run_tasks(
                algorithm,
                session.watched,
                session.store,
                tasks[at : at + width],
                finetune=session.recipe.evaluation.finetune,
                meter=meter,
            )
            yield from ((answer, meter.of(i)) for i, answer in enumerate(answers))

    def _message(self, task: Task, answer: Reply | ClientFailure, session: Session) -> Piece:
        if isinstance(answer, ClientFailure):
            raise ValueError(answer.reason)
        limits = self.settings.limits
        bounded = limits.bounded(answer) if task.kind == "train" else answer
        pieces = reply_pieces(bounded, settings=session.recipe.wire)
        limits.check_size(sum(map(len, pieces)), "the reply")
        return self._handover.spool.joined(pieces)

    def _forget(self, tasks: Sequence[Task], session: Session) -> None:
        """Drop memory that no checkpoint of the server can ask for; on the server's machine it does that itself."""
        if self.settings.data and tasks:
            session.store.prune(below=tasks[0].round - session.recipe.run.keep_checkpoints)


def open_session(settings: SiteSettings, recipe: Recipe, *, device: str | None = None) -> Session:
    """Build the recipe on this site's data, its model on another device than the recipe's where one is given.

    Raises:
        ValueError: where the site's limits do not allow it, or its data does not fit.
    """
    settings.limits.check_recipe(recipe)
    if settings.data is None:
        return build(recipe, settings.folder, device=device)
    if recipe.data.held_out:
        raise ValueError(
            "data.held_out is for data in one place: a site judges on the test split of its own examples"
        )

    def own(data: DataSettings, tokenizer: Tokenizer, objective: Objective) -> Federation:
        try:
            return own_data(settings, data, tokenizer, objective)
        except ValueError as error:
            raise _OwnData(str(error)) from error

    if isinstance(recipe.tune, Offsite):
        folder = settings.folder / EMULATOR
        if not folder.is_dir():
            raise ValueError(
                f"the emulator that tune: offsite needs is not in {folder}: the server hands it over when this site joins"
            )
        recipe = replace(recipe, model=replace(recipe.model, name=str(folder)))
    session = build(recipe, settings.folder, makers=Makers(federation=own), device=device)
    if isinstance(session.space, OffsiteSpace) and session.space.is_whole_here:
        raise ValueError(
            f"{settings.folder / EMULATOR} holds a whole model: remove it, and join again"
        )
    for counts in session.counts.values():
        settings.limits.check_examples(counts.train + counts.validation + counts.test)
    settings.limits.check_upload(rehearsed(session)[1].upload)
    return session


def _piece(pieces: Sequence[Piece], at: object) -> Piece:
    """Return a message of a secure sum.

    Raises:
        ValueError: where the envelope has none there.
    """
    if type(at) is not int or not 0 <= at < len(pieces):
        raise ValueError("the envelope is malformed: no message of a secure sum is in it")
    return pieces[at]


class _OwnData(ValueError):
    """An error in this site's data, whose sentence may quote it."""


def rehearsed(session: Session) -> tuple[Task, Reply]:
    """Return the task of a client here in round 1, and a stand-in for its reply."""
    algorithm = session.recipe.algorithm
    run = begin(algorithm, session.space.start(), session.recipe.run.seed)
    round = draw(run, session.engine.population(), None)
    task = tasks("train", round, algorithm.broadcast(run.state, round))[0]
    # Noise, as a tensor that does not move would not travel.
    return task, rehearse(algorithm, task, noise=1e-2)


def own_data(
    settings: SiteSettings, asked: DataSettings, tokenizer: Tokenizer, objective: Objective
) -> Federation:
    """Return the federation of one client: this site's file, prepared as the recipe says."""
    # What it has too few of is said in a sentence of its own, without the number.
    data = replace(
        asked,
        source=str(settings.data),
        pooled=False,
        num_clients=None,
        tiers={},
        min_examples=1,
    )
    columns = settings.limits.columns
    taken = take_rows(data, lambda texts: lengths(texts, tokenizer), readable=columns)
    rows = taken.rows
    rows = [replace(row, values={**row.values, _LABEL: settings.name}) for row in rows]
    found = {column for row in rows for column in row.values}
    labels = [name for name in asked.labels or KNOWN_LABELS if name in found]
    data = replace(data, partition=Natural(by=_LABEL), labels=(*labels, _LABEL))
    federation = divide(replace(taken, rows=rows), data, tokenizer, objective)
    if any(own.train < asked.min_examples for own in federation.manifest.clients.values()):
        raise ValueError(
            "this site takes no part, as it has fewer training examples than the recipe's data.min_examples "
            f"{asked.min_examples}"
        )
    profiles = {
        client: {name: value for name, value in profile.items() if name != _LABEL}
        for client, profile in federation.profiles.items()
    }
    return replace(federation, profiles=profiles)


def agreed_recipe(file: Path) -> str:
    """Return a site's own copy of the recipe as the server would send it."""
    recipe = load_recipe(file)
    if not recipe.elsewhere:
        recipe = replace(recipe, engine=FlowerSettings(nodes=0))
    return shared_recipe(recipe)


def all_own(
    sites: Collection[SiteSettings],
) -> Callable[[DataSettings, Tokenizer, Objective], Federation]:
    """Return a maker of one federation of all sites' own data, each cut as its site cuts it: what their simulation trains on."""

    def own(asked: DataSettings, tokenizer: Tokenizer, objective: Objective) -> Federation:
        parts = [own_data(site, asked, tokenizer, objective) for site in sites]
        counts = {c: n for part in parts for c, n in part.manifest.clients.items()}
        return replace(
            parts[0],
            shards={c: shard for part in parts for c, shard in part.shards.items()},
            profiles={c: p for part in parts for c, p in part.profiles.items()},
            manifest=replace(parts[0].manifest, clients=counts),
        )

    return own
