"""What of an upload is a sum over tokens of what a layer was given, space by space.

The gradient of a linear layer's weight is sum_t d_t x_t^T: its rows are sums of the layer's inputs x_t. That of LoRA's A is
sum_t (B^T d_t) x_t^T, of as many rows as the rank, and exactly 0 while B is; that of B is sum_t d_t (A x_t)^T, whose rows
are sums of A x_t, which whoever knows A can make of every word; so is that of a core between frozen factors. In seed space
the server knows every direction and adds up sum_k c_k z_k. A prompt's rows hold no inputs of words, nor do the factors of
IA3, of which the sizes alone are compared with those that a word brings about: they are tested, and not expected to tell.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedloom.audit.records import Case
from fedloom.audit.vocabulary import Entry, entries, inputs, size_of
from fedloom.core.protocols import Params
from fedloom.core.seed_sequences import COEFFICIENTS
from fedloom.models.introspection import adapted_layer, core_layers, embedding
from fedloom.spaces.live import Live, every
from fedloom.spaces.seed_space import SeedSpace
from fedloom.wire.wire_settings import ValueType

_ROUNDING: Mapping[ValueType, float] = {
    "float32": 0.0,
    "bfloat16": 2.0**-9,
    "float16": 2.0**-12,
    "fp8": 2.0**-5,
    "int8": 0.007,
    "nf4": 0.08,
    "int4": 0.12,
}
"""About how far an entry is from what was meant, as a share of the entries' root mean square."""


@dataclass(frozen=True)
class Part:
    """Rows that are sums of what words bring about, and what each word does."""

    rows: Tensor
    """(rows, width) float32"""
    words: Tensor
    """(vocabulary, width) float32"""
    floor: float
    """Singular value that rounding alone may bring about."""


@dataclass(frozen=True)
class Window:
    """One way into an upload: layers whose inputs words are held against, together."""

    through: str
    """In words, as in `A` or `weights`."""
    parts: Sequence[Part] = ()
    """A word has to fit all of them."""
    moved: Tensor | None = None
    """(vocabulary,) how far each word's own row moved, where there are such rows."""

    @property
    def is_still(self) -> bool:
        """Return whether nothing moved at all, to the bit."""
        moved = [part.rows for part in self.parts]
        moved += [] if self.moved is None else [self.moved]
        return not any(bool(one.any()) for one in moved)


def windows(case: Case, download: Params, delta: Params) -> list[Window]:
    """Return the ways into a move of the space's coordinates.

    Args:
        case: The run.
        download: Where the clients began.
        delta: How far that moved, as the server reads it.
    """
    space = case.session.space
    held = whole(space, download)
    delta = {name: moved for name, moved in delta.items() if _fits(moved, held.get(name))}
    with space.standing_at(held):
        if isinstance(space, SeedSpace):
            return _of_seeds(space, delta)
        return _of_tensors(case, space, held, delta)


def whole(space: Live | SeedSpace, download: Params) -> Params:
    """Return coordinates of all tensors of a space: those that were sent, of the others the start that everybody holds.

    What the algorithm sends beside, and tensors of another rank than the space's, are left out.
    """
    return {
        name: download[name] if _fits(tensor, download.get(name)) else tensor
        for name, tensor in space.start().items()
    }


def _fits(tensor: Tensor, other: Tensor | None) -> bool:
    return other is not None and other.shape == tensor.shape


def _of_seeds(space: SeedSpace, delta: Params) -> list[Window]:
    shapes = space.directions.shapes
    known = _known(space.model, [name.removesuffix(".weight") for name in shapes])
    c = delta[COEFFICIENTS]
    used = c.nonzero().flatten().tolist()
    parts = []
    for entry, words in known.items():
        name = f"{entry.name}.weight"
        nothing = torch.zeros(shapes[name])
        if name in shapes and len(shapes[name]) == 2 and shapes[name][1] == words.shape[1]:
            rows = space.directions.shift(name, nothing, used, c[used].tolist(), out=nothing)
            parts.append(Part(rows, words, 0.0))
    return [Window("directions", _stacked(parts))] if parts else []


def _of_tensors(case: Case, space: Live, download: Params, delta: Params) -> list[Window]:
    model, start = space.model, space.absolute(download)
    rounding = _ROUNDING[case.recipe.wire.upload if case.recipe.secure is None else "float32"]

    def part(name: str, rows: Tensor, words: Tensor) -> Part:
        left = start[name].float().square().mean().sqrt() * 2.0**-24
        lost = rows.float().square().mean().sqrt() * rounding
        wide = sum(size**0.5 for size in rows.shape)
        return Part(rows.float(), words, float(left.hypot(lost)) * wide)

    known = _known(model, sorted({_layer(name) for name in delta}))
    cores = {layer.name: layer.a.detach().float().cpu() for layer in core_layers(model)}
    whole, first, second, sizes, core = (list[Part]() for _ in range(5))
    for entry, words in known.items():
        if (a := f"{entry.name}.lora_A.weight") in delta:
            first.append(part(a, delta[a], words))
        if (b := f"{entry.name}.lora_B.weight") in delta and a in start:
            second.append(part(b, delta[b], words @ start[a].float().T))
        if (r := f"{entry.name}.lora_B.core") in delta and entry.name in cores:
            core.append(part(r, delta[r], words @ cores[entry.name].T))
        if (f := f"{entry.name}.ia3_l") in delta and delta[f].shape[0] > 1:
            given = _given(entry.module, words).abs()
            sizes.append(part(f, delta[f].flatten()[None].abs(), given))
        if (w := f"{entry.name}.weight") in delta and delta[w].dim() == 2:
            rows = delta[w] if delta[w].shape[1] == words.shape[1] else delta[w].T
            whole.append(part(w, rows, words))
    found = {"weights": _stacked(whole), "A": _stacked(first), "B": second, "core": core}
    made = [Window(name, parts) for name, parts in {**found, "factors": sizes}.items() if parts]
    table = embedding(model).get_parameter("weight")
    names = [name for name, tensor in every(model).items() if tensor is table]
    if names and names[0] in delta:
        made.append(Window("embedding", moved=delta[names[0]].float().norm(dim=1)))
    for name, rows in delta.items():
        if name.startswith("prompt_encoder.") and rows.shape[-1] == table.shape[1]:
            made.append(Window("prompt", [part(name, rows, table.detach().float().cpu())]))
    return made


def _known(model: nn.Module, names: Sequence[str]) -> dict[Entry, Tensor]:
    """Return what linear layers are given for every word, where that is known; one tensor where it is the same."""
    found: dict[Entry, Tensor] = {}
    for entry in entries(model, names):
        if "norm" in entry.name.rpartition(".")[2]:
            continue
        words = inputs(model, entry)
        found[entry] = next((one for one in found.values() if torch.equal(one, words)), words)
    return found


def _stacked(parts: Sequence[Part]) -> list[Part]:
    """Return parts with the rows of those together whose words are the same."""
    together: dict[int, list[Part]] = {}
    for part in parts:
        together.setdefault(id(part.words), []).append(part)
    return [
        Part(
            torch.cat([part.rows for part in same]),
            same[0].words,
            sum(part.floor**2 for part in same) ** 0.5,
        )
        for same in together.values()
    ]


@torch.no_grad()
def _given(module: nn.Module, words: Tensor) -> Tensor:
    """Return what a layer gives for every word, (vocabulary, out) float32."""
    parameter = next(module.parameters())
    given: Tensor = module(words.to(parameter))
    return given.float().cpu()


def _layer(name: str) -> str:
    """Return the name of the layer that a tensor belongs to."""
    layer = adapted_layer(name)
    return layer.removesuffix(".weight") if layer == name else layer


def vocabulary_of(case: Case) -> int:
    """Return how many words the model knows."""
    return size_of(case.session.space.model)
