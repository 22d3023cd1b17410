"""The first groups of a run once more, under its final policy: how q has moved towards D on the same candidates.

The labels are made again of the recorded scores by the method's own row of the table. Candidates are those that were
drawn then, so what is measured is what the updates did to them, not how the policy answers now.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch

from purld.model.sample import Completion
from purld.model.self_evaluation import GroupScores
from purld.training.metrics import Q, logged_label_divergence, member_columns
from purld.training.rollout import AnchoredPrompt, Rollout, RolloutMaker

REMEASURED_GROUPS = 64  # groups at most: two passes without a graph for each


@torch.no_grad()
def remeasure_groups(
    policy: Any, draw: RolloutMaker, questions: Sequence[AnchoredPrompt], groups: Sequence[Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Measure the first groups that were kept for it under the policy as it is.

    Args:
        policy: the model at the end of Stage II.
        draw: how its groups were made.
        questions: the prompts of the stage.
        groups: rows of generations/groups.jsonl, oldest first; those with `completions` are measured.

    Yields:
        One row a group: its step and prompt_id, `policy_after`, which is q with None for an unscored candidate, and
        `logged_label_divergence`, KL(D || q) in nats.
    """
    by_id = {question.prompt.id: question for question in questions}
    for row in islice((group for group in groups if group.get("completions")), REMEASURED_GROUPS):
        rollout = draw.with_signal(policy, _as_drawn(by_id[row["prompt_id"]], row))
        if rollout.members is None:
            continue
        loss = draw.method.loss(draw.update.tokens(policy, rollout.members), rollout.signal, draw.settings)
        yield {
            "step": row["step"],
            "prompt_id": row["prompt_id"],
            "policy_after": member_columns(rollout, loss.members)[Q],
            "label_divergence": logged_label_divergence(loss),
        }


def _as_drawn(question: AnchoredPrompt, row: Mapping[str, Any]) -> Rollout:
    """The group as it was before the method made a signal of it."""
    return Rollout(
        question,
        [Completion(**completion) for completion in row["completions"]],
        row["candidates"],
        GroupScores(row["anchor_score"], row["scores"] or [None] * len(row["candidates"])),
    )
