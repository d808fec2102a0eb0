"""Eight unequal clients, every algorithm of the table, and rounds on either engine."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedloom.algorithms.clustered import Clustered
from fedloom.algorithms.decomfl import DeComFL
from fedloom.algorithms.ditto import Ditto
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.fedkseed import FedKSeed
from fedloom.algorithms.flasc import Flasc
from fedloom.algorithms.freeze import Freeze
from fedloom.algorithms.local import LocalOnly
from fedloom.algorithms.pfedme import PFedMe
from fedloom.algorithms.private import Private
from fedloom.algorithms.prune import Prune
from fedloom.algorithms.scaffold import Scaffold
from fedloom.client.client_state import ClientStateStore
from fedloom.client.local_settings import LocalSettings
from fedloom.client.make_trainer import make_trainer
from fedloom.clustering.modes import Auto, Paper
from fedloom.clustering.sharing import Sharing
from fedloom.core.density import Density
from fedloom.core.protocols import Algorithm, ClientFailure, Engine, Metrics, Split, Trainer
from fedloom.data.federation import Federation, Shard
from fedloom.data.manifest import Manifest
from fedloom.data.tokens import Example
from fedloom.engines.inprocess import InProcess
from fedloom.models.base_model import Base
from fedloom.rounds.loop import Run, advance, begin
from fedloom.server.combine.bounded import CentredClip, GeometricMedian, NormBound
from fedloom.server.combine.chosen import Krum, MultiKrum
from fedloom.server.combine.sorted import Median, TrimmedMean
from fedloom.server.importance import Pro
from fedloom.server.optimizers import SGD, Adagrad, Adam, Momentum, Yogi
from fedloom.server.samplers import Sampler, Uniform
from fedloom.spaces.live import Live
from fedloom.spaces.lora import LoRA
from fedloom.spaces.seed_space import Seeds, SeedSpace
from fedloom.spaces.tune import Tune

VOCAB = 64
NOTHING = Manifest("", "", "iid", None, 0, 0, 0, 0, 0, 0, {})

BY_TIER = Density(0.5, decay=0.5, every=2, tiers={"phone": 0.25})

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
    "freeze(fedavg)": Freeze(FedAvg()),
    "freeze(scaffold)": Freeze(Scaffold()),
    "ditto(freeze(fedavg))": Ditto(Freeze(FedAvg()), 0.1),
    "freeze(ditto(fedadam))": Freeze(Ditto(FedAvg(Adam(0.1)), 0.1)),
    "flasc(fedadam)": Flasc(FedAvg(Adam(0.1), weighting="uniform"), BY_TIER, BY_TIER),
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
    "clustered as in the paper": Clustered(FedAvg(), Paper(2, at_round=2)),
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


def rows(seed: int, count: int) -> list[Example]:
    """Return rows that count up or down, by the parity of the seed."""
    draw = torch.Generator().manual_seed(100 + seed)
    out = []
    for _ in range(count):
        length, at = (
            int(torch.randint(*span, (), generator=draw)) for span in ((6, 14), (0, VOCAB))
        )
        ids = (at + (1 if seed % 2 else -1) * torch.arange(length)) % VOCAB
        out.append(Example(ids, torch.where(torch.arange(length) < 2, -100, ids), 2))
    return out


class SumEvaluator:
    """Answers with the sum of all weights: enough to tell models apart."""

    def measure_each(
        self, model: nn.Module, groups: Sequence[Sequence[Example]], *, split: Split
    ) -> list[Metrics]:
        total = sum(float(p.detach().double().sum()) for p in model.parameters())
        return [{"loss": total, "num_examples": float(len(g)), "num_tokens": 1.0} for g in groups]


@dataclasses.dataclass
class Bench:
    """A trainer over eight clients and what it trains."""

    trainer: Trainer
    space: Live | SeedSpace
    federation: Federation

    def engine(
        self,
        kind: type[Any],
        algorithm: Algorithm[Any],
        folder: Path,
        *,
        alike: bool = False,
        **extra: Any,
    ) -> Any:
        """Return an engine of a kind, its clients' client_state in `folder`; `alike`, their profiles tell none apart."""
        clients = {
            c: {"tier": "phone" if i % 3 == 0 and not alike else "desk"}
            | ({} if alike else {"num_examples": str(len(s.train))})
            for i, (c, s) in enumerate(self.federation.shards.items())
        }
        return kind(algorithm, self.trainer, ClientStateStore(folder), clients, **extra)

    def rounds(
        self,
        algorithm: Algorithm[Any],
        engine: Engine,
        count: int,
        *,
        run: Run[Any] | None = None,
        sampler: Sampler | None = None,
        after: Callable[[Run[Any]], None] = lambda run: None,
        min_replies: int = 0,
    ) -> tuple[Run[Any], list[tuple[Metrics, Sequence[ClientFailure]]]]:
        """Run up to round `count`; return the run and what each round said."""
        run = run or begin(algorithm, self.space.start(), 5)
        said = []
        while run.number < count:
            run, metrics, failures = advance(
                run,
                algorithm,
                engine,
                population=engine.population(),
                sampler=sampler or Uniform(5),
                min_replies=min_replies,
            )
            said.append((metrics, failures))
            after(run)
        return run, said

    def final(
        self, algorithm: Algorithm[Any], folder: Path, count: int = 3, **extra: Any
    ) -> Run[Any]:
        """Return the run after `count` rounds in process."""
        return self.rounds(algorithm, self.engine(InProcess, algorithm, folder), count, **extra)[0]


@pytest.fixture
def bench(tiny_llama: Callable[..., Any], request: pytest.FixtureRequest) -> Callable[..., Bench]:
    """Return a maker: `bench(dtype=torch.float32, tune=None, model=None, **local)`; one client at a time unless told otherwise.

    The space is LoRA, or of seeds where the test is of an algorithm that knows no other.
    """
    named = {"algorithm", "averaged"}.intersection(request.fixturenames)
    given = [request.getfixturevalue(name) for name in named]
    seeds = any(map(in_seed_space, given))
    # Rules that compare LoRA's products need to know the factors.
    whole = any(one.server_sees == "each in full" for one in given)
    origin = {"origin": "zero"} if whole else {}

    def make(
        dtype: torch.dtype = torch.float32,
        tune: Tune | Mapping[str, Any] | None = None,
        model: nn.Module | None = None,
        **local: Any,
    ) -> Bench:
        model = tiny_llama(dtype=dtype).requires_grad_(False) if model is None else model
        if seeds:
            tune = SEEDS
        elif tune is None or isinstance(tune, Mapping):
            tune = LoRA(**{"rank": 4, "targets": ["q_proj", "v_proj"], **origin, **(tune or {})})
        space = tune.make_space(Base(model, None, "random"), seed=1)
        trains = [rows(i, 3 + i) for i in range(8)]
        shards = {f"c{i}": Shard(t, rows(50 + i, 2), rows(70 + i, 2)) for i, t in enumerate(trains)}
        federation = Federation(shards, {c: {} for c in shards}, NOTHING)
        learning = {"optimizer": "sgd", "lr": 0.5, "batched": "off", **local}
        if seeds:
            learning = {"optimizer": "sgd", "lr": 1e-2}
        trainer = make_trainer(
            space, federation, LocalSettings(**learning), evaluator=SumEvaluator(), num_rounds=10
        )
        return Bench(trainer, space, federation)

    return make


@pytest.fixture(params=list(CASES), ids=list(CASES))
def algorithm(request: pytest.FixtureRequest) -> Algorithm[Any]:
    """Return each algorithm of the table in turn, and what nests."""
    return CASES[request.param]


@pytest.fixture(
    params=[n for n, one in CASES.items() if one.server_sees == "mean" and one != LocalOnly()]
)
def averaged(request: pytest.FixtureRequest) -> Algorithm[Any]:
    """Return each algorithm in turn whose server reads the mean of what is sent: all that `private` wraps."""
    return CASES[request.param]


@pytest.fixture(scope="session")
def cases() -> dict[str, Algorithm[Any]]:
    """Return all compositions by name."""
    return CASES
