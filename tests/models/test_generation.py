"""What a model's files say of generation and of outputs changes no answer and hinders no loading, saving or training."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig

from fedloom.data.formats import Message, Record
from fedloom.data.tokens import IGNORED, Example
from fedloom.evaluation.evaluation_settings import EvaluationSettings
from fedloom.evaluation.measure import Evaluator
from fedloom.models.build import ModelSettings, load_base, write_model
from fedloom.models.generation import write_greedily
from fedloom.models.prefix import read_prefix, shared_beginning
from fedloom.objectives.classification import Classification
from fedloom.spaces.lora import LoRA

CONTENT = {"eos_token_id": "what a chat model ends its turns with is part of the model"}
"""Fields that may change an answer, and why."""
FIELDS = sorted(f for f in vars(GenerationConfig()) if not f.startswith("_") and f not in CONTENT)
ODD: dict[str, Any] = {
    "assistant_ensemble_weight": 0.5,
    "bad_words_ids": [[at] for at in range(7, 60)],
    "begin_suppress_tokens": list(range(7, 103)),
    "cache_config": {"nbits": 4},
    "cache_implementation": "static",
    "compile_config": {"mode": "max-autotune"},
    "do_sample": True,
    "early_stopping": "never",
    "exponential_decay_length_penalty": [1, 1.9],
    "num_beam_groups": 2,
    "num_beams": 4,
    "sequence_bias": [[[40], 90.0]],
    "stop_strings": ["e", "a"],
    "suppress_tokens": list(range(7, 103)),
    "temperature": 0.01,
    "transformers_version": "1.0.0",
    "use_cache": False,
    "watermarking_config": {"greenlist_ratio": 0.1, "bias": 90.0},
}
BROKEN = [
    "",
    "{",
    "[1]",
    "null",
    "[" * 100_000,
    '{"early_stopping": "x"}',
    '{"max_new_tokens": -1}',
]


def example(tokenizer: Any, prompt: str, answer: str) -> Example:
    start = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([*start, *tokenizer(answer, add_special_tokens=False)["input_ids"], 2])
    labels = ids.clone()
    labels[: len(start)] = IGNORED
    record = Record((Message("user", prompt), Message("assistant", answer)), {}, answer)
    return Example(ids, labels, len(start), record, None)


@pytest.fixture
def asked(tiny_tokenizer: Any) -> list[Example]:
    return [example(tiny_tokenizer, prompt, "one") for prompt in ("a", "what is it?", "qqq")]


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def said(model: Any, tokenizer: Any, asked: list[Example]) -> list[str]:
    return Evaluator(EvaluationSettings(max_new_tokens=6), tokenizer).answers(model, asked)


@pytest.fixture(scope="module")
def plain(tiny_folder: Path, tiny_tokenizer: Any) -> list[str]:
    """Return the answers where nobody says how to generate."""
    prompts = [example(tiny_tokenizer, prompt, "one") for prompt in ("a", "what is it?", "qqq")]
    base = load_base(ModelSettings(name=str(tiny_folder)))
    answers = said(base.model, base.tokenizer, prompts)
    assert all(answers)
    return answers


def odd(field: str) -> Any:
    return ODD.get(field, 3)


def test_the_fields_are_all_there_are() -> None:
    assert len(FIELDS) > 50
    assert {"min_new_tokens", "no_repeat_ngram_size", "forced_eos_token_id", "guidance_scale"} <= {
        *FIELDS
    }


@pytest.mark.parametrize("field", [*FIELDS, "num_beam_groups", "penalty_alpha", "a_key_to_come"])
def test_no_key_of_a_models_file_changes_an_answer(
    field: str, folder: Path, asked: list[Example], plain: list[str]
) -> None:
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": 2, field: odd(field)})
    )
    base = load_base(ModelSettings(name=str(folder)))
    assert said(base.model, base.tokenizer, asked) == plain
    # Nor one that somebody sets on the model.
    setattr(base.model.generation_config, field, odd(field))
    own = base.model.generation_config
    assert said(base.model, base.tokenizer, asked) == plain
    assert base.model.generation_config is own
    assert getattr(own, field) == odd(field)


@pytest.mark.parametrize("text", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_file_hinders_nobody(
    text: str, folder: Path, asked: list[Example], plain: list[str], tmp_path: Path
) -> None:
    (folder / "generation_config.json").write_text(text)
    base = load_base(ModelSettings(name=str(folder)))
    assert said(base.model, base.tokenizer, asked) == plain
    write_model(base, tmp_path / "saved")
    AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.5, "do_sample": False}, {"top_p": 0.9}, {"min_new_tokens": 6}]
)
def test_a_saved_model_keeps_its_own_file(
    settings: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    text = json.dumps({"eos_token_id": [2, 5], **settings})
    (folder / "generation_config.json").write_text(text)
    base = load_base(ModelSettings(name=str(folder)))
    write_model(base, tmp_path / "whole")
    space = LoRA(rank=2, alpha=4.0).make_space(base, seed=0)
    space.save_merged(tmp_path / "merged", space.start())
    for saved in ("whole", "merged"):
        assert (tmp_path / saved / "generation_config.json").read_text() == text
        own = AutoModelForCausalLM.from_pretrained(tmp_path / saved).generation_config
        assert own.eos_token_id == [2, 5]


@pytest.mark.parametrize(
    "config",
    [
        {"return_dict": False},
        {"output_attentions": True},
        {"output_hidden_states": True},
        {"torchscript": True},
        {"use_cache": False},
        {"is_encoder_decoder": True},
        {"min_length": 9, "no_repeat_ngram_size": 1, "num_beams": 3},
    ],
)
def test_no_switch_of_a_models_configuration_does(
    config: dict[str, Any], folder: Path, asked: list[Example], plain: list[str], tmp_path: Path
) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    base = load_base(ModelSettings(name=str(folder)))
    assert said(base.model, base.tokenizer, asked) == plain
    base.model.train()
    assert base.model(input_ids=asked[0].ids[None]).logits.shape[:2] == (1, len(asked[0].ids))
    write_model(base, tmp_path / "saved")


def test_parts_of_a_model_have_plain_outputs_too(tiny_tokenizer: Any, tmp_path: Path) -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    config = Gemma3Config(
        text_config={**small, **heads, "vocab_size": 103, "return_dict": False},
        vision_config={**small, "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    model = load_base(ModelSettings(name=str(tmp_path))).model
    assert model(input_ids=torch.arange(4)[None]).logits.shape == (1, 4, 103)


@pytest.mark.parametrize("own", [[2, "x"], ["x", 2, -1, 99_999, None, 2.5, True], 2])
def test_end_tokens_of_a_configuration_count_where_the_file_names_none(
    own: Any, folder: Path, asked: list[Example], plain: list[str]
) -> None:
    letter = load_base(ModelSettings(name=str(folder))).tokenizer.convert_tokens_to_ids(plain[0][2])
    listed = [*own, letter] if isinstance(own, list) else [own, letter]
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["eos_token_id"] = [each for each in listed if type(each) is int]
    file.write_text(json.dumps(config))
    for text in ("{}", json.dumps({"eos_token_id": listed}), json.dumps({"eos_token_id": "x"})):
        (folder / "generation_config.json").write_text(text)
        base = load_base(ModelSettings(name=str(folder)))
        assert said(base.model, base.tokenizer, asked)[0] == plain[0].split(plain[0][2])[0].strip()


def test_settings_are_put_back_when_a_model_fails(
    folder: Path, asked: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(ModelSettings(name=str(folder)))
    own = base.model.generation_config
    monkeypatch.setattr(base.model, "forward", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        said(base.model, base.tokenizer, asked)
    assert base.model.generation_config is own


def test_the_token_a_template_ends_a_turn_with_ends_an_answer(
    folder: Path, tiny_tokenizer: Any, asked: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A template may end a turn with a token of its own, behind which training sees the end token."""
    base = load_base(ModelSettings(name=str(folder)))
    turn = tiny_tokenizer.convert_tokens_to_ids("<user>")
    x = tiny_tokenizer.convert_tokens_to_ids("x")
    script = iter([x, turn, x, x, x, x])
    monkeypatch.setattr(
        base.model,
        "forward",
        lambda input_ids, **_: type(
            "Output",
            (dict,),
            {"logits": torch.nn.functional.one_hot(input_ids * 0 + next(script), 103).float()},
        )(),
    )
    ids = torch.cat([asked[0].ids[:-1], torch.tensor([turn, 2])])
    labels = ids.clone()
    labels[: asked[0].prompt_length] = IGNORED
    ended = Example(ids, labels, asked[0].prompt_length, asked[0].record, None)
    assert said(base.model, base.tokenizer, [ended]) == ["x"]


def test_a_model_without_numbers_scores_nothing(
    folder: Path, asked: list[Example], tiny_tokenizer: Any, tiny_llama: Callable[..., Any]
) -> None:
    model = tiny_llama(vocab=len(tiny_tokenizer))
    torch.nn.init.constant_(model.lm_head.weight[50], torch.nan)
    # Token 50 is what argmax finds, and 0 where all are NaN.
    word = tiny_tokenizer.decode([50])
    told = [example(tiny_tokenizer, "a", word)]
    judge = Evaluator(EvaluationSettings(max_new_tokens=1), tiny_tokenizer)
    measured = judge.measure(model, told, split="test")
    assert measured["loss"] != measured["loss"]
    assert measured["token_accuracy"] == measured["exact_match"] == measured["rouge1"] == 0
    assert judge.answers(model, told) == [""]
    labels = torch.full_like(told[0].labels, IGNORED)
    labels[-2] = 50
    asked_class = replace(told[0], labels=labels, choices=torch.tensor([50, 51]))
    objective = Classification({word: word, "other": "other"})
    chooser = Evaluator(EvaluationSettings(), tiny_tokenizer, objective)
    assert chooser.measure(model, [asked_class], split="test")["accuracy"] == 0
    assert chooser.answers(model, [asked_class]) == [""]


SMALL: dict[str, Any] = {
    "vocab_size": 103,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 8},
    "gemma3_text": {
        "head_dim": 8,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt2": {},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48},
    "bloom": {},
    "falcon": {},
    "mixtral": {"num_local_experts": 4},
    "mamba": {"state_size": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}
WAITING = {"mamba", "lfm2"}
"""Whose cache is more than keys and values, so that rows wait for each other."""


def small_model(family: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **SMALL | FAMILIES[family])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        for weight in model.parameters():  # far from a tie of logits
            weight.data.add_(torch.randn_like(weight), alpha=0.1)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_rows_that_have_ended_leave_and_the_others_are_as_generate_has_them(family: str) -> None:
    model, rows, length, most = small_model(family), 8, 9, 20
    ids = torch.randint(3, 103, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if family not in WAITING:
        for row in range(rows):
            mask[row, : row % 4], ids[row, : row % 4] = 0, 0
    free = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=most, do_sample=False, eos_token_id=None
    )[:, length:]
    # An end for every second row, each at another place.
    ends = sorted({int(free[row, 2 + row]) for row in range(0, rows, 2)})
    wanted = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=most,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=0,
    )[:, length:]
    widths: list[int] = []
    model.get_input_embeddings().register_forward_hook(
        lambda _module, _given, made: widths.append(made.shape[0])
    )
    found, sound = write_greedily(model, ids, mask, max_new_tokens=most, ends=ends, fill=0)
    assert torch.equal(found, wanted)
    assert sound.eq(2**62).all()
    assert (widths[-1] < rows) != (family in WAITING)
    assert len(widths) == found.shape[1]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_what_all_prompts_begin_with_is_read_once_and_answers_stay(family: str) -> None:
    model = small_model(family)
    draw = torch.Generator().manual_seed(4)
    start = torch.randint(3, 103, (23,), generator=draw)
    lengths = (1, 4, 9, 4, 30)  # the shortest is padded by more than the beginning has
    tails = [torch.randint(3, 103, (n,), generator=draw) for n in lengths]
    tails[1][0], tails[2][0] = (tails[0][0] + n for n in (1, 2))
    prompts = [torch.cat([start, tail]) for tail in tails]
    padded = nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_side="left")
    mask = nn.utils.rnn.pad_sequence(
        [torch.ones_like(prompt) for prompt in prompts], batch_first=True, padding_side="left"
    )
    how: dict[str, Any] = {"max_new_tokens": 12, "fill": 0}
    free, _ = write_greedily(model, padded, mask, ends=[], **how)
    ends = [int(free[1, 3]), int(free[3, 5])]
    shared = shared_beginning(prompts)
    assert torch.equal(shared, start)
    read = read_prefix(model, shared)
    assert (read is None) == (family in WAITING)
    if read is None:
        return
    seen: list[int] = []
    model.get_input_embeddings().register_forward_hook(
        lambda _module, given, _made: seen.append(given[0].numel())
    )
    wanted, _ = write_greedily(model, padded, mask, ends=ends, **how)
    whole, before = sum(seen), len(seen)
    found, sound = write_greedily(model, padded, mask, ends=ends, begin=read, **how)
    assert torch.equal(found, wanted)
    assert sound.eq(2**62).all()
    assert whole - (sum(seen) - whole) == len(prompts) * len(start)
    assert len(seen) == 2 * before
    # And a second time, one row alone.
    one, _ = write_greedily(model, prompts[4][None], mask[4:], ends=[], begin=read, **how)
    assert torch.equal(one[0], free[4])


@torch.no_grad()
def test_rows_that_go_on_alone_are_still_watched_for_numbers(
    tiny_llama: Callable[..., Any],
) -> None:
    model = tiny_llama(vocab=103)
    ids = torch.arange(10, 22).view(3, 4)
    free, _ = write_greedily(model, ids, torch.ones_like(ids), max_new_tokens=8, ends=[], fill=0)
    ends = [int(free[0, 1])]
    calls = 0

    def spoilt(_module: Any, _given: Any, logits: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return (
            logits.index_fill(0, torch.tensor([len(logits) - 1]), torch.nan)
            if calls > 4
            else logits
        )

    handle = model.lm_head.register_forward_hook(spoilt)
    found, sound = write_greedily(
        model, ids, torch.ones_like(ids), max_new_tokens=8, ends=ends, fill=0
    )
    handle.remove()
    assert found[0, 2:].eq(0).all()
    assert sound.tolist() == [2**62, 2**62, 4]
