"""What a run in seed space tells of its coefficients, round by round."""

from typing import Any

from fedloom.core.protocols import Metrics, Round
from fedloom.core.randomness import derive
from fedloom.core.seed_sequences import COEFFICIENTS
from fedloom.rounds.loop import Run
from fedloom.rounds.session import Session


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
