"""Estimate what a run needs on this machine: memory for the student, and disk for its checkpoints."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import torch

from purld.config.methods import StageTwoSettings
from purld.config.schema import Config
from purld.model.student_check import StudentSizes
from purld.pipeline.plan_sheet import Plan
from purld.runs.files import nearest_folder

_CHECKPOINTS = 3  # two are kept, and the next one is complete before the oldest is deleted


def plan_machine(plan: Plan, config: Config, sizes: StudentSizes, run: Path) -> None:
    """Add memory and disk to the plan.

    Memory is that of weights, gradients and optimiser. Activations depend on the micro-batch sizes and come on top.
    """
    student, count, trained = config.student, sizes.weights, sizes.trained
    memory = training_bytes(config, sizes)
    mode = f"LoRA r={student.lora.r}, {trained / 1e6:,.1f} M trained" if student.lora else "all weights"
    plan.add_lines(
        "Student",
        f"{student.model}: {count / 1e6:,.1f} M parameters, {mode}",
        f"about {format_bytes(memory)} for weights, gradients and optimiser, activations on top",
    )
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
    student = config.student
    bytes_each = 2 if student.dtype != "float32" and student.lora and torch.cuda.is_available() else 4
    # The frozen p_sft (with an adapter, the base), and per trained weight its value, gradient and two moments.
    return sizes.weights * bytes_each + 16 * sizes.trained


def format_bytes(count: float) -> str:
    """Return a number of bytes in GiB, or in MiB if it is less than one."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{math.ceil(count / 2**20)} MiB"
