"""Which words does an update reveal? Every word of the vocabulary is held against the span of what layers were given.

DAGER: Exact Gradient Inversion for Large Language Models. Petrov, Dimitrov, Baader, Müller, Vechev, NeurIPS 2024
(arXiv:2405.15586), section 4: the rows of the gradient of a first projection span what the tokens of the batch gave it, as
long as they are fewer than its width; a word is in the batch where its distance from that span is below a threshold
(equation 4).

Deviations. Only the first of DAGER's two steps is made, the words; their order, which it finds layer by layer, is not. An
update is tested as the server decodes it, of any steps, optimizer, precision or sum, and so each singular direction counts
s^2 / (s^2 + floor^2), which is a projection where nothing but rounding disturbs it: the floor is what rounding leaves, or,
where the update has full rank, its median singular value. Projections of one layer that read the same are stacked. Beside
the words found at the threshold there is the area under the ROC curve of the distances, which tells of leaks that no
threshold turns into words; it is of the words that any client of the run learns from, as words that nobody uses have
embeddings of their own kind. Chance is measured where it can be: the same area by another client's upload of the round.
"""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedloom.audit.findings import Finding
from fedloom.audit.learnt import learnt, tokens_of
from fedloom.audit.records import Case, seen
from fedloom.audit.scores import auc
from fedloom.audit.windows import Part, Window, vocabulary_of, windows
from fedloom.results.statistics import mean_of
from fedloom.rounds.received import Received


@dataclass(frozen=True)
class Seen:
    """What one upload looks like through one window."""

    received: Received
    window: Window
    distances: Tensor
    """(vocabulary,) float64 in [0, 1]; empty where nothing moved."""
    words: Tensor
    """(vocabulary,) bool: those that were learnt from."""


@dataclass(frozen=True)
class Span:
    """The attack."""

    title: str = "which words an update was learnt from, by the span of what layers were given"
    assumes: str = "a server that keeps to the protocol and reads what it gets: uploads, what it sent, recipe and base model; no data"
    of_uploads: bool = True
    threshold: float = 0.05
    """Distance from the span, of vectors of length 1, below which a word counts as found."""

    def silent(self, case: Case) -> str | None:
        """Return why no word can be held against uploads, None where some can."""
        first = next(case.uploads(), None)
        if first is None:
            return "no client answered in the rounds looked at"
        if windows(case, first.download["params"], case.delta(first)):
            return None
        return (
            f"no tensor of {case.space} multiplies what a word alone determines, such as the input of a first layer's"
            " projections in models with rotary positions"
        )

    def findings(self, case: Case) -> Iterator[Finding]:
        """Yield, for every round and window, words found, how many of those are right, and the area under the curve."""
        living = _living(case)
        for number in case.rounds:
            uploads = list(case.uploads([number]))
            groups = [(seen(one), [one]) for one in uploads if len(one.clients) > 1]
            groups += [("upload", [one for one in uploads if len(one.clients) == 1])]
            if case.client is None:
                groups += [("model", [x for x in case.releases() if x.round == number])]
            for what, received in groups:
                yield from self._of(case, what, received, living)

    def _of(
        self, case: Case, what: str, received: Sequence[Received], living: Tensor
    ) -> Iterator[Finding]:
        looked: dict[str, list[Seen]] = {}
        for one in received:
            words = torch.zeros(len(living), dtype=torch.bool)
            words[tokens_of(learnt(case, one))] = True
            for window in windows(case, one.download["params"], case.delta(one)):
                still = window.is_still
                far = torch.zeros(0) if still else distances(window)
                looked.setdefault(window.through, []).append(Seen(one, window, far, words))
        for through, every in looked.items():
            yield from self._measured(case, what, through, every, living)

    def _measured(
        self, case: Case, what: str, through: str, every: Sequence[Seen], living: Tensor
    ) -> Iterator[Finding]:
        number = every[0].received.round
        moved = [one for one in every if len(one.distances)]

        def finding(measure: str, values: Sequence[float], chance: float, says: str) -> Finding:
            return Finding(
                "span",
                case.space,
                case.link,
                what,
                f"{measure} through {through}",
                statistics.fmean(values),
                chance,
                says,
                case.client,
                number,
                _interval(values),
            )

        about = f"round {number}, {what}" + (f" of {case.client}" if case.client else "")
        if not moved:
            says = f"{about}: nothing through {through}, which did not move at all"
            yield finding("words found", [0.0], 0.0, says)
            return
        hits = [found(one.window, one.distances, one.words, self.threshold) for one in moved]
        recall, precision = ([hit[at] for hit in hits] for at in (0, 1))
        says = f"{about}: {statistics.fmean(recall):.0%} of a batch's words are found through {through}"
        yield finding("words found", recall, 0.0, says)
        if any(recall):
            right = [p for p, r in zip(precision, recall, strict=True) if r]
            says = f"{about}: {statistics.fmean(right):.0%} of what is found so is right"
            share = statistics.fmean(float(one.words.float().mean()) for one in moved)
            yield finding("found words that are right", right, share, says)
        areas = [area(one.distances, one.words, living) for one in moved]
        if any(one is None for one in areas):
            return
        others = [*moved[1:], moved[0]]
        blind = [
            area(one.distances, other.words, living) or 0.5
            for one, other in zip(moved, others, strict=True)
        ]
        chance = statistics.fmean(blind) if len(moved) > 1 else 0.5
        own = [one for one in areas if one is not None]
        says = (
            f"{about}: a word that was learnt from is nearer than one that was not in {statistics.fmean(own):.0%} of pairs"
            f" ({chance:.0%} {'by the upload of another' if len(moved) > 1 else 'by chance'})"
        )
        yield finding("AUC", own, chance, says)


@torch.no_grad()
def distances(window: Window) -> Tensor:
    """Return how far each word is from what a window shows, (vocabulary,) float64 in [0, 1]."""
    if window.moved is not None:
        return _of_rows(window.moved.double())
    squares = [_squares(part) for part in window.parts if bool(part.rows.any())]
    far: Tensor = torch.stack(squares).mean(0).sqrt()
    return far


def _of_rows(moved: Tensor) -> Tensor:
    """Return how usual each word's own move is, (vocabulary,) in [0, 1]: 0 where few words moved, and this one did."""
    if int((moved > 0).sum()) < len(moved) / 2:
        return (moved == 0).double()
    # Under Adam rows of words that were there go less far, under SGD farther.
    unusual: Tensor = (moved.clamp_min(1e-30) / moved.median().clamp_min(1e-30)).log().abs()
    return 1 / (1 + unusual)


def _squares(part: Part) -> Tensor:
    """Return the squared distance of each word from the span of a part's rows, (vocabulary,) float64."""
    # What no row kept, as links that leave entries out do, says nothing.
    kept = part.rows.any(0)
    rows, words = part.rows[:, kept].double(), unit(part.words[:, kept].double())
    _, s, directions = torch.linalg.svd(rows, full_matrices=False)
    full = torch.zeros(rows.shape[1], dtype=s.dtype)
    full[: len(s)] = s
    floor = max(float(full.median()), part.floor, float(s[0]) * 1e-12)
    counts = s.square() / (s.square() + floor**2)
    inside: Tensor = (words @ directions.T).square() @ counts
    return (1 - inside).clamp_min(0)


def unit(vectors: Tensor) -> Tensor:
    """Return vectors of length 1 in the place of others; 0 stays."""
    shorter: Tensor = vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    return shorter


def found(window: Window, far: Tensor, words: Tensor, threshold: float) -> tuple[float, float]:
    """Return the share of the right words that are found, and the share of what is found that is right.

    Words that are found and that the layer cannot tell apart, nearer to one another than twice the threshold, are one
    finding: it is right where one of them is.
    """
    chosen = (far < threshold).nonzero().flatten()
    recall = float((words[chosen]).sum()) / max(1, int(words.sum()))
    if not len(chosen):
        return 0.0, 0.0
    if window.moved is not None:
        return recall, float(words[chosen].double().mean())
    label = torch.arange(len(chosen))
    alike = torch.ones(len(chosen), len(chosen), dtype=torch.bool)
    for part in window.parts:
        own = unit(part.words[chosen].double())
        alike &= torch.cdist(own, own) < 2 * threshold
    for _ in range(len(chosen)):
        joined = torch.where(alike, label[None], len(chosen)).amin(1)
        if torch.equal(joined, label):
            break
        label = joined
    right = {int(group) for group in label[words[chosen]]}
    # Right words that are alike are as many findings as they are.
    count = int(words[chosen].sum())
    wrong = len({int(group) for group in label} - right)
    return recall, count / (count + wrong)


def area(far: Tensor, words: Tensor, living: Tensor) -> float | None:
    """Return the area under the curve of distances, of the words that anybody uses; None where all of them are right."""
    others = living & ~words
    if not bool(others.any()) or not bool(words.any()):
        return None
    return auc(-far[words], -far[others])


def _interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return where the mean share over clients lies; None of one client."""
    found = mean_of(values)
    if found.low is None or found.high is None:
        return None
    return max(0.0, found.low), min(1.0, found.high)


def _living(case: Case) -> Tensor:
    """Return which words any client learns from, (vocabulary,) bool."""
    living = torch.zeros(vocabulary_of(case), dtype=torch.bool)
    for shard in case.session.federation.shards.values():
        living[tokens_of(shard.train)] = True
    return living
