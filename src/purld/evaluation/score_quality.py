"""Measure how well self-evaluation scores agree with gold.

Stage II learns from these scores alone. Its groups are checked against gold once, after training, which never sees
gold; the accuracy at each step comes from the same checks. No model is called.

The AUC within prompts is the number to look at, because the label distribution compares candidates of one prompt only.
The overall AUC also rewards knowing which prompts are hard. Calibration tells whether a score can be read as a
probability; the method does not need that, but a reader might.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from purld.evaluation.intervals import Array, Interval, ratio_interval
from purld.records import Prompt
from purld.tasks.checks import Check, gold_check

BINS = 10


@dataclass(frozen=True)
class CheckedGroup:
    """One prompt's candidates at one step, checked against gold.

    `scores` and `right` have one entry per candidate; the score of an unscored candidate is None.
    """

    prompt_id: str
    step: int
    scores: Sequence[float | None]
    right: Sequence[bool]


@dataclass(frozen=True)
class CalibrationBin:
    """The candidates whose score lies in one tenth of [0, 1]: their number, mean score and share right."""

    n: int
    score: float
    right: float


@dataclass(frozen=True)
class ScoreQuality:
    """The agreement of scores with gold.

    Attributes:
        n: number of scored candidates.
        prompts: number of prompts with a scored candidate.
        right: share of right candidates.
        auc: probability that a right candidate outscores a wrong one, over all pairs; None if there is no such pair.
        auc_within: the same over pairs within one group, each pair with equal weight; None if there is no such pair.
        auc_within_ci: 95% interval of `auc_within`, by `ratio_interval` over prompts.
        ece: expected calibration error: |mean score - share right|, averaged over the bins with weight n. None for
            scores outside [0, 1], such as differences of log-probs, which are no probabilities.
        bins: the non-empty bins, from low scores to high; empty where `ece` is None.
    """

    n: int
    prompts: int
    right: float
    auc: float | None
    auc_within: float | None
    auc_within_ci: Interval | None
    ece: float | None
    bins: tuple[CalibrationBin, ...]


def score_quality(groups: Sequence[CheckedGroup], seed: int = 0) -> ScoreQuality:
    """Compare scores with gold.

    Args:
        groups: Stage II's groups; a prompt may have several.
        seed: seed of the bootstrap.

    Raises:
        ValueError: there is no scored candidate, or a score is not finite.
    """
    groups = [_without_unscored(group) for group in groups]
    scores = np.array([s for group in groups for s in group.scores], dtype=np.float64)
    right = np.array([r for group in groups for r in group.right], dtype=bool)
    if not len(scores) or not np.all(np.isfinite(scores)):
        raise ValueError("score quality needs at least one scored candidate, and finite scores")
    as_probabilities = bool(np.all((scores >= 0) & (scores <= 1)))
    bins = _calibration_bins(scores, right) if as_probabilities else ()
    within, interval = _auc_within_groups(groups, seed)
    return ScoreQuality(
        n=len(scores),
        prompts=len({group.prompt_id for group in groups if group.scores}),
        right=float(right.mean()),
        auc=pairwise_auc(scores, right) if right.any() and not right.all() else None,
        auc_within=within,
        auc_within_ci=interval,
        ece=sum(b.n * abs(b.score - b.right) for b in bins) / len(scores) if bins else None,
        bins=bins,
    )


def pairwise_auc(scores: ArrayLike, positive: ArrayLike) -> float:
    """Return the probability that a right answer outscores a wrong one, ties counting half (Mann and Whitney 1947).

    A score without information has 0.5.

    Args:
        scores: (n,) scores, without unscored candidates.
        positive: (n,) whether each candidate is right.

    Raises:
        ValueError: shapes differ, a score is NaN, or the candidates are all right or all wrong.
    """
    values, right = np.asarray(scores, dtype=np.float64), np.asarray(positive, dtype=bool)
    if values.ndim != 1 or values.shape != right.shape:
        raise ValueError(f"scores {values.shape} and positive {right.shape} must have the same length")
    if np.isnan(values).any():
        raise ValueError("scores must not hold NaN: leave out unscored candidates")
    if right.all() or not right.any():
        raise ValueError("the AUC needs at least one right and one wrong candidate")
    wrong = np.sort(values[~right])
    below = np.searchsorted(wrong, values[right], side="left")
    not_above = np.searchsorted(wrong, values[right], side="right")
    return float((below + not_above).mean() / (2 * len(wrong)))


def accuracy_by_step(groups: Iterable[CheckedGroup]) -> list[dict[str, Any]]:
    """Return the share of right candidates, scored or not, at each step: rows of `step`, `n` and `right`, by step."""
    right: dict[int, list[bool]] = defaultdict(list)
    for group in groups:
        right[group.step] += group.right
    return [{"step": step, "n": len(r), "right": round(sum(r) / len(r), 6)} for step, r in sorted(right.items())]


def check_groups(rows: Sequence[Mapping[str, Any]], prompts: Iterable[Prompt], check: Check) -> list[CheckedGroup]:
    """Check the candidates of Stage II's logged groups against gold. Prompts without readable gold are left out.

    Args:
        rows: rows of generations/groups.jsonl.
        prompts: the training prompts.
        check: returns whether an answer is right.
    """
    drawn_for = {row["prompt_id"] for row in rows}
    is_right = {p.id: gold_check(check, p) for p in prompts if p.id in drawn_for}
    checked = []
    for row in rows:
        if by_gold := is_right.get(row["prompt_id"]):
            texts = row["candidates"]
            right = [by_gold(text) for text in texts]
            checked.append(CheckedGroup(row["prompt_id"], row["step"], row["scores"] or [None] * len(texts), right))
    return checked


def quality_as_results(quality: ScoreQuality) -> dict[str, Any]:
    """Return the measures as results.json holds them: rounded, and without those that are None."""
    rounded = {key: _rounded(value) for key, value in asdict(quality).items() if value is not None}
    return rounded | {"bins": [{key: _rounded(v) for key, v in asdict(b).items()} for b in quality.bins]}


def _rounded(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_rounded(v) for v in value]
    return round(value, 6) if isinstance(value, float) else value


def _without_unscored(group: CheckedGroup) -> CheckedGroup:
    """Return the group without its unscored candidates."""
    kept = [(score, right) for score, right in zip(group.scores, group.right) if score is not None]
    return replace(group, scores=[score for score, _ in kept], right=[right for _, right in kept])


def _calibration_bins(scores: Array, right: NDArray[np.bool_]) -> tuple[CalibrationBin, ...]:
    bin_of = np.minimum((scores * BINS).astype(int), BINS - 1)
    masks = [bin_of == b for b in range(BINS)]
    return tuple(
        CalibrationBin(int(mask.sum()), float(scores[mask].mean()), float(right[mask].mean()))
        for mask in masks
        if mask.any()
    )


def _auc_within_groups(groups: Sequence[CheckedGroup], seed: int) -> tuple[float | None, Interval | None]:
    """Return the AUC within groups and its interval: pairs won over pairs, a ratio of sums resampled by prompt."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for group in groups:
        right = np.asarray(group.right, dtype=bool)
        pairs = int(right.sum() * (~right).sum())
        if pairs:
            sums[group.prompt_id][0] += pairwise_auc(np.array(group.scores, dtype=np.float64), right) * pairs
            sums[group.prompt_id][1] += pairs
    if not sums:
        return None, None
    won, pairs_of = np.array(list(sums.values())).T
    return float(won.sum() / pairs_of.sum()), ratio_interval(won, pairs_of, seed)
