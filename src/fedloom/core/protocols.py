"""What a federated algorithm is, and the only things it may touch."""

from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar, runtime_checkable

from torch import Tensor

ClientId = str
Params = Mapping[str, Tensor]
"""Coordinates in one space, by name, on the CPU; zero is the model everybody holds."""
Payload = Mapping[str, Params]
"""What one message says: named groups. Wrappers rely on `params` (down) and `delta` (up)."""
Metrics = Mapping[str, float]
Profile = Mapping[str, str]
"""What both sides may know of a client: tier, language."""
Sees = Literal["each", "each in full", "mean", "mean of each cluster", "noisy mean"]
"""What a server half reads of the uploads; in full where it compares all of their entries, of each cluster where who is in
it is known beforehand."""
State = TypeVar("State")
"""A frozen dataclass of Params, tensors, numbers, tuples and dicts."""
Split = Literal["validation", "test"]


# --- messages -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Round:
    """What the server knows when a round begins; never sent."""

    number: int
    """From 1."""
    seed: int
    """The server's own randomness; a client only ever gets derive(seed, client)."""
    population: Mapping[ClientId, Profile]
    """Reachable now, sorted by id."""
    cohort: Sequence[ClientId]
    """Whom the sampler drew."""
    rate: float
    """Expected share of the population in a cohort, (0, 1]."""


@dataclass(frozen=True)
class Task:
    """From the server to one client."""

    kind: Literal["train", "validate", "test"]
    """Whether the client trains, or measures the model on its validation or test data."""
    round: int
    """From 1; 0 is the evaluation before training."""
    client: ClientId
    seed: int
    """This client's randomness in this round."""
    profile: Profile
    """What both sides may know of it."""
    download: Payload
    """What `broadcast` returned for it."""
    group: str = ""
    """Never sent. Uploads of one group may be added up before anybody reads them."""


@dataclass(frozen=True)
class Reply:
    """From one client to the server."""

    client: ClientId
    upload: Payload = field(default_factory=dict)
    """What the server reads of the client, as far as `server_sees` lets it."""
    weight: float = 1.0
    """In a weighted mean; the algorithm's choice."""
    metrics: Metrics = field(default_factory=dict)
    """For the run's record; no algorithm reads them."""
    count: int = 1
    """Never sent. Where an engine adds uploads up, how many the upload is the weighted mean of: `weight` is the sum of
    theirs, and `client` one of them."""


@dataclass(frozen=True)
class ClientFailure:
    """A task that brought no reply."""

    client: ClientId
    reason: str


@dataclass(frozen=True, slots=True)
class Spent:
    """What one task took at its client."""

    seconds: float = 0.0
    """Of its work; clients that are trained in one batch share its time equally."""
    steps: int = 0
    """Optimizer steps."""


@dataclass(frozen=True)
class Delivery:
    """What became of one task, and the length of its two messages."""

    answer: Reply | ClientFailure
    download_bytes: int = 0
    upload_bytes: int = 0
    spent: Spent = Spent()
    num_cut: int = 0
    """Entries of uploads that were too large for a secure sum, and were cut to its clip."""


class ClientError(Exception):
    """Raised on a client that cannot do its task: it becomes a ClientFailure, and the round goes on."""


# --- local work is data: a trainer may run it for one client, or for a cohort in one batch --------


@dataclass(frozen=True)
class Proximal:
    """Adds strength / 2 times the squared distance between the params and `center` to the loss."""

    strength: float
    center: Params
    """Where it leads to; a tensor that it lacks is not pulled."""


@dataclass(frozen=True)
class Tail:
    """Adds strength times |B[:, first:last]| |A[first:last]| of every layer to the loss: Frobenius norms of LoRA's factors."""

    strength: float
    factors: Sequence[tuple[str, str]]
    """Names of every layer's A and B."""
    first: int
    """The column of B, and row of A, that it begins with."""
    last: int
    """The one behind its last."""


@dataclass(frozen=True)
class Fit:
    """Improve `start` on the client's training data, as the recipe's `local` section says."""

    start: Params
    """Where training begins; it is not changed."""
    proximal: Proximal | None = None
    """A pull towards a center, in every step."""
    gradient_offset: Params | None = None
    """Added to every gradient."""
    mask: Params | None = None
    """Multiplies every gradient; 0 freezes; a scalar tensor covers its whole name."""
    seed_sequence: Params | None = None
    """The coordinate each step moves along, (steps,) int64 by name; zeroth order in seed space only."""
    at_start: bool = False
    """Whether every step of the sequence is measured at `start`, so that its steps do not add up."""
    steps: int | None = None
    """Optimizer steps; None: as the recipe says."""
    gain: float = 1.0
    """Multiplies the scale of low-rank adapters while they train: that of a smaller rank than the space's is larger."""
    example_weights: Tensor | None = None
    """(examples,) float64, what the loss of each training example is multiplied by, in their order; None: 1 each."""
    lr_factor: float = 1.0
    """Multiplies the recipe's learning rate."""
    decay_factor: float = 1.0
    """Multiplies the recipe's weight decay."""
    tail: Tail | None = None
    """A pull of the last columns of low-rank adapters towards zero, in every step."""


@dataclass(frozen=True)
class Evaluate:
    """Measure `params` on the client's held-out data."""

    params: Params
    split: Split = "validation"
    share: float = 1.0
    """Of `params` in a mixture of models, whose likelihoods of a whole answer are added up by their shares."""
    beside: Sequence[tuple[float, Params]] = ()
    """Shares and params of the others: the loss is that of the mixture; what is written or hit, that of `params`."""


@dataclass(frozen=True)
class Losses:
    """Measure the loss of each of the client's training examples at `params`; nothing learns."""

    params: Params


Work = Fit | Evaluate | Losses


@dataclass(frozen=True)
class Done:
    """What became of one piece of work."""

    params: Params
    """Of Fit: fresh tensors, the receiver's to change; else empty."""
    num_examples: int
    """The client's training examples, or the held-out ones that were measured."""
    num_steps: int = 0
    """Optimizer steps that were taken."""
    lr_sum: float | None = None
    """-displacement / lr_sum is the mean gradient; None where it is not (AdamW, momentum)."""
    record: Payload = field(default_factory=dict)
    """Seed space: "scalars", the projected gradient of every step along the seed sequence, 0 where it was skipped. Of
    Losses: "losses", a tensor of that name, (examples,) float64, sums over each example's target tokens, nats."""
    metrics: Metrics = field(default_factory=dict)


ClientUpdate = Generator[Work, Done, tuple[Reply, Payload]]
"""Returns what is sent and what is kept.

An upload's groups, names and shapes must follow from the names and shapes of the download, the round and the profile, not
from data, client_state, a download's values or who the client is: the server rehearses the half once for all who share those.
"""


@dataclass(frozen=True)
class Job:
    """One client's piece of work, ready to run."""

    client: ClientId
    round: int
    """From 1; learning-rate schedules by round are the trainer's. 0 outside of them: at the whole learning rate."""
    seed: int
    """derive(task.seed, turn): a second yield draws other batches."""
    work: Work


class Trainer(Protocol):
    """Runs work. Honours every field of it or refuses; several jobs may share a batch."""

    @property
    def width(self) -> int:
        """Return how many clients it likes to run at once."""
        ...

    def run(self, jobs: Sequence[Job]) -> Sequence[Done]:
        """Return the answers in the order of the jobs."""
        ...


# --- who decides, and where it runs -------------------------------------------------------------


class Algorithm(Protocol[State]):
    """A frozen slotted dataclass whose fields are its recipe section. Both halves hold the same object.

    Optional members are in `core.description`: `describe` tells of it (clusters, seeds, privacy), `check` refuses a recipe
    that it does not go with, `released` and `charge` keep the account of noisy means, `mixture` names several models that
    answer together. A wrapper derives from
    `core.wrapper.Wrapper`, which hands them on to its inner algorithm.
    """

    @property
    def server_sees(self) -> Sees:
        """Return what server_update needs of the uploads; a ClassVar in leaves, computed in wrappers."""
        ...

    # On the server: pure functions of State.

    def init(self, params: Params, seed: int) -> State:
        """Return the state before round 1. Every dataclass of a state occurs in it."""
        ...

    def broadcast(self, state: State, round: Round) -> Mapping[ClientId, Payload]:
        """Return what each client is sent; its keys are the cohort, one object where clients get the same."""
        ...

    # On a client: sees self and its arguments, never State, never a model.

    def client_update(self, task: Task, client_state: Payload) -> ClientUpdate:
        """Yield work, return (reply, client_state)."""
        ...

    def deployed(self, download: Payload, client_state: Payload) -> Params:
        """Return what this client would use now."""
        ...

    # On the server again.

    def server_update(
        self, state: State, round: Round, replies: Iterable[Reply]
    ) -> tuple[State, Metrics]:
        """Return the next state. Never reads len(replies): round.rate is the expected share."""
        ...


class Engine(Protocol):
    """Where clients run."""

    def population(self) -> Mapping[ClientId, Profile]:
        """Return the reachable clients, sorted by id."""
        ...

    def run(self, tasks: Sequence[Task]) -> Iterator[Delivery]:
        """Yield one delivery a task, in task order; of tasks whose uploads were added up, one with a reply for all of them."""
        ...


@runtime_checkable
class Arriving(Engine, Protocol):
    """An engine whose clients are asked one by one, and answer in their own time."""

    @property
    def training(self) -> Collection[ClientId]:
        """Return who was asked and whose answer was not taken yet."""
        ...

    def begin(self, tasks: Sequence[Task], made: Callable[[Reply], Reply]) -> None:
        """Ask clients that are not in training, and wait for nobody; `made` makes of a reply what is delivered."""
        ...

    def arrival(self) -> Delivery:
        """Return what came of the task that was done first of those that were not taken yet."""
        ...

    def too_few(self, num_replies: int) -> bool:
        """Return whether a step has too few replies as clients were gone; it has waited until enough were back."""
        ...
