"""What is promised of directions: unit variance, independence, unbiased guesses, and sums that find their way back."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fedloom.core.randomness import generator
from fedloom.spaces.directions import kernels, reference
from fedloom.spaces.directions.directions import Directions
from fedloom.spaces.directions.stream import Distribution
from fedloom.spaces.live import Layout

SHAPES = {
    "matrix": torch.Size((96, 64)),
    "vector": torch.Size((37,)),
    "kernel": torch.Size((16, 3, 11)),
    "scalar": torch.Size(()),
}
DISTRIBUTIONS: list[Distribution] = ["gaussian", "rademacher", "popcount", "lowrank"]
EXACT: list[Distribution] = ["rademacher", "popcount"]
KINDS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def random(*size: int, path: str = "values") -> Tensor:
    return torch.randn(size, generator=generator(0, path), dtype=torch.float64)


def flat(directions: Directions, k: int) -> Tensor:
    return torch.cat([directions.z(name, k).reshape(-1) for name in directions.shapes]).double()


def move_(directions: Directions, values: Tensor, ks: Sequence[int], by: Sequence[float]) -> None:
    """Move every tensor of a flat vector, in place."""
    for name, part in Layout(directions.shapes).split(values).items():
        directions.shift(name, part, ks, by, out=part)


def all_of(directions: Directions, num: int) -> Tensor:
    return torch.stack([flat(directions, k) for k in range(num)])


# --- arithmetic -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_values_move_along_directions_and_are_rounded_once(
    distribution: Distribution, kind: torch.dtype
):
    directions = Directions(SHAPES, distribution=distribution, seed=5)
    values, by = random(directions.numel).to(kind), random(9, path="by")
    expected = values.double() + by @ all_of(directions, 9)
    half_ulp = torch.finfo(kind).eps / 2 * expected.abs()
    move_(directions, values, range(9), by.tolist())
    slack = 4e-6 if distribution == "lowrank" or kind != torch.float64 else 1e-12
    assert ((values.double() - expected).abs() <= half_ulp + slack).all()


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_one_tensor_is_shifted_aside_and_stays_as_it_was(distribution: Distribution):
    directions = Directions(SHAPES, distribution=distribution, seed=5)
    for name, shape in SHAPES.items():
        values = random(*shape).float()
        before, out = values.clone(), torch.empty(shape)
        assert directions.shift(name, values, [3, 4], [0.5, -1.0], out=out) is out
        expected = values + 0.5 * directions.z(name, 3) - directions.z(name, 4)
        torch.testing.assert_close(out, expected, rtol=0, atol=2e-6)
        assert torch.equal(values, before)


@pytest.mark.parametrize("kernel", [kernels.on_cpu(), reference])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_step_and_the_look_after_it_are_both_in_one_pass(
    distribution: Distribution, kind: torch.dtype, kernel: object, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(kernels, "on_cpu", lambda: kernel)
    directions = Directions(SHAPES, distribution=distribution, seed=5)
    for name, shape in SHAPES.items():
        values = random(*shape).to(kind)
        moved, seen, out = values.clone(), torch.empty_like(values), torch.empty_like(values)
        directions.shift(name, moved, [3, 4], [0.5, -1.0], out=moved)
        directions.shift(name, moved, [7], [0.25], out=seen)
        assert (
            directions.advance(name, values, [3, 4, 7], [0.5, -1.0, 0.25], moves=2, out=out) is out
        )
        assert torch.equal(values, moved)
        assert torch.equal(out, seen)


@pytest.mark.parametrize("name", ["matrix", "kernel"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_rows_are_shifted_alone(distribution: Distribution, name: str):
    directions, rows = (
        Directions(SHAPES, distribution=distribution, seed=5),
        torch.tensor([5, 15, 0, 5]),
    )
    values = random(4, *SHAPES[name][1:]).float()
    out = torch.empty_like(values)
    directions.shift(name, values, [3], [0.5], out=out, rows=rows)
    expected = values + 0.5 * directions.z(name, 3)[rows]
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_model_is_rebuilt_from_its_base_and_coefficients(
    distribution: Distribution, kind: torch.dtype
):
    directions = Directions(SHAPES, distribution=distribution, seed=5, quantum=2.0**-44)
    base, coefficients = random(directions.numel).to(kind), random(9, path="c") * 1e-3
    coefficients[4] = 0
    expected = 0.25 * base.double() + coefficients @ all_of(directions, 9)
    out = torch.empty_like(base)
    assert directions.rebuild(base, coefficients, out=out, scale=torch.tensor(0.25)) is out
    half_ulp = torch.finfo(kind).eps / 2 * expected.abs()
    slack = 4e-8 if distribution == "lowrank" or kind != torch.float64 else 1e-12
    assert ((out.double() - expected).abs() <= half_ulp * 1.01 + slack).all()


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_nothing_moves_without_coefficients(distribution: Distribution):
    directions = Directions(SHAPES, distribution=distribution)
    base, nothing = random(directions.numel).float(), torch.zeros(4, dtype=torch.float64)
    assert torch.equal(directions.rebuild(base, nothing, out=torch.empty_like(base)), base)
    halved = directions.rebuild(base, nothing, out=torch.empty_like(base), scale=0.5)
    assert torch.equal(halved, base / 2)
    assert not directions.dot(base, []).numel()


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_values_are_projected(distribution: Distribution, kind: torch.dtype):
    directions = Directions(SHAPES, distribution=distribution, seed=5)
    values = random(directions.numel).to(kind)
    expected = all_of(directions, 20) @ values.double()
    found = directions.dot(values, range(20))
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 3])
def test_factors_are_the_direction(rank: int):
    directions, rows = Directions(SHAPES, distribution="lowrank", rank=rank), torch.tensor([7, 2])
    u, v = directions.factors("kernel", [3, 9])
    assert u.shape == (2, 16, rank)
    assert v.shape == (2, 33, rank)
    z = torch.stack([directions.z("kernel", k) for k in (3, 9)])
    torch.testing.assert_close((u @ v.mT).view_as(z), z, rtol=1e-5, atol=1e-6)
    some, same = directions.factors("kernel", [3, 9], rows=rows)
    assert torch.equal(some, u[:, rows])
    assert torch.equal(same, v)


def test_the_rest_of_the_layout_does_not_move_an_element():
    more = Directions({**SHAPES, "late": torch.Size((500,))}, seed=5)
    fewer = Directions(SHAPES, seed=5)
    assert torch.equal(more.z("kernel", 8), fewer.z("kernel", 8))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_chunks_and_kernels_change_no_bit(
    distribution: Distribution, monkeypatch: pytest.MonkeyPatch
):
    shapes = {"a": torch.Size((90, 100)), "b": torch.Size((5000,))}
    directions = Directions(shapes, distribution=distribution, seed=1)
    base, coefficients = random(directions.numel).bfloat16(), random(5, path="c")

    def results() -> tuple[Tensor, Tensor]:
        moved = base.clone()
        move_(directions, moved, range(5), coefficients.tolist())
        return moved, directions.rebuild(base, coefficients, out=torch.empty(len(base)))

    expected = results()
    monkeypatch.setattr(kernels, "AT_ONCE", 1)
    assert all(map(torch.equal, results(), expected))
    monkeypatch.setattr(kernels, "on_cpu", lambda: reference)
    assert all(map(torch.equal, results(), expected))


def test_global_generators_are_left_alone():
    before = torch.random.get_rng_state()
    directions = Directions(SHAPES)
    move_(directions, torch.zeros(directions.numel), [1], [1.0])
    assert torch.equal(torch.random.get_rng_state(), before)


# --- integers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("large", [1.0, 1e4])
@pytest.mark.parametrize("distribution", EXACT)
def test_a_rebuild_is_the_same_in_any_order(
    distribution: Distribution, large: float, monkeypatch: pytest.MonkeyPatch
):
    """In 32 and in 64 bits: the sum of the coefficients decides, not its order."""
    directions = Directions({"w": torch.Size((9000,))}, distribution=distribution)
    base, coefficients = random(9000).float(), random(512, path="c") * 1e-3 * large
    out = directions.rebuild(base, coefficients, out=torch.empty_like(base))
    order = torch.randperm(512, generator=generator(1)).numpy()
    keys_of = Directions._keys
    monkeypatch.setattr(Directions, "_keys", lambda self, ks: keys_of(self, order[ks]))
    permuted = directions.rebuild(base, coefficients[order], out=torch.empty_like(base))
    assert torch.equal(permuted, out)


@pytest.mark.parametrize("distribution", EXACT)
def test_a_rebuild_from_an_earlier_model_is_one_from_scratch(distribution: Distribution):
    """As long as the model can hold the sums: here multiples of the quantum, in float64."""
    directions = Directions({"w": torch.Size((9000,))}, distribution=distribution)
    base = (random(9000) / directions.quantum).round() * directions.quantum
    first, second = (
        (random(300, path=path) / directions.quantum).round() * directions.quantum
        for path in ("first", "second")
    )
    earlier = directions.rebuild(base, first, out=torch.empty_like(base))
    delta = directions.rebuild(earlier, second, out=torch.empty_like(base))
    scratch = directions.rebuild(base, first + second, out=torch.empty_like(base))
    assert torch.equal(delta, scratch)


def test_coefficients_are_rounded_to_the_quantum():
    directions = Directions({"w": torch.Size((50,))}, distribution="rademacher", quantum=0.25)
    coefficients = torch.tensor([0.3, 0.1], dtype=torch.float64)
    out = directions.rebuild(torch.zeros(50), coefficients, out=torch.empty(50))
    assert torch.equal(out, 0.25 * directions.z("w", 0))


def test_sums_that_integers_cannot_hold_are_refused():
    directions = Directions({"w": torch.Size((50,))}, distribution="popcount")
    coefficients = torch.full((4,), 2.0**21, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"stay below 2\*\*53 quanta in sum, got 2\*\*57"):
        directions.rebuild(torch.zeros(50), coefficients, out=torch.empty(50))


# --- statistics -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("distribution", "kurtosis"), [("gaussian", 3.0), ("rademacher", 1.0), ("popcount", 2.875)]
)
@pytest.mark.parametrize(
    ("many", "error"), [(1 << 22, 2e-3), pytest.param(1 << 24, 1e-3, marks=pytest.mark.slow)]
)
def test_entries_are_centred_of_unit_variance_and_uncorrelated(
    distribution: Distribution, kurtosis: float, many: int, error: float
):
    """Four standard errors, for means and correlations, times the spread of squares else."""
    directions = Directions(
        {"a": torch.Size((many,)), "b": torch.Size((many,))}, distribution=distribution
    )
    z, other, same = directions.z("a", 1), directions.z("a", 2), directions.z("b", 1)
    assert abs(z.double().mean()) < error
    variance = z.double().square().mean().item()
    assert abs(variance - 1) <= 1.06 * error * max(kurtosis - 1, 1e-9) ** 0.5
    assert abs(z.double().pow(4).mean().item() - kurtosis) < 0.05
    for left, right in (
        (z, other),
        (z, same),
        (z[1:], z[:-1]),
        (z[32:], z[:-32]),
        (z[128:], z[:-128]),
    ):
        assert abs((left.double() @ right.double()).item() / many) < error


def test_lowrank_entries_have_unit_variance():
    directions = Directions({"w": torch.Size((64, 64))}, distribution="lowrank", rank=2)
    z = all_of(directions, 500)
    assert abs(z.mean().item()) < 0.02
    assert abs(z.square().mean().item() - 1) < 0.03


def second_moment(distribution: Distribution, m: int, n: int) -> float:
    entries = m * n
    ours: dict[Distribution, float] = {
        "gaussian": entries + 2,
        "rademacher": entries,
        "popcount": entries - 1 + 2.875,
        "lowrank": (m + 2) * (n + 2),
    }
    return ours[distribution]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_guessed_gradients_are_unbiased_and_of_the_known_size(distribution: Distribution):
    """With f = w'Aw / 2 + b'w in 64 dimensions, 20,000 directions, central differences in float64."""
    num, m, n = 20_000, 8, 8
    directions = Directions({"w": torch.Size((m, n))}, distribution=distribution, seed=3)
    if distribution == "lowrank":
        u, v = directions.factors("w", range(num))
        z = (u @ v.mT).reshape(num, -1).double()
    else:
        z = torch.zeros(num, m * n)
        kernels.fill(directions._draw(directions._keys(range(num)), directions._everything), z)
        z = z.double()
    a, b, w = random(64, 64, path="A"), random(64, path="b"), random(64, path="w")
    a = a @ a.t() / 64

    def loss(points: Tensor) -> Tensor:
        return ((points @ a) * points).sum(1) / 2 + points @ b

    gradient, eps = a @ w + b, 1e-3
    slopes = (loss(w + eps * z) - loss(w - eps * z)) / (2 * eps)
    torch.testing.assert_close(slopes, z @ gradient, rtol=1e-9, atol=1e-9)
    moment = second_moment(distribution, m, n)
    guessed = slopes[:, None] * z
    off = (guessed.mean(0) - gradient).norm() / gradient.norm()
    assert off < (0.085 if distribution == "gaussian" else 1.5 * (moment / num) ** 0.5)
    spread = guessed.square().sum(1).mean() / gradient.square().sum()
    assert abs(spread.item() / moment - 1) < (0.08 if distribution == "lowrank" else 0.04)


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distribution": "cauchy"}, "distribution must be one of gaussian, .*, got cauchy"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"seed": -1}, r"noise seed must be in \[0, 2\*\*64\), got -1"),
        ({"quantum": 0.3}, "quantum must be a power of two, got 0.3"),
    ],
)
def test_settings_are_checked(settings, message: str):
    with pytest.raises(ValueError, match=message):
        Directions(SHAPES, **settings)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("ks", [[4], [4, 9]])
def test_matrices_drawn_in_one_go_are_those_drawn_one_by_one(rank: int, ks: list[int]) -> None:
    shapes = {"w": torch.Size((70, 50)), "norm": torch.Size((9,)), "v": torch.Size((3000, 8))}
    directions = Directions(shapes, distribution="lowrank", rank=rank)
    thin = directions.thin(ks)
    assert list(thin) == ["w", "v"]
    for name, (u, v) in thin.items():
        for whole, single in zip((u.mT, v.mT), directions.factors(name, ks), strict=True):
            assert torch.equal(whole, single)
        values, by = torch.ones(shapes[name]), [0.25] * len(ks)
        first, second = torch.empty_like(values), torch.empty_like(values)
        directions.shift(name, values, ks, by, out=first)
        directions.shift(name, values, ks, by, out=second, drawn=thin[name])
        assert torch.equal(first, second)
