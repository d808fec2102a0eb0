"""How clients learn: the recipe's `local` section. Trainers hold it; algorithms do not."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Literal, get_args

Optimizer = Literal["sgd", "adamw"]
Schedule = Literal["constant", "cosine", "linear"]
Precision = Literal["float32", "bfloat16"]
Moments = Literal["float32", "bfloat16", "float8"]
Kernels = Literal["auto", "onednn", "onednn_forward", "widened", "torch", "reference"]
Order = Literal["first", "zeroth"]
Difference = Literal["central", "forward"]
PACKS = ("onednn", "onednn_forward", "widened")
"""Kernels that replace torch's products."""
ZEROTH = ("eps", "difference", "directions", "max_slope")
"""Settings that only zeroth order looks at."""


@dataclass(frozen=True, slots=True)
class LocalSettings:
    """Gradient descent on one client."""

    order: Order | None = None
    """first: gradients by backward passes; zeroth: guessed from differences of losses (Malladi et al. 2023,
    arXiv:2305.17333), in the memory of a forward. None: zeroth where tune is seeds, first elsewhere."""
    optimizer: Optimizer = "adamw"
    """As in torch.optim; moments start anew in every round."""
    lr: float = 5e-4
    """Of the first round after the warm-up."""
    momentum: float = 0.0
    """Of sgd, [0, 1)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of adamw, each in [0, 1)."""
    weight_decay: float = 0.0
    """Of the tuned tensors' values: a penalty in sgd, decoupled in adamw; masked entries do not decay."""
    moments: Moments = "float32"
    """How the optimizer's moments (two of adamw, one of sgd with momentum) are held between steps: 4, 2 or 1.03 bytes an
    entry; float8 has a scale for each 128. Fewer bits cost time, and memory is what they save: with tune: full."""
    steps: int | None = None
    """Optimizer steps a round; None: `epochs` passes, so clients differ."""
    epochs: int = 1
    """Passes over the client's examples a round, where `steps` is None."""
    batch_size: int | Literal["auto"] = 4
    """Examples that go through the model at once; auto: the most that fit into the memory that is free where a run begins
    (on a CPU, in one process), by the forecast of `fedloom plan`; the run's recipe.yaml then has the number."""
    accumulation: int = 1
    """Batches of one optimizer step; the loss is the mean over the target tokens of all of them."""
    max_grad_norm: float | None = 1.0
    """Joint norm a client's gradient is clipped to; None: never."""
    schedule: Schedule = "constant"
    """Of the learning rate, by round: towards `min_lr`, reached after the last one."""
    warmup_rounds: int = 0
    """Rounds in which the learning rate grows linearly to `lr`."""
    min_lr: float = 0.0
    """Where cosine and linear schedules end."""
    precision: Precision = "float32"
    """Of products with weights that learn (tune: full, modules_to_save, seeds of order first): bfloat16 makes them under
    autocast; the weights, optimizer and loss stay float32. Frozen weights multiply in model.dtype."""
    batched: Literal["auto", "off"] = "auto"
    """auto: train many clients' adapters (lora, lora_xs, ia3, vera) in one batch where that is possible; off: one by one."""
    group_tokens: int | None = None
    """Tokens of one batch over clients; None: 512 on a CPU, 16384 on a GPU."""
    kernels: Kernels = "auto"
    """How products with frozen weights are made. onednn: by oneDNN with weights packed once for each direction;
    onednn_forward: packed for the forward alone, which takes half the memory; widened: in float32, with a
    half-precision weight widened as it is used (all three on a CPU); torch: its own. All compute the loss at target
    tokens only. auto: what is measured to be fastest. reference: the model's own forward."""
    eps: float | None = None
    """How far zeroth order looks along a direction; None: 5e-4 where tune is seeds, 1e-3 elsewhere."""
    difference: Difference = "central"
    """central: a loss on either side, two forwards a direction; forward: one beyond the loss at the weights."""
    directions: int = 1
    """Directions of one zeroth-order step, measured at the same weights and batch; their mean is applied."""
    max_slope: float | None = None
    """Largest slope of zeroth order along a direction, either way: larger ones are cut to it. None: never."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        _check_choices(self)
        _check_numbers(self)
        if self.momentum and self.optimizer != "sgd":
            raise ValueError(f"local.momentum belongs to local.optimizer sgd, got {self.optimizer}")
        if self.moments != "float32" and self.optimizer == "sgd" and not self.momentum:
            raise ValueError(
                f"local.moments {self.moments} has no effect with local.optimizer sgd without momentum, which has none"
            )
        if self.min_lr and self.schedule == "constant":
            raise ValueError("local.min_lr needs local.schedule cosine or linear, got constant")
        if self.steps is not None and self.epochs != 1:
            raise ValueError("local.epochs has no effect beside local.steps: set one of them")
        if self.kernels in PACKS and self.precision != "float32":
            raise ValueError(
                f"local.kernels {self.kernels} needs local.precision float32, got bfloat16"
            )
        if self.order == "first":
            self.refuse(ZEROTH, "belongs to local.order zeroth, got first")

    def refuse(self, names: Sequence[str], reason: str) -> None:
        """Refuse settings that nothing would look at.

        Raises:
            ValueError: for the first of `names` that is not as it is where a recipe leaves it out.
        """
        given = asdict(self)
        for field in fields(self):
            if field.name in names and given[field.name] != field.default:
                raise ValueError(f"local.{field.name} {reason}")

    @property
    def decays_seeds(self) -> bool:
        """Return whether a step along a seed shrinks all weights, which is a coordinate of their space."""
        return self.weight_decay > 0 and self.order != "first"

    @property
    def rows(self) -> int:
        """Return `batch_size` as a number.

        Raises:
            ValueError: where it was not made one.
        """
        if isinstance(self.batch_size, str):
            raise ValueError(
                "local.batch_size auto becomes a number where `fedloom run` or `plan` begins: set one here"
            )
        return self.batch_size

    def lr_at(self, round: int, num_rounds: int) -> float:
        """Return the learning rate of a round, counted from 1; 0 is outside of all schedules."""
        if round < 1:
            return self.lr
        done, warmup = round - 1, self.warmup_rounds
        if done < warmup:
            return self.lr * (done + 1) / (warmup + 1)
        if self.schedule == "constant":
            return self.lr
        share = min((done - warmup) / max(num_rounds - warmup, 1), 1.0)
        left = (1 + math.cos(math.pi * share)) / 2 if self.schedule == "cosine" else 1 - share
        return self.min_lr + (self.lr - self.min_lr) * left

    def num_steps(self, num_examples: int, override: int | None) -> int:
        """Return the optimizer steps a client takes."""
        if override is not None:
            return override
        if self.steps is not None:
            return self.steps
        return self.epochs * -(-num_examples // (self.rows * self.accumulation))


def _check_choices(local: LocalSettings) -> None:
    for name, value, known in (
        ("optimizer", local.optimizer, get_args(Optimizer)),
        ("schedule", local.schedule, get_args(Schedule)),
        ("precision", local.precision, get_args(Precision)),
        ("moments", local.moments, get_args(Moments)),
        ("batched", local.batched, ("auto", "off")),
        ("kernels", local.kernels, get_args(Kernels)),
        ("order", local.order, (None, *get_args(Order))),
        ("difference", local.difference, get_args(Difference)),
    ):
        if value not in known:
            named = ", ".join(str(one) for one in known if one is not None)
            raise ValueError(f"local.{name} must be one of {named}, got {value}")


def _check_numbers(local: LocalSettings) -> None:
    for name, number, least in (
        ("steps", local.steps, 1),
        ("epochs", local.epochs, 1),
        ("batch_size", 1 if local.batch_size == "auto" else local.batch_size, 1),
        ("accumulation", local.accumulation, 1),
        ("group_tokens", local.group_tokens, 1),
        ("directions", local.directions, 1),
        ("warmup_rounds", local.warmup_rounds, 0),
        ("weight_decay", local.weight_decay, 0),
        ("min_lr", local.min_lr, 0),
    ):
        if number is not None and not number >= least:
            raise ValueError(f"local.{name} must be at least {least}, got {number}")
    if not 0 < local.lr < math.inf:
        raise ValueError(f"local.lr must be positive, got {local.lr}")
    if local.min_lr > local.lr:
        raise ValueError(f"local.min_lr must be at most local.lr ({local.lr}), got {local.min_lr}")
    for name, bound in (
        ("max_grad_norm", local.max_grad_norm),
        ("eps", local.eps),
        ("max_slope", local.max_slope),
    ):
        if bound is not None and not bound > 0:
            raise ValueError(f"local.{name} must be positive or null, got {bound}")
    if not 0 <= local.momentum < 1:
        raise ValueError(f"local.momentum must be in [0, 1), got {local.momentum}")
    if not all(0 <= beta < 1 for beta in local.betas):
        raise ValueError(f"local.betas must be two numbers in [0, 1), got {local.betas}")
