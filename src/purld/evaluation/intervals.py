"""Bootstrap intervals over prompts: the one place that resamples.

The unit that is resampled is the prompt, because several samples of one prompt are not independent. Intervals
are BCa (Efron 1987), which keep their coverage for the skewed values that win rates of weak models are made
of, where plain percentiles fall short. Pure numpy: no models, no I/O.

A bootstrap knows only what it saw. Where three prompts of 200 differ, all in favour of one model, its interval
excludes zero, though chance alone does that one time in four. So a mean is resampled with two imagined prompts
among the real ones, one at either bound (for matched pairs Agresti and Min 2005 add as much in all): they cost
next to nothing where many prompts differ and hold the error rate where few do.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Interval = tuple[float, float]

RESAMPLES = 2000
LEVEL = 0.95
Z = NormalDist().inv_cdf(0.5 + LEVEL / 2)

_CELLS = 1 << 20  # resampled values held at once: bounds memory for large n


def bootstrap_values(statistic: Callable[[NDArray[np.intp]], Array], n: int, seed: int) -> Array:
    """`RESAMPLES` values of a statistic, each on n prompts drawn with replacement.

    Args:
        statistic: from drawn indices of shape (resamples, n) to values of shape (resamples,).
        n: how many prompts there are.
        seed: fixes the draws; equal seeds and n give equal draws, so two statistics can share them.
    """
    rng = np.random.default_rng(seed)
    rows = max(1, _CELLS // n)
    sizes = [min(rows, RESAMPLES - start) for start in range(0, RESAMPLES, rows)]
    return np.concatenate([statistic(rng.integers(n, size=(size, n))) for size in sizes])


def bca_interval(estimate: float, resampled: Array, influence: Array) -> Interval:
    """The bias-corrected and accelerated bootstrap interval.

    Args:
        estimate: the statistic on all prompts.
        resampled: its values on the resamples, (resamples,).
        influence: how much each prompt moves the statistic, up to a common factor, (n,).
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
    """The interval of a mean of one value per prompt, (n,), each within `bounds`."""
    if np.ptp(values) == 0:
        return constant_interval(float(values[0]), len(values), bounds)
    imagined = np.append(values, bounds)
    resampled = bootstrap_values(lambda index: imagined[index].mean(axis=1), len(imagined), seed)
    return widen_to_include(float(values.mean()), bca_interval(float(imagined.mean()), resampled, imagined))


def widen_to_include(estimate: float, interval: Interval) -> Interval:
    """The interval, widened to the estimate where that lies outside."""
    return min(interval[0], estimate), max(interval[1], estimate)


def constant_interval(value: float, n: int, bounds: Interval) -> Interval:
    """The exact interval of a mean when all n prompts gave the same value.

    A bootstrap sees no uncertainty here and would claim none. If a share s of all prompts gives this value,
    n out of n happens with probability s^n: a share below 0.025^(1/n) is ruled out at 97.5%, and the rest of
    the prompts may lie anywhere within `bounds` (Clopper and Pearson 1934, for the case n of n).
    """
    share = ((1 - LEVEL) / 2) ** (1 / n)
    low, high = (share * value + (1 - share) * bound for bound in bounds)
    return low, high


def wilson_interval(share: float, n: float) -> Interval:
    """Wilson's (1927) score interval for a share among n independent trials; n need not be whole."""
    centre = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * float(np.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2)))
    return max(0.0, centre - half), min(1.0, centre + half)
