"""Metrics of users' own score answers beside the package's, and are reduced over a client's examples as they say."""

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fedloom.core.metrics import METRICS, Metric, Reduce
from fedloom.data.formats import Message, Record
from fedloom.data.tokens import IGNORED, Example
from fedloom.evaluation.evaluation_settings import EvaluationSettings
from fedloom.evaluation.measure import Evaluator, combine
from fedloom.evaluation.metrics import answer_metrics, grade
from fedloom.evaluation.text_metrics import rouge
from fedloom.objectives.classification import Classification


def length(answer: str, references: Sequence[str]) -> float:
    return float(len(answer))


def own(reduce: Reduce) -> Metric:
    return Metric("length", reduce=reduce, score=length)


ANSWERS = [("ab", ["x"], 1), ("abcd", ["y"], 3)]


@pytest.mark.parametrize(
    ("reduce", "value"), [("examples", 3), ("mean", 3), ("sum", 6), ("tokens", 3.5)]
)
def test_a_metric_is_reduced_over_the_examples_of_a_client(reduce: Reduce, value: float) -> None:
    metric = own(reduce)
    assert grade([metric], ANSWERS, METRICS.extended([metric])) == {"length": value}


@pytest.mark.parametrize(
    ("reduce", "value"),
    [
        ("examples", (2 + 4 + 8) / 3),
        ("mean", (3 + 8) / 2),
        ("sum", 14),
        ("tokens", (1 * 2 + 3 * 4 + 6 * 8) / 10),
    ],
)
def test_and_over_clients_of_different_size(reduce: Reduce, value: float) -> None:
    metric = own(reduce)
    table = METRICS.extended([metric])
    clients = [ANSWERS, [("abcdefgh", ["z"], 6)]]
    graded = [
        {
            **grade([metric], answers, table),
            "num_tokens": float(sum(tokens for *_, tokens in answers)),
            "num_examples": float(len(answers)),
        }
        for answers in clients
    ]
    assert combine(graded, table)["length"] == pytest.approx(value)


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda *_: "good", "the score of the metric m must be a number, got str"),
        (lambda *_: math.nan, r"the metric m must be in \[0, 1\] for every client, got nan: mend"),
        (lambda *_: 2.0, r"the metric m must be in \[0, 1\] for every client, got 2.0"),
    ],
)
def test_a_score_that_is_none_is_refused(score: Any, message: str) -> None:
    metric = Metric("m", bounds=(0.0, 1.0), score=score)
    with pytest.raises(ValueError, match=message):
        grade([metric], ANSWERS, METRICS.extended([metric]))


def test_of_several_references_the_best_counts() -> None:
    settings = EvaluationSettings(metrics=["exact_match", "rouge1", "rouge_l_paper"])
    graded = grade(
        answer_metrics(settings, written=True), [("a b", ["c", "a b", "a"], 1)], settings.table
    )
    assert graded == {
        "exact_match": 1,
        "rouge1": rouge("a b", "a b")[0],
        "rouge_l_paper": pytest.approx(1),
    }


def test_only_what_is_named_is_measured_in_the_order_given() -> None:
    settings = EvaluationSettings(metrics=["chrf", own("sum"), "exact_match", Metric("told")])
    names = [metric.name for metric in answer_metrics(settings, written=True)]
    assert names == ["chrf", "exact_match", "length"]
    assert [m.name for m in answer_metrics(settings, written=False)] == ["length"]


class Chooser(nn.Module):
    """Says the token after each one, whatever comes before."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def get_input_embeddings(self) -> nn.Module:
        return nn.Embedding(16, 1)

    def forward(self, *, input_ids: torch.Tensor, **_: Any) -> Any:
        logits = nn.functional.one_hot((input_ids + 1) % 16, 16).float()
        return SimpleNamespace(logits=logits)


def test_words_among_classes_are_scored_by_users_own_metrics_alone() -> None:
    def right(answer: str, references: Sequence[str]) -> float:
        return float(answer in references)

    settings = EvaluationSettings(metrics=["exact_match", Metric("right", score=right)])
    judge = Evaluator(settings, SimpleNamespace(), Classification({"yes": "yes", "no": "no"}))
    examples = []
    for last, word in ((4, "yes"), (4, "no"), (5, "no")):
        labels = torch.tensor([IGNORED, IGNORED, {"yes": 5, "no": 6}[word]])
        record = Record((Message("user", "?"), Message("assistant", word)), {}, word)
        choices = torch.tensor([5, 6])
        examples.append(Example(torch.tensor([1, last, 0]), labels, 2, record, None, choices))
    measured = judge.measure(Chooser(), examples, split="test")
    assert measured["right"] == measured["accuracy"] == pytest.approx(2 / 3)
    assert "exact_match" not in measured
    assert "right" not in judge.measure(Chooser(), examples, split="validation")


def test_a_metric_of_ones_own_is_measured_beside_the_usual(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    model = tiny_llama(vocab=len(tiny_tokenizer))
    ids = torch.tensor([*tiny_tokenizer("what?", add_special_tokens=False)["input_ids"], 9, 2])
    labels = ids.clone()
    labels[:-2] = IGNORED
    record = Record((Message("user", "what?"), Message("assistant", "it")), {}, "it")
    example = Example(ids, labels, len(ids) - 2, record, None)
    settings = EvaluationSettings(metrics=["chrf", own("sum")], max_new_tokens=4)
    judge = Evaluator(settings, tiny_tokenizer)
    measured = judge.measure(model, [example, example], split="test")
    assert measured["length"] == 2 * len(judge.answers(model, [example])[0]) > 0
    assert "chrf" in measured
    assert "rouge1" not in measured
