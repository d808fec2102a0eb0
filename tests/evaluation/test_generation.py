"""Answers end where they are told to, and no row is written farther."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedloom.evaluation.generation import Generation, Sampling, cut
from fedloom.models.introspection import readout
from fedloom.models.prefix import LEAST, shared_beginning
from fedloom.models.probe import keeps_padding_out

PROMPTS = ("What is a river?", "The chair", "Oscar lives in Athens. Where?", "ice")


@pytest.mark.parametrize("alone", [False, True])
def test_a_text_that_ends_answers_saves_what_would_be_written_behind_it(
    alone: bool, tiny_llama: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    torch.manual_seed(3)
    model = tiny_llama(vocab=len(tiny_tokenizer)).eval()
    steps = list[int]()
    model.register_forward_pre_hook(lambda *_: steps.append(1))
    prompts = [
        torch.tensor(tiny_tokenizer(text)["input_ids"]) for text in PROMPTS[: 1 if alone else 4]
    ]
    with torch.no_grad():
        whole = Generation(tiny_tokenizer, 24, 4, strip=False).answers(model, prompts)
        taken = len(steps)
        # Of each answer a piece from its first third.
        stops = [text[len(text) // 4 : len(text) // 4 + 3] for text in whole]
        assert all(stops)
        steps.clear()
        found = Generation(tiny_tokenizer, 24, 4, stops=stops, strip=False).answers(model, prompts)
    assert found == [cut(text, stops) for text in whole]
    assert len(steps) < taken


def test_white_space_stays_where_it_has_a_meaning(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "\n    return 1\n"
    ids = torch.tensor([tiny_tokenizer(text)["input_ids"]])
    written = (ids, torch.tensor([2**62]))
    monkeypatch.setattr("fedloom.evaluation.generation.write_greedily", lambda *_, **__: written)
    model = tiny_llama(vocab=len(tiny_tokenizer))
    prompts = [torch.tensor(tiny_tokenizer("def f():")["input_ids"])]
    assert Generation(tiny_tokenizer, 24, 1, strip=False).answers(model, prompts) == [text]
    assert Generation(tiny_tokenizer, 24, 1).answers(model, prompts) == ["return 1"]
    # What is stripped ends nothing.
    stripped = Generation(tiny_tokenizer, 24, 1, stops=("\n",))
    assert stripped.answers(model, prompts) == ["return 1"]


@pytest.mark.parametrize("sampling", [None, Sampling(1.0, 5)])
def test_what_all_prompts_begin_with_is_read_once(
    sampling: Sampling | None, tiny_llama: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    torch.manual_seed(3)
    model = tiny_llama(vocab=len(tiny_tokenizer)).eval()
    # Both ask the model, the first time.
    assert readout(model)
    assert keeps_padding_out(model)
    read = list[int]()
    model.model.register_forward_pre_hook(
        lambda _module, _given, named: read.append(named["input_ids"].numel()), with_kwargs=True
    )
    worked = "One and one is two. Two and two is four. Where is the chair? "
    prompts = [torch.tensor(tiny_tokenizer(worked + text)["input_ids"]) for text in PROMPTS]
    shared = len(shared_beginning(prompts))
    assert shared >= LEAST
    spent, found = [], []
    for share in (False, True):
        read.clear()
        writing = Generation(tiny_tokenizer, 12, 2, sampling=sampling, share=share)
        found.append(writing.answers(model, prompts))
        spent.append(sum(read))
    assert found[0] == found[1]
    # It was read before every prompt, and is once for all of them.
    assert spent[0] - spent[1] == (len(prompts) - 1) * shared


def test_what_prompts_share_is_shorter_than_each_of_them() -> None:
    a, b = torch.tensor([5, 6, 7, 8]), torch.tensor([5, 6, 7])
    assert shared_beginning([a, b]).tolist() == [5, 6]
    assert shared_beginning([a, a]).tolist() == [5, 6, 7]
    assert shared_beginning([a, torch.tensor([6, 6, 7])]).tolist() == []
