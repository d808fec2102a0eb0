"""Answers that are classes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fedloom import experiment
from fedloom.data.classes import decide
from fedloom.data.data_settings import DataSettings
from fedloom.data.federation import Federation, federate
from fedloom.data.tokens import IGNORED
from fedloom.recipe import RecipeError, load_recipe

CLASSES = {"sci.space": "space", "sci.med": "health", "rec.autos": "cars"}


@pytest.fixture
def mail(tmp_path: Path) -> Path:
    file = tmp_path / "mail.jsonl"
    names = list(CLASSES)
    rows = ({"text": f"letter {i}" * (1 + i % 3), "label_text": names[i % 3]} for i in range(60))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def letters(mail: Path, tokenizer: Any, **settings: Any) -> Federation:
    defaults: dict[str, Any] = {
        "source": str(mail),
        "columns": {"prompt": "text", "completion": "label_text"},
        "classes": CLASSES,
        "num_clients": 3,
        "max_length": 160,
    }
    return federate(DataSettings(**(defaults | settings)), tokenizer)


@pytest.mark.parametrize("prompt", ["chat", "alpaca", "plain"])
def test_the_only_target_is_the_first_token_of_the_word(
    prompt: str, mail: Path, byte_level: Any
) -> None:
    federation = letters(mail, byte_level, prompt=prompt)
    assert list(federation.classes) == list(CLASSES.values())
    assert len(set(federation.classes.values())) == 3
    seen = set()
    for shard in federation.shards.values():
        for example in (*shard.train, *shard.validation, *shard.test):
            assert example.num_targets == 1
            assert example.record is not None
            at = int((example.labels != IGNORED).nonzero())
            assert at == example.prompt_length
            assert int(example.labels[at]) == federation.classes[example.record.answer]
            seen.add(example.record.answer)
    assert seen == set(CLASSES.values())


@pytest.mark.parametrize("truncate", ["answer", "prompt"])
def test_of_several_turns_the_last_decides_or_the_example_is_dropped(
    truncate: str, tmp_path: Path, byte_level: Any
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
    settings = {"source": str(file), "columns": {}, "max_length": 100, "truncate": truncate}
    federation = letters(file, byte_level, **settings)
    examples = [e for shard in federation.shards.values() for e in (*shard.train, *shard.test)]
    assert {example.num_targets for example in examples} == {1}
    for example in examples:
        assert example.record is not None
        at = int((example.labels != IGNORED).nonzero())
        assert int(example.labels[at]) == federation.classes[example.record.answer]
        assert at == example.prompt_length
    manifest = federation.manifest
    counts = (manifest.num_dropped, manifest.num_truncated)
    assert counts == ((15, 0) if truncate == "answer" else (0, 15))


def test_words_that_begin_alike_are_refused(mail: Path, byte_level: Any) -> None:
    with pytest.raises(ValueError, match=r"the words 'x1' and 'x2' begin with the same token"):
        letters(mail, byte_level, classes=dict(zip(CLASSES, ("x1", "x2", "y"), strict=True)))


def test_an_answer_that_is_no_class_is_refused_with_its_line(mail: Path, byte_level: Any) -> None:
    with pytest.raises(ValueError, match=r"mail.jsonl.*'sci.med' is not among data.classes"):
        letters(mail, byte_level, classes={"sci.space": "space", "rec.autos": "cars"})


def test_deciding_is_cross_entropy_over_the_classes_alone() -> None:
    logits = torch.tensor([[9.0, 1.0, 2.0, 0.0], [9.0, 1.0, 2.0, 0.0]])
    among, targets = decide(logits, torch.tensor([2, IGNORED]), (3, 2))
    assert among.tolist() == [[0.0, 2.0], [0.0, 2.0]]
    assert targets.tolist() == [1, IGNORED]
    whole = decide(logits, torch.tensor([2, 1]), ())
    assert whole[0] is logits


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
            "data.classes={capital: A, plural: B}",
            "local={objective: classification, lr: 0.005, steps: 6, batch_size: 8,"
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
def test_classes_and_the_objective_go_together(override: str) -> None:
    with pytest.raises(RecipeError, match="go together"):
        load_recipe("fedadam", [override])
