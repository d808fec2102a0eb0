"""Everything a recipe needs to run here: model, space, clients' data, trainer and engine, built once."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedloom.client.build import make_trainer
from fedloom.client.memory import MemoryStore
from fedloom.client.worker import Deployed
from fedloom.core.protocols import ClientId, Engine, Params, Profile, Trainer
from fedloom.core.seeds import derive
from fedloom.data.federation import Federation, federate
from fedloom.engines.inprocess import InProcess
from fedloom.engines.loopback import Loopback
from fedloom.evaluation.measure import Evaluator
from fedloom.models.build import Base, load_base
from fedloom.run.loop import Run, draw
from fedloom.run.settings import Recipe
from fedloom.spaces.build import FullSpace, LoRASpace, make_space
from fedloom.spaces.seeds import SeedSpace
from fedloom.wire.body import roundtrip


@dataclass(frozen=True)
class Session:
    """A recipe, ready to train, measure or answer."""

    recipe: Recipe
    folder: Path
    base: Base
    space: LoRASpace | FullSpace | SeedSpace
    federation: Federation
    evaluator: Evaluator
    trainer: Trainer
    engine: Engine
    store: MemoryStore

    @property
    def learners(self) -> Mapping[ClientId, Profile]:
        """Return the clients that have something to learn from."""
        shards = self.federation.shards
        return {c: p for c, p in self.engine.population().items() if shards[c].train}

    @property
    def judges(self) -> list[ClientId]:
        """Return the clients that have something to measure on."""
        shards = self.federation.shards
        return [c for c in self.engine.population() if shards[c].test or shards[c].validation]

    def deployed(
        self, run: Run[object], *, also: Collection[ClientId] = ()
    ) -> dict[ClientId, Params]:
        """Return what judging clients, and those of `also`, would use now, as read from the wire; shared where shared."""
        recipe, population = self.recipe, self.engine.population()
        round = draw(run, population, None)
        sent = recipe.algorithm.broadcast(run.state, round)
        wire, read = recipe.wire, {}
        for payload in sent.values():
            if id(payload) not in read:
                read[id(payload)] = roundtrip(
                    payload, values=wire.download, compression=wire.compression
                )
        deployed = Deployed(recipe.algorithm)
        return {
            c: deployed.of(read[id(sent[c])], self.store.load(c, before=run.number + 1))
            for c in sorted({*self.judges, *also})
        }


def build(recipe: Recipe, folder: Path) -> Session:
    """Load the model, tokenise the data and connect the parts."""
    base = load_base(recipe.model)
    federation = federate(recipe.data, base.tokenizer)
    seed, decays = derive(recipe.run.seed, "space"), recipe.local.decays_seeds
    space = make_space(base, recipe.tune, seed=seed, decays=decays)
    evaluator = Evaluator(recipe.evaluation, base.tokenizer, federation.classes)
    trainer = make_trainer(
        space, federation, recipe.local, evaluator=evaluator, num_rounds=recipe.run.rounds
    )
    store = MemoryStore(folder / "memory")
    make = {"inprocess": InProcess, "loopback": Loopback}[recipe.engine]
    profiles = {
        c: {**profile, "num_examples": str(len(federation.shards[c].train))}
        for c, profile in federation.profiles.items()
    }
    engine = make(recipe.algorithm, trainer, store, profiles, recipe.wire)
    return Session(recipe, folder, base, space, federation, evaluator, trainer, engine, store)
