"""What a Stage II step is worth writing down: means for metrics.jsonl, groups for the report."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from purld.method.labels import confidences, entropy
from purld.method.losses import GroupObjective
from purld.records import Group, Prompt
from purld.student.sample import Completion
from purld.student.selfeval import GroupScores

_SUMMED = frozenset({"truncated", "unscored", "dropped_groups"})
LOGGED = frozenset(
    {
        "objective",
        "ldl",
        "kl",
        "entropy_labels",
        "entropy_policy",
        "sharper_than_labels",
        "length",
        "length_correlation",
        "score",
        "margin",
        "anchor_score",
        "learning_rate",
        "grad_norm",
    }
    | _SUMMED
)


class StepMeasures:
    """Collects values group by group and gives their means (counts: their sums) at the step's end."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = defaultdict(list)

    def add_scores(self, completions: Sequence[Completion], scores: GroupScores, used: bool) -> None:
        """Note what came of sampling and scoring one group, and whether it is updated on."""
        self._values["truncated"] += [float(not c.finished) for c in completions]
        self._values["unscored"] += [float(s is None) for s in scores.candidates]
        self._values["dropped_groups"].append(float(not used))
        self._values["score"] += [s for s in scores.candidates if s is not None]
        self._values["anchor_score"] += [] if scores.anchor is None else [scores.anchor]

    def add_update(self, objective: GroupObjective, log_labels: Tensor, margin: Tensor, lengths: Tensor) -> None:
        """Note the objective of one group; the tensors are (K,) over its scored candidates."""
        labels_entropy, policy_entropy = entropy(log_labels).item(), entropy(objective.log_q).item()
        values = {
            "objective": objective.value.item(),
            "ldl": objective.divergence.item(),
            "kl": objective.kl.item(),
            "entropy_labels": labels_entropy,
            "entropy_policy": policy_entropy,
            "sharper_than_labels": float(policy_entropy < labels_entropy),
            "length": lengths.mean().item(),
            "margin": margin.mean().item(),
        }
        correlation = _correlation(objective.log_q.exp().cpu(), lengths)
        if correlation is not None:
            values["length_correlation"] = correlation
        for name, value in values.items():
            self._values[name].append(value)

    def drain(self) -> dict[str, float]:
        """The step's values, and start over."""
        found = {
            name: sum(values) if name in _SUMMED else sum(values) / len(values)
            for name, values in self._values.items()
            if values
        }
        self._values.clear()
        return found


def group_record(
    step: int,
    prompt: Prompt,
    anchor: str,
    texts: Sequence[str],
    completions: Sequence[Completion],
    scores: GroupScores,
    log_labels: Tensor,
    objective: GroupObjective,
    gamma: float,
) -> Group:
    """One group as the report shows it; candidates without a score carry no label and no weight.

    Raises:
        ValueError: the anchor has no score, so the group was not updated on.
    """
    if scores.anchor is None:
        raise ValueError("a group without an anchor score has no margins")
    margins = [None if s is None else s - scores.anchor for s in scores.candidates]
    labels, policy = [0.0] * len(texts), [0.0] * len(texts)
    scored = [i for i, s in enumerate(scores.candidates) if s is not None]
    for place, label, q in zip(scored, log_labels.exp().tolist(), objective.log_q.exp().tolist()):
        labels[place], policy[place] = label, q
    return Group(
        step=step,
        prompt_id=prompt.id,
        anchor=anchor,
        candidates=texts,
        lengths=[len(c.ids) for c in completions],
        scores=scores.candidates,
        anchor_score=scores.anchor,
        margins=margins,
        confidences=[None if m is None else confidences(torch.tensor(m), gamma).item() for m in margins],
        labels=labels,
        policy_before=policy,
    )


def _correlation(x: Tensor, y: Tensor) -> float | None:
    """Pearson's correlation of two (K,) tensors; None where one of them is constant."""
    if x.std() < 1e-8 or y.std() < 1e-8:
        return None
    return float(torch.corrcoef(torch.stack([x, y]))[0, 1])
