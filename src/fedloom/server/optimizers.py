"""Server optimizers as values: how a mean delta becomes new params.

Adaptive Federated Optimization. Reddi, Charles, Zaheer, Garrett, Rush, Konečný, Kumar, McMahan,
ICLR 2021 (arXiv:2003.00295), Algorithm 2: Adagrad, Yogi, Adam, with v_{-1} = tau^2, m_{-1} = 0 and
no bias correction.

Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification. Hsu,
Qi, Brown 2019 (arXiv:1909.06335), FedAvgM: Momentum, v <- beta v + delta.

`variant: openfedllm` follows the code of OpenFedLLM (Ye et al., KDD 2024, arXiv:2402.06954)
instead: momentum is an average, m <- beta m + (1 - beta) delta, that begins at the first delta, and
Yogi and Adam track m^2 where the paper tracks delta^2. Their first step is ten times the paper's.
Its Adagrad is the paper's with beta1 = 0, as in the paper's experiments, and has no variant.

AdamW is torch.optim's (Loshchilov, Hutter, ICLR 2019, arXiv:1711.05101), with bias correction and
decay: what the code of FLASC (Kuo et al. 2024, arXiv:2406.05233) calls FedAdam.

Deltas point the way to go, so a step adds. Params and moments are kept in at least float32.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from fedloom.core.params import axpy, params_map
from fedloom.core.protocols import Params

Variant = Literal["paper", "openfedllm"]


@dataclass(frozen=True)
class Moments:
    """What a server optimizer remembers between rounds."""

    num_steps: int
    """Steps taken; 0 before the first."""
    m: Params
    """First moment by name; empty where the optimizer has none."""
    v: Params
    """Second moment by name; empty where the optimizer has none."""


class ServerOptimizer(Protocol):
    """Turns a mean delta into new params; a pure function of its arguments."""

    def init(self, params: Params) -> Moments:
        """Return the memory before the first step."""
        ...

    def step(self, params: Params, delta: Params, moments: Moments) -> tuple[Params, Moments]:
        """Return new params and the memory of this step."""
        ...


@dataclass(frozen=True, slots=True)
class SGD:
    """Add lr times the mean delta; with lr 1 the server takes the mean model."""

    lr: float = 1.0
    """How far a step goes."""

    def __post_init__(self) -> None:
        _check_positive("sgd", "lr", self.lr)

    def init(self, params: Params) -> Moments:
        return Moments(0, {}, {})

    def step(self, params: Params, delta: Params, moments: Moments) -> tuple[Params, Moments]:
        return axpy(self.lr, delta, params), Moments(moments.num_steps + 1, {}, {})


@dataclass(frozen=True, slots=True)
class Momentum:
    """FedAvgM: deltas of earlier rounds go on pushing."""

    lr: float = 1.0
    """How far a step goes."""
    beta: float = 0.9
    """Share of the momentum that survives a round, [0, 1)."""
    variant: Variant = "paper"
    """Whose formulas: the paper's, or those of the code of OpenFedLLM."""

    def __post_init__(self) -> None:
        _check_positive("momentum", "lr", self.lr)
        _check_decay("momentum", "beta", self.beta)
        _check_variant("momentum", self.variant)

    def init(self, params: Params) -> Moments:
        return Moments(0, _full_like(params, 0.0), {})

    def step(self, params: Params, delta: Params, moments: Moments) -> tuple[Params, Moments]:
        if self.variant == "paper":
            m = axpy(self.beta, moments.m, delta)
        else:
            m = _average(moments, delta, beta=self.beta, variant=self.variant)
        return axpy(self.lr, m, params), Moments(moments.num_steps + 1, m, {})


@dataclass(frozen=True, slots=True)
class Adagrad:
    """FedAdagrad: every coordinate slows down by the sum of its squared deltas."""

    lr: float = 1e-3
    """How far a step goes."""
    beta1: float = 0.0
    """Decay of the first moment, [0, 1); the paper's experiments use 0."""
    tau: float = 1e-3
    """Adaptivity: the larger, the more alike the coordinates' steps."""

    def __post_init__(self) -> None:
        _check_positive("adagrad", "lr", self.lr)
        _check_positive("adagrad", "tau", self.tau)
        _check_decay("adagrad", "beta1", self.beta1)

    def init(self, params: Params) -> Moments:
        return Moments(0, _full_like(params, 0.0), _full_like(params, self.tau**2))

    def step(self, params: Params, delta: Params, moments: Moments) -> tuple[Params, Moments]:
        m = _average(moments, delta, beta=self.beta1, variant="paper")
        v = params_map(lambda v, d: v + d * d, moments.v, delta)
        params = _ascend(params, m, v, lr=self.lr, tau=self.tau)
        return params, Moments(moments.num_steps + 1, m, v)


@dataclass(frozen=True, slots=True)
class _Adaptive(ABC):
    """Algorithm 2 with a second moment that decays."""

    lr: float = 1e-3
    """How far a step goes."""
    beta1: float = 0.9
    """Decay of the first moment, [0, 1)."""
    beta2: float = 0.99
    """Decay of the second moment, [0, 1)."""
    tau: float = 1e-3
    """Adaptivity: the larger, the more alike the coordinates' steps."""
    variant: Variant = "paper"
    """Whose formulas: the paper's, or those of the code of OpenFedLLM."""

    def __post_init__(self) -> None:
        name = type(self).__name__.lower()
        _check_positive(name, "lr", self.lr)
        _check_positive(name, "tau", self.tau)
        _check_decay(name, "beta1", self.beta1)
        _check_decay(name, "beta2", self.beta2)
        _check_variant(name, self.variant)

    def init(self, params: Params) -> Moments:
        return Moments(0, _full_like(params, 0.0), _full_like(params, self.tau**2))

    def step(self, params: Params, delta: Params, moments: Moments) -> tuple[Params, Moments]:
        m = _average(moments, delta, beta=self.beta1, variant=self.variant)
        v = params_map(self._second, moments.v, delta if self.variant == "paper" else m)
        params = _ascend(params, m, v, lr=self.lr, tau=self.tau)
        return params, Moments(moments.num_steps + 1, m, v)

    @abstractmethod
    def _second(self, v: Tensor, d: Tensor) -> Tensor:
        """Return the second moment after a delta."""


@dataclass(frozen=True, slots=True)
class Yogi(_Adaptive):
    """FedYogi: Adam whose second moment moves by steps of bounded size."""

    def _second(self, v: Tensor, d: Tensor) -> Tensor:
        return v - (1 - self.beta2) * d * d * torch.sign(v - d * d)


@dataclass(frozen=True, slots=True)
class Adam(_Adaptive):
    """FedAdam: a step of about lr in every coordinate that keeps its direction."""

    def _second(self, v: Tensor, d: Tensor) -> Tensor:
        return self.beta2 * v + (1 - self.beta2) * d * d


@dataclass(frozen=True, slots=True)
class AdamW:
    """AdamW of torch.optim, in its operations and their order, on minus the mean delta."""

    lr: float = 1e-3
    """How far a step goes."""
    beta1: float = 0.9
    """Decay of the first moment, [0, 1)."""
    beta2: float = 0.999
    """Decay of the second moment, [0, 1)."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.01
    """Share of lr by which coordinates return to the space's origin each step; 0 is Adam."""

    def __post_init__(self) -> None:
        _check_positive("adamw", "lr", self.lr)
        _check_positive("adamw", "epsilon", self.epsilon)
        _check_decay("adamw", "beta1", self.beta1)
        _check_decay("adamw", "beta2", self.beta2)
        _check_decay("adamw", "weight_decay", self.weight_decay)

    def init(self, params: Params) -> Moments:
        return Moments(0, _full_like(params, 0.0), _full_like(params, 0.0))

    def step(self, params: Params, delta: Params, moments: Moments) -> tuple[Params, Moments]:
        count = moments.num_steps + 1
        m = params_map(lambda m, d: m.lerp(-d.to(m), 1 - self.beta1), moments.m, delta)

        def second(v: Tensor, d: Tensor) -> Tensor:
            return (v * self.beta2).addcmul_(d.to(v), d.to(v), value=1 - self.beta2)

        v = params_map(second, moments.v, delta)
        size, root = self.lr / (1 - self.beta1**count), (1 - self.beta2**count) ** 0.5

        def move(p: Tensor, m: Tensor, v: Tensor) -> Tensor:
            decayed = p.to(m) * (1 - self.lr * self.weight_decay)
            return decayed.addcdiv_(m, (v.sqrt() / root).add_(self.epsilon), value=-size)

        return params_map(move, params, m, v), Moments(count, m, v)


SERVER_OPTIMIZERS: dict[str, type[ServerOptimizer]] = {
    "sgd": SGD,
    "momentum": Momentum,
    "adagrad": Adagrad,
    "yogi": Yogi,
    "adam": Adam,
    "adamw": AdamW,
}


def rescales(optimizer: ServerOptimizer) -> bool:
    """Return whether steps are others than mean deltas, of this round and of earlier ones, times numbers."""
    return not isinstance(optimizer, SGD | Momentum)


def _full_like(params: Params, value: float) -> Params:
    """Return `value` everywhere, in at least float32: half precision loses small squares."""

    def fill(p: Tensor) -> Tensor:
        return torch.full(p.shape, value, dtype=torch.promote_types(p.dtype, torch.float32))

    return params_map(fill, params)


def _average(moments: Moments, delta: Params, *, beta: float, variant: Variant) -> Params:
    """Return beta * m + (1 - beta) * delta; OpenFedLLM's begins at the first delta."""
    if variant == "openfedllm" and moments.num_steps == 0:
        return delta
    return params_map(lambda m, d: beta * m + (1 - beta) * d, moments.m, delta)


def _ascend(params: Params, m: Params, v: Params, *, lr: float, tau: float) -> Params:
    """Return params + lr * m / (sqrt(v) + tau), Algorithm 2, last line."""
    return params_map(lambda p, m, v: p + lr * m / (v.sqrt() + tau), params, m, v)


def _check_positive(optimizer: str, field: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ValueError(f"server.{optimizer}.{field} must be a positive number, got {value}")


def _check_decay(optimizer: str, field: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"server.{optimizer}.{field} must be in [0, 1), got {value}")


def _check_variant(optimizer: str, value: str) -> None:
    if value not in get_args(Variant):
        raise ValueError(f"server.{optimizer}.variant must be paper or openfedllm, got {value!r}")
