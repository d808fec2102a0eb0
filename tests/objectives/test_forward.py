"""One way to likelihoods, held against logits of every token."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedloom.data.tokens import IGNORED, Example
from fedloom.evaluation.scoring import evaluating, score
from fedloom.models.introspection import readout
from fedloom.objectives import forward as forward_module
from fedloom.objectives import head
from fedloom.objectives.forward import NOTHING, Forward
from fedloom.objectives.objective import Score
from fedloom.objectives.sft import SFT

Maker = Callable[..., Any]
VOCAB = 64


def row(seed: int, length: int, prompt: int) -> Example:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (length,), generator=draw)
    labels = ids.clone()
    labels[:prompt] = IGNORED
    return Example(ids, labels, prompt)


def packed(*rows: Example) -> Example:
    return Example(
        torch.cat([one.ids for one in rows]),
        torch.cat([one.labels for one in rows]),
        0,
        positions=torch.cat([torch.arange(len(one.ids)) for one in rows]),
    )


def chosen(seed: int, length: int, choices: Tensor) -> Example:
    """Return a row whose last token alone is asked for, and is one of the choices."""
    ids = row(seed, length, 1).ids
    ids[-1] = choices[seed % len(choices)]
    labels = torch.full_like(ids, IGNORED)
    labels[-1] = ids[-1]
    return Example(ids, labels, length - 1, choices=choices)


CHOICES = torch.tensor([50, 7, 33])
ROWS = {
    "rows": [row(i, 5 + 3 * i, 1 + i) for i in range(7)],
    "packed rows": [packed(row(1, 6, 2), row(2, 9, 3)), row(3, 4, 1), packed(row(4, 3, 1))],
    "choices": [chosen(i, 4 + i, CHOICES) for i in range(6)],
    "long answers": [row(i, 150, 1) for i in range(2)],
    "rows that ask for nothing": [row(1, 8, 8), row(2, 8, 3)],
    "nothing asked for at all": [row(1, 8, 8)],
}


def plain(model: nn.Module, example: Example) -> Score:
    """Return a row's score from the logits of all its tokens, a token at a time."""
    inputs = {"input_ids": example.ids[None]}
    if example.positions is not None:
        inputs["position_ids"] = example.positions[None]
    logits = model(**inputs, use_cache=False).logits[0].float()
    loss, correct, count, choice = 0.0, 0, 0, NOTHING
    for at in range(1, len(example.ids)):
        label = int(example.labels[at])
        if label == IGNORED:
            continue
        among, target = logits[at - 1], label
        if example.choices is not None:
            among, target = among[example.choices], example.choices.tolist().index(label)
        loss += float(functional.cross_entropy(among[None], torch.tensor([target])))
        choice = NOTHING if among.isnan().any() else int(among.argmax())
        correct += choice == target
        count += 1
    return Score(loss, correct, count, choice)


def llama(tiny_llama: Maker) -> Any:
    return tiny_llama()


def broken(tiny_llama: Maker) -> Any:
    """A model one of whose tokens has no numbers: among choices that leave it out, the others have."""
    model = tiny_llama()
    nn.init.constant_(model.lm_head.weight[20], torch.nan)
    return model


def capped(tiny_llama: Maker) -> Any:
    """A model whose logits are not what its head makes of hidden states."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=VOCAB,
        final_logit_softcapping=0.5,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Gemma2ForCausalLM(config).eval()


@pytest.mark.parametrize("make", [llama, broken, capped])
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_scores_are_those_of_logits_of_every_token(
    make: Maker, name: str, batch_size: int, tiny_llama: Maker
) -> None:
    model = make(tiny_llama)
    with evaluating(model):
        wanted = [plain(model, example) for example in ROWS[name]]
        found = score(model, ROWS[name], batch_size, SFT())
    for one, other in zip(found, wanted, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-6, abs=1e-6, nan_ok=True)
        assert (one.correct, one.num_tokens, one.choice) == (
            other.correct,
            other.num_tokens,
            other.choice,
        )


def seen_by(module: nn.Module) -> list[int]:
    """Return a list that gets the number of vectors of every call of a module."""
    counts: list[int] = []
    module.register_forward_hook(
        lambda _, given, made: counts.append(given[0].numel() // given[0].shape[-1])
    )
    return counts


def test_logits_are_made_of_asked_tokens_alone_and_of_few_at_a_time(tiny_llama: Maker) -> None:
    model, examples = tiny_llama(), ROWS["long answers"]
    assert readout(model)
    counts = seen_by(model.lm_head)
    score(model, examples, 32, SFT())
    assert sum(counts) == sum(example.num_targets for example in examples)
    assert max(counts) == 2 * head.CHUNK < sum(counts)
    counts.clear()
    score(model, ROWS["choices"], 32, SFT())
    assert counts == [len(ROWS["choices"])]


def test_a_model_that_cannot_be_split_is_asked_for_fewer_rows_where_its_logits_are_many(
    tiny_llama: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, examples = capped(tiny_llama), ROWS["rows"]
    assert readout(model) is None
    counts = seen_by(model.lm_head)
    whole = score(model, examples, 32, SFT())
    assert len(counts) == 1
    longest = max(len(example.ids) for example in examples)
    monkeypatch.setattr(forward_module, "LOGITS_BYTES", 4 * VOCAB * longest * 2)
    parts = score(model, examples, 32, SFT())
    assert max(counts[1:]) <= 2 * longest
    assert [one.loss for one in parts] == pytest.approx([one.loss for one in whole], rel=1e-6)
    monkeypatch.setattr(forward_module, "LOGITS_BYTES", 1)
    assert Forward.of(model).most_rows(longest) == 1


def test_on_a_cpu_rows_go_through_as_many_at_once_as_its_caches_hold(tiny_llama: Maker) -> None:
    model = tiny_llama()
    counts = seen_by(model.model.layers[0].mlp)
    rows = [row(seed, 100, 90) for seed in range(25)]
    whole = score(model, rows, 32, SFT())
    assert counts[-3:] == [1000, 1000, 500]
    assert [one.loss for one in whole] == pytest.approx(
        [score(model, [one], 32, SFT())[0].loss for one in rows], rel=1e-6
    )


def test_training_and_evaluation_agree_on_the_loss(tiny_llama: Maker) -> None:
    model, examples = tiny_llama(), ROWS["rows"]
    objective, like = SFT(), torch.empty(0)
    count = objective.count(examples)
    (loss,) = objective.losses(
        Forward.of(model), objective.batch([examples], [count], like, pack=True)
    )
    scores = score(model, examples, 4, objective)
    metrics = objective.metrics(scores)
    assert float(loss.detach()) == pytest.approx(metrics["loss"], rel=1e-6)


class Counted:
    """A product that counts its calls."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.calls = weight, [0, 0]

    def forward(self, x: Tensor) -> Tensor:
        self.calls[0] += 1
        return functional.linear(x, self.weight)

    def backward(self, gradient: Tensor) -> Tensor:
        self.calls[1] += 1
        return gradient @ self.weight


def test_a_loss_without_a_gradient_takes_no_product_backwards() -> None:
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(9, 5, generator=draw), torch.randn(11, 5, generator=draw)
    product, targets = Counted(weight), torch.arange(9)
    with torch.no_grad():
        plain = head.fused_cross_entropy(x, product, None, targets)
    assert product.calls == [1, 0]
    learning = head.fused_cross_entropy(x.requires_grad_(), product, None, targets)
    assert product.calls == [2, 1]
    assert torch.equal(plain, learning.detach())


def test_a_model_is_asked_once_whether_it_can_be_split(tiny_llama: Maker) -> None:
    model = tiny_llama()
    counts = seen_by(model.lm_head)
    first = readout(model)
    assert first is not None
    asked = len(counts)
    assert readout(model) is not None
    assert len(counts) == asked
    model.lm_head = nn.Linear(32, VOCAB, bias=False)
    second = readout(model)
    assert second is not None
    assert second.head is model.lm_head is not first.head


def test_what_is_no_model_of_two_parts_is_asked_as_a_whole() -> None:
    class Echo(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def get_input_embeddings(self) -> nn.Module:
            return nn.Embedding(VOCAB, 1)

        def forward(self, *, input_ids: Tensor, use_cache: bool) -> Any:
            logits = functional.one_hot(input_ids.roll(-1, 1), VOCAB).float() * 100
            return type("Output", (), {"logits": logits})()

    (found,) = score(Echo(), [row(1, 9, 3)], 4, SFT())
    assert (found.correct, found.num_tokens) == (6, 6)
    assert found.loss == pytest.approx(0.0, abs=1e-6)


def test_choices_go_with_a_packed_row() -> None:
    from fedloom.data.tokens import pack

    (joined,) = pack([chosen(i, 4, CHOICES) for i in range(3)], 20)
    assert joined.choices is CHOICES
    plain: Sequence[Example] = pack([replace(row(1, 5, 1)), row(2, 5, 1)], 20)
    assert plain[0].choices is None
