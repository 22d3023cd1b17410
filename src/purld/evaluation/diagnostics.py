"""Measure how diverse a model's answers are, and how far Stage II moved the policy towards its labels.

Low diversity is the first sign of an alignment that collapses. Both diversity measures depend on the number and the
length of the answers, so compare models only on the same prompts, samples and length limit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any


def distinct_2(texts: Sequence[str]) -> float | None:
    """Return the share of distinct word bigrams among all bigrams (Li et al. 2016); None if there is no bigram.

    Words are separated by white space and lower-cased. Bigrams do not cross from one text into the next.
    """
    pairs = [pair for text in texts for pair in pairwise(text.lower().split())]
    return len(set(pairs)) / len(pairs) if pairs else None


def unique_answer_rate(answers: Sequence[Sequence[str]]) -> float | None:
    """Return how distinct the samples of a prompt are on average: 0 if all are the same, 1 if all differ.

    Args:
        answers: the samples of each prompt. Prompts with a single sample are left out.

    Returns:
        The mean of (distinct answers - 1) / (samples - 1); None if no prompt has two samples.
    """
    shares = [(len(set(samples)) - 1) / (len(samples) - 1) for samples in answers if len(samples) > 1]
    return sum(shares) / len(shares) if shares else None


def mean_label_divergence(
    groups: Iterable[Mapping[str, Any]], revisited: Iterable[Mapping[str, Any]]
) -> dict[str, float | int]:
    """Return the mean of KL(D || q) in nats under the policy that drew a group and under the final policy.

    Args:
        groups: rows of generations/groups.jsonl.
        revisited: rows of generations/revisited.jsonl: some of the groups, measured under the final policy.

    Returns:
        The number of `groups` measured twice, the means `before` and `after`, and the number of groups in which q came
        `closer` to D. Empty if no group was measured twice, as in a method without q.
    """
    first_measured = {(row["step"], row["prompt_id"]): row for row in groups}
    pairs = [
        (first_measured[row["step"], row["prompt_id"]]["label_divergence"], row["label_divergence"])
        for row in revisited
    ]
    if not pairs:
        return {}
    before, after = (sum(column) / len(pairs) for column in zip(*pairs))
    closer = sum(last < first for first, last in pairs)
    return {"groups": len(pairs), "before": round(before, 6), "after": round(after, 6), "closer": closer}
