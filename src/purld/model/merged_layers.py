"""Merge adapters into the weights for as long as a model draws.

A decode step has few tokens, so on a GPU it takes as long as its kernels take to launch, and a layer with an adapter
launches about twice as many as one without. The same model with its adapters merged draws the same but for rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn

from purld import ranks
from purld.model.at_once import release_memory
from purld.model.causal_lm import CausalLM, model_device
from purld.model.memory import FIT, device_memory
from purld.model.out_of_memory import is_out_of_memory

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def merged_on_gpu(model: CausalLM) -> AbstractContextManager[None]:
    """Return `merged_layers` of a model on a GPU with room for it; elsewhere a context that does nothing.

    Room is for the model, the copy, and as much again for the caches of what is drawn. It goes by the device's whole
    memory and not by what is free, so that a run that goes on draws as it did. A CPU's decode step is bound by its
    arithmetic: there merging gained 4 to 13%, which is not worth another rounding.
    """
    if model_device(model).type != "cuda":
        return contextlib.nullcontext()
    copied = sum(cast(nn.Parameter, layer.base_layer.weight).nbytes for layer in _mergeable(model))
    held = sum(weight.nbytes for weight in model.parameters())
    return merged_layers(model) if held + 2 * copied <= FIT * device_memory() else contextlib.nullcontext()


@contextlib.contextmanager
def merged_layers(model: CausalLM) -> Iterator[None]:
    """Run `model` with its active adapters merged, and give it back its own weights, bit for bit, at the end.

    Layers that cannot be merged keep their adapters beside them: quantized ones, weights that processes divide, experts
    and other forms than a plain LoRA of a linear layer. Adapters that are switched off stay off. Takes a second copy of
    the merged layers' weights for as long as it lasts; where that does not fit, nothing is merged.
    """
    originals: list[tuple[Linear, nn.Parameter]] = []
    try:
        try:
            for layer in _mergeable(model):
                weight = cast(nn.Parameter, layer.base_layer.weight)
                merged = nn.Parameter(_merged_weight(layer, weight), requires_grad=False)
                originals.append((layer, weight))
                _use(layer, merged, list(layer.active_adapters))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            _restore(originals)
            release_memory()
        yield
    finally:
        _restore(originals)


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
