"""Canary users in a whole run: the recipe is trained anew with them, and who was in is guessed from the model.

The Secret Sharer. Carlini, Liu, Erlingsson, Kos, Song, USENIX Security 2019 (arXiv:1802.08232): canaries are random strings,
and exposure is log2 of how many random strings there are less log2 of a canary's rank among them by loss. Understanding
Unintended Memorization in Federated Learning. Thakkar, Ramaswamy, Mathews, Beaufays 2020 (arXiv:2006.07490): whole users
hold them. Privacy Auditing with One (1) Training Run. Steinke, Nasr, Jagielski, NeurIPS 2023
(arXiv:2305.08846): each is in or out by a coin, and guesses at the coins bound epsilon of one client more or less from below.

A canary is a client that has one random string of tokens, as often as the median client has rows, so that it counts as much
as others do. It is guessed by how much less its string surprises the last model than the model before training.

Deviations: a rank is among `REFERENCES` strings that were drawn and not among all there could be, so that exposure ends at
log2 of their number plus one; how many canaries are in is taken as known, since means are divided by how many clients there are.
"""

import math
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fedloom.audit.bounds import best_guesses, promised
from fedloom.audit.findings import Finding
from fedloom.audit.membership import row_losses
from fedloom.audit.records import Case
from fedloom.audit.scores import separation
from fedloom.core.description import Accounts, describe
from fedloom.core.emulation import Aligns
from fedloom.core.protocols import ClientId
from fedloom.core.randomness import generator
from fedloom.data.federation import Federation, Shard
from fedloom.data.manifest import ClientCounts
from fedloom.data.tokens import IGNORED, Example
from fedloom.privacy.accountant import Ledger
from fedloom.rounds.inputs import located
from fedloom.rounds.loop import Run, advance, begin
from fedloom.rounds.session import Makers, Session, build
from fedloom.server.buffering import Buffered
from fedloom.server.samplers import Fixed
from fedloom.tracking.metric_format import duration
from fedloom.tracking.metrics_log import MetricsLog

REFERENCES = 1023
"""Random strings that no client has, among which canaries are ranked."""
CHANCE = 1 / math.log(2)
"""Bits of exposure of a string that nobody learnt: about the mean of -log2 of a uniform rank."""


@dataclass(frozen=True, slots=True)
class Canaries:
    """Trains the recipe anew with canary clients and guesses who was in."""

    title: str = "which canary clients took part"
    assumes: str = (
        "whoever attacks sees the last model, and knows what each canary would have learnt; the recipe is trained anew with"
        " them beside its own clients, and nothing of that is kept"
    )
    of_uploads: bool = False
    canaries: int = 40
    """How many, half of them in by chance."""
    length: int = 16
    """Tokens of a string; fewer where the recipe cuts rows before that."""

    def silent(self, case: Case) -> str | None:
        recipe = case.recipe
        if recipe.objective.classes or any(
            row.good is not None or row.rejected is not None
            for shard in case.session.federation.shards.values()
            for row in shard.train[:1]
        ):
            return "its objective does not learn strings token by token"
        if isinstance(recipe.run.mode, Buffered):
            return "its rounds wait for nobody, and canaries are trained in rounds that do"
        if isinstance(recipe.algorithm, Aligns):
            return "its server trains an emulator between rounds, which training anew would have to repeat"
        if isinstance(recipe.cohort, Fixed):
            return "cohort.fixed names who takes part, so that no canary is ever drawn"
        if recipe.objects.keys() & {"model", "trainer"}:
            return "its model or trainer was given from Python, and training anew needs them"
        return None

    def cost(self, case: Case) -> str:
        """Return what training anew takes, in words."""
        file, table = case.session.folder / "metrics.jsonl", case.recipe.evaluation.table
        took = MetricsLog.read(file, table).total("time/train_seconds")
        before, more = len(case.session.learners), self.canaries / 2
        cohort = case.recipe.cohort
        size, larger = (n * cohort.rate(n) for n in (before, before + round(more)))
        rounds = case.recipe.run.rounds
        share = rounds / max(case.run.number, 1) * larger / size
        said = "1 round is" if rounds == 1 else f"{rounds} rounds are"
        return (
            f"{said} trained anew with about {more:.0f} clients more, so that {larger:.0f} train in a round: up to"
            f" {duration(took * share)}, as the run's own {case.run.number} took {duration(took)}"
        )

    def findings(self, case: Case) -> Iterator[Finding]:
        tossed = torch.rand(self.canaries, generator=generator(case.seed, "canary coins"))
        coins = [bool(coin) for coin in tossed < 0.5]
        drawn = strings(case.session, self.canaries + REFERENCES, self.length, case.seed)
        own, references = drawn[: self.canaries], drawn[self.canaries :]
        with tempfile.TemporaryDirectory(prefix="fedloom-canaries-") as folder:
            session = _session(case, with_canaries(case.session, own, coins), Path(folder))
            run = _trained(session)
            start = row_losses(session, session.space.start(), own)
            model = session.newcomer(run)
            after, others = row_losses(session, model, own), row_losses(session, model, references)
        scores = [first - last for first, last in zip(start, after, strict=True)]
        yield self._epsilon(case, run, scores, coins)
        yield from self._told(case, scores, coins, after, others)

    def _epsilon(
        self, case: Case, run: Run[object], scores: Sequence[float], coins: Sequence[bool]
    ) -> Finding:
        algorithm = case.recipe.algorithm
        privacy = describe(algorithm).privacy
        delta = (privacy.delta if privacy else None) or 0.0
        found = best_guesses(scores, coins, delta=delta)
        beside = "nothing is promised, as the recipe has no algorithm private"
        if privacy is not None and isinstance(algorithm, Accounts):
            released = algorithm.released(run.state)
            assert released is not None
            beside = promised(Ledger.of(released).epsilon(delta), found)
        says = f"{found.text()}; {beside}"
        return _finding(case, "epsilon proved", found.epsilon_low, 0.0, says)

    def _told(
        self,
        case: Case,
        scores: Sequence[float],
        coins: Sequence[bool],
        losses: Sequence[float],
        references: Sequence[float],
    ) -> Iterator[Finding]:
        inside = [s for s, coin in zip(scores, coins, strict=True) if coin]
        outside = [s for s, coin in zip(scores, coins, strict=True) if not coin]
        if inside and outside:
            apart = separation(inside, outside, seed=case.seed).auc
            says = f"{len(inside)} canaries that were in stand apart from {len(outside)} that were not by {apart.text()}"
            yield _finding(case, "AUC of canaries", apart.value, 0.5, says, (apart.low, apart.high))
        found = [
            exposure(loss, references) for loss, coin in zip(losses, coins, strict=True) if coin
        ]
        if found:
            bits = statistics.fmean(found)
            says = (
                f"canaries that were in are exposed by {bits:.1f} bits in the mean and {max(found):.1f} at most, of"
                f" {math.log2(len(references) + 1):.0f} that {len(references)} other strings can show"
            )
            yield _finding(case, "exposure, bits", bits, CHANCE, says)


def exposure(loss: float, references: Sequence[float]) -> float:
    """Return log2 of how many strings there are less log2 of the rank of this loss among them, the lowest first."""
    rank = 1 + sum(other < loss for other in references)
    return math.log2(len(references) + 1) - math.log2(rank)


def strings(session: Session, count: int, length: int, seed: int) -> list[Example]:
    """Return random strings of tokens that the clients' answers hold, every token but the first of them learnt."""
    rows = [row for shard in session.federation.shards.values() for row in shard.train]
    known = torch.unique(torch.cat([row.labels[row.labels != IGNORED] for row in rows]))
    size = min(length, session.recipe.data.max_length)
    places = torch.randint(len(known), (count, size), generator=generator(seed, "strings"))
    return [_string(ids) for ids in known[places]]


def with_canaries(session: Session, own: Sequence[Example], coins: Sequence[bool]) -> Federation:
    """Return a run's data with a client more for every canary that is in, each known by what is known of another client."""
    federation, donors = session.federation, sorted(session.learners)
    copies = round(statistics.median(session.counts[client].rows for client in donors))
    shards, profiles = dict(federation.shards), dict(federation.profiles)
    counts = dict(federation.manifest.clients)
    for at, (string, is_in) in enumerate(zip(own, coins, strict=True)):
        if is_in:
            name = _free(f"canary-{at:03}", federation)
            shards[name] = Shard([string] * copies, (), ())
            profiles[name] = federation.profiles[donors[at % len(donors)]]
            tokens, targets = copies * len(string.ids), copies * string.num_targets
            counts[name] = ClientCounts(copies, 0, 0, copies, tokens, targets, {})
    manifest = replace(
        federation.manifest,
        clients=dict(sorted(counts.items())),
        profiles=dict(sorted(profiles.items())),
    )
    return Federation(dict(sorted(shards.items())), dict(sorted(profiles.items())), manifest)


def _free(name: ClientId, federation: Federation) -> ClientId:
    while name in federation.profiles:
        name += "+"
    return name


def _string(ids: torch.Tensor) -> Example:
    labels = ids.clone()
    labels[0] = IGNORED
    return Example(ids, labels, 1)


def _session(case: Case, federation: Federation, folder: Path) -> Session:
    """Return the run's recipe, built anew on this data."""
    recipe = case.recipe
    model, _ = located(recipe.model, recipe.data, case.session.folder)
    data = replace(recipe.data, left_out=())
    anew = replace(recipe, model=model, data=data, audit="off")
    return build(anew, folder, makers=Makers(federation=lambda *_: federation))


def _trained(session: Session) -> Run[object]:
    """Return the run after its last round."""
    recipe, settings = session.recipe, session.recipe.run
    run: Run[object] = begin(recipe.algorithm, session.space.start(), settings.seed)
    while run.number < settings.rounds:
        run, _, _ = advance(
            run,
            recipe.algorithm,
            session.engine,
            population=session.learners,
            sampler=session.sampler,
            min_replies=settings.min_replies,
            max_update_norm=settings.max_update_norm,
            metrics=recipe.evaluation.table,
        )
        session.store.flush()
    return run


def _finding(
    case: Case,
    measure: str,
    value: float,
    chance: float,
    says: str,
    interval: tuple[float, float] | None = None,
) -> Finding:
    return Finding(
        "canary",
        case.space,
        case.link,
        "last model",
        measure,
        value,
        chance,
        says,
        None,
        None,
        interval,
    )
