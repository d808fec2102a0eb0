"""A client's text from its update: words and their order, so that their gradient is what was seen (see `matching`).

Like LAMP (arXiv:2202.08827), with deviations: not embeddings are searched for but, at every place, a distribution over the
words that are nearest to the update's span (`span`), which are its prior in the place of a language model's; what is
learnt follows from the same distributions, as a language model's labels are its inputs; and pairs of places are swapped
at the end where that comes nearer, in the place of LAMP's five moves. It is given what helps it: one row of known length,
learnt at known places.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedloom.audit.findings import Finding
from fedloom.audit.learnt import learnt
from fedloom.audit.matching import cosine, matched
from fedloom.audit.records import Case
from fedloom.audit.span import distances
from fedloom.audit.windows import whole, windows
from fedloom.core.protocols import Params
from fedloom.core.randomness import generator
from fedloom.data.tokens import IGNORED, Example
from fedloom.evaluation.text_metrics import rouge
from fedloom.models.introspection import embedding
from fedloom.rounds.received import Received
from fedloom.spaces.live import Live, every

_DRAWS = 50
"""Guesses by which chance is measured."""


@dataclass(frozen=True)
class Inversion:
    """The attack."""

    title: str = "a client's text, by inputs whose gradient is the update"
    assumes: str = "the same server, which knows besides that an update is of one row, how long that is and which places are learnt"
    of_uploads: bool = True
    steps: int = 120
    """Of Adam."""
    lr: float = 0.1
    words: int = 64
    """Of which every place is one: those nearest to the span."""
    most_tokens: int = 32
    """Longer rows are not tried."""
    most_parameters: int = 20_000_000
    """Larger models are not tried: a step is three passes through the model."""

    def silent(self, case: Case) -> str | None:
        """Return why nothing is inverted; None where something is."""
        space = case.session.space
        if not isinstance(space, Live):
            return "it needs a move of tensors, and seeds are numbers along directions"
        size = sum(p.numel() for p in space.model.parameters())
        if size > self.most_parameters:
            return f"it tries models of {self.most_parameters:,} parameters at most, and this one has {size:,}"
        if self._target(case) is None:
            return (
                f"no upload of the rounds looked at came of one row of {self.most_tokens} tokens at most, through which"
                " words can be told"
            )
        return None

    def findings(self, case: Case) -> Iterator[Finding]:
        """Yield how much of the text of one upload is found."""
        target = self._target(case)
        assert target is not None
        received, example, near = target
        guess = self.invert(case, received, example, near)
        (client,), number = received.clients, received.round
        tokenizer = case.session.base.tokenizer
        asked = tokenizer.decode(example.ids.tolist(), skip_special_tokens=True)
        given = tokenizer.decode(guess.tolist(), skip_special_tokens=True)
        drawn = [self._blind(case, example, at) for at in range(_DRAWS)]
        blind = [tokenizer.decode(one.tolist(), skip_special_tokens=True) for one in drawn]
        about = f"round {number}, upload of {client}, {len(guess)} tokens"
        measures = (
            ("token F1", f1(guess, example.ids), [f1(one, example.ids) for one in drawn]),
            ("ROUGE-L", rouge(asked, given)[1], [rouge(asked, one)[1] for one in blind]),
        )
        for name, value, chances in measures:
            chance = sum(chances) / _DRAWS
            says = f"{about}: {name} {value:.2f} of the text that was learnt from ({chance:.2f} by words at random)"
            yield Finding(
                "inversion",
                case.space,
                case.link,
                "upload",
                name,
                value,
                chance,
                says,
                client,
                number,
            )

    def _target(self, case: Case) -> tuple[Received, Example, Tensor] | None:
        """Return the upload of one short row of which the span tells most words, with how far each word is from it."""
        best: tuple[Received, Example, Tensor] | None = None
        for received in case.uploads():
            if len(received.clients) > 1:
                continue
            examples = learnt(case, received)
            if len(examples) != 1 or len(examples[0].ids) > self.most_tokens:
                continue
            if examples[0].rejected is not None:
                continue
            for window in windows(case, received.download["params"], case.delta(received)):
                if not window.parts or window.is_still:
                    continue
                near = distances(window)
                if best is None or _told(near) > _told(best[2]):
                    best = received, examples[0], near
        return best

    def invert(self, case: Case, received: Received, example: Example, near: Tensor) -> Tensor:
        """Return the tokens whose gradient is nearest to an upload's, (length,) int64.

        Args:
            case: The run.
            received: The upload.
            example: Of which the length and the places that are learnt are used.
            near: (vocabulary,) how far each word is from the upload's span.
        """
        space, delta = case.session.space, case.delta(received)
        assert isinstance(space, Live)
        words = near.argsort()[: self.words]
        learnt_at = (example.labels[1:] != IGNORED).nonzero().flatten()
        source = generator(case.seed, "inversion", received.round)
        start = 0.01 * torch.randn(len(example.ids), len(words), generator=source)
        with _learning(space, received.download["params"], delta) as parameters:
            seen = [-delta[name].to(p) for name, p in parameters.items()]
            text = _Text(space.model, list(parameters.values()), words, learnt_at)
            best, _ = matched(text.gradient, seen, start, steps=self.steps, lr=self.lr)
            return words[self._swapped(text, seen, best.argmax(-1))]

    def _swapped(self, text: "_Text", seen: Sequence[Tensor], chosen: Tensor) -> Tensor:
        """Return places of words with those swapped that come nearer so, in one pass over neighbours and pairs."""
        least = text.distance(chosen, seen)
        pairs = sorted(combinations(range(len(chosen)), 2), key=lambda pair: pair[1] - pair[0])
        for a, b in pairs[: 4 * len(chosen)]:
            other = chosen.clone()
            other[[a, b]] = chosen[[b, a]]
            if chosen[a] != chosen[b] and (far := text.distance(other, seen)) < least:
                chosen, least = other, far
        return chosen

    def _blind(self, case: Case, example: Example, at: int) -> Tensor:
        """Return as many tokens of the clients' texts, drawn at random."""
        shards = case.session.federation.shards.values()
        ids = torch.cat([one.ids for shard in shards for one in shard.train])
        source = generator(case.seed, "inversion", "blind", at)
        return ids[torch.randint(len(ids), (len(example.ids),), generator=source)]


@dataclass(frozen=True)
class _Text:
    """A row of text as distributions over some words, and the gradient of learning it."""

    model: nn.Module
    parameters: Sequence[nn.Parameter]
    words: Tensor
    """(words,) int64"""
    learnt_at: Tensor
    """Places whose next word is learnt."""

    def gradient(self, logits: Tensor) -> Sequence[Tensor]:
        """Return the gradient of the loss of distributions, (length, words) logits, with a graph."""
        return self._of(logits.softmax(-1))

    def distance(self, chosen: Tensor, seen: Sequence[Tensor]) -> float:
        """Return how far the gradient of words, (length,) places in `words`, is from what was seen."""
        hard = nn.functional.one_hot(chosen, len(self.words)).float()
        return float(cosine([t.detach() for t in self._of(hard)], seen))

    def _of(self, shares: Tensor) -> Sequence[Tensor]:
        table = embedding(self.model).get_parameter("weight")
        rows = (shares.to(table) @ table[self.words])[None]
        with sdpa_kernel(SDPBackend.MATH):  # others have no second derivative
            logits = self.model(inputs_embeds=rows).logits[0, self.learnt_at]
        told = logits.float().log_softmax(-1)[:, self.words]
        loss = -(shares[self.learnt_at + 1] * told).sum() / max(1, len(self.learnt_at))
        return torch.autograd.grad(loss, self.parameters, create_graph=True)


@contextmanager
def _learning(space: Live, download: Params, delta: Params) -> Iterator[dict[str, nn.Parameter]]:
    """Yield the tensors that moved, where the model stands at a download and they learn."""
    named = every(space.model)
    chosen = {name: named[name] for name, moved in delta.items() if bool(moved.any())}
    download = whole(space, download)
    learnt_before = {name: p.requires_grad for name, p in chosen.items()}
    with space.standing_at(download):
        try:
            for p in chosen.values():
                p.requires_grad_(True)
            yield chosen
        finally:
            for name, p in chosen.items():
                p.requires_grad_(learnt_before[name])


def _told(near: Tensor) -> int:
    """Return how many words are hardly away from a span."""
    return int((near < 0.05).sum())


def f1(guess: Tensor, truth: Tensor) -> float:
    """Return the harmonic mean of precision and recall of a bag of tokens."""
    both = (Counter(guess.tolist()) & Counter(truth.tolist())).total()
    return 2 * both / (len(guess) + len(truth))
