"""Everything a recipe needs to run here: model, space, clients' data, trainer and engine, built once."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from fedloom.client.client_state import ClientStateStore
from fedloom.client.make_trainer import make_trainer
from fedloom.client.movement import Watched
from fedloom.client.references import References
from fedloom.client.setup import Setup, TrainerParts
from fedloom.core.description import describe
from fedloom.core.protocols import (
    ClientId,
    Engine,
    Params,
    Payload,
    Profile,
    Round,
    Split,
    Trainer,
)
from fedloom.core.randomness import derive
from fedloom.core.rehearsal import Deployed
from fedloom.data.data_settings import DataSettings
from fedloom.data.encoding import Tokenizer
from fedloom.data.federation import Federation, federate
from fedloom.data.leaving_out import leave_out
from fedloom.data.manifest import ClientCounts, Manifest
from fedloom.engines.engine_settings import LoopbackSettings
from fedloom.engines.inprocess import InProcess
from fedloom.engines.loopback import Loopback
from fedloom.engines.sums import Played
from fedloom.evaluation.measure import Evaluator, PluggedIn
from fedloom.models.build import Base, ModelSettings, load_base
from fedloom.models.identity import identity
from fedloom.models.positions import check_length, check_positions
from fedloom.objectives.objective import Objective
from fedloom.rounds.clock import Clock, Durations
from fedloom.rounds.inputs import located
from fedloom.rounds.loop import Run, draw
from fedloom.rounds.reading import manifest_of, read_manifest
from fedloom.rounds.recipe_settings import Recipe
from fedloom.server.buffering import Buffered
from fedloom.server.samplers import Sampler, Uniform, Without
from fedloom.spaces.live import Live
from fedloom.spaces.offsite import OffsiteSpace
from fedloom.spaces.seed_space import SeedSpace
from fedloom.wire.body import roundtrip


@dataclass(frozen=True)
class Session:
    """A recipe, ready to train, measure or answer."""

    recipe: Recipe
    folder: Path
    base: Base
    space: Live | SeedSpace
    federation: Federation
    evaluator: Evaluator
    trainer: Trainer
    watched: Trainer
    """The same with a guard against training nothing: what the engine trains clients by."""
    engine: Engine
    store: ClientStateStore
    absent: Mapping[ClientId, Profile] = field(default_factory=dict)
    """Clients that `data.left_out` names, who are drawn and do not come."""

    @property
    def sampler(self) -> Sampler:
        """Return who takes part in a round; of `run.mode: buffered`, who trains at once."""
        cohort = self.recipe.cohort
        return Without(cohort, self.absent) if self.absent else cohort

    @property
    def asked(self) -> Sampler:
        """Return a sampler of as many clients as a round asks in the mean, for forecasts."""
        mode = self.recipe.run.mode
        if isinstance(mode, Buffered):
            # Who begins before a step is as many as were taken up at the last.
            return Uniform(min(mode.size, len(self.learners)))
        return self.sampler

    @property
    def counts(self) -> Mapping[ClientId, ClientCounts]:
        """Return what each client holds: all that is known of it where the data is elsewhere."""
        return self.federation.manifest.clients

    @property
    def learners(self) -> Mapping[ClientId, Profile]:
        """Return the clients that have something to learn from."""
        return {
            c: p
            for c, p in self.engine.population().items()
            if self.counts[c].rows and c not in self.unseen
        }

    @property
    def unseen(self) -> Sequence[ClientId]:
        """Return the clients that never train, see `data.unseen`."""
        return self.federation.manifest.unseen

    @property
    def judges(self) -> list[ClientId]:
        """Return the clients that have something to measure on."""
        population, counts = self.engine.population(), self.counts
        return [c for c in population if counts[c].test or counts[c].validation]

    def durations(self) -> Durations:
        """Return how long clients train on the event clock, by their tiers and the steps that they take."""
        recipe, counts = self.recipe, self.counts
        # Where the algorithm says how far clients go, they go equally far.
        alike = bool(describe(recipe.algorithm).steps)
        steps = {
            client: 1 if alike else recipe.local.num_steps(counts[client].rows, None)
            for client in self.learners
        }
        return Durations(recipe.clock or Clock(), steps)

    def drawn_judges(self, number: int, split: Split | Literal["unseen"]) -> list[ClientId]:
        """Return the clients that are measured after round `number`: all that hold something, or `evaluation.clients`.

        Who is drawn depends on the run's seed, the round and the clients' names, so baselines draw alike. `unseen` is the
        test split of clients that never train, which the others are without.
        """
        counts, wanted, apart = self.counts, self.recipe.evaluation.clients, set(self.unseen)
        held = {
            c: counts[c].validation if split == "validation" else counts[c].test
            for c in self.judges
            if (c in apart) == (split == "unseen")
        }
        able = [client for client, examples in held.items() if examples]
        if wanted is None or wanted >= len(able):
            return able
        seed = derive(self.recipe.run.seed, "evaluation", number)
        drawn = set(sorted(able, key=lambda client: derive(seed, client))[:wanted])
        return [client for client in able if client in drawn]

    def identity(self) -> dict[str, str]:
        """Return the hashes of the model, of what is learnt of it and of its tokenizer, see `spaces.handshake`."""
        return {**identity(self.base), **self.space.identity()}

    def deployed(
        self, run: Run[object], *, also: Collection[ClientId] = ()
    ) -> dict[ClientId, Params]:
        """Return what judging clients, and those of `also`, would use now, as read from the wire; shared where shared."""
        read = self._downloads(draw(run, self.engine.population(), None), run)
        deployed = Deployed(self.recipe.algorithm)
        return {
            c: deployed.of(read[c], self.store.load(c, before=run.number + 1))
            for c in sorted({*self.judges, *also})
        }

    def newcomer(self, run: Run[object]) -> Params:
        """Return what a client would use that never took part and of which nothing is known, as read from the wire."""
        population = self.engine.population()
        name = "newcomer"
        while name in population:
            name += "+"
        round = draw(run, {**population, name: {}}, None)
        read = self._downloads(replace(round, cohort=(name,)), run)
        return self.recipe.algorithm.deployed(read[name], {})

    def _downloads(self, round: Round, run: Run[Any]) -> dict[ClientId, Payload]:
        """Return what the cohort would be sent now, as read from the wire; one object where that is one."""
        sent = self.recipe.algorithm.broadcast(run.state, round)
        wire, read = self.recipe.wire, dict[int, Payload]()
        for payload in sent.values():
            if id(payload) not in read:
                read[id(payload)] = roundtrip(
                    payload, values=wire.download, compression=wire.compression
                )
        return {client: read[id(payload)] for client, payload in sent.items()}


Federate = Callable[[DataSettings, Tokenizer, Objective], Federation]
MakeTrainer = Callable[[TrainerParts], Trainer]


@dataclass(frozen=True)
class Makers:
    """What makes parts of a session where that is not as the recipe says; None: as it says."""

    federation: Federate | None = None
    base: Callable[[ModelSettings], Base] | None = None
    trainer: MakeTrainer | None = None


def build(
    recipe: Recipe,
    folder: Path,
    *,
    makers: Makers | None = None,
    data: bool = True,
    device: str | None = None,
) -> Session:
    """Load the model, tokenise the data and connect the parts.

    Clients that are behind a network are not connected to: the engine is one of this process.

    Args:
        recipe: What to build; paths that are not here are looked for where the run in the folder was begun.
        folder: The run's, or the site's.
        makers: What makes data, model or trainer where that is not as the recipe says.
        data: Whether the data is read; without, who the clients are is what the run wrote down.
        device: Where the model is, if not where the recipe says.
    """
    makers = makers or Makers()
    model, source = located(recipe.model, recipe.data, folder)
    model = replace(model, device=device or model.device)
    base = _based(model, recipe, makers)
    if not data or (makers.federation is None and recipe.elsewhere):
        federation = _remembered(recipe, folder, base.tokenizer)
    else:
        federation = (makers.federation or federate)(source, base.tokenizer, recipe.objective)
    absent, gone = dict[ClientId, Profile](), recipe.data.left_out
    if gone and federation.shards:
        whole, federation = federation, leave_out(federation, gone)
        absent = {c: p for c, p in _profiles(whole).items() if c in gone}
    if federation.manifest.source == source.source:
        # However it was found: what a run writes down is the name that the recipe has for it.
        manifest = replace(federation.manifest, source=recipe.data.source)
        federation = replace(federation, manifest=manifest)
    seed, decays = derive(recipe.run.seed, "space"), recipe.local.decays_seeds
    space = recipe.tune.make_space(base, seed=seed, decays=decays)
    evaluator = _evaluator(recipe, base, space)
    trainer = make_trainer(
        space,
        federation,
        recipe.local,
        evaluator=evaluator,
        num_rounds=recipe.run.rounds,
        objective=recipe.objective,
    )
    if makers.trainer is not None:
        setup = Setup(space, federation, recipe.local, recipe.run.rounds)
        trainer = makers.trainer(TrainerParts(setup, base.tokenizer, trainer))
    guarded = watched(trainer, space, federation, recipe)
    store = ClientStateStore(folder / "client_state")
    engine = _engine(recipe, guarded, store, federation)
    return Session(
        recipe, folder, base, space, federation, evaluator, trainer, guarded, engine, store, absent
    )


def _engine(
    recipe: Recipe, trainer: Trainer, store: ClientStateStore, federation: Federation
) -> InProcess:
    make = Loopback if isinstance(recipe.engine, LoopbackSettings) else InProcess
    return make(
        recipe.algorithm,
        trainer,
        store,
        _profiles(federation),
        recipe.wire,
        metrics=recipe.metrics,
        finetune=recipe.evaluation.finetune,
        sums=None if recipe.secure is None else Played(recipe.secure),
    )


def _profiles(federation: Federation) -> dict[ClientId, Profile]:
    """Return what is known of every client, and how much it holds."""
    counts = federation.manifest.clients
    return {
        client: {**profile, "num_examples": str(counts[client].rows)}
        for client, profile in federation.profiles.items()
    }


def watched(
    trainer: Trainer, space: Live | SeedSpace, federation: Federation, recipe: Recipe
) -> Trainer:
    """Return a trainer with a guard against training nothing, where it learns by the gradients of a model's own tensors."""
    if not isinstance(space, Live) or recipe.local.order == "zeroth":
        return trainer
    references = References.of(space, recipe.objective)
    setup = Setup(space, federation, recipe.local, recipe.run.rounds, references)
    return Watched(trainer, setup, recipe.objective)


def _evaluator(recipe: Recipe, base: Base, space: Live | SeedSpace) -> Evaluator:
    judged = derive(recipe.data.seed, "evaluation")
    references = References.of(space, recipe.objective)
    plugged_in = None
    if isinstance(space, OffsiteSpace) and space.is_whole_here:
        plugged_in = PluggedIn(space.whole, References.of(space, recipe.objective))
    return Evaluator(
        recipe.evaluation, base.tokenizer, recipe.objective, judged, references, plugged_in
    )


def _based(model: ModelSettings, recipe: Recipe, makers: Makers) -> Base:
    """Return the base model; one that is loaded by name is refused before, where rows are too long for it."""
    longest, virtual = recipe.data.max_length, recipe.tune.virtual_tokens
    if makers.base is None:
        check_length(model, longest, virtual_tokens=virtual)
        return load_base(model)
    base = makers.base(model)
    check_positions(base.model.config, base.name, longest, virtual_tokens=virtual)
    return base


def _remembered(recipe: Recipe, folder: Path, tokenizer: Tokenizer) -> Federation:
    """Return what an earlier command wrote down of data that is not read; of sites, nobody before the first."""
    # Of no conversation there are no examples, but what this tokenizer cannot tell apart is refused before a site joins.
    prompt = recipe.objective.examples((), recipe.data, tokenizer).prompt
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
            prompt=prompt,
        )
    else:
        manifest = read_manifest(folder, elsewhere=recipe.elsewhere)
    profiles = {client: manifest.profiles.get(client, {}) for client in manifest.clients}
    return Federation({}, profiles, manifest)
