"""Membership inference from what the server received: was this row among those that a client learns from?

Four scores of a candidate row, each larger for rows that were learnt from:

- loss: how small it is at the client's model, the download plus its upload. Yeom, Giacomelli, Fredrikson, Jha, CSF 2018
  (arXiv:1709.01604).
- loss drop: how much smaller it is than at the download; loss ratio: how many times. Both compare with a model that the
  client had not moved, as Watson, Guo, Cormode, Sablayrolles, ICLR 2022 (arXiv:2111.08440) do.
- gradient cosine: how well the row's own descent direction at the download agrees with the upload. Li, Li, Ribeiro,
  Effective Passive Membership Inference Attacks in Federated Learning Against Overparameterized Models, ICLR 2023
  (earlier as arXiv:2111.00430).

Losses are means over a row's target tokens, since answers differ in length. Members are a client's training rows, whether
the round's batches held them or not. The others are its held-out rows, so that both groups come from one distribution; rows
that any client learns, and repeats, are left out of them. Scores of several clients are compared after each client's median
is taken off, since their data differ and whoever attacks one sees all of its candidates.

Deviation: the papers' thresholds come from shadow models; here areas and rates are over all thresholds, which is at least
what any of them finds.
"""

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from fedloom.audit.blind import blind_scores
from fedloom.audit.findings import Finding
from fedloom.audit.records import Case, seen
from fedloom.audit.scores import FALSE_POSITIVES, Interval, Separation, separation
from fedloom.core.params import add, zeros_like
from fedloom.core.protocols import Params
from fedloom.core.randomness import derive, generator
from fedloom.data.tokens import Example
from fedloom.objectives.forward import Forward
from fedloom.rounds.received import Received
from fedloom.rounds.session import Session
from fedloom.spaces.live import Live

SCORES = ("loss", "loss drop", "loss ratio", "gradient cosine")
SHIFT = 0.06
"""How far above one half a blind baseline's area may be before it says that the groups differ."""


@dataclass(frozen=True, slots=True)
class Membership:
    """Tells training rows from held-out rows of the same client."""

    title: str = "which rows were learnt from"
    assumes: str = (
        "whoever attacks has candidate rows, half of which the client learns from, the model it was sent and what it sent"
        " back, or of the model alone, how it moved"
    )
    of_uploads: bool = True
    most: int = 200
    """Candidates of each group and round; fewer where clients hold fewer rows."""

    def silent(self, case: Case) -> str | None:
        shards = case.session.federation.shards.values()
        if any(row.record is None for shard in shards for row in shard.train[:1]):
            return "training rows are packed, so that no candidate is one of them"
        received = next(case.uploads(), None)
        if received is None:
            return "no upload was kept"
        if received.download.get("params", {}).keys() != case.session.space.start().keys():
            return "clients are not sent a whole model that their upload moves"
        if not any(_candidates(case, [received], self.most)):
            return "the clients hold no held-out rows that nobody learns, which members could be told from"
        return None

    def findings(self, case: Case) -> Iterator[Finding]:
        number = case.rounds[-1]
        received = list(case.uploads([number]))
        yield from self._of(case, received, seen(received[0]))
        released = [one for one in case.releases() if one.round == number]
        yield from self._of(case, released, "model")
        yield self._blind(case, received)

    def _of(self, case: Case, received: Sequence[Received], view: str) -> Iterator[Finding]:
        """Yield what the scores find of a round in what was received, or in how the model moved."""
        members, others = dict[str, list[float]](), dict[str, list[float]]()
        for one, learnt, held_out in _candidates(case, received, self.most):
            scored = record_scores(
                case.session, one.download["params"], case.delta(one), [*learnt, *held_out]
            )
            for name, values in scored.items():
                middle = statistics.median(values)
                centred = [value - middle for value in values]
                members.setdefault(name, []).extend(centred[: len(learnt)])
                others.setdefault(name, []).extend(centred[len(learnt) :])
        client = case.client if view == "upload" else None
        for name in members:
            apart = separation(members[name], others[name], seed=derive(case.seed, view, name))
            for measure, found, chance, says in _told(name, apart):
                yield Finding(
                    "membership",
                    case.space,
                    case.link,
                    view,
                    measure,
                    found.value,
                    chance,
                    f"{name}, {view} of round {received[0].round}: {says}",
                    client,
                    received[0].round,
                    (found.low, found.high),
                )

    def _blind(self, case: Case, received: Sequence[Received]) -> Finding:
        """Return what can be told of the same candidates without a model."""
        groups = list(_candidates(case, received, self.most))
        members = [row for _, learnt, _ in groups for row in learnt]
        others = [row for _, _, held_out in groups for row in held_out]
        scores = blind_scores(members, others, seed=case.seed)
        found = separation(*scores, seed=case.seed).auc
        says = (
            "tokens alone tell rows learnt from and others apart, so that all numbers on membership measure a shift of"
            " distribution and not membership"
            if shifted(found)
            else "tokens alone do not tell rows learnt from and others apart, so that it is the model that does"
        )
        return Finding(
            "membership",
            case.space,
            case.link,
            "rows alone",
            "AUC of a blind baseline",
            found.value,
            0.5,
            says,
            case.client,
            received[0].round,
            (found.low, found.high),
        )


def shifted(blind: Interval) -> bool:
    """Return whether the area of a blind baseline says that the groups are from different distributions.

    Below one half says nothing: of rows that are dealt out without replacement, what one group has the other lacks.
    """
    return blind.value > 0.5 + SHIFT and blind.low > 0.5


def record_scores(
    session: Session, before: Params, delta: Params, rows: Sequence[Example]
) -> Mapping[str, list[float]]:
    """Return the scores of rows by name, see the head of this module; no cosines where weights are not moved themselves.

    Args:
        session: Of the run.
        before: What the client was sent.
        delta: What it sent back, as a move of `before`; tensors that it lacks stay.
        rows: The candidates.
    """
    moved = {**zeros_like(before), **delta}
    old, new = (row_losses(session, at, rows) for at in (before, add(before, moved)))
    pairs = list(zip(old, new, strict=True))
    found = {
        "loss": [-after for after in new],
        "loss drop": [first - after for first, after in pairs],
        "loss ratio": [first / max(after, 1e-12) for first, after in pairs],
    }
    if isinstance(session.space, Live) and session.evaluator.references is None:
        found["gradient cosine"] = list(_cosines(session, session.space, before, moved, rows))
    return found


def row_losses(session: Session, params: Params, rows: Sequence[Example]) -> list[float]:
    """Return the mean loss of each row's target tokens at a point in the space, nats."""
    with session.space.standing_at(params):
        sums = session.evaluator.losses(session.space.model, rows)
    return [total / max(row.num_targets, 1) for total, row in zip(sums, rows, strict=True)]


def _cosines(
    session: Session, space: Live, before: Params, delta: Params, rows: Sequence[Example]
) -> Iterator[float]:
    """Yield the cosine between each row's descent direction and the move, 0 where a gradient is."""
    objective, move = session.recipe.objective, space.vector(delta)
    gradient = space.gradient_vector()
    try:
        with space.standing_at(before), torch.enable_grad():
            space.model.eval()
            forward = Forward.of(space.model)
            for row in rows:
                gradient.zero_()
                batch = objective.batch([[row]], [objective.count([row])], space.values, pack=False)
                torch.autograd.backward(objective.losses(forward, batch).sum())
                yield -float(torch.nn.functional.cosine_similarity(gradient, move, dim=0))
    finally:
        space.drop_gradients()


def _candidates(
    case: Case, received: Iterable[Received], most: int
) -> Iterator[tuple[Received, list[Example], list[Example]]]:
    """Yield for each upload as many rows that its clients learn as rows that nobody learns, drawn from the case's seed."""
    shards = case.session.federation.shards
    learnt = {row.key for shard in shards.values() for row in shard.train}
    uploads = list(received)
    each = -(-most // max(len(uploads), 1))
    for one in uploads:
        held = [shards[client] for client in one.clients]
        members = _distinct(row for shard in held for row in shard.train)
        others = _distinct(row for shard in held for row in (*shard.validation, *shard.test))
        others = [row for row in others if row.key not in learnt]
        size = min(each, len(members), len(others))
        if size:
            seed = derive(case.seed, "candidates", one.round, *one.clients)
            yield one, _drawn(members, size, seed), _drawn(others, size, seed)


def _distinct(rows: Iterable[Example]) -> list[Example]:
    return list({row.key: row for row in rows if row.num_targets}.values())


def _drawn(rows: Sequence[Example], size: int, seed: int) -> list[Example]:
    order = torch.randperm(len(rows), generator=generator(seed, "rows"))
    return [rows[i] for i in order[:size].tolist()]


def _told(name: str, apart: Separation) -> Iterator[tuple[str, Interval, float, str]]:
    """Yield measure, value, what chance would give, and the finding in words."""
    learnt, held_out = (
        f"{apart.num_first} rows learnt from",
        f"{apart.num_second} that nobody learns",
    )
    says = f"{learnt} stand apart from {held_out} by {apart.auc.text()}, where 0.5 is chance"
    yield f"AUC of {name}", apart.auc, 0.5, says
    wrong = int(apart.num_second * FALSE_POSITIVES)
    found = apart.true_positives
    says = (
        f"{found.value:.1%} of {learnt} are found, where {wrong} of {held_out} may be named wrongly"
    )
    yield f"true positives of {name} at 1 % false", found, FALSE_POSITIVES, says
