"""Ratios on one thread, process CPU time, medians of turns taken one after another."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from fedloom.client.fast.products import PackedProduct, TorchProduct, fastest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.alone,
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # PEFT calls what transformers renames
]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return benchmarks/round.py as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("round")


def gain_of_packing(benchmark: Any) -> float:
    """Return how much faster oneDNN multiplies here, at the sizes of the model."""
    if fastest(torch.float32, copies=2) == "torch":
        return 1.0
    noise = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(rows, 256, generator=noise) for rows in (672, 512))
    plain, packed = TorchProduct(weight), PackedProduct(weight)
    products = {
        "packed": lambda: [packed.forward(x) for _ in range(8)],
        "plain": lambda: [plain.forward(x) for _ in range(8)],
    }
    times = benchmark.paired(products, turns=15)
    ratio: float = times["packed"].ratio(times["plain"])
    return ratio


def test_a_batched_cohort_is_faster_than_its_clients_one_by_one_with_peft(benchmark):
    """Eight clients, batch 1, 64 tokens, 4.2 M weights."""
    scene = benchmark.Scene(hidden=256, layers=4, length=64, steps=2, prompt=1)
    ours = benchmark.our_round(*benchmark.ours(scene), benchmark.CLIENTS)
    candidates = {"ours": ours, "peft": benchmark.Peft(scene).round}
    times = benchmark.paired(candidates, turns=7)
    bound = 1.7 if gain_of_packing(benchmark) > 1.4 else 1.15
    assert times["ours"].ratio(times["peft"]) >= bound


def test_a_client_round_costs_no_more_than_a_bare_loop(benchmark):
    """With the model's own forward on both sides, so that what is left is overhead; the promise is 5 %."""
    scene = benchmark.Scene(hidden=256, layers=4, length=64, steps=4, prompt=1)
    trainer = benchmark.ours(scene, kernels="reference", batched="off")
    ours = benchmark.our_round(*trainer, benchmark.CLIENTS[:1])
    times = benchmark.paired({"ours": ours, "peft": benchmark.Peft(scene).client_round}, turns=15)
    assert times["peft"].ratio(times["ours"]) <= 1.10


def test_cores_between_frozen_factors_are_faster_in_one_batch(benchmark):
    """LoRA-XS, which Fed-SB trains, on all linear layers; measured 1.8."""
    kinds = importlib.import_module("cohort_kinds")
    scene = benchmark.Scene(hidden=256, layers=2, length=64, steps=1, prompt=1)
    rounds = {
        batched: benchmark.our_round(*kinds.trainer_of("LoRA-XS", scene, batched), scene.clients)
        for batched in ("auto", "off")
    }
    times = benchmark.paired(rounds, turns=7)
    assert times["auto"].ratio(times["off"]) >= 1.3
