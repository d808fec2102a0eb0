"""Public tests of a real model: beside lm-evaluation-harness item by item, and before and after a federated run.

    python benchmarks/real/suites.py --data FOLDER [--model FILE] [--items 50] [--plain 10] [--runs FOLDER]

FOLDER holds `commonsense/ARC-Easy/test.json`, `mmlu/test_1444.jsonl`, `gsm8k/train.jsonl` and `humaneval/HumanEval.jsonl.gz`.
Needs `pip install fedloom[eval]`. Both judge the same texts; MMLU has five worked examples of the subject. `--plain` items are
also judged with every prompt read whole. The run is of eight clients with problems of GSM8K; of the file's last 105 rows, which
no client has, five are worked examples and a hundred are asked. HumanEval's programs are run, behind the fence.
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

import fedloom
from fedloom.models.build import ModelSettings, load_base
from fedloom.recipe import build_recipe
from fedloom.results.suite_results import SuiteResult, chance
from fedloom.results.suites import continuations
from fedloom.suites.likelihood import Continuation, Likelihood, likelihoods
from timing import write_page

SUITES = {
    "ARC": ("arc", "commonsense/ARC-Easy/test.json"),
    "MMLU": ("mmlu", "mmlu/test_1444.jsonl"),
}
MOST = 2048
ASKED = 105
"""Of GSM8K's rows, the last: five worked examples, and what is asked."""


# --- beside the harness -----------------------------------------------------------------------------


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


def beside_harness(data: Path, model: str, items: int, plain: int) -> str:
    """Return the table of likelihoods, ours and the harness's."""
    from lm_eval.models.huggingface import HFLM

    base = load_base(ModelSettings(name=model))
    harness = HFLM(pretrained=base.model, tokenizer=base.tokenizer, batch_size=4, max_length=MOST)
    rows = []
    for title, (name, file) in SUITES.items():
        asked, sizes, gold = continuations(fedloom.Asked(name, data / file, limit=items))
        own, seconds = judged(base, asked, share=True)
        began = time.process_time()
        other = harness.loglikelihood([SimpleNamespace(args=(a.context, a.text)) for a in asked])
        theirs = time.process_time() - began
        apart = max(abs(a.logprob - b[0]) for a, b in zip(own, other, strict=True))
        mine = choices([each.logprob for each in own], sizes)
        same = sum(
            a == b for a, b in zip(mine, choices([each[0] for each in other], sizes), strict=True)
        )
        few = sum(sizes[:plain])
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
    return (
        f"Before training, {items} items a suite; the last column is of the first {plain}.\n\n"
        f"{grid(columns, rows)}"
    )


# --- before and after a run -------------------------------------------------------------------------


def trained(data: Path, model: str, folder: Path) -> fedloom.Result:
    """Return a run on problems of GSM8K; what is asked of it later is beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = (data / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    for name, part in (("learnt", lines[:-ASKED]), ("asked", lines[-ASKED:])):
        (folder / f"{name}.jsonl").write_text("\n".join(part), encoding="utf-8")
    recipe = {
        "name": "gsm8k",
        "model": {"name": model},
        "algorithm": "fedavg",
        "data": {
            "source": str(folder / "learnt.jsonl"),
            "shorter": {"answer": 200, "question": 200},
            "num_clients": 8,
            "num_examples": 480,
            "prompt": "plain",
            "max_length": 144,
            "fractions": [0.9, 0.0, 0.1],
        },
        "cohort": {"uniform": {"size": 4}},
        "tune": {"lora": {"rank": 8, "alpha": 16, "targets": "all-linear"}},
        "local": {"optimizer": "adamw", "lr": 1e-3, "steps": 4, "batch_size": 2},
        "evaluation": {"every": 0, "validation": False, "generate": False},
        "run": {"rounds": 6, "samples": 0},
    }
    run = folder / "run"
    if (run / "summary.json").exists():
        return fedloom.open_run(run)
    return fedloom.run(build_recipe(recipe), run)


def before_and_after(data: Path, model: str, folder: Path) -> str:
    """Return the table of a run's suites."""
    result = trained(data, model, folder)
    losses = [line["test/loss"] for line in result.metrics if "test/loss" in line]
    programs = data / "humaneval" / "HumanEval.jsonl.gz"
    suites = (
        fedloom.Asked("mmlu", data / "mmlu" / "test_1444.jsonl", limit=50),
        fedloom.Asked("arc", data / "commonsense" / "ARC-Easy" / "test.json", limit=100),
        fedloom.Asked("gsm8k", folder / "asked.jsonl", limit=100),
        fedloom.Asked("humaneval", programs, limit=40, allow_code=True),
    )
    rows = []
    for each in suites:
        began = time.process_time()
        both = result.suites([each], base=True)
        seconds = time.process_time() - began
        first, last = both
        cells = (*map(share, both), f"{chance(first.values, last.values):.2f}")
        rows.append((each.suite, str(last.num), *cells, f"{seconds / 2:.0f}"))
    columns = ("suite", "items", "before", "after", "p, the same items", "CPU seconds a model")
    return (
        f"Six rounds of four of eight clients: test loss {losses[0]:.3f} to {losses[-1]:.3f}.\n\n"
        f"{grid(columns, rows)}"
    )


def share(result: SuiteResult) -> str:
    """Return what was right, in per cent, with its interval."""
    return f"{100 * result.score:.1f} % [{100 * result.low:.1f}, {100 * result.high:.1f}]"


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default=str(MODELS / "smollm2.gguf"))
    parser.add_argument("--items", type=int, default=50)
    parser.add_argument("--plain", type=int, default=10)
    parser.add_argument("--runs", type=Path, default=Path("runs/real"))
    said = parser.parse_args()
    torch.set_num_threads(1)
    parts = (
        "## Beside lm-evaluation-harness",
        beside_harness(said.data, said.model, said.items, said.plain),
        "## Before and after a federated run",
        before_and_after(said.data, said.model, said.runs / "suites"),
    )
    text = "\n\n".join(parts)
    print(text)
    write_page(
        "real_suites.md",
        "Public tests on a real model",
        text,
        packages=("torch", "transformers", "lm_eval", "fedloom"),
    )


if __name__ == "__main__":
    main()
