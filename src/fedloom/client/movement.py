"""A guard against training nothing: what learns has moved after a client's first training, or could not have.

Whole days are lost to adapters that stay as they were: a wrapper that trains copies, a backend that gathers nothing, a start
from which no gradient leads. So a tensor that came back as it went is asked about: one step of our own, by the
model's own layers, from the same start on some of the same examples. Where that moves it, training has to.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass, field, replace

import torch

from fedloom.client.fast.kernels import make_fast
from fedloom.client.gradient_transforms import GradientTransforms
from fedloom.client.optimizer import Optimizer
from fedloom.client.setup import Setup
from fedloom.client.trainer import OneLane
from fedloom.core.protocols import Done, Fit, Job, Trainer
from fedloom.models.adapters import scaled
from fedloom.models.introspection import listed_groups
from fedloom.objectives.objective import Objective
from fedloom.spaces.live import Live

_ROWS = 2
"""Examples of the step that is compared with: a fraction of a client's own."""
_STEPS = 4
"""How many such steps are taken at most."""
_ROUNDING = 16
"""Units in the last place beyond which an entry is expected to move."""
_NOISE = 1e-5
"""A gradient so much smaller than the largest one may be rounding alone, as that of a bias of keys is."""


@dataclass
class Watched:
    """A trainer whose first work is looked at, tensor by tensor, until each has moved."""

    trainer: Trainer
    setup: Setup[Live]
    objective: Objective
    _unmoved: set[str] = field(init=False)
    _steps_left: int = field(default=_STEPS, init=False)

    def __post_init__(self) -> None:
        self._unmoved = set(self.setup.space.layout.shapes)

    @property
    def width(self) -> int:
        """Return how many clients the trainer likes to run at once."""
        return self.trainer.width

    def run(self, jobs: Sequence[Job]) -> Sequence[Done]:
        """Return the trainer's answers.

        Raises:
            ValueError: naming what learns by its gradient and has not moved.
        """
        done = self.trainer.run(jobs)
        if self._unmoved and self._steps_left:
            for job, one in zip(jobs, done, strict=True):
                if isinstance(job.work, Fit) and one.num_steps:
                    self._look(job, job.work, one)
                    break
        return done

    def _look(self, job: Job, work: Fit, done: Done) -> None:
        space, mask = self.setup.space, work.mask
        learning = {n for n in space.layout.shapes if mask is None or bool(mask[n].any())}
        asked = learning & self._unmoved
        if not asked:
            return
        stood = space.coordinates(space.absolute_vector(work.start))
        still = {name for name in asked if torch.equal(done.params[name], stood[name])}
        self._unmoved -= asked - still
        if not still:
            return
        self._steps_left -= 1
        step = self._step(job, work)
        if step is None:
            return
        if stuck := still & step.moves:
            raise ValueError(
                f"local training left {_named(stuck)} as before, though a step by its gradient moves that:"
                " the trainer, or what wraps the model, gives back other tensors than it trains"
            )
        if still == learning and not step.reaches:
            raise ValueError(
                f"nothing can be learnt from where training starts: the gradient of {_named(still)} is exactly"
                " zero, and nothing else learns then: start from other values, or let something else learn before"
            )

    def _step(self, job: Job, work: Fit) -> "_Step | None":
        """Return what a step does from the start; None where it is asked for nothing."""
        setup, space = self.setup, self.setup.space
        # The trainer's own steps may go without a decay, which is no learning.
        local = replace(setup.local, weight_decay=0.0, kernels="torch")
        lr = local.lr_at(job.round, setup.num_rounds)
        space.load(work.start)
        space.model.eval()
        try:
            with torch.enable_grad(), scaled(space.model, work.gain):
                rows = next(setup.steps(job, work.start, 1))[:_ROWS]
                lane = OneLane(space, make_fast(space.model, local, self.objective), _ROWS)
                gradient, losses = lane.gradients([rows])
        finally:
            space.drop_gradients()
        edits = GradientTransforms.of([work], space)
        edits.apply_(gradient, lane.values)
        norms = {n: float(g.norm()) for n, g in space.layout.split(gradient[0]).items()}
        after = lane.values.clone()
        optimizer = Optimizer(local, lr, after, edits.mask, factors=[(work.lr_factor, 1.0)])
        (sound,) = optimizer.step_(after, gradient, losses)
        if not sound or not lr or not bool(losses.any()):
            return None
        least = _ROUNDING * torch.finfo(after.dtype).eps
        far = space.layout.split((after - lane.values)[0].abs() > least * lane.values[0].abs())
        floor = _NOISE * max(norms.values())
        return _Step(
            {n for n, norm in norms.items() if norm > floor and bool(far[n].any())}, floor > 0
        )


@dataclass(frozen=True)
class _Step:
    moves: Set[str]
    """What it moves by more than rounding."""
    reaches: bool
    """Whether any gradient is not zero."""


def _named(names: Set[str]) -> str:
    return listed_groups(names) if len(names) > 1 else "".join(names)
