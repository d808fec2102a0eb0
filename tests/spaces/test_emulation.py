"""How far an emulator is from what it stands in for."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

from fedloom.core.emulation import Distance
from fedloom.models.build import Base
from fedloom.server.optimizers import AdamW
from fedloom.spaces.emulation import gradient
from fedloom.spaces.lora import LoRA
from fedloom.spaces.offsite import Offsite, OffsiteSpace
from fedloom.testing.bench import rows

EXAMPLES = rows(0, 6)


def space_of(model: Any) -> OffsiteSpace:
    base = Base(model.requires_grad_(False), None, "a/model")
    return Offsite(left=1, right=1, factors=4, adapter=LoRA(rank=2)).make_space(base, seed=1)


@pytest.mark.parametrize("match", ["l2", "cosine", "layers"])
@pytest.mark.parametrize(("hidden", "kd"), [(1.0, 0.0), (0.0, 1.0), (0.5, 2.0)])
def test_the_gradient_is_the_slope_of_the_distance(
    match: Any, hidden: float, kd: float, tiny_llama: Callable[..., Any]
) -> None:
    space = space_of(tiny_llama(layers=6, dtype=torch.float64))
    distance = Distance(match, hidden, kd, temperature=2.0)
    draw = torch.Generator().manual_seed(0)
    way = {
        n: torch.randn(t.shape, generator=draw) for n, t in space.split(space.start())[1].items()
    }
    start = {
        n: t.double() + 0.05 * torch.randn(t.shape, generator=draw)
        for n, t in space.start().items()
    }

    def at(step: float) -> float:
        params = {**start, **{n: start[n] + step * w for n, w in way.items()}}
        _, parts = gradient(space, params, EXAMPLES, distance)
        return hidden * parts["hidden"] + kd * parts["kl"]

    slope, _ = gradient(space, start, EXAMPLES, distance)
    expected = (at(1e-3) - at(-1e-3)) / 2e-3
    found = sum(float((slope[n] * w).sum()) for n, w in way.items())
    assert found == pytest.approx(expected, rel=1e-2, abs=1e-6)
    assert expected != 0


def test_twenty_steps_lessen_the_distance_each_time_and_no_divergence_is_negative(
    tiny_llama: Callable[..., Any],
) -> None:
    space = space_of(tiny_llama(layers=8))
    # A middle that does something: what random layers add is small beside what they are given.
    with space.whole(), torch.no_grad():
        for number in range(1, 7):
            space.model.get_parameter(f"model.layers.{number}.mlp.down_proj.weight").mul_(8)
    params, optimizer = space.start(), AdamW(5e-3, weight_decay=0.0)
    factors = space.split(params)[1]
    moments, told = optimizer.init(factors), list[Any]()
    for _ in range(21):
        slope, parts = gradient(space, {**params, **factors}, EXAMPLES, Distance("l2", 1, 1, 1))
        told.append(parts)
        down = {n: -g for n, g in slope.items()}
        factors, moments = optimizer.step(factors, down, moments)
    hidden = [parts["hidden"] for parts in told]
    assert all(later < earlier for earlier, later in pairwise(hidden))
    assert hidden[-1] < 0.7 * hidden[0]
    assert all(parts["kl"] >= 0 for parts in told)


def test_an_emulator_that_drops_nothing_has_no_distance(tiny_llama: Callable[..., Any]) -> None:
    base = Base(tiny_llama(layers=6).requires_grad_(False), None, "a/model")
    space = Offsite(left=1, right=1, drop=0.0, factors=4).make_space(base, seed=1)
    _, parts = gradient(space, space.start(), EXAMPLES, Distance("layers", 1, 1, 1))
    assert parts == {"hidden": 0.0, "kl": 0.0}


def test_rows_that_share_a_batch_are_as_if_alone(tiny_llama: Callable[..., Any]) -> None:
    """Padding is in no distance, and each token counts once."""
    space = space_of(tiny_llama(layers=6))
    distance = Distance("cosine", 1, 1, 1)
    _, both = gradient(space, space.start(), EXAMPLES[:2], distance)
    each = [gradient(space, space.start(), [row], distance)[1] for row in EXAMPLES[:2]]
    lengths = [len(row.ids) for row in EXAMPLES[:2]]
    assert lengths[0] != lengths[1]
    mean = sum(n * parts["hidden"] for n, parts in zip(lengths, each, strict=True)) / sum(lengths)
    assert both["hidden"] == pytest.approx(mean, abs=1e-6)
    asked = [row.num_targets for row in EXAMPLES[:2]]
    mean = sum(n * parts["kl"] for n, parts in zip(asked, each, strict=True)) / sum(asked)
    assert both["kl"] == pytest.approx(mean, abs=1e-6)
