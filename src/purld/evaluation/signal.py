"""Measure without gold what scores are worth, by spread, labels, length and known pairs, and say where it is nothing.

Pure functions on numbers; `purld.pipeline.probe` measures them with a model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from purld.evaluation.intervals import wilson_interval
from purld.methods.label_limits import UNIFORM_ENTROPY

Scores = Sequence[float | None]

MAX_UNSCORED = 0.5  # with more, most of a group is missing
NOISE_FACTOR = 3.0  # a spread below this many times the rounding is rounding
CHANCE = 0.5  # the AUC of scores that say nothing


@dataclass(frozen=True)
class PairRate:
    """The share of known pairs whose better answer scores higher, ties counting half, with its 95% interval."""

    rate: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class ScorerMeasures:
    """The measures of one scorer in the probe.

    Attributes:
        name: the scorer.
        pairs: how often the better answer of a known pair scores higher, by kind of pair.
        spread: the pooled standard deviation of the candidates' scores within their groups.
        noise: the root mean square change of a score when the model rounds otherwise.
        label_entropy: the mean entropy of D over ln K, with the run's gamma, tau and scale; 1 is uniform.
        length_correlation: the mean correlation of score and length within groups; None without spread.
        unscored: the share of answers without a score.
        seconds: seconds per group.
        anchor_auc: AUC within prompts of the candidates that have the anchor's result over those that do not, with its
            interval; None where the run's check finds no results, or where no group holds both.
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
    anchor_auc: tuple[float, float, float] | None = None
    gold_auc: tuple[float, float, float] | None = None

    @property
    def agreement(self) -> PairRate:
        """Return the share of known pairs ranked right, over all kinds with equal weight."""
        return pool_rates(list(self.pairs.values()))


def weakness(measures: ScorerMeasures) -> str | None:
    """Say in a clause why nothing can be learned from a scorer's scores; None if something may be.

    Known pairs and gold do not count: on a real student the former did not predict the AUC against gold
    (docs/probe.md), and gold is for evaluation. The anchor's result does, where results can be compared.
    """
    if measures.unscored > MAX_UNSCORED:
        return f"{measures.unscored:.0%} of the answers got no score"
    if measures.spread == 0:
        return "the candidates of a prompt all have the same score"
    if measures.spread <= NOISE_FACTOR * measures.noise:
        return f"the candidates' scores differ by {measures.spread:.1e}, which is rounding"
    if measures.label_entropy > UNIFORM_ENTROPY:
        return f"the labels are uniform (entropy {measures.label_entropy:.4f} of ln K)"
    if measures.anchor_auc is not None and measures.anchor_auc[2] < CHANCE:
        auc, low, high = measures.anchor_auc
        return (
            "candidates with the anchor's result score below the others of their prompt "
            f"(AUC {auc:.2f} [{low:.2f}, {high:.2f}])"
        )
    return None


def measures_as_results(measures: ScorerMeasures) -> dict[str, Any]:
    """Return the measures as probe.json and the manifest hold them: rounded, and without those that are None."""
    row: dict[str, Any] = {
        "name": measures.name,
        "weakness": weakness(measures),
        "pairs": {kind: _rate_row(rate) for kind, rate in measures.pairs.items()},
        "spread": measures.spread,
        "noise": measures.noise,
        "label_entropy": round(measures.label_entropy, 6),
        "length_correlation": None if measures.length_correlation is None else round(measures.length_correlation, 4),
        "unscored": round(measures.unscored, 4),
        "seconds_per_group": round(measures.seconds, 4),
    }
    if measures.pairs:
        row["agreement"] = _rate_row(measures.agreement)
    for key, auc in (("anchor_auc", measures.anchor_auc), ("gold_auc", measures.gold_auc)):
        if auc is not None:
            row[key] = [round(value, 4) for value in auc]
    return {key: value for key, value in row.items() if value is not None}


def _rate_row(rate: PairRate) -> dict[str, Any]:
    return {"rate": round(rate.rate, 4), "ci": [round(rate.low, 4), round(rate.high, 4)], "n": rate.n}


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

    The distances of the kinds' limits from their rates are combined in quadrature, as for independent errors; a kind of
    few pairs makes the interval wide.
    """
    rate = float(np.mean([r.rate for r in rates]))
    below = math.sqrt(sum((r.rate - r.low) ** 2 for r in rates)) / len(rates)
    above = math.sqrt(sum((r.high - r.rate) ** 2 for r in rates)) / len(rates)
    return PairRate(rate, rate - below, rate + above, sum(r.n for r in rates))


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
