"""What an algorithm tells of itself and asks of a recipe is optional, and wrappers hand it on."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import pytest
import torch

from fedloom.algorithms.clustered import Clustered
from fedloom.algorithms.decomfl import DeComFL
from fedloom.algorithms.ditto import Ditto
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.fedkseed import FedKSeed
from fedloom.algorithms.flasc import Flasc
from fedloom.algorithms.freeze import Freeze
from fedloom.algorithms.private import Private
from fedloom.algorithms.prune import Prune
from fedloom.baselines import baseline_of
from fedloom.clustering.given import Given, Random
from fedloom.clustering.sharing import Sharing
from fedloom.core.description import (
    Accounts,
    Clusters,
    Description,
    Privacy,
    RecipeView,
    Seeds,
    check,
    describe,
)
from fedloom.core.params import sub
from fedloom.core.payloads import mean_upload, to_all
from fedloom.core.protocols import (
    Algorithm,
    ClientUpdate,
    Fit,
    Metrics,
    Params,
    Payload,
    Reply,
    Round,
    Sees,
    Task,
)
from fedloom.core.seed_sequences import COEFFICIENTS
from fedloom.core.wrapper import Wrapper, layers, stacked
from fedloom.recipe import build_recipe
from fedloom.rounds.loop import Run
from fedloom.rounds.privacy import Releases
from fedloom.server.combine.chosen import Krum
from fedloom.server.importance import Pro

RECIPE = build_recipe({"name": "plain"})
POISSON = build_recipe({"name": "drawn", "cohort": {"poisson": {"q": 0.5}}})
START = {"x.lora_A": torch.ones(2, 4), "x.lora_B": torch.ones(4, 2)}
PEOPLE = {"a": {"language": "x"}, "b": {"language": "y"}}


@dataclasses.dataclass(frozen=True)
class MineState:
    params: Params


@dataclasses.dataclass(frozen=True, slots=True)
class Mine:
    """A method of somebody's own, with the protocol and nothing else."""

    server_sees: ClassVar[Sees] = "mean"

    def init(self, params: Params, seed: int) -> MineState:
        return MineState(params)

    def broadcast(self, state: MineState, round: Round) -> Mapping[str, Payload]:
        return to_all(round, {"params": state.params})

    def client_update(self, task: Task, client_state: Payload) -> ClientUpdate:
        start = task.download["params"]
        done = yield Fit(start)
        return Reply(task.client, {"delta": sub(done.params, start)}), {}

    def deployed(self, download: Payload, client_state: Payload) -> Params:
        return download["params"]

    def server_update(
        self, state: MineState, round: Round, replies: Iterable[Reply]
    ) -> tuple[MineState, Metrics]:
        return MineState(mean_upload(replies)["delta"]), {}


@dataclasses.dataclass(frozen=True, slots=True)
class Telling(Mine):
    """The same, which tells of itself and asks for something."""

    rounds: int | None = None

    def describe(self, state: MineState | None) -> Description:
        if state is None:
            return Description(notes=("telling is for tests",))
        return Description(clusters=Clusters({"a": "french", "b": "french"}))

    def check(self, recipe: RecipeView, *, num_clients: int | None) -> "Telling":
        if recipe.run.samples:
            raise ValueError(f"run.samples must be 0 for telling, got {recipe.run.samples}")
        return dataclasses.replace(self, rounds=recipe.run.rounds)


def drawn(algorithm: Algorithm[Any], **run: Any) -> Any:
    settings = dataclasses.replace(POISSON.run, **run)
    return dataclasses.replace(POISSON, algorithm=algorithm, run=settings)


def test_of_an_algorithm_without_these_members_nothing_is_known_and_nothing_asked() -> None:
    mine = Mine()
    assert describe(mine, mine.init(START, 0)) == describe(mine) == Description()
    assert check(mine, RECIPE, num_clients=1) is mine
    assert dataclasses.replace(RECIPE, algorithm=mine).algorithm is mine
    assert describe(Ditto(Flasc(mine))) == Description()


def test_a_members_own_words_reach_the_recipe_through_any_wrapper() -> None:
    recipe = dataclasses.replace(RECIPE, run=dataclasses.replace(RECIPE.run, samples=0))
    for wrap in (Ditto, Flasc, Freeze, Prune, Clustered):
        wrapped: Any = wrap(Telling())
        made: Any = dataclasses.replace(recipe, algorithm=wrapped).algorithm
        assert made == wrap(Telling(recipe.run.rounds))
        with pytest.raises(ValueError, match=r"run\.samples must be 0 for telling, got 6"):
            dataclasses.replace(RECIPE, algorithm=wrapped)
        assert describe(wrapped).notes == ("telling is for tests",)
    inner: Any = Freeze(Telling())
    assert describe(inner, inner.init(START, 0)).clusters == Clusters(
        {"a": "french", "b": "french"}
    )


def test_a_wrapper_adds_its_own_to_what_is_inside() -> None:
    private = Private(
        Flasc(FedAvg()), 1.0, noise_multiplier=0.0, noise_seed=1, delta=0.1, quiet=True
    )
    algorithm: Any = Ditto(Freeze(Prune(private)))
    found = describe(algorithm, algorithm.init(START, 0))
    assert found.privacy is not None
    assert found.privacy.void == "noise_seed is set"
    assert found.quiet
    assert found.bounds_updates
    assert found.notes[0].startswith("private.noise_seed is set")
    assert found.clusters is None

    algorithm = Clustered(Ditto(FedAvg(combine=Krum(2))), Given("language"))
    state = algorithm.init(START, 0)
    assert describe(algorithm, state).clusters is not None
    assert describe(algorithm, state).clusters.assignment == {}  # type: ignore[union-attr]
    replies = [Reply(client, {"delta": START}) for client in PEOPLE]
    round = Round(1, 0, PEOPLE, tuple(PEOPLE), 1.0)
    state, _ = Clustered(Ditto(FedAvg()), Given("language")).server_update(state, round, replies)
    found = describe(algorithm, state)
    assert found.min_replies == 7
    assert found.clusters is not None
    assert found.clusters.assignment == {"a": "cluster-0", "b": "cluster-1"}
    assert found.clusters.names == ["cluster-0", "cluster-1"]
    assert found.clusters.changes == {1: found.clusters.assignment}


def test_seeds_are_told_where_their_chances_differ() -> None:
    start = {COEFFICIENTS: torch.zeros(8, dtype=torch.float64)}
    for algorithm, known in (
        (FedKSeed(), False),
        (FedKSeed(sampling=Pro()), True),
        (Clustered(Ditto(FedKSeed(sampling=Pro()))), True),
        (DeComFL(), False),
    ):
        seeds = describe(algorithm, algorithm.init(start, 0)).seeds
        assert isinstance(seeds, Seeds) == known
        if seeds is not None:
            assert torch.equal(seeds.chances, torch.full((8,), 1 / 8, dtype=torch.float64))
        assert describe(algorithm).seeds is None


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        (["fedkseed"], r"beside fedkseed, got 5: set algorithm\.fedkseed\.steps"),
        (["flasc", "decomfl"], r"beside decomfl, got 5: set algorithm\.decomfl\.steps"),
        (["ditto", "fedkseed"], None),
        (["clustered", "ditto", "fedkseed"], None),
    ],
)
def test_local_steps_is_refused_where_nothing_reads_it(layers: list[str], said: str | None) -> None:
    tree = {"name": "r", "tune": "seeds", "algorithm": layers, "local": {"steps": 5}}
    if said is None:
        build_recipe(tree)
    else:
        with pytest.raises(ValueError, match=said):
            build_recipe(tree)


def test_a_budget_is_spread_over_the_rounds_of_any_recipe_it_is_put_in() -> None:
    planned: Any = drawn(Ditto(Private(FedAvg(), 1.0, epsilon=2.0)), rounds=7).algorithm
    assert planned.inner.rounds == 7
    again: Any = drawn(planned, rounds=5).algorithm
    assert again == planned
    with pytest.raises(ValueError, match=r"private\.rounds must be at least run\.rounds \(9\)"):
        drawn(planned, rounds=9)
    noisy: Any = drawn(Private(FedAvg(), 1.0, noise_multiplier=1.0), rounds=7).algorithm
    assert noisy.rounds is None


@pytest.mark.parametrize(
    ("run", "said"),
    [
        ({"min_replies": 2}, r"run\.min_replies must be 0 for private"),
        ({"patience": 1}, r"run\.patience must be 0 for private"),
        ({"max_update_norm": 2.0}, r"run\.max_update_norm has no effect beside private.* got 2"),
        ({"baselines": ("local",)}, r"run\.baselines must be \[\] for private\.quiet"),
    ],
)
@pytest.mark.parametrize("wrap", [lambda one: one, Ditto, lambda one: Freeze(Prune(one))])
def test_what_private_refuses_names_the_setting_whatever_is_around_it(
    wrap: Any, run: dict[str, Any], said: str
) -> None:
    algorithm = wrap(Private(FedAvg(), 1.0, noise_multiplier=1.0, quiet=True))
    drawn(algorithm, samples=0)
    with pytest.raises(ValueError, match=said):
        drawn(algorithm, **{"samples": 0, **run})
    with pytest.raises(ValueError, match=r"cohort must be poisson for private, .* got full"):
        dataclasses.replace(RECIPE, algorithm=algorithm)


# --- the account ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Bare:
    """A wrapper that hands nothing on."""

    inner: Algorithm[Any]

    @property
    def server_sees(self) -> Sees:
        return self.inner.server_sees

    def init(self, params: Params, seed: int) -> Any:
        return self.inner.init(params, seed)

    def broadcast(self, state: Any, round: Round) -> Mapping[str, Payload]:
        return self.inner.broadcast(state, round)

    def client_update(self, task: Task, client_state: Payload) -> ClientUpdate:
        return self.inner.client_update(task, client_state)

    def deployed(self, download: Payload, client_state: Payload) -> Params:
        return self.inner.deployed(download, client_state)

    def server_update(
        self, state: Any, round: Round, replies: Iterable[Reply]
    ) -> tuple[Any, Metrics]:
        return self.inner.server_update(state, round, replies)


def test_a_wrapper_that_would_lose_the_account_is_refused() -> None:
    private: Any = Private(FedAvg(), 1.0, noise_multiplier=1.0)
    for algorithm in (Bare(private), Ditto(Bare(private))):
        with pytest.raises(ValueError, match="Bare, whose server sees a noisy mean, must hand on"):
            drawn(algorithm)
    assert drawn(Bare(FedAvg())).algorithm == Bare(FedAvg())


def test_what_was_released_is_charged_however_deep(tmp_path: Any) -> None:
    private: Any = Private(FedAvg(), 1.0, noise_multiplier=0.0)
    releases = [(1, "seal", 0.5, 0.0), (2, "other", 0.5, 0.0)]
    for algorithm in (private, Ditto(private), Freeze(Prune(Flasc(private)))):
        state: Any = algorithm.init(START, 0)
        assert isinstance(algorithm, Accounts)
        after = algorithm.charge(state, releases)
        assert type(after) is type(state)
        assert list(algorithm.released(after) or ()) == releases
        assert list(algorithm.released(state) or ()) == []
    plain: Any = Freeze(Ditto(FedAvg()))
    run = Run(0, 0, plain.init(START, 0))
    assert Releases(tmp_path / "releases", plain).charge(run, fresh=True) is run
    assert not (tmp_path / "releases").exists()


# --- layers --------------------------------------------------------------------------------------


def test_layers_are_put_back_on_one_another() -> None:
    algorithm: Any = Ditto(Freeze(Bare(FedAvg()), ("lora_B",)), 0.5)
    parts = list(layers(algorithm))
    assert [type(part) for part in parts] == [Ditto, Freeze, Bare, FedAvg]
    assert stacked(parts) == algorithm
    assert isinstance(algorithm, Wrapper)


def test_other_clusters_take_the_place_of_a_layers_own_however_deep() -> None:
    algorithm: Any = Ditto(Clustered(FedAvg(mu=0.5), share=Sharing(mix=0.1), label="language"))
    recipe = dataclasses.replace(RECIPE, algorithm=algorithm)
    summary = {"num_clusters": 3, "num_clients": 4}
    apart = Sharing(pool="off")  # as `mix` fixes what is shared, it is not estimated in them either
    for kind, expected in (
        ("oracle", Ditto(Clustered(FedAvg(mu=0.5), Given("language"), apart, label="language"))),
        ("random", Ditto(Clustered(FedAvg(mu=0.5), Random(3, 0), apart, label="language"))),
        ("fedavg", FedAvg(mu=0.5)),
    ):
        assert baseline_of(recipe, kind, summary=summary).algorithm == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["", "..", "a/b", "a\nb", " "])
def test_a_cluster_is_called_what_a_folder_can_be_called(name: str) -> None:
    with pytest.raises(ValueError, match="a cluster's name must be one that a folder can have"):
        Clusters({"a": name})


def test_nothing_is_quiet_unless_it_says_so() -> None:
    assert not Description().quiet
    assert not Description(privacy=Privacy()).quiet
