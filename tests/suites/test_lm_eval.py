"""What lm-evaluation-harness is told of a model, beside its own wrapper of the same one; skipped where it is not installed."""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fedloom.suites.likelihood import rolling
from fedloom.suites.lm_eval import generators_kept, harness

TEXT = "the cat sat on the mat, and the dog did not; " * 3


def test_without_the_harness_it_says_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"pip install 'fedloom\[eval\]'"):
        harness(torch.nn.Identity(), None, ["arc_easy"], max_length=8)


def test_a_text_is_measured_window_by_window(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    model = tiny_llama(vocab=len(tiny_tokenizer))
    ids = tiny_tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    start = [tiny_tokenizer.bos_token_id]

    def plain(read: list[int], asked: int) -> float:
        with torch.no_grad():
            logits = model(torch.tensor([read[:-1]])).logits[0].log_softmax(-1)
        targets = torch.tensor(read[1:])
        return float(logits.gather(1, targets[:, None])[-asked:].sum())

    whole = rolling(model, tiny_tokenizer, TEXT, max_length=256)
    assert whole == pytest.approx(plain(start + ids, len(ids)), abs=1e-3)
    window = len(ids) // 2 + 3
    expected = plain(start + ids[:window], window)
    expected += plain(ids[len(ids) - window - 1 :], len(ids) - window)
    assert rolling(model, tiny_tokenizer, TEXT, max_length=window) == pytest.approx(
        expected, abs=1e-3
    )


def test_the_generators_are_put_back() -> None:
    torch.manual_seed(3)
    expected = (random.random(), np.random.rand(), float(torch.rand(1)))  # noqa: NPY002
    torch.manual_seed(3)
    with generators_kept():
        for seeded in (random.seed, np.random.seed, torch.manual_seed):
            seeded(0)
    assert float(torch.rand(1)) == expected[2]


def test_it_is_what_the_harness_says_of_the_same_model(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    huggingface = pytest.importorskip(
        "lm_eval.models.huggingface", reason="lm-eval is not installed: pip install 'fedloom[eval]'"
    )
    from fedloom.suites.lm_eval import language_model

    model = tiny_llama(vocab=len(tiny_tokenizer))
    theirs = huggingface.HFLM(pretrained=model, tokenizer=tiny_tokenizer, batch_size=2)
    ours = language_model(model, tiny_tokenizer, theirs.max_length)
    asked = [
        SimpleNamespace(args=(f"Question: is it {x}?\nAnswer:", answer))
        for x in ("a cat", "a dog", "tea")
        for answer in (" yes", " no", " maybe so")
    ]
    for own, other in zip(ours.loglikelihood(asked), theirs.loglikelihood(asked), strict=True):
        assert own[0] == pytest.approx(other[0], abs=1e-4)
        assert own[1] == other[1]
    texts = [SimpleNamespace(args=(TEXT * 4,)), SimpleNamespace(args=("short",))]
    assert ours.loglikelihood_rolling(texts) == pytest.approx(
        theirs.loglikelihood_rolling(texts), abs=1e-3
    )
    settings = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}
    written = [SimpleNamespace(args=("Question: what is it?\nAnswer:", settings))]
    assert ours.generate_until(written) == theirs.generate_until(written)
    with pytest.raises(ValueError, match="answers are written greedily"):
        ours.generate_until([SimpleNamespace(args=("a", {"do_sample": True}))])


def test_a_task_of_the_harness_runs_over_a_local_file(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'fedloom[eval]'")
    from fedloom.suites.lm_eval import harness

    rows = [{"question": f"is it {x}?", "answer": at % 2} for at, x in enumerate("abcd")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": ["no", "yes"],
        "doc_to_target": "{{answer}}",
    }
    model = tiny_llama(vocab=len(tiny_tokenizer))
    before = torch.get_rng_state()
    found = harness(model, tiny_tokenizer, [task], max_length=256)
    assert found["local"]["acc,none"] in (0.0, 0.25, 0.5, 0.75, 1.0)
    assert torch.equal(before, torch.get_rng_state())
