"""Whether a command finds what its run was begun with; where it does not, a refusal, or a note that it went on anyway."""

import json
from collections.abc import Sequence

from fedloom.core.files import write_atomic
from fedloom.data.manifest import ClientCounts
from fedloom.models.identity import commit
from fedloom.rounds.inputs import FILE, Difference, Inputs, named_path, now
from fedloom.rounds.reading import read_manifest
from fedloom.rounds.session import Session
from fedloom.spaces.handshake import differing, short

_AROUND = {"data", "public", "tokenizer", "template", "config"}
"""What may differ at a user's own risk in any space."""
_BENEATH = {"base", "start", "quantize", "bitsandbytes", "packed"}
"""Beneath an adapter too; a coordinate that counts from other weights is another model."""


def identity_of(session: Session) -> dict[str, str]:
    """Return the hashes of all that a run is bound to; without the split where its data is at sites."""
    # Each site has a split of its own, and tells nobody.
    split = {} if session.recipe.elsewhere else {"data": session.federation.manifest.sha256}
    return {**split, **session.identity()}


def meaning_of(session: Session) -> dict[str, str]:
    """Return what gives the run's coordinates their meaning, without which they must never be read."""
    return {k: v for k, v in session.space.identity().items() if k not in _allowed(session)}


def compare(session: Session, *, anyway: bool, public: str | None = None) -> tuple[Difference, ...]:
    """Return in what the session differs from what its run was begun with.

    Args:
        session: Its data or its manifest, its model and its tokenizer are compared.
        anyway: Whether a difference that leaves the run's coordinates their meaning is accepted.
        public: Hash of the server's own text; None where it is not read, and so not compared.

    Raises:
        ValueError: saying what differs, since when, and the remedy.
    """
    folder = session.folder
    known = Inputs.read(folder)
    if known is None:
        if anyway:
            return (Difference(FILE, "there", "lost"),)
        raise ValueError(
            f"{folder / FILE} is gone, which says what data and which model this run was begun with: put it"
            " back, or take what is there now with --anyway"
        )
    found, before = _identity(session, public), known.identity
    if public is None:
        before = {key: value for key, value in before.items() if key != "public"}
    keys = differing(found, before)
    differences = [Difference(key, short(before.get(key)), short(found.get(key))) for key in keys]
    bound = [key for key in keys if key not in _allowed(session)]
    if keys and (bound or not anyway):
        text = "; ".join(map(str, differences))
        raise ValueError(
            f"what the run in {folder} was begun with on {_day(known.since)} has changed: {text}:"
            f" {_remedy(known, keys, bound)}"
        )
    return tuple(differences)


def bind(session: Session, *, public: str | None = None, source: str = "") -> None:
    """Write down what the run goes on with from here.

    Args:
        session: Its data, its model and its tokenizer.
        public: Hash of the server's own text, if it has any.
        source: As the recipe names that.
    """
    recipe, known = session.recipe, Inputs.read(session.folder)
    found = _identity(session, public)
    before = Inputs(now(), found) if known is None else known
    inputs = Inputs(
        before.since if found == before.identity else now(),
        found,
        # What was found where the run began is meant by the same name wherever a command is started.
        model=named_path(recipe.model.name) or before.model,
        data=named_path(recipe.data.source) or before.data,
        public=named_path(source) or before.public if source else None,
        commit=commit(session.base),
    )
    text = json.dumps(inputs.to_json(), indent=2, ensure_ascii=False)
    write_atomic(session.folder / FILE, (text + "\n").encode())


def changed_sites(session: Session) -> tuple[Difference, ...]:
    """Return which sites hold other numbers of examples than when they were last met; a site's data is its own."""
    if not session.recipe.elsewhere or not (session.folder / "manifest.json").exists():
        return ()
    before = read_manifest(session.folder, elsewhere=True).clients
    return tuple(
        Difference(f"examples of {client}", _text(before[client]), _text(counts))
        for client, counts in session.counts.items()
        if client in before and before[client] != counts
    )


def _identity(session: Session, public: str | None) -> dict[str, str]:
    found = identity_of(session)
    return found if public is None else {**found, "public": public}


def _text(counts: ClientCounts) -> str:
    return f"{counts.train}/{counts.validation}/{counts.test}"


def _allowed(session: Session) -> set[str]:
    return _AROUND | _BENEATH if session.recipe.tune.is_adapter else _AROUND


def _remedy(known: Inputs, keys: Sequence[str], bound: Sequence[str]) -> str:
    back = "put it back"
    if known.commit and set(keys) - {"data", "public"}:
        back += f" (model.revision={known.commit})"
    if bound:
        return f"{back}, or begin a new run; what was learnt counts from those weights, so --anyway does not help"
    return f"{back}, begin a new run, or take what is there now with --anyway"


def _day(date: str) -> str:
    return date[:16].replace("T", " ")
