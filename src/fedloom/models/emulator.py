"""A model whose middle layers give way to some of them, in place and without a copy: the emulator of offsite tuning.

Names are those of the whole model: a layer keeps its number in them, whichever layers stand beside it.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from fedloom.core.randomness import derive, generator, seeded
from fedloom.models.adapters import check_width
from fedloom.models.build import clean
from fedloom.models.hf_logging import quiet
from fedloom.models.quantized import QuantizedLinear, num_weights, quantize_
from fedloom.models.reach import linear_layers
from fedloom.models.schemes import SCHEMES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Rule = Literal["floor", "round"]
HELD = "offsite"
"""What a model's configuration calls which layers of how many it holds, where it holds an emulator alone."""
SCALES = "scales.safetensors"
"""In the folder of an emulator in eight bits, whose weights are whole numbers there: what each row is multiplied by."""


def kept(num_layers: int, drop: float, rule: Rule) -> list[int]:
    """Return which of the middle layers an emulator keeps: evenly spread, both ends among them.

    In whole numbers: steps of floating point leave out the last layer of many sizes.

    Args:
        num_layers: Layers in the middle.
        drop: Share of them that is left out, [0, 1).
        rule: How places between two layers are rounded: down, or to the nearest (to the even one halfway).
    """
    count = max(1, round(num_layers * (1 - drop)))
    if count == 1:
        return [(num_layers - 1) // 2]
    spread, steps = num_layers - 1, count - 1
    if rule == "floor":
        return [i * spread // steps for i in range(count)]
    return [round(Fraction(i * spread, steps)) for i in range(count)]


@dataclass(frozen=True, slots=True)
class Cut:
    """Which layers of a model a client has."""

    num_layers: int
    """Of the whole model."""
    left: int
    """First layers that learn."""
    right: int
    """Last layers that learn."""
    middle: Sequence[int]
    """Layers between them that the emulator keeps, by their number in the whole model."""

    @property
    def adapters(self) -> list[int]:
        """Return the layers that learn."""
        last = self.num_layers - self.right
        return [*range(self.left), *range(last, self.num_layers)]

    @property
    def layers(self) -> list[int]:
        """Return all layers of the emulated model."""
        return sorted({*self.adapters, *self.middle})


def cut(num_layers: int, *, left: int, right: int, drop: float, rule: Rule) -> Cut:
    """Return which layers of a model a client has.

    Raises:
        ValueError: where nothing would be left between the layers that learn.
    """
    between = num_layers - left - right
    if between < 1:
        raise ValueError(
            f"tune.offsite.left + right must be fewer than the model's {num_layers} layers, got {left} + {right}"
        )
    middle = [left + i for i in kept(between, drop, rule)]
    return Cut(num_layers, left, right, middle)


class _Numbered(nn.ModuleList):
    """Layers that keep their numbers of the whole model in names; by place they are counted as any list."""

    def __init__(self, layers: Sequence[tuple[int, nn.Module]]) -> None:
        super().__init__()
        for number, layer in layers:
            self.add_module(str(number), layer)

    def __getitem__(self, at: Any) -> Any:
        """Return the layer at a place, or a list of them."""
        found = list(self)[at]
        return nn.ModuleList(found) if isinstance(at, slice) else found


class Emulator:
    """A model in two arrangements: as clients have it, in which it stands, and whole, where the middle is here.

    The middle layers that are kept are modules of their own around the same tensors, so that what is added to them is no
    part of the whole model.

    Args:
        model: A whole model, or what a folder of one holds; changed in place.
        left: First layers that learn.
        right: Last layers that learn.
        drop: Share of the layers between them that is left out.
        rule: See `kept`.
        int8: Whether the linear layers of what is kept of the middle are held in eight bits.
        folder: Where the model is from, if from a folder.

    Raises:
        ValueError: where the model has no such layers, or holds another emulator.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        *,
        left: int,
        right: int,
        drop: float,
        rule: Rule,
        int8: bool = False,
        folder: str = "",
    ) -> None:
        self._model, self._config = model, model.config.get_text_config(decoder=True)
        self._parent, self._attribute, whole = _layers_of(model)
        above = next(n for n, module in model.named_modules() if module is self._parent)
        self._prefix = f"{above}.{self._attribute}" if above else self._attribute
        held = getattr(model.config, HELD, None)
        total = held["of"] if held else len(whole)
        self.cut = cut(total, left=left, right=right, drop=drop, rule=rule)
        if held and list(held["layers"]) != self.cut.layers:
            raise ValueError(
                f"model.name holds the emulator of other settings than tune.offsite: layers {held['layers']} of {total},"
                f" where {self.cut.layers} are asked for; take the folder that was made for this recipe"
            )
        self.is_whole_here = held is None
        """Whether the layers that clients have not are in this process."""
        self._types = dict(enumerate(getattr(self._config, "layer_types", None) or []))
        if held:
            self._types = {n: self._types[i] for i, n in enumerate(held["layers"]) if self._types}
        numbered = (
            dict(enumerate(whole))
            if held is None
            else dict(zip(held["layers"], whole, strict=True))
        )
        shown = {n: numbered[n] for n in self.cut.adapters}
        shown |= {n: _beside(numbered[n]) for n in self.cut.middle}
        if int8:
            for number in self.cut.middle:
                quantize_(shown[number], SCHEMES["int8"])
            if held:
                self._rescale(shown, list(held["layers"]), Path(folder) / SCALES)
        self._whole = whole
        self._shown = _Numbered(sorted(shown.items()))
        held_whole = num_weights(model)
        self._arrange(self._shown, self.cut.layers)
        shares = num_weights(model) / held_whole
        self.disclosed = shares if self.is_whole_here else None
        """Share of the model's numbers that clients have; None where the whole is not here."""

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Let the model stand whole for a while: the same layers that learn, around all of the middle.

        Raises:
            ValueError: where the middle is not here.
        """
        if not self.is_whole_here:
            raise ValueError(
                "the whole model is at the server alone: here is an emulator of it, which only trains and measures"
            )
        self._arrange(self._whole, range(self.cut.num_layers))
        try:
            yield
        finally:
            self._arrange(self._shown, self.cut.layers)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Let the model stand as one of its own for a while, for a folder: layers numbered through, and a note on which."""
        config: Any = self._model.config
        setattr(config, HELD, {"layers": self.cut.layers, "of": self.cut.num_layers})
        self._arrange(nn.ModuleList(self._shown), self.cut.layers)
        try:
            yield
        finally:
            delattr(config, HELD)
            self._arrange(self._shown, self.cut.layers)

    @contextmanager
    def integers(self, folder: Path) -> Iterator[None]:
        """Let weights in eight bits be whole numbers for a while, for a folder; in the end write their scales beside them.

        Whole numbers are rounded to themselves wherever they are read, so that both sides have the same ones.
        """
        from safetensors.torch import save_file

        layers = {
            clean(f"{name}.weight").removesuffix(".weight"): module
            for name, module in self._model.named_modules()
            if isinstance(module, QuantizedLinear)
        }
        held = {name: module.get_buffer("scale").clone() for name, module in layers.items()}
        for module in layers.values():
            module.get_buffer("scale").fill_(1.0)
        try:
            yield
            save_file({f"{n}.scale": scale.cpu() for n, scale in held.items()}, folder / SCALES)
        finally:
            for name, module in layers.items():
                module.get_buffer("scale").copy_(held[name])

    def _rescale(self, shown: dict[int, nn.Module], numbers: list[int], file: Path) -> None:
        """Give back to the rows of layers that came as whole numbers what they are multiplied by."""
        from safetensors.torch import load_file

        if not file.is_file():
            raise ValueError(
                f"{file} is not there, without which an emulator in eight bits is none: remove the folder, and join again"
            )
        for name, scale in load_file(file).items():
            place, _, rest = name.removeprefix(f"{self._prefix}.").partition(".")
            layer, _, _ = rest.rpartition(".")
            module = shown[numbers[int(place)]].get_submodule(layer)
            assert isinstance(module, QuantizedLinear)
            module.get_buffer("scale").copy_(scale)

    def attach_factors(self, rank: int, *, seed: int) -> None:
        """Add low-rank factors to the linear layers of what is kept of the middle; the same seed gives the same ones.

        Args:
            rank: Of each; they are scaled by 2.
            seed: Of A; B is zero, so that nothing changes yet.

        Raises:
            ValueError: where they would be wider than a layer.
        """
        from peft import LoraConfig, inject_adapter_in_model

        known = linear_layers(self._model)
        for number in self.cut.middle:
            layer, prefix = self._shown[self.cut.layers.index(number)], self._name(number)
            own = [n for n in known if n.startswith(f"{prefix}.")]
            check_width(self._model, own, rank, setting="tune.offsite.factors")
            ends = [n.removeprefix(f"{prefix}.") for n in own]
            config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=ends)
            with quiet(), seeded(derive(seed, "peft")):
                inject_adapter_in_model(config, layer)
            layer.eval()
            for name, parameter in layer.named_parameters():
                if not parameter.requires_grad:
                    continue
                wide = torch.promote_types(parameter.dtype, torch.float32)
                parameter.data = parameter.data.to(wide)
                if ".lora_A." in name:
                    bound = parameter.shape[1] ** -0.5
                    fresh = torch.empty(parameter.shape, dtype=torch.float32)
                    fresh.uniform_(
                        -bound, bound, generator=generator(seed, "emulator", number, name)
                    )
                    parameter.data.copy_(fresh)

    def is_adapter(self, name: str) -> bool:
        """Return whether a tensor's name is that of a layer that learns."""
        return any(name.startswith(f"{self._name(n)}.") for n in self.cut.adapters)

    def is_middle(self, name: str) -> bool:
        """Return whether a tensor's name is that of a layer in the middle, kept or not."""
        between = range(self.cut.left, self.cut.num_layers - self.cut.right)
        return any(name.startswith(f"{self._name(n)}.") for n in between)

    def adapter_modules(self) -> list[str]:
        """Return the names of the layers that learn."""
        return [self._name(number) for number in self.cut.adapters]

    @contextmanager
    def watched(self) -> Iterator[dict[int, Tensor]]:
        """Note what the layers of the middle give in the next call, by their number, (rows, length, width)."""
        seen: dict[int, Tensor] = {}
        here = list(getattr(self._parent, self._attribute).named_children())

        def note(number: int) -> Any:
            def after(_module: nn.Module, _inputs: Any, out: Any) -> None:
                seen[number] = out[0] if isinstance(out, tuple) else out

            return after

        with ExitStack() as stack:
            for name, layer in here:
                if self.cut.left <= int(name) < self.cut.num_layers - self.cut.right:
                    hook = layer.register_forward_hook(note(int(name)))
                    stack.callback(hook.remove)
            yield seen

    def _name(self, number: int) -> str:
        return f"{self._prefix}.{number}"

    def _arrange(self, layers: nn.ModuleList, numbers: Sequence[int]) -> None:
        setattr(self._parent, self._attribute, layers)
        self._config.num_hidden_layers = len(numbers)
        if self._types:
            self._config.layer_types = [self._types[number] for number in numbers]
        # A cache has a place for each layer there is.
        for place, layer in enumerate(layers):
            for module in layer.modules():
                if "layer_idx" in vars(module):
                    module.layer_idx = place  # type: ignore[assignment]


def _layers_of(model: "PreTrainedModel") -> tuple[nn.Module, str, nn.ModuleList]:
    """Return the list of a model's layers, with the module it is in and what it is called there."""
    wanted = model.config.get_text_config(decoder=True).num_hidden_layers
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == wanted:
                return parent, name, child
    raise ValueError(
        f"tune.offsite needs a model whose layers are one list, got {type(model).__name__}: choose another model"
    )


def _beside(layer: nn.Module) -> nn.Module:
    """Return modules of their own around the same tensors."""
    same: dict[int, Any] = {id(t): t for t in (*layer.parameters(), *layer.buffers())}
    for module in layer.modules():
        if "config" in vars(module):
            same[id(module.config)] = module.config
    return copy.deepcopy(layer, same)
