"""User-level differential privacy around any algorithm whose server reads only the mean upload.

Learning Differentially Private Recurrent Language Models. McMahan, Ramage, Talwar, Zhang, ICLR 2018 (arXiv:1710.06963),
Algorithm 1: each client takes part with chance q, all it sends is clipped to one norm C, and noise of standard deviation z C is
added, once, to the sum, which is divided by q N.

Differentially Private Learning with Adaptive Clipping. Andrew, Thakkar, McMahan, Ramaswamy, NeurIPS 2021 (arXiv:1905.03871): `quantile`.

Covered are the models of all rounds, repeated or not; not what the server sees and writes down (uploads,
counts, bytes, failures, evaluations, samples), nor what a wrapper around `private` sends.

Deviations: privacy loss is counted by its distribution, not by moments. The cohort is drawn here,
from the secret key and with the recipe's chance: one that follows from a published seed amplifies
nothing. The server clips again, unless secure sums hide single uploads from it: then all rests on the clients' own
clip, and what it adds up is seen by it alone, without noise yet (the central model), or with shares of it that clients added
(`noise: distributed`), where no chance of being drawn is counted. The noise on the count of norms below C is
max(q N / 20, z), not q N / 20, so that it always fits into z. With `noise_on: support` uploads and noise are zero where
the download is, itself made of noisy means (until something has moved, everywhere); FLASC (arXiv:2406.05233) adds noise to
all entries, and its code also divides the sum by C.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Generic, Literal, Self

import torch

from fedloom.core.description import FILLED, Description, Mixture, RecipeView, Release, mixture_of
from fedloom.core.distributed_noise import NoiseShares
from fedloom.core.payloads import once_each
from fedloom.core.protocols import (
    Algorithm,
    ClientId,
    ClientUpdate,
    Metrics,
    Params,
    Payload,
    Reply,
    Round,
    Sees,
    State,
    Task,
)
from fedloom.core.rehearsal import play
from fedloom.core.wrapper import Enclosing, Wrapper
from fedloom.privacy.clipping import clipped, moved, within
from fedloom.privacy.mechanism import SIGNAL, Mechanism
from fedloom.privacy.terms import Terms, check_recipe, check_sums


@dataclass(frozen=True)
class PrivateState(Generic[State]):
    """The inner state, and where its noisy means stand."""

    inner: State
    mechanism: Mechanism


@dataclass(frozen=True, slots=True)
class Private(Enclosing[State]):
    """Clips on the client and again on the server; hands its inner one noisy mean."""

    server_sees: ClassVar[Sees] = "noisy mean"

    inner: Algorithm[State]
    """Trains; its server half never learns who took part."""
    clip: float
    """C: largest joint norm of an upload, and where it begins if `quantile` moves it."""
    epsilon: float | None = None
    """Budget of all rounds, from which the noise follows; or say `noise_multiplier`."""
    delta: float = 1e-5
    """Chance that epsilon does not hold; below 1 / number of clients."""
    noise_multiplier: float | None = None
    """z: standard deviation of the noise on the sum, in units of C."""
    rounds: int | None = None
    """Rounds that `epsilon` is for, or sums a client adds shares of noise to; in a recipe `run.rounds` if left out."""
    quantile: float | None = None
    """Let C follow this quantile of the clients' norms."""
    noise_on: Literal["everywhere", "support"] = "everywhere"
    """Where uploads and noise may be: everywhere, or where the download is not zero."""
    noise: Literal["central", "distributed"] = "central"
    """Who adds it: the server, or with `secure` each client a share, see `privacy.distributed_noise`; then also against the server."""
    noise_seed: int | None = None
    """For tests: a known seed gives cohorts and noise away, so it protects nobody; there is no epsilon then."""
    quiet: bool = False
    """Keep metrics, counts, sizes and samples out of the run's folder; the terminal shows them."""
    threshold: int = field(default=0, metadata=FILLED)
    """secure.threshold"""

    def __post_init__(self) -> None:
        if (reads := self.inner.server_sees) != "mean":
            raise ValueError(
                f"private needs an algorithm whose server reads the mean of uploads, got"
                f" {type(self.inner).__name__}, which reads {reads}: only a mean bounds each one's part"
            )
        _ = self.terms  # refuses what it could not keep

    @property
    def terms(self) -> Terms:
        budget = (self.epsilon, self.delta, self.noise_multiplier, self.rounds)
        return Terms(self.clip, *budget, self.quantile, self.noise, self.noise_on)

    @property
    def shares(self) -> NoiseShares | None:
        """Return what clients add of the noise."""
        return self.terms.shares(self.threshold)

    def describe(self, state: PrivateState[State] | None) -> Description:
        promise = self.terms.promise(secret=self.noise_seed is None, quiet=self.quiet)
        inner = Wrapper.describe(self, state)
        notes = [*([] if self.noise_seed is None else [promise.explanation]), *inner.notes]
        why = "epsilon is that of cohorts drawn by chance, and who answers first is not"
        return replace(inner.current_only(why), privacy=promise, bounds_updates=True, notes=notes)

    def check(self, recipe: RecipeView, *, num_clients: int | None) -> Self:
        check_recipe(recipe, quiet=self.quiet)
        rounds = self.terms.over(recipe.run.rounds)
        threshold = check_sums(self.terms, recipe)
        planned = Wrapper.check(self, recipe, num_clients=num_clients)
        same = (rounds, threshold) == (self.rounds, self.threshold)
        return planned if same else replace(planned, rounds=rounds, threshold=threshold)

    def released(self, state: PrivateState[State]) -> Iterable[Release]:
        return state.mechanism.released

    def charge(
        self, state: PrivateState[State], releases: Iterable[Release]
    ) -> PrivateState[State]:
        return replace(state, mechanism=state.mechanism.charge(releases))

    def init(self, params: Params, seed: int) -> PrivateState[State]:
        still = [name for name, t in params.items() if not bool(t.any())]
        if self.noise_on == "support" and 0 < len(still) < len(params):
            raise ValueError(
                f"private.noise_on: support would never move {still[0]}, which begins at zero:"
                " set the origin of tune to initial"
            )
        return PrivateState(self.inner.init(params, seed), self.terms.begin(self.noise_seed))

    def broadcast(self, state: PrivateState[State], round: Round) -> Mapping[ClientId, Payload]:
        drawn = replace(round, cohort=state.mechanism.cohort(round))
        sent = self.inner.broadcast(state.inner, drawn)
        if set(sent) != set(drawn.cohort):
            raise ValueError("private draws cohorts, got an algorithm below it that does so too")
        if self.quantile is None:
            return sent
        signal = {SIGNAL: {"clip": torch.tensor(state.mechanism.clip, dtype=torch.float64)}}
        return once_each(sent, lambda _: 0.0, lambda payload, _: {**payload, **signal})

    def client_update(self, task: Task, client_state: Payload) -> ClientUpdate:
        reply, new_state = yield from self.inner.client_update(task, client_state)
        clip = self.clip if self.quantile is None else float(task.download[SIGNAL]["clip"])
        upload, size = clipped(within(reply.upload, self._mask([task.download])), clip)
        if self.quantile is not None:
            upload = {**upload, SIGNAL: {"below": torch.tensor(size <= clip)}}
        return Reply(task.client, upload), new_state  # weight and metrics would tell of the data

    def deployed(self, download: Payload, client_state: Payload) -> Params:
        return self.inner.deployed(download, client_state)

    def mixture(self, download: Payload, client_state: Payload) -> Mixture:
        return mixture_of(self.inner, download, client_state)

    def server_update(
        self, state: PrivateState[State], round: Round, replies: Iterable[Reply]
    ) -> tuple[PrivateState[State], Metrics]:
        # The inner server half must not tell who took part: to it, everybody did.
        everybody = replace(round, cohort=tuple(round.population))

        def nobodys() -> Payload:
            client, payload = next(iter(self.inner.broadcast(state.inner, everybody).items()))
            task = Task("train", round.number, client, 0, round.population[client], payload)
            return play(self.inner.client_update(task, {}), task).upload

        sums = list[Reply]()

        def single() -> Iterator[Payload]:
            for reply in replies:
                if reply.count == 1:
                    yield reply.upload
                else:
                    sums.append(reply)

        sent = self.inner.broadcast(state.inner, everybody) if self.noise_on == "support" else {}
        mean, mechanism, clip_metrics = self.terms.fund(state.mechanism, round).release(
            single(),
            round,
            mask=self._mask(sent.values()),
            quantile=self.quantile,
            nobodys=nobodys,
            sums=sums,
            distributed=self.terms.distributed,
        )
        spent = self.terms.settle(mechanism, secret=self.noise_seed is None)
        noisy = [Reply("mean of the cohort", mean)]
        inner, metrics = self.inner.server_update(state.inner, everybody, noisy)
        return PrivateState(inner, mechanism), {**metrics, **clip_metrics, **spent}

    def _mask(self, downloads: Iterable[Payload]) -> Params:
        return {} if self.noise_on == "everywhere" else moved(p["params"] for p in downloads)
