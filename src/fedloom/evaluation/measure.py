"""How good a model is on held-out examples."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from fedloom.core.protocols import Metrics, Split
from fedloom.data.tokens import Example
from fedloom.evaluation.chrf import chrf
from fedloom.evaluation.evaluation_settings import EvaluationSettings
from fedloom.evaluation.generation import Decoder, Generation
from fedloom.evaluation.scoring import evaluating, score
from fedloom.evaluation.text_metrics import extract, paper_rouge, rouge
from fedloom.objectives.forward import NOTHING
from fedloom.objectives.objective import Objective, Score, perplexity
from fedloom.objectives.sft import DEFAULT

_BY_TOKEN = ("loss", "token_accuracy")
_COUNTS = ("num_tokens", "num_examples")


@dataclass(frozen=True, slots=True)
class Evaluator:
    """Measures a model in evaluation mode and leaves it as it was."""

    settings: EvaluationSettings
    tokenizer: Decoder
    objective: Objective = DEFAULT
    """Where its answers are classes, they are chosen among these, never generated."""

    def measure(self, model: nn.Module, examples: Sequence[Example], *, split: Split) -> Metrics:
        """Return the objective's metrics, such as loss and token accuracy, and counts; of text, on the test split also answers' scores.

        Raises:
            ValueError: where there is nothing to measure.
        """
        return self.measure_each(model, [examples], split=split)[0]

    def measure_each(
        self, model: nn.Module, groups: Sequence[Sequence[Example]], *, split: Split
    ) -> list[Metrics]:
        """Measure several clients' examples on one model, in shared batches and equal rows once."""
        kept = [group[: self.settings.max_examples] for group in groups]
        if not kept or not all(kept):
            raise ValueError(
                f"the {split} split of a client to be measured holds no examples; give it more "
                f"with data.fractions or data.num_examples, or leave the client out"
            )
        flat = [example for group in kept for example in group]
        with evaluating(model):
            scores = self._scores(model, flat)
            answered = split == "test" and self.settings.generate and not self.objective.classes
            texts = self._answers(model, flat) if answered else []
        metrics: list[Metrics] = []
        at = 0
        for group in kept:
            measured = self._metrics(scores[at : at + len(group)], split)
            if answered:
                measured |= self._grade(group, texts[at : at + len(group)])
            metrics.append(measured)
            at += len(group)
        return metrics

    def answers(self, model: nn.Module, examples: Sequence[Example]) -> list[str]:
        """Return what the model answers, greedily or as a class, in the order of the examples."""
        with evaluating(model):
            if self.objective.classes:
                words = list(self.objective.classes.values())
                choices = [score.choice for score in self._scores(model, examples)]
                return ["" if choice == NOTHING else words[choice] for choice in choices]
            return self._answers(model, examples)

    def _scores(self, model: nn.Module, examples: Sequence[Example]) -> list[Score]:
        rows = {_key(example.ids, example.labels): example for example in examples}
        scored = score(model, list(rows.values()), self.settings.batch_size, self.objective)
        by_row = dict(zip(rows, scored, strict=True))
        return [by_row[_key(example.ids, example.labels)] for example in examples]

    def _metrics(self, scores: Sequence[Score], split: Split) -> dict[str, float]:
        num_tokens = sum(score.num_tokens for score in scores)
        if not num_tokens:
            raise ValueError(
                f"the {split} split of a client has no target tokens in {len(scores)} examples; raise "
                f"data.max_length so that answers are not cut away"
            )
        counts = {"num_tokens": float(num_tokens), "num_examples": float(len(scores))}
        return {**self.objective.metrics(scores), **counts}

    def _answers(self, model: nn.Module, examples: Sequence[Example]) -> list[str]:
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
            self.tokenizer, self.settings.max_new_tokens, self.settings.batch_size
        )
        written = generation.answers(model, list(rows.values()), self._ends(examples))
        by_row = dict(zip(rows, written, strict=True))
        return [by_row[_key(prompt)] for prompt in prompts]

    def _ends(self, examples: Sequence[Example]) -> set[int]:
        """Return what a chat template ends a turn with, where that is not the end token: learnt right before it."""
        end = self.tokenizer.eos_token_id
        tails = {tuple(example.labels[-2:].tolist()) for example in examples}
        learnt = {before for before, *last in tails if last == [end] and before >= 0}
        # Text is left of what is no special token.
        return {t for t in learnt if not self.tokenizer.decode([t], skip_special_tokens=True)}

    def _grade(self, examples: Sequence[Example], texts: Sequence[str]) -> dict[str, float]:
        hits, unigrams, longest, runs, paper = 0, 0.0, 0.0, 0.0, 0.0
        for example, text in zip(examples, texts, strict=True):
            assert example.record is not None
            reference = example.record.messages[-1].content
            what = self.settings.extract
            hits += extract(text, what) == extract(example.record.answer, what)
            one, subsequence = rouge(reference, text)
            unigrams += one
            longest += subsequence
            runs += chrf(reference, text)
            paper += paper_rouge(reference, text) if self.settings.paper_rouge else 0.0
        count = len(examples)
        grades = {"exact_match": hits, "rouge1": unigrams, "rougeL": longest, "chrf": runs}
        if self.settings.paper_rouge:
            grades["rouge_l_paper"] = paper
        return {name: total / count for name, total in grades.items()}


def combine(metrics: Iterable[Metrics]) -> Metrics:
    """Return the metrics of all clients' examples together.

    Loss and token accuracy weigh by target tokens, the others by examples; counts add up. A metric only
    some clients have is the mean of those.
    """
    sums: dict[str, float] = {}
    weights: dict[str, float] = {}
    for each in metrics:
        for name, value in each.items():
            weight = 1.0
            if name not in _COUNTS:
                weight = each["num_tokens" if name in _BY_TOKEN else "num_examples"]
            sums[name] = sums.get(name, 0.0) + weight * value
            weights[name] = weights.get(name, 0.0) + weight
    if not sums:
        raise ValueError("there are no metrics to combine: no client was measured")
    means = {n: total if n in _COUNTS else total / weights[n] for n, total in sums.items()}
    return means | ({"perplexity": perplexity(means["loss"])} if "loss" in means else {})


def _key(*tensors: Tensor) -> bytes:
    return b"/".join(tensor.numpy().tobytes() for tensor in tensors)
