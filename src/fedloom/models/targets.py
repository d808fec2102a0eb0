"""Which linear layers get an adapter: those that learn by it; what stays frozen beside them is named."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from fedloom.models.build import clean
from fedloom.models.introspection import adapted_layer, listed, listed_groups, numberless
from fedloom.models.quantized import unpacked_shapes
from fedloom.models.reach import Reach, reach

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ALL = "all-linear"
_MAMBAS = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
"""Models on whose out_proj PEFT takes no adapter: on a GPU fast kernels read its weight past the layer."""


@dataclass(frozen=True, slots=True)
class Targets:
    """What an adapter sits on."""

    layers: frozenset[str]
    """Their full names."""
    peft_targets: str | list[str]
    """The same for PEFT: as the recipe has it, wherever that means these layers and no others."""
    peft_left_out: list[str]
    """What PEFT would take for a target by the end of its name."""
    others: frozenset[str]
    """Full names of layers that a target by name stands for too, and no loss has a gradient in."""


def choose_targets(
    model: "PreTrainedModel",
    targets: str | Sequence[str],
    *,
    saved: Sequence[str] = (),
    path: str = "tune.lora.targets",
) -> Targets:
    """Return the layers that targets stand for and a loss has a gradient in.

    Args:
        model: without adapters.
        targets: all-linear, or ends of names.
        saved: modules that are tuned whole, inside which there are no adapters.
        path: where the recipe has the targets.

    Raises:
        ValueError: where a target names no such layer.
    """
    found = reach(model)
    wanted = [targets] if isinstance(targets, str) else list(targets)
    everything = wanted == [_ALL] and isinstance(targets, str)
    if not everything:
        _check_targets(wanted, found, path)
    if everything:
        learning = {name for name in found.learning if not _bypassed(model, name)}
    else:
        learning = {name for name in found.learning if _is_one(name, wanted)}
    layers = frozenset(name for name in learning if not _is_inside(name, saved))
    if not layers:
        raise ValueError(
            f"{path} {', '.join(wanted)} finds no linear layer that a pass over text goes through;"
            " tune: full learns the weights themselves"
        )
    if everything:
        taken = set(found.layers)
    else:
        taken = {name for name, _ in model.named_modules() if _is_one(name, wanted)}
    same = layers == {name for name in taken if not _is_inside(name, saved)}
    if not same:
        peft_targets: str | list[str] = sorted(layers)
    else:
        peft_targets = _ALL if everything else wanted
    others = (name for name, _ in model.named_modules() if name not in layers)
    peft_left_out = [] if same else [name for name in others if _is_one(name, layers)]
    return Targets(layers, peft_targets, peft_left_out, frozenset(taken & (found.odd | found.idle)))


def left_frozen(
    model: "PreTrainedModel",
    targets: str | Sequence[str],
    chosen: Targets,
    *,
    saved: Sequence[str] = (),
    path: str = "tune.lora.targets",
) -> str:
    """Return what stays frozen although it might have been expected to learn, in a sentence; empty where nothing does.

    Args:
        model: with adapters.
        targets: as the recipe has them.
        chosen: what became of them.
        saved: modules that are tuned whole.
        path: where the recipe has the targets.
    """
    learning = (clean(name) for name, p in model.named_parameters() if p.requires_grad)
    adapted = {adapted_layer(name).replace(".base_layer", "") for name in learning}
    if targets == _ALL:
        wanted, left = _ALL, _unadapted(model, adapted, saved)
    else:
        wanted = targets if isinstance(targets, str) else ", ".join(targets)
        left = listed_groups((chosen.layers | chosen.others) - adapted)
    if not left:
        return ""
    return f"{path} {wanted} leaves frozen what no adapter fits, or no pass over text goes through: {left}"


def _check_targets(wanted: Sequence[str], found: Reach, path: str) -> None:
    for target in wanted:
        if any(_is_one(name, [target]) for name in found.learning):
            continue
        known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in found.learning}))
        why = ""
        if any(_is_one(name, [target]) for name in found.odd):
            why = ", which takes or gives something else than a linear layer does"
        elif any(_is_one(name, [target]) for name in found.idle):
            why = ", which a loss over text has no gradient in"
        raise ValueError(
            f"{path} must be all-linear or name linear layers of the model ({known}), got {target}{why}"
        )


def _bypassed(model: "PreTrainedModel", name: str) -> bool:
    return model.config.model_type in _MAMBAS and name.rpartition(".")[2] == "out_proj"


def _is_one(name: str, ends: Iterable[str]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)


def _is_inside(name: str, modules: Collection[str]) -> bool:
    return any(f".{module}." in f".{name}." for module in modules)


def _unadapted(model: "PreTrainedModel", layers: Collection[str], saved: Collection[str]) -> str:
    """Return the largest parts without an adapter that hold matrices; embeddings and the head are none of them."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = model.get_output_embeddings()
    tables |= {id(p) for p in head.parameters()} if head is not None else set()
    busy = {part for name in layers for part in _above(name)}
    sizes, packed = dict[str, int](), unpacked_shapes(model)
    for full_name, parameter in model.named_parameters():
        name = clean(full_name)
        shape = packed.get(id(parameter), parameter.shape)
        matrix = sum(length > 1 for length in shape) > 1
        owner = name.rpartition(".")[0]
        if (
            not matrix
            or id(parameter) in tables
            or owner in layers
            or parameter.requires_grad
            or _is_inside(name, saved)
        ):
            continue
        part = next((above for above in _above(name) if above not in busy), name)
        group = numberless(part)
        sizes[group] = sizes.get(group, 0) + shape.numel()
    ordered = sorted(sizes, key=lambda group: -sizes[group])
    return listed([f"{group} ({sizes[group]:,} weights)" for group in ordered])


def _above(name: str) -> list[str]:
    """Return a name's modules from the outermost to itself."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
