"""Local training by somebody else's loop: a Hugging Face `Trainer`, or TRL's `SFTTrainer`, made by a function of the user's.

Fedloom decides where a client starts, on which examples, for how many steps and from which seed; the trainer decides
everything else: optimizer, loss, schedule within the round, precision. What comes back is what it left in the model.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy
import torch
from torch import nn

from fedloom.client.setup import Setup, TrainerParts
from fedloom.core.protocols import ClientError, ClientId, Done, Fit, Job, Trainer
from fedloom.core.randomness import seeded
from fedloom.data.tokens import Example
from fedloom.models.build import disable_checkpointing
from fedloom.models.introspection import forgets_activations
from fedloom.spaces.live import Live


class _State(Protocol):
    global_step: int
    log_history: list[dict[str, float]]


class HFTrainer(Protocol):
    """What is driven of a `transformers.Trainer` or one of its subclasses."""

    model: Any
    args: Any
    state: _State

    def train(self) -> Any:
        """Run all steps."""
        ...


@dataclass(frozen=True)
class LocalRound:
    """What one client's trainer has to be made for."""

    client: ClientId
    number: int
    """Of the round, from 1."""
    model: nn.Module
    """Stands where the client starts; only the parameters that require a gradient may learn."""
    tokenizer: Any
    rows: Sequence[dict[str, list[int]]]
    """The client's examples, tokenised: `input_ids` and `labels`, -100 where there is no loss, and the same as
    `completion_mask`, 1 where a token is learnt."""
    steps: int
    """Optimizer steps to take: the trainer's `max_steps`."""
    seed: int
    """Below 2^32: the trainer's `seed`."""
    lr: float
    """The recipe's learning rate in this round, times what the algorithm asks for."""
    batch_size: int
    """Of `local.batch_size`."""
    folder: Path
    """For what the trainer writes; gone after the round."""


Make = Callable[[LocalRound], HFTrainer]


def hf_trainer(make: Make) -> Callable[[TrainerParts], Trainer]:
    """Return what `fedloom.run(trainer=...)` takes, so that every client learns by a trainer that `make` returns.

    Args:
        make: Returns a `transformers.Trainer`, or one of its subclasses such as TRL's `SFTTrainer`, for one client and
            round; called anew for each.
    """
    return lambda parts: HuggingFaceTrainer(make, parts.setup, parts.tokenizer, parts.default)


@dataclass(frozen=True)
class HuggingFaceTrainer:
    """Runs Fit by a trainer that `make` returns, one client after another; what is measured, `measuring` measures.

    Honoured: start, examples, steps, another learning rate, seed and the result. Refused, because a Hugging Face trainer has no place for it:
    a proximal term (FedProx, pFedMe, Ditto), a gradient offset (SCAFFOLD), a mask (freeze, prune), a seed sequence (FedKSeed),
    another weight decay (FedEx).
    """

    make: Make
    setup: Setup[Live]
    tokenizer: Any
    measuring: Trainer
    """Answers Evaluate and Losses: fedloom's own trainer of the same setup."""
    width: int = 1

    def run(self, jobs: Sequence[Job]) -> Sequence[Done]:
        """Return the answers in the order of the jobs.

        Raises:
            ValueError: where a job asks for what cannot be honoured, or the trainer did something else than it was asked.
        """
        places = [i for i, job in enumerate(jobs) if not isinstance(job.work, Fit)]
        measured = self.measuring.run([jobs[i] for i in places]) if places else ()
        done = dict(zip(places, measured, strict=True))
        for i, job in enumerate(jobs):
            if isinstance(job.work, Fit):
                done[i] = self._fit(job, job.work)
        return [done[i] for i in range(len(jobs))]

    def _fit(self, job: Job, work: Fit) -> Done:
        refuse(work)
        space, local = self.setup.space, self.setup.local
        local.refuse(
            ("moments",), "has no effect on a Hugging Face trainer, which has its own optimizer"
        )
        examples = self.setup.examples(job.client)
        if any(example.positions is not None for example in examples):
            raise ValueError(
                "data.packing must be false for a Hugging Face trainer, whose rows are one example each"
            )
        if any(example.good is not None or example.rejected is not None for example in examples):
            raise ValueError(
                "a Hugging Face trainer cannot honour an objective of preferences, which has a reference model and two"
                " answers an example: take fedloom's own trainer (no `trainer` argument)"
            )
        steps = local.num_steps(len(examples), work.steps)
        space.load(work.start)
        learning = [p for p in space.model.parameters() if p.requires_grad]
        with TemporaryDirectory(prefix="fedloom-") as folder, _as_before(space.model, job.seed):
            asked = LocalRound(
                job.client,
                job.round,
                space.model,
                self.tokenizer,
                [_row(example) for example in examples],
                steps,
                job.seed % 2**32,
                local.lr_at(job.round, self.setup.num_rounds) * work.lr_factor,
                local.rows,
                Path(folder),
            )
            trainer = self.make(asked)
            _check_made(trainer, asked)
            trainer.train()
        _check_done(trainer, asked, learning)
        # As the parameters stand now: a trainer may have given them tensors of its own.
        values = torch.cat([p.detach().reshape(-1).to(space.values) for p in space.parameters])
        if not bool(torch.isfinite(values).all()):
            raise ClientError(f"{job.client}: its trainer left weights that are not finite")
        params = space.coordinates(values)
        batch = trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps
        seen = steps * min(batch, len(examples))
        targets = sum(example.num_targets for example in examples) / len(examples)
        metrics = {"num_tokens": float(round(seen * targets)), **_loss(trainer)}
        return Done(params, len(examples), steps, None, metrics=metrics)


def refuse(work: Fit) -> None:
    """Raise for what a Hugging Face trainer has no place for.

    Raises:
        ValueError: naming it, and the algorithms that ask for it.
    """
    for name, asked, whose in (
        ("a proximal term", work.proximal, "FedProx, pFedMe and Ditto ask"),
        ("a gradient offset", work.gradient_offset, "SCAFFOLD asks"),
        ("a mask of the gradient", work.mask, "freeze and prune ask"),
        (
            "another scale of adapters",
            None if work.gain == 1.0 else work.gain,
            "tune.lora.ranks asks",
        ),
        ("a pull of the last columns", work.tail, "fedlora.prune asks"),
        ("a seed sequence", work.seed_sequence, "FedKSeed and DeComFL ask"),
        ("weights of examples", work.example_weights, "FedEM asks"),
        (
            "another weight decay",
            None if work.decay_factor == 1.0 else work.decay_factor,
            "FedEx asks",
        ),
    ):
        if asked is not None:
            raise ValueError(
                f"a Hugging Face trainer cannot honour {name}, for which {whose}: take fedloom's own trainer"
                " (no `trainer` argument), or an algorithm that trains plainly, such as fedavg"
            )


def _row(example: Example) -> dict[str, list[int]]:
    ids, labels = example.ids.tolist(), example.labels.tolist()
    return {
        "input_ids": ids,
        "labels": labels,
        "completion_mask": [int(label >= 0) for label in labels],
    }


def _check_made(trainer: HFTrainer, asked: LocalRound) -> None:
    if isinstance(trainer.model, nn.Module) and trainer.model is not asked.model:
        raise ValueError(
            "the trainer holds another model than it was given: pass `round.model` on as it is, without peft_config,"
            " as it has its adapters already"
        )
    for name, given, wanted in (
        ("max_steps", trainer.args.max_steps, asked.steps),
        ("seed", trainer.args.seed, asked.seed),
    ):
        if given != wanted:
            raise ValueError(
                f"the trainer's {name} must be round.{'steps' if name == 'max_steps' else name} ({wanted}), got {given}"
            )


def _check_done(trainer: HFTrainer, asked: LocalRound, learning: Sequence[nn.Parameter]) -> None:
    if trainer.state.global_step != asked.steps:
        raise ValueError(
            f"the trainer took {trainer.state.global_step} steps where {asked.steps} were asked for: nothing may stop it early"
        )
    now = [p for p in asked.model.parameters() if p.requires_grad]
    if len(now) != len(learning) or any(a is not b for a, b in zip(now, learning, strict=True)):
        raise ValueError(
            "the trainer changed which parameters of the model learn: freeze or add none in it, `tune` says what learns"
        )


def _loss(trainer: HFTrainer) -> dict[str, float]:
    found = [entry["train_loss"] for entry in trainer.state.log_history if "train_loss" in entry]
    return {"loss": float(found[-1])} if found and math.isfinite(found[-1]) else {}


@contextmanager
def _as_before(model: Any, seed: int) -> Iterator[None]:
    """Let a trainer seed the global generators and switch the model's modes, and put all of that back."""
    checkpointing = forgets_activations(model)
    python, array = random.getstate(), numpy.random.get_state()  # noqa: NPY002 put back as they were
    try:
        with seeded(seed), torch.enable_grad():
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(array)  # noqa: NPY002 put back as they were
        model.zero_grad(set_to_none=True)
        if forgets_activations(model) and not checkpointing:
            disable_checkpointing(model)
        model.eval()
