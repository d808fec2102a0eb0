"""Answers that are classes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from fedloom import experiment
from fedloom.data.data_settings import DataSettings
from fedloom.data.federation import Federation, federate
from fedloom.data.formats import Message
from fedloom.data.preparation import question
from fedloom.data.readers import Row
from fedloom.data.tokens import IGNORED
from fedloom.evaluation.evaluation_settings import EvaluationSettings
from fedloom.objectives.classification import Classification
from fedloom.objectives.forward import among
from fedloom.objectives.objective import Objective
from fedloom.objectives.sft import SFT
from fedloom.recipe import RecipeError, build_recipe, load_recipe
from fedloom.recipe_text import to_yaml
from fedloom.recipe_yaml import read_yaml

USUAL = EvaluationSettings().named
CLASSES = {"sci.space": "space", "sci.med": "health", "rec.autos": "cars"}


@pytest.fixture
def mail(tmp_path: Path) -> Path:
    file = tmp_path / "mail.jsonl"
    names = list(CLASSES)
    rows = ({"text": f"letter {i}" * (1 + i % 3), "label_text": names[i % 3]} for i in range(60))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def letters(
    mail: Path, tokenizer: Any, classes: Mapping[str, str] = CLASSES, **settings: Any
) -> Federation:
    defaults: dict[str, Any] = {
        "source": str(mail),
        "columns": {"prompt": "text", "completion": "label_text"},
        "num_clients": 3,
        "max_length": 400,
    }
    return federate(DataSettings(**(defaults | settings)), tokenizer, Classification(classes))


@pytest.mark.parametrize("prompt", ["chat", "alpaca", "plain"])
def test_the_only_target_is_the_first_token_of_the_word(
    prompt: str, mail: Path, tiny_tokenizer: Any
) -> None:
    federation = letters(mail, tiny_tokenizer, prompt=prompt)
    tokens = Classification(CLASSES).tokens(DataSettings(prompt=prompt), tiny_tokenizer)
    assert list(tokens) == list(CLASSES.values())
    assert len(set(tokens.values())) == 3
    seen = set()
    for shard in federation.shards.values():
        for example in (*shard.train, *shard.validation, *shard.test):
            assert example.num_targets == 1
            assert example.record is not None
            at = int((example.labels != IGNORED).nonzero())
            assert at == example.prompt_length
            assert int(example.labels[at]) == tokens[example.record.answer]
            assert example.choices is not None
            assert example.choices.tolist() == list(tokens.values())
            seen.add(example.record.answer)
    assert seen == set(CLASSES.values())


@pytest.mark.parametrize("truncate", ["answer", "prompt"])
def test_of_several_turns_the_last_decides_or_the_example_is_dropped(
    truncate: str, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    """An earlier answer is no class: it is context, and nothing to compare with."""
    names = list(CLASSES)
    turns = [
        [
            {"role": "user", "content": "Which letter? " * (1 + 40 * (i % 2))},
            {"role": "assistant", "content": "Which one do you mean?"},
            {"role": "user", "content": f"letter {i}"},
            {"role": "assistant", "content": names[i % 3]},
        ]
        for i in range(30)
    ]
    file = tmp_path / "turns.jsonl"
    file.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in turns))
    settings: dict[str, Any] = {
        "source": str(file),
        "columns": {},
        "max_length": 100,
        "truncate": truncate,
    }
    federation = letters(file, tiny_tokenizer, **settings)
    tokens = Classification(CLASSES).tokens(DataSettings(), tiny_tokenizer)
    examples = [e for shard in federation.shards.values() for e in (*shard.train, *shard.test)]
    assert {example.num_targets for example in examples} == {1}
    for example in examples:
        assert example.record is not None
        at = int((example.labels != IGNORED).nonzero())
        assert int(example.labels[at]) == tokens[example.record.answer]
        assert at == example.prompt_length
    manifest = federation.manifest
    counts = (manifest.num_dropped, manifest.num_truncated)
    assert counts == ((15, 0) if truncate == "answer" else (0, 15))


def test_words_that_begin_alike_are_refused(mail: Path, tiny_tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"the words 'x1' and 'x2' begin with the same token"):
        letters(mail, tiny_tokenizer, classes=dict(zip(CLASSES, ("x1", "x2", "y"), strict=True)))


def test_an_answer_that_is_no_class_is_refused_with_its_line(
    mail: Path, tiny_tokenizer: Any
) -> None:
    with pytest.raises(
        ValueError, match=r"mail.jsonl.*'sci.med' is not among objective.classification.classes"
    ):
        letters(mail, tiny_tokenizer, classes={"sci.space": "space", "rec.autos": "cars"})


def test_a_choice_is_among_the_logits_of_the_choices_alone() -> None:
    logits = torch.tensor([[9.0, 1.0, 2.0, 0.0], [9.0, 1.0, 2.0, 0.0]])
    few, targets = among(logits, torch.tensor([2, 3]), torch.tensor([3, 2]))
    assert few.tolist() == [[0.0, 2.0], [0.0, 2.0]]
    assert targets.tolist() == [1, 0]
    whole = among(logits, torch.tensor([2, 1]), None)
    assert whole[0] is logits


def test_a_class_is_compared_as_the_cell_says_it() -> None:
    values = {"prompt": "a"}
    rows = [Row({**values, "completion": value}, "f.json", 1) for value in (True, False, "true")]
    found = Classification({"true": "A", "false": "B"}).records(rows, DataSettings())
    assert [record.answer for record in found.records] == ["A", "B", "A"]
    assert [record.messages[-1].content for record in found.records] == ["A", "B", "A"]


@pytest.mark.parametrize("classes", [CLASSES, {}])
def test_a_question_without_an_answer_asks_for_a_token_right_behind_its_prompt(
    classes: Mapping[str, str], tiny_tokenizer: Any
) -> None:
    objective: Objective = Classification(classes) if classes else SFT()
    settings = DataSettings(system="Decide.")
    record = question([Message("user", "letter 1")], settings, objective)
    ((example,),) = objective.examples([record], settings, tiny_tokenizer).examples
    assert int((example.labels != IGNORED).nonzero()[0]) == example.prompt_length
    assert example.num_targets == (1 if classes else 2)
    assert record.messages[0] == Message("system", "Decide.")


@pytest.mark.slow
@pytest.mark.parametrize(("kernels", "batched"), [("auto", "auto"), ("reference", "off")])
def test_a_classifier_learns_and_its_loss_is_over_the_classes(
    kernels: str, batched: str, tmp_path: Path
) -> None:
    """Two kinds of question, told apart: chance is one half, and the loss before training near log 2."""
    recipe = load_recipe(
        "fedadam",
        [
            "data.num_examples=240",
            "data.num_clients=4",
            "cohort=full",
            "data.where={task: [capital, plural], language: [en]}",
            "data.columns={completion: task, written: completion}",
            "data.partition=iid",
            "objective={classification: {classes: {capital: A, plural: B}}}",
            "local={lr: 0.005, steps: 6, batch_size: 8,"
            f" kernels: {kernels}, batched: '{batched}'}}",
            "run={rounds: 5, samples: 2}",
            "evaluation={every: 0}",
        ],
    )
    summary = experiment.run(recipe, tmp_path).summary
    assert summary["before"]["test/loss"] < 3
    assert summary["final"]["test/accuracy"] > 0.9 > summary["before"]["test/accuracy"]
    assert "test/exact_match" not in summary["final"]
    assert "test/token_accuracy" not in summary["final"]
    samples = json.loads((tmp_path / "samples.json").read_text())
    assert {sample["after"] for sample in samples} <= {"A", "B"}


@pytest.mark.parametrize(
    "override",
    ["local.objective=classification", "data.classes={capital: A, plural: B}"],
)
def test_keys_of_old_are_refused_with_the_new_place(override: str) -> None:
    with pytest.raises(
        RecipeError, match=r"is now .*`objective: \{classification: \{classes: \.\.\.\}\}`"
    ):
        load_recipe("fedadam", [override])


@pytest.mark.parametrize("classes", ["{}", "{a: A}", "{a: A, b: ''}"])
def test_fewer_than_two_classes_leave_nothing_to_decide(classes: str) -> None:
    with pytest.raises(RecipeError, match="must give at least two answers a word each"):
        load_recipe("fedadam", [f"objective.classification.classes={classes}"])


def test_classification_without_classes_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"^objective\.classification needs classes$"):
        load_recipe("fedadam", ["objective=classification"])


def test_an_objective_is_written_and_read_back() -> None:
    recipe = load_recipe("fedadam", ["objective.classification.classes={no: A, yes: 'on'}"])
    assert recipe.objective == Classification({"no": "A", "yes": "on"})
    assert build_recipe(read_yaml(to_yaml(recipe))) == recipe


def test_scores_of_written_answers_are_refused_where_answers_are_classes() -> None:
    tree = {"name": "r", "objective": {"classification": {"classes": CLASSES}}}
    usual = {**tree, "evaluation": {"metrics": [{"own": {"better": "lower"}}, *USUAL]}}
    assert build_recipe(usual).evaluation.named == USUAL
    with pytest.raises(RecipeError, match=r"evaluation\.metrics chrf score written answers, which"):
        build_recipe({**tree, "evaluation": {"metrics": ["chrf"]}})


def test_words_that_yaml_reads_as_truth_values_stay_words() -> None:
    text = "name: r\nobjective: {classification: {classes: {bad: no, good: yes}}}"
    made = build_recipe(read_yaml(text)).objective
    assert made == Classification({"bad": "no", "good": "yes"})
