"""A site: its own data, its limits, and the answers to the server's letters."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from fedloom.client.worker import run_tasks
from fedloom.core.protocols import Absence, ClientId, Refusal, Reply, Task
from fedloom.data.columns import KNOWN_LABELS
from fedloom.data.federation import Federation, divide
from fedloom.data.partition import Natural
from fedloom.data.settings import DataSettings
from fedloom.data.sources import load_rows
from fedloom.data.tokens import Tokenizer, lengths
from fedloom.deploy.greeting import greeting, shared_recipe, versions
from fedloom.deploy.limits import Limits
from fedloom.engines.settings import FlowerSettings
from fedloom.recipe import build_recipe, load_recipe
from fedloom.run.session import Session, build
from fedloom.run.settings import Recipe
from fedloom.spaces.handshake import SERVER_AND_SITE, agree
from fedloom.wire.format import decode_task, encode_reply

ENDED = "the run has ended"
"""Said when the server says goodbye."""
_LABEL = "site"


@dataclass(frozen=True, slots=True)
class SiteSettings:
    """What a site is started with."""

    name: str
    folder: Path
    """Of the memory, and of the recipe that was agreed on."""
    data: Path | None = None
    """This site's text; None: the clients below, with their part of the recipe's data."""
    clients: Sequence[ClientId] = ()
    limits: Limits = Limits()
    recipe: Path | None = None
    """The only recipe that this site takes part in; None: any that its limits allow."""

    def write(self, file: Path) -> None:
        """Write it for the worker's process."""
        file.write_text(json.dumps(asdict(self), default=str))

    @classmethod
    def read(cls, file: Path) -> "SiteSettings":
        """Read what `write` wrote."""
        told = json.loads(file.read_text())
        paths = {k: told[k] and Path(told[k]) for k in ("folder", "data", "recipe")}
        return cls(**{**told, **paths, "limits": Limits(**told["limits"])})


@dataclass
class Site:
    """Answers letters; the model and the data of a recipe are loaded when it is first heard of."""

    settings: SiteSettings
    say: Callable[[str], None] = lambda _: None
    _ready: dict[str, tuple[Session, Mapping[str, str]]] = field(default_factory=dict)

    def answer(
        self, header: dict[str, Any], pieces: list[bytes]
    ) -> tuple[dict[str, Any], list[bytes]]:
        """Return the answer to a letter, or a refusal in one sentence."""
        try:
            if header["kind"] == "bye":
                self.say(ENDED)
                return {}, []
            self.settings.limits.check_size(pieces, "the message")
            session = self._session(header)
            if header["kind"] == "hello":
                self.say(f"joined {session.recipe.name}")
                return self._introduction(header, session), []
            return self._work(header, pieces, session)
        except (ValueError, OSError, Refusal) as error:
            self.say(f"refused: {error}")
            return {"refusal": str(error)}, []

    def _session(self, header: Mapping[str, Any]) -> Session:
        text, asked = header["recipe"], header["identity"]
        if text not in self._ready:
            known = versions()
            agree({name: asked.get(name) for name in known}, known, where=SERVER_AND_SITE)
            self._check_recipe(text)
            session = open_session(self.settings, build_recipe(yaml.safe_load(text)))
            self._ready = {text: (session, greeting(text, session)["identity"])}
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
        return {
            "identity": self._ready[header["recipe"]][1],
            # How many of each label would tell more than the server needs.
            "clients": {
                client: {
                    "profile": dict(population[client]),
                    "counts": asdict(replace(counts[client], labels={})),
                }
                for client in hosted
            },
        }

    def _work(
        self, header: Mapping[str, Any], pieces: list[bytes], session: Session
    ) -> tuple[dict[str, Any], list[bytes]]:
        limit = session.recipe.wire.max_bytes
        tasks = [
            decode_task(pieces[head] + pieces[body], max_bytes=limit)
            for head, body in header["tasks"]
        ]
        reasons: list[str | None] = []
        out: list[bytes] = []
        for task, answer in zip(tasks, self._answers(tasks, session), strict=True):
            try:
                out.append(self._message(task, answer, session))
                reasons.append(None)
            except ValueError as error:
                reasons.append(str(error))
        self._forget(tasks, session)
        for task, reason in zip(tasks, reasons, strict=True):
            self.say(f"round {task.round}: {task.kind}, {reason or 'done'}")
        return {"answers": reasons}, out

    def _answers(self, tasks: Sequence[Task], session: Session) -> list[Reply | Absence]:
        hosted = self.settings.clients or list(session.engine.population())
        if strangers := [task.client for task in tasks if task.client not in hosted]:
            raise ValueError(f"{strangers[0]} is no client of {self.settings.name}")
        algorithm, width = session.recipe.algorithm, session.trainer.width
        return [
            answer
            for at in range(0, len(tasks), width)
            for answer in run_tasks(
                algorithm, session.trainer, session.store, tasks[at : at + width]
            )
        ]

    def _message(self, task: Task, answer: Reply | Absence, session: Session) -> bytes:
        if isinstance(answer, Absence):
            raise ValueError(answer.reason)
        limits = self.settings.limits
        bounded = limits.bounded(answer) if task.kind == "train" else answer
        message = encode_reply(bounded, settings=session.recipe.wire)
        limits.check_size([message], "the reply")
        return message

    def _forget(self, tasks: Sequence[Task], session: Session) -> None:
        """Drop memory that no checkpoint of the server can ask for; on the server's machine it does that itself."""
        if self.settings.data and tasks:
            session.store.prune(below=tasks[0].round - session.recipe.run.keep_checkpoints)


def open_session(settings: SiteSettings, recipe: Recipe) -> Session:
    """Build the recipe on this site's data.

    Raises:
        ValueError: where the site's limits do not allow it, or its data does not fit.
    """
    settings.limits.check_recipe(recipe)
    if settings.data is None:
        return build(recipe, settings.folder)
    session = build(recipe, settings.folder, own=lambda data, tok: own_data(settings, data, tok))
    (counts,) = session.counts.values()
    settings.limits.check_examples(counts.rows)
    return session


def own_data(settings: SiteSettings, asked: DataSettings, tokenizer: Tokenizer) -> Federation:
    """Return the federation of one client: this site's file, prepared as the recipe says."""
    data = replace(asked, source=str(settings.data), pooled=False, num_clients=None, tiers={})
    rows = load_rows(data, lambda texts: lengths(texts, tokenizer))
    rows = settings.limits.readable(rows)
    rows = [replace(row, values={**row.values, _LABEL: settings.name}) for row in rows]
    found = {column for row in rows for column in row.values}
    labels = [name for name in asked.labels or KNOWN_LABELS if name in found]
    data = replace(data, partition=Natural(by=_LABEL), labels=(*labels, _LABEL))
    federation = divide(rows, data, tokenizer)
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
