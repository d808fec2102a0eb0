"""What a run's memory is made of, what would lower it, and the batch that fits."""

import tempfile
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from fedloom.client.cohort import Cohort
from fedloom.client.moments import held
from fedloom.core.protocols import ClientId
from fedloom.data.data_settings import DataSettings
from fedloom.data.encoding import Tokenizer
from fedloom.data.federation import Federation, Shard, federate
from fedloom.engines.engine_settings import InProcessSettings, LoopbackSettings
from fedloom.models.introspection import forgets_activations
from fedloom.objectives.objective import Objective
from fedloom.results.forecast import held_by_round
from fedloom.results.played import first_fit
from fedloom.results.probes import Probes
from fedloom.rounds.loop import begin, draw
from fedloom.rounds.recipe_settings import Recipe
from fedloom.rounds.session import Makers, Session, build
from fedloom.spaces.seed_space import SeedSpace
from fedloom.tracking.metric_format import human_bytes

SHARE = 0.9
"""Of the memory that is free, what a run may take of its own accord."""
_TRIED = 8
"""Examples at once while memory is measured; fewer where they are long."""


def open_to_probes(
    recipe: Recipe, folder: Path, makers: Makers | None = None
) -> tuple[Session, dict[ClientId, Shard]]:
    """Return a session, and the data that its trainer reads, to which probes can be added."""
    shards: dict[ClientId, Shard] = {}
    given = makers or Makers()

    def federation(data: DataSettings, tokenizer: Tokenizer, objective: Objective) -> Federation:
        made = (given.federation or federate)(data, tokenizer, objective)
        shards.update(made.shards)
        return replace(made, shards=shards)

    session = build(recipe, folder, makers=replace(given, federation=federation))
    return session, shards


def with_batch_size(recipe: Recipe, *, makers: Makers | None = None) -> Recipe:
    """Return the recipe with a number for `local.batch_size: auto`: the most examples that fit, padded to the longest.

    Args:
        recipe: As it was asked for.
        makers: What Python gave in the place of sections.

    Raises:
        ValueError: where not even one example fits, or where that cannot be told.
    """
    if recipe.local.batch_size != "auto":
        return recipe
    if not isinstance(recipe.engine, InProcessSettings | LoopbackSettings):
        raise ValueError(
            "local.batch_size auto is for engine inprocess: elsewhere each process has memory of its own, so set a number"
        )
    tried = replace(recipe, local=replace(recipe.local, batch_size=_TRIED))
    with tempfile.TemporaryDirectory() as folder:
        session, shards = open_to_probes(tried, Path(folder), makers)
        return replace(recipe, local=replace(recipe.local, batch_size=_largest(session, shards)))


def _largest(session: Session, shards: dict[ClientId, Shard]) -> int:
    recipe, rows = session.recipe, [row for shard in shards.values() for row in shard.train]
    if next(session.space.model.parameters()).device.type != "cpu":
        raise ValueError("local.batch_size auto is measured on CPUs only: set a number")
    most = max(len(shard.train) for shard in shards.values())
    longest = max(row.num_tokens for row in rows)
    begun = begin(recipe.algorithm, session.space.start(), recipe.run.seed)
    cohort = len(draw(begun, session.learners, session.asked).cohort)
    fit = first_fit(session)
    if fit is None:
        raise ValueError("local.batch_size auto has no effect: nobody trains in round 1")
    memory = Probes(session, shards, cohort).training(fit).memory
    left = allowed_bytes() - memory.constant - held_by_round(session, cohort)
    if left < memory.slope * longest:
        raise ValueError(
            f"one example of {longest} tokens needs {human_bytes(memory.slope * longest)} beside"
            f" {human_bytes(memory.constant)}, and {human_bytes(left)} are left: {_advice(session, 'activations')}"
        )
    # No client has more to put through at once.
    fits = left / (memory.slope * longest) if memory.slope else most
    return max(1, min(int(fits), -(-most // recipe.local.accumulation)))


def allowed_bytes() -> float:
    """Return what this process may hold: what it has, and a share of what is free."""
    return psutil.Process().memory_info().rss + SHARE * psutil.virtual_memory().available


def largest_term(session: Session, activations: int, held_by_round: int) -> str:
    """Return what takes the most memory, and what would lower it, in words.

    Args:
        session: The recipe, built.
        activations: Bytes that grow with the tokens of a batch, measured.
        held_by_round: Bytes that a round keeps of params.
    """
    sizes = {**_tensors(session), "activations": activations, "messages": held_by_round}
    term = max(sizes, key=lambda name: sizes[name])
    return f"{_WORDS[term]}, {human_bytes(sizes[term])}: {_advice(session, term)}"


_WORDS = {
    "weights": "the model's weights",
    "start": "where tuned tensors start",
    "gradient": "gradients of tuned tensors",
    "moments": "the optimizer's moments",
    "activations": "activations of a batch",
    "messages": "tuned tensors that a round keeps",
}


def _tensors(session: Session) -> dict[str, int]:
    """Return the bytes of what training has as tensors, whatever the batch."""
    space, local = session.space, session.recipe.local
    held_by_model = (*space.model.parameters(), *space.model.buffers())
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held_by_model}
    sizes = {"weights": sum(storages.values())}
    if isinstance(space, SeedSpace):
        return sizes
    lanes = session.trainer.width if isinstance(session.trainer, Cohort) else 1
    tuned = space.values.nbytes
    moments = 2 if local.optimizer == "adamw" else int(local.momentum > 0)
    like = torch.empty(1, 1 << 10)
    each = sum(t.nbytes for t in held(local.moments, is_square=False).zeros(like)) / like.nbytes
    return {
        **sizes,
        "start": tuned,
        "gradient": tuned * lanes,
        "moments": int(moments * each * tuned * lanes),
    }


_FEWER_BITS = {
    "none": "model.dtype bfloat16 or model.quantize int8 where they are frozen, or ",
    "int8": "model.quantize nf4, or ",
}
"""Of frozen weights, by how they are held."""


def _advice(session: Session, term: str) -> str:
    recipe = session.recipe
    if term == "weights":
        return f"{_FEWER_BITS.get(recipe.model.quantize, '')}a smaller model"
    if term == "moments" and recipe.local.moments != "float8":
        return "local.moments float8 holds them in a quarter, local.optimizer sgd has none"
    if term == "activations" and not forgets_activations(session.space.model):
        return "model.gradient_checkpointing true computes them again, data.max_length and local.batch_size bound them"
    if term == "activations":
        return (
            "a smaller local.batch_size, with local.accumulation as much larger, or data.max_length"
        )
    return "tune fewer tensors: an adapter (tune: lora), or some of the weights (tune.full.weights)"
