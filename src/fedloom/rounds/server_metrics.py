"""What a server's state adds to a round's metrics: the part each client had in the update, coefficients in seed space."""

from collections.abc import Mapping
from typing import Any

from fedloom.core.protocols import ClientId, Metrics, Round
from fedloom.core.randomness import derive
from fedloom.core.seed_sequences import COEFFICIENTS
from fedloom.rounds.loop import Run
from fedloom.rounds.session import Session
from fedloom.server.combine.robust import INFLUENCE


def seed_metrics(session: Session, run: Run[Any]) -> Metrics:
    """Return norm, largest and share of the coefficients that are deployed; nothing in any other space.

    Where clients have several models, of the first client's.
    """
    if not session.recipe.tune.is_seed_space:
        return {}
    algorithm, population = session.recipe.algorithm, session.engine.population()
    client = next(iter(population))
    seed = derive(run.seed, "round", run.number + 1)
    alone = Round(run.number + 1, seed, population, (client,), 1.0)
    download = algorithm.broadcast(run.state, alone)[client]
    memory = session.store.load(client, before=run.number + 1)
    coefficients = algorithm.deployed(download, memory)[COEFFICIENTS].double()
    return {
        "server/coefficient_norm": float(coefficients.norm()),
        "server/coefficient_max": float(coefficients.abs().max()),
        "server/walked": float((coefficients != 0).double().mean()),
    }


FILE = "influence.jsonl"
"""A line a round: client -> influence, 1 as it weighs in a mean."""
REJECTED, WHOLE = 0.1, 0.99
"""Below the one a client counts as rejected, below the other as clipped."""
_PREFIX = f"server/{INFLUENCE}"


def split_influence(metrics: Metrics) -> tuple[Metrics, Mapping[ClientId, float]]:
    """Return the metrics with numbers in the place of names, and every client's influence; none where nobody's was told."""
    parts = {n.removeprefix(_PREFIX): v for n, v in metrics.items() if n.startswith(_PREFIX)}
    if not parts:
        return metrics, {}
    counts = {
        "server/num_rejected": float(sum(part < REJECTED for part in parts.values())),
        "server/num_clipped": float(sum(REJECTED <= part < WHOLE for part in parts.values())),
    }
    return {**{n: v for n, v in metrics.items() if not n.startswith(_PREFIX)}, **counts}, parts
