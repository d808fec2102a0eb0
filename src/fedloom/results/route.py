"""Which of a run's models suits a client that never took part, or a prompt, and how sure that is. No label is asked for.

Clusters are hypotheses: by Bayes' rule the chance of one is proportional to the number of its clients times exp(evidence).
The evidence of rows with answers is the log-likelihood of the answers. Of a prompt the log-likelihood is no evidence: models
that learn answers alone come to answer where others would go on asking, so that each finds prompts of its own clients
unlikely, and to choose by it is no better than chance (`benchmarks/results/routing.md`). Evidence is how well a model expects
to answer: minus the entropy of the first token is the log-likelihood that it expects of it.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from rich.console import Group
from rich.table import Table
from rich.text import Text

from fedloom.core.description import GLOBAL
from fedloom.core.protocols import ClientId, Params
from fedloom.core.randomness import derive
from fedloom.data.formats import Message, Record
from fedloom.data.partition import Iid
from fedloom.data.preparation import question
from fedloom.data.readers import READERS, kind_of, read_file, text_lines
from fedloom.data.sharding import shuffled
from fedloom.data.tokens import Example
from fedloom.evaluation.scoring import answer_entropies, evaluating
from fedloom.results.export import routable
from fedloom.rounds.loop import Run
from fedloom.rounds.recipe_settings import Recipe
from fedloom.rounds.session import Session

Probe = Sequence[Record] | Sequence[str]
"""Conversations with answers, or prompts without."""


@dataclass(frozen=True)
class Route:
    """Where a probe belongs, by what every model makes of it."""

    evidence: Mapping[str, float]
    """Of each model, nats: the log-likelihood of the answers; of prompts what the model expects of its first tokens.
    Minus infinity where it has no numbers."""
    sizes: Mapping[str, int]
    """Clients of each model. One without clients, such as the model for all, is nobody's cluster: it is fallen back on."""
    num_examples: int
    """Of the probe."""
    num_tokens: int
    """That the evidence is the sum over."""
    answered: bool
    """Whether the probe has answers."""

    @property
    def prior(self) -> Mapping[str, float]:
        """Return the chance of each cluster by its size alone: those with numbers, which add up to 1."""
        found = {
            name: count
            for name, count in self.sizes.items()
            if count and math.isfinite(self.evidence[name])
        }
        return {name: count / sum(found.values()) for name, count in found.items()}

    @property
    def posterior(self) -> Mapping[str, float]:
        """Return the chance of each cluster after the probe."""
        logs = {name: math.log(prior) + self.evidence[name] for name, prior in self.prior.items()}
        top = max(logs.values(), default=0.0)
        chances = {name: math.exp(value - top) for name, value in logs.items()}
        total = sum(chances.values())
        return {name: chance / total for name, chance in chances.items()}

    @property
    def likeliest(self) -> str:
        """Return the cluster with the largest chance; the model for all where no cluster's has numbers."""
        return max(self.posterior, key=lambda name: self.posterior[name], default=GLOBAL)

    @property
    def model(self) -> str:
        """Return the model to use.

        It is the likeliest cluster's where that is more likely than not and its model finds given answers no less likely
        than the model for all does; otherwise the model for all, if there is one.
        """
        return GLOBAL if self._doubt else self.likeliest

    @property
    def reason(self) -> str:
        """Return model, chance and number of examples as one sentence without its full stop."""
        best = self.likeliest
        if len(self.prior) < 2:
            return f"{self.model} is the only model that gives numbers"
        one = "prompt" if not self.answered else "example"
        many = f"{self.num_examples} {one}{'' if self.num_examples == 1 else 's'}"
        chance = (
            f"{_percent(self.posterior[best])} likely from {many},"
            f" {_percent(self.prior[best])} by the number of its clients alone"
        )
        if not self._doubt:
            return f"{best} suits best: {chance}"
        return f"{GLOBAL}, the model for all, is used, as {self._doubt}: {best} is {chance}"

    @property
    def surprise(self) -> Mapping[str, float]:
        """Return minus the evidence of each model, nats a token."""
        return {name: -value / self.num_tokens for name, value in self.evidence.items()}

    @property
    def _doubt(self) -> str:
        """Return why the model for all is used instead of the likeliest cluster's; empty where it is not."""
        best, shared = self.likeliest, self.evidence.get(GLOBAL, -math.inf)
        if best == GLOBAL or shared == -math.inf or len(self.prior) < 2:
            return ""
        if self.posterior[best] <= 0.5:
            return "no cluster is more likely than not"
        return (
            "it finds the answers likelier"
            if self.answered and shared > self.evidence[best]
            else ""
        )


@dataclass(frozen=True)
class Router:
    """A run's models, and whom each serves."""

    session: Session
    models: Mapping[str, tuple[Params, list[ClientId]]]
    """As `routable` returns them."""

    @classmethod
    def of(cls, session: Session, run: Run[Any]) -> Self:
        """Return the router of a finished run."""
        return cls(session, routable(session, run))

    def route(self, probe: Probe) -> Route:
        """Return where whoever holds the probe belongs.

        Raises:
            ValueError: where nothing of it fits `data.max_length`, or no model has numbers for it.
        """
        answered = not isinstance(probe[0], str)
        examples = self.examples([_record(one, self.session.recipe) for one in probe])
        found = {name: self.evidence(name, examples, answered=answered) for name in self.models}
        route = self.concluded(found, examples, answered=answered)
        if all(map(math.isinf, route.evidence.values())):
            raise ValueError(
                f"no model of {self.session.folder} can be chosen: none gives numbers for this probe, as the loss of"
                " its training may have shown"
            )
        return route

    def concluded(
        self, found: Mapping[str, Sequence[float]], examples: Sequence[Example], *, answered: bool
    ) -> Route:
        """Return what follows from the evidence of each example, by model."""
        sums = {name: math.fsum(each) for name, each in found.items()}
        evidence = {n: total if math.isfinite(total) else -math.inf for n, total in sums.items()}
        # Who never trains was in no cluster because nobody asked, which says nothing of the next who comes.
        unseen = set(self.session.unseen)
        sizes = {name: len({*clients} - unseen) for name, (_, clients) in self.models.items()}
        tokens = sum(one.num_targets for one in examples) if answered else len(examples)
        return Route(evidence, sizes, len(examples), tokens, answered)

    def evidence(
        self, name: str, examples: Sequence[Example], *, answered: bool
    ) -> Sequence[float]:
        """Return what each example says for a model, nats: log-likelihood of its answer, or what the model expects of it."""
        batch_size = self.session.recipe.evaluation.batch_size
        self.session.space.load(self.models[name][0])
        model = self.session.space.model
        with self.session.evaluator.deployed() as evaluator, evaluating(model):
            if answered:
                return [-one.loss for one in evaluator.scores(model, examples)]
            prompts = [example.ids[: example.prompt_length] for example in examples]
            return [-found for found in answer_entropies(model, prompts, batch_size)]

    def examples(self, records: Sequence[Record]) -> list[Example]:
        """Return what of the conversations fits, at least one."""
        recipe, settings = self.session.recipe, self.session.recipe.data
        tokenised = recipe.objective.examples(records, settings, self.session.base.tokenizer)
        found = [example for examples in tokenised.examples for example in examples]
        if not found:
            raise ValueError(
                f"the probe must fit data.max_length ({settings.max_length} tokens), which none of its "
                f"{len(records)} examples does"
            )
        return found


def read_probe(session: Session, file: Path, num_examples: int) -> Probe:
    """Read a file like `data.source`, or prompts from a .txt file, one a line; return at most `num_examples` of it.

    Raises:
        ValueError: where it is neither, or holds nothing.
    """
    if file.suffix == ".txt":
        found: Probe = text_lines(file)
    elif not kind_of(file):
        raise ValueError(
            f"PROBE must be prompts, one a line, in a file that ends in .txt, or rows with answers in one that ends in"
            f" {', '.join(sorted(READERS))}, got {file}"
        )
    else:
        # Whoever asks need not know the labels that the run was dealt out by.
        settings = dataclasses.replace(session.recipe.data, partition=Iid(), labels=())
        rows = list(read_file(file))
        found = session.recipe.objective.records(rows, settings).records
    if not found:
        raise ValueError(f"{file} holds no example to find a model by")
    chosen = shuffled(range(len(found)), derive(session.recipe.data.seed, "probe"))[:num_examples]
    return [found[i] for i in sorted(chosen)]  # type: ignore[return-value]  # of either kind


def route_table(router: Router, probe: Probe) -> Group:
    """Return the choice in a sentence, and every model with its chance and how it takes the probe, the likeliest first."""
    route = router.route(probe)
    kind = "loss of the answers" if route.answered else "doubt of the first token"
    table = Table()
    table.add_column("model")
    table.add_column("chance", justify="right")
    table.add_column(f"{kind}, nats a token", justify="right")
    table.add_column("serves", ratio=1)
    chances, surprise = route.posterior, route.surprise
    for name in sorted(surprise, key=lambda name: (-chances.get(name, -1.0), surprise[name])):
        clients = router.models[name][1]
        more = f" and {len(clients) - 4} more" if len(clients) > 4 else ""
        serves = ", ".join(clients[:4]) + more if clients else "whoever fits no cluster"
        chance = _percent(chances[name]) if name in chances else ""
        table.add_row(Text(name), chance, f"{surprise[name]:.3f}", Text(serves))
    return Group(Text(route.reason), table)


def _percent(chance: float) -> str:
    """Return a chance in percent; never that it is certain, or impossible."""
    return "> 99 %" if chance > 0.995 else "< 1 %" if chance < 0.005 else f"{100 * chance:.0f} %"


def _record(one: Record | str, recipe: Recipe) -> Record:
    if isinstance(one, Record):
        return one
    return question([Message("user", one)], recipe.data, recipe.objective)
