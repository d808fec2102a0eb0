import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig

from fedloom.data.formats import Message, Record
from fedloom.data.tokens import IGNORED, Example
from fedloom.evaluation.evaluation_settings import EvaluationSettings
from fedloom.evaluation.measure import Evaluator, combine
from fedloom.evaluation.text_metrics import chrf

Maker = Callable[..., Any]


def example(tokenizer: Any, prompt: str, answer: str) -> Example:
    start = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([*start, *tokenizer(answer, add_special_tokens=False)["input_ids"], 2])
    labels = ids.clone()
    labels[: len(start)] = IGNORED
    record = Record((Message("user", prompt), Message("assistant", answer)), {}, answer)
    return Example(ids, labels, len(start), record, None)


@pytest.fixture
def examples(tiny_tokenizer: Any) -> list[Example]:
    pairs = [
        ("a", "one"),
        ("what is it?", "two words"),
        ("abcdefgh" * 3, "x"),
        ("qq", "a longer one"),
    ]
    return [example(tiny_tokenizer, *pair) for pair in pairs]


@pytest.fixture
def model(tiny_llama: Maker, tiny_tokenizer: Any) -> Any:
    return tiny_llama(vocab=len(tiny_tokenizer))


def evaluator(tokenizer: Any, **settings: Any) -> Evaluator:
    defaults: dict[str, Any] = {"max_new_tokens": 6, "batch_size": 3}
    return Evaluator(EvaluationSettings(**(defaults | settings)), tokenizer)


def test_loss_and_perplexity_weigh_by_token_and_equal_a_loop_by_hand(
    model: Any, examples: list[Example], tiny_tokenizer: Any
) -> None:
    total, hits, count = 0.0, 0, 0
    for each in examples:
        with torch.no_grad():
            log_probs = model(input_ids=each.ids[None]).logits[0].double().log_softmax(-1)
        for at in range(1, len(each.ids)):
            if each.labels[at] != IGNORED:
                total -= float(log_probs[at - 1, each.ids[at]])
                hits += int(log_probs[at - 1].argmax() == each.ids[at])
                count += 1
    measured = evaluator(tiny_tokenizer).measure(model, examples, split="validation")
    assert measured["loss"] == pytest.approx(total / count, rel=1e-6)
    assert measured["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-6)
    assert measured["token_accuracy"] == hits / count
    assert (measured["num_tokens"], measured["num_examples"]) == (count, len(examples))
    assert "exact_match" not in measured


def test_two_evaluations_agree_with_dropout_in_the_model_and_leave_it_in_training(
    model: Any, examples: list[Example], tiny_tokenizer: Any
) -> None:
    """The reference code never leaves training mode."""
    model.config.attention_dropout = 0.5
    model.model.layers[0].mlp = nn.Sequential(model.model.layers[0].mlp, nn.Dropout(0.5))
    model.train()
    model.model.norm.eval()
    modes = [module.training for module in model.modules()]
    runs = [evaluator(tiny_tokenizer).measure(model, examples, split="test") for _ in range(2)]
    assert runs[0] == runs[1]
    assert [module.training for module in model.modules()] == modes


def test_a_failing_model_is_put_back_into_training(
    model: Any, examples: list[Example], tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.train()
    monkeypatch.setattr(model, "forward", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluator(tiny_tokenizer).measure(model, examples, split="test")
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_answers_in_a_left_padded_batch_equal_a_greedy_loop_without_cache(
    family: str, model: Any, examples: list[Example], tiny_tokenizer: Any
) -> None:
    if family == "gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=len(tiny_tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=64
        )
        config.bos_token_id, config.eos_token_id = 1, 2
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = GPT2LMHeadModel(config).eval()
    wanted = []
    for each in examples:
        ids = each.ids[: each.prompt_length]
        for _ in range(6):
            with torch.no_grad():
                token = model(input_ids=ids[None]).logits[0, -1].argmax()
            if token == 2:
                break
            ids = torch.cat([ids, token[None]])
        text = tiny_tokenizer.decode(ids[each.prompt_length :].tolist(), skip_special_tokens=True)
        wanted.append(text.strip())
    assert evaluator(tiny_tokenizer).answers(model, examples) == wanted


def test_generation_uses_the_cache_under_gradient_checkpointing_and_keeps_the_settings(
    model: Any, examples: list[Example], tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fedmllm 1.6 q: gradient checkpointing in training mode switches the cache off."""
    model.train()
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
    model.config.use_cache = False
    lengths: list[int] = []
    forward = model.forward

    def spy(*args: Any, **kwargs: Any) -> Any:
        lengths.append(kwargs["input_ids"].shape[1])
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", spy)
    evaluator(tiny_tokenizer).answers(model, examples[:1])
    assert lengths[0] == examples[0].prompt_length
    assert len(lengths) > 1
    assert set(lengths[1:]) == {1}
    assert model.config.use_cache is False
    assert model.training


def test_generation_starts_from_exactly_the_prompt_of_training(
    model: Any, examples: list[Example], tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fedmllm 1.6 r: a trailing space made the reference code's prompts another tokenisation."""
    seen: list[list[int]] = []

    def generate(*, input_ids: Any, attention_mask: Any, **settings: Any) -> Any:
        seen.extend(
            row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)
        )
        assert attention_mask[:, -1].all()
        assert settings["generation_config"].use_cache
        assert not settings["generation_config"].do_sample
        return input_ids

    monkeypatch.setattr(model, "generate", generate)
    evaluator(tiny_tokenizer).answers(model, examples)
    prompts = [each.ids[: each.prompt_length].tolist() for each in examples]
    assert sorted(seen) == sorted(prompts)


def test_answers_stop_at_the_models_own_end_tokens_too(
    model: Any, examples: list[Example], tiny_tokenizer: Any
) -> None:
    full = evaluator(tiny_tokenizer).answers(model, examples[:1])[0]
    assert len(full) > 1
    model.generation_config.eos_token_id = [2, tiny_tokenizer.convert_tokens_to_ids(full[-1])]
    stopped = evaluator(tiny_tokenizer).answers(model, examples[:1])[0]
    assert full.startswith(stopped)
    assert full[-1] not in stopped


class Parrot(nn.Module):
    """Answers every prompt with the next of its texts, and counts what it is asked."""

    def __init__(self, texts: list[str], tokenizer: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.texts, self.tokenizer = texts, tokenizer
        self.rows: list[int] = []
        self.config = PretrainedConfig()
        self.device, self.get_input_embeddings = torch.device("cpu"), lambda: nn.Embedding(103, 1)
        self.generation_config = type("Generation", (), {"eos_token_id": None})()

    def forward(self, *, input_ids: Any, attention_mask: Any = None, **_: Any) -> Any:
        if attention_mask is None:  # else it is asked whether it reads its padding
            self.rows.append(len(input_ids))
        logits = nn.functional.one_hot(input_ids.roll(-1, 1), 103).float() * 100
        return type("Output", (), {"logits": logits})()

    def generate(self, *, input_ids: Any, **_: Any) -> Any:
        ids = self.tokenizer(self.texts[: len(input_ids)], padding=True)["input_ids"]
        self.texts = self.texts[len(input_ids) :]
        return torch.cat([input_ids, torch.tensor(ids)], 1)


def test_a_scripted_model_gets_the_score_it_deserves(tiny_tokenizer: Any) -> None:
    asked = [example(tiny_tokenizer, "?" * length, "It is #### 12") for length in (4, 3, 2, 1)]
    texts = ["It is #### 12", "12.0", "so 13", "#### 12 or 13"]
    measured = evaluator(tiny_tokenizer, extract="number").measure(
        Parrot(texts, tiny_tokenizer), asked, split="test"
    )
    assert measured["exact_match"] == 0.75
    assert measured["token_accuracy"] == 1.0
    # F1 of 3/3, 1 of 1 and 3 words (12.0 is two words), none, and one of three.
    assert measured["rouge1"] == pytest.approx((1 + 2 / 5 + 0 + 1 / 3) / 4)
    assert measured["rougeL"] == measured["rouge1"]
    assert measured["chrf"] == pytest.approx(sum(chrf("It is #### 12", text) for text in texts) / 4)
    assert "rouge_l_paper" not in measured


def test_the_papers_rouge_is_measured_where_it_is_asked_for(tiny_tokenizer: Any) -> None:
    """Beside the usual one."""
    asked = [example(tiny_tokenizer, "?" * length, "yes it is") for length in (2, 1)]
    measured = evaluator(tiny_tokenizer, metrics=["rougeL", "rouge_l_paper"]).measure(
        Parrot(["yes it is", "Yes it is"], tiny_tokenizer), asked, split="test"
    )
    assert measured["rougeL"] == 1
    assert measured["rouge_l_paper"] == pytest.approx((1 + 2 / 3) / 2)
    total = combine([measured, {**measured, "num_examples": 6.0, "rouge_l_paper": 0.0}])
    assert total["rouge_l_paper"] == pytest.approx(measured["rouge_l_paper"] / 4)


def test_equal_examples_are_evaluated_once_and_counted_as_often_as_they_come(
    examples: list[Example], tiny_tokenizer: Any
) -> None:
    parrot = Parrot(["one"] * 9, tiny_tokenizer)
    groups = [examples[:2], [*examples[:2], examples[0]]]
    each = evaluator(tiny_tokenizer, batch_size=8).measure_each(parrot, groups, split="test")
    assert parrot.rows == [2]
    assert len(parrot.texts) == 9 - 2
    assert [metrics["num_examples"] for metrics in each] == [2, 3]
    assert [metrics["exact_match"] for metrics in each] == [1 / 2, 2 / 3]


def test_clients_measured_together_score_as_alone(
    model: Any, examples: list[Example], tiny_tokenizer: Any
) -> None:
    judge = evaluator(tiny_tokenizer)
    together = judge.measure_each(model, [examples[:1], examples[1:]], split="test")
    for group, metrics in zip([examples[:1], examples[1:]], together, strict=True):
        assert judge.measure(model, group, split="test") == pytest.approx(dict(metrics), rel=1e-6)


def test_combined_metrics_are_those_of_all_examples_together(
    model: Any, examples: list[Example], tiny_tokenizer: Any
) -> None:
    judge = evaluator(tiny_tokenizer)
    apart = judge.measure_each(model, [examples[:1], examples[1:3], examples[3:]], split="test")
    whole = judge.measure(model, examples, split="test")
    assert combine(apart) == pytest.approx(dict(whole), rel=1e-6)


def test_combining_weighs_loss_by_token_and_scores_by_example() -> None:
    few = {"loss": 1.0, "num_tokens": 10.0, "num_examples": 4.0, "exact_match": 1.0}
    many = {"loss": 2.0, "num_tokens": 30.0, "num_examples": 1.0}
    assert combine([few, many]) == {
        "loss": 1.75,
        "perplexity": math.exp(1.75),
        "num_tokens": 40.0,
        "num_examples": 5.0,
        "exact_match": 1.0,
    }


def test_packed_rows_are_scored_as_their_parts(
    model: Any, examples: list[Example], tiny_tokenizer: Any
) -> None:
    first, second = examples[1], examples[3]
    labels = torch.cat([first.labels, second.labels])
    positions = torch.cat([torch.arange(len(first.ids)), torch.arange(len(second.ids))])
    packed = Example(torch.cat([first.ids, second.ids]), labels, 0, None, positions)
    judge = evaluator(tiny_tokenizer)
    rows = judge.measure(model, [packed, examples[0]], split="validation")
    apart = judge.measure(model, [first, second, examples[0]], split="validation")
    assert rows["loss"] == pytest.approx(apart["loss"], rel=1e-5)
    with pytest.raises(
        ValueError, match=r"packed rows have no prompt to answer: set evaluation\.generate to"
    ):
        judge.measure(model, [packed], split="test")


def test_examples_are_drawn_over_the_whole_split_when_few_are_asked_for(
    model: Any, tiny_tokenizer: Any
) -> None:
    split = [example(tiny_tokenizer, f"q {at}", "one") for at in range(40)]
    judge = evaluator(tiny_tokenizer, max_examples=8)
    assert judge.measure(model, split, split="validation")["num_examples"] == 8
    drawn = judge.drawn(split)
    places = [next(at for at, one in enumerate(split) if one is each) for each in drawn]
    assert places == sorted(places)
    assert len(set(places)) == 8
    assert places != list(range(8))
    # The same in whatever order the split comes, others with another seed, all of them where there are no more.
    assert {id(one) for one in judge.drawn(split[::-1])} == {id(one) for one in drawn}
    assert [*replace(judge, seed=1).drawn(split)] != [*drawn]
    assert judge.drawn(split[:8]) == split[:8]


def test_the_test_split_is_not_generated_when_generation_is_off(
    model: Any, examples: list[Example], tiny_tokenizer: Any
) -> None:
    judge = evaluator(tiny_tokenizer, generate=False)
    assert "rouge1" not in judge.measure(model, examples, split="test")


def test_nothing_to_measure_is_said_so(
    model: Any, examples: list[Example], tiny_tokenizer: Any
) -> None:
    judge = evaluator(tiny_tokenizer)
    with pytest.raises(ValueError, match="the test split of a client to be measured holds no ex"):
        judge.measure(model, [], split="test")
    with pytest.raises(ValueError, match="no metrics to combine: no client was measured"):
        combine([])
    nothing = torch.full_like(examples[0].labels, IGNORED)
    silent = Example(examples[0].ids, nothing, 1, None, None)
    with pytest.raises(ValueError, match="validation split of a client has no target tokens in 1 "):
        judge.measure(model, [silent], split="validation")
    assert judge.answers(model, []) == []


def test_answers_that_do_not_fit_the_model_are_refused(
    model: Any, examples: list[Example], tiny_tokenizer: Any
) -> None:
    judge = evaluator(tiny_tokenizer, max_new_tokens=250)
    with pytest.raises(
        ValueError,
        match=r"evaluation\.max_new_tokens must be at most 232 for prompts of 24 tokens in a model "
        r"of 256 positions, got 250",
    ):
        judge.answers(model, examples)


def test_a_huge_or_broken_loss_has_a_perplexity_all_the_same() -> None:
    counts = {"num_tokens": 1.0, "num_examples": 1.0}
    assert combine([{"loss": 1e4, **counts}])["perplexity"] == math.inf
    assert math.isnan(combine([{"loss": math.nan, **counts}])["perplexity"])


def test_the_loss_of_a_mixture_is_that_of_the_sum_of_likelihoods(
    model: Any, examples: list[Example], tiny_tokenizer: Any
) -> None:
    one = evaluator(tiny_tokenizer)
    own = one.losses(model, examples)
    other = [loss * (0.5 if at % 2 else 1.5) for at, loss in enumerate(own)]
    alone = one.measure(model, examples, split="test")
    (mixed,) = one.measure_each(model, [examples], split="test", share=0.25, beside=[(0.75, other)])
    wanted = -sum(
        math.log(0.25 * math.exp(-a) + 0.75 * math.exp(-b)) for a, b in zip(own, other, strict=True)
    )
    assert sum(own) == pytest.approx(alone["loss"] * alone["num_tokens"], rel=1e-12)
    assert mixed["loss"] == pytest.approx(wanted / alone["num_tokens"], rel=1e-12)
    # All else is the model's own.
    assert mixed["exact_match"] == alone["exact_match"]
    assert mixed["token_accuracy"] == alone["token_accuracy"]
    # A part of nothing counts nothing; the same model twice is that model.
    (whole,) = one.measure_each(model, [examples], split="test", share=1.0, beside=[(0.0, other)])
    (twice,) = one.measure_each(model, [examples], split="test", share=0.3, beside=[(0.7, own)])
    assert whole["loss"] == pytest.approx(alone["loss"], rel=1e-12)
    assert twice["loss"] == pytest.approx(alone["loss"], rel=1e-12)
