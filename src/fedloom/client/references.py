"""What the reference model makes of the answers that an objective compares: computed once a client, kept in memory.

The reference is the model without what is tuned, or where a round began. Its log-likelihoods are carried by the examples
themselves, so that losses, lanes, zeroth-order looks and evaluation need to know nothing of where they come from.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedloom.core.protocols import Params
from fedloom.data.tokens import Example
from fedloom.evaluation.scoring import batched, batches, evaluating
from fedloom.objectives.batch import Batch
from fedloom.objectives.forward import Forward
from fedloom.objectives.objective import Objective
from fedloom.objectives.preference import AnswerBatch, Comparing
from fedloom.spaces.live import Space


@dataclass(frozen=True)
class References:
    """Log-likelihoods of answers under the reference model, by what the answers hold."""

    space: Space
    objective: Objective
    forward: Forward
    """The way through the model: the one that its own answers take."""
    _known: dict[bytes, Tensor] = field(default_factory=dict)
    _batches: dict[bytes, tuple[bytes, Sequence[Tensor]]] = field(default_factory=dict)
    """By the key of a batch's first example: a hash of all that it holds, and the log-likelihoods of its answers."""

    @classmethod
    def of(
        cls, space: Space, objective: Objective, forward: Forward | None = None
    ) -> "References | None":
        """Return the references that an objective needs; None where it compares with nothing."""
        if not isinstance(objective, Comparing):
            return None
        return cls(space, objective, forward or Forward.of(space.model))

    def carried(
        self, examples: Sequence[Example], *, download: Params | None = None
    ) -> list[Example]:
        """Return the examples with what the reference model makes of them.

        Args:
            examples: One client's.
            download: Where a client's round begins; None in evaluation, which compares with the start.
        """
        known, at = self._known, self.space.start
        if download is not None and self._follows:
            known, at = {}, lambda: download
        missing = {
            example.key: example
            for example in examples
            if not all(_key(row) in known for row in example.sequences)
        }
        if missing:
            self._measure_(known, list(missing.values()), at())
        return [_carrying(example, known) for example in examples]

    def together(self, examples: Sequence[Example], size: int) -> list[Example]:
        """Return the examples with what the reference model makes of them in the batches in which they are measured.

        A model that is equal to it then has rewards of exactly 0: the last bits follow from what shares a batch.

        Args:
            examples: That a score is asked of next.
            size: The most of them that go through the model at once.
        """
        found = list(examples)
        for chosen in batches([example.num_tokens for example in examples], size, self.forward):
            rows = [examples[at] for at in chosen]
            carrying = iter(self._asked_together(rows))
            for at, example in zip(chosen, rows, strict=True):
                found[at] = _placed(example, carrying)
        return found

    def _asked_together(self, examples: Sequence[Example]) -> Sequence[Tensor]:
        """Return the log-likelihoods (targets,) of the sequences of a batch, example by example."""
        keys = [_key(row) for example in examples for row in example.sequences]
        first, held = examples[0].key, hashlib.sha256(b"".join(keys)).digest()
        if first not in self._batches or self._batches[first][0] != held:
            like = next(self.space.model.parameters())
            with self.space.standing_at(self.space.start()), evaluating(self.space.model):
                batch = self.objective.batch([list(examples)], [1], like, pack=False)
                self._batches[first] = held, self._in_order(batch, examples)
        return self._batches[first][1]

    def _in_order(self, batch: Batch, examples: Sequence[Example]) -> list[Tensor]:
        assert isinstance(batch, AnswerBatch)
        answers = iter(batch.token_log_probs(self.forward))
        others = iter(batch.mismatched.token_log_probs(self.forward) if batch.mismatched else ())
        found = []
        for example in examples:
            found += [next(answers).cpu() for _ in example.answers]
            found += [next(others).cpu() for row in example.answers if row.mismatched is not None]
        return found

    @property
    def _follows(self) -> bool:
        return isinstance(self.objective, Comparing) and self.objective.reference == "download"

    def _measure_(self, known: dict[bytes, Tensor], examples: list[Example], at: Params) -> None:
        """Add the log-likelihoods (targets,) of each sequence where the model stands at params."""
        with self.space.standing_at(at), evaluating(self.space.model):
            # One at a time: the last bits follow from what shares a batch, and a resumed run asks for others at once.
            for _, batch in batched(examples, 1, self.objective, self.forward):
                assert isinstance(batch, AnswerBatch)
                for rows in filter(None, (batch, batch.mismatched)):
                    tokens = rows.token_log_probs(self.forward)
                    for row, each in zip(rows.answers, tokens, strict=True):
                        known[_key(row)] = each.cpu()


def _key(row: Example) -> bytes:
    held = torch.cat([row.ids, row.labels]).numpy().tobytes()
    return hashlib.sha256(held).digest()


def _placed(example: Example, found: Iterator[Tensor]) -> Example:
    """Return an example whose sequences carry the next log-likelihoods, in their order."""
    answers = [replace(row, reference=next(found)) for row in example.answers]
    rows = [
        row
        if row.mismatched is None
        else replace(row, mismatched=replace(row.mismatched, reference=next(found)))
        for row in answers
    ]
    return rows[0] if len(rows) == 1 else replace(rows[0], rejected=rows[1])


def _carrying(example: Example, known: dict[bytes, Tensor]) -> Example:
    return replace(
        example,
        reference=known[_key(example)],
        rejected=None if example.rejected is None else _carrying(example.rejected, known),
        mismatched=None if example.mismatched is None else _carrying(example.mismatched, known),
    )
