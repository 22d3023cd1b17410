"""Key-value caches for several continuations of prefixes: one that is only read, and one to decode into.

Keys and values are those of transformers' own cache; only their memory is managed differently.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

_PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)


def cache_argument(forward: Callable[..., Any]) -> str:
    """Return the name of the argument by which a model's `forward` takes its cache: transformers 5.24 renamed it."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


class ReadOnlyCache(Cache):
    """A cache of G prefixes as B continuations see it; their own keys and values are not kept.

    Args:
        layers: the prefixes' layers.
        owners: the B continuations' prefixes, in ascending order.
    """

    def __init__(self, layers: list[DynamicLayer], owners: Sequence[int]) -> None:
        super().__init__(layers=[*layers])
        self._owners = owners

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return keys and values (B, heads, P + L, width) of the P cached tokens and the L of a continuation."""
        layer = cast(DynamicLayer, copy.copy(self.layers[layer_idx]))
        keys, values = keys_and_values(layer)
        layer.keys = repeat_rows(keys, self._owners)
        layer.values = repeat_rows(values, self._owners)
        return layer.update(key_states, value_states, *args, **kwargs)


def repeat_rows(rows: Tensor, owners: Sequence[int]) -> Tensor:
    """Return the rows (B, ...) of (G, ...) with these indices, which ascend; without a copy if all are the same.

    Their gradient is summed in a fixed order, which that of an indexed tensor is not on a GPU.
    """
    counts = [(owner, len(list(same))) for owner, same in groupby(owners)]
    first, count = counts[0]
    if len(counts) == 1:
        return rows[first : first + 1].expand(count, *rows.shape[1:])
    if counts == [(index, count) for index in range(len(rows))]:
        return rows.repeat_interleave(count, dim=0)
    return torch.cat([rows[owner : owner + 1].expand(many, *rows.shape[1:]) for owner, many in counts])


class _PreallocatedLayer(DynamicLayer):
    """A layer with capacity for tokens to come: decoding writes into it, where `DynamicLayer` copies all every time.

    It works without gradients only.
    """

    def __init__(self, layer: DynamicLayer, copies: int, capacity: int) -> None:
        self.__dict__.update(layer.__dict__)  # whatever a version of transformers keeps there
        keys, values = keys_and_values(layer)
        self._all_keys, self.keys = _with_capacity(keys, copies, capacity)
        self._all_values, self.values = _with_capacity(values, copies, capacity)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Return keys and values (B, heads, P + L, width) with the L new ones written behind the P old ones."""
        start = keys_and_values(self)[0].shape[-2]
        end = start + key_states.shape[-2]
        self._all_keys[:, :, start:end] = key_states
        self._all_values[:, :, start:end] = value_states
        self.keys, self.values = self._all_keys[:, :, :end], self._all_values[:, :, :end]
        return self.keys, self.values


def repeat_with_capacity(cache: Cache, copies: int, capacity: int) -> Cache:
    """Repeat every row of a plain cache in place, with capacity for `capacity` more tokens.

    Returns:
        The same cache, to decode into.
    """
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = _PreallocatedLayer(layer, copies, capacity)
        else:  # a sliding window is short and drops the tokens that leave it
            cast(DynamicSlidingWindowLayer, layer).batch_repeat_interleave(copies)
    return cache


def plain_kv_layers(cache: object) -> list[DynamicLayer]:
    """Return the layers of a cache that holds keys and values and nothing else.

    Raises:
        TypeError: the cache holds something else, such as a recurrent state.
    """
    layers = list(getattr(cache, "layers", []))
    other_types = {type(layer).__name__ for layer in layers if type(layer) not in _PLAIN_LAYERS}
    if other_types or not layers:
        raise TypeError(f"its cache is not a plain one ({', '.join(sorted(other_types)) or type(cache).__name__})")
    return layers


def keys_and_values(layer: DynamicLayer) -> tuple[Tensor, Tensor]:
    """Return the keys and values of a layer that has been used.

    Raises:
        ValueError: it has not been used.
    """
    if layer.keys is None or layer.values is None:
        raise ValueError("this layer of the cache has not been used")
    return layer.keys, layer.values


def _with_capacity(held: Tensor, copies: int, capacity: int) -> tuple[Tensor, Tensor]:
    """Return a (B * copies, heads, P + capacity, width) tensor, and its part that is filled."""
    rows, heads, length, width = held.shape
    whole = held.new_empty(rows * copies, heads, length + capacity, width)
    filled = whole[:, :, :length]
    filled.view(rows, copies, heads, length, width).copy_(held.unsqueeze(1))
    return whole, filled
