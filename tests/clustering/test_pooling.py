"""Pooled clusters: the estimates by hand, their edges, and what they are on average."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest
import torch

from fedloom.algorithms.clustered import Clustered
from fedloom.algorithms.ditto import Ditto
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.fedkseed import FedKSeed
from fedloom.algorithms.flasc import Flasc
from fedloom.algorithms.scaffold import Scaffold
from fedloom.clustering.given import Given, Random
from fedloom.clustering.members import Grouping
from fedloom.clustering.modes import Auto, Paper
from fedloom.clustering.pooling import Pooled, Variances, pool, shares_of
from fedloom.clustering.sharing import ClusteredState, Sharing
from fedloom.core.params import equal
from fedloom.core.payloads import NoReplies, mean_upload
from fedloom.core.protocols import Algorithm, Reply, Round
from fedloom.core.schema import schema
from fedloom.core.seed_sequences import COEFFICIENTS
from fedloom.server.combine.sorted import Median
from fedloom.server.optimizers import Adam, Momentum

PAIRS = {"a": 0, "b": 0, "c": 1, "d": 1}


def sent(values: Mapping[str, float], weights: Sequence[float] = ()) -> list[Reply]:
    """Return a reply a client, each of one number."""
    heavy = weights or [1.0] * len(values)
    return [
        Reply(client, {"delta": {"w": torch.tensor([value], dtype=torch.float64)}}, weight)
        for (client, value), weight in zip(values.items(), heavy, strict=True)
    ]


def four(a: float, b: float, c: float, d: float) -> dict[str, float]:
    return {"a": a, "b": b, "c": c, "d": d}


def moves(found: Pooled, *clusters: int) -> list[float]:
    return [float(found.move(k)["w"]) for k in clusters]


def lambdas(found: Pooled) -> list[float]:
    return [found.keeps(k, "w") for k in sorted(found.means)]


# --- by hand --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "noise", "spread", "own", "moved"),
    [
        (four(1, 3, -1, -3), 2, 7, [7 / 8, 7 / 8], [1.75, -1.75]),
        (four(3, -1, 1, -3), 8, -2, [0, 0], [0, 0]),
        (four(2, 2, -2, -2), 0, 8, [1, 1], [2, -2]),
        (four(2, 2, 2, 2), 0, 0, [0, 0], [2, 2]),
    ],
)
def test_two_clusters_of_two(
    values: Mapping[str, float],
    noise: float,
    spread: float,
    own: Sequence[float],
    moved: Sequence[float],
) -> None:
    found = pool(sent(values), PAIRS, Variances())
    assert found.variances.noise["w"] == pytest.approx(noise)
    assert found.variances.spread["w"] == pytest.approx(spread)
    assert lambdas(found) == pytest.approx(own)
    assert moves(found, 0, 1) == pytest.approx(moved)


def test_clients_count_by_their_weights() -> None:
    found = pool(sent(four(1, 3, -1, -3), [1, 3, 2, 2]), PAIRS, Variances())
    assert lambdas(found) == pytest.approx([0.87805, 0.9], abs=1e-5)
    assert moves(found, 0, 1) == pytest.approx([2.22561, -1.775], abs=1e-5)


def test_who_has_no_weight_is_not_there() -> None:
    there = pool(sent(four(1, 3, -1, -3)), PAIRS, Variances())
    values = {**four(1, 3, -1, -3), "e": 99.0, "f": -7.0}
    found = pool(sent(values, [1, 1, 1, 1, 0, 0]), {**PAIRS, "e": 1, "f": 2}, Variances())
    assert found.variances == there.variances
    assert moves(found, 0, 1) == moves(there, 0, 1)
    with pytest.raises(NoReplies):
        pool(sent({"a": 1.0}, [0.0]), PAIRS, Variances())


def test_a_client_that_did_not_reply_is_not_counted() -> None:
    found = pool(sent({"a": 1.0, "b": 3.0, "c": -2.0}), PAIRS, Variances())
    assert lambdas(found) == pytest.approx([13 / 15, 13 / 17])
    assert moves(found, 0, 1) == pytest.approx([1.8222, -1.3725], abs=1e-4)


def test_clusters_of_one_take_the_noise_of_rounds_before() -> None:
    replies = sent({"a": 2.0, "c": -2.0})
    unknown = pool(replies, PAIRS, Variances())
    learnt = unknown.variances
    assert (learnt.noise, learnt.spread, learnt.alike) == ({}, {}, 0), (
        "of one client a cluster nothing is learnt"
    )
    assert lambdas(unknown) == [0, 0]
    assert moves(unknown, 0, 1) == [0, 0]
    known = pool(replies, PAIRS, Variances(noise={"w": 2.0}))
    assert known.variances.noise == {"w": 2.0}
    assert lambdas(known) == pytest.approx([0.75, 0.75])


def test_who_replied_without_a_cluster_is_one_of_its_own() -> None:
    cluster_of = {"a": 0, "b": 0, "c": 1}
    found = pool(sent(four(1, 3, -1, -3)), cluster_of, Variances())
    assert lambdas(found) == pytest.approx([12 / 17, 6 / 11])
    assert moves(found, 0, 1) == pytest.approx([1.41176, -0.54545], abs=1e-5)


def test_one_cluster_alone_tells_nothing_of_the_spread() -> None:
    known = Variances(noise={"w": 5.0}, spread={"w": 3.0})
    found = pool(sent({"a": 1.0, "b": 3.0}), PAIRS, known)
    assert found.variances.spread == {"w": 3.0}
    assert found.variances.noise == {"w": 2.0}
    assert moves(found, 0) == [2.0], "its mean is everybody's"


def test_a_cluster_without_a_reply_follows_the_others_as_far_as_they_agree() -> None:
    known = Variances(noise={"w": 2.0}, spread={"w": 3.0})
    found = pool(sent({"a": 1.0, "b": 3.0}), PAIRS, known)
    assert moves(found, 1) == pytest.approx([2.0 * (1 - 3.0 / 4.0)])
    apart = pool(sent({"a": 1.0, "b": 1.0}), PAIRS, known)
    assert moves(apart, 1) == [0.0], "what moves them may be their own alone"
    alike = pool(sent({"a": 1.0, "b": 3.0}), PAIRS, Variances(spread={"w": -4.0}))
    assert moves(alike, 1) == [2.0]
    still = pool(sent({"a": 0.0, "b": 0.0}), PAIRS, known)
    assert moves(still, 1) == [0.0]


def test_the_spread_is_cut_off_after_rounds_are_averaged() -> None:
    one = pool(sent(four(3, -1, 1, -3)), PAIRS, Variances())
    two = pool(sent(four(1, 3, -1, -3)), PAIRS, one.variances)
    assert two.variances.spread["w"] == pytest.approx((-2 + 7) / 2)
    # Residuals of the two rounds are (2, -2) and (-1, 1): none of the noise lasts, so half of it is in two rounds.
    assert lambdas(two) == pytest.approx([2.5 / (2.5 + 2 / 4)] * 2)
    back = pool(sent(four(3, -1, 1, -3)), PAIRS, Variances(spread={"w": 1.0}))
    assert back.variances.spread["w"] == pytest.approx(-0.5)
    assert lambdas(back) == [0, 0]


def test_tensors_are_pooled_one_by_one() -> None:
    apart, alike = four(2, 2, -2, -2), four(3, -1, 1, -3)
    replies = [
        Reply(c, {"delta": {"x": torch.full((2,), apart[c]), "y": torch.full((6,), alike[c])}})
        for c in PAIRS
    ]
    found = pool(replies, PAIRS, Variances())
    assert [found.keeps(0, name) for name in "xy"] == [1, 0]
    assert found.move(1)["x"].tolist() == [-2, -2]
    assert not found.move(1)["y"].any()
    assert found.lambdas == {0: 2 / 8, 1: 2 / 8}, "a mean by the sizes of tensors"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_means_are_those_of_any_other_mean_to_the_bit(dtype: torch.dtype) -> None:
    source = torch.Generator().manual_seed(0)
    replies = [
        Reply(c, {"delta": {n: torch.randn(9, 5, generator=source).to(dtype) for n in "xy"}}, w)
        for c, w in zip("abcde", (3.0, 1.5, 0.1, 7.0, 2.0), strict=True)
    ]
    found = pool(replies, PAIRS, Variances())
    assert equal(found.whole, mean_upload(replies)["delta"])
    for k in (0, 1):
        mine = [r for r in replies if PAIRS.get(r.client) == k]
        assert equal(found.means[k], mean_upload(mine)["delta"])


def test_half_precision_is_summed_up_in_more() -> None:
    replies = [
        Reply(c, {"delta": {"w": torch.full((3,), v).half()}})
        for c, v in four(1, 3, -1, -3).items()
    ]
    found = pool(replies, PAIRS, Variances())
    assert found.move(0)["w"].dtype == torch.float32
    assert found.keeps(0, "w") == pytest.approx(7 / 8)


# --- on average, and in any order -----------------------------------------------------------------

SIZES = (1, 2, 5)


def drawn(
    turnout: float, weights: str, source: torch.Generator, *, sizes: Sequence[int] = SIZES
) -> tuple[list[Reply], dict[str, int]]:
    """Return updates whose true noise is 8 and spread 3, of those who took part."""
    length, replies, cluster_of = 2000, list[Reply](), dict[str, int]()
    for k, size in enumerate(sizes):
        center = torch.randn(length, generator=source, dtype=torch.float64) * (3 / length) ** 0.5
        for i in range(size):
            name = f"{k}-{i}"
            cluster_of[name] = k
            own = torch.randn(length, generator=source, dtype=torch.float64) * (8 / length) ** 0.5
            weight = 1.0 + (i % 3 if weights == "unequal" else 0)
            if float(torch.rand(1, generator=source)) < turnout:
                replies.append(Reply(name, {"delta": {"w": 1.0 + center + own}}, weight))
    return replies, cluster_of


@pytest.mark.parametrize("weights", ["equal", "unequal"])
@pytest.mark.parametrize("turnout", [1.0, 0.7])
def test_both_variances_are_right_on_average(turnout: float, weights: str) -> None:
    source = torch.Generator().manual_seed(1)
    noise, spread = list[float](), list[float]()
    while len(spread) < 500:
        replies, cluster_of = drawn(turnout, weights, source)
        if not replies:
            continue
        found = pool(replies, cluster_of, Variances()).variances
        if found.spread:
            noise.append(found.noise["w"])
            spread.append(found.spread["w"])
    assert sum(noise) / 500 == pytest.approx(8, rel=0.01)
    assert sum(spread) / 500 == pytest.approx(3, rel=0.01)


def test_the_spread_is_right_where_some_have_no_cluster() -> None:
    source = torch.Generator().manual_seed(2)
    spread = []
    for _ in range(600):
        replies, cluster_of = drawn(1.0, "unequal", source, sizes=(1, 2, 4, 1, 1))
        known = {client: k for client, k in cluster_of.items() if k < 3}
        spread.append(pool(replies, known, Variances()).variances.spread["w"])
    assert sum(spread) / 600 == pytest.approx(3, rel=0.01)


def test_neither_the_order_of_replies_nor_the_numbers_of_clusters_matter() -> None:
    replies = sent({"a": 1.0, "b": 3.5, "c": -1.0, "d": -3.0, "e": 0.5}, [1, 3, 2, 2, 1.5])
    cluster_of = {"a": 0, "b": 0, "c": 1, "d": 1}
    first = pool(replies, cluster_of, Variances())
    for order in permutations(replies):
        found = pool(order, cluster_of, Variances())
        assert moves(found, 0, 1) == pytest.approx(moves(first, 0, 1), rel=1e-12)
    other = pool(replies, {c: 7 - 3 * k for c, k in cluster_of.items()}, Variances())
    assert moves(other, 7, 4) == pytest.approx(moves(first, 0, 1), rel=1e-12)
    assert other.variances.spread["w"] == pytest.approx(first.variances.spread["w"], rel=1e-12)


def test_weights_count_by_their_ratios() -> None:
    values = {"a": 1.0, "b": 3.5, "c": -1.0, "d": -3.0}
    one, ten = (
        pool(sent(values, [by * w for w in (1, 3, 2, 2)]), PAIRS, Variances()) for by in (1, 10)
    )
    assert moves(one, 0, 1) == pytest.approx(moves(ten, 0, 1), rel=1e-12)
    shares = shares_of(sent(values), dict.fromkeys("abcd", 0))
    assert shares.apart == pytest.approx(0)
    assert shares.free == pytest.approx(0.75)


# --- in an algorithm ------------------------------------------------------------------------------

TONGUES = {"a": "x", "b": "x", "c": "y", "d": "y", "e": "z"}


def pooled(inner: Algorithm[Any] | None = None, mode: Any = None) -> Clustered[Any]:
    return Clustered(inner or FedAvg(), mode or Given("language"), Sharing(pool="on"))


def play(
    algorithm: Algorithm[Any],
    updates: Sequence[Mapping[str, float]],
    *,
    state: Any = None,
    first: int = 1,
    weight: float = 1.0,
    dtype: torch.dtype = torch.float32,
    people: str = "abcde",
) -> Any:
    """Run a round for each mapping from those who reply to their updates."""
    population = {client: {"language": TONGUES[client]} for client in people}
    start = {"w": torch.zeros(3, dtype=dtype), "v": torch.ones(2, 2, dtype=dtype)}
    state = state or algorithm.init(start, 0)
    for number, values in enumerate(updates, start=first):
        round = Round(number, number, population, tuple(values), 1.0)
        replies = []
        for at, (client, value) in enumerate(values.items()):
            source = torch.Generator().manual_seed(100 * number + ord(client))
            delta = {
                n: (value + torch.randn(t.shape, generator=source)).to(dtype)
                for n, t in start.items()
            }
            replies.append(Reply(client, {"delta": delta}, weight + at % 2))
        state, _ = algorithm.server_update(state, round, iter(replies))
    return state


ALIKE = {"a": 4.0, "b": -4.0, "c": 3.0, "d": -4.0}
"""Clients of one language differ by more than languages do."""


@pytest.mark.parametrize("inner", [FedAvg(), FedAvg(Adam(0.1)), FedAvg(Momentum(0.5, 0.9))])
def test_where_nothing_is_apart_every_cluster_is_fedavg_to_the_bit(inner: Any) -> None:
    rounds = [ALIKE, {"a": 4.0, "b": -4.0}, ALIKE]
    plain, state = play(inner, rounds, people="abcd"), play(pooled(inner), rounds, people="abcd")
    assert set(state.cluster_states) == {0, 1}
    for model in (state.global_state, *state.cluster_states.values()):
        assert equal(model.params, plain.params)
        assert model.moments.num_steps == 3


@pytest.mark.parametrize("inner", [FedAvg(), FedAvg(Adam(0.1))])
def test_where_clients_of_a_cluster_agree_it_is_a_model_of_its_own_to_the_bit(inner: Any) -> None:
    apart: Clustered[Any] = Clustered(inner, Given("language"), Sharing(pool="off"))
    population = {client: {"language": TONGUES[client]} for client in "abcd"}
    start, ways = {"w": torch.zeros(3)}, {"x": 2.5, "y": -1.25}
    states = []
    for algorithm in (apart, pooled(inner)):
        state = algorithm.init(start, 0)
        for number in (1, 2, 3):
            round = Round(number, 0, population, tuple("abcd"), 1.0)
            replies = [
                Reply(c, {"delta": {"w": torch.full((3,), ways[p["language"]] * number)}}, 1.0)
                for c, p in population.items()
            ]
            state, told = algorithm.server_update(state, round, replies)
        states.append(state)
    assert told["lambda"] == told["cluster-0/lambda"] == told["cluster-1/lambda"] == 1
    for k in (0, 1):
        assert equal(states[1].cluster_states[k].params, states[0].cluster_states[k].params)


@pytest.mark.parametrize(
    ("inner", "told"), [(FedAvg(), {"lasting", "gain"}), (FedAvg(Adam(0.1)), set())]
)
def test_what_was_not_estimated_is_not_told(inner: Any, told: set[str]) -> None:
    state, algorithm = play(pooled(inner), [ALIKE, ALIKE], people="abcd"), pooled(inner)
    population = {client: {"language": TONGUES[client]} for client in "abcd"}
    replies = [
        Reply(c, {"delta": {n: torch.full_like(t, value) for n, t in state.start.items()}}, 1.0)
        for c, value in ALIKE.items()
    ]
    round = Round(3, 0, population, tuple("abcd"), 1.0)
    _, metrics = algorithm.server_update(state, round, iter(replies))
    assert {"lasting", "gain"} & metrics.keys() == told


def test_a_new_cluster_begins_where_the_model_for_all_was_and_counts_the_round_once() -> None:
    state = play(pooled(), [ALIKE], people="abcd")
    before = state.global_state.params
    later = play(pooled(), [ALIKE], state=state, first=2)
    fresh = later.cluster_states[max(later.cluster_states)]
    assert set(later.cluster_states) == {0, 1, 2}
    assert equal(fresh.params, later.global_state.params), "nothing is apart, so it goes with all"
    assert not equal(fresh.params, before)
    found = Clustered(FedAvg(), Auto(2, enough=0.5, probes=1), Sharing(pool="on"))
    source = torch.Generator().manual_seed(0)
    centers = torch.randn(2, 400, generator=source)
    people: dict[str, dict[str, str]] = {f"{k}{i}": {} for k in range(2) for i in range(3)}
    round = Round(1, 0, people, tuple(people), 1.0)
    replies = []
    for client in people:
        push = centers[int(client[0])] + 0.3 * torch.randn(400, generator=source)
        replies.append(Reply(client, {"delta": {"w": push}, "probe": {"row": push}}))
    state, told = found.server_update(found.init({"w": torch.zeros(400)}, 0), round, replies)
    assert len(state.cluster_states) == 2
    whole = mean_upload(replies)["delta"]["w"]
    for k, members in state.grouping.members.items():
        own = mean_upload([r for r in replies if r.client in members])["delta"]["w"]
        expected = whole + told[f"cluster-{k}/lambda"] * (own - whole)
        assert torch.allclose(state.cluster_states[k].params["w"], expected, atol=1e-6)


def test_a_round_that_groups_clients_by_its_own_uploads_says_nothing_of_how_far_apart_they_are() -> (
    None
):
    """Probes that change nothing do; lambda is 0 until then, however far apart the clusters are."""
    found = Clustered(FedAvg(), Auto(2, enough=0.5, probes=2), Sharing(pool="on"))
    source = torch.Generator().manual_seed(0)
    centers = torch.randn(2, 400, generator=source)
    people: dict[str, dict[str, str]] = {f"{k}{i}": {} for k in range(2) for i in range(3)}
    state, lambdas = found.init({"w": torch.zeros(400)}, 0), []
    for number in (1, 2):
        replies = []
        for client in people:
            push = centers[int(client[0])] + 0.3 * torch.randn(400, generator=source)
            replies.append(Reply(client, {"delta": {"w": push}, "probe": {"row": push}}))
        round = Round(number, 0, people, tuple(people), 1.0)
        state, told = found.server_update(state, round, replies)
        lambdas.append(told["lambda"])
    assert list(state.grouping.changes) == [1]
    assert lambdas[0] == 0
    assert lambdas[1] > 0.9


def test_a_cluster_that_nobody_replied_of_goes_with_the_others() -> None:
    rounds = [{**ALIKE, "e": 1.0}, {"a": 4.0, "b": -4.0, "c": 3.5}]
    state = play(pooled(), rounds)
    assert equal(state.cluster_states[2].params, state.global_state.params)


def test_what_is_told_names_the_clusters_that_replied() -> None:
    algorithm = pooled(mode=Random(2, seed=1))
    population: dict[str, dict[str, str]] = {client: {} for client in "abcd"}
    state = algorithm.init({"w": torch.zeros(1, dtype=torch.float64)}, 0)
    round = Round(1, 0, population, tuple("abcd"), 1.0)
    state, told = algorithm.server_update(state, round, sent(four(1, 3, -1, -3)))
    mine = state.grouping.assignment
    found = pool(sent(four(1, 3, -1, -3)), mine, Variances())
    assert {n: v for n, v in told.items() if n.endswith("/lambda")} == {
        f"cluster-{k}/lambda": v for k, v in found.lambdas.items()
    }
    described = algorithm.describe(state).clusters
    assert described is not None
    noise, spread = described.variances["w"]
    assert noise == found.variances.noise["w"]
    assert spread == max(0, found.variances.spread["w"])
    alone = Reply("a", sent({"a": 1.0})[0].upload)
    _, told = algorithm.server_update(state, Round(2, 0, population, ("a",), 0.25), [alone])
    assert [n for n in told if n.endswith("/lambda")] == [f"cluster-{mine['a']}/lambda"]


@pytest.mark.parametrize(
    ("algorithm", "pools"),
    [
        (Clustered(FedAvg()), True),
        (Clustered(Flasc(FedAvg()), Random(2)), True),
        (Clustered(Ditto(FedAvg()), Given("language")), True),
        (Clustered(FedAvg(), share=Sharing(pool="off")), False),
        (Clustered(FedAvg(), share=Sharing(mix=0.5)), False),
        (Clustered(FedAvg(), share=Sharing(["lora_A"])), False),
        (Clustered(FedAvg(), share=Sharing(temperature=1.0)), False),
        (Clustered(FedAvg(), Paper(2)), False),
        (Clustered(Scaffold()), False),
        (Clustered(FedAvg(combine=Median())), False),
        (Clustered(FedKSeed()), False),
        (Clustered(FedKSeed(uploads="delta")), True),
    ],
)
def test_clusters_are_pooled_where_the_uploads_tell_how_far(
    algorithm: Clustered[Any], pools: bool
) -> None:
    assert algorithm.pools == pools
    params = {COEFFICIENTS: torch.zeros(4, dtype=torch.float64)}
    if algorithm.share.names:
        params["x.lora_A"] = torch.zeros(4, dtype=torch.float64)
    state = algorithm.init(params, 0)
    assert (state.variances is not None) == pools
    assert algorithm.with_grouping(Random(3)).pools == (
        pools and not isinstance(algorithm.mode, Paper)
    )


def test_probes_become_rarer_where_clusters_go_with_everybody() -> None:
    mode = Auto(every=4)
    algorithm = Clustered(FedAvg(), mode)
    population: dict[str, dict[str, str]] = {client: {} for client in "ab"}
    state = algorithm.init({"w": torch.zeros(4)}, 0)
    seen = Grouping(row_rounds=dict.fromkeys("ab", 10), row_counts=dict.fromkeys("ab", 2))
    for alike, gap in ((0, 4), (3, 4), (4, 8), (8, 16), (400, 4 << 6)):
        state = replace(state, grouping=seen, variances=Variances(alike=alike))
        for number, asked in ((10 + gap - 1, []), (10 + gap, ["a", "b"])):
            assert mode.due(state, Round(number, 0, population, tuple("ab"), 1.0)) == asked
    assert Auto(every=0).due(state, Round(999, 0, population, tuple("ab"), 1.0)) == []


def test_rounds_are_counted_in_which_clusters_go_with_everybody() -> None:
    alike = play(pooled(), [ALIKE] * 3, people="abcd")
    assert alike.variances.alike == 3
    apart = {"a": 9.0, "b": 9.0, "c": -9.0, "d": -9.0}
    assert play(pooled(), [apart], state=alike, first=4, people="abcd").variances.alike == 0
    nobody_grouped = play(Clustered(FedAvg()), [ALIKE], people="abcd")
    assert nobody_grouped.variances.alike == 0


def test_clusters_made_by_chance_share_nearly_all_however_many_tensors_there_are() -> None:
    """Of 40 tensors half have a spread above 0 by chance; together they have none, and so lambda is near 0."""
    source = torch.Generator().manual_seed(5)
    found, cut_each = [], []
    for _ in range(20):
        known = Variances()
        for _ in range(6):
            replies = [
                Reply(c, {"delta": {f"w{i}": torch.randn(64, generator=source) for i in range(40)}})
                for c in "abcdefghij"
            ]
            done = pool(replies, {c: at // 2 for at, c in enumerate("abcdefghij")}, known)
            known = done.variances
        found.append(done.mean_lambda)
        cut = {n: max(0.0, v) for n, v in known.spread.items()}
        often = known.memory.noise(0)
        cut_each.append(sum(v / (v + known.noise[n] * often) for n, v in cut.items()) / len(cut))
    assert sum(found) / 20 < 0.35 * sum(cut_each) / 20
    assert sum(found) / 20 < 0.03


def test_where_all_tensors_are_apart_nothing_is_taken_from_them() -> None:
    known = Variances(noise={"a": 1.0, "b": 1.0}, spread={"a": 3.0, "b": 1.0})
    assert known.tau2() == {"a": 3.0, "b": 1.0}
    known = Variances(noise={"a": 1.0, "b": 1.0}, spread={"a": 3.0, "b": -1.0})
    assert known.tau2() == {"a": 2.0, "b": 0.0}
    known = Variances(noise={"a": 1.0, "b": 1.0}, spread={"a": 3.0, "b": -4.0})
    assert known.tau2() == {"a": 0.0, "b": 0.0}


def test_who_decided_the_groups_does_not_say_how_far_apart_they_are() -> None:
    replies = sent(four(1, 3, -1, -3))
    first = pool(replies, PAIRS, Variances(), deciding=True)
    assert first.variances.spread == {}
    assert first.variances.noise["w"] == pytest.approx(2)
    assert lambdas(first) == [0, 0]
    later = pool(replies, PAIRS, Variances(spread={"w": 3.0}), deciding=True)
    assert later.variances.spread == {"w": 3.0}
    assert lambdas(later) == [0.75, 0.75]


def test_the_two_variances_and_how_long_clusters_were_alike_are_remembered() -> None:
    state: ClusteredState[Any] = play(pooled(), [ALIKE, ALIKE], people="abcd")
    assert state.variances is not None
    assert set(state.variances.noise) == set(state.variances.spread) == {"w", "v"}
    assert pooled().init({"w": torch.zeros(1)}, 0).variances == Variances()
    assert Clustered(FedAvg()).init({"w": torch.zeros(1)}, 0).variances == Variances()
    apart = Clustered(FedAvg(), share=Sharing(pool="off"))
    assert apart.init({"w": torch.zeros(1)}, 0).variances is None


def test_downloads_are_what_they_are_without_it() -> None:
    sent_first = []
    apart = Clustered(Ditto(FedAvg()), Given("language"), Sharing(pool="off"))
    for algorithm in (pooled(Ditto(FedAvg())), apart):
        state = play(algorithm, [ALIKE], people="abcd")
        population = {client: {"language": TONGUES[client]} for client in "abcd"}
        sent_first.append(algorithm.broadcast(state, Round(2, 0, population, tuple("abcd"), 1.0)))
    ours, theirs = sent_first
    assert {c: schema(p) for c, p in ours.items()} == {c: schema(p) for c, p in theirs.items()}
    assert len({id(p) for p in ours.values()}) == 2, "one object a cluster"
