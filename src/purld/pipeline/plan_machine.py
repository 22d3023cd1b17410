"""Estimate what a run needs on this machine: memory for the student, and disk for its checkpoints."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoConfig

from purld.config.methods import StageTwoSettings
from purld.config.schema import Config
from purld.model.memory import (
    DecoderShape,
    MemoryNeed,
    UpdateSizes,
    device_memory,
    estimate_memory,
    largest_micro_batch,
)
from purld.model.pretrained import load_part
from purld.model.quantize import NF4_BYTES
from purld.model.student_check import StudentSizes
from purld.pipeline.plan_sheet import Plan, format_bytes
from purld.runs.files import nearest_folder
from purld.training.memory import UpdateForm, choose_form, describe_need, fits, update_sizes

_PROCESSES = (2, 4, 8)  # for which the plan says what each needs where they divide the weights
_CHECKPOINTS = 4  # three at most are kept, and the next one is complete before the oldest is deleted


@dataclass(frozen=True)
class UpdatePlan:
    """What the largest update of a run's Stage II needs in memory on this machine.

    Attributes:
        sizes: the update.
        micro_batch: members per backward pass, as configured.
        recompute: whether layers are computed again in the backward pass.
        needed: micro-batch size -> what is needed then, in one process.
        divided: by the number of processes that divide the weights, what is needed in each; empty if they do not.
    """

    sizes: UpdateSizes
    micro_batch: int
    recompute: bool
    needed: Callable[[int], MemoryNeed]
    divided: Mapping[int, MemoryNeed]

    @property
    def need(self) -> MemoryNeed:
        """Return what is needed as configured."""
        return self.needed(self.micro_batch)

    def largest_fitting(self, device: int) -> int | None:
        """Return the largest micro-batch that fits so many bytes; None if none does."""
        return largest_micro_batch(self.needed, device, self.sizes.members, self.sizes.groups)


def plan_machine(plan: Plan, config: Config, sizes: StudentSizes, run: Path, longest_prompt: int | None = None) -> None:
    """Add memory and disk to the plan; with the tokens of Stage II's longest prompt also what an update keeps."""
    student, count, trained = config.student, sizes.weights, sizes.trained
    memory = training_bytes(config, sizes)
    mode = f"LoRA r={student.lora.r}, {trained / 1e6:,.1f} M trained" if student.lora else "all weights"
    plan.add_lines(
        "Student",
        f"{student.model}: {count / 1e6:,.1f} M parameters, {mode}",
        f"about {format_bytes(memory)} for weights, gradients and optimiser, activations on top",
    )
    if longest_prompt is not None and (planned := plan_update(config, sizes, longest_prompt)) is not None:
        plan.add_lines("Student", *_describe_update(planned))
    stages = 2 if isinstance(config.align, StageTwoSettings) else 1
    saved = trained if student.lora else count  # without an adapter, frozen weights are saved too
    disk = 4 * (saved * (stages + _CHECKPOINTS) + 2 * trained * _CHECKPOINTS)
    free = shutil.disk_usage(nearest_folder(run)).free
    plan.add_lines(
        "Student", f"about {format_bytes(disk)} of disk at most, checkpoints included; {format_bytes(free)} are free"
    )
    if disk > free:
        plan.problems.append(
            f"{run}: the run needs about {format_bytes(disk)} of disk, and {format_bytes(free)} are free."
        )


def training_bytes(config: Config, sizes: StudentSizes) -> int:
    """Return the bytes that weights, gradients and optimiser take; activations come on top."""
    # The frozen p_sft (with an adapter, the base), and per trained weight its value, gradient and two moments.
    return _frozen_bytes(config, sizes) + 16 * sizes.trained


def _frozen_bytes(config: Config, sizes: StudentSizes) -> int:
    """Return the bytes of the weights that are not trained: with an adapter the base, and else p_sft."""
    student = config.student
    width = 2 if student.dtype != "float32" and student.lora and torch.cuda.is_available() else 4
    if student.quantize is None:
        return width * sizes.weights
    return int(NF4_BYTES * sizes.linear) + width * (sizes.weights - sizes.linear)


def plan_update(config: Config, sizes: StudentSizes, longest_prompt: int) -> UpdatePlan | None:
    """Return what the largest update of Stage II needs; None for a run without Stage II.

    Args:
        config: the configuration.
        sizes: the student's numbers of weights.
        longest_prompt: the tokens of Stage II's longest prompt.
    """
    align, student = config.align, config.student
    if not isinstance(align, StageTwoSettings):
        return None
    update = update_sizes(align, student, longest_prompt)
    # With all weights trained, p_sft is a second copy; an adapter comes on top of its base.
    frozen = _frozen_bytes(config, sizes)
    shape, width = DecoderShape.of(load_part(AutoConfig, student.model)), 2 if torch.cuda.is_available() else 4

    def need(form: UpdateForm, processes: int = 1) -> MemoryNeed:
        trained = sizes.trained if student.lora else math.ceil(sizes.trained / processes)
        gathered = 0 if processes == 1 else shape.gathered_weights * frozen // sizes.weights
        weights = math.ceil(frozen / processes) + gathered + 4 * trained
        return estimate_memory(shape, update, weights, trained, form.micro_batch, form.recompute, width)

    form = choose_form(align, update, need)
    micro = min(form.micro_batch, update.members * update.together(form.micro_batch))
    divided = {count: need(form, count) for count in _PROCESSES} if student.shard else {}
    return UpdatePlan(update, micro, form.recompute, lambda size: need(replace(form, micro_batch=size)), divided)


def _describe_update(planned: UpdatePlan) -> list[str]:
    """Describe what an update keeps in memory, and the micro-batch that fits this machine's device."""
    update, device = planned.sizes, device_memory()
    return [
        f"Stage II with prompts of {update.prompt:,} tokens, answers of {update.answer:,} and micro-batches of "
        f"{planned.micro_batch}{', layers computed again in the backward pass' if planned.recompute else ''}:",
        f"  about {describe_need(planned.need, format_bytes)}",
        _describe_fit(planned.need, planned.micro_batch, planned.largest_fitting(device), device),
        *_describe_divided(planned),
    ]


def _describe_divided(planned: UpdatePlan) -> list[str]:
    """Describe what each of several processes needs that divide the weights."""
    each = [f"{format_bytes(need.total)} in each of {count}" for count, need in planned.divided.items()]
    return [f"  divided among processes by student.shard: {', '.join(each)}"] if each else []


def _describe_fit(need: MemoryNeed, micro: int, largest: int | None, device: int) -> str:
    """Describe whether an update fits the device, and the micro-batch that does."""
    name = "the GPU" if torch.cuda.is_available() else "this machine"
    if fits(need, device):
        larger = f"; align.micro_batch_size={largest} would fit as well" if largest and largest > micro else ""
        return f"  fits {name}, which has {format_bytes(device)}{larger}"
    if largest is not None:
        return f"  does not fit {name}, which has {format_bytes(device)}; align.micro_batch_size={largest} would"
    return (
        f"  does not fit {name}, which has {format_bytes(device)}, in any micro-batch; set student.lora, or lower "
        "align.max_new_tokens or align.prompts_per_step"
    )
