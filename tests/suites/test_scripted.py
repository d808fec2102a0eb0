"""Scripted models: what is always right has 100 %, what is always wrong 0 %, and another adapter answers otherwise."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fedloom.models.build import Base, ModelSettings, load_base
from fedloom.results import suites
from fedloom.results.suites import Asked, run_suite
from fedloom.spaces.lora import LoRA
from fedloom.suites.likelihood import Continuation, Likelihood, likelihoods

SUMS: list[dict[str, Any]] = [
    {"question": f"{x} and 1?", "answer": f"One more. #### {x + 1}"} for x in range(10)
]
QUESTIONS: list[dict[str, Any]] = [
    {"question": f"{x}?", "subject": "sums", "choices": ["a", "b", "c", "d"], "answer": x % 4}
    for x in range(10)
]
PROGRAMS: list[dict[str, Any]] = [
    {
        "task_id": str(x),
        "prompt": f"def add{x}(n):\n",
        "entry_point": f"add{x}",
        "test": f"def check(add):\n    assert add(1) == {1 + x}",
    }
    for x in range(5)
]
ITEMS: dict[str, list[dict[str, Any]]] = {"gsm8k": SUMS, "mmlu": QUESTIONS, "humaneval": PROGRAMS}


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("suite", ITEMS)
def test_a_scripted_model_has_all_or_nothing(
    suite: str,
    right: bool,
    tiny_llama: Callable[..., Any],
    tiny_tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    answering: Callable[[Mapping[str, str]], None],
) -> None:
    file = tmp_path / "items.jsonl"
    file.write_text("\n".join(map(json.dumps, ITEMS[suite])))
    written = {
        **{
            f"{x} and 1?\nAnswer:": f" #### {x + 1 + (not right)}\nQuestion: 7"
            for x in range(5, 10)
        },
        **{
            f"def add{x}(n):\n": f"    m = n\n    return m + {x + (not right)}\n\ndef other():\n"
            for x in range(5)
        },
    }
    gold = [row["answer"] for row in QUESTIONS[5:]]

    def judge(_model: Any, _tokenizer: Any, asked: Sequence[Continuation], **_: Any) -> Any:
        letters = ["ABCD"[(answer + (not right)) % 4] for answer in gold for _ in range(4)]
        return [
            Likelihood(-1.0 if each.text == f" {letter}" else -9.0, True, 1)
            for each, letter in zip(asked, letters, strict=True)
        ]

    monkeypatch.setattr(suites, "likelihoods", judge)
    answering(written)
    model = tiny_llama(vocab=len(tiny_tokenizer))
    asked = Asked(suite, file, allow_code=suite == "humaneval")
    found = run_suite(model, tiny_tokenizer, "scripted", asked)
    assert found.num == 5
    assert found.score == float(right)
    assert found.values == [float(right)] * 5


def test_two_adapters_find_different_answers_likely(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    base = Base(tiny_llama(vocab=len(tiny_tokenizer)).requires_grad_(False), None, "random")
    space = LoRA().make_space(base, seed=1)
    draw = torch.Generator().manual_seed(0)
    asked = [Continuation("Is it a cat?", text) for text in (" yes", " no")]

    def of(params: Any) -> list[float]:
        space.load(params)
        found = likelihoods(space.model, tiny_tokenizer, asked, max_length=64, batch_size=2)
        return [each.logprob for each in found]

    start = space.start()
    other = {n: t + torch.randn(t.shape, generator=draw) for n, t in start.items()}
    first = of(start)
    assert of(other) != first
    assert of(start) == first


@pytest.mark.slow
@pytest.mark.realtext
def test_a_model_that_knows_nothing_is_right_by_chance(real_text: Path) -> None:
    """MMLU without worked examples: a quarter lies within the interval."""
    base = load_base(ModelSettings())
    asked = Asked("mmlu", real_text / "mmlu" / "test_1444.jsonl", limit=150, shots=0)
    found = run_suite(base.model, base.tokenizer, "untrained", asked)
    assert found.num == 150
    assert found.low < 0.25 < found.high
