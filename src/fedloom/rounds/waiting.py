"""Why a server cannot step on answers as they come in."""

from typing import TYPE_CHECKING

from fedloom.core.description import describe
from fedloom.core.emulation import Aligns
from fedloom.core.wrapper import layers, spelled
from fedloom.server.buffering import Buffered

if TYPE_CHECKING:
    from fedloom.rounds.recipe_settings import Recipe


def waits(recipe: "Recipe", mode: Buffered) -> str | None:
    """Return why the server has to wait for the cohort, None where it has not."""
    told, count = describe(recipe.algorithm), recipe.num_clients
    if recipe.secure is not None:
        return (
            "takes up each answer once it is there, and secure opens sums of a cohort that trains at the same time alone:"
            " leave one of them out"
        )
    if recipe.cohort.independent:
        return (
            "keeps as many clients in training as cohort says, got poisson, which says none: take uniform, weighted,"
            " fixed or full"
        )
    if not (told.averages_deltas or told.replays):
        why = f" ({told.current})" if told.current else ""
        return (
            "adds up what clients learnt from models of different steps, so it needs an algorithm whose server reads the"
            f" mean of `delta` and nothing else, got {spelled(recipe.algorithm)}{why}"
        )
    if isinstance(recipe.algorithm, Aligns):
        return f"trains beside an emulator that has moved on, got {spelled(recipe.algorithm)}"
    if mode.mixes == "models" and len([*layers(recipe.algorithm)]) > 1:
        return (
            f"with mixes: models needs an algorithm that sends its model as it is, got {spelled(recipe.algorithm)}: take"
            " mixes: updates, or leave out what is around it"
        )
    if recipe.run.min_replies > mode.size:
        return (
            f"steps on {mode.size} answers, got run.min_replies {recipe.run.min_replies}: lower it"
        )
    if count is not None and mode.size > count:
        return f"waits for {mode.size} different clients, got {count}: lower run.mode.buffered.size"
    return None
