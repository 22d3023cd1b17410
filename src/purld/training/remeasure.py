"""Measure the first groups of a run again under its final policy: how q has moved towards D on the same candidates.

The labels are made again from the recorded scores by the method's own row of the table. Candidates are the ones that
were drawn then, so this measures what the updates did to them, not how the policy answers now.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch

from purld import ranks
from purld.model.causal_lm import CausalLM
from purld.model.sample import Completion
from purld.model.self_evaluation import GroupScores
from purld.training.metrics import Q_COLUMN, logged_label_divergence, member_columns
from purld.training.rollout import AnchoredPrompt, Rollout, RolloutMaker

REMEASURED_GROUPS = 64  # groups at most: each costs two passes without a graph


@torch.no_grad()
def remeasure_groups(
    policy: CausalLM, rollouts: RolloutMaker, questions: Sequence[AnchoredPrompt], groups: Sequence[Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Measure this rank's share of the first groups that were kept for it under the current policy.

    Args:
        policy: the model at the end of Stage II.
        rollouts: the maker of the run's groups.
        questions: the prompts of the stage.
        groups: rows of generations/groups.jsonl, oldest first; those with `completions` are measured.

    Yields:
        One row per group: its step and prompt_id, `policy_after`, which is q with None for an unscored candidate, and
        `label_divergence`, KL(D || q) in nats.
    """
    by_id = {question.prompt.id: question for question in questions}
    kept = list(islice((group for group in groups if group.get("completions")), REMEASURED_GROUPS))
    mine = kept[ranks.my_share(len(kept))]
    again = rollouts.add_signals(policy, [_recorded_rollout(by_id[row["prompt_id"]], row) for row in mine])
    used = [(row, rollout, rollout.members) for row, rollout in zip(mine, again) if rollout.members is not None]
    measured = rollouts.update.tokens(policy, [members for _, _, members in used])
    for (row, rollout, _), tokens in zip(used, measured, strict=True):
        loss = rollouts.method.loss(tokens, rollout.signal, rollouts.settings)
        yield {
            "step": row["step"],
            "prompt_id": row["prompt_id"],
            "policy_after": member_columns(rollout, loss.members)[Q_COLUMN],
            "label_divergence": logged_label_divergence(loss),
        }


def _recorded_rollout(question: AnchoredPrompt, row: Mapping[str, Any]) -> Rollout:
    """Rebuild a group as it was before the method made a signal of it."""
    return Rollout(
        question,
        [Completion(**completion) for completion in row["completions"]],
        row["candidates"],
        GroupScores(row["anchor_score"], row["scores"] or [None] * len(row["candidates"])),
    )
