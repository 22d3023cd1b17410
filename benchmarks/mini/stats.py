"""Intervals and tests over seeds: what five runs can show. Pure numpy.

A seed draws the training prompts, p_sft, Stage II and the held-out problems, so seeds repeat the whole experiment, all
from one base student; 3 to 12% of the held-out problems of two seeds are the same. The interval of a mean over seeds
is Student's t on the seeds' values. A bootstrap over the problems of one seed, which is shown next to it, does not
include how another draw of prompts would have trained. With five seeds t has four degrees of freedom, so its interval
is wide.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from purld.t_distribution import t_quantile, two_sided_p

LEVEL = 0.95


@dataclass(frozen=True)
class Mean:
    """A mean over seeds.

    Attributes:
        mean: the mean of the values.
        low, high: its 95% interval by Student's t; None with a single seed.
        p: two-sided p-value against a mean of 0; None with a single seed.
        values: one per seed.
    """

    mean: float
    low: float | None
    high: float | None
    p: float | None
    values: tuple[float, ...]

    @property
    def n(self) -> int:
        """The number of seeds."""
        return len(self.values)

    @property
    def above(self) -> int:
        """The number of seeds whose value is above 0."""
        return sum(v > 0 for v in self.values)


def over_seeds(values: Sequence[float]) -> Mean:
    """Return the mean of one value per seed with its t interval.

    Raises:
        ValueError: there is no value.
    """
    if not values:
        raise ValueError("there is no seed to average over")
    x = np.asarray(values, dtype=np.float64)
    mean, n = float(x.mean()), len(x)
    if n == 1:
        return Mean(mean, None, None, None, (mean,))
    error = float(x.std(ddof=1)) / math.sqrt(n)
    half = t_quantile(0.5 + LEVEL / 2, n - 1) * error
    p = two_sided_p(mean / error, n - 1) if error > 0 else (1.0 if mean == 0 else 0.0)
    return Mean(mean, mean - half, mean + half, p, tuple(map(float, x)))


def adjust_by_holm(p_values: Mapping[str, float], tests: int) -> dict[str, float]:
    """Return Holm's (1979) adjusted p-values: those below 0.05 hold together at a family-wise error rate of 5%.

    Args:
        p_values: by test.
        tests: the number of all tests, including those that have no p-value yet.
    """
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, p * (tests - rank)))
        adjusted[name] = largest
    return adjusted
