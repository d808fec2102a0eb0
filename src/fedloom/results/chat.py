"""What a finished run's deployed weights say, in a chat."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fedloom.core.protocols import ClientId, Params
from fedloom.data.formats import Message
from fedloom.data.preparation import question
from fedloom.results.export import routable
from fedloom.results.route import Route, Router
from fedloom.results.suites import BASE
from fedloom.rounds.loop import Run
from fedloom.rounds.restore import last_run
from fedloom.rounds.session import Session

AUTO = "auto"
"""In place of a model's name: what the user asks chooses, anew with every message."""


@dataclass
class Chat:
    """A conversation with a deployed model, rendered as its training data was."""

    session: Session
    models: Mapping[str, tuple[Params, list[ClientId]]]
    """To choose from by what the user asks; of one, there is nothing to choose."""
    messages: tuple[Message, ...] = ()
    """What was said so far."""
    route: Route | None = None
    """Which model was chosen last, and how sure that is; None where nothing was."""

    @classmethod
    def open(cls, session: Session, name: str | None, *, run: Run[Any] | None = None) -> "Chat":
        """Load the model called so, or that of the client called so; the shared one; that before training, `base`; or leave
        the choice to what is asked, `auto`.

        Raises:
            ValueError: where there is no such model or client, or models differ and none was named.
        """
        if name == BASE:
            models: Mapping[str, tuple[Params, list[ClientId]]]
            models = {BASE: (session.space.start(), [])}
        else:
            models = routable(session, run or last_run(session))
        if name not in (AUTO, BASE):
            name = _pick(models, name)
            models = {name: models[name]}
        chat = cls(session, models)
        chat.load()
        return chat

    def load(self) -> None:
        """Put the model into the session, if there is one alone: needed where another one was put there meanwhile."""
        if len(self.models) == 1:
            ((params, _),) = self.models.values()
            self.session.space.load(params)

    @property
    def name(self) -> str:
        """Return what the model is called; `auto` where none is chosen yet."""
        if len(self.models) == 1:
            return next(iter(self.models))
        return self.route.model if self.route else AUTO

    def answer(self, text: str, *, told: Callable[[str], object] | None = None) -> str:
        """Return the model's answer to the next message.

        Args:
            text: The message.
            told: Called with the answer so far before every further token; what it raises ends the answer, as if never asked for.

        Raises:
            ValueError: where the conversation has outgrown data.max_length.
        """
        recipe, tokenizer = self.session.recipe, self.session.base.tokenizer
        settings, objective = recipe.data, recipe.objective
        if len(self.models) > 1:
            # Each of the user's messages by itself: answers are the models' own, and no evidence.
            texts = [message.content for message in self.messages if message.role == "user"]
            self.route = Router(self.session, self.models).route([*texts, text])
            self.session.space.load(self.models[self.route.model][0])
        asked = (*self.messages, Message("user", text))
        record = question(asked, settings, objective)
        (examples,) = objective.examples([record], settings, tokenizer).examples
        # Where answers give way, only an earlier one may be left; where prompts do, the oldest turns are gone.
        whole = [e for e in examples if e.record and e.record.messages[-1] is record.messages[-1]]
        if not whole:
            raise ValueError(
                f"the conversation is longer than data.max_length ({settings.max_length} tokens); begin a new one"
            )
        model = self.session.space.model
        (answer,) = self.session.evaluator.answers(model, whole[-1:], told=told)
        self.messages = (*asked, Message("assistant", answer))
        return answer


def _pick(models: Mapping[str, tuple[Params, list[ClientId]]], name: str | None) -> str:
    if name is None and len(models) == 1:
        return next(iter(models))
    for model, (_, clients) in models.items():
        if name == model or name in clients:
            return model
    known = ", ".join(c for _, clients in models.values() for c in clients)
    given = f"got {name!r}" if name else "got none"
    if len(models) == 1:
        raise ValueError(
            f"--client must be one of {known}, or {next(iter(models))}, the one model that all use, or be left out; {given}"
        )
    raise ValueError(
        f"--client must be one of {known}, whose model it is, or a model's own name: {', '.join(models)}, or"
        f" {AUTO}, which lets what is asked choose, in a chat; {given}"
    )
