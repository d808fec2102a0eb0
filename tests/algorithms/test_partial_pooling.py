"""Partial pooling down to single clients: its estimates on average, its rule by hand, both ends, and what it refuses."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedloom import experiment
from fedloom.algorithms.alternate import Alternate
from fedloom.algorithms.clustered import Clustered
from fedloom.algorithms.decomfl import DeComFL
from fedloom.algorithms.ditto import Ditto
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.fedex import FedEx
from fedloom.algorithms.fedkseed import FedKSeed
from fedloom.algorithms.flasc import Flasc
from fedloom.algorithms.freeze import Freeze
from fedloom.algorithms.local import LocalOnly
from fedloom.algorithms.partial_pooling import PartialPooling, PartialPoolingState
from fedloom.algorithms.private import Private
from fedloom.algorithms.scaffold import Scaffold
from fedloom.clustering.given import Given
from fedloom.clustering.modes import Paper
from fedloom.clustering.personal import with_update
from fedloom.clustering.pooling import Variances, pool_clients
from fedloom.clustering.sharing import Sharing
from fedloom.core.arms import Arm
from fedloom.core.params import equal
from fedloom.core.protocols import Done, Reply, Round
from fedloom.core.seed_sequences import COEFFICIENTS
from fedloom.core.sparsity import Density
from fedloom.recipe import build_recipe
from fedloom.result import Result
from fedloom.server.combine.chosen import Krum
from fedloom.server.optimizers import Adam

CENTERS = (1.0, -4.0, 6.0, 3.0)
PEOPLE = {"a": {"of": "x"}, "b": {"of": "x"}, "c": {"of": "y"}, "d": {"of": "y"}}


def sent(values: Mapping[str, float], weight: float = 1.0) -> list[Reply]:
    return [
        Reply(client, {"delta": {"w": torch.tensor([value], dtype=torch.float64)}}, weight)
        for client, value in values.items()
    ]


def noisy(replies: Sequence[Reply], **squared: float) -> list[Reply]:
    """Return replies of which some hold an estimate of the noise."""
    return [
        replace(
            reply,
            upload={
                **reply.upload,
                "noise": {"squared": torch.tensor([squared[reply.client]], dtype=torch.float64)},
            },
        )
        if reply.client in squared
        else reply
        for reply in replies
    ]


def settled(state: Any, noise: float, spread: float) -> PartialPoolingState[Any]:
    """Return the state with variances in the place of its own."""
    found: PartialPoolingState[Any] = replace(
        state, variances=Variances({"w": noise}, {"w": spread})
    )
    return found


# --- the estimates --------------------------------------------------------------------------------


def test_what_clients_differ_by_is_their_spread_and_the_noise_of_their_updates() -> None:
    """By hand: (1, 3 | -1, -3) lie 2 apart about their clusters; a noise of 0.5 leaves 1.5."""
    replies = sent({"a": 1, "b": 3, "c": -1, "d": -3})
    pairs = {"a": 0, "b": 0, "c": 1, "d": 1}
    found = pool_clients(replies, pairs, [{"w": 0.25}, {"w": 0.75}], Variances())
    assert found == Variances({"w": 0.5}, {"w": 1.5})
    assert found.own_shares().get("w", 0.0) == pytest.approx(0.75)
    # About everybody's mean they lie 20 / 3 apart.
    whole = pool_clients(replies, dict.fromkeys("abcd", 0), [{"w": 0.5}], Variances())
    assert whole.spread["w"] == pytest.approx(20 / 3 - 0.5)


def test_rounds_are_averaged_before_the_spread_is_cut_off() -> None:
    replies, pairs = sent({"a": 1, "b": 3}), {"a": 0, "b": 0}
    one = pool_clients(replies, pairs, [{"w": 5.0}], Variances())
    assert (one.spread["w"], one.own_shares().get("w", 0.0)) == (-3.0, 0.0)
    two = pool_clients(replies, pairs, [{"w": 1.0}], one)
    assert (two.spread["w"], two.own_shares().get("w", 0.0)) == (-1.0, 0.0)
    three = pool_clients(replies, pairs, [], two)
    assert three.noise == {"w": 1.0}, "nobody made an estimate: the last one stays"
    assert three.spread["w"] == pytest.approx((-1 + 2 - 1) / 2)


def test_nothing_is_known_before_an_estimate_of_the_noise_or_of_single_clients() -> None:
    pairs = {"a": 0, "b": 0, "c": 1}
    assert pool_clients(sent({"a": 1, "b": 3}), pairs, [], Variances()) == Variances()
    single = pool_clients(sent({"a": 1, "c": 3}), pairs, [{"w": 2.0}], Variances())
    assert single == Variances({"w": 2.0})
    assert single.own_shares().get("w", 0.0) == 0


def test_on_average_both_are_what_they_are() -> None:
    """Noise 8 and spread 3 a client, in clusters of 2, 3 and 5 with unequal weights, each within 1 %."""
    source = torch.Generator().manual_seed(5)
    size = 4000
    clusters = [0, 0, 1, 1, 1, 2, 2, 2, 2, 2]
    names = [f"c{i}" for i in range(10)]
    means = 10 * torch.randn(3, size, generator=source, dtype=torch.float64)
    true = means[clusters] + 3**0.5 * torch.randn(10, size, generator=source, dtype=torch.float64)
    rounds = 60
    noise = spread = 0.0
    for _ in range(rounds):
        one, two = (
            true + 8**0.5 * torch.randn(10, size, generator=source, dtype=torch.float64)
            for _ in range(2)
        )
        replies = [
            Reply(name, {"delta": {"w": u}}, 1.0 + i % 3)
            for i, (name, u) in enumerate(zip(names, one, strict=True))
        ]
        told = [{"w": float((one[i] - two[i]).square().sum()) / 2} for i in (0, 4)]
        found = pool_clients(replies, dict(zip(names, clusters, strict=True)), told, Variances())
        noise += found.noise["w"] / size / rounds
        spread += found.spread["w"] / size / rounds
    # The clients' own deviations were drawn once: 7 of them are free.
    exact = pool_clients(
        [
            Reply(name, {"delta": {"w": t}}, 1.0 + i % 3)
            for i, (name, t) in enumerate(zip(names, true, strict=True))
        ],
        dict(zip(names, clusters, strict=True)),
        [{"w": 0.0}],
        Variances(),
    ).spread["w"]
    assert noise == pytest.approx(8, rel=0.01)
    assert exact / size == pytest.approx(3, rel=0.03)
    assert spread == pytest.approx(exact / size, rel=0.01)


def test_halves_of_a_training_with_momentum_hide_most_of_the_noise() -> None:
    """Why clients train twice: ten steps of Adam's first moment on noise alone, halves against a second training."""
    source = torch.Generator().manual_seed(2)
    runs = []
    for _ in range(2):
        mean, at = torch.zeros(20_000), [torch.zeros(20_000)]
        for step in range(1, 11):
            mean = 0.9 * mean + 0.1 * torch.randn(20_000, generator=source)
            at.append(at[-1] - mean / (1 - 0.9**step))
        runs.append(at)
    (*_, one), (*_, two) = runs
    middle = runs[0][5]
    halves = float(((one - middle) - middle).square().sum())
    replicate = float((one - two).square().sum()) / 2
    true = float(one.square().sum())
    assert replicate == pytest.approx(true, rel=0.03)
    assert halves / true == pytest.approx(0.33, abs=0.03)


# --- a client's own model -------------------------------------------------------------------------


def test_a_round_by_hand(task: Any, drive: Callable[..., Any]) -> None:
    """Sent 1 and moved by 4 to 5; the others moved the shared model by 2: at mu 0.25 its own is 3 + 0.25 (4 - 2)."""
    algorithm = PartialPooling(FedAvg())

    def download(params: float, mu: float, moves: int) -> Any:
        pooling = {"mu": torch.tensor([mu], dtype=torch.float64), "moves": torch.tensor(moves)}
        return {"params": {"w": torch.tensor([params])}, "pooling": pooling}

    first = replace(task(params=[1.0]), download=download(1.0, 0.0, 0))
    reply, kept, (fit,) = drive(
        algorithm.client_update(first, {}), lambda fit: Done({"w": fit.start["w"] + 4}, 1)
    )
    assert fit.start is first.download["params"], "the shared model itself"
    assert reply.upload.keys() == {"delta"}
    then = download(3.0, 0.25, 1)
    assert float(algorithm.deployed(then, kept)["w"]) == 3.5
    second = replace(task(params=[3.0]), round=2, download=then)
    reply, kept, (fit,) = drive(
        algorithm.client_update(second, kept), lambda fit: Done({"w": fit.start["w"] - 1}, 1)
    )
    assert float(fit.start["w"]) == 3.5
    assert float(reply.upload["delta"]["w"]) == -1
    # Three rounds later: the shared model went from 3 to 9, 2 a round; the deviation of 0.5 stays, with 0.5 (-1 - 2).
    assert float(algorithm.deployed(download(9.0, 0.5, 4), kept)["w"]) == 8.0
    # Its reply came to nothing, as nobody's did.
    assert float(algorithm.deployed(download(3.0, 0.5, 1), kept)["w"]) == 3.5


def test_a_client_that_is_asked_trains_again_and_sends_a_number_a_tensor(
    task: Any, drive: Callable[..., Any]
) -> None:
    algorithm = PartialPooling(FedAvg(), 1.0)
    start = {"v": torch.zeros(1), "w": torch.tensor([1.0, 1.0])}
    round = Round(1, 3, {"c": {}}, ["c"], 1.0)
    sent_to = algorithm.broadcast(algorithm.init(start, 0), round)
    given = replace(task(params=[0.0]), download=sent_to["c"])
    ends = iter([{"v": 1.0, "w": 3.0}, {"v": 1.0, "w": 5.0}])

    def answer(fit: Any) -> Done:
        values = next(ends)
        return Done({name: torch.full_like(t, values[name]) for name, t in fit.start.items()}, 1)

    reply, kept, asked = drive(algorithm.client_update(given, {}), answer)
    assert len(asked) == 2
    assert all(fit.start is sent_to["c"]["params"] for fit in asked)
    assert reply.upload["noise"]["squared"].tolist() == [0.0, (2**2 + 2**2) / 2]
    assert reply.upload["delta"]["w"].tolist() == [2.0, 2.0], "the first training is what is sent"
    assert kept["pooling_update"]["w"].tolist() == [2.0, 2.0]


def test_a_second_walk_is_along_other_directions_too(task: Any, drive: Callable[..., Any]) -> None:
    algorithm = PartialPooling(FedKSeed(uploads="delta", steps=8), 1.0)
    state = algorithm.init({COEFFICIENTS: torch.zeros(64, dtype=torch.float64)}, 0)
    download = algorithm.broadcast(state, Round(1, 3, {"c": {}}, ["c"], 1.0))["c"]
    half = algorithm.client_update(replace(task(params=[0.0]), download=download), {})
    _, _, (one, two) = drive(half, lambda fit: Done(fit.start, 1))
    assert one.seed_sequence[COEFFICIENTS].tolist() != two.seed_sequence[COEFFICIENTS].tolist()


def test_a_share_of_the_cohort_is_asked_another_each_round() -> None:
    algorithm = PartialPooling(FedAvg(), 0.3)
    state = algorithm.init({"w": torch.zeros(1)}, 0)
    people: dict[str, dict[str, str]] = {f"c{i}": {} for i in range(10)}

    def asked(number: int, cohort: Sequence[str]) -> set[str]:
        found = algorithm.broadcast(state, Round(number, number, people, cohort, 1.0))
        assert len({id(payload) for payload in found.values()}) <= 2
        return {c for c, payload in found.items() if "replicate" in payload["pooling"]}

    drawn = [asked(number, list(people)) for number in range(1, 9)]
    assert [len(one) for one in drawn] == [3] * 8
    assert len(set().union(*drawn)) > 6
    assert asked(9, ["c4"]) == {"c4"}, "at least one"


# --- both ends ------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", [FedAvg(), FedAvg(Adam(0.1), mu=0.1)])
def test_without_a_spread_everybody_uses_the_inner_algorithms_model_to_the_bit(
    inner: Any, world: Any, parabola: Any
) -> None:
    losses = [parabola(center=a) for a in CENTERS]
    plain, place = world(inner, losses), world(PartialPooling(inner), losses)
    for _ in range(4):
        # No noise at all would be a spread without bound, so the variances are set.
        place.state = settled(place.state, 1.0, -1.0)
        for each in (plain, place):
            each.play(1)
    assert equal(place.state.inner.params, plain.state.params)
    place.state = settled(place.state, 1.0, -1.0)
    place.play(1)
    for client in ("c0", "c3"):
        # Measured with what it was sent in its last round, as the state was before.
        assert equal(place.deployed(client), place.downloads[client]["params"])


def test_frozen_tensors_are_no_part_of_a_clients_own_way(world: Any) -> None:
    start = {"w": torch.zeros(2, dtype=torch.float64), "frozen": torch.ones(1, dtype=torch.float64)}
    algorithm = Freeze(PartialPooling(FedAvg()), ("frozen",))
    place = world(algorithm, [], start)
    told = Round(1, 0, {"a": {}, "b": {}}, ("a", "b"), 1.0)
    download = algorithm.broadcast(place.state, told)["a"]
    assert algorithm.deployed(download, {}) is download["params"]
    update = {"w": torch.full((2,), 3.0, dtype=torch.float64)}
    memory = with_update(download, download["params"], update)
    variances = Variances({"w": 0.0}, {"w": 1.0})
    state = replace(place.state, inner=replace(place.state.inner, moves=1, variances=variances))
    own = algorithm.deployed(algorithm.broadcast(state, told)["a"], memory)
    assert (own["w"].tolist(), own["frozen"].tolist()) == ([3.0, 3.0], [1.0])


def test_without_noise_everybody_trains_alone(world: Any, parabola: Any) -> None:
    losses = [parabola(center=a) for a in CENTERS]
    alone, place = world(LocalOnly(), losses), world(PartialPooling(FedAvg()), losses)
    for _ in range(4):
        place.state = settled(place.state, 0.0, 1.0)
        place.play(1)
        alone.play(1)
    sent_next = replace(place.round, number=5)
    downloads = place.algorithm.broadcast(settled(place.state, 0.0, 1.0), sent_next)
    for client in ("c0", "c1", "c2", "c3"):
        own = place.algorithm.deployed(downloads[client], place.memories[client])
        assert float(own["w"]) == pytest.approx(float(alone.deployed(client)["w"]), abs=1e-12)


def test_parabolas_end_at_their_own_minimum_and_the_shared_one_at_the_mean(
    world: Any, parabola: Any
) -> None:
    """Full gradients have no noise, so what clients differ by is theirs."""
    place = world(PartialPooling(FedAvg()), [parabola(center=a) for a in CENTERS])
    place.play(60)
    assert float(place.state.inner.params["w"]) == pytest.approx(sum(CENTERS) / 4, abs=1e-6)
    for i, center in enumerate(CENTERS):
        assert float(place.deployed(f"c{i}")["w"]) == pytest.approx(center, abs=1e-6)


# --- with clusters --------------------------------------------------------------------------------


def test_clients_are_drawn_towards_their_cluster_not_towards_everybody() -> None:
    algorithm = PartialPooling(Clustered(FedAvg(), Given("of"), Sharing(pool="off")))
    state = algorithm.init({"w": torch.zeros(1, dtype=torch.float64)}, 0)
    round = Round(1, 0, PEOPLE, tuple(PEOPLE), 1.0)
    replies = noisy(sent({"a": 11, "b": 13, "c": -11, "d": -13}), a=0.5)
    after, metrics = algorithm.server_update(state, round, iter(replies))
    assert after.variances == Variances({"w": 0.5}, {"w": 1.5})
    assert metrics["mu"] == pytest.approx(0.75)
    assert sorted(float(s.params["w"]) for s in after.inner.cluster_states.values()) == [-12, 12]
    assert algorithm.describe(after).clusters is not None, "clusters are shown as without it"


def test_with_pooled_clusters_there_are_three_levels_of_one_rule() -> None:
    """Hand values of pooled clusters, and within them those of clients: noise 2 of both levels is 1.5 and 0.5."""
    algorithm = PartialPooling(Clustered(FedAvg(), Given("of"), Sharing(pool="on")))
    state = algorithm.init({"w": torch.zeros(1, dtype=torch.float64)}, 0)
    round = Round(1, 0, PEOPLE, tuple(PEOPLE), 1.0)
    replies = noisy(sent({"a": 1, "b": 3, "c": -1, "d": -3}), b=0.5)
    after, metrics = algorithm.server_update(state, round, iter(replies))
    assert metrics["lambda"] == pytest.approx(7 / 8)
    assert metrics["mu"] == pytest.approx(3 / 4)
    assert sorted(float(s.params["w"]) for s in after.inner.cluster_states.values()) == [
        pytest.approx(-1.75),
        pytest.approx(1.75),
    ]


def test_the_order_of_clients_changes_nothing() -> None:
    algorithm = PartialPooling(Clustered(FedAvg(), Given("of")))
    state = algorithm.init({"w": torch.zeros(1, dtype=torch.float64)}, 0)
    round = Round(1, 0, PEOPLE, tuple(PEOPLE), 1.0)
    replies = noisy(sent({"a": 1, "b": 3, "c": -1, "d": -3}), a=0.5, d=1.5)
    one, _ = algorithm.server_update(state, round, iter(replies))
    other, _ = algorithm.server_update(state, round, iter(replies[::-1]))
    assert one.variances == other.variances == Variances({"w": 1.0}, {"w": 1.0})


# --- what it refuses ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inner", "named"),
    [
        (Scaffold(), r"scaffold"),
        (DeComFL(), r"decomfl"),
        (LocalOnly(), r"localonly"),
        (Ditto(FedAvg(combine=Krum(1))), r"ditto\(fedavg\)"),
        (Clustered(Scaffold()), r"scaffold"),
    ],
)
def test_algorithms_that_do_not_average_deltas_are_refused(inner: Any, named: str) -> None:
    with pytest.raises(ValueError, match=rf"reads the mean of `delta`.*got {named}: wrap"):
        PartialPooling(inner)


def test_the_papers_clusters_are_refused_however_deep() -> None:
    for inner in (Clustered(FedAvg(), Paper(2)), Flasc(Clustered(FedAvg(), Paper(2)))):
        with pytest.raises(ValueError, match=r"partial_pooling is not for clustered\.mode paper"):
            PartialPooling(inner)


def test_private_algorithms_are_refused_on_either_side() -> None:
    private = Private(FedAvg(), 1.0, noise_multiplier=1.0)
    with pytest.raises(ValueError, match="reads every upload, so it cannot wrap a private"):
        PartialPooling(private)
    with pytest.raises(ValueError, match="private"):
        Private(PartialPooling(FedAvg()), 1.0, noise_multiplier=1.0)


@pytest.mark.parametrize(
    ("around", "said"),
    [
        (Clustered, "write partial_pooling before clustered"),
        (Flasc, "write partial_pooling before flasc"),
        (lambda inner: Flasc(inner, upload_on="download"), "write partial_pooling before flasc"),
        (Alternate, "lets tensors rest, which partial_pooling inside"),
        (lambda inner: FedEx(inner, (Arm(0.5), Arm(1.0))), "train by different settings"),
    ],
)
def test_what_changes_uploads_whose_noise_was_measured_is_refused(
    around: Callable[[Any], Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        around(Ditto(PartialPooling(FedAvg())))


def test_what_leaves_whole_uploads_as_they_are_goes_around_it() -> None:
    dense = Density(1)
    for around in (Flasc(PartialPooling(FedAvg()), upload=dense), Ditto(PartialPooling(FedAvg()))):
        assert around.describe(None).measures_noise


@pytest.mark.parametrize("share", [0.0, 1.5, float("nan")])
def test_a_share_of_the_cohort_is_one(share: float) -> None:
    with pytest.raises(ValueError, match=r"partial_pooling\.replicates must be above 0 and at"):
        PartialPooling(FedAvg(), share)


def test_a_recipe_names_it_around_clusters(tmp_path: Path) -> None:
    recipe = build_recipe(
        {
            "name": "three levels",
            "algorithm": ["partial_pooling", {"clustered": {"share": {"pool": "on"}}}, "fedavg"],
            "data": {"num_examples": 120, "num_clients": 4, "max_length": 32},
            "tune": {"lora": {"rank": 2, "targets": ["q_proj"]}},
            "local": {"steps": 1, "batch_size": 2},
            "evaluation": {"every": 0, "validation": False, "generate": False, "max_examples": 2},
            "run": {"rounds": 2, "samples": 0},
        }
    )
    assert recipe.algorithm == PartialPooling(Clustered(FedAvg(), share=Sharing(pool="on")))
    result: Result = experiment.run(recipe, tmp_path)
    assert all(0 <= line["server/mu"] <= 1 for line in result.metrics if "server/mu" in line)
    assert (tmp_path / "report.html").exists()
