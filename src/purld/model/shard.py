"""Load a student whose weights are divided among the ranks of a job, for models that one device cannot hold (FSDP2).

Loading and sharding are transformers' (`DistributedConfig`), gathering and summing torch's (`fully_shard`). The ranks
work on different prompts, see `purld.ranks.lockstep`. Everything else sees an ordinary model whose weights are
DTensors; those of an adapter are whole in every rank.
"""

from __future__ import annotations

import gc
import re
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, DistributedConfig

from purld import ranks
from purld.config.schema import Student
from purld.errors import UserError
from purld.model.pretrained import load_part
from purld.model.processor import reads_images
from purld.model.shard_units import meet_before_collectives
from purld.model.weights import build_skeleton, load_weights
from purld.model.whole_weights import divide_loaded_weights

_FREE, _KEEP = "free_full_weight", "keep_full_weight"  # transformers' words: after a forward pass

# By these the libraries know a sharded model. They expect ranks that run the same passes and save together, so from its
# loading on it is an ordinary model to them.
_MARKS = (
    "_device_mesh",
    "_fsdp_size",
    "_is_distributed_loading_by_transformers",
    "_is_fsdp_managed_module",
    "_mesh_manager",
    "_tp_size",
)


def divides_weights(student: Student) -> bool:
    """Return whether the student's weights are divided: as configured, where there are several ranks."""
    return student.shard is not None and ranks.count() > 1


def divides_gradients(student: Student) -> bool:
    """Return whether gradients are divided too: those of the student's own weights are, an adapter's are whole."""
    return divides_weights(student) and student.lora is None


def load_divided(model: str, dtype: torch.dtype | str) -> Any:
    """Load a model directory or hub id, this rank's shard of each weight; all ranks do so at the same time.

    Raises:
        UserError: models of this kind cannot be sharded.
        WeightsError, OSError, ValueError, KeyError, ImportError, RuntimeError: see `load_weights`.
    """
    gc.collect()  # sharded models are cycles, which would stay in memory beside the next one
    plan = sharding_plan(build_skeleton(load_part(AutoConfig, model)))
    ranks.barrier()
    with ranks.shown_to_libraries():
        settings = DistributedConfig(fsdp_size=ranks.count(), fsdp_plan=plan)
        loaded = load_weights(model, dtype, distributed_config=settings)
    loaded.config.distributed_config = None
    for mark in _MARKS:
        loaded.__dict__.pop(mark, None)
    meet_before_collectives(loaded)
    divide_loaded_weights(loaded)
    return loaded


def sharding_plan(skeleton: Any) -> dict[str, str]:
    """Return what transformers shards by itself in a model, with the body apart from the LM head.

    Args:
        skeleton: the model on the meta device.

    Raises:
        UserError: models of this kind cannot be sharded.
    """
    kind = type(skeleton).__name__
    if reads_images(skeleton.config):
        raise UserError(f"student.shard: fsdp does not work with models that read images, such as a {kind} yet.")
    if getattr(skeleton.config, "quantization_config", None) is not None:
        raise UserError("student.shard: weights that are quantized cannot be divided; leave student.shard out.")
    plan = {name: style for name, style in (skeleton.fsdp_plan or {}).items() if _matches_any(name, skeleton)}
    head = next((n for n, m in skeleton.named_modules() if m is skeleton.get_output_embeddings()), None)
    body = next((n for n, m in skeleton.named_modules() if m is skeleton.base_model), None)
    inside = [name for name, _ in skeleton.named_parameters() if body and name.startswith(f"{body}.")]
    uncovered = [name for name in inside if not any(_rule(rule).match(name) for rule in plan)]
    if not inside or uncovered or head is None:
        raise UserError(
            f"student.shard: transformers has no plan to shard all of a {kind}"
            f"{f', such as {uncovered[0]}' if uncovered else ''}; leave student.shard out, or take another student."
        )
    # The body and the head are run separately, so nothing of the body may be gathered and freed with the head.
    return {name: style if name == head else _FREE for name, style in plan.items()}


def _rule(name: str) -> re.Pattern[str]:
    """Return the pattern of the weights in the modules that a rule of a plan names; `*` is a layer's number."""
    return re.compile(re.escape(name).replace(r"\*", r"\d+") + r"(\.|$)")


def _matches_any(name: str, skeleton: nn.Module) -> bool:
    return any(_rule(name).match(weight) for weight, _ in skeleton.named_parameters(remove_duplicate=False))
