"""What a run takes of this machine: memory for the student, disk for its checkpoints."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import torch
from transformers import AutoConfig

from purld.config.methods import StageTwoSettings
from purld.config.schema import Config, Student
from purld.errors import UserError
from purld.model.load import count_parameters, make_trainable
from purld.model.processor import auto_model_class
from purld.pipeline.plan_sheet import Plan

_CHECKPOINTS = 3  # two are kept, and the next is whole before the older one goes


def plan_machine(plan: Plan, config: Config, run: Path) -> None:
    """Weights and optimiser; activations come on top and follow the micro-batch sizes.

    Raises:
        UserError: the adapter does not fit the student.
    """
    student = config.student
    count, trained = _parameters(student)
    bytes_each = 2 if student.dtype != "float32" and student.lora and torch.cuda.is_available() else 4
    # The frozen p_sft, which under an adapter is the base, and what trains: weights, gradient and two moments.
    memory = count * bytes_each + 16 * trained
    mode = f"LoRA r={student.lora.r}, {trained / 1e6:,.1f} M trained" if student.lora else "all weights"
    plan.add(
        "Student",
        f"{student.model}: {count / 1e6:,.1f} M parameters, {mode}",
        f"about {_size(memory)} for weights, gradients and optimiser, activations on top",
    )
    stages = 2 if isinstance(config.align, StageTwoSettings) else 1
    saved = trained if student.lora else count  # what is left alone is saved all the same, but for an adapter's base
    disk = 4 * (saved * (stages + _CHECKPOINTS) + 2 * trained * _CHECKPOINTS)
    free = shutil.disk_usage(_existing(run)).free
    plan.add("Student", f"about {_size(disk)} of disk at most, checkpoints included; {_size(free)} are free")
    if disk > free:
        plan.problems.append(f"{run}: the run needs about {_size(disk)} of disk, and {_size(free)} are free.")


def _parameters(student: Student) -> tuple[int, int]:
    """How many weights the student has, and how many of them, or beside them, are trained."""
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(student.model)
        model = auto_model_class(config).from_config(config)
        count = count_parameters(model)
        try:
            model = make_trainable(student, model)
        except ValueError as error:
            raise UserError(f"student.lora: no adapter can be made ({' '.join(str(error).split())[:200]}).") from None
    return count, sum(p.numel() for p in model.parameters() if p.requires_grad)


def _existing(path: Path) -> Path:
    """The nearest folder on the way to `path` that is there."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def _size(count: float) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{math.ceil(count / 2**20)} MiB"
