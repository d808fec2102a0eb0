"""What it saves that worked examples are read once where a model writes: problems of GSM8K behind five of them.

    python benchmarks/real/prefix.py --data FOLDER [--model FILE] [--items 16] [--turns 3]

FOLDER holds `gsm8k/train.jsonl`, of whose last rows five are the worked examples and others are asked. Both ways write the same
answers to the same prompts, by turns; CPU time.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import torch
from runs import MODELS, grid

import fedloom
from fedloom.models.build import ModelSettings, load_base
from fedloom.results.suites import run_suite
from timing import write_page

SHOTS = 5


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default=str(MODELS / "smollm2.gguf"))
    parser.add_argument("--items", type=int, default=16)
    parser.add_argument("--turns", type=int, default=3)
    said = parser.parse_args()
    torch.set_num_threads(1)
    base = load_base(ModelSettings(name=said.model))
    lines = (said.data / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    ways = {"read once": True, "every prompt whole": False}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "asked.jsonl"
        file.write_text("\n".join(lines[-SHOTS - said.items :]), encoding="utf-8")
        asked = fedloom.Asked("gsm8k", file, shots=SHOTS)
        for turn in range(said.turns):
            for name, share in ways.items():
                began = time.process_time()
                found[name] = run_suite(base.model, base.tokenizer, name, asked, share=share)
                seconds[name].append(time.process_time() - began)
                print(f"turn {turn}, {name}: {seconds[name][-1]:.0f} s", flush=True)
    once, whole = found.values()
    alike = sum(a == b for a, b in zip(once.values, whole.values, strict=True))
    least = statistics.median(seconds["read once"])
    rows = [
        (name, f"{statistics.median(each):.0f}", f"{statistics.median(each) / least:.1f}x")
        for name, each in seconds.items()
    ]
    text = (
        f"{said.items} problems behind {SHOTS} worked examples, before training, medians of {said.turns} turns;"
        f" {alike} of {said.items} are judged alike.\n\n"
        f"{grid(('worked examples', 'CPU seconds', 'beside read once'), rows)}"
    )
    print(text)
    write_page(
        "real_prefix.md",
        f"Worked examples read once: {Path(said.model).name}",
        text,
        packages=("torch", "transformers", "fedloom"),
    )


if __name__ == "__main__":
    main()
