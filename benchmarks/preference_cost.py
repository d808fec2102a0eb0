"""What a round of DPO costs beside a round of instruction tuning of as many tokens.

    python benchmarks/preference_cost.py [--model FILE] [--turns 5] [--clients 4]

Clients hold the same texts twice: as pairs of answers, and as rows with one answer each, so that a step of DPO on n pairs and
one of instruction tuning on 2 n rows read the same tokens. Rounds take turns, CPU time on one thread. The reference is the
base model, asked once for each row a client holds, in the round in which that is first trained on: the first rounds have it, the
later ones find it. Numbers are of the training alone, as rounds report it, with what the server does.
"""

import argparse
import os
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import torch

import fedloom
from fedloom.recipe import build_recipe
from timing import Timing, write_page

WORDS = [
    "amber",
    "river",
    "stone",
    "garden",
    "yellow",
    "window",
    "paper",
    "silver",
    "market",
    "winter",
    "orange",
    "morning",
]
ROWS, BATCH, STEPS = 16, 4, 4
DPO, SFT = "DPO", "instruction tuning"


def pairs(client: int) -> list[dict[str, str]]:
    """Return a client's pairs, of a prompt of eight words and two answers of eight."""
    draw = random.Random(client)

    def text() -> str:
        return " ".join(draw.choices(WORDS, k=8))

    return [{"prompt": text(), "chosen": text(), "rejected": text()} for _ in range(ROWS)]


def rows(client: int) -> list[dict[str, str]]:
    """Return the same answers, each a row of its own."""
    return [
        {"prompt": pair["prompt"], "completion": pair[side]}
        for pair in pairs(client)
        for side in ("chosen", "rejected")
    ]


def recipe(asked: argparse.Namespace, objective: Any, batch_size: int) -> Any:
    """Return the recipe of one kind of round."""
    return build_recipe(
        {
            "name": "cost",
            "model": {"name": asked.model},
            "objective": objective,
            "algorithm": "fedavg",
            "data": {"prompt": "plain", "max_length": 64, "fractions": [1.0, 0.0, 0.0]},
            "tune": {"lora": {"rank": 8, "alpha": 16, "targets": "all-linear"}},
            "local": {"optimizer": "adamw", "lr": 1e-4, "steps": STEPS, "batch_size": batch_size},
            "evaluation": {"every": 0, "validation": False, "generate": False},
            "run": {"rounds": asked.turns + 2, "samples": 0, "keep_checkpoints": 1},
        }
    )


def timed(finished: Iterator[Any]) -> float:
    """Return the CPU seconds of the next round."""
    began = time.process_time()
    next(finished)
    return time.process_time() - began


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--clients", type=int, default=4)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    kinds = {DPO: ("dpo", BATCH, pairs), SFT: ("sft", 2 * BATCH, rows)}
    firsts, seconds = {}, dict[str, list[float]]()
    with ExitStack() as stack:
        rounds = {}
        for name, (objective, batch_size, made) in kinds.items():
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            data = {f"client-{at}": made(at) for at in range(asked.clients)}
            session = stack.enter_context(
                fedloom.session(
                    recipe(asked, objective, batch_size), Path(folder) / "run", data=data
                )
            )
            rounds[name] = iter(session.rounds())
            firsts[name] = timed(rounds[name])
            seconds[name] = []
        for turn in range(asked.turns):
            for name in sorted(rounds, reverse=bool(turn % 2)):
                seconds[name].append(timed(rounds[name]))
    times = {name: Timing(each) for name, each in seconds.items()}
    ratio = times[SFT].ratio(times[DPO])
    model = Path(asked.model).stem.replace("builtin:", "")
    text = (
        f"{asked.clients} client{'s' * (asked.clients > 1)}, {STEPS} steps of {BATCH} pairs or {2 * BATCH} rows, {model}; medians of {asked.turns} rounds that"
        f" take turns.\n\n| CPU seconds of a round | {DPO} | {SFT} | ratio |\n|---|---:|---:|---:|\n"
        f"| reference known | {times[DPO].median:.2f} | {times[SFT].median:.2f} | {ratio:.2f} |\n"
        f"| the first, which asks the reference | {firsts[DPO]:.2f} | {firsts[SFT]:.2f} | {firsts[DPO] / firsts[SFT]:.2f} |"
    )
    print(text)
    write_page(f"preference_cost_{model}.md", f"What a round of DPO costs, {model}", text)


if __name__ == "__main__":
    main()
