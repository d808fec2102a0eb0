"""What is on disk of rebuilt points: it saves work, and moves no bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedloom.core.randomness import generator
from fedloom.core.seed_sequences import COEFFICIENTS
from fedloom.models.build import Base
from fedloom.models.quantized import quantize_
from fedloom.models.schemes import SCHEMES
from fedloom.spaces import rebuilds
from fedloom.spaces.directions import kernels
from fedloom.spaces.directions.directions import Directions
from fedloom.spaces.directions.lowrank import Factors
from fedloom.spaces.seed_space import BASE, Seeds, SeedSpace

INTEGER, REAL = ("rademacher", "popcount"), ("gaussian", "lowrank")
NUM = 24


@pytest.fixture
def space(tiny_llama: Callable[..., Any]) -> Callable[..., SeedSpace]:
    """Return a maker: `space("rademacher", dtype=torch.float32, decays=False)`."""

    def make(
        distribution: Any, dtype: torch.dtype = torch.float32, decays: bool = False
    ) -> SeedSpace:
        base: Any = Base(tiny_llama().to(dtype).requires_grad_(False), None, "random")
        tune = Seeds(num_seeds=NUM, distribution=distribution)
        return tune.make_space(base, seed=1, decays=decays)

    return make


def point(name: str, *, size: float = 1e-3, changed: int = NUM) -> dict[str, torch.Tensor]:
    """Return coefficients, of which the first so many are a point's own."""
    shared = torch.randn(NUM, generator=generator(0, "shared"), dtype=torch.float64)
    shared[:changed] = torch.randn(changed, generator=generator(0, name), dtype=torch.float64)
    return {COEFFICIENTS: shared * size}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return how many directions each sum of a first piece was taken over."""
    seen: list[int] = []
    plain = kernels.add_exact

    def watched(draw: Any, *args: Any, **kwargs: Any) -> None:
        seen.append(len(draw.keys))
        plain(draw, *args, **kwargs)

    monkeypatch.setattr(kernels, "add_exact", watched)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("distribution", INTEGER)
def test_an_update_by_what_changed_has_the_bits_of_a_sum_from_nothing(
    space: Any, drawn: list[int], distribution: str, dtype: torch.dtype
) -> None:
    one = space(distribution, dtype)
    for name, changed in (("a", 0), ("b", 3), ("c", 2), ("a", NUM), ("d", 1)):
        params = point(name, changed=changed)
        drawn.clear()
        one.load(params)
        assert max(drawn) == {"a": NUM, "b": 3, "c": 2, "d": 1}[name]
        fresh = space(distribution, dtype)
        plain = fresh.directions.rebuild(
            fresh.values, params[COEFFICIENTS], out=torch.empty_like(fresh.values)
        )
        assert torch.equal(one.values, plain)
    if dtype == torch.bfloat16:
        wide = fresh.directions.rebuild(
            space(distribution, dtype).values,
            params[COEFFICIENTS],
            out=torch.empty(one.values.shape),
        )
        assert torch.equal(one.wide(params), wide)


@pytest.mark.parametrize("distribution", INTEGER)
def test_sums_too_large_for_32_bits_follow_smaller_ones(space: Any, distribution: str) -> None:
    one, other = space(distribution), space(distribution)
    for size in (1e-3, 10.0, 1e-4):
        one.load(point("a", size=size))
    one.load(point("b", size=10.0, changed=2))
    other.load(point("b", size=10.0, changed=2))
    assert torch.equal(one.values, other.values)


@pytest.mark.parametrize("distribution", INTEGER)
def test_sums_beyond_float64_are_refused_on_every_way_there(space: Any, distribution: str) -> None:
    one = space(distribution)
    near, far = (point("a")[COEFFICIENTS] for _ in range(2))
    near[0], far[:2] = 2.0**19, torch.tensor([2.0**19, 2.0**23])
    one.load({COEFFICIENTS: near})
    with pytest.raises(ValueError, match=r"below 2\*\*53 quanta in sum"):
        one.load({COEFFICIENTS: far})


@pytest.mark.parametrize("distribution", INTEGER)
def test_what_is_left_of_the_base_is_no_part_of_the_sums(
    space: Any, drawn: list[int], distribution: str
) -> None:
    one, other = space(distribution, decays=True), space(distribution, decays=True)
    one.load({**point("a"), BASE: torch.tensor(0.0, dtype=torch.float64)})
    drawn.clear()
    shrunk = {**point("a"), BASE: torch.tensor(-0.25, dtype=torch.float64)}
    one.load(shrunk)
    assert not drawn
    other.load(shrunk)
    assert torch.equal(one.values, other.values)


@pytest.mark.parametrize("distribution", [*INTEGER, *REAL])
def test_downloads_that_come_in_turn_are_summed_once_each(
    space: Any, monkeypatch: pytest.MonkeyPatch, distribution: str
) -> None:
    """Several clusters' downloads, in any order, and evaluation after training."""
    one = space(distribution)
    points = [point(name) for name in "abc"]
    first = []
    for params in points:
        one.load(params)
        first.append(one.values.clone())

    def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("summed again")

    monkeypatch.setattr(Directions, "rebuild", refuse)
    monkeypatch.setattr(Directions, "add_quanta", refuse)
    for i in (0, 2, 1, 0, 1):
        one.load({name: t.clone() for name, t in points[i].items()})
        assert torch.equal(one.values, first[i])
    with pytest.raises(AssertionError, match="summed again"):
        one.load(point("d"))


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_where_room_is_for_one_point_only_the_last_is_on_disk(
    space: Any, monkeypatch: pytest.MonkeyPatch, distribution: str
) -> None:
    monkeypatch.setattr(rebuilds, "AT_MOST", 1)
    one = space(distribution)
    for name, changed in (("a", NUM), ("b", 2), ("a", NUM), ("c", 3)):
        one.load(point(name, changed=changed))
        fresh = space(distribution)
        fresh.load(point(name, changed=changed))
        assert torch.equal(one.values, fresh.values)
        assert len(one._rebuilds.points) == 1


def test_wide_weights_along_lowrank_directions_are_never_the_rounded_ones(space: Any) -> None:
    one, other = (space("lowrank", torch.bfloat16) for _ in range(2))
    one.load(point("a"))
    assert torch.equal(one.wide(point("a")), other.wide(point("a")))
    assert not torch.equal(one.wide(point("a")), one.values.float())


def test_factors_beside_integers_are_drawn_once_for_all_who_share_a_download(
    tiny_llama: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    base: Any = Base(tiny_llama().requires_grad_(False), None, "random")
    quantize_(base.model, SCHEMES["int8"])
    one: Any = Seeds(num_seeds=NUM, distribution="lowrank").make_space(base, seed=1)
    calls: list[int] = []
    plain = Factors.draw

    def watched(self: Factors, *args: Any, **kwargs: Any) -> Any:
        calls.append(self.tensor)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(Factors, "draw", watched)
    one.load(point("a"))
    assert calls
    calls.clear()
    one.load(point("a"))
    assert not calls
    one.load(one.start())
    assert all(layer.side is None for layer in one._quantized.values())


@pytest.mark.parametrize("used", [2, NUM])
def test_an_update_beside_integers_takes_no_more_than_its_layer(
    tiny_llama: Callable[..., Any], used: int
) -> None:
    """Two thin factors of few directions, one matrix of many: the layer computes alike with either."""
    base: Any = Base(tiny_llama().requires_grad_(False), None, "random")
    quantize_(base.model, SCHEMES["int8"])
    one: Any = Seeds(num_seeds=NUM, distribution="lowrank").make_space(base, seed=1)
    params = point("a", size=1e-2)
    params[COEFFICIENTS][used:] = 0
    one.load(params)
    for name, layer in one._quantized.items():
        m, n = layer.weight.shape
        thin = isinstance(layer.side, tuple)
        assert thin == (used * (m + n) <= m * n)
        u, v = one.update(name, range(used), params[COEFFICIENTS][:used].tolist())
        plain = layer.unpacked(torch.float32) + u @ v.mT
        torch.testing.assert_close(layer.whole(), plain)
        x = torch.randn(3, n, generator=generator(0, name))
        torch.testing.assert_close(layer(x), x @ plain.mT, rtol=1e-4, atol=1e-4)
