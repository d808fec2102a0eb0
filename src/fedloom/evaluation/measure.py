"""How good a model is on held-out examples."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from fedloom.core.metrics import METRICS, PLUGIN, WEIGHTS, Metric, MetricTable, Reduction
from fedloom.core.protocols import Metrics, Split
from fedloom.core.randomness import derive
from fedloom.data.tokens import Example
from fedloom.evaluation.evaluation_settings import EvaluationSettings
from fedloom.evaluation.generation import Decoder, Generation, turn_ends
from fedloom.evaluation.metrics import answer_metrics, grade
from fedloom.evaluation.scoring import evaluating, score
from fedloom.objectives.forward import NOTHING
from fedloom.objectives.objective import Objective, Score, perplexity
from fedloom.objectives.sft import DEFAULT


class Carry(Protocol):
    """What lets examples carry what a reference model makes of them."""

    def together(self, examples: Sequence[Example], size: int) -> list[Example]:
        """Return the examples with it, asked in the batches of up to `size` in which they are measured."""
        ...


@dataclass(frozen=True, slots=True)
class PluggedIn:
    """What was learnt around an emulator, in the whole model."""

    whole: Callable[[], AbstractContextManager[None]]
    """Lets the model stand whole for a while."""
    references: Carry | None
    """As the evaluator's own, of the whole model."""


@dataclass(frozen=True, slots=True)
class Evaluator:
    """Measures a model in evaluation mode and leaves it as it was."""

    settings: EvaluationSettings
    tokenizer: Decoder
    objective: Objective = DEFAULT
    """Where its answers are classes, they are chosen among these, never generated."""
    seed: int = 0
    """Of the draw where `evaluation.max_examples` is fewer than a split has."""
    references: Carry | None = None
    """Of an objective that compares with a reference model."""
    plugged_in: "PluggedIn | None" = None
    """Of a model that is an emulator of one that is here: the whole is measured beside it, and answers."""

    @contextmanager
    def deployed(self) -> Iterator["Evaluator"]:
        """Let the model stand as it is used, whole where clients train around an emulator of it, and yield who measures that."""
        if self.plugged_in is None:
            yield self
            return
        with self.plugged_in.whole():
            yield replace(self, references=self.plugged_in.references, plugged_in=None)

    def drawn(self, examples: Sequence[Example]) -> Sequence[Example]:
        """Return the examples of a client's split that are measured, in their order: all, or as many as settings say.

        An example is drawn by what it holds, whatever stands beside it and whenever it is asked.
        """
        most = self.settings.max_examples
        if most is None or most >= len(examples):
            return examples
        order = sorted(range(len(examples)), key=lambda at: self._rank(examples[at]))
        return [examples[at] for at in sorted(order[:most])]

    def _rank(self, example: Example) -> int:
        return derive(self.seed, example.key.hex())

    def measure(self, model: nn.Module, examples: Sequence[Example], *, split: Split) -> Metrics:
        """Return the objective's metrics, such as loss and token accuracy, and counts; on the test split also answers' scores.

        Of answers that are classes only users' own scores are taken.

        Raises:
            ValueError: where there is nothing to measure.
        """
        return self.measure_each(model, [examples], split=split)[0]

    def measure_each(
        self,
        model: nn.Module,
        groups: Sequence[Sequence[Example]],
        *,
        split: Split,
        share: float = 1.0,
        beside: Sequence[tuple[float, Sequence[float]]] = (),
    ) -> list[Metrics]:
        """Measure several clients' examples on one model, in shared batches and equal rows once.

        An emulated model is measured a second time, whole, under the names that begin with `plugin/`.

        Args:
            model: Whose answers are measured.
            groups: A client's examples each.
            split: Which they are of.
            share: Of the model in a mixture.
            beside: Shares of the other models, and their `losses` of all examples that are measured.
        """
        measured = self._measure_each(model, groups, split, share, beside)
        if self.plugged_in is None:
            return measured
        with self.deployed() as plugged:
            whole = plugged.measure_each(model, groups, split=split)
        return [
            {**one, **{f"{PLUGIN}{n}": v for n, v in other.items() if n not in WEIGHTS}}
            for one, other in zip(measured, whole, strict=True)
        ]

    def _measure_each(
        self,
        model: nn.Module,
        groups: Sequence[Sequence[Example]],
        split: Split,
        share: float,
        beside: Sequence[tuple[float, Sequence[float]]],
    ) -> list[Metrics]:
        chosen = [self.drawn(group) for group in groups]
        if not chosen or not all(chosen):
            raise ValueError(
                f"the {split} split of a client to be measured holds no examples; give it more "
                f"with data.fractions or data.num_examples, or leave the client out"
            )
        flat = [example for group in chosen for example in group]
        answered = split == "test" and self.settings.generate
        graded = (
            answer_metrics(self.settings, written=not self.objective.classes) if answered else []
        )
        with evaluating(model):
            scores = self.scores(model, flat)
            texts = self._texts(model, flat, scores) if graded else []
        scores = _mixed(scores, share, beside) if beside else scores
        metrics: list[Metrics] = []
        at = 0
        for group in chosen:
            end = at + len(group)
            measured = self._metrics(scores[at:end], split)
            if graded:
                measured |= self._grade(graded, group, texts[at:end], scores[at:end])
            metrics.append(measured)
            at = end
        return metrics

    def losses(self, model: nn.Module, examples: Sequence[Example]) -> list[float]:
        """Return the loss of each example, a sum over its target tokens, nats."""
        with evaluating(model):
            return [score.loss for score in self.scores(model, examples)]

    def answers(
        self,
        model: nn.Module,
        examples: Sequence[Example],
        *,
        told: Callable[[str], object] | None = None,
    ) -> list[str]:
        """Return what the model answers, greedily or as a class, in the order of the examples.

        `told` is called with the answer so far before every further token, where there is one example and no classes.
        """
        with self.deployed(), evaluating(model):
            scores = self.scores(model, examples) if self.objective.classes else []
            return self._texts(model, examples, scores, told)

    def _texts(
        self,
        model: nn.Module,
        examples: Sequence[Example],
        scores: Sequence[Score],
        told: Callable[[str], object] | None = None,
    ) -> list[str]:
        if not self.objective.classes:
            return self._answers(model, examples, told)
        words = list(self.objective.classes.values())
        return ["" if score.choice == NOTHING else words[score.choice] for score in scores]

    def scores(self, model: nn.Module, examples: Sequence[Example]) -> list[Score]:
        """Return what the model makes of each example, equal ones once; the model is in evaluation mode."""
        rows = distinct(examples)
        measured = rows
        if self.references is not None:
            measured = self.references.together(rows, self.batch_size)
        scored = score(model, measured, self.batch_size, self.objective)
        by_row = {row.key: found for row, found in zip(rows, scored, strict=True)}
        return [by_row[example.key] for example in examples]

    @property
    def batch_size(self) -> int:
        """Return how many examples are measured at once."""
        return self.settings.batch_size

    def _metrics(self, scores: Sequence[Score], split: Split) -> dict[str, float]:
        num_tokens = sum(score.num_tokens for score in scores)
        if not num_tokens:
            raise ValueError(
                f"the {split} split of a client has no target tokens in {len(scores)} examples; raise "
                f"data.max_length so that answers are not cut away"
            )
        counts = {"num_tokens": float(num_tokens), "num_examples": float(len(scores))}
        return {**self.objective.metrics(scores), **counts}

    def _answers(
        self,
        model: nn.Module,
        examples: Sequence[Example],
        told: Callable[[str], object] | None,
    ) -> list[str]:
        if not examples:
            return []
        if any(example.record is None for example in examples):
            raise ValueError(
                "packed rows have no prompt to answer: set evaluation.generate to false or "
                "data.packing to false"
            )
        prompts = [example.ids[: example.prompt_length] for example in examples]
        rows = {_key(prompt): prompt for prompt in prompts}
        generation = Generation(
            self.tokenizer, self.settings.max_new_tokens, self.settings.batch_size, told=told
        )
        written = generation.answers(
            model, list(rows.values()), turn_ends(self.tokenizer, examples)
        )
        by_row = dict(zip(rows, written, strict=True))
        return [by_row[_key(prompt)] for prompt in prompts]

    def _grade(
        self,
        metrics: Sequence[Metric],
        examples: Sequence[Example],
        texts: Sequence[str],
        scores: Sequence[Score],
    ) -> dict[str, float]:
        answers = []
        for example, text, scored in zip(examples, texts, scores, strict=True):
            assert example.record is not None
            answers.append((text, [example.record.answer], scored.num_tokens))
        return grade(metrics, answers, self.settings.table)


def _mixed(
    scores: Sequence[Score], share: float, beside: Sequence[tuple[float, Sequence[float]]]
) -> list[Score]:
    """Return the scores with the losses of a mixture: -log of the sum of its shares times exp(-loss)."""
    shares = torch.tensor([share, *(each for each, _ in beside)], dtype=torch.float64)
    losses = [[score.loss for score in scores], *(each for _, each in beside)]
    own = torch.tensor(losses, dtype=torch.float64)
    mixed = -torch.logsumexp(shares.log()[:, None] - own, 0)
    return [replace(s, loss=loss) for s, loss in zip(scores, mixed.tolist(), strict=True)]


def combine(metrics: Iterable[Metrics], table: MetricTable = METRICS) -> Metrics:
    """Return the metrics of all clients together, reduced as the table says; perplexity is that of their loss."""
    total = Reduction(table)
    for each in metrics:
        total.add(each)
    found = total.result()
    if not found:
        raise ValueError("there are no metrics to combine: no client was measured")
    # A loss of pairs is no likelihood of tokens.
    by_token = "loss" in found and "num_pairs" not in found
    losses = [name for name in found if by_token and name.rpartition("/")[2] == "loss"]
    return found | {f"{name[:-4]}perplexity": perplexity(found[name]) for name in losses}


def distinct(examples: Iterable[Example]) -> list[Example]:
    """Return the examples that are measured where several are equal: one of each."""
    return list({example.key: example for example in examples}.values())


def _key(*tensors: Tensor) -> bytes:
    return b"/".join(tensor.numpy().tobytes() for tensor in tensors)
