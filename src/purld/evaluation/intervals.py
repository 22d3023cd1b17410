"""Compute confidence intervals over prompts: bootstrap, Wilson and exact.

All resampling in purld happens here. Prompts are the units that are resampled, because several samples of one prompt
are not independent. Bootstrap intervals are BCa (Efron 1987), which keep their coverage for skewed values such as the
win rates of weak models, where plain percentile intervals are too short. Pure numpy: no models, no I/O.

A bootstrap sees only the values it was given. If 3 prompts of 200 differ, all in favour of one model, its interval
excludes zero, although chance alone does that one time in four. A mean is therefore resampled with two pseudo-prompts
added, one at either bound (for matched pairs Agresti and Min 2005 add the same total). They change little where many
prompts differ, and keep the error rate where few do.

By chance an AUC within prompts lies near 0.5, so pseudo-prompts with 0 and 1 would hide whatever eight prompts show.
Its interval is stretched by Student's t instead: random scores then seem better than chance in 2% to 4% of cases, and
worse as often, from two prompts on.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from purld.t_distribution import t_quantile

Array = NDArray[np.float64]
Interval = tuple[float, float]

RESAMPLES = 2000
LEVEL = 0.95
Z = NormalDist().inv_cdf(0.5 + LEVEL / 2)

_MAX_VALUES = 1 << 20  # resampled values held at once: bounds memory for large n


def bootstrap_values(statistic: Callable[[NDArray[np.intp]], Array], n: int, seed: int) -> Array:
    """Return `RESAMPLES` values of a statistic, each on n prompts drawn with replacement.

    Args:
        statistic: maps drawn indices (resamples, n) to values (resamples,).
        n: number of prompts.
        seed: seed of the draws. Equal seeds and n give equal draws, so two statistics can share them.
    """
    rng = np.random.default_rng(seed)
    chunk = max(1, _MAX_VALUES // n)
    sizes = [min(chunk, RESAMPLES - start) for start in range(0, RESAMPLES, chunk)]
    return np.concatenate([statistic(rng.integers(n, size=(size, n))) for size in sizes])


def bca_interval(estimate: float, resampled: Array, influence: Array) -> Interval:
    """Return the bias-corrected and accelerated (BCa) bootstrap interval.

    Args:
        estimate: the statistic on all prompts.
        resampled: its values on the resamples, (resamples,).
        influence: (n,) effect of each prompt on the statistic, up to a common factor.
    """
    below = np.mean(resampled < estimate) + np.mean(resampled == estimate) / 2
    normal = NormalDist()
    half = 0.5 / len(resampled)
    bias = normal.inv_cdf(float(np.clip(below, half, 1 - half)))
    centred = influence - influence.mean()
    spread = float(np.sum(centred**2)) ** 1.5
    acceleration = float(np.sum(centred**3)) / (6 * spread) if spread > 0 else 0.0

    def level(z: float) -> float:
        shifted = bias + z
        return normal.cdf(bias + shifted / max(1 - acceleration * shifted, 1e-9))

    low, high = np.quantile(resampled, [level(-Z), level(Z)])
    return widen_to_include(estimate, (float(low), float(high)))


def mean_interval(values: Array, seed: int, bounds: Interval = (0.0, 1.0)) -> Interval:
    """Return the interval of the mean of one value per prompt, (n,), each within `bounds`."""
    if np.ptp(values) == 0:
        return constant_interval(float(values[0]), len(values), bounds)
    padded = np.append(values, bounds)  # the two pseudo-prompts
    resampled = bootstrap_values(lambda index: padded[index].mean(axis=1), len(padded), seed)
    return widen_to_include(float(values.mean()), bca_interval(float(padded.mean()), resampled, padded))


def ratio_interval(parts: Array, totals: Array, seed: int) -> Interval:
    """Return the interval of sum(parts) / sum(totals), a share of all that n prompts have, (n,) each.

    Resampling n prompts gives a spread that is too small by sqrt((n - 1) / n), and is no surer of it than n prompts
    are. So the ends of the BCa interval are moved away from the estimate for both.
    """
    estimate, n = float(parts.sum() / totals.sum()), len(parts)
    if np.ptp(parts / totals) == 0:
        return constant_interval(estimate, n, (0.0, 1.0))
    resampled = bootstrap_values(lambda index: parts[index].sum(axis=1) / totals[index].sum(axis=1), n, seed)
    low, high = bca_interval(estimate, resampled, parts - estimate * totals)
    factor = t_quantile(0.5 + LEVEL / 2, n - 1) / Z * (n / (n - 1)) ** 0.5
    return max(0.0, estimate - factor * (estimate - low)), min(1.0, estimate + factor * (high - estimate))


def widen_to_include(estimate: float, interval: Interval) -> Interval:
    """Return the interval, widened to include the estimate."""
    return min(interval[0], estimate), max(interval[1], estimate)


def constant_interval(value: float, n: int, bounds: Interval) -> Interval:
    """Return the exact interval of a mean when all n prompts gave the same value.

    A bootstrap would give an interval of width zero. If a share s of all prompts gives this value, n out of n happens
    with probability s^n. So a share below 0.025^(1/n) is ruled out at 97.5%, and the other prompts may lie anywhere
    within `bounds` (Clopper and Pearson 1934, for the case n of n).
    """
    share = ((1 - LEVEL) / 2) ** (1 / n)
    low, high = (share * value + (1 - share) * bound for bound in bounds)
    return low, high


def wilson_interval(share: float, n: float) -> Interval:
    """Return Wilson's (1927) score interval of a share among n independent trials; n need not be an integer."""
    centre = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * float(np.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2)))
    return max(0.0, centre - half), min(1.0, centre + half)
