"""Which of a run's models suits a client that never took part, or a prompt. No label is asked for.

A probe with answers belongs to the model that finds the answers least surprising; one of prompts alone to the model
that is surest of how to begin its answers.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

from fedloom.core.protocols import ClientId, Params
from fedloom.core.randomness import derive
from fedloom.data.formats import Message, Record
from fedloom.data.partition import Iid
from fedloom.data.preparation import question
from fedloom.data.readers import read_file
from fedloom.data.sharding import shuffled
from fedloom.data.tokens import Example
from fedloom.evaluation.scoring import answer_entropies, evaluating
from fedloom.rounds.recipe_settings import Recipe
from fedloom.rounds.session import Session

Probe = Sequence[Record] | Sequence[str]
"""Conversations with answers, or prompts without."""


@dataclass(frozen=True)
class Route:
    """Where a probe belongs."""

    model: str
    surprise: Mapping[str, float]
    """Of each model, nats a token, infinite where it has no numbers; the least is chosen."""

    @property
    def margin(self) -> float:
        """Return by how many nats the next best model is worse; 0 where there is no other."""
        best, *others = sorted(self.surprise.values())
        return others[0] - best if others else 0.0


@dataclass(frozen=True)
class Router:
    """A run's models, and whom each serves."""

    session: Session
    models: Mapping[str, tuple[Params, list[ClientId]]]
    """As `deliverables` returns them."""

    def route(self, probe: Probe) -> Route:
        """Return the model for whoever holds the probe.

        Raises:
            ValueError: where nothing of it fits `data.max_length`, or no model has numbers for it.
        """
        answered = not isinstance(probe[0], str)
        examples = self._examples([_record(one, self.session.recipe) for one in probe])
        surprise = {name: self._surprise(name, examples, answered=answered) for name in self.models}
        if all(map(math.isinf, surprise.values())):
            raise ValueError(
                f"no model of {self.session.folder} can be chosen: none gives numbers for this probe, as the loss of"
                " its training may have shown"
            )
        return Route(min(surprise, key=lambda name: surprise[name]), surprise)

    def _examples(self, records: Sequence[Record]) -> list[Example]:
        recipe, settings = self.session.recipe, self.session.recipe.data
        tokenised = recipe.objective.examples(records, settings, self.session.base.tokenizer)
        found = [example for examples in tokenised.examples for example in examples]
        if not found:
            raise ValueError(
                f"the probe must fit data.max_length ({settings.max_length} tokens), which none of its "
                f"{len(records)} examples does"
            )
        return found

    def _surprise(self, name: str, examples: Sequence[Example], *, answered: bool) -> float:
        batch_size = self.session.recipe.evaluation.batch_size
        self.session.space.load(self.models[name][0])
        model = self.session.space.model
        if not answered:
            prompts = [example.ids[: example.prompt_length] for example in examples]
            found = sum(answer_entropies(model, prompts, batch_size)) / len(prompts)
        else:
            with evaluating(model):
                scores = self.session.evaluator.scores(model, examples)
            found = sum(one.loss for one in scores) / sum(one.num_tokens for one in scores)
        return math.inf if math.isnan(found) else found


def read_probe(session: Session, file: Path, num_examples: int) -> Probe:
    """Read a file like `data.source`, or prompts from a .txt file, one a line; return at most `num_examples` of it."""
    if file.suffix == ".txt":
        lines = file.read_text(encoding="utf-8").splitlines()
        found: Probe = [line.strip() for line in lines if line.strip()]
    else:
        # Whoever asks need not know the labels that the run was dealt out by.
        settings = dataclasses.replace(session.recipe.data, partition=Iid(), labels=())
        rows = list(read_file(file))
        found = session.recipe.objective.records(rows, settings).records
    if not found:
        raise ValueError(f"{file} holds no example to find a model by")
    chosen = shuffled(range(len(found)), derive(session.recipe.data.seed, "probe"))[:num_examples]
    return [found[i] for i in sorted(chosen)]  # type: ignore[return-value]  # of either kind


def route_table(router: Router, probe: Probe) -> Table:
    """Return every model with how it takes the probe, the chosen one first."""
    route = router.route(probe)
    kind = "doubt of the first token" if isinstance(probe[0], str) else "loss of the answers"
    table = Table(
        title=Text(f"{route.model} suits these {len(probe)} examples best"), title_justify="left"
    )
    table.add_column("model")
    table.add_column(f"{kind}, nats", justify="right")
    table.add_column("serves", ratio=1)
    for name in sorted(route.surprise, key=lambda name: route.surprise[name]):
        clients = router.models[name][1]
        more = f" and {len(clients) - 4} more" if len(clients) > 4 else ""
        serves = Text(", ".join(clients[:4]) + more)
        table.add_row(Text(name), f"{route.surprise[name]:.3f}", serves)
    return table


def _record(one: Record | str, recipe: Recipe) -> Record:
    if isinstance(one, Record):
        return one
    return question([Message("user", one)], recipe.data, recipe.objective)
