"""Answers that are classes: a classifier decides between the first tokens of their words."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedloom.data.data_settings import DataSettings
from fedloom.data.encoding import Tokenizer
from fedloom.data.formats import Message
from fedloom.data.targets import posed
from fedloom.data.tokens import IGNORED, Example, Tokenised, tokenise

_ASKED = (Message("user", "?"),)
"""Stands for a prompt where only the answer's tokens are looked at."""


def class_tokens(settings: DataSettings, tokenizer: Tokenizer) -> dict[str, int]:
    """Return the first token of every word in `data.classes`, in their order; nothing where there are none.

    Raises:
        ValueError: where two words begin with the same token.
    """
    words = list(settings.classes.values())
    roomy = replace(settings, classes={}, max_length=4096)
    tokens: dict[str, int] = {}
    told = tokenise([posed(_ASKED, settings, word) for word in words], roomy, tokenizer)
    for word, (example, *_) in zip(words, told.examples, strict=True):
        token = int(example.labels[_answer(example)])
        other = next((known for known in tokens if tokens[known] == token), None)
        if other is not None:
            raise ValueError(
                f"data.classes: the words {other!r} and {word!r} begin with the same token of this model's"
                " tokenizer, which could not tell them apart; give one of them another word, such as a letter"
            )
        tokens[word] = token
    return tokens


def only_classes(tokenised: Tokenised, tokens: Mapping[str, int]) -> Tokenised:
    """Return the examples with the first token of each answer as their only target.

    Raises:
        ValueError: where a word begins otherwise after its prompt than by itself, or was cut away.
    """
    return replace(
        tokenised,
        examples=[tuple(_decided(one, tokens) for one in each) for each in tokenised.examples],
    )


def decide(logits: Tensor, targets: Tensor, classes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return (n, classes) logits of the classes alone and (n,) targets among them; all as they are without classes.

    Args:
        logits: (n, vocabulary) where a class is asked for.
        targets: (n,) tokens, IGNORED or one of `classes`.
        classes: the token of each class.
    """
    if not classes:
        return logits, targets
    tokens = torch.tensor(classes, device=logits.device)
    among = (targets[:, None] == tokens).int().argmax(1)
    return logits.index_select(1, tokens), torch.where(targets == IGNORED, targets, among)


def _decided(example: Example, tokens: Mapping[str, int]) -> Example:
    assert example.record is not None  # packing comes later
    at, word = _answer(example), example.record.answer
    if int(example.labels[at]) != tokens[word]:
        where = f"{example.record.place}: " if example.record.place else ""
        raise ValueError(
            f"{where}data.classes: the word {word!r} begins with another token after the prompt"
            f" {example.record.messages[0].content[:40]!r} than elsewhere; end the prompt with a line break"
        )
    labels = torch.full_like(example.labels, IGNORED)
    labels[at] = tokens[word]
    return replace(example, labels=labels)


def _answer(example: Example) -> int:
    """Return where the last answer begins."""
    learnt = (example.labels != IGNORED).tolist()
    return max(at for at in range(1, len(learnt)) if learnt[at] and not learnt[at - 1])
