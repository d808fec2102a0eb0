"""An evaluation with a large vocabulary, beside one that makes the logits of every token, and beside training.

    python benchmarks/evaluation.py [--turns 5] [--hidden 640] [--rows 16] [--length 128] [--batch 8] [--asked 0.05]
    python benchmarks/evaluation.py --model gemma3-270m.gguf --length 320 --batch 32 [--prompts FILE.jsonl]

(a) CPU time of scoring held-out rows: loss, token accuracy and the last choice of each. "Logits of every token" is how
this package evaluated before its logits were those of asked tokens alone.

(b) memory, each candidate in a process of its own: the most that was resident while it worked (VmHWM of Linux, reset
before), less what was resident before the model was made. Training is a step of AdamW on LoRA over one batch.

(c) with `--model` and `--prompts`, a file of JSON rows with `question` or `instruction`: answers to them, beside
transformers' own `generate` on the same batches, where all rows of a batch go on until the last has ended.

Writes `benchmarks/results/evaluation.md`; of a real model, which is evaluated and trained with its adapters as in a
run, `evaluation_MODEL.md`.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import psutil
import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from fedloom.client.fast.kernels import make_fast
from fedloom.client.local_settings import LocalSettings
from fedloom.client.make_trainer import make_trainer
from fedloom.core.protocols import Fit, Job
from fedloom.core.randomness import generator
from fedloom.data.federation import Federation, Shard
from fedloom.data.manifest import Manifest
from fedloom.data.tokens import IGNORED, Example
from fedloom.evaluation.generation import Generation
from fedloom.evaluation.scoring import evaluating, score
from fedloom.models.build import Base, ModelSettings, load_base
from fedloom.models.hf_logging import quiet
from fedloom.objectives.objective import Score
from fedloom.objectives.sft import SFT
from fedloom.spaces.adapter import AdapterSpace
from fedloom.spaces.lora import LoRA
from scenery import Unasked, random_llama
from timing import paired, write_page

VOCABULARY = 262_144
DEPTHS = (6, 18)
"""Layers: a small model, and as many as Gemma 3 270M has."""
NOTHING = Manifest("", "random", "iid", None, 0, 0, 0, 0, 0, 0, 0, {})
OURS, BEFORE, TRAINING, GENERATE = "fedloom", "logits of every token", "training", "generate"
PROMPTS, ANSWERS, MOST = 24, 24, 200
"""Prompts that are answered, how many at once, and tokens of an answer."""
CHAT: Mapping[str, Any] = {"add_generation_prompt": True, "return_dict": False}


@dataclass(frozen=True)
class Scene:
    """Sizes of everything."""

    hidden: int
    layers: int
    rows: int
    length: int
    batch: int
    asked: float
    vocabulary: int = VOCABULARY
    model: str = ""
    """Of a real one, its file or folder."""
    training_batch: int | None = None

    @property
    def num_asked(self) -> int:
        """Return the tokens of a row that are asked for."""
        return max(1, round(self.asked * self.length))


def rows_of(scene: Scene) -> list[Example]:
    """Return rows whose last tokens are asked for; of unequal lengths, as text has them."""
    rows = []
    for at in range(scene.rows):
        length = scene.length - at % 8
        ids = torch.randint(0, scene.vocabulary, (length,), generator=generator(0, at))
        labels = ids.clone()
        labels[: -scene.num_asked] = IGNORED
        rows.append(Example(ids, labels, length - scene.num_asked))
    return rows


@lru_cache(maxsize=1)
def made(scene: Scene) -> tuple[Any, AdapterSpace | None]:
    """Return the model; a real one has adapters, as in a run."""
    if not scene.model:
        return random_llama(scene.hidden, scene.layers, scene.vocabulary), None
    space = LoRA(rank=8).make_space(load_base(ModelSettings(name=scene.model)), seed=0)
    return space.model, space


def ours(scene: Scene) -> Callable[[], list[Score]]:
    """Return an evaluation as it is."""
    model, space = made(scene)
    rows, fast = rows_of(scene), None if space is None else make_fast(model, LocalSettings())

    def run() -> list[Score]:
        with evaluating(model), nullcontext() if fast is None else fast.evaluating():
            return score(model, rows, scene.batch, SFT())

    return run


def before(scene: Scene) -> Callable[[], list[Score]]:
    """Return an evaluation from the logits of every token."""
    (model, _), rows = made(scene), rows_of(scene)

    def run() -> list[Score]:
        with evaluating(model):
            order = sorted(range(len(rows)), key=lambda at: -len(rows[at].ids))
            found = {}
            for at in range(0, len(order), scene.batch):
                chosen = order[at : at + scene.batch]
                found.update(zip(chosen, _whole(model, [rows[i] for i in chosen]), strict=True))
            return [found[at] for at in range(len(rows))]

    return run


def _whole(model: Any, batch: Sequence[Example]) -> list[Score]:
    ids = pad_sequence([row.ids for row in batch], batch_first=True)
    labels = pad_sequence([row.labels for row in batch], batch_first=True, padding_value=IGNORED)
    labels = labels[:, 1:]
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    rows, columns = (labels != IGNORED).nonzero(as_tuple=True)
    chosen, targets = logits[rows, columns].float(), labels[rows, columns]
    losses = cross_entropy(chosen, targets, reduction="none").double()
    best = chosen.argmax(-1)
    scores = []
    for row in range(len(batch)):
        mine = rows == row
        hits, last = int((best == targets)[mine].sum()), int(best[mine][-1])
        scores.append(Score(float(losses[mine].sum()), hits, int(mine.sum()), last))
    return scores


def training(scene: Scene) -> Callable[[], object]:
    """Return one step of local training over a batch of the same rows."""
    model, space = made(scene)
    space = space or LoRA(rank=8).make_space(Base(model, None, "random"), seed=0)
    federation = Federation({"client": Shard(rows_of(scene), [], [])}, {"client": {}}, NOTHING)
    batch, kernels = scene.training_batch or scene.batch, "auto" if scene.model else "torch"
    local = LocalSettings(steps=1, batch_size=batch, kernels=kernels)
    trainer = make_trainer(space, federation, local, evaluator=Unasked(), num_rounds=1)
    return lambda: trainer.run([Job("client", 1, 0, Fit(space.start()))])


WORK: Mapping[str, Callable[[Scene], Callable[[], object]]] = {
    OURS: ours,
    BEFORE: before,
    TRAINING: training,
}


def peak(scene: Scene, name: str) -> int:
    """Return the most bytes resident while a candidate worked, from a process of its own."""
    told = json.dumps({"scene": asdict(scene), "name": name})
    # What is freed goes back at once, so that what is resident is what is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, __file__, "--child", told],
        check=True,
        capture_output=True,
        text=True,
        env=environment,
    )
    return int(done.stdout)


def child(scene: Scene, name: str) -> None:
    """Do one candidate's work and print its peak, in bytes."""
    torch.set_num_threads(1)
    small = replace(scene, hidden=64, layers=1, rows=2, length=16, vocabulary=256, model="")
    for make in WORK.values():
        make(small)()  # imports
    resident = psutil.Process().memory_info().rss
    work = WORK[name](scene)
    work()
    Path("/proc/self/clear_refs").write_text("5")
    work()
    status = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in status if line.startswith("VmHWM"))
    print(int(line.split()[1]) * 1024 - resident)


def table(scene: Scene, turns: int) -> str:
    """Return what was measured at one depth, in Markdown."""
    work = {OURS: ours(scene), BEFORE: before(scene)}
    mine, theirs = (run() for run in work.values())
    apart = max(abs(a.loss / b.loss - 1) for a, b in zip(mine, theirs, strict=True))
    alike = all(
        (a.correct, a.num_tokens, a.choice) == (b.correct, b.num_tokens, b.choice)
        for a, b in zip(mine, theirs, strict=True)
    )
    times = paired(work, turns=turns, warm_up=0)
    del work
    peaks = {name: peak(scene, name) for name in WORK}
    lines = [
        (
            f"{Path(scene.model).name or f'{scene.layers} layers'}: losses apart by {apart:.1e} of themselves at most, hits and choices"
            f" {'equal' if alike else 'NOT equal'}\n"
        ),
        "| | CPU s | IQR | x of ours | peak memory, MB | x of training |",
        "|---|---|---|---|---|---|",
    ]
    for name in WORK:
        timing = times.get(name)
        spent = "- | - | -"
        if timing is not None:
            ratio = times[OURS].ratio(timing)
            spent = f"{timing.median:.2f} | {timing.spread:.1%} | {ratio:.2f}"
        most = peaks[name]
        lines.append(f"| {name} | {spent} | {most / 1e6:,.0f} | {most / peaks[TRAINING]:.2f} |")
    return "\n".join(lines)


def answering(file: str, prompts: Path, turns: int) -> str:
    """Return how long answers take, in Markdown."""
    base = load_base(ModelSettings(name=file))
    model, tokenizer = base.model, base.tokenizer
    rows = [json.loads(line) for line in prompts.read_text().splitlines()][:PROMPTS]
    asked = [row.get("question") or row["instruction"] for row in rows]
    ids = [
        torch.tensor(tokenizer.apply_chat_template([{"role": "user", "content": text}], **CHAT))
        for text in asked
    ]
    stop = tokenizer.eos_token_id
    found: dict[str, list[str]] = {}

    def fedloom() -> None:
        with evaluating(model):
            found[OURS] = Generation(tokenizer, MOST, ANSWERS).answers(model, ids)

    def transformers() -> None:
        order = sorted(range(len(ids)), key=lambda at: -len(ids[at]))
        answers = {}
        for at in range(0, len(order), ANSWERS):
            chosen = order[at : at + ANSWERS]
            padded = pad_sequence([ids[i] for i in chosen], True, stop, "left")
            ones = [torch.ones_like(ids[i]) for i in chosen]
            with evaluating(model):
                whole = model.generate(
                    input_ids=padded,
                    attention_mask=pad_sequence(ones, True, 0, "left"),
                    max_new_tokens=MOST,
                    do_sample=False,
                    pad_token_id=stop,
                )
            texts = tokenizer.batch_decode(whole[:, padded.shape[1] :], skip_special_tokens=True)
            answers.update(zip(chosen, texts, strict=True))
        found[GENERATE] = [answers[at].strip() for at in range(len(ids))]

    times = paired({OURS: fedloom, GENERATE: transformers}, turns=turns, warm_up=0)
    counts = sorted(len(tokenizer(answer).input_ids) + 1 for answer in found[OURS])
    equal = sum(a == b for a, b in zip(found[OURS], found[GENERATE], strict=True))
    lines = [
        (
            f"{len(ids)} answers of at most {MOST} tokens to prompts of {prompts.name}, {ANSWERS} at once: {counts[0]} to"
            f" {counts[-1]} tokens long, median {counts[len(counts) // 2]}; {equal} of {len(ids)} equal\n"
        ),
        "| | CPU s | IQR | x of ours | tokens/s |",
        "|---|---|---|---|---|",
    ]
    for name, timing in times.items():
        ratio = times[OURS].ratio(timing)
        lines.append(
            f"| {name} | {timing.median:.1f} | {timing.spread:.1%} | {ratio:.2f} | {sum(counts) / timing.median:.1f} |"
        )
    return "\n".join(lines)


def real(given: argparse.Namespace) -> None:
    """Measure a real model, print and write."""
    parts = []
    if not given.prompts:
        scene = Scene(
            0,
            0,
            given.rows,
            given.length,
            given.batch,
            given.asked,
            model=given.model,
            training_batch=2,
        )
        parts = [
            (
                f"{given.rows} rows of about {given.length} tokens, at most {given.batch} at a time, the last"
                f" {given.asked:.0%} asked for; LoRA of rank 8 on all linear layers, float32; medians of {given.turns}"
                f' interleaved runs. "{BEFORE}" is the evaluation of commit 934ee45, written out in the benchmark; training'
                " is a step of AdamW over 2 such rows. Peak memory holds the weights."
            ),
            table(scene, given.turns),
        ]
    else:
        parts = [answering(given.model, Path(given.prompts), given.turns)]
    print("\n\n".join(parts))
    kind = "generation" if given.prompts else "evaluation"
    write_page(
        f"{kind}_{Path(given.model).stem.partition('-')[0]}.md",
        f"{kind.capitalize()} of {Path(given.model).name}",
        "\n\n".join(parts),
        packages=("torch", "transformers", "fedloom"),
    )


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (
        ("turns", 5),
        ("hidden", 640),
        ("rows", 16),
        ("length", 128),
        ("batch", 8),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--asked", type=float, default=0.05)
    parser.add_argument("--model", default="", help="a real one, instead of random weights")
    parser.add_argument("--prompts", help="with --model: JSON rows whose answers are timed")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        told = json.loads(given.child)
        child(Scene(**told["scene"]), told["name"])
        return
    torch.set_num_threads(1)
    if given.model:
        with quiet():
            real(given)
        return
    sizes = given.hidden, given.rows, given.length, given.batch
    parts = [
        (
            f"A random Llama of width {given.hidden} with a vocabulary of {VOCABULARY:,}, tied, float32, torch's own"
            f" products; {given.rows} rows of about {given.length} tokens, {given.batch} at a time, the last"
            f' {given.asked:.0%} asked for; medians of {given.turns} interleaved runs. "{BEFORE}" is the evaluation of'
            " commit 934ee45, written out in the benchmark; training is a step of AdamW on LoRA (rank 8) over one such"
            " batch. Peak memory holds the weights."
        )
    ]
    with quiet():
        for layers in DEPTHS:
            hidden, rows, length, batch = sizes
            scene = Scene(hidden, layers, rows, length, batch, given.asked)
            parts.append(table(scene, given.turns))
            print(parts[-1], flush=True)
    write_page(
        "evaluation.md",
        "Evaluating with a large vocabulary",
        "\n\n".join(parts),
        packages=("torch", "transformers", "fedloom"),
    )


if __name__ == "__main__":
    main()
