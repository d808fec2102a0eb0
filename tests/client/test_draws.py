"""How often the weights of a walk are drawn and passed over, counted as it walks."""

from collections import Counter

import numpy as np
import pytest

from fedloom.spaces.directions import kernels, lowrank
from fedloom.spaces.seed_space import Seeds

STEPS = 4


@pytest.fixture
def drawn(monkeypatch):
    """Return how many deviates were drawn, and how many bytes of weights and scratch were read and written."""
    seen: Counter[str] = Counter()
    add, fill = kernels.add, kernels.fill

    def elements(draw):
        return int(np.sum(draw.pieces[:, 3]))

    def watched_add(draw, base, out, by, **more):
        touched = base.element_size() * (2 if more.get("moves") else 1) + out.element_size()
        seen["draws"] += elements(draw) * len(draw.keys)
        seen["bytes"] += elements(draw) * touched if len(draw.keys) else 0
        add(draw, base, out, by, **more)

    def watched_fill(draw, out):
        seen["factors"] += elements(draw) * len(draw.keys)
        fill(draw, out)

    monkeypatch.setattr(kernels, "add", watched_add)
    monkeypatch.setattr(lowrank, "fill", watched_fill)
    return seen


def walked(bench, model, distribution):
    tune = Seeds(distribution=distribution)
    one = bench(model=model, tune=tune, optimizer="sgd", lr=1e-4, steps=STEPS)
    table = model.get_input_embeddings().weight.numel()
    return one, one.space.values.numel(), table


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher", "popcount"])
def test_a_step_draws_a_weight_three_times_and_moves_five_values_of_it(
    bench, tiny_llama, drawn, distribution
):
    """Counted: both looks draw, and the step as the next look reads.

    A pass reads and writes; that which takes a step also writes what it moved. Two draws are for who has the activations
    of both looks at once.
    """
    one, numel, table = walked(bench, tiny_llama(), distribution)
    one.fit(["c1"])
    kept = numel - table
    # A look reads the rows of an embedding that occur, at most all.
    assert 3 * STEPS * kept + STEPS * table <= drawn["draws"] <= 3 * STEPS * numel
    # The last step is taken by itself; an embedding moves before its rows are read.
    assert drawn["bytes"] <= 4 * ((5 * STEPS + 1) * kept + 6 * STEPS * table)


def test_a_low_rank_step_draws_the_factors_once(bench, tiny_llama, drawn):
    """Counted: those of a look serve the other one, and the step."""
    one, numel, _ = walked(bench, tiny_llama(), "lowrank")
    one.fit(["c1"])
    shapes = [p.shape for p in one.space.tensors.values() if p.ndim > 1]
    assert drawn["factors"] == STEPS * sum(sum(shape) for shape in shapes)
    assert drawn["factors"] < STEPS * numel / 10
