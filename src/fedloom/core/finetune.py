"""Personal fine-tuning before an evaluation: a client's own steps on what it was sent, of which nothing is kept or sent."""

import re
from dataclasses import dataclass

import torch

from fedloom.core.protocols import Params, Task


@dataclass(frozen=True, slots=True)
class FineTune:
    """Recipe section `evaluation.finetune`.

    What FederatedScope calls finetune before eval, and papers FedAvg+FT; the head alone after rounds of the body is
    FedBABU's personalisation (Oh, Kim, Yun, ICLR 2022, arXiv:2106.06042).
    """

    steps: int = 0
    """Local steps of a client on its own training rows, as the section `local` says, at its learning rate without a
    schedule, before its test rows are measured a second time: `test/finetuned/*`. 0: none. Adapters of a smaller rank
    take these steps at the scale of the widest."""
    only: str = ""
    """A regular expression of whole components of a name: what learns then, such as `lora_B`. Empty: all that is tuned."""

    def __post_init__(self) -> None:
        """Check both fields."""
        if self.steps < 0:
            raise ValueError(
                f"evaluation.finetune.steps must be at least 0, for none, got {self.steps}"
            )
        if self.only and not self.steps:
            raise ValueError(
                f"evaluation.finetune.only has no effect where evaluation.finetune.steps is 0, got {self.only!r}"
            )
        try:
            re.compile(self.only)
        except re.error as error:
            raise ValueError(
                f"evaluation.finetune.only must be a regular expression, got {self.only!r} ({error})"
            ) from error

    def concerns(self, task: Task) -> bool:
        """Return whether a task is measured a second time: of test rows, by a client that has rows to learn from."""
        return bool(self.steps) and task.kind == "test" and task.profile.get("num_examples") != "0"

    def mask(self, params: Params) -> Params | None:
        """Return what of a model learns, 1 or 0 by name; None where all does.

        Raises:
            ValueError: where nothing is called so.
        """
        if not self.only:
            return None
        pattern = re.compile(rf"(?:^|\.)(?:{self.only})(?:\.|$)")
        learns = {name: bool(pattern.search(name)) for name in params}
        if not any(learns.values()):
            raise ValueError(
                f"evaluation.finetune.only must match some of the tuned tensors, such as {next(iter(params))}, got"
                f" {self.only!r}"
            )
        return {n: torch.full((), float(on), dtype=params[n].dtype) for n, on in learns.items()}


NO_FINETUNE = FineTune()
