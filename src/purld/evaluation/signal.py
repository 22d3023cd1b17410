"""Judge without gold whether scores carry a signal: known pairs, spread, labels, length, and a verdict.

Pure functions on numbers; `purld.training.probe` measures them with a model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from purld.evaluation.intervals import wilson_interval

Scores = Sequence[float | None]


@dataclass(frozen=True)
class PairRate:
    """How often the better answer of a known pair scores higher, ties counting half, with its 95% interval."""

    rate: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class ScorerMeasures:
    """What the probe measured of one scorer.

    Attributes:
        name: the scorer.
        pairs: the rates by kind of pair; `all` pools the kinds, each with equal weight.
        spread: the pooled standard deviation of the candidates' scores within their groups.
        noise: the root mean square change of a score when its group is scored in another order.
        label_entropy: the mean entropy of D over ln K with the run's gamma and tau; 1 is uniform.
        length_correlation: the mean correlation of score and length within groups; None without spread.
        unscored: the share of answers without a score.
        tokens: forward tokens per group, as the scorer computes it.
        seconds: seconds per group.
        gold_auc: AUC within prompts against gold, with its interval; None without gold or without mixed groups.
    """

    name: str
    pairs: Mapping[str, PairRate]
    spread: float
    noise: float
    label_entropy: float
    length_correlation: float | None
    unscored: float
    seconds: float
    gold_auc: tuple[float, float, float] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


def pair_rate(better: Scores, worse: Scores) -> PairRate | None:
    """Return how often the better answer of a pair outscores the worse; None without a pair that has both scores."""
    wins = [
        1.0 if b > w else 0.5 if b == w else 0.0
        for b, w in zip(better, worse, strict=True)
        if b is not None and w is not None
    ]
    if not wins:
        return None
    rate = float(np.mean(wins))
    low, high = wilson_interval(rate, len(wins))
    return PairRate(rate, low, high, len(wins))


def pool_rates(rates: Sequence[PairRate]) -> PairRate:
    """Average the rates of several kinds of pairs, each kind with equal weight.

    The interval is the normal one of the mean of independent rates; a kind of few pairs makes it wide.
    """
    rate = float(np.mean([r.rate for r in rates]))
    # Half a Wilson interval is about 1.96 standard errors, also at a rate of 0 or 1.
    error = math.sqrt(sum(((r.high - r.low) / 2) ** 2 for r in rates)) / len(rates)
    return PairRate(rate, max(0.0, rate - error), min(1.0, rate + error), sum(r.n for r in rates))


def pooled_spread(groups: Sequence[Scores]) -> float:
    """Return the pooled standard deviation of scores within groups; 0 where no group has two scores."""
    squares, freedom = 0.0, 0
    for group in groups:
        scores = np.array([s for s in group if s is not None], dtype=np.float64)
        if len(scores) > 1:
            squares += float(((scores - scores.mean()) ** 2).sum())
            freedom += len(scores) - 1
    return math.sqrt(squares / freedom) if freedom else 0.0


def mean_length_correlation(groups: Sequence[Scores], lengths: Sequence[Sequence[int]]) -> float | None:
    """Return the mean over groups of the correlation of score and length; None if no group has spread in both."""
    found = []
    for scores, counts in zip(groups, lengths, strict=True):
        kept = [(s, n) for s, n in zip(scores, counts, strict=True) if s is not None]
        if len(kept) < 3:
            continue
        s, n = np.array(kept, dtype=np.float64).T
        if np.ptp(s) > 1e-12 and np.ptp(n) > 0:
            found.append(float(np.corrcoef(s, n)[0, 1]))
    return float(np.mean(found)) if found else None
