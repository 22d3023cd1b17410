"""How well the self-evaluation's scores agree with gold: the signal that everything in Stage II rests on.

The AUC within prompts is the number to look at, because the label distribution compares candidates of one
prompt only; the overall AUC also profits from knowing which prompts are hard. Calibration says whether a score
may be read as a probability, which the method does not need but a person might. Pure numpy: scores and rights
come from Stage II's groups, at no further model call.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from purld.evaluation.accuracy import auc
from purld.evaluation.intervals import Array, Interval, bca_interval, bootstrap, constant_interval
from purld.records import Prompt

BINS = 10


@dataclass(frozen=True)
class ScoredGroup:
    """The scored candidates of one prompt at one step, and whether each is right; equal lengths, both (k,)."""

    prompt_id: str
    scores: Sequence[float]
    right: Sequence[bool]


@dataclass(frozen=True)
class Bin:
    """The candidates whose score lies in one tenth of [0, 1]: their mean score and the share that is right."""

    n: int
    score: float
    right: float


@dataclass(frozen=True)
class ScoreQuality:
    """How scores and gold go together.

    Attributes:
        n: scored candidates.
        prompts: prompts that they belong to.
        right: the share of candidates that is right.
        auc: the probability that a right candidate outscores a wrong one, over all pairs; None if there is none.
        auc_within: the same over pairs of one group, each pair counting the same; None if there is none.
        auc_within_ci: its 95% interval, by a bootstrap over prompts.
        ece: expected calibration error: the mean distance of score and share right over the bins, weighted by n.
        bins: those that hold a candidate, from low scores to high.
    """

    n: int
    prompts: int
    right: float
    auc: float | None
    auc_within: float | None
    auc_within_ci: Interval | None
    ece: float
    bins: tuple[Bin, ...]


def score_quality(groups: Sequence[ScoredGroup], seed: int = 0) -> ScoreQuality:
    """Measure scores against gold.

    Args:
        groups: Stage II's groups; a prompt may have several.
        seed: of the bootstrap.

    Raises:
        ValueError: there is no scored candidate, or a score is not within [0, 1].
    """
    scores = np.array([s for group in groups for s in group.scores], dtype=np.float64)
    right = np.array([r for group in groups for r in group.right], dtype=bool)
    if not len(scores) or not np.all((scores >= 0) & (scores <= 1)):
        raise ValueError("score quality needs at least one scored candidate, and scores from 0 to 1")
    bins = _bins(scores, right)
    within, interval = _within(groups, seed)
    return ScoreQuality(
        n=len(scores),
        prompts=len({group.prompt_id for group in groups}),
        right=float(right.mean()),
        auc=auc(scores, right) if right.any() and not right.all() else None,
        auc_within=within,
        auc_within_ci=interval,
        ece=sum(b.n * abs(b.score - b.right) for b in bins) / len(scores),
        bins=bins,
    )


def scored_groups(
    rows: Iterable[Mapping[str, Any]], prompts: Iterable[Prompt], check: Callable[[Prompt, str], bool]
) -> list[ScoredGroup]:
    """Stage II's groups as it logged them, checked against gold; prompts without gold are left out.

    Args:
        rows: of generations/groups.jsonl.
        prompts: the training prompts.
        check: says whether an answer is right.
    """
    by_id = {p.id: p for p in prompts if p.reference is not None}
    found = []
    for row in rows:
        prompt = by_id.get(row["prompt_id"])
        scored = [(s, c) for s, c in zip(row["scores"] or (), row["candidates"]) if s is not None]
        if prompt is not None and scored:
            right = [check(prompt, candidate) for _, candidate in scored]
            found.append(ScoredGroup(prompt.id, [score for score, _ in scored], right))
    return found


def as_results(quality: ScoreQuality) -> dict[str, Any]:
    """The measures as results.json has them: rounded, and absent where there is none."""
    rounded = {key: _rounded(value) for key, value in asdict(quality).items() if value is not None}
    return rounded | {"bins": [{key: _rounded(v) for key, v in asdict(b).items()} for b in quality.bins]}


def _rounded(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_rounded(v) for v in value]
    return round(value, 6) if isinstance(value, float) else value


def _bins(scores: Array, right: NDArray[np.bool_]) -> tuple[Bin, ...]:
    place = np.minimum((scores * BINS).astype(int), BINS - 1)
    inside = [place == b for b in range(BINS)]
    return tuple(Bin(int(i.sum()), float(scores[i].mean()), float(right[i].mean())) for i in inside if i.any())


def _within(groups: Sequence[ScoredGroup], seed: int) -> tuple[float | None, Interval | None]:
    """Pairs won over pairs, summed by prompt: a ratio of sums, resampled by prompt."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for group in groups:
        right = np.asarray(group.right, dtype=bool)
        pairs = int(right.sum() * (~right).sum())
        if pairs:
            sums[group.prompt_id][0] += auc(group.scores, right) * pairs
            sums[group.prompt_id][1] += pairs
    if not sums:
        return None, None
    won, pairs_of = np.array(list(sums.values())).T
    estimate = float(won.sum() / pairs_of.sum())
    if np.ptp(won / pairs_of) == 0:
        return estimate, constant_interval(estimate, len(won), (0.0, 1.0))
    resampled = bootstrap(lambda index: won[index].sum(axis=1) / pairs_of[index].sum(axis=1), len(won), seed)
    return estimate, bca_interval(estimate, resampled, won - estimate * pairs_of)
