"""The space of an adapter's tensors, whatever its kind: those that train, not what PEFT would save of them."""

from pathlib import Path

from fedloom.core.protocols import Params
from fedloom.models.adapters import Adapter, trainable
from fedloom.models.build import Base, clean
from fedloom.models.quantized import quantized_layers
from fedloom.models.requantized import Drift, check_nf4, write_nf4
from fedloom.spaces.live import Live, Origin


class AdapterSpace(Live):
    """The trainable tensors of a PEFT adapter."""

    def __init__(
        self, base: Base, adapter: Adapter, *, origin: Origin = "initial", dropout: float = 0.0
    ) -> None:
        self._adapter = adapter
        self._tokenizer = base.tokenizer
        super().__init__(
            base.model,
            trainable(base.model),
            origin=origin,
            left_frozen=adapter.left_frozen,
            dropout=dropout,
            identity=adapter.identity,
        )

    def save(self, folder: Path, params: Params) -> None:
        """Write a PEFT folder."""
        self._adapter.save(folder, self.absolute(params))

    def save_as_lora(self, folder: Path, params: Params) -> None:
        self._adapter.save_as_lora(folder, self.absolute(params))

    def save_merged(self, folder: Path, params: Params) -> None:
        self.load(params)
        self._adapter.save_merged(folder, self._tokenizer)

    def save_requantized(self, folder: Path, params: Params) -> Drift:
        """Write a whole model with its layers in NF4 again, and return what that has moved.

        Raises:
            ValueError: where the base model is not in NF4, or what was learnt is no part of its weights.
        """
        self.load(params)
        layers = {clean(name): layer for name, layer in quantized_layers(self.model).items()}
        check_nf4(layers)
        return write_nf4(self._adapter.merged(), self._tokenizer, layers, folder)
