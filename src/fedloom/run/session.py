"""Everything a recipe needs to run here: model, space, clients' data, trainer and engine, built once."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from fedloom.client.client_state import ClientStateStore
from fedloom.client.make_trainer import make_trainer
from fedloom.client.worker import Deployed
from fedloom.core.protocols import ClientId, Engine, Params, Profile, Trainer
from fedloom.core.randomness import derive
from fedloom.data.data_settings import DataSettings
from fedloom.data.encoding import Tokenizer
from fedloom.data.federation import Federation, federate
from fedloom.data.manifest import ClientCounts, Manifest
from fedloom.engines.engine_settings import LoopbackSettings
from fedloom.engines.inprocess import InProcess
from fedloom.engines.loopback import Loopback
from fedloom.evaluation.measure import Evaluator
from fedloom.models.base_model import Base, load_base
from fedloom.models.identity import identity
from fedloom.models.positions import check_length
from fedloom.objectives.objective import Objective
from fedloom.run.inputs import located
from fedloom.run.loop import Run, draw
from fedloom.run.reading import manifest_of, read_manifest
from fedloom.run.recipe_settings import Recipe
from fedloom.spaces.build import FullSpace, LoRASpace, make_space
from fedloom.spaces.seed_space import SeedSpace
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
    store: ClientStateStore

    @property
    def counts(self) -> Mapping[ClientId, ClientCounts]:
        """Return what each client holds: all that is known of it where the data is elsewhere."""
        return self.federation.manifest.clients

    @property
    def learners(self) -> Mapping[ClientId, Profile]:
        """Return the clients that have something to learn from."""
        return {c: p for c, p in self.engine.population().items() if self.counts[c].rows}

    @property
    def judges(self) -> list[ClientId]:
        """Return the clients that have something to measure on."""
        population, counts = self.engine.population(), self.counts
        return [c for c in population if counts[c].test or counts[c].validation]

    def identity(self) -> dict[str, str]:
        """Return the hashes of the model, of what is learnt of it and of its tokenizer, see `spaces.handshake`."""
        return {**identity(self.base), **self.space.identity()}

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


Federate = Callable[[DataSettings, Tokenizer, Objective], Federation]


def build(
    recipe: Recipe, folder: Path, *, own: Federate | None = None, data: bool = True
) -> Session:
    """Load the model, tokenise the data and connect the parts.

    Clients that are behind a network are not connected to: the engine is one of this process.

    Args:
        recipe: What to build; paths that are not here are looked for where the run in the folder was begun.
        folder: The run's, or the site's.
        own: Gives the data where that is not as the recipe says.
        data: Whether the data is read; without, who the clients are is what the run wrote down.
    """
    model, source = located(recipe.model, recipe.data, folder)
    check_length(model, recipe.data.max_length)
    base = load_base(model)
    if not data or (own is None and recipe.elsewhere):
        federation = _remembered(recipe, folder, base.tokenizer)
    else:
        federation = (own or federate)(source, base.tokenizer, recipe.objective)
    if federation.manifest.source == source.source:
        # However it was found: what a run writes down is the name that the recipe has for it.
        manifest = replace(federation.manifest, source=recipe.data.source)
        federation = replace(federation, manifest=manifest)
    seed, decays = derive(recipe.run.seed, "space"), recipe.local.decays_seeds
    space = make_space(base, recipe.tune, seed=seed, decays=decays)
    evaluator = Evaluator(recipe.evaluation, base.tokenizer, recipe.objective)
    trainer = make_trainer(
        space,
        federation,
        recipe.local,
        evaluator=evaluator,
        num_rounds=recipe.run.rounds,
        objective=recipe.objective,
    )
    store = ClientStateStore(folder / "client_state")
    make = Loopback if isinstance(recipe.engine, LoopbackSettings) else InProcess
    profiles = {
        c: {**profile, "num_examples": str(federation.manifest.clients[c].rows)}
        for c, profile in federation.profiles.items()
    }
    engine = make(recipe.algorithm, trainer, store, profiles, recipe.wire)
    return Session(recipe, folder, base, space, federation, evaluator, trainer, engine, store)


def _remembered(recipe: Recipe, folder: Path, tokenizer: Tokenizer) -> Federation:
    """Return what an earlier command wrote down of data that is not read; of sites, nobody before the first."""
    # Of no conversation there are no examples, but what this tokenizer cannot tell apart is refused before a site joins.
    recipe.objective.examples((), recipe.data, tokenizer)
    if recipe.elsewhere and not manifest_of(folder).exists():
        manifest = Manifest(
            sha256="",
            source="sites",
            partition="natural",
            by=None,
            seed=recipe.data.seed,
            max_length=recipe.data.max_length,
            num_rows=0,
            num_dropped=0,
            num_truncated=0,
            num_unassigned=0,
            clients={},
        )
    else:
        manifest = read_manifest(folder, elsewhere=recipe.elsewhere)
    profiles = {client: manifest.profiles.get(client, {}) for client in manifest.clients}
    return Federation({}, profiles, manifest)
