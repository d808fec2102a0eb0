"""Public tests of a real model: beside lm-evaluation-harness item by item, and what reading shared beginnings once saves.

    python benchmarks/real/suites.py --data FOLDER [--model FILE] [--items 50] [--plain 10]

FOLDER holds `commonsense/ARC-Easy/test.json` and `mmlu/test_1444.jsonl`. Needs `pip install fedloom[eval]`. Both judge the
same texts; MMLU has five worked examples of the subject. `--plain` items are also judged with every prompt read whole.
"""

import argparse
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import torch
from runs import MODELS, grid

from fedloom.models.build import ModelSettings, load_base
from fedloom.results.suites import Asked, continuations
from fedloom.suites.likelihood import Continuation, Likelihood, likelihoods
from timing import write_page

SUITES = {
    "ARC": ("arc", "commonsense/ARC-Easy/test.json"),
    "MMLU": ("mmlu", "mmlu/test_1444.jsonl"),
}
MOST = 2048


def judged(base: Any, asked: list[Continuation], *, share: bool) -> tuple[list[Likelihood], float]:
    """Return likelihoods and the seconds of processor time."""
    began = time.process_time()
    found = likelihoods(base.model, base.tokenizer, asked, max_length=MOST, share=share)
    return found, time.process_time() - began


def choices(values: list[float], sizes: list[int]) -> list[int]:
    """Return which option of each item is the most likely."""
    found, at = [], 0
    for size in sizes:
        own = values[at : at + size]
        found.append(own.index(max(own)))
        at += size
    return found


def main() -> None:
    """Write the table."""
    from lm_eval.models.huggingface import HFLM

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default=str(MODELS / "smollm2.gguf"))
    parser.add_argument("--items", type=int, default=50)
    parser.add_argument("--plain", type=int, default=10)
    said = parser.parse_args()
    torch.set_num_threads(1)
    base = load_base(ModelSettings(name=said.model))
    harness = HFLM(pretrained=base.model, tokenizer=base.tokenizer, batch_size=4, max_length=MOST)
    rows = []
    for title, (name, file) in SUITES.items():
        asked, sizes, gold = continuations(Asked(name, said.data / file, limit=said.items))
        own, seconds = judged(base, asked, share=True)
        began = time.process_time()
        other = harness.loglikelihood([SimpleNamespace(args=(a.context, a.text)) for a in asked])
        theirs = time.process_time() - began
        apart = max(abs(a.logprob - b[0]) for a, b in zip(own, other, strict=True))
        mine = choices([each.logprob for each in own], sizes)
        same = sum(
            a == b for a, b in zip(mine, choices([each[0] for each in other], sizes), strict=True)
        )
        few = sum(sizes[: said.plain])
        _, once = judged(base, asked[:few], share=True)
        _, whole = judged(base, asked[:few], share=False)
        right = sum(a == b for a, b in zip(mine, gold, strict=True))
        rows.append(
            (
                title,
                str(len(sizes)),
                f"{apart:.1e}",
                f"{same} of {len(sizes)}",
                f"{100 * right / len(sizes):.0f} %",
                f"{seconds:.0f}",
                f"{theirs:.0f}",
                f"{whole / once:.1f}x",
            )
        )
    columns = (
        *("suite", "items", "largest difference, nats", "same choices", "accuracy"),
        *("CPU seconds", "lm-eval's", "every prompt whole beside it"),
    )
    text = (
        f"SmolLM2 before training, {said.items} items a suite; the last column is of the first {said.plain}."
        f"\n\n{grid(columns, rows)}"
    )
    print(text)
    write_page(
        "real_suites.md",
        "Public tests on a real model, beside lm-evaluation-harness",
        text,
        packages=("torch", "transformers", "lm_eval", "fedloom"),
    )


if __name__ == "__main__":
    main()
