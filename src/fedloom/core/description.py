"""What an algorithm may tell of itself and ask of a recipe, beyond its protocol. All of it is optional.

Without these members an algorithm runs as any other. A wrapper derives from `core.wrapper.Wrapper`, which hands them on.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from fedloom.core.protocols import Algorithm, ClientId, Params, Payload, Reply, Round
from fedloom.core.secure_view import SecureView

GLOBAL = "global"
"""What the model of clients without a cluster is called."""
MAX_UPDATE_NORM = 1e4
"""The default of run.max_update_norm."""
FILLED: Mapping[str, bool] = {"filled": True}
"""Metadata of a field that no recipe has, as `check` fills it in from other sections."""

Release = tuple[int, str, float, float]
"""A noisy sum: its round, the seal of what it is of, the chance of taking part, the noise multiplier."""


# --- what it tells ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clusters:
    """Clients that share a model of their own, and what that rests on."""

    assignment: Mapping[ClientId, str] = field(default_factory=dict)
    """The name of each client's cluster; empty where all are one, and without those that are in none."""
    changes: Mapping[int, Mapping[ClientId, str]] = field(default_factory=dict)
    """By round, who came to which cluster; GLOBAL for none."""
    confidence: float = 1.0
    """[0, 1]; 1 where nothing was in doubt."""
    noise: float = 0.0
    """Standard deviation of a similarity that the clusters leave unexplained."""
    clients: Sequence[ClientId] = ()
    """The rows of `similarity`."""
    similarity: Tensor | None = None
    """(clients, clients) float32; None where nothing was compared."""
    merges: Tensor | None = None
    """(clients - 1, 4) float64, the tree as scipy's dendrogram takes it."""
    variances: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Of pooled clusters, by tensor: squared distance expected of a client's update from its cluster's, of that from all."""

    def __post_init__(self) -> None:
        """Refuse names that no folder can have."""
        for n in {*self.assignment.values()}:
            if not n.isprintable() or n.strip() in ("", ".", "..") or "/" in n:
                raise ValueError(f"a cluster's name must be one that a folder can have, got {n!r}")

    @property
    def names(self) -> Sequence[str]:
        """Return the names of all clusters that have clients."""
        return sorted({*self.assignment.values()})


@dataclass(frozen=True)
class Seeds:
    """What is known of the seeds of a seed space."""

    chances: Tensor
    """(K,) float64, how likely each is drawn next."""


@dataclass(frozen=True)
class Privacy:
    """What is promised to a single client. How much of it is spent is the metric `epsilon`, round by round."""

    delta: float | None = None
    """Chance that epsilon does not hold."""
    void: str = ""
    """Why nothing is promised, in a few words; empty where something is."""
    explanation: str = ""
    """The same as a sentence without its full stop; of a promise, what it is of if not of the models."""
    quiet: bool = False
    """Whether to keep out of the run's folder what no epsilon covers and what tells of single clients."""


@dataclass(frozen=True)
class Description:
    """What an algorithm tells of itself; a part is None where it has none of it."""

    clusters: Clusters | None = None
    seeds: Seeds | None = None
    privacy: Privacy | None = None
    min_replies: int = 1
    """Replies without which a round changes nothing."""
    averages_deltas: bool = False
    """Whether the server reads of uploads the weighted mean of `delta` alone: one reply with it may stand for all."""
    rescales: bool = False
    """Whether the server's step is another than that mean times a number, as that of Adam is."""
    replays: bool = False
    """Whether the server can make such a `delta` of every reply by itself, see `Replays`."""
    current: str = ""
    """Why a reply says nothing once the server has stepped on, for the sentence that refuses `run.mode: buffered`."""
    bounds_updates: bool = False
    """Whether it bounds by itself what one client adds, so that `run.max_update_norm` is not asked."""
    multiplies_factors: bool = False
    """Whether the server multiplies LoRA's factors, for which coordinates must count from nothing; it knows their ranks."""
    components: int = 1
    """Models that a client's answers are a mixture of."""
    slices: bool = False
    """Whether clients may be sent, and send, some columns of the tuned tensors in the place of all."""
    prunes_columns: bool = False
    """Whether clients look at columns of their factors to give some up."""
    takes_turns: bool = False
    """Whether clients move some of the tuned tensors in one round and others in the next."""
    measures_noise: bool = False
    """Whether clients measure how noisy their uploads are, which holds for uploads that nothing further out changes."""
    local: Mapping[str, int] = field(default_factory=dict)
    """Tuned tensors that stay at clients, and how many numbers each has; known of a state only."""
    steps: str = ""
    """The setting that says how far clients go in the place of `local.steps`, as in fedkseed.steps; empty where that does."""
    notes: Sequence[str] = ()
    """What whoever runs it should read first, a sentence each, without a full stop."""

    def current_only(self, why: str) -> "Description":
        """Return the same of an algorithm whose server reads more than a mean, of replies to its newest state alone."""
        return replace(self, averages_deltas=False, replays=False, current=why)

    @property
    def quiet(self) -> bool:
        """Return whether the run's folder is to hold what privacy covers only."""
        return self.privacy is not None and self.privacy.quiet


@runtime_checkable
class Describes(Protocol):
    """An algorithm that tells of itself."""

    def describe(self, state: Any) -> Description:
        """Return what it is; a pure function.

        Args:
            state: The server's; None where there is none yet, for what follows from the settings.
        """
        ...


def describe(algorithm: Algorithm[Any], state: Any = None) -> Description:
    """Return what an algorithm tells of itself: nothing where it has no `describe`; without a state, what settings say."""
    return algorithm.describe(state) if isinstance(algorithm, Describes) else Description()


# --- what it asks -------------------------------------------------------------------------------


class CohortView(Protocol):
    """Section `cohort`."""

    @property
    def independent(self) -> bool:
        """Return whether every client is drawn on its own."""
        ...

    def largest(self, num_clients: int | None) -> int | None:
        """Return the most clients of a cohort; None where that is not known without `num_clients`."""
        ...


class DataView(Protocol):
    """Section `data`."""

    @property
    def tiers(self) -> Mapping[str, float]:
        """Return the share of clients of each tier."""
        ...

    @property
    def fractions(self) -> Sequence[float]:
        """Return the shares of training, validation and test examples."""
        ...


class EvaluationView(Protocol):
    """Section `evaluation`."""

    @property
    def by(self) -> str | None:
        """Return the label that results are told apart by."""
        ...


class LocalView(Protocol):
    """Section `local`."""

    @property
    def weight_decay(self) -> float:
        """Return how far tuned tensors are pulled to zero."""
        ...


class RunView(Protocol):
    """Section `run`."""

    @property
    def rounds(self) -> int:
        """Return how many."""
        ...

    @property
    def min_replies(self) -> int:
        """Return the replies without which a round changes nothing."""
        ...

    @property
    def max_update_norm(self) -> float:
        """Return the norm beyond which an update is left out."""
        ...

    @property
    def patience(self) -> int:
        """Return after how many evaluations without a better one it stops; 0 for never."""
        ...

    @property
    def samples(self) -> int:
        """Return how many answers are shown."""
        ...

    @property
    def baselines(self) -> Sequence[str]:
        """Return which runs follow."""
        ...


class RecipeView(Protocol):
    """What our algorithms read of the recipe they are part of; what `check` is given is the whole `Recipe`."""

    @property
    def algorithm(self) -> Algorithm[Any]:
        """Return the whole algorithm, of which the one that is asked may be a layer."""
        ...

    @property
    def cohort(self) -> CohortView:
        """Return who takes part."""
        ...

    @property
    def data(self) -> DataView:
        """Return who holds what."""
        ...

    @property
    def evaluation(self) -> EvaluationView:
        """Return what is measured."""
        ...

    @property
    def local(self) -> LocalView:
        """Return how clients learn."""
        ...

    @property
    def run(self) -> RunView:
        """Return how long it runs, and what is written down."""
        ...

    @property
    def secure(self) -> SecureView | None:
        """Return how uploads are added up so that nobody sees one; None where they are not."""
        ...

    @property
    def tune(self) -> object:
        """Return what is learnt, see `core.ranks.HasRanks`."""
        ...


@runtime_checkable
class Checks(Protocol):
    """An algorithm that asks something of the recipe it is part of."""

    def check(self, recipe: RecipeView, *, num_clients: int | None) -> Algorithm[Any]:
        """Return the algorithm, with what it leaves to the recipe filled in.

        Args:
            recipe: With all of its sections.
            num_clients: How many there are; None where that is not known yet.

        Raises:
            ValueError: where they do not go together; one sentence that names the setting to change.
        """
        ...


def check(
    algorithm: Algorithm[Any], recipe: RecipeView, *, num_clients: int | None
) -> Algorithm[Any]:
    """Return the algorithm as it takes part in a recipe, see `Checks.check`; itself where it asks nothing."""
    if isinstance(algorithm, Checks):
        return algorithm.check(recipe, num_clients=num_clients)
    return algorithm


def settings_of(cls: Any) -> list[Field[Any]]:
    """Return the fields of a dataclass that a recipe may have: those that `check` fills in are none."""
    return [f for f in fields(cls) if f.metadata.get("filled") != FILLED["filled"]]


# --- what only the server writes -----------------------------------------------------------------


@runtime_checkable
class Masks(Protocol):
    """An algorithm whose clients are sent more than they may train."""

    def mask(self, download: Payload) -> Params | None:
        """Return a mask of gradients, 0 where only the server writes; None where all of a model learns."""
        ...


def mask_of(algorithm: Algorithm[Any], download: Payload) -> Params | None:
    """Return what of a model learns, see `Masks.mask`."""
    return algorithm.mask(download) if isinstance(algorithm, Masks) else None


# --- what clients send in the place of a delta ---------------------------------------------------


@runtime_checkable
class Replays(Protocol):
    """An algorithm that makes a delta of what a client sends, given the state and the round that it was asked in."""

    def replayed(self, state: Any, round: Round, reply: Reply) -> Reply:
        """Return the reply with `delta` in the place of what was sent; a pure function, which `server_update` takes too."""
        ...


def replayed_by(algorithm: Algorithm[Any], state: Any, round: Round, reply: Reply) -> Reply:
    """Return a reply as one whose `delta` may be added up whenever it arrives, see `Replays`; as it is where it is one."""
    return algorithm.replayed(state, round, reply) if isinstance(algorithm, Replays) else reply


# --- several models that answer together ---------------------------------------------------------

Mixture = Sequence[tuple[float, Params]]
"""Shares that sum to 1, and params of models whose likelihoods of an answer are added up by them."""


@runtime_checkable
class Mixes(Protocol):
    """An algorithm whose clients are measured with several models at once."""

    def mixture(self, download: Payload, client_state: Payload) -> Mixture:
        """Return the models that this client would use now, in an order that stays; nothing where that is one.

        `deployed` returns the one of the largest share, the first of several.
        """
        ...


def mixture_of(algorithm: Algorithm[Any], download: Payload, client_state: Payload) -> Mixture:
    """Return the models a client would use together; nothing where it uses one."""
    return algorithm.mixture(download, client_state) if isinstance(algorithm, Mixes) else ()


def deployed_of(mixture: Mixture) -> int:
    """Return the place of the one of the largest share, the first of several."""
    return max(range(len(mixture)), key=lambda at: mixture[at][0])


# --- what it has spent --------------------------------------------------------------------------


@runtime_checkable
class Accounts(Protocol):
    """An algorithm whose state keeps an account of the noisy sums that were sent."""

    def released(self, state: Any) -> Iterable[Release] | None:
        """Return what is on the account; None where none is kept."""
        ...

    def charge(self, state: Any, releases: Iterable[Release]) -> Any:
        """Return the state with these releases on its account too, those it knows counted once."""
        ...


def check_accounts(algorithm: Algorithm[Any]) -> None:
    """Refuse a layer that would lose the account of what was sent, or the terms it was sent on.

    Raises:
        ValueError: where the server sees a noisy mean, and nobody could tell how often.
    """
    if algorithm.server_sees != "noisy mean":
        return
    if not all(isinstance(algorithm, needed) for needed in (Describes, Checks, Accounts)):
        raise ValueError(
            f"{type(algorithm).__name__}, whose server sees a noisy mean, must hand on what was released: derive it"
            " from fedloom.core.wrapper.Wrapper, or give it describe, check, released and charge"
        )
