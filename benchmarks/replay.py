"""A model rebuilt from seeds and scalars, w + sum_k c_k z_k, beside the loop FedKSeed's authors run.

    python benchmarks/replay.py [--turns 5] [--weights 4] [--directions 64] [--threads 1] [--model FILE.gguf]

With --model the tensors are that model's, a table (c) says what a whole pool takes, and (b) is left out.

(a) nanoseconds a weight and direction, every distribution against `torch.manual_seed`, `torch.normal` of each tensor and
`param.data - lr * (c * z)`, which draws normal deviates; gaussian draws the same distribution, the others do not. CPU time on
one thread; wall time on more, which only a quiet machine tells. (b) the error of what was added, against float64.
"""

import argparse
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fedloom.core.randomness import generator
from fedloom.models.build import ModelSettings, shapes_only
from fedloom.spaces.directions import kernels, reference
from fedloom.spaces.directions.directions import Directions
from fedloom.spaces.directions.stream import Distribution
from timing import Timing, about, paired

POOL = 4096
SHAPE = torch.Size((1024, 1024))
OFFICIAL = "official loop, float32"
TARGETS: dict[Distribution, tuple[float, float]] = {
    "gaussian": (4, 8),
    "popcount": (12, 25),
    "rademacher": (100, 100),
    "lowrank": (100, 100),
}
"""Times faster than the official loop, on one thread and on two, with AVX-512."""


def official(parts: list[Tensor], scalars: list[float]) -> Callable[[], None]:
    """Return the authors' replay, as they write it (mezo_optimizer.py, server.py)."""

    def run() -> None:
        for seed, scalar in enumerate(scalars):
            torch.manual_seed(seed)
            for at, part in enumerate(parts):
                z = torch.normal(mean=0, std=1, size=part.shape, dtype=part.dtype)
                parts[at] = part - 1e-6 * (scalar * z)

    return run


def ours(directions: Directions, num: int) -> Callable[[], Tensor]:
    """Return a rebuild along `num` directions."""
    base = torch.zeros(directions.numel)
    out = torch.empty_like(base)
    coefficients = torch.randn(num, dtype=torch.float64, generator=generator(0)) * 1e-5
    return lambda: directions.rebuild(base, coefficients, out=out)


def with_numpy(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Return the same without compiled kernels."""

    def plain() -> Tensor:
        compiled = kernels.on_cpu
        kernels.on_cpu = lambda: reference  # type: ignore[assignment]  # put back below
        try:
            return run()
        finally:
            kernels.on_cpu = compiled

    return plain


def speed(asked: argparse.Namespace) -> None:
    """Print table (a)."""
    shapes = shapes_of(asked)
    numel = sum(shape.numel() for shape in shapes.values())
    few = max(2, asked.directions // 4)
    counts = {OFFICIAL: 2}
    runs: dict[str, Callable[[], object]] = {
        OFFICIAL: official([torch.zeros(shape) for shape in shapes.values()], [0.5, -0.5])
    }
    for distribution in TARGETS:
        count = asked.directions if distribution in ("rademacher", "lowrank") else few
        counts[distribution], runs[distribution] = (
            count,
            ours(Directions(shapes, distribution=distribution), count),
        )
    counts["rademacher without numba"] = 2
    runs["rademacher without numba"] = with_numpy(
        ours(Directions(shapes, distribution="rademacher"), 2)
    )
    clock = time.process_time if asked.threads == 1 else time.perf_counter
    times = paired(runs, turns=asked.turns, clock=clock)
    print(f"\n(a) {numel / 1e6:.1f} M weights, ns a weight and direction")
    print(f"{'':28s} {'directions':>10s} {'ns':>9s} {'IQR':>6s} {'x faster':>9s} {'target':>7s}")
    for name, timing in times.items():
        each = timing.median / numel / counts[name] * 1e9
        ratio = per_direction(times, counts, name)
        target = dict[str, tuple[float, float]](TARGETS).get(name)
        wanted = f"{target[asked.threads > 1]:7.0f}" if target else ""
        print(
            f"{name:28s} {counts[name]:10d} {each:9.4f} {timing.spread:6.1%} {ratio:9.1f} {wanted}"
        )


def pool(asked: argparse.Namespace) -> None:
    """Print table (c): what grows with directions, and what does not, from two numbers of them."""
    shapes = shapes_of(asked)
    print(
        f"\n(c) CPU seconds of a pool of {POOL:,} directions, on one thread, and of a tenth of it"
    )
    for distribution in TARGETS:
        counts = (2, 8) if distribution in ("gaussian", "popcount") else (64, 576)
        directions, seconds = Directions(shapes, distribution=distribution), list[float]()
        for count in counts:
            run = ours(directions, count)
            run()
            began = time.process_time()
            run()
            seconds.append(time.process_time() - began)
        each = (seconds[1] - seconds[0]) / (counts[1] - counts[0])
        once = seconds[0] - counts[0] * each
        print(f"{distribution:28s} {once + POOL * each:9.1f} {once + POOL / 10 * each:9.1f}")


def shapes_of(asked: argparse.Namespace) -> dict[str, torch.Size]:
    """Return the tensors that are rebuilt."""
    if not asked.model:
        return {f"layer {i}": SHAPE for i in range(asked.weights)}
    model = shapes_only(ModelSettings(name=asked.model))
    return {name: p.shape for name, p in model.named_parameters()}


def per_direction(times: Mapping[str, Timing], counts: Mapping[str, int], name: str) -> float:
    """Return how many times longer the official loop takes, a direction, turn by turn."""
    ratio = times[name].ratio(times[OFFICIAL])
    return ratio * counts[name] / counts[OFFICIAL]


def accuracy() -> None:
    """Print table (b): 256 directions of weights about 0.02, coefficients about 1e-5 and 1e-4."""
    num, shape = 256, torch.Size((256, 512))
    base = torch.randn(shape.numel(), generator=generator(0, "base")) * 0.02
    print(f"\n(b) error of what {num} directions add, as a share of it")
    print(f"{'':36s} {'c ~ 1e-5':>9s} {'c ~ 1e-4':>9s}")
    kinds = (torch.float32, torch.float16, torch.bfloat16)
    rows: dict[str, list[float]] = {}
    for size in (1e-5, 1e-4):
        scalars = torch.randn(num, dtype=torch.float64, generator=generator(0, "c")) * size
        for kind in kinds:
            start = base.to(kind)
            exact, moved = start.double(), start
            for seed in range(num):
                torch.manual_seed(seed)
                z = torch.normal(mean=0, std=1, size=start.shape, dtype=kind)
                exact = exact + scalars[seed] * z.double()
                moved = moved + float(scalars[seed]) * z
            rows.setdefault(f"official loop, {name_of(kind)}", []).append(off(moved, exact, start))
            for distribution in TARGETS:
                directions = Directions({"w": shape}, distribution=distribution)
                exact = start.double()
                for k in range(num):
                    exact = exact + scalars[k] * directions.z("w", k).reshape(-1).double()
                moved = directions.rebuild(start, scalars, out=torch.empty_like(start))
                rows.setdefault(f"{distribution}, {name_of(kind)}", []).append(
                    off(moved, exact, start)
                )
    for name, errors in rows.items():
        print(f"{name:36s} " + " ".join(f"{error:9.1e}" for error in errors))


def off(moved: Tensor, exact: Tensor, start: Tensor) -> float:
    """Return |moved - exact| as a share of |exact - start|."""
    return float((moved.double() - exact).norm() / (exact - start.double()).norm())


def name_of(kind: torch.dtype) -> str:
    """Return float32 of torch.float32."""
    return str(kind).removeprefix("torch.")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("turns", 5), ("weights", 4), ("directions", 64), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--model", help="as model.name has it")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    print(about(("torch", "numba", "llvmlite", "numpy", "fedloom"), threads=asked.threads))
    speed(asked)
    torch.set_num_threads(1)
    if asked.model:
        pool(asked)
    else:
        accuracy()


if __name__ == "__main__":
    main()
