"""Fit an update into the device's memory, before it starts and after a device has run out of it.

The gradient depends neither on the size of micro-batches nor on what is computed again, so a run may change both.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from purld import ranks
from purld.config.engines import VllmEngine
from purld.config.methods import SamplingSettings, StageTwoSettings
from purld.config.schema import Sft, Student
from purld.errors import PlainWarning, UserError
from purld.methods.table import METHODS
from purld.model.at_once import release_memory
from purld.model.load import Roles
from purld.model.log_probs import PASS_TOKENS
from purld.model.memory import (
    FIT,
    DecoderShape,
    MemoryNeed,
    UpdateSizes,
    device_memory,
    estimate_memory,
    largest_micro_batch,
)
from purld.model.recompute import can_recompute
from purld.training.group_update import GroupUpdate
from purld.training.rollout import AnchoredPrompt

_CPU_MEMBERS = 8
_CPU_ANSWERS = 4
_TRL_TILE = 4_096, 32_768  # tokens and words of the logits that TRL's loss has in memory at once, on a GPU


def update_sizes(settings: StageTwoSettings, student: Student, longest_prompt: int) -> UpdateSizes:
    """Return the sizes of the largest update that a method's settings allow, in one of the ranks that share it."""
    row = METHODS[getattr(settings, "method", "")].stage_two
    has_anchor = settings.anchor_joins or (row is not None and row.anchor_member)
    drawn = settings.max_new_tokens if isinstance(settings, SamplingSettings) else 0
    answer = max(drawn, student.max_anchor_tokens if has_anchor else 0)
    caches = 0 if isinstance(student.engine, VllmEngine) else largest_share(settings) * settings.drawn
    return UpdateSizes(longest_prompt, answer, settings.drawn + has_anchor, caches, largest_share(settings))


def largest_share(settings: StageTwoSettings) -> int:
    """Return how many of a step's prompts one rank has at most."""
    return math.ceil(settings.prompts_per_step / ranks.count())


@dataclass(frozen=True)
class UpdateForm:
    """Members (in Stage I answers) per backward pass, and whether layers are computed again in it."""

    micro_batch: int
    recompute: bool


def choose_form(
    settings: StageTwoSettings, sizes: UpdateSizes, need: Callable[[UpdateForm], MemoryNeed], device: int | None = None
) -> UpdateForm:
    """Return the form of an update: as configured, or by the device and its memory.

    Args:
        settings: the method's section of the configuration.
        sizes: the largest update.
        need: what an update of that form keeps in memory.
        device: bytes of the device; this machine's if none is given.
    """
    always, never = settings.recompute == "always", settings.recompute == "never"
    size = _CPU_MEMBERS if settings.micro_batch_size == "auto" else settings.micro_batch_size
    if settings.micro_batch_size == "auto" and torch.cuda.is_available():
        most = min(sizes.groups, max(1, PASS_TOKENS // (sizes.prompt + sizes.members * sizes.answer)))
        # Half of the memory: what is left is worth more than what a wider pass gains where one group nearly fills it.
        half = (device_memory() if device is None else device) // 2
        largest = largest_micro_batch(lambda n: need(UpdateForm(n, always)), half, sizes.members, most)
        size = max(size, largest or 0)
    return UpdateForm(size, always or (not never and not fits(need(UpdateForm(size, False)), device)))


def form_of_fine_tuning(settings: Sft, model: nn.Module, longest: int, half: bool) -> UpdateForm:
    """Return the form of Stage I's updates: on a CPU as configured, on a GPU also by its memory.

    Args:
        settings: the section of the configuration.
        model: the model that is trained.
        longest: tokens of the longest prompt with its answer.
        half: whether layers compute in half precision.
    """
    if not torch.cuda.is_available():
        return UpdateForm(_CPU_ANSWERS if settings.micro_batch_size == "auto" else settings.micro_batch_size, False)
    share = math.ceil(settings.batch_size / ranks.count())
    return fit_fine_tuning(settings.micro_batch_size, share, fine_tuning_need(model, longest, half), device_memory())


def fine_tuning_need(model: nn.Module, longest: int, half: bool) -> Callable[[UpdateForm], MemoryNeed]:
    """Return what an update of Stage I keeps in memory, by its form; see `form_of_fine_tuning` for the arguments."""
    shape, width = DecoderShape.of(cast(Any, model).config), 2 if half else 4
    weights, trained = _weight_bytes([*model.parameters()], shape), _trained_weights(model)

    def need(form: UpdateForm) -> MemoryNeed:
        sizes = UpdateSizes(prompt=0, answer=longest, members=form.micro_batch, drawn=0)
        found = estimate_memory(shape, sizes, weights, trained, form.micro_batch, form.recompute, width)
        tokens, columns = _TRL_TILE
        return replace(found, logits=width * min(form.micro_batch * longest, tokens) * columns)

    return need


def fit_fine_tuning(
    size: int | Literal["auto"], share: int, need: Callable[[UpdateForm], MemoryNeed], device: int
) -> UpdateForm:
    """Return the form of Stage I's updates on a GPU: layers are computed again only where memory asks for it.

    Args:
        size: answers per pass; auto: a rank's share of a batch, or the largest power of two below it that fits.
        share: answers of a batch in one rank.
        need: see `fine_tuning_need`.
        device: bytes of the device.
    """
    largest = 2 ** math.ceil(math.log2(share))
    sizes = [min(largest >> n, share) for n in range(largest.bit_length())] if size == "auto" else [size]
    # A few answers at a time fill a GPU well enough that computing layers again for more of them does not pay.
    kept = [UpdateForm(n, False) for n in sizes if size != "auto" or n >= min(_CPU_ANSWERS, share)]
    forms = [*kept, *(UpdateForm(n, True) for n in sizes)]
    return next((form for form in forms if fits(need(form), device)), forms[-1])


def form_of_update(
    settings: StageTwoSettings, student: Student, roles: Roles, questions: Sequence[AnchoredPrompt], half: bool
) -> UpdateForm:
    """Return the form of a stage's updates; see `choose_form`.

    Args:
        settings: the method's section of the configuration.
        student: the student's section.
        roles: the models in memory.
        questions: the prompts of the stage.
        half: whether layers compute in half precision.
    """
    sizes = update_sizes(settings, student, max(len(question.encoded) for question in questions))
    shape, trained = DecoderShape.of(roles.policy.config), _trained_weights(cast(nn.Module, roles.policy))
    weights = _weight_bytes([*roles.weights()], shape)

    def need(form: UpdateForm) -> MemoryNeed:
        width = 2 if half else 4
        return estimate_memory(shape, sizes, weights, trained, form.micro_batch, form.recompute, width)

    form = choose_form(settings, sizes, need)
    can = settings.recompute != "auto" or can_recompute(cast(nn.Module, roles.policy))
    return form if can else replace(form, recompute=False)


def _weight_bytes(weights: Sequence[Tensor], shape: DecoderShape) -> int:
    """Return the bytes of weights here: of sharded ones this rank's part, and what it gathers of them at once."""
    parts = [ranks.local_part(weight.detach()) for weight in weights]
    held = sum({part.data_ptr(): part.nbytes for part in parts}.values())
    divided = [weight.element_size() for weight in weights if ranks.local_part(weight) is not weight]
    return held + shape.gathered_weights * max(divided, default=0)


def _trained_weights(model: nn.Module) -> int:
    """Return the number of weights that are trained here: of sharded ones this rank's part."""
    return sum(ranks.local_part(p.detach()).numel() for p in model.parameters() if p.requires_grad)


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


def divided_memory_error(stage: str, step: int, remedy: str) -> UserError:
    """Return the error for an update without enough memory in one of the ranks that divide its gradients."""
    return UserError(
        f"{stage}, step {step}: out of the device's memory, and processes that divide all weights (student.shard) "
        f"cannot begin an update again with less; {remedy}, or start more processes. A run that is started again goes "
        "on from its last checkpoint."
    )


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
