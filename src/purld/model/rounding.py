"""Make a model's rounding visible: run it again from embeddings that differ by one step of its precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from purld.model.causal_lm import CausalLM


@contextmanager
def rounded_otherwise(model: CausalLM) -> Iterator[None]:
    """Round what a model computes otherwise while the context lasts.

    Every embedding moves by one step of the precision that the model computes in, up or down by a fixed seed, so that
    all that follows is rounded from other values. The move itself is small beside the rounding of the layers. The same
    passes in the same order give the same bits.
    """
    generator = torch.Generator().manual_seed(0)

    def move(_: nn.Module, __: object, output: Tensor) -> Tensor:
        signs = torch.randint(0, 2, output.shape, generator=generator) * 2 - 1
        return output + output * _step(output) * signs.to(output)

    handle = model.get_input_embeddings().register_forward_hook(move)
    try:
        yield
    finally:
        handle.remove()


def _step(output: Tensor) -> float:
    """Return the step of the coarser of a tensor's precision and the one that is computed in."""
    device = output.device.type
    computed = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else output.dtype
    return max(torch.finfo(output.dtype).eps, torch.finfo(computed).eps)
