"""Clusters: the reference's timeline by hand, who is asked, who comes when, and what it is where nothing is apart."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from fedloom import experiment
from fedloom.algorithms.clustered import Clustered
from fedloom.algorithms.decomfl import DeComFL
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.fedkseed import FedKSeed
from fedloom.algorithms.flasc import Flasc
from fedloom.algorithms.local import LocalOnly
from fedloom.algorithms.private import Private
from fedloom.algorithms.prune import Prune
from fedloom.algorithms.scaffold import Scaffold
from fedloom.clustering.modes import Auto, Paper
from fedloom.clustering.sharing import Sharing
from fedloom.core.protocols import Algorithm, Done, Fit, Payload, Reply, Round, Task
from fedloom.core.randomness import derive
from fedloom.server.combine.sorted import Median
from fedloom.server.optimizers import Adam

APART = Sharing(pool="off")
LENGTH = 400


@dataclass
class Village:
    """Clients that always move by a vector of their own, and a little at random."""

    algorithm: Algorithm[Any]
    pushes: Mapping[str, Tensor]
    examples: Mapping[str, int]
    noise: float = 0.0
    state: Any = None
    number: int = 0
    memories: dict[str, Payload] = field(default_factory=dict)
    asked: dict[str, int] = field(default_factory=dict)
    sent: Mapping[str, Payload] = field(default_factory=dict)
    told: Mapping[str, float] = field(default_factory=dict)
    profiles: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        start = {"x.lora_A": torch.zeros(2, 3), "x.lora_B": torch.zeros(LENGTH)}
        self.state = self.algorithm.init({n: t.double() for n, t in start.items()}, 0)

    def population(self) -> dict[str, Mapping[str, str]]:
        return {c: self.profiles.get(c, {}) for c in sorted(self.pushes)}

    def play(self, *cohorts: Sequence[str] | None) -> None:
        for names in cohorts:
            self.number += 1
            everybody = self.population()
            cohort = tuple(everybody if names is None else names)
            round = Round(self.number, self.number, everybody, cohort, len(cohort) / len(everybody))
            self.sent = self.algorithm.broadcast(self.state, round)
            replies = [self.answer(client, round) for client in self.sent]
            self.state, self.told = self.algorithm.server_update(self.state, round, iter(replies))

    def answer(self, client: str, round: Round) -> Reply:
        seed = derive(round.seed, client)
        task = Task("train", round.number, client, seed, {}, self.sent[client])
        half = self.algorithm.client_update(task, self.memories.get(client, {}))
        fits = 0
        try:
            work = next(half)
            while True:
                assert isinstance(work, Fit)
                fits += 1
                source = torch.Generator().manual_seed(derive(seed, fits))
                jitter = self.noise * torch.randn(LENGTH, generator=source, dtype=torch.float64)
                moves = {"x.lora_B": self.pushes[client] + jitter}
                ends = {n: t + moves.get(n, 1.0) for n, t in work.start.items()}
                work = half.send(Done(ends, self.examples[client], 1, 1.0))
        except StopIteration as stop:
            reply, self.memories[client] = stop.value
        self.asked[client] = fits
        return reply

    def used(self, client: str) -> Tensor:
        """Return B as this client would use it now."""
        round = Round(self.number + 1, 0, self.population(), tuple(self.population()), 1.0)
        payload = self.algorithm.broadcast(self.state, round)[client]
        return self.algorithm.deployed(payload, self.memories.get(client, {}))["x.lora_B"]

    def groups(self) -> set[frozenset[str]]:
        members = self.state.grouping.members.values()
        return {frozenset(clients) for clients in members}


def tongues(*sizes: int, seed: int = 0) -> dict[str, Tensor]:
    """Return a push for each client; `a0`, `a1`, ... of the first language, `b0`, ... of the second."""
    source = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        return torch.randn(LENGTH, generator=source, dtype=torch.float64)

    common, pushes = draw(), dict[str, Tensor]()
    for letter, size in zip("abcdef", sizes, strict=False):
        own = draw()
        pushes |= {f"{letter}{i}": common + 1.5 * own + 0.5 * draw() for i in range(size)}
    return pushes


def village(algorithm: Algorithm[Any], pushes: Mapping[str, Tensor], **extra: Any) -> Village:
    examples = {client: 1 + i % 3 for i, client in enumerate(sorted(pushes))}
    return Village(algorithm, pushes, examples, **extra)


def mean(values: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    weights = weights or [1.0] * len(values)
    return torch.stack([w * v for w, v in zip(weights, values, strict=True)]).sum(0) / sum(weights)


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=1e-12)


# --- the paper ------------------------------------------------------------------------------------


def test_the_papers_timeline_with_everybody_there() -> None:
    """S = 1, the model for all once more, then plain means of the clusters."""
    u = tongues(2, 3)
    place = village(Clustered(FedAvg(), Paper(2)), u)
    place.play(None)
    ids = sorted(u)
    g1 = mean([u[c] for c in ids], [float(place.examples[c]) for c in ids])
    assert place.groups() == {frozenset({"a0", "a1"}), frozenset({"b0", "b1", "b2"})}
    assert all(close(place.used(c), g1) for c in ids), "clusters act a round later"
    of = {c: mean([u[d] for d in ids if d[0] == c[0]]) for c in ids}
    place.play(None)
    assert all(close(place.used(c), g1 + of[c]) for c in ids)
    place.play(None)
    assert all(close(place.used(c), g1 + 2 * of[c]) for c in ids)
    assert len({id(payload) for payload in place.sent.values()}) == 2


def test_the_papers_timeline_with_some_of_them_there() -> None:
    """Who is not there when clusters form counts with where it stood; a cluster not drawn stays to the bit."""
    u = tongues(2, 3)
    place = village(Clustered(FedAvg(), Paper(2, at_round=2)), u)
    place.play(["a0", "b0"])
    g1 = mean([u["a0"], u["b0"]], [float(place.examples[c]) for c in ("a0", "b0")])
    place.play(["a0"])
    assert set(place.sent) == set(u), "the round that groups them takes everybody"
    g2 = g1 + mean([u[c] for c in sorted(u)], [float(place.examples[c]) for c in sorted(u)])
    place.play(["a0", "b1"])
    assert set(place.sent) == {"a0", "b1"}
    of_a = mean([g2 + u["a0"], g1 + u["a1"]])
    of_b = mean([g1 + u["b0"], g2 + u["b1"], g1 + u["b2"]])
    assert close(place.used("a1"), of_a)
    assert close(place.used("b0"), of_b)
    before = place.used("b0").clone()
    place.play(["a1"])
    assert close(place.used("a0"), of_a + u["a1"])
    assert torch.equal(place.used("b0"), before)


def test_the_papers_labels_stay_and_latecomers_keep_the_last_shared_model() -> None:
    u = tongues(2, 2)
    place = village(Clustered(FedAvg(), Paper(2)), u)
    place.play(None, None)
    shared = place.algorithm.inner.broadcast  # type: ignore[attr-defined]
    late = {**u, "c0": u["a0"]}
    place.pushes, place.examples = late, {**place.examples, "c0": 1}
    labels = place.state.grouping.assignment
    place.play(None, None)
    assert place.state.grouping.assignment == labels
    one = Round(9, 0, {"c0": {}}, ("c0",), 1.0)
    assert torch.equal(
        place.used("c0"), shared(place.state.global_state, one)["c0"]["params"]["x.lora_B"]
    )


@pytest.mark.parametrize("k", [1, 4])
def test_one_cluster_and_a_cluster_each_are_the_papers_baselines(k: int) -> None:
    u = tongues(2, 2)
    place = village(Clustered(FedAvg(), Paper(k)), u)
    place.play(None, None, None)
    assert len(place.state.cluster_states) == k
    g1 = mean([u[c] for c in sorted(u)], [float(place.examples[c]) for c in sorted(u)])
    step = mean(list(u.values()))
    for client in u:
        assert close(place.used(client), g1 + 2 * (step if k == 1 else u[client]))


# --- ours -----------------------------------------------------------------------------------------


def test_clusters_are_there_as_soon_as_the_updates_are() -> None:
    u = tongues(3, 4, 5)
    place = village(Clustered(FedAvg(), share=APART, label="language"), u, noise=0.3)
    place.profiles = {c: {"language": c[0]} for c in u}
    place.play(None)
    assert place.groups() == {frozenset(c for c in u if c[0] == x) for x in "abc"}
    assert set(place.asked.values()) == {1}, "the first update is what is compared"
    for x in "abc":
        mine = [c for c in sorted(u) if c[0] == x]
        expected = mean([u[c] for c in mine], [float(place.examples[c]) for c in mine])
        assert float((place.used(mine[0]) - expected).norm() / expected.norm()) < 0.15
    assert place.told["num_clusters"] == 3
    assert place.told["confidence"] == place.told["adjusted_rand"] == 1
    assert place.state.grouping.changes.keys() == {1}


def test_who_comes_later_is_probed_from_the_model_everybody_holds() -> None:
    u = tongues(4, 4, 4)
    ids = sorted(u)
    place = village(Clustered(FedAvg(), Auto(enough=0.5, probes=1)), u, noise=0.3)
    place.play(ids[0:12:3], ids[1:12:3])
    assert place.asked == dict.fromkeys(ids[0:12:3], 1) | dict.fromkeys(ids[1:12:3], 2)
    assert len(place.state.grouping.rows) == 8
    assert place.state.cluster_states
    for unheard in ids[2:12:3]:
        assert torch.equal(place.used(unheard), _params(place.state.global_state))
    place.play([*ids[2:12:3], ids[0]])
    asked = {client for client, payload in place.sent.items() if "start" in payload}
    assert asked == set(ids[2:12:3]), "only who is probed is sent where the probe begins"
    place.play(ids[0:12:3])
    assert {place.asked[c] for c in ids[0:12:3]} == {1}, "nobody is asked twice so soon"
    assert place.groups() == {frozenset(c for c in u if c[0] == x) for x in "abc"}


def test_latecomers_find_their_cluster_and_a_new_one_is_founded_from_the_nearest() -> None:
    u = tongues(4, 4, 4)
    first = {c: v for c, v in u.items() if c[0] != "c"}
    place = village(Clustered(FedAvg()), first, noise=0.3)
    place.play(None, None)
    numbers = dict(place.state.grouping.assignment)
    assert len(place.state.cluster_states) == 2
    place.pushes, place.examples = u, dict.fromkeys(u, 1)
    place.play(["c0", "a0"])
    assert len(place.state.cluster_states) == 2, "one of its kind goes to the nearest"
    place.play(["c1", "c2", "c3", "b0"])
    assert place.groups() == {frozenset(c for c in u if c[0] == x) for x in "abc"}
    kept = place.state.grouping.assignment
    assert {c: kept[c] for c in first} == numbers, "who was there keeps the number"
    assert place.state.grouping.num_born == 3
    assert kept["c0"] == 2
    assert place.told["moved"] == 1, "c0"


def test_clients_are_asked_again_and_follow_their_data() -> None:
    u = tongues(4, 4)
    place = village(Clustered(FedAvg(), Auto(every=2)), u, noise=0.3)
    place.play(None)
    assert set(place.asked.values()) == {1}
    place.play(None)
    assert set(place.asked.values()) == {2}, "twice at first"
    place.play(None)
    assert set(place.asked.values()) == {1}
    place.pushes = {**u, "a0": u["b0"] + 0.1 * u["a1"]}
    place.play(None)
    assert set(place.asked.values()) == {2}
    place.play(None, None, None, None)
    assert place.groups() == {
        frozenset({"a1", "a2", "a3"}),
        frozenset({"a0", "b0", "b1", "b2", "b3"}),
    }
    assert list(place.state.grouping.changes)[1] > 3
    never = village(Clustered(FedAvg(), Auto(every=0)), u)
    never.play(*[None] * 14)
    assert set(never.asked.values()) == {1}


def test_clusters_that_grow_alike_are_merged_and_one_that_falls_apart_is_split() -> None:
    u = tongues(5, 5)
    place = village(Clustered(FedAvg(), Auto(every=1)), u, noise=0.5)
    place.play(None)
    assert len(place.state.cluster_states) == 2
    place.pushes = dict(zip(u, tongues(10, seed=1).values(), strict=True))
    place.play(*[None] * 12)
    assert not place.state.cluster_states
    assert place.told["num_clusters"] == 1
    place.pushes = u
    place.play(*[None] * 12)
    assert len(place.state.cluster_states) == 2
    assert sorted(place.state.cluster_states) == [2, 3], "numbers are used once"


def test_without_clusters_it_is_the_inner_algorithm_to_the_bit() -> None:
    """k = 1: nobody is asked, nothing is added."""
    u = tongues(3, 3)
    for inner in (FedAvg(), FedAvg(Adam(0.1)), Scaffold()):
        place, plain = village(Clustered(inner, Auto(1)), u), village(inner, u)
        for it in (place, plain):
            it.play(None, ["a0", "b1"], None)
        assert torch.equal(_params(place.state.global_state), _params(plain.state))
        assert place.sent["a0"].keys() == plain.sent["a0"].keys()
        assert not place.state.grouping.rows


def test_a_cluster_each_is_local_training() -> None:
    """k = N, everybody there."""
    u = tongues(2, 2, 1)
    place, alone = village(Clustered(FedAvg(), Auto(5), APART), u), village(LocalOnly(), u)
    for it in (place, alone):
        it.play(*[None] * 4)
    for client in u:
        assert close(place.used(client), alone.used(client))
    assert len({id(p) for p in place.sent.values()}) == 5


def test_renaming_clients_renames_clusters_only() -> None:
    u = tongues(3, 4, 5)
    ids = sorted(u)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(3)).tolist()
    other = {f"z{at:02d}": ids[i] for at, i in enumerate(order)}
    a = village(Clustered(FedAvg()), u)
    b = village(Clustered(FedAvg()), {new: u[old] for new, old in other.items()})
    b.examples = {new: a.examples[old] for new, old in other.items()}
    for it in (a, b):
        it.play(*[None] * 3)
    assert {frozenset(other[c] for c in group) for group in b.groups()} == a.groups()
    for new, old in other.items():
        assert close(b.used(new), a.used(old))


def test_each_cluster_has_a_server_optimizer_of_its_own() -> None:
    u = tongues(3, 3)
    place = village(Clustered(FedAvg(Adam(0.1)), Auto(2), APART), u)
    place.play(None, ["a0"], ["a1"])
    (a, b) = (place.state.cluster_states[place.state.grouping.assignment[c]] for c in ("a0", "b0"))
    for ids, center, turns in ((["a0", "a1", "a2"], a, 3), (["b0", "b1", "b2"], b, 1)):
        alone = village(FedAvg(Adam(0.1)), {c: u[c] for c in ids})
        alone.examples = place.examples
        alone.play(None, *[[c] for c in ("a0", "a1")][: turns - 1])
        assert close(_params(center), _params(alone.state))


def test_clusters_may_share_tensors_and_a_part_of_the_model_for_all() -> None:
    u = tongues(3, 3)
    place = village(
        Clustered(FedAvg(weighting="uniform"), Auto(2), Sharing(["lora_A"], mix=0.25)), u
    )
    place.play(None, None)
    (a, b) = place.sent["a0"]["params"], place.sent["b0"]["params"]
    assert torch.equal(a["x.lora_A"], b["x.lora_A"])
    assert close(_params(place.state.global_state, "x.lora_A"), torch.full((2, 3), 2.0).double())
    own, whole = mean([u[c] for c in ("a0", "a1", "a2")]), mean(list(u.values()))
    assert close(a["x.lora_B"], 0.75 * own + 0.25 * whole)
    assert len({id(p) for p in place.sent.values()}) == 2, "one object a cluster"


def test_a_client_may_belong_to_several_clusters() -> None:
    u = tongues(4, 4)
    soft = village(Clustered(FedAvg(), Auto(2), Sharing(temperature=50.0)), u)
    hard = village(Clustered(FedAvg(), Auto(2), Sharing(temperature=1e-3)), u)
    plain = village(Clustered(FedAvg(), Auto(2), APART), u)
    for it in (soft, hard, plain):
        it.play(None, None)
    distance = {
        name: float((it.used("a0") - it.used("b0")).norm())
        for name, it in (("soft", soft), ("hard", hard), ("plain", plain))
    }
    assert distance["soft"] < 0.9 * distance["plain"]
    assert distance["hard"] == pytest.approx(distance["plain"])


def test_one_who_says_nothing_is_asked_again_and_uses_the_model_for_all() -> None:
    u = tongues(3, 3) | {"z": torch.zeros(LENGTH, dtype=torch.float64)}
    place = village(Clustered(FedAvg()), u)
    place.play(None, None)
    assert "z" not in place.state.grouping.rows
    assert place.asked["z"] == 2
    assert torch.equal(place.used("z"), _params(place.state.global_state))
    assert len(place.state.cluster_states) == 2


def test_private_refuses_what_reads_every_upload_and_clusters_refuse_what_is_private() -> None:
    with pytest.raises(
        ValueError, match="reads the mean of uploads, got Clustered, which reads each"
    ):
        Private(Clustered(FedAvg()), 1.0, noise_multiplier=1.0)
    with pytest.raises(ValueError, match="cannot wrap a private algorithm"):
        Clustered(Private(FedAvg(), 1.0, noise_multiplier=1.0))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Auto(0), "mode.auto.num_clusters must be at least 1, got 0"),
        (lambda: Auto(at_round=0), "mode.auto.at_round must be at least 1"),
        (lambda: Auto(enough=0), r"mode.auto.enough must be in \(0, 1\], got 0"),
        (lambda: Auto(probes=0), "mode.auto.probes must be at least 1, got 0"),
        (lambda: Auto(every=-1), "mode.auto.every must be at least 0, got -1"),
        (lambda: Auto(sketch=3), "mode.auto.sketch must be at least 16, got 3"),
        (lambda: Auto(probe=0), "mode.auto.probe must be at least 1, got 0"),
        (
            lambda: Auto(compare=cast(Any, "A")),
            "mode.auto.compare must be one of B, last_B, all, BA, got 'A'",
        ),
        (
            lambda: Paper(3, compare=cast(Any, "BA")),
            "mode.paper.compare must be one of last_B, B, all, got 'BA'",
        ),
        (lambda: Sharing("lora_A"), "share.names must be a list of names, got 'lora_A'"),
        (lambda: Sharing(mix=1.0), r"share.mix must be in \[0, 1\), got 1.0"),
        (lambda: Sharing(temperature=-1), "share.temperature must be >= 0, got -1"),
        (
            lambda: Clustered(FedAvg(), Paper(2), Sharing(mix=0.5)),
            "clustered.share.names, mix and temperature have an effect in mode auto only",
        ),
        (
            lambda: Sharing(["lora_A"], mix=0.5, pool="on"),
            "share.pool estimates how much clusters share: leave out names and mix",
        ),
        (
            lambda: Sharing(pool="some"),  # type: ignore[arg-type]
            "share.pool must be one of auto, on, off, got 'some'",
        ),
        (
            lambda: Clustered(FedAvg(), Paper(2), Sharing(pool="on")),
            "share.pool is not for mode paper",
        ),
        (
            lambda: Clustered(Flasc(Scaffold()), share=Sharing(pool="on")),
            r"reads the mean of `delta` and nothing else of the uploads, got flasc\(scaffold\)",
        ),
        (
            lambda: Clustered(FedAvg(combine=Median()), share=Sharing(pool="on")),
            r"nothing else of the uploads, got fedavg: leave it out",
        ),
        (lambda: Clustered(DeComFL(), share=Sharing(pool="on")), "got decomfl: leave it out"),
        (lambda: Clustered(Flasc(Clustered(FedAvg()))), "clustered cannot be in itself"),
        (lambda: Clustered(FedKSeed(), share=Sharing(pool="on")), "got fedkseed: leave it out"),
        (
            lambda: Clustered(Prune(FedAvg()), share=Sharing(pool="on")),
            r"got prune\(fedavg\): leave it out",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(make: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def test_more_clusters_than_clients_are_refused() -> None:
    for mode in (Auto(5), Paper(5)):
        with pytest.raises(
            ValueError, match=r"num_clusters must be at most the 4 clients .* got 5"
        ):
            village(Clustered(FedAvg(), mode), tongues(2, 2)).play(None)
    with pytest.raises(
        ValueError, match=r"clustered\.label must be in clients' profiles \(.*\), got 'tongue'"
    ):
        village(Clustered(FedAvg(), label="tongue"), tongues(2, 2)).play(None)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (
            {"mode": {"auto": {"num_clusters": 5}}},
            r"auto\.num_clusters must be at most the 4 clients",
        ),
        ({"mode": {"random": {"num_clusters": 5}}}, r"random\.num_clusters must be at most the 4"),
        ({"mode": {"paper": {"num_clusters": 5}}}, r"paper\.num_clusters must be at most the 4"),
        ({"label": "dialect"}, r"clustered\.label must be in .*language.*got 'dialect'"),
        ({"mode": {"given": {"by": "dialect"}}}, r"by must be in .*language.*got 'dialect'"),
        ({"share": {"names": ["lora_C"]}}, r"share\.names must be parts of .* got 'lora_C'"),
        ({"share": {"names": ["lora"]}}, r"share\.names must leave a tensor .* got \['lora'\]"),
    ],
)
def test_what_clients_and_tensors_do_not_allow_is_refused_before_anything_is_written(
    sections: dict[str, Any], said: str, small_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    data = {"num_examples": 120, "partition": {"clusters": {"by": "language"}}}

    def run() -> None:
        recipe = small_recipe(algorithm=[{"clustered": sections}, "fedavg"], data=data)
        experiment.run(recipe, tmp_path / "run")

    with pytest.raises(ValueError, match=said):
        run()
    assert not (tmp_path / "run").exists()


def test_a_cluster_of_fewer_clients_than_a_secure_sum_needs_is_refused(
    small_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    data = {
        "num_examples": 120,
        "where": {"language": ["de", "en"]},
        "partition": {"clusters": {"by": "language"}},
    }
    given = {"mode": {"given": {"by": "group"}}, "share": {"pool": "off"}}
    recipe = small_recipe(
        algorithm=[{"clustered": given}, "fedavg"], data=data, secure={"threshold": 3}
    )
    with pytest.raises(ValueError, match="whose sum nobody would be told otherwise, got 3, and"):
        experiment.run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_recipe_in_which_nobody_could_be_grouped_is_refused(
    small_recipe: Callable[..., Any],
) -> None:
    for mode in ({"auto": {"at_round": 4}}, {"paper": {"num_clusters": 2, "at_round": 4}}):
        with pytest.raises(ValueError, match=r"at_round must be at most run\.rounds, which is 3"):
            small_recipe(algorithm=[{"clustered": {"mode": mode}}, "fedavg"], run={"rounds": 3})
    for names in (["alternate", "clustered", "fedavg"], ["clustered", "alternate", "fedavg"]):
        with pytest.raises(ValueError, match="in which alternate moves different tensors"):
            small_recipe(algorithm=names)


def test_tensors_that_rest_are_pooled_with_nobody(small_recipe: Callable[..., Any]) -> None:
    given = {"mode": {"given": {"by": "language"}}}
    recipe = small_recipe(algorithm=["alternate", {"clustered": given}, "fedavg"])
    assert not recipe.algorithm.inner.pools
    with pytest.raises(ValueError, match=r"share\.pool compares updates of different rounds"):
        small_recipe(
            algorithm=["alternate", {"clustered": {**given, "share": {"pool": "on"}}}, "fedavg"]
        )


def test_products_are_refused_where_coordinates_count_from_the_start() -> None:
    with pytest.raises(ValueError, match=r"tune\.lora\.origin zero"):
        village(Clustered(FedAvg(), Auto(compare="BA")), tongues(2, 2))


def _params(state: Any, name: str = "x.lora_B") -> Tensor:
    found: Tensor = dataclasses.asdict(state)["params"][name]
    return found
