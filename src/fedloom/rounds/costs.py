"""What a round took of every client: seconds, bytes both ways, and operations by formula; FederatedScope's monitor."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fedloom.core.protocols import (
    Arriving,
    ClientId,
    Delivery,
    Engine,
    Metrics,
    Profile,
    Reply,
    Spent,
    Task,
)
from fedloom.models.flops import step_flops
from fedloom.rounds.session import Session

FILE = "costs.jsonl"
"""A line a round: client -> what it spent on training."""
KINDS = ("seconds", "upload_bytes", "download_bytes", "flops")
"""Seconds of its work, which clients of one batch share; bytes of its messages; operations, estimated by formula from
tokens and parameters."""
_PREFIX = "spent/"


@dataclass
class Metered:
    """An engine whose deliveries are noted as they go by."""

    engine: Engine
    """One of sites that nobody waits for is metered by `MeteredArrivals`, see `metered`."""
    seen: list[tuple[ClientId, Delivery]] = field(default_factory=list)

    def population(self) -> Mapping[ClientId, Profile]:
        """Return the engine's own."""
        return self.engine.population()

    def run(self, tasks: Sequence[Task]) -> Iterator[Delivery]:
        """Yield the engine's deliveries; of a sum of several clients nothing is noted, as nobody is told apart in it."""
        for delivery in self.engine.run(tasks):
            self.note(delivery)
            yield delivery

    def note(self, delivery: Delivery) -> None:
        """Keep what a delivery says of its client."""
        answer = delivery.answer
        if not isinstance(answer, Reply) or answer.count == 1:
            self.seen.append((answer.client, delivery))

    def costs(self, session: Session) -> Metrics:
        """Return every client's numbers, under names that `split_costs` takes apart."""
        return {
            f"{_PREFIX}{kind}/{client}": value
            for client, delivery in self.seen
            for kind, value in _of(client, delivery, session).items()
        }


@dataclass
class MeteredArrivals(Metered):
    """The same of an engine whose clients answer in their own time."""

    engine: Arriving

    @property
    def training(self) -> Collection[ClientId]:
        """Return the engine's own."""
        return self.engine.training

    def begin(self, tasks: Sequence[Task], made: Callable[[Reply], Reply]) -> None:
        """Ask the engine's clients."""
        self.engine.begin(tasks, made)

    def arrival(self) -> Delivery:
        """Return the engine's next delivery, which belongs to the round in which it is taken."""
        delivery = self.engine.arrival()
        self.note(delivery)
        return delivery

    def too_few(self, num_replies: int) -> bool:
        """Return the engine's own."""
        return self.engine.too_few(num_replies)


def metered(engine: Engine) -> Metered:
    """Return an engine, of whichever kind, that notes its deliveries."""
    return MeteredArrivals(engine) if isinstance(engine, Arriving) else Metered(engine)


def _of(client: ClientId, delivery: Delivery, session: Session) -> dict[str, float]:
    return {
        "seconds": delivery.spent.seconds,
        "upload_bytes": float(delivery.upload_bytes),
        "download_bytes": float(delivery.download_bytes),
        "flops": flops(client, delivery.spent, session),
    }


def flops(client: ClientId, spent: Spent, session: Session) -> float:
    """Return the operations of a client's steps, whose rows are as long as its rows are on average."""
    held, local = session.counts[client], session.recipe.local
    if not spent.steps or not held.rows:
        return 0.0
    length = held.tokens / held.rows
    zeroth = local.order == "zeroth" or (local.order is None and session.recipe.tune.is_seed_space)
    ways = local.directions * (1 if local.difference == "forward" else 2)
    passes = ways + (local.difference == "forward") if zeroth else None
    trained = sum(p.numel() for p in session.space.model.parameters() if p.requires_grad)
    each = step_flops(session.space.model, length, num_trained=trained, passes=passes)
    return each * length * local.rows * local.accumulation * spent.steps


def split_costs(metrics: Metrics) -> tuple[Metrics, dict[ClientId, dict[str, float]]]:
    """Return the metrics without clients' own numbers, and those: client -> `KINDS`."""
    found: dict[ClientId, dict[str, float]] = {}
    for name, value in metrics.items():
        if name.startswith(_PREFIX):
            kind, _, client = name.removeprefix(_PREFIX).partition("/")
            found.setdefault(client, {})[kind] = value
    return {n: v for n, v in metrics.items() if not n.startswith(_PREFIX)}, found


def totals(lines: Sequence[Mapping[str, Mapping[ClientId, Metrics]]]) -> dict[ClientId, Metrics]:
    """Return what every client spent in all rounds, and in how many it was asked, from the lines of `FILE`."""
    found: dict[ClientId, dict[str, float]] = {}
    for line in lines:
        for client, costs in line["costs"].items():
            own = found.setdefault(client, {"rounds": 0.0, **dict.fromkeys(KINDS, 0.0)})
            own["rounds"] += 1
            for kind in KINDS:
                own[kind] += costs.get(kind, 0.0)
    return dict(sorted(found.items()))
