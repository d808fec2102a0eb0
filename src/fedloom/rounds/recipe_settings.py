"""A whole recipe as frozen dataclasses; recipe.py fills them from YAML."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from fedloom.client.local_settings import LocalSettings
from fedloom.client.worker_settings import WorkerSettings
from fedloom.core.description import MAX_UPDATE_NORM, check, check_accounts, describe
from fedloom.core.emulation import Aligns, HasEmulator
from fedloom.core.metrics import MetricTable
from fedloom.core.protocols import Algorithm
from fedloom.core.ranks import HasRanks
from fedloom.core.wrapper import layers, spelled
from fedloom.data.data_settings import DataSettings
from fedloom.data.preferences import check_unpacked
from fedloom.engines.engine_settings import (
    EngineSettings,
    FlowerSettings,
    InProcessSettings,
    RaySettings,
)
from fedloom.evaluation.evaluation_settings import EvaluationSettings
from fedloom.models.build import ModelSettings
from fedloom.objectives.kto import KTO
from fedloom.objectives.objective import Objective
from fedloom.objectives.preference import Comparing, PreferenceObjective
from fedloom.objectives.selector import Selector
from fedloom.objectives.sft import DEFAULT
from fedloom.rounds.clock import Clock
from fedloom.rounds.waiting import waits
from fedloom.secure.ciphers import check_installed
from fedloom.secure.settings import SecureSettings
from fedloom.server.buffering import Buffered, RunMode, Synchronous
from fedloom.server.samplers import Full, Sampler
from fedloom.spaces import full
from fedloom.spaces.lora import LoRA
from fedloom.spaces.tune import Tune, leaves_weights
from fedloom.wire.wire_settings import WireSettings

Baseline = Literal["local", "centralised", "fedavg", "oracle", "random", "synchronous"]
"""Nothing shared; all data in one place; one model for all; clusters by a label; clusters by chance; everybody waited for."""


_PATIENCE = 600.0


@dataclass(frozen=True, slots=True)
class RunSettings:
    """Section `run`: how long, from which seed, and what is kept."""

    rounds: int = 20
    """How many there are: of `mode: buffered`, steps of the server."""
    mode: RunMode = Synchronous()
    """Whether the server waits for the whole cohort, or steps once so many clients answered."""
    seed: int = 0
    """Of everything drawn in the run: adapter, cohorts, data order, dropout."""
    min_replies: int = 0
    """A round with fewer replies changes nothing; most algorithms need one in any case. Where sites join from elsewhere,
    the server waits while fewer of them, or none, are connected."""
    patience_seconds: float = _PATIENCE
    """How long it waits then, before the run stops with the round unspent."""
    max_update_norm: float = MAX_UPDATE_NORM
    """A client's delta beyond this norm is left out, and so is a round that moves a model farther or to what is not
    finite. Far above what training does: it is there against what would end a run, and `combine` against what bends it."""
    patience: int = 0
    """Stop after this many evaluations without a better `monitor`; 0 never stops early."""
    monitor: str = "validation/loss"
    """The metric early stopping watches, as named in metrics.jsonl."""
    keep_checkpoints: int = 2
    """The newest ones; at least 1."""
    trackers: Sequence[str] = ()
    """Besides metrics.jsonl: tensorboard, wandb, mlflow, trackio."""
    baselines: Sequence[Baseline] = ()
    """Runs with the same data, seed and evaluation, made after this one and drawn into its report."""
    samples: int = 6
    """Test examples whose answers before and after are shown in the report; 0 for none."""

    def __post_init__(self) -> None:
        for name, value, least in (
            ("rounds", self.rounds, 1),
            ("min_replies", self.min_replies, 0),
            ("patience", self.patience, 0),
            ("keep_checkpoints", self.keep_checkpoints, 1),
            ("samples", self.samples, 0),
        ):
            if value < least:
                raise ValueError(f"run.{name} must be at least {least}, got {value}")
        if not self.max_update_norm > 0:
            raise ValueError(f"run.max_update_norm must be positive, got {self.max_update_norm}")
        if not 1 <= self.patience_seconds <= 1e7:
            raise ValueError(
                f"run.patience_seconds must be in [1, 1e7], got {self.patience_seconds}"
            )


@dataclass(frozen=True, slots=True)
class Recipe:
    """One run, complete."""

    name: str
    """Of the run, its folder and its figures; a file's own name, if it says nothing else."""
    algorithm: Algorithm[Any]
    """What is sent, what clients do, how the server combines; wrappers around one another, outermost first."""
    description: str = ""
    """One line, for `fedloom recipes ls`."""
    model: ModelSettings = ModelSettings()
    """Which model is fine-tuned."""
    tune: Tune = LoRA()
    """What is learnt of it: adapters, its weights, or coefficients of random directions."""
    data: DataSettings = field(default_factory=DataSettings)
    """Whose rows, and how they become tokens."""
    objective: Objective = DEFAULT
    """What is learnt from an example, and judged."""
    local: LocalSettings = LocalSettings()
    """How a client learns."""
    cohort: Sampler = Full()
    """Who takes part in a round."""
    clock: Clock | None = None
    """How long clients train in virtual seconds; None: nothing tells, and in `run.mode: buffered` all take one."""
    evaluation: EvaluationSettings = EvaluationSettings()
    """When the model is measured, and by what."""
    secure: SecureSettings | None = None
    """Sums of uploads of which nobody sees a single one; None: the server receives each."""
    audit: Literal["off", "record"] = "off"
    """Whether the run's folder keeps what the server received, for `fedloom audit`; of clients on this machine alone."""
    wire: WireSettings = WireSettings()
    """How tensors become bytes."""
    engine: EngineSettings = InProcessSettings()
    """Where clients run."""
    worker: WorkerSettings = WorkerSettings()
    """How many processes train one client."""
    objects: Mapping[str, str] = field(default_factory=dict)
    """What Python gave in the place of a section, by its module and name: such a run goes on from Python, with the same."""
    run: RunSettings = RunSettings()
    """How long, from which seed, and what is kept."""

    @property
    def elsewhere(self) -> bool:
        """Return whether the data is at sites that join, and not here."""
        return isinstance(self.engine, FlowerSettings) and not self.engine.nodes

    @property
    def num_clients(self) -> int | None:
        """Return how many clients the data is dealt out to; None where that is known at joining only."""
        return None if self.elsewhere else self.data.num_clients

    @property
    def shares_base(self) -> bool:
        """Return whether other runs of this process may hold the same tensors of the base model."""
        return leaves_weights(self.tune) and self.model.quantize == "none"

    @property
    def metrics(self) -> MetricTable:
        """Return the metrics that clients may report, in the bounds that its objective gives them."""
        objective, table = self.objective, self.evaluation.table
        least = objective.least_loss if isinstance(objective, PreferenceObjective) else 0.0
        return replace(table, least_loss=least)

    @property
    def most_tokens(self) -> int:
        """Return how many tokens of one example may be measured: of a pair those of both answers."""
        answers = 2 if isinstance(self.objective, PreferenceObjective) else 1
        return answers * self.data.max_length

    def measures_after(self, number: int) -> bool:
        """Return whether the model is measured after a round; 0 is before the first."""
        every = self.evaluation.every
        if number == 0:
            return self.evaluation.before
        return number == self.run.rounds or (every > 0 and number % every == 0)

    def __post_init__(self) -> None:
        # It becomes the name of a folder and of a figure, a / in it a -.
        if (
            self.name.strip() in ("", ".", "..")
            or len(self.name) > 100
            or not self.name.isprintable()
        ):
            raise ValueError(
                f"name must be a word of 1 to 100 printable letters, got {self.name!r}"
            )
        if self.run.patience and not self.evaluation.every:
            raise ValueError(
                "run.patience counts evaluations, but evaluation.every is 0: set it to a number of rounds"
            )
        self._check_monitor()
        self._check_answers()
        self._check_preferences()
        if self.run.patience_seconds != _PATIENCE and not self.elsewhere:
            raise ValueError(
                "run.patience_seconds has no effect where no site joins: it is for `fedloom serve`"
            )
        if self.data.unseen and self.elsewhere:
            raise ValueError(
                "data.unseen draws among all clients before round 1, but sites may join at any time: leave it out, or let a"
                " site join with data that has no training rows"
            )
        for layer in layers(self.algorithm):
            check_accounts(layer)
        self._check_steps()
        self._check_finetune()
        self._check_ranks()
        self._check_emulator()
        self._check_worker()
        if self.elsewhere and self.data.left_out:
            raise ValueError(
                "data.left_out has no effect where sites join: do not start the site, or take its key out of the server's"
            )
        self._check_clock()
        self._check_mode()
        # What the algorithm leaves to the recipe is filled in, however the recipe was made.
        found = check(self.algorithm, self, num_clients=self.num_clients)
        object.__setattr__(self, "algorithm", found)
        self._check_secure()
        self._check_audit()

    def _check_clock(self) -> None:
        if self.clock is None:
            return
        if self.elsewhere:
            raise ValueError(
                "clock has no effect where sites join, whose time is their own: leave it out"
            )
        unknown = sorted(self.clock.tiers.keys() - self.data.tiers.keys())
        if unknown:
            known = ", ".join(self.data.tiers) or "none"
            raise ValueError(
                f"clock.tiers must be tiers of data.tiers ({known}), got {', '.join(unknown)}"
            )

    def _check_mode(self) -> None:
        mode = self.run.mode
        if isinstance(mode, Buffered) and (why := waits(self, mode)):
            raise ValueError(f"run.mode buffered {why}")

    def _check_monitor(self) -> None:
        name, table = self.run.monitor, self.evaluation.table
        known = name.rpartition("/")[2] in table.reported()
        if self.run.patience and known and table.of(name).better == "none":
            raise ValueError(
                f"run.monitor is {name}, of which neither way is better, so that run.patience has nothing to wait for:"
                " say better: lower or better: higher of it in evaluation.metrics, or watch another"
            )

    def _check_answers(self) -> None:
        named = self.evaluation.named
        if self.objective.classes and named not in ((), EvaluationSettings().named):
            raise ValueError(
                f"evaluation.metrics {', '.join(named)} score written answers, which objectives classification and"
                " selector have none of: leave them out; accuracy is always measured"
            )

    def _check_finetune(self) -> None:
        if not self.evaluation.finetune.steps:
            return
        if self.tune.is_seed_space:
            raise ValueError(
                "evaluation.finetune trains by gradients of the model's own tensors, which tune: seeds has none of: leave"
                " it out"
            )
        if describe(self.algorithm).components > 1:
            raise ValueError(
                "evaluation.finetune trains one model of a client, and fedem's clients answer with several: leave one out"
            )

    def _check_ranks(self) -> None:
        ranks = self.tune.adapters if isinstance(self.tune, HasRanks) else None
        if ranks is None or describe(self.algorithm).multiplies_factors:
            return
        path = "tune.offsite.adapter.lora" if isinstance(self.tune, HasEmulator) else "tune.lora"
        for name, given in (("ranks", ranks.tiers), ("side", ranks.side)):
            if given:
                raise ValueError(
                    f"{path}.{name} has no effect with an algorithm that does not add up products of factors: leave it"
                    " out, or take fedlora"
                )

    def _check_emulator(self) -> None:
        tune = self.tune
        if not isinstance(tune, HasEmulator):
            return
        if describe(self.algorithm).components > 1:
            raise ValueError(
                "fedem needs the whole model at its clients, which it mixes by their losses, got tune: offsite: leave one out"
            )
        if tune.emulator.factors and not isinstance(self.algorithm, Aligns):
            raise ValueError(
                "tune.offsite.factors has no effect without algorithm fedbiot before all others in the list, which moves them"
            )

    def _check_preferences(self) -> None:
        objective, tune = self.objective, self.tune
        if isinstance(objective, KTO) and self.local.batch_size != "auto" and self.local.rows < 2:
            raise ValueError(
                "local.batch_size must be at least 2 for objective kto, whose divergence is a mean over the answers of a"
                f" batch, got {self.local.batch_size}"
            )
        if isinstance(objective, Selector):
            check_unpacked(self.data)
        if not isinstance(objective, PreferenceObjective):
            return
        check_unpacked(self.data)
        if (
            isinstance(objective, Comparing)
            and objective.reference == "base"
            and tune.virtual_tokens
        ):
            raise ValueError(
                "reference of the objective must be start or download where tune has virtual tokens, without which the"
                " base model reads other text, got base"
            )

    def _check_worker(self) -> None:
        worker, local = self.worker, self.local
        if worker.num_processes == 1:
            return
        why = None
        if self.tune.is_seed_space or local.order == "zeroth":
            why = "trains by gradients: local.order must be first, and tune no seeds"
        elif isinstance(self.tune, HasEmulator):
            why = "needs the model's own layers, got tune: offsite"
        elif isinstance(self.objective, KTO):
            why = "adds up losses of examples, which kto's divergence is none of"
        elif local.group_tokens is not None:
            why = "trains clients one by one: leave local.group_tokens out"
        elif isinstance(self.engine, RaySettings):
            why = "starts processes itself: set engine inprocess or flower"
        elif worker.shards > 1:
            why = self._not_split()
        elif local.batch_size == "auto" or local.batch_size < worker.replicas:
            why = f"shares out the rows of a batch: local.batch_size must be as much at least, got {local.batch_size}"
        if why:
            raise ValueError(f"{worker.setting} {why}")

    def _check_secure(self) -> None:
        secure, reads = self.secure, self.algorithm.server_sees
        if secure is None:
            return
        if not reads.startswith(("mean", "noisy mean")):
            raise ValueError(
                f"secure hides single uploads, got {spelled(self.algorithm)}, whose server reads {reads}: leave"
                " secure out, or take what reads means alone (combine: mean; clustered with mode given or random, and"
                " share.pool off)"
            )
        most = self.cohort.largest(self.num_clients)
        if most is not None and most < secure.threshold:
            raise ValueError(
                f"secure.threshold must be at most the clients of a round ({most}), got {secure.threshold}"
            )
        if self.wire.upload != "float32":
            raise ValueError(
                f"wire.upload has no effect beside secure, whose sums are of secure.bits, got {self.wire.upload}"
            )
        if isinstance(self.engine, RaySettings) or (
            isinstance(self.engine, FlowerSettings) and self.engine.nodes
        ):
            raise ValueError(
                "secure needs clients that hold their own keys, got an engine whose clients are all this machine's: set"
                " engine inprocess, which plays all of them, or let sites join (`fedloom serve`)"
            )
        check_installed()

    def _check_audit(self) -> None:
        if self.audit not in ("off", "record"):
            raise ValueError(f"audit must be off or record, got {self.audit!r}")
        if self.audit == "off":
            return
        if self.elsewhere:
            raise ValueError(
                "audit: record keeps clients' uploads, which sites send to be added up and not to be kept: set it to off,"
                " or run the recipe with engine inprocess"
            )
        if describe(self.algorithm).quiet:
            raise ValueError(
                "audit: record keeps clients' uploads in the run's folder, out of which private.quiet keeps what is told of"
                " them: set algorithm.private.quiet to false, or audit to off"
            )

    def _not_split(self) -> str | None:
        """Return why the weights cannot be split over processes, None where they can."""
        if not isinstance(self.tune, LoRA | full.Full):
            return f"needs tune: lora or full, got {self.tune.title}"
        if describe(self.algorithm).prunes_columns:
            return "cannot split adapters that lose columns by fedlora.prune: leave that out, or take worker.replicas"
        if self.model.quantize != "none":
            return f"cannot split packed weights: model.quantize must be none, got {self.model.quantize}"
        if isinstance(self.objective, Comparing):
            return "has no whole model to compare with: take an objective without a reference, or worker.replicas"
        if self.local.kernels not in ("auto", "reference"):
            return f"goes through the model's own forward: local.kernels must be auto, got {self.local.kernels}"
        return None

    def _check_steps(self) -> None:
        # Where order is first, clients train as `local` says whatever space they are in.
        setting, steps = describe(self.algorithm).steps, self.local.steps
        if setting and steps is not None and self.local.order != "first":
            raise ValueError(
                f"local.steps has no effect beside {setting.partition('.')[0]}, got {steps}: set algorithm.{setting}"
            )
