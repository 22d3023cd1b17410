"""The units of a sharded model, such as its layers: how each gathers its weights and sums its gradients.

Before each collective of torch's FSDP the ranks meet by `purld.ranks.lockstep`; a rank that does not need it takes part
with its shard, or with zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from purld import ranks
from purld.errors import UserError
from purld.model.out_of_memory import is_out_of_memory

_dist: Any = torch.distributed  # its stubs leave out what it exports
_sharded: WeakSet[Any] = WeakSet()  # models


def meet_before_collectives(model: nn.Module) -> None:
    """Let the ranks meet before each collective of a model that was just sharded; its gradients become sums."""
    root: Any = model
    root.set_reshard_after_forward(True)  # nothing stays gathered that an optimiser could leave behind
    root._get_fsdp_state()._lazy_init()
    groups = {id(group): group for module in _sharded_modules(model) for group in _groups(module)}
    _join_tied_weights([weight for group in groups.values() for weight in group.fsdp_params])
    units = {key: _Unit(group, index == 0) for index, (key, group) in enumerate(groups.items())}
    for module in _sharded_modules(model):
        for group in _groups(module):
            unit = units[id(group)]
            module.set_custom_all_gather(_Collective(unit.gather))
            module.set_custom_reduce_scatter(_Collective(unit.reduce))
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    _sharded.add(model)


def end_broken_passes() -> None:
    """Bring sharded models whose pass an error has ended back to where a pass can begin."""
    for model in _sharded:
        model.reset_iter_state()


@contextmanager
def _without_second_try() -> Iterator[None]:
    """Let a failure end the job: the other ranks are in the collective that this rank would begin again."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            "the device's memory is too small to gather a layer's weights (student.shard); lower the batch sizes of "
            "the stage, or start more processes."
        ) from None


def _sharded_modules(model: nn.Module) -> list[Any]:
    """Return the modules with units of their own, the root, whose unit is what no other has, last."""
    found = [module for module in model.modules() if isinstance(module, FSDPModule)]
    return [*found[1:], *found[:1]]


def _groups(module: Any) -> list[Any]:
    return list(module._get_fsdp_state()._fsdp_param_groups)


def _join_tied_weights(weights: list[Any]) -> None:
    """Let a weight that two modules share have one memory in both of their units.

    torch pads a shard once for each unit, and one of them would keep the weight as it was before it was trained.
    """
    used = {_address(weight.sharded_param.to_local()) for weight in weights}
    padded = {id(w.sharded_param): w._sharded_param_data for w in weights if _address(w._sharded_param_data) in used}
    for weight in weights:
        weight._sharded_param_data = padded.get(id(weight.sharded_param), weight._sharded_param_data)


def _address(values: Tensor) -> int:
    return values.untyped_storage().data_ptr()


class _Collective:
    """A collective as torch's FSDP takes it: `set_custom_all_gather`, `set_custom_reduce_scatter`."""

    def __init__(self, run: Callable[..., None]) -> None:
        self._run = run

    def allocate(self, size: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return memory for the collective."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, **options: Any) -> None:
        """Meet the other ranks and run the collective, which is over for the current stream when this returns."""
        self._run(output_tensor, input_tensor, group)


class _Unit:
    """The weights of one unit, as flat shards, one after another; shards are padded to one size in all ranks.

    Args:
        group: torch's parameter group.
        begins_pass: whether a pass through the model begins with this unit.
    """

    def __init__(self, group: Any, begins_pass: bool) -> None:
        self._group = group
        self._begins_pass = begins_pass
        self._number = ranks.lock_step().add_unit(self)

    def gather(self, whole: Tensor, shard: Tensor, group: Any) -> None:
        """Gather the ranks' shards."""
        backward = torch._C._current_graph_task_id() != -1
        ranks.lock_step().gather(
            self._number,
            lambda: _dist.all_gather_single(whole, shard, group=group),
            self._begins_pass and not backward,
        )

    def reduce(self, shard: Tensor, whole: Tensor, group: Any) -> None:
        """Sum the ranks' gradients, and keep this rank's shard of them.

        Raises:
            UserError: some of the unit's trained weights have no gradient; other ranks could not know which.
        """
        if whole.numel() != shard.numel() * ranks.count() or shard.numel() != sum(self._trained_sizes().values()):
            raise UserError(
                "student.shard: fsdp does not work with this student: some weights of a layer get no gradient; "
                "leave student.shard out, or set student.lora."
            )
        ranks.lock_step().reduce(self._number, lambda: _dist.reduce_scatter_single(shard, whole, group=group))

    @_without_second_try()
    def lend(self) -> None:
        """See `purld.ranks.lockstep.Unit`."""
        parts = [weight._sharded_param_data for weight in self._group.fsdp_params]
        if len({part.dtype for part in parts}) > 1:
            parts = [part.view(torch.uint8) for part in parts]
        shard = torch.cat(parts)
        whole = shard.new_empty(shard.numel() * ranks.count())
        _dist.all_gather_single(whole, shard, group=self._process_group())

    @_without_second_try()
    @torch.no_grad()
    def add_gradients(self) -> None:
        """See `purld.ranks.lockstep.Unit`."""
        sizes = self._trained_sizes()
        like = next(iter(sizes))._sharded_param_data
        _wait_for_device(like)
        shard = like.new_empty(sum(sizes.values()))
        _dist.reduce_scatter_single(shard, like.new_zeros(shard.numel() * ranks.count()), group=self._process_group())
        for weight, part in zip(sizes, shard.split(list(sizes.values())), strict=True):
            gradient = part[: math.prod(weight.sharded_size)].view(weight.sharded_size)
            held = weight.sharded_param.grad
            if held is None:
                weight.sharded_param.grad = weight.to_sharded_dtensor(gradient)
            else:
                held.to_local().add_(gradient)
        _wait_for_device(like)

    def _trained_sizes(self) -> dict[Any, int]:
        """Return the trained weights with the number of elements of their padded shards."""
        trained = [weight for weight in self._group.fsdp_params if weight.sharded_param.requires_grad]
        return {weight: weight.padded_sharded_param_size.numel() for weight in trained}

    def _process_group(self) -> Any:
        return self._group.mesh_info.shard_process_group


def _wait_for_device(like: Tensor) -> None:
    """Wait for all streams of a GPU: torch adds a unit's own gradients in a stream that is not known here."""
    if like.is_cuda:
        torch.cuda.synchronize(like.device)
