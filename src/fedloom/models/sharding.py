"""A model's weights split over the processes of a group, layer by layer, by torch's FSDP2."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def shard_(model: "PreTrainedModel", mesh: DeviceMesh) -> None:
    """Leave each process its rows of every weight, in place; a layer is whole while it computes, embedding and head all along.

    Args:
        model: Whole, on any device; its own `forward` is the only way through it from now on.
        mesh: The processes, of one dimension.
    """
    wanted = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == wanted]
    for layer in lists[0] if lists else ():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def rows_of(whole: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return the rows of a tensor that this process has, a view."""
    parts = torch.chunk(whole, mesh.size())
    at = mesh.get_local_rank()
    return parts[at] if at < len(parts) else whole[:0]


def local(parameter: Tensor) -> Tensor:
    """Return the rows of a split weight that this process has: no copy."""
    assert isinstance(parameter, DTensor)
    return parameter.to_local()


def gathered(rows: Tensor, shape: torch.Size, mesh: DeviceMesh) -> Tensor:
    """Return the whole tensor of this shape that each process has its rows of; all of them have to call."""
    stride = torch.empty(shape, device="meta").stride()
    split = DTensor.from_local(rows, mesh, (Shard(0),), run_check=False, shape=shape, stride=stride)
    return split.full_tensor()
