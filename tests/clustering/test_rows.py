"""Rows: what is compared, sketches of it, and LoRA's product without writing it down."""

import pytest
import torch

from fedloom.clustering.groups import cosines
from fedloom.clustering.rows import check_product, compared, row_of, sketch, whole_row

NAMES = [f"layers.{i}.v_proj.lora_{x}" for i in range(12) for x in "AB"]


def adapters(seed: int, rank: int = 4) -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn((rank, 20) if name.endswith("A") else (30, rank), generator=source)
        for name in NAMES
    }


def product(params: dict[str, torch.Tensor]) -> torch.Tensor:
    pairs = [(n, n.replace("lora_B", "lora_A")) for n in NAMES if n.endswith("B")]
    return torch.cat([(params[b].double() @ params[a].double()).flatten() for b, a in pairs])


def test_b_is_compared_or_its_last_tensor_of_a_file_or_all() -> None:
    delta = adapters(0)
    assert all("lora_B" in name for name in compared(delta, "B"))
    assert len(compared(delta, "B")) == 12
    assert list(compared(delta, "last_B")) == ["layers.9.v_proj.lora_B"]
    assert compared(delta, "all") is delta
    bare = {"coefficients": torch.ones(5)}
    assert compared(bare, "B") == compared(bare, "last_B") == bare


def test_the_order_of_names_does_not_matter() -> None:
    """More than ten layers."""
    delta = adapters(0)
    other = dict(reversed(delta.items()))
    for size in (64, 4096, 10**6):
        assert torch.equal(
            row_of({}, delta, compare="all", size=size), row_of({}, other, compare="all", size=size)
        )
    assert compared(delta, "last_B").keys() == compared(other, "last_B").keys()


def test_a_short_update_is_kept_whole_and_a_long_one_sketched() -> None:
    delta = adapters(0)
    numel = sum(t.numel() for t in delta.values())
    whole = whole_row(delta, "all")
    row = row_of({}, delta, compare="all", size=numel)
    assert torch.equal(row, whole * whole.abs()), "what moved far counts more"
    row = row_of({}, delta, compare="all", size=numel - 1)
    assert row.shape == (numel - 1,)
    assert row.dtype == torch.float32


def test_a_sketch_is_linear_and_keeps_inner_products() -> None:
    source = torch.Generator().manual_seed(0)
    # The second tensor spans two blocks; most of its energy is in a few columns.
    x, y = (
        {
            "a": torch.randn(3000, generator=source),
            "b": torch.randn(1100, 1024, generator=source) * torch.logspace(0, -3, 1024),
        }
        for _ in range(2)
    )
    both = {name: 2 * x[name] - y[name] for name in x}
    assert torch.allclose(sketch(both, 4096), 2 * sketch(x, 4096) - sketch(y, 4096), atol=1e-3)
    mixed = {name: x[name] + y[name] for name in x}
    for one, other in ((x, y), (x, mixed), (x, x)):
        exact = cosines(torch.stack([whole_row(t, "all") for t in (one, other)]))[0, 1]
        near = cosines(torch.stack([sketch(t, 4096) for t in (one, other)]))[0, 1]
        assert float(near) == pytest.approx(float(exact), abs=4 / 4096**0.5)
    assert torch.equal(sketch(x, 4096), sketch(x, 4096))


def test_sparse_updates_are_as_like_one_another_in_the_sketch() -> None:
    source = torch.Generator().manual_seed(0)
    base = torch.randn(200_000, generator=source)
    rows = [base + torch.randn(200_000, generator=source) for _ in range(3)]
    thin = [torch.where(t.abs() >= t.abs().quantile(0.9), t, 0) for t in rows]
    exact = cosines(torch.stack(thin))
    near = cosines(torch.stack([sketch({"w": t}, 4096) for t in thin]))
    assert float((near - exact).abs().max()) < 4 / 4096**0.5


def test_products_are_compared_as_the_trace_of_their_factors() -> None:
    starts, deltas = adapters(0), [adapters(1), adapters(2)]
    deltas.append({n: 0.7 * deltas[0][n] + 0.3 * t for n, t in adapters(3).items()})
    ends = [{n: starts[n] + t for n, t in delta.items()} for delta in deltas]
    exact = torch.stack([product(end) - product(starts) for end in ends])
    # <B1 A1, B2 A2> = tr((B1^T B2)(A2 A1^T)), layer by layer
    a, b = ends[0], ends[1]
    traces = sum(
        torch.trace((a[n].T @ b[n]) @ (b[m] @ a[m].T)).double()
        for n, m in ((n, n.replace("lora_B", "lora_A")) for n in NAMES if n.endswith("B"))
    )
    assert float(traces) == pytest.approx(float(product(a) @ product(b)), rel=1e-4)
    rows = torch.stack([row_of(starts, delta, compare="BA", size=4096) for delta in deltas])
    assert float((cosines(rows) - cosines(exact)).abs().max()) < 4 / 4096**0.5
    sizes = rows.norm(dim=1) / exact.norm(dim=1)
    assert float((sizes - 1).abs().max()) < 0.1


def test_products_do_not_depend_on_how_they_are_factored() -> None:
    """A -> R A, B -> B R^-1."""
    start, delta = adapters(0), adapters(1)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(5)))[0] * 3

    def turned(params: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            n: turn @ t if n.endswith("A") else t @ torch.linalg.inv(turn)
            for n, t in params.items()
        }

    plain = row_of(start, delta, compare="BA", size=4096)
    gauged = row_of(turned(start), turned(delta), compare="BA", size=4096)
    assert torch.allclose(plain, gauged, rtol=1e-3, atol=1e-3 * float(plain.abs().max()))
    other = row_of(turned(start), turned(delta), compare="B", size=4096)
    assert not torch.allclose(row_of(start, delta, compare="B", size=4096), other, rtol=0.1)


def test_products_need_factors_that_count_from_nothing() -> None:
    check_product(adapters(0))
    offsets = {name: torch.zeros_like(t) for name, t in adapters(0).items()}
    with pytest.raises(
        ValueError, match=r"clustered.mode.auto.compare BA .* tune.lora.origin zero"
    ):
        check_product(offsets)
    with pytest.raises(ValueError, match=r"tune: lora"):
        check_product({"coefficients": torch.ones(3)})
