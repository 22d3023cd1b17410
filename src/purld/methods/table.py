"""The table of methods.

A method is a row: who scores, how scores become a signal, and which objective learns from the signal. Sampler, scorer
and trainer are shared by all methods and read these rows; none of them asks for a method by its name. To add a method:
write its row here and its section in `purld.config.methods`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor

from purld.methods.advantages import (
    TokenCredit,
    generalised_advantages,
    group_advantages,
    ranked_pairs,
    token_rewards,
    whiten_advantages,
)
from purld.methods.labels import PuLabels, pu_labels
from purld.methods.losses import (
    GroupLoss,
    GroupTokens,
    dpo_loss,
    grpo_loss,
    ldl_loss,
    nll_loss,
    ppo_loss,
    reverse_kl_loss,
)

Signal = TypeVar("Signal")
ScoreSource = Literal["anchored", "alone", "teacher"]


@dataclass(frozen=True)
class GroupEvidence:
    """The evidence that a method makes its signal of, for one group.

    Attributes:
        scores: (K,) scores of the candidates that have one; (0,) for a method without a scorer.
        anchor_score: the anchor's own score s*; None if it was not scored.
        margin_scale: the factor of the margins, see `purld.methods.labels.pu_labels`.
        tokens: the members when they were drawn; only for a method with a critic.
    """

    scores: Tensor
    anchor_score: float | None = None
    tokens: GroupTokens | None = None
    margin_scale: float = 1.0


@dataclass(frozen=True)
class StageTwoMethod(Generic[Signal]):
    """The way a method learns in Stage II; `settings` is its section of the configuration.

    Attributes:
        signal: (evidence, settings) -> what the objective learns from; None leaves the group out.
        loss: (tokens, signal, settings) -> the objective on one group.
        scorer: `anchored` self-evaluation, self-evaluation `alone` (without the anchor), the `teacher`, or None.
        anchor_member: whether the anchor is always the group's first member, before the candidates.
        anchored_reference: whether p_sft reads the anchor when it gives the members' reference log-probs.
        critic: whether a value head is learned with the policy.
        across: (signals, masks) -> the signals of a step's prompts, normalised over all of them.
    """

    signal: Callable[[GroupEvidence, Any], Signal | None]
    loss: Callable[[GroupTokens, Signal, Any], GroupLoss]
    scorer: ScoreSource | None = None
    anchor_member: bool = False
    anchored_reference: bool = False
    critic: bool = False
    across: Callable[[list[Signal], list[Tensor]], list[Signal]] | None = None


@dataclass(frozen=True)
class Method:
    """One row of the table; `purld methods` prints the first four columns."""

    name: str
    signal: str
    objective: str
    teacher_calls: str
    stage_two: StageTwoMethod[Any] | None = None


def _pu_labels(evidence: GroupEvidence, settings: Any) -> PuLabels | None:
    if evidence.anchor_score is None or evidence.scores.numel() < 2:
        return None
    scores = evidence.scores
    if settings.anchor_joins:
        scores = torch.cat([scores.new_tensor([evidence.anchor_score]), scores])
    if settings.skip_equal_scores and bool((scores == scores[0]).all()):
        return None
    return pu_labels(scores, evidence.anchor_score, settings.gamma, settings.tau, evidence.margin_scale)


def _ldl_loss(tokens: GroupTokens, labels: PuLabels, settings: Any) -> GroupLoss:
    drawn = len(labels.log_distribution) - settings.anchor_joins
    weight = labels.positives if settings.group_weight == "positives" else 1.0
    loss = ldl_loss(tokens, labels.log_distribution, form=settings.q, beta=settings.beta, drawn=drawn, weight=weight)
    return replace(loss, members={**loss.members, "confidences": labels.confidences})


def _advantages(evidence: GroupEvidence, settings: Any) -> Tensor | None:
    return group_advantages(evidence.scores) if evidence.scores.numel() >= 2 else None


def _grpo_loss(tokens: GroupTokens, advantages: Tensor, settings: Any) -> GroupLoss:
    return grpo_loss(tokens, advantages, clip=settings.clip, beta=settings.beta)


def _ranked_pairs(evidence: GroupEvidence, settings: Any) -> Tensor | None:
    if evidence.scores.numel() < 2:
        return None
    pairs = ranked_pairs(evidence.scores, settings.margin, settings.pairs)
    return pairs if len(pairs) else None


def _anchor_first(evidence: GroupEvidence, settings: Any) -> Tensor:
    return torch.tensor([[0, 1]])


def _dpo_loss(tokens: GroupTokens, pairs: Tensor, settings: Any) -> GroupLoss:
    return dpo_loss(tokens, pairs, beta=settings.beta)


def _credit(evidence: GroupEvidence, settings: Any) -> TokenCredit | None:
    tokens = evidence.tokens
    if not evidence.scores.numel() or tokens is None or tokens.old_values is None:
        return None
    rewards = token_rewards(evidence.scores, tokens.old, tokens.reference, tokens.mask, settings.beta)
    return generalised_advantages(rewards, tokens.old_values, tokens.mask, settings.discount, settings.trace)


def _ppo_loss(tokens: GroupTokens, credit: TokenCredit, settings: Any) -> GroupLoss:
    return ppo_loss(tokens, credit, clip=settings.clip, value_clip=settings.value_clip)


def _members_alone(evidence: GroupEvidence, settings: Any) -> bool:
    return True  # the objective needs nothing but the members


def _reverse_kl_loss(tokens: GroupTokens, signal: bool, settings: Any) -> GroupLoss:
    return reverse_kl_loss(tokens)


def _nll_loss(tokens: GroupTokens, signal: bool, settings: Any) -> GroupLoss:
    return nll_loss(tokens)


_ROWS = (
    Method(
        "ldl_grpo",
        signal="anchor-conditioned self-evaluation, as a PU label distribution (Eq. 2)",
        objective="KL(D || q) + beta KL(p || p_sft) (Eq. 4)",
        teacher_calls="N",
        stage_two=StageTwoMethod(_pu_labels, _ldl_loss, scorer="anchored"),
    ),
    Method(
        "anchorrank_dpo",
        signal="anchor-conditioned self-evaluation, as ranked pairs of candidates",
        objective="DPO over a group's pairs",
        teacher_calls="N",
        stage_two=StageTwoMethod(_ranked_pairs, _dpo_loss, scorer="anchored"),
    ),
    Method(
        "anchor_grpo",
        signal="anchor-conditioned self-evaluation, as a reward",
        objective="GRPO: clipped ratio times group-standardised advantage",
        teacher_calls="N",
        stage_two=StageTwoMethod(_advantages, _grpo_loss, scorer="anchored"),
    ),
    Method(
        "self_ppo",
        signal="self-evaluation of one candidate, without anchor or teacher",
        objective="PPO with a critic, GAE and clipping",
        teacher_calls="N, none in Stage II",
        stage_two=StageTwoMethod(_credit, _ppo_loss, scorer="alone", critic=True, across=whiten_advantages),
    ),
    Method(
        "self_distillation",
        signal="the student itself with the anchor in its context, token by token",
        objective="reverse KL at the candidates' tokens",
        teacher_calls="N",
        stage_two=StageTwoMethod(_members_alone, _reverse_kl_loss, anchored_reference=True),
    ),
    Method(
        "singlepair_dpo",
        signal="the anchor over one candidate",
        objective="DPO",
        teacher_calls="N",
        stage_two=StageTwoMethod(_anchor_first, _dpo_loss, anchor_member=True),
    ),
    Method(
        "sft_sft",
        signal="the anchors of Stage II's prompts",
        objective="maximum likelihood",
        teacher_calls="N",
        stage_two=StageTwoMethod(_members_alone, _nll_loss, anchor_member=True),
    ),
    Method(
        "teacher_judge_grpo",
        signal="the teacher's score of every candidate",
        objective="GRPO: clipped ratio times group-standardised advantage",
        teacher_calls="N + one per candidate",
        stage_two=StageTwoMethod(_advantages, _grpo_loss, scorer="teacher"),
    ),
    Method("sft", signal="the teacher's answers (Eq. 1)", objective="maximum likelihood", teacher_calls="N"),
)
METHODS = {row.name: row for row in _ROWS}
"""Every method by its name in `align.method`."""
