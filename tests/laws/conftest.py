"""Every algorithm of the table, and the bench that they are examined on."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedloom.algorithms.alternate import Alternate
from fedloom.algorithms.clustered import Clustered
from fedloom.algorithms.decomfl import DeComFL
from fedloom.algorithms.ditto import Ditto
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.fedbiot import FedBiOT
from fedloom.algorithms.fedem import FedEM
from fedloom.algorithms.fedex import FedEx
from fedloom.algorithms.fedkseed import FedKSeed
from fedloom.algorithms.fedlora import FedLoRA
from fedloom.algorithms.flasc import Flasc
from fedloom.algorithms.freeze import Freeze
from fedloom.algorithms.local import LocalOnly
from fedloom.algorithms.partial_pooling import PartialPooling
from fedloom.algorithms.personal import Personal
from fedloom.algorithms.pfedme import PFedMe
from fedloom.algorithms.private import Private
from fedloom.algorithms.prune import Prune
from fedloom.algorithms.scaffold import Scaffold
from fedloom.client.local_settings import LocalSettings
from fedloom.clustering.balanced import Balanced
from fedloom.clustering.given import Random
from fedloom.clustering.modes import Auto, Paper
from fedloom.clustering.sharing import Sharing
from fedloom.core.arms import Arm, ArmRule
from fedloom.core.description import describe
from fedloom.core.phases import Phase
from fedloom.core.protocols import Algorithm
from fedloom.core.ranks import Ranks
from fedloom.core.sparsity import Density
from fedloom.server.combine.bounded import CentredClip, GeometricMedian, NormBound
from fedloom.server.combine.chosen import Krum, MultiKrum
from fedloom.server.combine.sorted import Median, TrimmedMean
from fedloom.server.factors.pruning import RankPruning
from fedloom.server.factors.rules import Fair, Mean, Pad, Residual, Stack
from fedloom.server.importance import Pro
from fedloom.server.optimizers import SGD, Adagrad, Adam, Momentum, Yogi
from fedloom.server.public import PublicText
from fedloom.spaces.lora import LoRA
from fedloom.spaces.seed_space import Seeds
from fedloom.spaces.tune import Tune
from fedloom.testing.bench import LEARNING, Bench, make_bench
from fedloom.testing.subject import Subject

BY_TIER = Density(0.5, decay=0.5, every=2, tiers={"phone": 0.25})

PHASES = (Phase("local", 1), Phase("shared"), Phase("all", 1, from_round=2))

ARMS = (Arm(0.1), Arm(1.0, 2.0), Arm(2.0, steps=2))

BY_RANK = Ranks(4, {"phone": 2}, 0, {r: 4 / r for r in (1, 2, 3, 4)})
BESIDE = Ranks(2, {"phone": 1}, 2, {1: 2.0, 2: 1.0})

# Of the two layers the first is the emulator's.
ALIGNED: dict[str, Any] = {"public": PublicText("builtin:polyglot"), "right": 1}

SEEDED: dict[str, Any] = {"clip": 0.05, "noise_multiplier": 1.0, "noise_seed": 3}

CASES: dict[str, Algorithm[Any]] = {
    "fedavg": FedAvg(),
    "fedavg uniform": FedAvg(weighting="uniform"),
    "fedprox": FedAvg(mu=0.1),
    "fedavgm": FedAvg(Momentum(0.7, 0.9)),
    "fedadagrad": FedAvg(Adagrad(0.1)),
    "fedyogi": FedAvg(Yogi(0.1)),
    "fedadam": FedAvg(Adam(0.1)),
    "fedadam of OpenFedLLM": FedAvg(Adam(0.1, variant="openfedllm")),
    "scaffold": Scaffold(),
    "pfedme": PFedMe(1.0, local_rounds=3, lr=0.5),
    "local": LocalOnly(),
    "ditto(fedavg)": Ditto(FedAvg(), 0.1, 3),
    "ditto(scaffold)": Ditto(Scaffold(), 0.1),
    "fedavg krum": FedAvg(combine=Krum(1)),
    "fedadam geometric median": FedAvg(Adam(0.1), combine=GeometricMedian()),
    "pfedme norm bound": PFedMe(1.0, local_rounds=2, lr=0.5, combine=NormBound(0.05)),
    "ditto(fedavg centred clip)": Ditto(FedAvg(combine=CentredClip(0.1)), 0.1, 2),
    "freeze(fedavg median)": Freeze(FedAvg(combine=Median())),
    "flasc(fedavg trimmed mean)": Flasc(FedAvg(combine=TrimmedMean(0.2)), BY_TIER, Density(1.0)),
    "prune(fedavg median)": Prune(FedAvg(combine=Median()), Density(0.5, warm=1)),
    "clustered(fedavg multi krum)": Clustered(FedAvg(combine=MultiKrum(1)), Auto(2, enough=0.25)),
    "fedlora": FedLoRA(),
    "fedlora mean": FedLoRA(Mean(), mu=0.1),
    "fedlora fair": FedLoRA(Fair(), weighting="uniform"),
    "fedlora pad by tier": FedLoRA(Pad(), ranks=BY_RANK),
    "fedlora pad by tier, pruned": FedLoRA(Pad(), prune=RankPruning(0.7, 20.0), ranks=BY_RANK),
    "fedlora svd by tier": FedLoRA(ranks=BY_RANK),
    "fedlora stack by tier": FedLoRA(Stack(), ranks=BESIDE),
    "fedlora residual by tier": FedLoRA(Residual(), ranks=BESIDE),
    "flasc(fedlora)": Flasc(FedLoRA(), BY_TIER, BY_TIER),
    "flasc(fedlora residual by tier)": Flasc(FedLoRA(Residual(), ranks=BESIDE), BY_TIER, BY_TIER),
    "ditto(fedlora stack by tier)": Ditto(FedLoRA(Stack(), ranks=BESIDE), 0.1),
    "clustered(fedlora pad by tier)": Clustered(
        FedLoRA(Pad(), ranks=BY_RANK), Auto(2, enough=0.25)
    ),
    "ditto(fedlora pad)": Ditto(FedLoRA(Pad()), 0.1, 2),
    "clustered(fedlora)": Clustered(FedLoRA(), Auto(2, enough=0.25)),
    "alternate(fedavg)": Alternate(FedAvg()),
    "alternate(scaffold)": Alternate(Scaffold()),
    "private(alternate(fedavg))": Private(Alternate(FedAvg()), **SEEDED),
    "personal(fedavg)": Personal(FedAvg(mu=0.1)),
    "personal(scaffold)": Personal(Scaffold(), "lora_A"),
    "personal(fedavg) in phases": Personal(FedAvg(mu=0.1), "lora_B", PHASES),
    "personal(scaffold) in phases": Personal(Scaffold(), "lora_A", PHASES),
    "alternate(personal(fedavg))": Alternate(
        # B is what moves from the first step on.
        Personal(FedAvg(), "lora_A"),
        ("q_proj", "v_proj"),
    ),
    "private(personal(fedavg))": Private(Personal(FedAvg()), **SEEDED),
    "personal(flasc(fedadam))": Personal(Flasc(FedAvg(Adam(0.1)), BY_TIER, BY_TIER)),
    "clustered(personal(fedavg))": Clustered(Personal(FedAvg()), Auto(2, enough=0.25)),
    "freeze(fedavg)": Freeze(FedAvg()),
    "freeze(scaffold)": Freeze(Scaffold()),
    "ditto(freeze(fedavg))": Ditto(Freeze(FedAvg()), 0.1),
    "freeze(ditto(fedadam))": Freeze(Ditto(FedAvg(Adam(0.1)), 0.1)),
    "flasc(fedadam)": Flasc(FedAvg(Adam(0.1), weighting="uniform"), BY_TIER, BY_TIER),
    "flasc on the download(fedavg)": Flasc(FedAvg(), Density(0.5), upload_on="download"),
    "flasc(scaffold)": Flasc(Scaffold(), Density(0.5), Density(0.25), error_feedback=True),
    "prune(fedavg)": Prune(FedAvg(), Density(0.5, warm=1)),
    "prune(scaffold)": Prune(Scaffold(), BY_TIER, regrow=True),
    "private(fedavg)": Private(FedAvg(), **SEEDED),
    "private(scaffold)": Private(Scaffold(), quantile=0.5, **SEEDED),
    "private(flasc(fedadam))": Private(
        Flasc(FedAvg(Adam(0.1)), BY_TIER, BY_TIER), noise_on="support", **SEEDED
    ),
    "private(prune(fedavg))": Private(Prune(FedAvg(), Density(0.5, warm=1)), **SEEDED),
    "ditto(private(freeze(fedavg)))": Ditto(Private(Freeze(FedAvg()), **SEEDED), 0.1),
    "fedkseed": FedKSeed(Momentum(0.7, 0.9), steps=3),
    "fedkseed pro": FedKSeed(steps=3, sampling=Pro(corrected=True)),
    "ditto(fedkseed)": Ditto(FedKSeed(Adam(0.01), steps=3, uploads="delta"), 0.1, 2),
    "private(flasc(fedkseed))": Private(
        Flasc(FedKSeed(steps=3, uploads="delta"), BY_TIER, BY_TIER), **SEEDED
    ),
    "decomfl": DeComFL(steps=3),
    "feedsign": DeComFL(SGD(0.02), steps=5, votes=True),
    "clustered(fedavg)": Clustered(FedAvg(), Auto(enough=0.25)),
    "clustered(fedadam)": Clustered(FedAvg(Adam(0.1)), Auto(3, enough=0.25, every=1)),
    "clustered(flasc(scaffold))": Clustered(
        Flasc(Scaffold(), Density(0.5), Density(0.25)),
        Auto(2, compare="all", sketch=64),
        Sharing(["lora_A"], mix=0.1, temperature=2.0),
    ),
    "clustered pooled(fedavg)": Clustered(
        FedAvg(), Auto(2, enough=0.25, every=1), Sharing(pool="on")
    ),
    "clustered pooled(flasc(fedadam))": Clustered(
        Flasc(FedAvg(Adam(0.1)), BY_TIER, BY_TIER), Random(3), Sharing(pool="on")
    ),
    "clustered pooled(fedkseed)": Clustered(
        FedKSeed(steps=3, uploads="delta"), Random(2), Sharing(pool="on")
    ),
    "partial pooling(fedavg)": PartialPooling(FedAvg(), 0.5),
    "partial pooling(clustered pooled(fedadam))": PartialPooling(
        Clustered(FedAvg(Adam(0.1)), Auto(2, enough=0.25, every=1), Sharing(pool="on"))
    ),
    "fedem(fedavg)": FedEM(FedAvg()),
    "fedem(scaffold) of three": FedEM(Scaffold(), 3, 2.0),
    "fedem(ditto(fedadam))": FedEM(Ditto(FedAvg(Adam(0.1)), 0.1, 2)),
    "fedem(freeze(fedprox))": FedEM(Freeze(FedAvg(mu=0.1))),
    "flasc(fedem(fedavg))": Flasc(FedEM(FedAvg()), BY_TIER, BY_TIER),
    "private(fedem(fedavg))": Private(FedEM(FedAvg()), **SEEDED),
    "fedem(flasc(fedadam))": FedEM(Flasc(FedAvg(Adam(0.1)), BY_TIER, BY_TIER)),
    "fedex(fedavg)": FedEx(FedAvg(), ARMS, rule=ArmRule(schedule="constant")),
    "fedex(ditto(scaffold))": FedEx(Ditto(Scaffold(), 0.1, 2), ARMS, "loss"),
    "fedex(flasc(fedadam)) by tier": FedEx(
        Flasc(FedAvg(Adam(0.1)), BY_TIER, BY_TIER), ARMS, by_tier=True
    ),
    "clustered(fedex(fedavg))": Clustered(FedEx(FedAvg(), ARMS), Auto(2, enough=0.25)),
    "fedem(fedex(fedavg))": FedEM(FedEx(FedAvg(), ARMS, "difference")),
    "clustered as in the paper": Clustered(FedAvg(), Paper(2, at_round=2)),
    "clustered balanced(fedavg)": Clustered(FedAvg(), Balanced(2, every=2)),
    "clustered balanced(scaffold)": Clustered(Scaffold(), Balanced(2, every=1)),
    "clustered balanced(flasc(fedadam))": Clustered(
        Flasc(FedAvg(Adam(0.1)), BY_TIER, BY_TIER), Balanced(2, every=1)
    ),
    "clustered balanced(ditto(fedavg))": Clustered(Ditto(FedAvg(), 0.1), Balanced(2, every=1)),
    "clustered balanced(fedkseed)": Clustered(FedKSeed(steps=3), Balanced(2, every=1)),
    "fedbiot(fedavg)": FedBiOT(FedAvg(mu=0.1), **ALIGNED),
    "fedbiot(fedlora pad by tier)": FedBiOT(FedLoRA(Pad(), ranks=BY_RANK), **ALIGNED),
    "fedbiot(ditto(scaffold))": FedBiOT(Ditto(Scaffold(), 0.1), **ALIGNED),
    "fedbiot(flasc(fedadam))": FedBiOT(Flasc(FedAvg(Adam(0.1)), BY_TIER, BY_TIER), **ALIGNED),
    "fedbiot(private(fedavg))": FedBiOT(Private(FedAvg(), **SEEDED), **ALIGNED),
    "fedbiot(clustered pooled(fedavg))": FedBiOT(
        Clustered(FedAvg(), Auto(2, enough=0.25, every=1), Sharing(pool="on")), **ALIGNED
    ),
    "fedbiot(personal(fedavg))": FedBiOT(Personal(FedAvg()), **ALIGNED),
    "flasc(clustered(ditto(fedavg)))": Flasc(
        Clustered(Ditto(FedAvg(), 0.1), Auto(2, compare="last_B")), BY_TIER, BY_TIER
    ),
    "clustered(fedkseed)": Clustered(FedKSeed(steps=3), Auto(2, probe=16, every=2)),
}
SEEDS = Seeds(num_seeds=64)


def in_seed_space(algorithm: Any) -> bool:
    """Return whether what trains inside the wrappers knows no other space."""
    inner = algorithm
    while hasattr(inner, "inner"):
        inner = inner.inner
    return isinstance(inner, FedKSeed | DeComFL)


@pytest.fixture
def bench(request: pytest.FixtureRequest) -> Callable[..., Bench]:
    """Return a maker: `bench(dtype=torch.float32, tune=None, model=None, **local)`; one client at a time unless told otherwise.

    The space is LoRA, or of seeds where the test is of an algorithm that knows no other.
    """
    named = {"algorithm", "averaged"}.intersection(request.fixturenames)
    given = [request.getfixturevalue(name) for name in named]
    seeds = any(map(in_seed_space, given))
    # Rules that compare or add up LoRA's products need to know the factors.
    whole = any(
        one.server_sees == "each in full" or describe(one).multiplies_factors for one in given
    )
    origin = {"origin": "zero"} if whole else {}

    def make(
        dtype: torch.dtype = torch.float32,
        tune: Tune | Mapping[str, Any] | None = None,
        model: nn.Module | None = None,
        **local: Any,
    ) -> Bench:
        if seeds:
            tune = SEEDS
        elif tune is None or isinstance(tune, Mapping):
            tune = LoRA(**{"rank": 4, "targets": ["q_proj", "v_proj"], **origin, **(tune or {})})
        learning = {"optimizer": "sgd", "lr": 0.5, "batched": "off", **local}
        settings = LEARNING["seeds"] if seeds else LocalSettings(**learning)
        return make_bench(tune, settings, dtype=dtype, model=model)

    return make


@pytest.fixture
def subject(algorithm: Algorithm[Any], tmp_path: Path) -> Subject:
    """Return each algorithm of the table in turn, ready to be examined."""
    return Subject(algorithm, tmp_path, "seeds" if in_seed_space(algorithm) else "lora")


QUICK = {
    "fedavg",
    "fedlora",
    "alternate(fedavg)",
    "personal(fedavg)",
    "scaffold",
    "local",
    "ditto(fedavg)",
    "freeze(fedavg)",
    "flasc(fedadam)",
    "prune(fedavg)",
    "private(fedavg)",
    "fedbiot(fedavg)",
    "fedkseed",
    "decomfl",
    "clustered(fedavg)",
    "clustered pooled(fedavg)",
    "clustered balanced(fedavg)",
    "partial pooling(fedavg)",
}
"""One case a class, whose laws are among the fast tests; those of the others, and of what trains longest, are among the slow."""


def _marked(names: Iterable[str]) -> list[Any]:
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(params=_marked(CASES), ids=list(CASES))
def algorithm(request: pytest.FixtureRequest) -> Algorithm[Any]:
    """Return each algorithm of the table in turn, and what nests."""
    return CASES[request.param]


@pytest.fixture(
    params=_marked(
        n for n, one in CASES.items() if one.server_sees == "mean" and one != LocalOnly()
    )
)
def averaged(request: pytest.FixtureRequest) -> Algorithm[Any]:
    """Return each algorithm in turn whose server reads the mean of what is sent: all that `private` wraps."""
    return CASES[request.param]


@pytest.fixture(scope="session")
def cases() -> dict[str, Algorithm[Any]]:
    """Return all compositions by name."""
    return CASES
