"""What a head costs that is not copied for packed products: rounds of a cohort, beside those that keep a copy a direction.

    python benchmarks/head.py --model FILE [--turns 7] [--steps 2] [--length 64] [--prompt 32]

A round of four clients, of `round.py`, on one model, whose head alone is multiplied in other ways: packed for both directions,
by oneDNN with the weight as it is, and by torch. Rows of logits at a time as with packed products, and twice as many, as it is done.
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedloom.client.cohort import Cohort
from fedloom.client.fast.products import PackedProduct, TorchProduct, UnpackedProduct
from fedloom.objectives.head import Product
from round import Scene, our_round, ours
from timing import about, paired

WAYS: Mapping[str, tuple[Callable[[Tensor], Product], int]] = {
    "no copy": (UnpackedProduct, 1),
    "no copy, twice the rows": (UnpackedProduct, 2),
    "a copy a direction": (PackedProduct, 1),
    "torch's own": (TorchProduct, 1),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="any model.name")
    for name, default in (("turns", 7), ("steps", 2), ("length", 64), ("prompt", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    scene = Scene(0, 0, asked.length, asked.steps, asked.prompt, name=asked.model)
    scene = replace(scene, clients=scene.clients[:4], vocabulary=1000)
    trainer, start = ours(scene, kernels="onednn")
    assert isinstance(trainer, Cohort)
    fast = trainer.sequential.fast
    model: Any = trainer.sequential.setup.space.model
    weight = model.get_output_embeddings().weight.detach()

    def taking(made: Callable[[Tensor], Product], times: int) -> Callable[[], object]:
        forward = replace(fast.forward, product=made(weight), times=times)
        alone = replace(trainer.sequential, fast=replace(fast, forward=forward))
        return our_round(replace(trainer, sequential=alone), start, scene.clients)

    times = paired({name: taking(*way) for name, way in WAYS.items()}, turns=asked.turns)
    print(about(("torch", "transformers", "fedloom")))
    print(
        f"model     {Path(asked.model).name}, head of {weight.shape[0]:,} x {weight.shape[1]:,}; LoRA rank 8 on q_proj, v_proj;"
        f" AdamW, clipping; {asked.steps} steps of 4 clients x 1 row of {asked.length} tokens, the last"
        f" {asked.length - asked.prompt} learnt; kernels onednn\n"
    )
    print(f"{'the head':38s} {'CPU ms':>9s} {'IQR':>6s} {'x of no copy':>13s} {'copies, MB':>11s}")
    for name, timing in times.items():
        copies = 2 * weight.nbytes / 1e6 if WAYS[name][0] is PackedProduct else 0.0
        ratio = times["no copy"].ratio(timing)
        print(
            f"{name:38s} {timing.median * 1e3:9.1f} {timing.spread:6.1%} {ratio:13.3f} {copies:11.0f}"
        )


if __name__ == "__main__":
    main()
