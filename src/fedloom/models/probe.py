"""What a model is asked about itself: architectures differ, and what their names promise is no answer."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fedloom.core.randomness import seeded
from fedloom.models.found import found

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LENGTH = 8
_ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-5}
"""By how much a place may move, as a share of itself, where kernels sum in another order for other tokens; of half
precision 0.03."""


def check_causal(model: "PreTrainedModel", name: str) -> None:
    """Refuse a model that cannot learn to write on.

    Raises:
        ValueError: where it sees the tokens it is asked for, gives NaN, or cannot be called with text alone.
    """
    with found(f"model.name {name} cannot be called with a plain row of {_LENGTH} tokens"):
        broken = bool(_before_the_last(model, plain_ids(model, _LENGTH)[None]).isnan().any())
        ahead = not broken and looks_ahead(model)
    if broken:
        raise ValueError(
            f"model.name {name} answers a plain row with NaN: its weights are broken, or too large for model.dtype"
        )
    if ahead:
        raise ValueError(
            f"model.name must be a causal language model, but {name} ({type(model).__name__}) sees the tokens after"
            " the one it is asked for, as encoders do"
        )


def looks_ahead(model: "PreTrainedModel") -> bool:
    """Return whether a place sees tokens after it, as encoders do that load as causal models.

    Another last token must leave the places before it as they are, bit by bit. Experts that share a product with other
    tokens may round otherwise; there no gradient may reach the last token from the places before.
    """
    ids = plain_ids(model, _LENGTH + 1)
    rows = ids[None, :-1], torch.cat([ids[:-2], ids[-1:]])[None]
    before, after = (_before_the_last(model, row) for row in rows)
    if torch.equal(before, after):
        return False
    far = (before - after).float().norm() / before.float().norm()
    if bool(far > _ROUNDING.get(before.dtype, 0.03)):
        return True
    return _gradient_from_behind(model, rows[0]) > 1e-5


def keeps_padding_out(model: "PreTrainedModel") -> bool:
    """Return whether a row that is padded on the left, under a mask, is as if it were alone; recurrent ones may not.

    A model is asked once: what it does with padding is its architecture's, and asking costs several answers' tokens.
    """
    if model not in _PADDING:
        _PADDING[model] = _keeps_padding_out(model)
    return _PADDING[model]


_PADDING: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@torch.no_grad()
def _keeps_padding_out(model: "PreTrainedModel") -> bool:
    ids = plain_ids(model, _LENGTH)[None]
    mask = torch.ones_like(ids)
    padded = torch.cat([ids[:, :3], ids], dim=1)
    inputs = {"input_ids": padded, "attention_mask": torch.cat([0 * mask[:, :3], mask], dim=1)}
    places = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with asked(model):
        alone = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0, -1]
        try:
            beside = model(**inputs, position_ids=places, use_cache=False).logits[0, -1]
        except TypeError:  # it takes no positions
            beside = model(**inputs, use_cache=False).logits[0, -1]
    far = (beside - alone).float().norm() / alone.float().norm()
    return bool(far < (1e-4 if alone.dtype in _ROUNDING else 0.03))


@torch.no_grad()
def draws(model: "PreTrainedModel") -> bool:
    """Return whether a forward in training mode takes random numbers, for dropout or in a way of its own, as routers may."""
    with asked(model):
        model.train()
        before = _states()
        model(input_ids=plain_ids(model, _LENGTH)[None], use_cache=False)
        return not all(map(torch.equal, before, _states()))


def _states() -> list[Tensor]:
    return [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]


@torch.no_grad()
def _before_the_last(model: nn.Module, row: Tensor) -> Tensor:
    with asked(model):
        logits: Tensor = model(input_ids=row, use_cache=False).logits[0, :-1]
    return logits


def _gradient_from_behind(model: "PreTrainedModel", row: Tensor) -> float:
    """Return what the last token's embedding has to do with the places before it, as a share of what theirs have."""
    seen: list[Tensor] = []

    def watch(_module: nn.Module, _inputs: Any, out: Tensor) -> Tensor:
        seen.append(out.detach().requires_grad_())
        return seen[-1]

    handle = model.get_input_embeddings().register_forward_hook(watch)
    try:
        with asked(model), torch.enable_grad():
            logits = model(input_ids=row, use_cache=False).logits[0, :-1]
            (gradient,) = torch.autograd.grad(logits.float().square().sum(), seen[:1])
    finally:
        handle.remove()
    norms = gradient[0].float().norm(dim=-1)
    return float(norms[-1] / norms[:-1].norm())


def plain_ids(model: "PreTrainedModel", count: int) -> Tensor:
    """Return (count,) tokens from all over the vocabulary, none of which the configuration names for another use."""
    rows = model.get_input_embeddings().weight.shape[0]
    taken = set(_special(model.config.to_dict()))
    plain = [token for token in range(rows) if token not in taken] or [0]
    every = max(len(plain) // count, 1)
    chosen = [plain[at * every % len(plain)] for at in range(count)]
    return torch.tensor(chosen, device=model.device)


def virtual_tokens(model: nn.Module) -> int:
    """Return how many learnt tokens stand before every row that a model reads."""
    encoder = getattr(model, "prompt_encoder", None)
    return 0 if encoder is None else int(encoder["default"].embedding.num_embeddings)


@contextmanager
def asked(model: nn.Module) -> Iterator[None]:
    """Let a model answer in evaluation mode; modes and random numbers are as before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with seeded(0):
            yield
    finally:
        for module, training in modes:
            module.training = training


def _special(config: Mapping[Any, Any]) -> Iterator[int]:
    """Yield the tokens a configuration names, those of its parts too."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _special(value)
        elif "token" in str(key) and ("id" in str(key) or "index" in str(key)):
            listed = value if isinstance(value, list) else [value]
            yield from (token for token in listed if isinstance(token, int))
