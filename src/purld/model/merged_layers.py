"""Merge adapters into the weights for as long as a model draws.

A decode step has few tokens, so on a GPU it takes as long as its kernels take to launch, and a layer with an adapter
launches about twice as many as one without. The same model with its adapters merged draws the same but for rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn

from purld import ranks
from purld.model.causal_lm import CausalLM, model_device
from purld.model.memory import FIT, device_memory

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def has_room_to_merge(model: CausalLM) -> bool:
    """Return whether `merged_layers` is worth its memory: on a GPU that holds the model, the copy, and its size again.

    The latter is for the caches of what is drawn. It goes by the device's whole memory and not by what is free, so that
    a run that goes on draws as it did. A CPU's decode step is bound by its arithmetic: there merging gained 4 to 13%
    (docs/performance.md), which is not worth another rounding.
    """
    if model_device(model).type != "cuda":
        return False
    copied = sum(cast(nn.Parameter, layer.base_layer.weight).nbytes for layer in _mergeable(model))
    return copied > 0 and sum(weight.nbytes for weight in model.parameters()) + 2 * copied <= FIT * device_memory()


@contextlib.contextmanager
def merged_layers(model: CausalLM) -> Iterator[None]:
    """Run `model` with its active adapters merged, and give it back its own weights, bit for bit, at the end.

    Layers that cannot be merged keep their adapters beside them: quantized ones, weights that processes divide, experts
    and other forms than a plain LoRA of a linear layer. Adapters that are switched off stay off. Takes a second copy of
    the merged layers' weights for as long as it lasts.
    """
    originals: list[tuple[Linear, nn.Parameter]] = []
    try:
        _merge(model, originals)
        yield
    finally:
        _restore(originals)


def _merge(model: CausalLM, originals: list[tuple[Linear, nn.Parameter]]) -> None:
    """Merge what can be merged, and add each layer with its own weights to `originals` before it is changed."""
    for layer in _mergeable(model):
        weight = cast(nn.Parameter, layer.base_layer.weight)
        merged = nn.Parameter(_merged_weight(layer, weight), requires_grad=False)
        originals.append((layer, weight))
        _use(layer, merged, list(layer.active_adapters))


def _mergeable(model: CausalLM) -> list[Linear]:
    """Return the layers to merge, of these very types: subclasses hold scales or packed numbers beside weights."""
    return [module for module in model.modules() if type(module) is Linear and _can_merge(module)]


def _can_merge(layer: Linear) -> bool:
    """Return whether a layer's adapters are on, lie beside it, and are plain products that its weights can take."""
    base: Any = layer.base_layer
    if layer.disable_adapters or layer.merged or type(base) is not nn.Linear or ranks.is_sharded(base.weight):
        return False
    other_form = any(name in layer.lora_variant or layer.lora_bias.get(name) for name in layer.active_adapters)
    return base.weight.dtype in _DTYPES and not other_form


@torch.no_grad()
def _merged_weight(layer: Linear, weight: Tensor) -> Tensor:
    """Return the weights of a layer with its active adapters added, summed in float32."""
    merged = weight.float()
    with torch.autocast(weight.device.type, enabled=False):
        for name in list(layer.active_adapters):
            if name in layer.lora_A:
                merged = merged + layer.get_delta_weight(name).float()
    return merged.to(weight.dtype)


def _restore(originals: list[tuple[Linear, nn.Parameter]]) -> None:
    """Give layers their own weights back, and forget them."""
    while originals:
        layer, weight = originals.pop()
        _use(layer, weight, [])


def _use(layer: Linear, weight: nn.Parameter, merged: list[str]) -> None:
    """Give a layer other weights, and say which adapters are in them.

    The parameter is replaced, not changed: another layer may share it, as embeddings share the LM head's.
    """
    cast(nn.Linear, layer.base_layer).weight = weight
    layer.merged_adapters = merged
