"""A zeroth-order step beside the two forwards it is made of: time and memory.

    python benchmarks/zo_step.py [--turns 7] [--steps 4] [--hidden 512] [--layers 8] [--rows 8] [--length 64]
    python benchmarks/zo_step.py --model FILE.gguf [--dtype bfloat16] [--quantize int8] [--turns 3] [--steps 2]

(a) CPU time of a client's steps, everything included: batches, the copy of the start, the looks along a direction and
the step along it. Beside them as many pairs of forwards of the same model, as transformers has them ("plain") and with
our products and loss ("ours"), and steps as MeZO's code takes them: weights shifted in place and back, drawn by
`torch.normal`. Two plain forwards and four such passes bound what any exact step can gain on it.

(b) memory, each candidate in a process of its own: the most that was resident while it worked (VmHWM of Linux, reset
before), less what was resident before the model was made. The walk's is set against that of plain forwards and the
largest tensor. Both processes import the same; the base model that a walk starts from lies in a file.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import psutil
import torch
from torch import Tensor

from fedloom.client.fast.kernels import make_fast
from fedloom.client.local_settings import LocalSettings
from fedloom.client.make_trainer import make_trainer
from fedloom.core.protocols import Fit, Job
from fedloom.core.randomness import generator
from fedloom.data.federation import Federation, Shard
from fedloom.data.manifest import Manifest
from fedloom.data.tokens import Example
from fedloom.models.build import Base, ModelSettings
from fedloom.models.hf_logging import quiet
from fedloom.spaces.seed_space import Seeds
from scenery import VOCABULARY, Unasked, model_from, random_llama
from timing import about, paired

DISTRIBUTIONS = ("rademacher", "popcount", "gaussian", "lowrank")
EPS, LR = 5e-4, 1e-6
NOTHING = Manifest("", "random", "iid", None, 0, 0, 0, 0, 0, 0, 0, {})
PLAIN = "two forwards, transformers"
OURS = "two forwards, our products and loss"
"""The fastest forwards there are here."""
MEZO = "step, MeZO's code"
STEP = "step, fedloom, "


@dataclass(frozen=True)
class Scene:
    """Sizes of everything."""

    hidden: int
    layers: int
    rows: int
    length: int
    steps: int
    model: str | None = None
    """As `model.name` has it; None: a random Llama of these sizes."""
    dtype: Any = "float32"
    quantize: Any = "none"

    def make(self) -> Any:
        """Return the model, fresh."""
        if self.model is None:
            return random_llama(self.hidden, self.layers)
        return model_from(
            ModelSettings(name=self.model, dtype=self.dtype, quantize=self.quantize, device="cpu")
        )

    @property
    def tokens(self) -> int:
        """Return the tokens of a step."""
        return self.rows * self.length


def ids_of(scene: Scene) -> Tensor:
    """Return the tokens of one step, (rows, length)."""
    shape = (scene.rows, scene.length)
    return torch.randint(0, VOCABULARY, shape, generator=generator(0, "rows"))


def walk(scene: Scene, distribution: Any) -> Callable[[], object]:
    """Return a client's work: some steps along directions of a distribution."""
    base = Base(scene.make(), None, "random")
    space = Seeds(distribution=distribution).make_space(base, seed=0)
    rows = [Example(row, row.clone(), 1) for row in ids_of(scene)]
    federation = Federation({"one": Shard(rows, [], [])}, {"one": {}}, NOTHING)
    local = LocalSettings(optimizer="sgd", lr=LR, steps=scene.steps, batch_size=scene.rows, eps=EPS)
    trainer = make_trainer(space, federation, local, evaluator=Unasked(), num_rounds=1)
    start = space.start()
    return lambda: trainer.run([Job("one", 1, 0, Fit(start))])


def plain_forwards(scene: Scene) -> Callable[[], object]:
    """Return as many pairs of forwards of the model."""
    model, ids = scene.make(), ids_of(scene)

    def run() -> None:
        with torch.inference_mode():
            for _ in range(2 * scene.steps):
                model(input_ids=ids, labels=ids, use_cache=False).loss.item()

    return run


def our_forwards(scene: Scene) -> Callable[[], object]:
    """Return the same with the products and the loss of a walk."""
    model, ids = scene.make(), ids_of(scene)
    fast = make_fast(model, LocalSettings(), moving=True)
    rows = [Example(row, row.clone(), 1) for row in ids]

    def run() -> None:
        with torch.no_grad(), fast.installed():
            for _ in range(2 * scene.steps):
                (batch,) = fast.batches([rows], len(rows), torch.empty(0))
                fast.losses(batch).item()

    return run


def mezo(scene: Scene) -> Callable[[], object]:
    """Return steps as MeZO's code takes them."""
    model, ids = scene.make(), ids_of(scene)

    def shift(seed: int, by: float) -> None:
        torch.manual_seed(seed)
        for p in model.parameters():
            p.data = p.data + by * torch.normal(0, 1, p.data.shape, dtype=p.dtype)

    def loss() -> float:
        out: float = model(input_ids=ids, labels=ids, use_cache=False).loss.item()
        return out

    def run() -> None:
        with torch.random.fork_rng(), torch.inference_mode():
            for seed in range(scene.steps):
                shift(seed, EPS)
                ahead = loss()
                shift(seed, -2 * EPS)
                behind = loss()
                shift(seed, EPS)
                shift(seed, -LR * (ahead - behind) / (2 * EPS))

    return run


WORK: Mapping[str, Callable[[Scene], Callable[[], object]]] = {
    PLAIN: plain_forwards,
    OURS: our_forwards,
    MEZO: mezo,
    **{
        f"{STEP}{distribution}": partial(walk, distribution=distribution)
        for distribution in DISTRIBUTIONS
    },
}


def possible(scene: Scene, name: str) -> bool:
    """Return whether a candidate can work on such weights: of integers only a product beside them can."""
    return scene.quantize == "none" or name in (PLAIN, OURS) or name.endswith("lowrank")


def peak(scene: Scene, name: str) -> int:
    """Return the most bytes resident while a candidate worked, from a process of its own."""
    told = json.dumps({"scene": asdict(scene), "name": name})
    command = [sys.executable, __file__, "--child", told]
    # What is freed goes back at once, so that what is resident is what is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return int(done.stdout)


def child(told: Mapping[str, Any]) -> None:
    """Do one candidate's work and print its peak, in bytes."""
    torch.set_num_threads(1)
    small = Scene(64, 1, 2, 16, 2)
    for make in (plain_forwards, WORK[told["name"]]):
        make(small)()  # imports and compiles
    before = psutil.Process().memory_info().rss
    work = WORK[told["name"]](Scene(**told["scene"]))
    work()
    Path("/proc/self/clear_refs").write_text("5")
    work()
    status = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in status if line.startswith("VmHWM"))
    print(int(line.split()[1]) * 1024 - before)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (
        ("turns", 7),
        ("steps", 4),
        ("hidden", 512),
        ("layers", 8),
        ("rows", 8),
        ("length", 64),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--model", help="as model.name has it; random otherwise")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--quantize", default="none")
    parser.add_argument(
        "--laws", nargs="+", default=DISTRIBUTIONS, help="distributions of fedloom's steps"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        child(json.loads(asked.child))
        return
    scene = Scene(
        asked.hidden,
        asked.layers,
        asked.rows,
        asked.length,
        asked.steps,
        asked.model,
        asked.dtype,
        asked.quantize,
    )
    torch.set_num_threads(1)
    print(about(("torch", "transformers", "numba", "fedloom")))
    named = dict(scene.make().named_parameters())
    weights = {name: p.nbytes for name, p in named.items()}
    held = scene.dtype if scene.quantize == "none" else scene.quantize
    print(
        f"model     {Path(scene.model).name if scene.model else 'random Llama'},"
        f" {sum(p.numel() for p in named.values()) / 1e6:.1f} M weights in {held};"
        f" {scene.steps} steps of {scene.tokens} tokens, all learnt\n"
    )
    del named
    candidates = {
        name: make
        for name, make in WORK.items()
        if possible(scene, name) and (not name.startswith(STEP) or name.split()[-1] in asked.laws)
    }
    with quiet():
        times = paired({name: make(scene) for name, make in candidates.items()}, turns=asked.turns)
    print(
        f"{'(a) a step':42s} {'CPU ms':>9s} {'IQR':>6s} {'x plain':>8s} {'x ours':>8s} {'MeZO x':>8s}"
    )
    for name, timing in times.items():
        columns = f"{times[PLAIN].ratio(timing):8.2f} {times[OURS].ratio(timing):8.2f}"
        if MEZO in times:
            columns += f" {timing.ratio(times[MEZO]):8.2f}"
        each = timing.median * 1e3 / scene.steps
        print(f"{name:42s} {each:9.1f} {timing.spread:6.1%} {columns}")
    print(f"\n{'(b) memory':42s} {'MB':>9s} {'x of forwards and largest tensor':>34s}")
    forwards = peak(scene, PLAIN)
    largest = max(weights.values())
    for name in candidates:
        most = forwards if name == PLAIN else peak(scene, name)
        print(f"{name:42s} {most / 1e6:9.1f} {most / (forwards + largest):34.3f}")


if __name__ == "__main__":
    main()
