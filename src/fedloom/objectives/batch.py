"""Rows of one or more lanes as tensors: clients side by side go through the model at once and do not mix."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fedloom.data.tokens import IGNORED, Example


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of one or more lanes, as many of each, lane by lane."""

    ids: Tensor
    """(rows, length) int64; padded on the right, where causal attention never looks."""
    positions: Tensor | None
    """(rows, length) int64, restarting in packed rows; None where no row is packed."""
    labels: Tensor
    """(rows, length) int64: the token asked for after each one, IGNORED where none is."""
    weights: Tensor
    """(lanes,) 1 / target tokens of the lane's whole step."""
    choices: Tensor | None = None
    """(choices,) int64: the tokens a target is one of; None: the whole vocabulary."""
    owners: Tensor | None = None
    """(n,) int64: of each token asked for, which of the examples asks, lane by lane; None where nobody needs to know."""
    by_example: Tensor | None = None
    """(rows, length) what the loss at each place is multiplied by, its example's; None: 1."""

    def inputs(self) -> dict[str, Tensor]:
        """Return what the model is called with. No mask: with it, packed rows would attend to each other."""
        if self.positions is None:
            return {"input_ids": self.ids}
        return {"input_ids": self.ids, "position_ids": self.positions}

    def asked(self) -> tuple[Tensor, Tensor]:
        """Return the flat places (n,) after which a token is asked for, and those tokens (n,)."""
        labels = self.labels.flatten()
        at = (labels != IGNORED).nonzero().squeeze(1)
        return at, labels[at]

    def row_of(self, at: Tensor) -> Tensor:
        """Return the row (n,) that each flat place is in."""
        return at.div(self.ids.shape[1], rounding_mode="floor")

    def per_lane(self, losses: Tensor, at: Tensor) -> Tensor:
        """Return the weighted sums (lanes,) of losses (n,) at flat places `at` (n,)."""
        lane = at.div(self.ids.numel() // len(self.weights), rounding_mode="floor")
        weighted = losses * self.weights.to(losses.dtype)[lane]
        if self.by_example is not None:
            weighted = weighted * self.by_example.flatten()[at].to(losses.dtype)
        return torch.zeros_like(self.weights, dtype=losses.dtype).index_add(0, lane, weighted)


def collate(
    lanes: Sequence[Sequence[Example]],
    counts: Sequence[int],
    like: Tensor,
    *,
    pack: bool,
    owned: bool = False,
) -> Batch:
    """Return one batch; a lane with fewer rows is filled up with rows that ask for nothing.

    Args:
        lanes: rows of each lane.
        counts: target tokens of each lane's whole step.
        like: a tensor with the device and type of the weights.
        pack: whether short rows may share one, where that saves work.
        owned: whether it is needed which example each token is of; no example may be there twice then.
    """
    binned = [[[row] for row in rows] for rows in lanes]
    if pack:
        longest = max(len(row.ids) for rows in lanes for row in rows)
        tighter = ([_bins(rows, int(n * longest)) for rows in lanes] for n in (1, 1.5, 2, 3, 4))
        binned = min(binned, *tighter, key=_work)
    size = max(len(bins) for bins in binned)
    filled = [[*bins, *[[_NOTHING]] * (size - len(bins))] for bins in binned]
    flat = [row for bins in filled for row in bins]
    restarts = any(len(row) > 1 or row[0].positions is not None for row in flat)
    choices = next((row.choices for rows in lanes for row in rows if row.choices is not None), None)
    weighed = any(row.weight != 1.0 for rows in lanes for row in rows)
    device = like.device
    return Batch(
        _padded(flat, lambda row: row.ids, 0).to(device),
        _padded(flat, _positions, 0).to(device) if restarts else None,
        _padded(flat, _next_tokens, IGNORED).to(device),
        torch.tensor([1 / max(n, 1) for n in counts], dtype=like.dtype, device=device),
        None if choices is None else choices.to(device),
        _owners(lanes, flat).to(device) if owned else None,
        _padded(flat, _weights, 0).to(device) if weighed else None,
    )


def _owners(lanes: Sequence[Sequence[Example]], flat: Sequence[Sequence[Example]]) -> Tensor:
    """Return which example each token asked for is of, in the order of their places."""
    number = {id(row): at for at, row in enumerate(row for rows in lanes for row in rows)}
    rows = [row for bin in flat for row in bin if id(row) in number]
    counts = torch.tensor([row.num_own_targets for row in rows], dtype=torch.int64)
    return torch.repeat_interleave(torch.tensor([number[id(row)] for row in rows]), counts)


_NOTHING = Example(torch.zeros(1, dtype=torch.int64), torch.full((1,), IGNORED), 0)


def _work(binned: Sequence[Sequence[Sequence[Example]]]) -> float:
    """Return about how much work a batch is: tokens with their padding, and attention by the length of its rows."""
    rows = len(binned) * max(len(bins) for bins in binned)
    length = max(sum(len(row.ids) for row in bin) for bins in binned for bin in bins)
    return rows * length * (1 + length / 1024)


def _bins(rows: Sequence[Example], longest: int) -> list[list[Example]]:
    """Put rows together, longest first, each where it fits first."""
    bins: list[list[Example]] = []
    free: list[int] = []
    for row in sorted(rows, key=lambda row: -len(row.ids)):
        length = len(row.ids)
        at = next((i for i, left in enumerate(free) if left >= length), len(bins))
        if at == len(bins):
            bins.append([])
            free.append(longest)
        bins[at].append(row)
        free[at] -= length
    return bins


def _padded(
    rows: Sequence[Sequence[Example]], part: Callable[[Example], Tensor], fill: int
) -> Tensor:
    """Return (rows, length) of one part of the examples in each row."""
    joined = [torch.cat([part(one) for one in row]) for row in rows]
    return pad_sequence(joined, batch_first=True, padding_value=fill)


def _next_tokens(row: Example) -> Tensor:
    """Return (length,) what is asked for after each token."""
    return nn.functional.pad(row.labels[1:], (0, 1), value=IGNORED)


def _weights(row: Example) -> Tensor:
    return torch.full((len(row.ids),), row.weight, dtype=torch.float64)


def _positions(row: Example) -> Tensor:
    return torch.arange(len(row.ids)) if row.positions is None else row.positions
