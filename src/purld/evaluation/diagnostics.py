"""How different a model's answers are from each other: an alignment that collapses shows here first.

Pure functions of texts. Both numbers depend on how many answers there are and how long they are, so they
compare models on the same prompts, samples and length limit, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any


def distinct_2(texts: Sequence[str]) -> float | None:
    """The share of different pairs of neighbouring words among all such pairs (Li et al. 2016); None without any.

    Words are what white space separates, in lower case. Pairs do not cross from one text into the next.
    """
    pairs = [pair for text in texts for pair in pairwise(text.lower().split())]
    return len(set(pairs)) / len(pairs) if pairs else None


def unique_answer_rate(answers: Sequence[Sequence[str]]) -> float | None:
    """How much of the way from one repeated answer (0) to all different ones (1) a prompt's samples are, on average.

    Args:
        answers: for each prompt its samples. Prompts with a single one say nothing and are left out.

    Returns:
        The mean of (different answers - 1) / (samples - 1); None if no prompt has two samples.
    """
    shares = [(len(set(samples)) - 1) / (len(samples) - 1) for samples in answers if len(samples) > 1]
    return sum(shares) / len(shares) if shares else None


def mean_label_divergence(
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
