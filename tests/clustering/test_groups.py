"""Groups: planted ones are found without being told how many, and nothing is found where nothing is."""

import resource
import sys
import time

import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import fcluster, ward
from scipy.spatial.distance import pdist
from sklearn import metrics

from fedloom.clustering.groups import adjusted_rand, cosines, find_groups, ward_cut
from fedloom.clustering.modes import Auto
from fedloom.clustering.rows import row_of
from fedloom.clustering.tree import Tree, cut


def planted(
    sizes: list[int],
    within: float,
    across: float,
    *,
    seed: int = 0,
    family: float = 0.0,
    families: list[int] | None = None,
    spread: float = 0.0,
    length: int = 20_000,
) -> tuple[torch.Tensor, list[int]]:
    """Return rows whose cosines are `within` in a group, `across` else; `family` more between groups of one family."""
    source = torch.Generator().manual_seed(seed)

    def direction() -> torch.Tensor:
        return torch.randn(length, generator=source) / length**0.5

    everybody, relatives = direction(), [direction() for _ in sizes]
    rows, labels = [], []
    for group, size in enumerate(sizes):
        own = direction()
        kin = relatives[families[group]] if families else torch.zeros(length)
        for _ in range(size):
            w = within + spread * float(torch.randn((), generator=source))
            w = min(max(w, across + family + 0.02), 0.95)
            common = across**0.5 * everybody + family**0.5 * kin
            left = family if families else 0.0
            rows.append(common + (w - across - left) ** 0.5 * own + (1 - w) ** 0.5 * direction())
            labels.append(group)
    return torch.stack(rows), labels


def found(rows: torch.Tensor, labels: list[int]) -> float:
    return adjusted_rand(labels, find_groups(rows).labels)


@pytest.mark.parametrize(
    ("sizes", "within", "across"),
    [
        ([4] * 15, 0.60, 0.25),
        ([4] * 15, 0.30, 0.25),
        ([2] * 5, 0.35, 0.30),
        ([3, 5, 12], 0.45, 0.3),
    ],
)
def test_planted_groups_are_found_without_being_told_how_many(
    sizes: list[int], within: float, across: float
) -> None:
    for seed in range(3):
        assert found(*planted(sizes, within, across, seed=seed)) == 1


def test_groups_as_unequal_as_those_observed_are_found() -> None:
    """Cosines of 0.42 to 0.64 inside, up to 0.49 between relatives."""
    families = [i // 3 for i in range(15)]
    for seed in range(2):
        rows, labels = planted(
            [4] * 15, 0.53, 0.25, seed=seed, family=0.15, families=families, spread=0.06
        )
        assert found(rows, labels) == 1
    rows, labels = planted([2] * 5, 0.5, 0.25, family=0.1, families=[0, 0, 0, 1, 2])
    assert found(rows, labels) == 1


def test_whole_updates_do_at_least_as_well_as_one_tensor_by_the_papers_rule() -> None:
    """4,000 of 40,000 numbers, the true number of groups given to the paper's rule only."""
    for seed in range(2):
        rows, labels = planted(
            [4] * 15, 0.40, 0.25, seed=seed, family=0.10, families=[i // 3 for i in range(15)],
            length=40_000,
        )  # fmt: skip
        one = ward_cut(cosines(rows[:, :4000]), 15)
        assert found(rows, labels) >= adjusted_rand(labels, one)


@pytest.mark.parametrize("count", [2, 3, 4, 10, 20, 60])
@pytest.mark.parametrize("spread", [0.0, 0.08])
def test_one_group_is_not_taken_apart(count: int, spread: float) -> None:
    whole = [
        max(
            find_groups(planted([count], 0.5, 0.3, seed=seed, spread=spread, length=4096)[0]).labels
        )
        for seed in range(10)
    ]
    assert sum(whole) <= 1


@pytest.mark.parametrize(("within", "expected"), [(0.36, 2), (0.40, 4)])
def test_dialects_are_taken_apart_only_where_they_differ_enough_to_matter(
    within: float, expected: int
) -> None:
    rows, dialects = planted([20] * 4, within, 0.05, family=0.28, families=[0, 0, 1, 1])
    groups = find_groups(rows)
    own, other = groups.similarity[:20, :20], groups.similarity[:20, 20:40]
    apart = (own.sum() - 20) / 380 - other.mean()
    # 190 pairs of one dialect and 400 across: both differences are far beyond chance.
    assert apart > 10 * groups.noise * (1 / 190 + 1 / 400) ** 0.5
    languages = dialects if expected == 4 else [dialect // 2 for dialect in dialects]
    assert adjusted_rand(languages, groups.labels) == 1


def test_a_group_of_one_joins_its_nearest_as_it_cannot_be_told_from_a_noisy_member() -> None:
    rows, labels = planted([6, 6, 1], 0.6, 0.3)
    groups = find_groups(rows)
    assert max(groups.labels) == 1
    assert adjusted_rand(labels[:12], groups.labels[:12]) == 1


def test_ties_give_as_many_groups_as_are_asked_for() -> None:
    """Five equal pairs in which the reference finds 1, 5 and 10 only."""
    pair = torch.kron(torch.eye(5), torch.ones(2, 2))
    block = 0.3 + 0.4 * pair + 0.3 * torch.eye(10)
    for k in range(1, 11):
        assert set(ward_cut(block, k)) == set(range(k))
        assert set(cut(Tree(block.double().numpy()).merges, k)) == set(range(k))
    assert adjusted_rand(ward_cut(block, 5), [i // 2 for i in range(10)]) == 1
    with pytest.raises(ValueError, match="between 1 and the 10 rows there are, got 11"):
        ward_cut(block, 11)


def test_the_papers_cut_is_wards_of_the_rows_of_the_matrix() -> None:
    for seed in range(3):
        rows, _ = planted([4] * 6, 0.4, 0.3, seed=seed, length=2000)
        similarity = cosines(rows)
        for k in (2, 4, 6, 9):
            theirs = fcluster(ward(pdist(similarity.double().numpy())), k, "maxclust")
            assert adjusted_rand(ward_cut(similarity, k), theirs.tolist()) == 1


def test_the_order_the_scale_and_the_type_of_rows_do_not_matter() -> None:
    rows, labels = planted([3, 4, 5], 0.5, 0.3)
    groups = find_groups(rows)
    assert adjusted_rand(labels, groups.labels) == 1
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))
    mixed = find_groups(rows[order])
    assert adjusted_rand([groups.labels[i] for i in order.tolist()], mixed.labels) == 1
    scaled = rows * torch.logspace(-3, 3, len(rows))[:, None]
    assert find_groups(scaled).labels == groups.labels
    for dtype in (torch.float64, torch.bfloat16):
        assert find_groups(rows.to(dtype)).labels == groups.labels


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_few_rows_are_one_group(count: int) -> None:
    groups = find_groups(torch.eye(5)[:count])
    assert groups.labels == (0,) * count
    assert groups.confidence == 1


def test_equal_rows_and_rows_of_zeros_are_no_error() -> None:
    assert find_groups(torch.ones(6, 9)).labels == (0,) * 6
    assert find_groups(torch.zeros(6, 9)).labels == (0,) * 6
    two = torch.kron(torch.eye(2), torch.ones(3, 1))
    assert find_groups(two).labels == (0, 0, 0, 1, 1, 1)


def test_confidence_falls_with_the_signal_and_what_is_too_unsure_is_merged() -> None:
    sure = find_groups(planted([5] * 4, 0.6, 0.25)[0]).confidence
    rows = planted([5] * 4, 0.32, 0.25, length=3000)[0]
    assert sure == 1
    assert find_groups(rows).confidence >= 0.8
    assert find_groups(rows, 8).confidence < 0.9


def test_hysteresis_keeps_a_client_between_two_groups_where_it_is() -> None:
    rows, labels = planted([5, 5], 0.6, 0.3, length=4096)
    between = (rows[:5].mean(0) + rows[5:].mean(0) * 0.9)[None]
    rows = torch.cat([rows, between])
    free = find_groups(rows).labels
    assert free[10] == free[0], "a little nearer to the first"
    kept = find_groups(rows, current=[*labels, 1], hysteresis=1.0).labels
    assert kept[10] == kept[5]
    again = find_groups(rows, current=[None] * 11, hysteresis=1.0).labels
    assert again == free


def test_the_adjusted_rand_index_and_the_silhouette_are_scikit_learns() -> None:
    source = np.random.default_rng(0)
    for _ in range(5):
        a, b = source.integers(0, 4, 20).tolist(), source.integers(0, 3, 20).tolist()
        assert adjusted_rand(a, b) == pytest.approx(metrics.adjusted_rand_score(a, b), abs=1e-12)
    assert adjusted_rand([0, 0], [1, 1]) == adjusted_rand([], []) == 1
    rows, _ = planted([3, 4, 6, 6], 0.6, 0.3, length=500)
    cosine = cosines(rows).double().numpy()
    tree, apart = Tree(cosine), 1 - cosine
    np.fill_diagonal(apart, 0)
    widths = {
        k: metrics.silhouette_score(apart, tree.cut(k), metric="precomputed") for k in range(2, 19)
    }
    assert tree.best_silhouette() == max(widths, key=lambda k: widths[k])


def peak_bytes() -> int:
    """Return the most memory this process ever held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@pytest.mark.alone
@pytest.mark.slow
def test_a_thousand_clients_of_a_million_entries_take_ten_seconds_and_half_a_gigabyte() -> None:
    """In CPU time: what arrives is sketched and let go, then all are grouped; memory is the high-water mark."""
    size = Auto().sketch
    source = torch.Generator().manual_seed(0)
    kinds = torch.randn(20, 1_000_000, generator=source)
    noise = torch.randn(8, 1_000_000, generator=source)
    spent, rows = 0.0, torch.empty(1000, size)
    before = peak_bytes()
    for client in range(1000):
        delta = {"layer.lora_B": kinds[client % 20] + 1.5 * noise[client % 8].roll(client)}
        began = time.process_time()
        rows[client] = row_of({}, delta, compare="B", size=size)
        spent += time.process_time() - began
    began = time.process_time()
    groups = find_groups(rows)
    spent += time.process_time() - began
    assert adjusted_rand([client % 20 for client in range(1000)], groups.labels) == 1
    assert spent < 10
    assert peak_bytes() - before < 500_000_000
