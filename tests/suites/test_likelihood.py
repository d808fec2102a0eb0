"""Likelihoods of continuations: against a plain forward, with and without a shared beginning."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedloom.suites.likelihood import Continuation, likelihoods

SHOTS = "Question: how many legs has a cat?\nAnswer: four\n\n"


def plain(model: Any, tokenizer: Any, context: str, text: str) -> tuple[float, bool]:
    """Return log-likelihood and greedy of one continuation, row by row, as the definition has it."""
    begun = tokenizer(context.rstrip(), add_special_tokens=False)["input_ids"]
    spaces = context[len(context.rstrip()) :]
    ids = tokenizer(context.rstrip() + spaces + text, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    asked = range(len(begun), len(ids))
    return (
        sum(float(logits[at - 1, ids[at]]) for at in asked),
        all(int(logits[at - 1].argmax()) == ids[at] for at in asked),
    )


@pytest.fixture(scope="module")
def asked() -> list[Continuation]:
    """Return options of questions behind worked examples, some of one token, and two that share nothing."""
    questions = [
        f"{SHOTS}Question: is {x} a {y}?\nAnswer:" for x, y in (("a cat", "pet"), ("ice", "drink"))
    ]
    found = [Continuation(q, text) for q in questions for text in (" yes", " no", " maybe so")]
    found += [Continuation(q, letter) for q in questions for letter in "AB"]
    return [*found, Continuation("Where ", "here"), Continuation("Alone", "!")]


@pytest.mark.parametrize("share", [True, False])
def test_they_are_those_of_a_plain_forward(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any, asked: list[Continuation], share: bool
) -> None:
    model = tiny_llama(vocab=len(tiny_tokenizer)).train()
    found = likelihoods(model, tiny_tokenizer, asked, max_length=256, batch_size=3, share=share)
    assert model.training
    for each, own in zip(asked, found, strict=True):
        logprob, greedy = plain(model.eval(), tiny_tokenizer, each.context, each.text)
        assert own.logprob == pytest.approx(logprob, abs=1e-4)
        assert own.greedy == greedy
    assert found[0].num_tokens == len(" yes")


def test_a_shared_beginning_is_read_once(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any, asked: list[Continuation]
) -> None:
    model = tiny_llama(vocab=len(tiny_tokenizer))
    read = list[int]()
    model.model.register_forward_pre_hook(
        lambda _module, _args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    spent = []
    for share in (True, False):
        read.clear()
        likelihoods(model, tiny_tokenizer, asked[:6], max_length=256, batch_size=8, share=share)
        spent.append(sum(read))
    assert spent[0] < spent[1] / 2


def test_long_contexts_lose_their_beginning(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    model = tiny_llama(vocab=len(tiny_tokenizer))
    context = "x" * 40 + "the end"
    (cut,) = likelihoods(model, tiny_tokenizer, [Continuation(context, "!")], max_length=8)
    (short,) = likelihoods(model, tiny_tokenizer, [Continuation("the end", "!")], max_length=64)
    assert cut.logprob == pytest.approx(short.logprob, abs=1e-5)
    with pytest.raises(ValueError, match="longer than the 8 that the model reads"):
        likelihoods(model, tiny_tokenizer, [Continuation("a", "long answer")], max_length=8)
    with pytest.raises(ValueError, match="needs at least one token"):
        likelihoods(model, tiny_tokenizer, [Continuation("a", "")], max_length=8)


def test_nothing_is_drawn_and_no_weight_moves(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any, asked: list[Continuation]
) -> None:
    model = tiny_llama(vocab=len(tiny_tokenizer))
    before = torch.get_rng_state()
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    likelihoods(model, tiny_tokenizer, asked, max_length=256)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(weights[name], t) for name, t in model.state_dict().items())
