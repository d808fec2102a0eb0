"""What a batch of clients saves, by what is tuned: a cohort's round in one batch beside the same clients one by one.

    python benchmarks/cohort_kinds.py [--turns 9] [--hidden 256] [--layers 4] [--length 64] [--steps 2] [--kinds LoRA LoRA-XS]

The round of `round.py`, eight clients at batch 1 on a random Llama, on all linear layers of it (IA3 and VeRA: on those PEFT
chooses for them). Both sides have the same kernels, so that what is left is the batch.
"""

import argparse
from collections.abc import Mapping
from typing import Literal

import torch

from fedloom.client.cohort import Cohort
from fedloom.client.local_settings import LocalSettings
from fedloom.client.make_trainer import make_trainer
from fedloom.core.protocols import Params, Trainer
from fedloom.data.federation import Federation, Shard
from fedloom.models.build import Base
from fedloom.spaces.lora import LoRA
from fedloom.spaces.lora_xs import LoRAXS
from fedloom.spaces.scaling_vectors import IA3, VeRA
from fedloom.spaces.tune import Tune
from round import LR, NOTHING, Scene, Unasked, our_round, rows_of
from timing import about, paired

KINDS: Mapping[str, Tune] = {
    "LoRA": LoRA(rank=8, targets="all-linear"),
    "LoRA-XS": LoRAXS(rank=16, targets="all-linear"),
    "LoRA-XS, q and v": LoRAXS(rank=16, targets=["q_proj", "v_proj"]),
    "IA3": IA3(),
    "VeRA": VeRA(rank=64),
}


def trainer_of(kind: str, scene: Scene, batched: Literal["auto", "off"]) -> tuple[Trainer, Params]:
    """Return a trainer of clients that tune this, and the start of its space."""
    space = KINDS[kind].make_space(Base(scene.model(), None, "random"), seed=0)
    shards = {client: Shard(rows_of(scene, client), [], []) for client in scene.clients}
    federation = Federation(shards, {client: {} for client in shards}, NOTHING)
    settings = LocalSettings(lr=LR, steps=scene.steps, batch_size=1, batched=batched)
    trainer = make_trainer(space, federation, settings, evaluator=Unasked(), num_rounds=1)
    assert isinstance(trainer, Cohort) == (batched == "auto")
    return trainer, space.start()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = (("turns", 9), ("hidden", 256), ("layers", 4), ("length", 64), ("steps", 2))
    for name, default in sizes:
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    scene = Scene(asked.hidden, asked.layers, asked.length, asked.steps, 1)
    print(about(("torch", "peft", "fedloom")))
    print(
        f"model     random Llama, hidden {asked.hidden}, {asked.layers} layers; AdamW, clipping; 8 clients x {asked.steps} steps of"
        f" 1 x {asked.length} tokens, all but one learnt\n"
    )
    print(f"{'tuned':18s} {'one batch, ms':>14s} {'one by one, ms':>15s} {'x':>6s}", flush=True)
    for kind in asked.kinds:
        together, one_by_one = trainer_of(kind, scene, "auto"), trainer_of(kind, scene, "off")
        rounds = {
            "batch": our_round(*together, scene.clients),
            "alone": our_round(*one_by_one, scene.clients),
        }
        times = paired(rounds, turns=asked.turns)
        batch, alone = times["batch"], times["alone"]
        print(
            f"{kind:18s} {batch.median * 1e3:14.1f} {alone.median * 1e3:15.1f} {batch.ratio(alone):6.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
