"""Collect what a Stage II step logs: means for metrics.jsonl, groups for the report."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from purld import ranks
from purld.methods.losses import GroupLoss, GroupTokens, sampling_gaps
from purld.methods.score_gain import score_gain
from purld.records import GroupRecord
from purld.training.gain import METRIC as GAIN
from purld.training.rollout import Rollout

_SUMMED = frozenset({"drawn", "truncated", "unscored", "dropped_groups", "thinking"})
_LARGEST = frozenset({"engine_gap_max"})
Q_COLUMN = "policy_before"  # the member column that holds q, in a method that has one


class StepMetrics:
    """Collects values group by group and gives their means (counts: their sums) over a step of all ranks."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = defaultdict(list)

    def add_rollout(self, rollout: Rollout, scored: bool) -> None:
        """Note how sampling and scoring one group went; `scored` if the method has a scorer."""
        scores = [s for s in rollout.scores.candidates if s is not None]
        if rollout.completions:
            self._values["drawn"].append(float(len(rollout.completions)))
        self._values["truncated"] += [float(not c.finished) for c in rollout.completions]
        self._values["length"] += [float(len(c.ids)) for c in rollout.completions]
        if rollout.thinking:
            self._values["thinking"].append(float(rollout.thinking))
        self._values["dropped_groups"].append(float(not rollout.usable))
        self._values["score"] += scores
        if len(scores) > 1:
            self._values["score_spread"].append(statistics.stdev(scores))
        if scored:
            self._values["unscored"].append(float(len(rollout.completions) - len(scores)))
        if rollout.scores.anchor is not None:
            self._values["anchor_score"].append(rollout.scores.anchor)
            self._values["margin"] += [s - rollout.scores.anchor for s in scores]

    def add_update(self, loss: GroupLoss, tokens: GroupTokens, candidates: int, measures_kl: bool) -> None:
        """Note the objective of one group, whose last `candidates` members are candidates.

        `measures_kl` says that the policy as it is drew them, and that the reference is p_sft on the bare prompt: then
        their mean log-ratio is the divergence from it.
        """
        self._values["objective"].append(loss.value.item())
        for name, metric in loss.metrics.items():
            self._values[name].append(metric.item())
        if (gaps := sampling_gaps(tokens)) is not None:
            self._values["engine_gap"].append(gaps.mean().item())
            self._values["engine_gap_max"].append(gaps.max().item())
        if candidates and measures_kl:
            log_ratios = tokens.sequences(tokens.policy - tokens.reference)[-candidates:]
            self._values["kl"].append(log_ratios.mean().item())

    def add_gain(self, rollout: Rollout, tokens: GroupTokens | None) -> None:
        """Note what the policy gained over p_sft on one group that it drew, before it learns from it.

        Args:
            rollout: the group.
            tokens: its members under the policy that drew them and under p_sft; None if the group is left out, which
                says something only where its scores are equal.
        """
        if tokens is None:
            scores = [score for score in rollout.scores.candidates if score is not None]
            if len(scores) > 1 and len(set(scores)) == 1:
                self._values[GAIN].append(0.0)
            return
        drawn = len(rollout.member_candidates)
        if drawn > 1:
            log_ratios = tokens.sequences(tokens.old - tokens.reference)[-drawn:]
            of_members = [rollout.scores.candidates[index] for index in rollout.member_candidates]
            self._values[GAIN].append(score_gain(log_ratios.new_tensor(of_members), log_ratios).item())

    def drain(self) -> dict[str, float]:
        """Return the values of the step and start the next one."""
        collected: dict[str, list[float]] = defaultdict(list)
        for of_rank in ranks.gather_rows([dict(self._values)]):
            for name, values in of_rank.items():
                collected[name] += values
        self._values.clear()
        return {name: _combine(name, values) for name, values in collected.items() if values}


def _combine(name: str, values: list[float]) -> float:
    """Combine what a step noted under one name: the mean, or the sum or the largest for the names that say so."""
    if name in _LARGEST:
        return max(values)
    return sum(values) if name in _SUMMED else sum(values) / len(values)


def group_record(step: int, rollout: Rollout, loss: GroupLoss | None, keep_ids: bool) -> GroupRecord:
    """Make the record of one group that the log keeps and the report shows.

    Args:
        step: the update that the group was first part of, or was drawn for.
        rollout: the group.
        loss: the objective on it; None if it is left out.
        keep_ids: keep token ids, so that the group can be measured again: a text does not always encode to its own.
    """
    scores, anchor_score = rollout.scores.candidates, rollout.scores.anchor
    optional: dict[str, Any] = {"left_out": True}
    if loss is not None:
        optional = dict(member_columns(rollout, loss.members))
        if (divergence := logged_label_divergence(loss)) is not None:
            optional["label_divergence"] = divergence
        if keep_ids and Q_COLUMN in loss.members:
            optional["completions"] = [{"ids": c.ids, "finished": c.finished} for c in rollout.completions]
    if anchor_score is not None:
        optional["margins"] = [None if s is None else s - anchor_score for s in scores]
    if loss is None or any(s is not None for s in scores):  # a method without scores leaves nothing out
        optional["scores"] = scores
    return GroupRecord(
        step=step,
        prompt_id=rollout.question.prompt.id,
        anchor=rollout.question.anchor,
        candidates=rollout.texts,
        lengths=[len(c.ids) for c in rollout.completions],
        anchor_score=anchor_score,
        **optional,
    )


def member_columns(rollout: Rollout, members: Mapping[str, Tensor]) -> dict[str, list[float | None]]:
    """Return the objective's (K,) columns by name, one value per candidate; None for a candidate that is no member."""
    columns: dict[str, list[float | None]] = {}
    for name, column in members.items():
        columns[name] = [None] * len(rollout.texts)
        for index, value in zip(rollout.member_candidates, column.tolist()[-len(rollout.member_candidates) :]):
            columns[name][index] = value
    return columns


def logged_label_divergence(loss: GroupLoss) -> float | None:
    """Return KL(D || q) of one group in nats; None where the objective has no labels.

    The objective computes it from logarithms, which stay finite where q underflows to 0.
    """
    return loss.metrics["ldl"].item() if "ldl" in loss.metrics else None
