"""Where a run stands: its last good checkpoint with the memory and the records that belong to it, looked at, not touched."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedloom.core.files import DamagedFile
from fedloom.core.protocols import ClientError, Metrics
from fedloom.rounds.binding import compare, meaning_of
from fedloom.rounds.buffered import buffered
from fedloom.rounds.checkpoint import Checkpoints, Resumed
from fedloom.rounds.inputs import FILE, Difference, read_notes
from fedloom.rounds.loop import Run, begin
from fedloom.rounds.session import Session
from fedloom.server.buffering import Buffered
from fedloom.tracking.records import RECORDS, records

_MEANT = ("model", "tune", "data", "algorithm", "wire")
"""Sections that decide what a checkpoint's state is and what is deployed of it."""


@dataclass(frozen=True)
class Standing:
    """What a folder holds to go on from."""

    checkpoints: Checkpoints
    run: Run[Any]
    fresh: bool
    """Whether nothing has been done yet."""
    metrics: Metrics
    """What the round's line in metrics.jsonl holds before the model is measured."""
    damaged: tuple[str, ...] = ()
    """Why each newer checkpoint was passed over."""
    differences: tuple[Difference, ...] = ()
    """What is not as the run was begun, and was accepted."""


def standing(
    session: Session, settings: Mapping[str, Any], *, anyway: bool, public: str | None = None
) -> Standing:
    """Return where the run in the session's folder stands; nothing in there is changed.

    Args:
        session: The recipe, built.
        settings: The recipe as flat settings; a checkpoint of other settings is refused.
        anyway: Whether other data, and beneath an adapter another base model, are accepted.
        public: Hash of the server's own text, if it has any.

    Raises:
        ValueError: where there is something to go on from that this recipe, its data or its model do not fit, or of
            which a part is missing.
    """
    folder = session.folder
    for name in ("checkpoints", "client_state"):
        if (folder / name).exists() and not (folder / name).is_dir():
            raise ValueError(f"{folder / name} is no folder: remove it")
    read_notes(folder)
    rounds = {name: [row["round"] for row in records(folder / name).rows()] for name in RECORDS}
    checkpoints = Checkpoints(
        folder / "checkpoints",
        keep=session.recipe.run.keep_checkpoints,
        settings=settings,
        space=meaning_of(session),
    )
    fresh = _fresh(session)
    if not checkpoints.rounds():
        done = max((number for numbers in rounds.values() for number in numbers), default=0)
        if done:
            raise ValueError(
                f"{folder} tells of {done} rounds, but {checkpoints.folder} holds no checkpoint: put them back, or"
                " begin a new run in another folder"
            )
        differences = (
            compare(session, anyway=anyway, public=public) if (folder / FILE).exists() else ()
        )
        return Standing(checkpoints, fresh, True, {}, (), differences)
    found: list[tuple[Difference, ...]] = []

    def whole(run: Run[Any], extra: Mapping[str, Any]) -> None:
        if not found:
            found.append(compare(session, anyway=anyway, public=public))
        _check_records(rounds, run.number, extra.get("lines", {}))
        _check_memory(session, extra)

    resumed = checkpoints.load(fresh, check=whole)
    metrics = resumed.extra.get("told", {})
    return Standing(checkpoints, resumed.run, False, metrics, resumed.damaged, found[0])


def newest(session: Session, settings: Mapping[str, Any] | None = None) -> Resumed[Run[Any]]:
    """Return the newest good checkpoint, for reading what came of the run.

    Args:
        session: The recipe, built; whether its inputs are the run's is for `binding` to say.
        settings: The recipe as flat settings, compared in what decides what is deployed; None compares none.

    Raises:
        ValueError: where the folder has none, or its coordinates count from other weights.
    """
    checkpoints = Checkpoints(
        session.folder / "checkpoints",
        settings=settings,
        space=meaning_of(session),
        sections=_MEANT,
    )
    return checkpoints.load(_fresh(session), check=lambda _, extra: _check_memory(session, extra))


def last_run(session: Session) -> Run[Any]:
    """Return the run of the newest good checkpoint, see `newest`."""
    return newest(session).run


def _fresh(session: Session) -> Run[Any]:
    recipe = session.recipe
    fresh = begin(recipe.algorithm, session.space.start(), recipe.run.seed)
    return buffered(fresh) if isinstance(recipe.run.mode, Buffered) else fresh


def _check_records(rounds: Mapping[str, list[int]], number: int, lines: Mapping[str, int]) -> None:
    # A round is saved before it is told of; only the model before training is told of first.
    last = max(number - 1, 0)
    for name, wanted in lines.items():
        there = sum(n <= last for n in rounds[name])
        if there != wanted:
            raise DamagedFile(
                f"{name} holds {there} of the {wanted} lines up to round {last}"
                if there < wanted
                else f"{name} holds {there} lines up to round {last}, where the run wrote {wanted}"
            )


def _check_memory(session: Session, extra: Mapping[str, Any]) -> None:
    try:
        session.store.check(extra.get("client_state", {}))
    except ClientError as refusal:
        raise DamagedFile(str(refusal)) from refusal
