"""Keep the inputs of a model's layers alone for the backward pass, and compute what is in them a second time there.

The gradient is the same: the layers get the same inputs, dropout is off, and a cache that they read does not change.
Memory then grows by one hidden state per token and layer, where it grew by everything that a layer computes.

transformers' own gradient checkpointing switches the cache off, because a layer that is run again would write into it
again. Here continuations read a cache that cannot be written to, and the prompt is run with one that each layer fills
once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer


@contextlib.contextmanager
def recomputed_layers(body: nn.Module) -> Iterator[None]:
    """Run a body's layers so that the backward pass computes them again; without a graph nothing changes.

    Their `forward` is replaced, not `__call__`: hooks on a layer, such as those that gather its weights, run once.
    """
    layers = list(_outermost_layers(body))
    replaced = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.__dict__["forward"] = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer, forward in zip(layers, replaced, strict=True):
            del layer.__dict__["forward"]
            if forward is not None:
                layer.__dict__["forward"] = forward


def can_recompute(body: nn.Module) -> bool:
    """Return whether a model has layers that can be computed again; else `recomputed_layers` changes nothing."""
    return next(_outermost_layers(body), None) is not None


class PromptCache(Cache):
    """A cache that each layer fills once; a layer that is computed again gets the same keys and values back."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(layers=DynamicCache(config=config).layers)
        self._config = config

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return keys and values (B, heads, P, width) of the prompt's P tokens, and hold them the first time."""
        if layer_idx < len(self.layers) and not getattr(self.layers[layer_idx], "is_initialized", False):
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        again = DynamicCache(config=self._config)
        return again.update(key_states, value_states, layer_idx, *args, **kwargs)


def _outermost_layers(module: nn.Module) -> Iterator[GradientCheckpointingLayer]:
    for child in module.children():
        if isinstance(child, GradientCheckpointingLayer):
            yield child
        else:
            yield from _outermost_layers(child)
