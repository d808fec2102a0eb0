"""One base model for many runs of one process: loaded once, its frozen tensors shared, and looked at afterwards."""

import copy
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from fedloom.models.build import Base, ModelSettings, fingerprint, load_base

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class WeightsChanged(ValueError):
    """A run wrote to the weights that it shares: what it found is not of the model that its recipe names."""


@dataclass
class SharedBases:
    """Hands out bases whose modules are a run's own, and whose weights are one.

    The last model alone is kept: a plan of many models holds one at a time. For runs that leave the weights as they are.
    """

    load: Callable[[ModelSettings], Base] = load_base
    num_loaded: int = 0
    """How often a model was read."""
    _kept: dict[ModelSettings, tuple[Base, str]] = field(default_factory=dict)
    """The base that nobody is given, and the hash of its weights when it was read."""

    def __call__(self, settings: ModelSettings) -> Base:
        """Return a base of these settings, which share its weights with all others of them."""
        if settings not in self._kept:
            self._kept.clear()
            base = self.load(settings)
            self._kept[settings] = base, fingerprint(base.model)
            self.num_loaded += 1
        base = self._kept[settings][0]
        return replace(
            base, model=_with_weights_of(base.model), tokenizer=copy.deepcopy(base.tokenizer)
        )

    @contextmanager
    def lent(self, shares: bool, folder: Path) -> Iterator["SharedBases | None"]:
        """Lend the bases to a run, and look at the weights after it, failed or not.

        Args:
            shares: Whether the run leaves weights as they are; if not it is lent None, and loads as any run does.
            folder: Of the run. It is removed where the run wrote to them: not even its checkpoints stand.

        Raises:
            WeightsChanged: where they are not as they were; they are read anew next time.
        """
        if not shares:
            yield None
            return
        try:
            try:
                yield self
            except Exception:
                self.check()
                raise
            self.check()
        except WeightsChanged:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def check(self) -> None:
        """Look at the weights; they are read anew next time where they were written to.

        Raises:
            WeightsChanged: where they were.
        """
        for settings, (base, before) in list(self._kept.items()):
            if fingerprint(base.model) != before:
                del self._kept[settings]
                raise WeightsChanged(
                    f"the frozen weights of model.name {settings.name} are not as they were before this run: it has written"
                    " to them"
                )


def _with_weights_of(model: "PreTrainedModel") -> "PreTrainedModel":
    """Return a copy whose parameters and buffers are other objects over the same memory."""
    shared: dict[int, Tensor] = {}
    for module in model.modules():
        tensors: Mapping[str, Tensor | None] = {**module._parameters, **module._buffers}
        for tensor in tensors.values():
            # One that is tied stays so: of one object there is one other.
            if tensor is not None and id(tensor) not in shared:
                shared[id(tensor)] = _beside(tensor)
    return copy.deepcopy(model, shared)


def _beside(tensor: Tensor) -> Tensor:
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)
    return tensor.detach()
