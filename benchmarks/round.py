"""A client's round and a cohort's, beside plain loops doing the same work.

    python benchmarks/round.py [--turns 7] [--steps 4] [--hidden 256] [--layers 4] [--length 64] [--prompt 32]
    python benchmarks/round.py --model FILE [--bfloat16] [--turns 5] [--steps 2] [--length 64] [--prompt 32]

(a) one client's round against a bare PyTorch + PEFT loop with the same steps; (b) a round of 8 clients at batch 1
against one TRL `SFTTrainer` per client and round, and against the clients one after another with PEFT. All start
from the same adapter and end with the mean of the clients' adapters. Ours decodes the download and encodes and
decodes every upload, as a run does; the others pass tensors on.

With --model: a round of 4 clients on any `model.name`, on random tokens of its vocabulary, in float32 and with a
bfloat16 base, and how much of a round would be left if it were the frozen products alone, each at the rate it has on
its own. bfloat16 is left out on a CPU that multiplies it slower than float32, unless --bfloat16 asks for it.
"""

import argparse
import io
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from typing import Any, Literal

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import torch
from torch import Tensor

from fedloom.client.fast.products import native
from fedloom.client.local_settings import LocalSettings
from fedloom.client.make_trainer import make_trainer
from fedloom.core.params import sub
from fedloom.core.payloads import mean_upload
from fedloom.core.protocols import Fit, Job, Params, Reply, Trainer
from fedloom.core.randomness import derive, generator
from fedloom.data.federation import Federation, Shard
from fedloom.data.manifest import Manifest
from fedloom.data.tokens import IGNORED, Example
from fedloom.models.build import Base, ModelSettings, load_base
from fedloom.models.hf_logging import quiet
from fedloom.objectives.head import CHUNK
from fedloom.spaces.lora import LoRA
from fedloom.wire.format import decode, encode
from scenery import VOCABULARY, Unasked, random_llama
from timing import Timing, about, paired

RANK, ALPHA, LR = 8, 16, 1e-4
TARGETS = ("q_proj", "v_proj")
NOTHING = Manifest("", "random", "iid", None, 0, 0, 0, 0, 0, 0, 0, {})
CLIENTS = tuple(f"client-{i}" for i in range(8))


@dataclass(frozen=True)
class Scene:
    """Sizes of everything."""

    hidden: int
    layers: int
    length: int
    steps: int
    prompt: int
    """Tokens of a row that are read and not learnt."""
    clients: tuple[str, ...] = CLIENTS
    name: str = ""
    """Of a real model; empty: a random Llama of these sizes."""
    vocabulary: int = VOCABULARY
    dtype: Literal["float32", "bfloat16"] = "float32"
    quantize: str = "none"

    def model(self) -> Any:
        """Return a fresh base model."""
        if self.name:
            asked = ModelSettings(self.name, dtype=self.dtype, quantize=self.quantize)  # type: ignore[arg-type]
            return load_base(asked).model
        return random_llama(self.hidden, self.layers)


def rows_of(scene: Scene, client: str) -> list[Example]:
    """Return one example a step."""
    shape = (scene.steps, scene.length)
    ids = torch.randint(0, scene.vocabulary, shape, generator=generator(0, client))
    labels = ids.clone()
    labels[:, : scene.prompt] = IGNORED
    return [Example(*row, scene.prompt) for row in zip(ids, labels, strict=True)]


def ours(scene: Scene, **local: Any) -> tuple[Trainer, Params]:
    """Return a trainer and the start of its space."""
    tune = LoRA(rank=RANK, alpha=ALPHA, targets=TARGETS)
    space = tune.make_space(Base(scene.model(), None, "random"), seed=0)
    shards = {client: Shard(rows_of(scene, client), [], []) for client in scene.clients}
    federation = Federation(shards, {client: {} for client in shards}, NOTHING)
    settings = LocalSettings(lr=LR, steps=scene.steps, batch_size=1, **local)
    trainer = make_trainer(space, federation, settings, evaluator=Unasked(), num_rounds=1)
    return trainer, space.start()


def our_round(trainer: Trainer, start: Params, clients: Sequence[str]) -> Callable[[], Params]:
    """Return a round of some clients: bytes in, training, bytes out, mean."""
    sent = encode({"params": start})

    def run() -> Params:
        download = decode(sent)["params"]
        jobs = [Job(client, 1, derive(0, client), Fit(download)) for client in clients]
        replies = []
        for job, done in zip(jobs, trainer.run(jobs), strict=True):
            upload = decode(encode({"delta": sub(done.params, download)}))
            replies.append(Reply(job.client, upload, done.num_examples, done.metrics))
        return mean_upload(replies)["delta"]

    return run


class Peft:
    """The model with a PEFT adapter, and how plain loops move adapters in and out."""

    def __init__(self, scene: Scene) -> None:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), task_type="CAUSAL_LM"
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = get_peft_model(scene.model(), config)
        self.model.train()
        self.tuned = [p for p in self.model.parameters() if p.requires_grad]
        self.start = self.state()
        self.batches = {
            client: [
                (row.ids[None], torch.ones_like(row.ids[None]), row.labels[None])
                for row in rows_of(scene, client)
            ]
            for client in scene.clients
        }

    def state(self) -> dict[str, Tensor]:
        """Return a copy of the adapter."""
        from peft import get_peft_model_state_dict

        return {n: t.detach().clone() for n, t in get_peft_model_state_dict(self.model).items()}

    def load(self) -> None:
        """Go back to the start."""
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(self.model, self.start)

    def steps(self, client: str) -> None:
        """Take a client's steps, as anybody would write them."""
        optimizer = torch.optim.AdamW(self.tuned, lr=LR, weight_decay=0.0)
        for ids, mask, labels in self.batches[client]:
            self.model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(self.tuned, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    def client_round(self) -> dict[str, Tensor]:
        """Return the adapter after one client's steps."""
        self.load()
        self.steps(next(iter(self.batches)))
        return self.state()

    def round(self) -> Mapping[str, Tensor]:
        """Return the mean adapter of the clients one after another."""
        return self._mean(self.steps)

    def _mean(self, train: Callable[[str], None]) -> Mapping[str, Tensor]:
        ends = []
        for client in self.batches:
            self.load()
            train(client)
            ends.append(self.state())
        return {n: torch.stack([end[n] for end in ends]).mean(0) for n in self.start}


class Sft(Peft):
    """One TRL SFTTrainer per client and round, on rows tokenised beforehand."""

    def __init__(self, scene: Scene, folder: str) -> None:
        from datasets import Dataset, disable_progress_bars
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        disable_progress_bars()
        super().__init__(scene)
        words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=words, unk_token="<unk>", eos_token="</s>", pad_token="</s>"
        )
        self.folder, self.num_steps = folder, scene.steps
        self.rows = {
            client: Dataset.from_list(
                [
                    {
                        "input_ids": row.ids.tolist(),
                        "completion_mask": (row.labels != IGNORED).int().tolist(),
                    }
                    for row in rows_of(scene, client)
                ]
            )
            for client in scene.clients
        }

    def steps(self, client: str) -> None:
        """Take a client's steps."""
        from trl.trainer.sft_config import SFTConfig
        from trl.trainer.sft_trainer import SFTTrainer

        config = SFTConfig(
            output_dir=self.folder,
            max_steps=self.num_steps,
            per_device_train_batch_size=1,
            learning_rate=LR,
            lr_scheduler_type="constant",
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            completion_only_loss=True,
        )
        trainer = SFTTrainer(
            model=self.model,
            args=config,
            train_dataset=self.rows[client],
            processing_class=self.tokenizer,
        )
        with redirect_stdout(io.StringIO()):  # it prints its metrics, whatever it is told
            trainer.train()


def table(title: str, times: Mapping[str, Timing], of: str) -> None:
    """Print one row a candidate; ratios are against `of`."""
    print(f"\n{title}")
    print(f"{'':42s} {'CPU ms':>9s} {'IQR':>6s} {'x of ours':>10s}")
    for name, timing in times.items():
        ratio = times[of].ratio(timing)
        print(f"{name:42s} {timing.median * 1e3:9.1f} {timing.spread:6.1%} {ratio:10.2f}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (
        ("turns", None),
        ("steps", None),
        ("hidden", 256),
        ("layers", 4),
        ("length", 64),
        ("prompt", 32),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--model", default="", help="any model.name")
    parser.add_argument("--bfloat16", action="store_true", help="even where it is slow")
    asked = parser.parse_args()
    turns, steps = (
        asked.turns or (5 if asked.model else 7),
        asked.steps or (2 if asked.model else 4),
    )
    scene = Scene(asked.hidden, asked.layers, asked.length, steps, asked.prompt)
    torch.set_num_threads(1)
    print(about(("torch", "transformers", "peft", "trl", "fedloom")))
    if asked.model:
        on_a_model(replace(scene, name=asked.model), turns=turns, low=asked.bfloat16)
    else:
        on_a_random_llama(scene, turns=turns)


def on_a_random_llama(scene: Scene, *, turns: int) -> None:
    """Measure and print rounds of one client and of eight."""
    clients = scene.clients
    num_weights = sum(p.numel() for p in random_llama(scene.hidden, scene.layers).parameters())
    print(
        f"model     random Llama, {num_weights / 1e6:.1f} M weights; LoRA rank {RANK} on {', '.join(TARGETS)};"
        f" AdamW, clipping; {scene.steps} steps of 1 x {scene.length} tokens,"
        f" the last {scene.length - scene.prompt} learnt"
    )
    with quiet(), tempfile.TemporaryDirectory() as folder:
        plain = Peft(scene)
        one = {
            "fedloom": our_round(*ours(scene), clients[:1]),
            "fedloom, kernels reference, not batched": our_round(
                *ours(scene, kernels="reference", batched="off"), clients[:1]
            ),
            "bare PyTorch + PEFT loop": plain.client_round,
        }
        table("(a) a round of one client", paired(one, turns=3 * turns), "fedloom")
        cohort = {
            "fedloom": our_round(*ours(scene), clients),
            "fedloom, not batched": our_round(*ours(scene, batched="off"), clients),
            "PEFT, one client after another": plain.round,
            "TRL SFTTrainer per client and round": Sft(scene, folder).round,
        }
        table("(b) a round of 8 clients", paired(cohort, turns=turns), "fedloom")


def on_a_model(scene: Scene, *, turns: int, low: bool) -> None:
    """Measure and print a round of four clients on a real model."""
    base = scene.model()
    scene = replace(
        scene, clients=scene.clients[:4], vocabulary=base.get_input_embeddings().num_embeddings
    )
    print(
        f"model     {scene.name.rpartition('/')[2]}, {sum(p.numel() for p in base.parameters()) / 1e6:.1f} M weights;"
        f" LoRA rank {RANK} on {', '.join(TARGETS)}; AdamW, clipping; {scene.steps} steps of 1 x {scene.length} tokens,"
        f" the last {scene.length - scene.prompt} learnt"
    )
    del base
    native = _says_why_not_bfloat16(asked=low)
    half = replace(scene, dtype="bfloat16")
    trainers = {"fedloom, float32": ours(scene)}
    if native:
        trainers["fedloom, bfloat16 base"] = ours(half)
    with quiet(), tempfile.TemporaryDirectory() as folder:
        rounds: dict[str, Callable[[], object]] = {
            name: our_round(*made, scene.clients) for name, made in trainers.items()
        }
        rounds["PEFT, one client after another, float32"] = Peft(scene).round
        if native:
            rounds["PEFT, one client after another, bfloat16"] = Peft(half).round
        rounds["TRL SFTTrainer per client and round, float32"] = Sft(scene, folder).round
        times = paired(rounds, turns=turns)
    table("a round of 4 clients", times, "fedloom, float32")
    if native:
        table("the same", times, "fedloom, bfloat16 base")
    print("\nfrozen products: what they would take alone, each at the rate it has on its own")
    for name, (trainer, _) in trainers.items():
        alone = _products_alone(trainer, scene)
        print(
            f"{name:42s} kernels {alone.kernels}, {alone.gflop:.0f} GFLOP at {alone.gflop / alone.seconds:.0f}"
            f" GFLOP/s: {alone.seconds * 1e3:.0f} ms, {alone.seconds / times[name].median:.0%} of the round"
        )


@dataclass(frozen=True)
class Alone:
    """The frozen products of a round."""

    kernels: str
    gflop: float
    seconds: float


def _products_alone(trainer: Any, scene: Scene) -> Alone:
    """Time every shape of frozen product forwards and backwards, at the rows of a round's batches."""
    fast = trainer.sequential.fast
    rows = len(scene.clients) * scene.length
    learnt = len(scene.clients) * (scene.length - scene.prompt)
    shapes: dict[tuple[int, int, int], list[Any]] = {}
    for layer in fast.layers:
        height, width = layer.weight.shape
        at_once = min(learnt, CHUNK) if height == scene.vocabulary else rows
        shapes.setdefault((height, width, at_once), []).append(layer)
    gflop = seconds = 0.0
    for (height, width, at_once), layers in shapes.items():
        times = (learnt if height == scene.vocabulary else rows) / at_once * scene.steps
        product, dtype = fast.products[id(layers[0].module)], layers[0].weight.dtype
        x, g = (torch.randn(at_once, size).to(dtype) for size in (width, height))
        both = paired({"": lambda p=product, x=x, g=g: (p.forward(x), p.backward(g))}, turns=9)
        seconds += times * len(layers) * both[""].median
        gflop += times * len(layers) * 4 * at_once * height * width / 1e9
    return Alone(fast.kernels, gflop, seconds)


def _says_why_not_bfloat16(*, asked: bool) -> bool:
    """Return whether bfloat16 is measured; where this CPU is slow at it, say so."""
    low, high = (native(dtype) for dtype in (torch.bfloat16, torch.float32))
    named = f"{low:.0f} GFLOP/s in bfloat16, {high:.0f} in float32"
    if low < high and not asked:
        print(f"bfloat16  left out: this CPU makes {named}; --bfloat16 measures it all the same")
        return False
    print(f"products  {named}, 256 x 512 x 512, both directions")
    return True


if __name__ == "__main__":
    main()
