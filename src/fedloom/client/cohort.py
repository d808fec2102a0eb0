"""Many clients' adapters trained on one frozen base in one batch, LoRA, LoRA-XS, IA3 or VeRA; whatever it cannot batch goes one by one."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedloom.client.fast.functions import frozen_linear, lora_linear
from fedloom.client.fast.kernels import replaced_forward
from fedloom.client.fit import fit
from fedloom.client.gradient_transforms import rows
from fedloom.client.setup import Step
from fedloom.client.trainer import Sequential, training
from fedloom.core.protocols import Done, Fit, Job
from fedloom.core.randomness import generator
from fedloom.models.introspection import AdaptedLayer, CoreLayer, IA3Layer, LoRALayer, VeRALayer
from fedloom.models.probe import asked, plain_ids
from fedloom.objectives.head import Product


class AdapterLanes:
    """Stacked tensors of every adapted layer."""

    def __init__(self, cohort: "Cohort", values: Tensor, gains: Sequence[float] = ()) -> None:
        self.values = values
        self._gains = values.new_tensor(gains).view(-1, 1, 1) if {*gains} - {1.0} else None
        self._cohort = cohort
        self._sequential = cohort.sequential

    def gradients(self, steps: Sequence[Step]) -> tuple[Tensor, Tensor]:
        setup, fast = self._sequential.setup, self._sequential.fast
        # B times each lane's own scale takes no other kernel; so is the gradient of B that of the product.
        stand = self._gained(setup.space.layout.split(self.values.detach()))
        leaves = {name: tensor.requires_grad_() for name, tensor in stand.items()}
        total = torch.zeros_like(self.values[:, 0])
        gradient: Tensor | None = None
        with self._cohort.adapted(leaves):
            for batch in fast.batches(steps, setup.local.rows, self.values):
                losses = fast.losses(batch)
                # Lanes do not mix in the sum, so its gradient is each lane's own.
                parts = torch.autograd.grad(
                    losses.sum(), list(leaves.values()), materialize_grads=True
                )
                own = self._gained(dict(zip(leaves, parts, strict=True)))
                flat = torch.cat([part.flatten(1) for part in own.values()], dim=1)
                gradient = flat if gradient is None else gradient.add_(flat)
                total += losses.detach()
        assert gradient is not None
        return gradient, total

    def _gained(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return every B, or its gradient, times each lane's own scale; as they are where all lanes have that of the space."""
        if self._gains is None:
            return tensors
        return {
            n: t * self._gains if n.endswith("lora_B.weight") else t for n, t in tensors.items()
        }

    def keep(self, lanes: Tensor) -> None:
        self.values = self.values[lanes]
        if self._gains is not None:
            self._gains = self._gains[lanes]


@dataclass(frozen=True)
class Cohort:
    """Batches the training of adapters; the numbers differ from the sequential trainer's by rounding only."""

    sequential: Sequential
    layers: Sequence[AdaptedLayer]
    group_tokens: int
    """Tokens of one batch over clients: beyond what caches hold, larger groups are slower again."""
    width: int

    def run(self, jobs: Sequence[Job]) -> Sequence[Done]:
        fits = [i for i, job in enumerate(jobs) if isinstance(job.work, Fit)]
        others = [i for i in range(len(jobs)) if i not in set(fits)]
        done = dict(zip(others, self.sequential.run([jobs[i] for i in others]), strict=True))
        for group in self._groups(jobs, fits):
            done |= zip(group, self._batch([jobs[i] for i in group]), strict=True)
        return [done[i] for i in range(len(jobs))]

    def _groups(self, jobs: Sequence[Job], fits: Sequence[int]) -> Iterator[list[int]]:
        """Yield groups of similar jobs, in an order that is not the jobs', of about group_tokens each."""
        setup = self.sequential.setup
        local = setup.local
        order = []
        for i in fits:
            examples, work = setup.examples(jobs[i].client), jobs[i].work
            steps = local.num_steps(len(examples), work.steps if isinstance(work, Fit) else None)
            length = sum(example.num_tokens for example in examples) // len(examples)
            order.append((jobs[i].round, steps, length, jobs[i].client, i))
        group: list[int] = []
        longest = 0
        for round, _, length, _, i in sorted(order):
            longest = max(longest, length)
            full = (len(group) + 1) * local.rows * longest > self.group_tokens
            if group and (full or jobs[group[0]].round != round):
                yield group
                group, longest = [], length
            group.append(i)
        if group:
            yield group

    def _batch(self, jobs: Sequence[Job]) -> list[Done]:
        setup = self.sequential.setup
        works = [job.work for job in jobs if isinstance(job.work, Fit)]
        values = rows([work.start for work in works], setup.space.absolute_vector).clone()
        lanes = AdapterLanes(self, values, [work.gain for work in works])
        with training(setup.space.model, jobs[0].seed), self.sequential.fast.installed():
            return fit(jobs, lanes, setup)

    @contextmanager
    def adapted(self, leaves: dict[str, Tensor]) -> Iterator[None]:
        """Let every adapted layer use each lane's own tensors on that lane's rows."""
        products = self.sequential.fast.products
        with ExitStack() as stack:
            for layer in self.layers:
                forward = _forward_of(layer, products[id(layer.base.module)], leaves)
                stack.enter_context(replaced_forward(layer.module, forward))
            yield


@torch.no_grad()
def keeps_lanes_apart(cohort: Cohort, model: nn.Module) -> bool:
    """Return whether clients in one batch compute what each computes alone.

    Adapted layers must see as many vectors of every client, client by client: not so where a router sends tokens to
    experts, or rows are turned. Models differ, so the model is asked.
    """
    return any(_apart_at(scale, cohort, model) for scale in _SCALES)


_SCALES = (0.1, 0.03)
"""Standard deviations by which adapters are moved: of small ones rounding hides the effect, and by large ones a deep model's
rounding in half precision grows to the size of it."""


def _apart_at(scale: float, cohort: Cohort, model: nn.Module) -> bool:
    space = cohort.sequential.setup.space
    own, draw = space.values.clone(), generator(0, "lanes")
    noise = torch.randn((2, len(own)), generator=draw, dtype=torch.float32)
    lanes = own + scale * noise.to(own)
    ids = plain_ids(model, 18).view(2, 9)

    def alone(row: int, lane: int) -> Tensor:
        space.values.copy_(lanes[lane])
        logits: Tensor = model(input_ids=ids[row : row + 1], use_cache=False).logits[0].float()
        return logits

    with asked(model):
        try:
            apart = torch.stack([alone(0, 0), alone(1, 1)])
            swapped = torch.stack([alone(0, 1), alone(1, 0)])
        finally:
            space.values.copy_(own)
        try:
            with cohort.adapted(space.layout.split(lanes)):
                together = model(input_ids=ids, use_cache=False).logits.float()
        except (RuntimeError, TypeError):  # shapes that are not lane by lane
            return False
    off, effect = together - apart, swapped - apart
    size = float(off.norm() / effect.norm())
    if next(model.parameters()).dtype not in (torch.bfloat16, torch.float16):
        return size < 1e-3
    # Rounding is large then but has no direction, while lanes that mix move towards each other's.
    towards = float((off * effect).sum() / effect.square().sum())
    return size < 0.5 and abs(towards) < 0.1


def _forward_of(
    layer: AdaptedLayer, product: Product, leaves: Mapping[str, Tensor]
) -> Callable[[Tensor], Tensor]:
    if isinstance(layer, IA3Layer):
        return _ia3_forward(layer, product, leaves[f"{layer.name}.ia3_l"].flatten(1))
    if isinstance(layer, VeRALayer):
        b, d = (leaves[f"{layer.name}.vera_lambda_{x}"] for x in "bd")
        return _vera_forward(layer, product, b, d)
    if isinstance(layer, CoreLayer):
        return _core_forward(layer, product, leaves[f"{layer.name}.lora_B.core"])
    a, b = (leaves[f"{layer.name}.lora_{x}.weight"] for x in "AB")
    return _lora_forward(layer, product, a, b)


def _ia3_forward(layer: IA3Layer, product: Product, scale: Tensor) -> Callable[[Tensor], Tensor]:
    def scaled(x: Tensor) -> Tensor:
        by_lane = x.reshape(len(scale), -1, x.shape[-1]) * scale[:, None]
        return by_lane.to(x.dtype).reshape(x.shape)

    def forward(x: Tensor) -> Tensor:
        out = frozen_linear(scaled(x) if layer.scales_input else x, product)
        out = out if layer.base.bias is None else out + layer.base.bias
        return out if layer.scales_input else scaled(out)

    return forward


def _vera_forward(
    layer: VeRALayer, product: Product, b: Tensor, d: Tensor
) -> Callable[[Tensor], Tensor]:
    # The projections are everybody's, so that each is one product for all lanes.
    def forward(x: Tensor) -> Tensor:
        out = frozen_linear(x, product)
        out = out if layer.base.bias is None else out + layer.base.bias
        narrow = nn.functional.linear(x.to(d.dtype), layer.a)
        narrow = narrow.reshape(len(d), -1, narrow.shape[-1]) * d[:, None]
        update = nn.functional.linear(narrow, layer.b) * b[:, None]
        return (out + update.reshape(out.shape)).to(out.dtype)

    return forward


def _core_forward(layer: CoreLayer, product: Product, core: Tensor) -> Callable[[Tensor], Tensor]:
    # So are the factors around cores.
    def forward(x: Tensor) -> Tensor:
        out = frozen_linear(x, product)
        out = out if layer.base.bias is None else out + layer.base.bias
        narrow = nn.functional.linear(x.to(core.dtype), layer.a)
        narrow = narrow.reshape(len(core), -1, narrow.shape[-1]) @ core.transpose(1, 2)
        update = nn.functional.linear(narrow, layer.b) * layer.scaling
        return (out + update.reshape(out.shape)).to(out.dtype)

    return forward


def _lora_forward(
    layer: LoRALayer, product: Product, a: Tensor, b: Tensor
) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(x.device.type):
            out = lora_linear(x, product, a, b, layer.scaling)
            return out if layer.base.bias is None else out + layer.base.bias
        frozen: Tensor = layer.base.module(x)
        lanes = x.reshape(len(a), -1, x.shape[-1]).to(a.dtype)
        update = lanes @ a.transpose(1, 2) @ b.transpose(1, 2) * layer.scaling
        return (frozen + update.reshape(frozen.shape)).to(frozen.dtype)

    return forward
