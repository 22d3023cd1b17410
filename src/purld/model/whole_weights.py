"""The whole weights and optimiser state of a sharded model: gathered to be saved, and divided when they are read.

What is written is what one process would write, so any number of processes, and other tools, can read it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from purld import ranks
from purld.model.causal_lm import CausalLM, has_adapters


def whole_weights(model: CausalLM) -> dict[str, Tensor] | None:
    """Gather the weights of a sharded model by name; all ranks call this at the same time.

    Returns:
        The whole weights on the CPU in rank 0, an empty dictionary in the other ranks, and None where what is saved of
        the model is not sharded: an adapter, or a model that every rank holds.
    """
    if has_adapters(model) or not any(map(ranks.is_sharded, model.parameters())):
        return None
    ranks.barrier()
    gathered: dict[int, Tensor] = {}  # weights that modules share stay one
    whole: dict[str, Tensor] = {}
    for name, value in cast(nn.Module, model).state_dict().items():
        key = id(value) if not ranks.is_sharded(value) else value.to_local().data_ptr() or id(value)
        if key not in gathered:
            gathered[key] = _gather(value)
        whole[name] = gathered[key]
    return whole if ranks.is_first() else {}


@contextlib.contextmanager
def whole_optimizer_state(optimizer: Optimizer) -> Iterator[None]:
    """Let an optimiser of sharded weights give its whole state, on the CPU, in rank 0, for the block.

    All ranks enter at the same time.
    """
    state: dict[str, Any] = optimizer.state_dict()
    if not any(ranks.is_sharded(value) for values in state["state"].values() for value in values.values()):
        yield
        return
    gathered = {i: {name: _gather(value) for name, value in values.items()} for i, values in state["state"].items()}
    handle = optimizer.register_state_dict_post_hook(lambda _, plain: {**plain, "state": gathered})
    try:
        yield
    finally:
        handle.remove()


def divide_loaded_weights(model: nn.Module) -> None:
    """Let a sharded model take whole weights from a checkpoint, of which it keeps this rank's shards."""

    def divide(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
        for part in module.modules():
            if hasattr(part, "reshard"):  # only then are its parameters the sharded ones
                part.reshard()
        for name, weight in module.named_parameters(remove_duplicate=False):
            if (value := state.get(prefix + name)) is not None:
                state[prefix + name] = _divide(value, weight)

    model.register_load_state_dict_pre_hook(divide)


def divide_loaded_state(optimizer: Optimizer) -> None:
    """Let an optimiser of sharded weights take a whole state from a checkpoint, and keep this rank's shards of it."""

    def divide(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        held: Mapping[int, Any] = state["state"]
        divided = {i: {n: _divide(v, weights[i]) for n, v in values.items()} for i, values in held.items()}
        return {**state, "state": divided}

    optimizer.register_load_state_dict_pre_hook(divide)


def _gather(value: Any) -> Any:
    """Return a value that is no sharded tensor as it is, and of one the whole: in rank 0, empty in the others."""
    if not ranks.is_sharded(value):
        return value
    whole = value.full_tensor()
    return whole.cpu() if ranks.is_first() else torch.empty(0)


def _divide(value: Any, weight: Any) -> Any:
    """Return this rank's shard of a whole tensor of the shape of a sharded weight; other values as they are."""
    if (
        not ranks.is_sharded(weight)
        or ranks.is_sharded(value)
        or not isinstance(value, Tensor)
        or value.shape != weight.shape
    ):
        return value
    from torch.distributed.tensor import distribute_tensor

    local = value.to(weight.device)
    return distribute_tensor(local, weight.device_mesh, weight.placements, src_data_rank=None)
