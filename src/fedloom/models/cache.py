"""Keys and values of what a model has read: caches with room for what is written, from which rows can be dropped."""

from functools import lru_cache
from typing import Any

from torch import Tensor

from fedloom.models.probe import virtual_tokens


def row_cache(model: Any, room: int) -> Any:
    """Return an empty cache with room for so many tokens behind the prompts, from which rows can be dropped.

    Returns:
        None where the model makes a cache of its own, or one that holds more than keys and values.
    """
    if virtual_tokens(model):  # a cache is longer then than what was read and written
        return None
    from transformers import DynamicCache, GenerationMixin
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    plain = getattr(type(model), _PREPARE, None) is getattr(GenerationMixin, _PREPARE, None)
    if not plain or not model._supports_default_dynamic_cache():
        return None
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    kinds = {type(layer) for layer in cache.layers}
    if not kinds or not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
        return None
    roomy = _roomy()
    cache.layers = [roomy(room) if type(at) is DynamicLayer else at for at in cache.layers]
    return cache


def whole_cache(model: Any) -> Any:
    """Return an empty cache that keeps every token in every layer, those of layers with a window too."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    cache.layers = [DynamicLayer() for _ in cache.layers]
    return cache


_PREPARE = "_prepare_cache_for_generation"


@lru_cache(maxsize=1)
def _roomy() -> Any:
    from transformers.cache_utils import DynamicLayer

    class Roomy(DynamicLayer):  # type: ignore[misc]  # transformers has no types
        """Keys and values of a layer with room behind them: a token adds its own and copies no others."""

        def __init__(self, room: int) -> None:
            super().__init__()
            self._room = room

        def update(
            self, key_states: Tensor, value_states: Tensor, *_args: Any, **_: Any
        ) -> tuple[Tensor, Tensor]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
                rows, heads, length, _width = key_states.shape
                self._whole = [
                    one.new_empty((rows, heads, length + self._room, one.shape[-1]))
                    for one in (key_states, value_states)
                ]
                self.keys, self.values = (whole[:, :, :0] for whole in self._whole)
            end = self.keys.shape[2] + key_states.shape[2]
            for whole, new in zip(self._whole, (key_states, value_states), strict=True):
                whole[:, :, end - new.shape[2] : end] = new
            self.keys, self.values = (whole[:, :, :end] for whole in self._whole)
            return self.keys, self.values

        def batch_select_indices(self, indices: Tensor) -> None:
            if not self.is_initialized:  # its model takes another layer's
                return
            end = self.keys.shape[2]
            self._whole = [whole[indices] for whole in self._whole]
            self.keys, self.values = (whole[:, :, :end] for whole in self._whole)

    return Roomy


@lru_cache(maxsize=1)
def cache_name() -> str:
    """Return what this version of transformers calls the cache that `generate` takes."""
    from transformers.generation import GenerateDecoderOnlyOutput

    fields = GenerateDecoderOnlyOutput.__dataclass_fields__
    return "cache" if "cache" in fields else "past_key_values"
