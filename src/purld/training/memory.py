"""Fit an update of Stage II into the device's memory, before it starts and after a device has run out of it.

The gradient depends neither on the size of micro-batches nor on what is computed again, so a run may change both.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from torch import nn

from purld import ranks
from purld.config.engines import VllmEngine
from purld.config.methods import SamplingSettings, StageTwoSettings
from purld.config.schema import Student
from purld.errors import PlainWarning, UserError
from purld.methods.table import METHODS
from purld.model.at_once import release_memory
from purld.model.load import Roles
from purld.model.memory import FIT, DecoderShape, MemoryNeed, UpdateSizes, device_memory, estimate_memory
from purld.model.recompute import can_recompute
from purld.training.group_update import GroupUpdate
from purld.training.rollout import AnchoredPrompt


def update_sizes(settings: StageTwoSettings, student: Student, longest_prompt: int) -> UpdateSizes:
    """Return the sizes of the largest update that a method's settings allow, in one of the ranks that share it."""
    row = METHODS[getattr(settings, "method", "")].stage_two
    has_anchor = settings.anchor_joins or (row is not None and row.anchor_member)
    drawn = settings.max_new_tokens if isinstance(settings, SamplingSettings) else 0
    answer = max(drawn, student.max_anchor_tokens if has_anchor else 0)
    caches = 0 if isinstance(student.engine, VllmEngine) else largest_share(settings) * settings.drawn
    return UpdateSizes(longest_prompt, answer, settings.drawn + has_anchor, caches)


def largest_share(settings: StageTwoSettings) -> int:
    """Return how many of a step's prompts one rank has at most."""
    return math.ceil(settings.prompts_per_step / ranks.count())


def needs_recompute(
    settings: StageTwoSettings, student: Student, roles: Roles, questions: Sequence[AnchoredPrompt], half: bool
) -> bool:
    """Return whether layers are computed again in the backward pass: as configured, or where memory asks for it.

    Args:
        settings: the method's section of the configuration.
        student: the student's section.
        roles: the models in memory.
        questions: the prompts of the stage.
        half: whether layers compute in half precision.
    """
    if settings.recompute != "auto":
        return settings.recompute == "always"
    if not can_recompute(cast(nn.Module, roles.policy)):
        return False
    sizes = update_sizes(settings, student, max(len(question.encoded) for question in questions))
    weights = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in roles.weights()}
    need = estimate_memory(
        DecoderShape.of(roles.policy.config),
        sizes,
        sum(weights.values()),
        sum(p.numel() for p in roles.policy.parameters() if p.requires_grad),
        settings.micro_batch_size,
        recompute=False,
        width=2 if half else 4,
    )
    return not fits(need)


def fits(need: MemoryNeed, device: int | None = None) -> bool:
    """Return whether an update fits a device, with room for fragments and kernels; this machine's if none is given."""
    return need.total <= FIT * (device_memory() if device is None else device)


def use_less_memory(update: GroupUpdate, step: int, with_graph: bool) -> GroupUpdate:
    """Return an update that needs less memory: layers computed again first, then half the micro-batch.

    Args:
        update: what did not fit.
        step: the step that is under way.
        with_graph: whether a backward pass was under way; without one, nothing is kept that could be computed again.

    Raises:
        UserError: it needs as little as it can already.
    """
    release_memory()
    if with_graph and not update.recompute and can_recompute(cast(nn.Module, update.roles.policy)):
        smaller, how = replace(update, recompute=True), "computes layers again in the backward pass (align.recompute)"
    elif update.micro_batch_size > 1:
        size = update.micro_batch_size // 2
        smaller, how = replace(update, micro_batch_size=size), f"goes on with align.micro_batch_size={size}"
    else:
        raise UserError(
            f"Stage II, step {step}: the device's memory is too small, even for micro-batches of one answer; lower "
            "align.max_new_tokens or student.max_prompt_tokens, or train less (student.lora). A run that is started "
            "again goes on from its last checkpoint."
        )
    warnings.warn(
        f"Stage II, step {step}: out of the device's memory; the stage {how}, which does not change its result.",
        PlainWarning,
        stacklevel=2,
    )
    return smaller


def describe_need(need: MemoryNeed, spell: Any) -> str:
    """Describe what memory is needed for, each part by `spell`."""
    parts = {
        "weights": need.weights,
        "gradients and optimiser": need.training,
        "prompt": need.cache,
        "activations": need.activations,
        "logits": need.logits,
    }
    listed = ", ".join(f"{name} {spell(value)}" for name, value in parts.items())
    return f"{spell(need.total)} at its peak: {listed}; or {spell(need.sampling)} of caches while it samples"
