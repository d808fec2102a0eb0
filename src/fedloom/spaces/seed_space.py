"""The seed space: w = (1 + b) w_0 + sum_k c_k z_k over all weights, of which params are c and, with decay, b.

Federated Full-Parameter Tuning of Billion-Sized Language Models with Communication Cost under 18 Kilobytes. Qin, Chen,
Qian, Ding, Li, Deng, ICML 2024 (arXiv:2312.06353), section 3.2. Weights are always rebuilt from the base model, in
float32 and rounded once, so that nothing adds up over rounds but the coefficients.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from fedloom.core.files import write_atomic
from fedloom.core.params import equal
from fedloom.core.protocols import Params
from fedloom.core.randomness import derive
from fedloom.core.seed_sequences import COEFFICIENTS
from fedloom.models.build import Base, ModelSettings, clean, shapes_only, write_model
from fedloom.models.quantized import (
    quantized_identity,
    quantized_layers,
    scheme_of,
    unpacked_shapes,
)
from fedloom.spaces.directions.directions import Directions
from fedloom.spaces.directions.lowrank import Drawn
from fedloom.spaces.directions.stream import NOISE_VERSION, Distribution
from fedloom.spaces.live import Layout, Seated, check_names, chosen, every, learnable
from fedloom.spaces.rebuild_cost import cost_in_words, fitting_distribution, rebuild_seconds
from fedloom.spaces.rebuilds import Rebuilds, SumRebuilds, WeightRebuilds
from fedloom.spaces.spilled import SpilledVector

BASE = "base"
"""Beside c, of COEFFICIENTS, (K,) float64: b () float64, how much of the base model has gone since the start."""


@dataclass(frozen=True, slots=True)
class Seeds:
    """Learn how far the weights go along each of a few thousand random directions."""

    num_seeds: int = 4096
    """Directions of the pool."""
    distribution: Distribution | Literal["auto"] = "auto"
    """Of the directions: gaussian; rademacher (+-1) or popcount (sums of sixteen coins, nearly normal), both faster
    and summed without rounding; lowrank (a product of two thin matrices), for which no weight is copied. auto: by
    weights times num_seeds, gaussian up to 3e10, rademacher up to 1e12, then lowrank, which weights in few bits always have."""
    distribution_rank: int = 1
    """Of distribution lowrank: columns of the thin matrices."""
    weights: Sequence[str] = ()
    """Learn only tensors with one of these in their name, as whole parts between dots (mlp, layers.0, norm.weight);
    none: all of them."""

    is_adapter: ClassVar[bool] = False
    is_seed_space: ClassVar[bool] = True
    virtual_tokens: ClassVar[int] = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        for name, number in (
            ("num_seeds", self.num_seeds),
            ("distribution_rank", self.distribution_rank),
        ):
            if number < 1:
                raise ValueError(f"tune.seeds.{name} must be at least 1, got {number}")
        allowed = ("auto", *get_args(Distribution))
        if self.distribution not in allowed:
            *most, last = allowed
            raise ValueError(
                f"tune.seeds.distribution must be {', '.join(most)} or {last}, got {self.distribution}"
            )
        if self.distribution != "lowrank" and self.distribution_rank != 1:
            raise ValueError(
                "tune.seeds.distribution_rank belongs to tune.seeds.distribution lowrank, got"
                f" {self.distribution}"
            )
        check_names(self.weights, path="tune.seeds.weights")

    @property
    def title(self) -> str:
        kind = "" if self.distribution == "auto" else f"{self.distribution} "
        return f"{self.num_seeds:,} {kind}seeds"

    def drawn_from(self, num_weights: int, *, quantized: bool) -> Distribution:
        """Return the distribution of directions over so many weights; `quantized`: whether some are in few bits."""
        if self.distribution != "auto":
            return self.distribution
        return "lowrank" if quantized else fitting_distribution(num_weights, self.num_seeds)

    def rebuild_cost(self, model: ModelSettings) -> str:
        """Return in words how the directions are drawn and what a rebuild along all of them takes on this CPU.

        Raises:
            ValueError: where there is no such model, or no tensor of its has a name that is asked for.
        """
        named = chosen(shapes_only(model), self.weights, path="tune.seeds.weights").values()
        num_weights = sum(p.numel() for p in named)
        kind = self.drawn_from(num_weights, quantized=model.quantize != "none")
        seconds = rebuild_seconds(kind, num_weights, self.num_seeds)
        return cost_in_words(kind, self.num_seeds, seconds)

    def make_space(self, base: Base, *, seed: int, decays: bool = False) -> "SeedSpace":
        scheme = scheme_of(base.model)
        if scheme is not None and self.distribution not in ("auto", "lowrank"):
            raise ValueError(
                f"tune.seeds.distribution must be auto or lowrank where model.quantize is {scheme.name}, got"
                f" {self.distribution}"
            )
        if self.weights and decays:
            raise ValueError(
                "local.weight_decay must be 0 where tune.seeds.weights names some: it shrinks all weights alike"
            )
        return SeedSpace(base, self, seed=seed, decays=decays)


class SeedSpace:
    """Coefficients of the directions of a pool."""

    def __init__(self, base: Base, seeds: Seeds, *, seed: int, decays: bool = False) -> None:
        path = "tune.seeds.weights"
        asked = chosen(base.model, seeds.weights, path=path).values()
        types = {p.dtype for p in asked if p.is_floating_point()}
        if len(types) > 1:
            raise ValueError(
                "tune: seeds needs weights of one type, got "
                + " and ".join(sorted(str(dtype)[6:] for dtype in types))
                + ": set model.dtype"
            )
        named, self.left_frozen = learnable(base.model, seeds.weights, path=path)
        floats = {name: p for name, p in named.items() if p.is_floating_point()}
        self.model: nn.Module = base.model
        self.num_seeds = seeds.num_seeds
        self.tensors: Mapping[str, nn.Parameter] = named
        packed = unpacked_shapes(base.model)
        shapes = {name: packed.get(id(p), p.shape) for name, p in named.items()}
        self.directions = Directions(
            shapes,
            distribution=seeds.drawn_from(
                sum(shape.numel() for shape in shapes.values()), quantized=bool(packed)
            ),
            seed=derive(seed, "directions"),
            rank=seeds.distribution_rank,
        )
        self.seated = Seated(base.model, floats)
        sizes = {COEFFICIENTS: torch.Size([seeds.num_seeds]), BASE: torch.Size()}
        self.layout = Layout(sizes if decays else {COEFFICIENTS: sizes[COEFFICIENTS]})
        self._base = base
        self._origin = SpilledVector.of(self.seated.values)
        layers = {clean(f"{n}.weight"): x for n, x in quantized_layers(base.model).items()}
        self._quantized = {name: layer for name, layer in layers.items() if name in named}
        self._loaded: Params = {}
        self._rebuilds = self._make_rebuilds()

    @property
    def sums_go_on(self) -> bool:
        """Return whether a rebuild goes on from an earlier one, along the directions whose coefficients differ."""
        return self.directions.exact and self.device.type == "cpu"

    def _make_rebuilds(self) -> Rebuilds:
        numel, dtype = self.values.numel(), self.values.dtype
        if self.sums_go_on:
            return SumRebuilds(numel, self.directions, self._origin, _scale)
        # What `wide` asks for serves `load` as well; of lowrank directions, which nobody asks it for, half is enough.
        is_lowrank = self.directions.distribution == "lowrank"
        kind = dtype if is_lowrank else torch.promote_types(dtype, torch.float32)
        return WeightRebuilds(numel, kind, self._rebuild)

    @property
    def device(self) -> torch.device:
        """Return where the model is."""
        return self.seated.device

    @property
    def values(self) -> Tensor:
        """Return the model's weights as they stand, (numel,); those of quantised layers are not among them."""
        return self.seated.values

    @property
    def is_quantized(self) -> bool:
        """Return whether some of the weights are frozen in few bits."""
        return bool(self._quantized)

    def start(self) -> Params:
        return {
            name: torch.zeros(shape, dtype=torch.float64)
            for name, shape in self.layout.shapes.items()
        }

    def load(self, params: Params) -> None:
        params = self.read(params)
        self._load_quantized(params)
        self._read(params, self.values)

    @contextmanager
    def standing_at(self, params: Params) -> Iterator[None]:
        stood, loaded = self.values.clone(), self._loaded or self.start()
        self.load(params)
        try:
            yield
        finally:
            self.values.copy_(stood)
            self._load_quantized(loaded)

    def wide(self, params: Params) -> Tensor:
        """Return the weights at params in float32, (numel,): what half precision cannot hold adds up in there."""
        fresh = torch.empty(self.values.shape, dtype=torch.float32, device=self.device)
        params = self.read(params)
        if self.directions.distribution == "lowrank":
            return self._rebuild(params, fresh)
        return self._read(params, fresh)

    def _read(self, params: Params, out: Tensor) -> Tensor:
        if any(bool(t.any()) for t in params.values()):
            return self._rebuilds.read(params, out)
        return self._origin.read(out)

    def forget(self) -> None:
        """Let the next load be a rebuild, whatever is on disk."""
        self._rebuilds, self._loaded = self._make_rebuilds(), {}

    def rebuild_seconds(self) -> float:
        """Return what a rebuild along all directions takes here."""
        kind, numel = self.directions.distribution, self.directions.numel
        return rebuild_seconds(kind, numel, self.num_seeds, device=self.device)

    def read(self, params: Params) -> Params:
        """Return params in float64, fresh; a scalar covers its whole name.

        Raises:
            ValueError: where names or shapes are not the space's.
        """
        return self.layout.split(self.layout.flatten(params).double())

    def project(self, moved: Tensor, ks: Sequence[int]) -> Tensor:
        """Return how far (numel,) goes along each direction, z_k . moved / K: their sum is `moved` in the mean.

        Shu, Hu, Ng, Low, Yu, "Ferret", ICML 2025 (arXiv:2409.06277), section 3.
        """
        return self.directions.dot(moved, ks) / len(ks)

    def save(self, folder: Path, params: Params) -> None:
        """Write the whole model, and beside it the few numbers that are all of it but the base model."""
        self.save_merged(folder, params)
        lists = {name: t.tolist() for name, t in self.read(params).items()}
        text = json.dumps({"identity": dict(self.identity()), "params": lists})
        write_atomic(folder / "seeds.json", text.encode())

    def save_merged(self, folder: Path, params: Params) -> None:
        self.load(params)
        write_model(self._base, folder)

    def identity(self) -> Mapping[str, str]:
        """Return what both sides must have in common, see handshake; hashed once."""
        return self._identity

    @cached_property
    def _identity(self) -> Mapping[str, str]:
        shapes = [f"{name} {tuple(shape)}" for name, shape in self.directions.shapes.items()]
        kind, rank = self.directions.distribution, self.directions.rank
        return {
            **quantized_identity(self.model),
            "base": self._fingerprint(),
            "tensors": hashlib.sha256("\n".join(shapes).encode()).hexdigest(),
            "noise": str(NOISE_VERSION),
            "distribution": f"{kind} {rank}" if kind == "lowrank" else kind,
            "seeds": str(self.num_seeds),
            "seed": f"{self.directions.seed:016x}",
        }

    def _fingerprint(self) -> str:
        """Return the SHA-256 of the base model, wherever its weights have gone since."""
        digest = hashlib.sha256(str(self.values.dtype).encode())
        slices, at = dict[str, slice](), 0
        for name, shape in self.seated.layout.shapes.items():
            slices[name] = slice(at, at := at + shape.numel())
        for name, parameter in every(self.model).items():
            if name in slices:
                digest.update(self._origin.bytes_of(slices[name]))
            else:
                digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        for layer in quantized_layers(self.model).values():
            for name, held in layer.packed.items():
                if name != "weight":
                    digest.update(held.cpu().numpy().data)
        return digest.hexdigest()

    def _rebuild(self, params: Params, out: Tensor) -> Tensor:
        """Write the weights at params into `out`, and return that."""
        c, scale = params[COEFFICIENTS], _scale(params)
        self._origin.read(out)
        if not self._quantized:
            return self.directions.rebuild(out, c, out=out, scale=scale)
        used = c.nonzero().flatten().tolist()
        for name, part in self.seated.layout.split(out).items():
            self.directions.shift(name, part.mul_(scale), used, c[used].tolist(), out=part)
        return out

    def _load_quantized(self, params: Params) -> None:
        if equal(self._loaded, params):
            return
        self._loaded = params
        c, scale = params[COEFFICIENTS], _scale(params)
        used = c.nonzero().flatten().tolist()
        for name, layer in self._quantized.items():
            layer.gain = scale
            layer.side = self._side(name, used, c[used].tolist()) if used else None

    def _side(
        self, name: str, ks: Sequence[int], by: Sequence[float]
    ) -> tuple[Tensor, Tensor] | Tensor:
        """Return sum_i by_i z_{k_i} of a matrix as two factors, or whole where those would be larger."""
        m, n = self.directions.shapes[name]
        if len(ks) * self.directions.rank * (m + n) <= m * n:
            return self.update(name, ks, by)
        whole = torch.zeros(m, n, device=self.device)
        return self.directions.shift(name, whole, ks, by, out=whole)

    def update(
        self,
        name: str,
        ks: Sequence[int],
        by: Sequence[float],
        *,
        rows: Tensor | None = None,
        drawn: Drawn | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return U (m, R) and V (n, R), whose product U V^T is sum_i by_i z_{k_i} of a matrix; distribution lowrank."""
        if drawn is None:
            u, v = self.directions.factors(name, ks, rows=rows)
        else:
            u, v = (t.mT for t in drawn)
            u = u if rows is None else u[:, rows.to(u.device)]
        u = u * (by[0] if len(by) == 1 else torch.tensor(by, dtype=u.dtype)[:, None, None])
        flat = (t.transpose(0, 1).flatten(1).to(self.device) for t in (u, v))
        return next(flat), next(flat)


def _scale(params: Params) -> float:
    """Return what is left of the base model."""
    return 1 + float(params.get(BASE, 0.0))
