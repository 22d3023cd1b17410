"""Key-value caches that are read by many: by K continuations that leave nothing behind, or by K that decode on.

The keys and values are those of transformers' own cache; only who holds them where differs.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

_PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)


class ReadOnlyCache(Cache):
    """A cache of batch size 1 as B continuations see it; nothing of theirs is kept."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values (B, heads, P + L, width) of what is held and of a continuation."""
        layer = copy.copy(self.layers[layer_idx])
        layer.keys = layer.keys.expand(key_states.shape[0], -1, -1, -1)
        layer.values = layer.values.expand(key_states.shape[0], -1, -1, -1)
        keys, values = layer.update(key_states, value_states, *args, **kwargs)
        return keys, values


class _PreallocatedLayer(DynamicLayer):
    """A layer with room for what is to come: decoding writes into it, where `DynamicLayer` copies all at every token.

    Without gradients only.
    """

    def __init__(self, layer: DynamicLayer, copies: int, room: int) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = layer.dtype, layer.device, True
        self._all_keys, self.keys = _with_capacity(layer.keys, copies, room)
        self._all_values, self.values = _with_capacity(layer.values, copies, room)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keys and values (B, heads, P + L, width), the L new ones written behind the P old ones."""
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        self._all_keys[:, :, start:end] = key_states
        self._all_values[:, :, start:end] = value_states
        self.keys, self.values = self._all_keys[:, :, :end], self._all_values[:, :, :end]
        return self.keys, self.values


def repeat_with_capacity(cache: Any, copies: int, room: int) -> Any:
    """Repeat every row of a plain cache, in place, with room for `room` more tokens, to decode on."""
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = _PreallocatedLayer(layer, copies, room)
        else:  # a sliding window is short and drops what leaves it
            layer.batch_repeat_interleave(copies)
    return cache


def plain_kv_layers(cache: Any) -> list[Any]:
    """The layers of a cache of keys and values and nothing else.

    Raises:
        TypeError: there is something else in it, such as a recurrent state.
    """
    layers = list(getattr(cache, "layers", []))
    odd = {type(layer).__name__ for layer in layers if type(layer) not in _PLAIN_LAYERS}
    if odd or not layers:
        raise TypeError(f"its cache is not a plain one ({', '.join(sorted(odd)) or type(cache).__name__})")
    return layers


def _with_capacity(held: Tensor, copies: int, room: int) -> tuple[Tensor, Tensor]:
    """A (B * copies, heads, P + room, width) tensor, and the part of it that is filled."""
    rows, heads, length, width = held.shape
    everything = held.new_empty(rows * copies, heads, length + room, width)
    filled = everything[:, :, :length]
    filled.unflatten(0, (rows, copies)).copy_(held.unsqueeze(1))
    return everything, filled
