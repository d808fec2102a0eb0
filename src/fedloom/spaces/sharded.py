"""A space whose tensors are split by rows over the processes of one client, see `models.sharding`.

Every process works on its own rows of everything: values, gradient, moments, pull, offset and mask. Coordinates come in
whole, of which each process takes its rows, and go out whole, gathered tensor by tensor.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fedloom.core.protocols import Params
from fedloom.models.adapters import trainable
from fedloom.models.sharding import gathered, local, rows_of, shard_
from fedloom.spaces.live import Layout, Live


class Sharded:
    """This process's rows of a space; its model is split in place, and the space of the whole is of no use any more.

    Args:
        space: Of the whole model, the same in all processes.
        mesh: The processes.
    """

    def __init__(self, space: Live, mesh: DeviceMesh) -> None:
        self.model, self.layout, self._mesh = space.model, space.layout, mesh
        zero = {name: torch.tensor(0.0) for name in space.layout.shapes}
        origin = space.absolute(zero)
        shard_(space.model, mesh)
        named = trainable(space.model)
        self._parameters = {name: named[name] for name in self.layout.shapes}
        self._rows = Layout({name: local(p).shape for name, p in self._parameters.items()})
        self.values = torch.cat([local(p).detach().reshape(-1) for p in self._parameters.values()])
        self._origin = self._rows.flatten(self._mine(origin)).to(self.values)

    def load(self, params: Params) -> None:
        """Let the model stand at `params`, in place."""
        self.values.copy_(self.absolute_vector(params))
        self.seat()

    @torch.no_grad()
    def seat(self) -> None:
        """Let the model stand where `values` are."""
        for parameter, rows in zip(
            self._parameters.values(), self._rows.split(self.values).values(), strict=True
        ):
            local(parameter).copy_(rows)

    def gradient(self) -> Tensor:
        """Return this process's rows of the gradient, (numel,), and let go of the model's own."""
        parts = [
            torch.zeros_like(local(p)) if p.grad is None else local(p.grad)
            for p in self._parameters.values()
        ]
        flat = torch.cat([part.reshape(-1) for part in parts])
        self.drop_gradients()
        return flat

    def drop_gradients(self) -> None:
        """Let go of all gradients."""
        for parameter in self._parameters.values():
            parameter.grad = None

    def vector(self, params: Params) -> Tensor:
        """Return this process's rows of params, (numel,), where the model is."""
        return self._rows.flatten(self._mine(params)).to(self.values)

    def absolute_vector(self, params: Params) -> Tensor:
        """Return this process's rows of the tensors' values at params, (numel,), where the model is."""
        return self.vector(params).add_(self._origin)

    def coordinates(self, values: Tensor) -> Params:
        """Return the whole coordinates of all processes' rows, on the CPU; all of them have to call, the first gets them."""
        out = dict[str, Tensor]()
        for name, rows in self._rows.split(values - self._origin).items():
            whole = gathered(rows, self.layout.shapes[name], self._mesh)
            if self._mesh.get_rank() == 0:
                out[name] = whole.cpu()
        return out

    def _mine(self, params: Params) -> Mapping[str, Tensor]:
        return {n: rows_of(t, self._mesh) if t.dim() else t for n, t in params.items()}
