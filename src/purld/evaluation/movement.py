"""How far Stage II moved the policy towards its labels, on the candidates of its first groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def label_divergence(
    groups: Iterable[Mapping[str, Any]], revisited: Iterable[Mapping[str, Any]]
) -> dict[str, float | int]:
    """The mean of KL(D || q) in nats under the policy that drew a group, and under the final one.

    Args:
        groups: rows of generations/groups.jsonl.
        revisited: rows of generations/revisited.jsonl, each of one of the groups.

    Returns:
        `groups` that were measured twice, the means `before` and `after`, and how many came `closer`; empty without
        such groups, as in a method without q.
    """
    drawn = {(row["step"], row["prompt_id"]): row for row in groups}
    pairs = [(drawn[row["step"], row["prompt_id"]]["label_divergence"], row["label_divergence"]) for row in revisited]
    if not pairs:
        return {}
    before, after = (sum(column) / len(pairs) for column in zip(*pairs))
    closer = sum(now < then for then, now in pairs)
    return {"groups": len(pairs), "before": round(before, 6), "after": round(after, 6), "closer": closer}
