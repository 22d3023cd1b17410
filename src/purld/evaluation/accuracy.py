"""Compute accuracy with its interval, and the paired difference of two models on the same prompts.

Pure numpy on arrays of right and wrong. Drawing answers and checking them is left to the caller.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from purld.evaluation.intervals import Array, Interval, Z, mean_interval, wilson_interval
from purld.t_distribution import t_quantile


@dataclass(frozen=True)
class PairedDifference:
    """The difference of two models on the same prompts.

    `p_value` is that of McNemar's exact two-sided test; None where the test does not apply: with several samples per
    prompt, or with values other than right and wrong.
    """

    mean: float
    interval: Interval
    p_value: float | None


def accuracy_with_interval(correct: ArrayLike) -> tuple[float, Interval]:
    """Return the share of right answers and its 95% interval, clustered by prompt.

    Samples of one prompt are not independent, so Wilson's interval is computed for the effective number of trials:
    the number of independent answers whose mean would vary as much as the mean over prompts does, less what few prompts
    leave unknown of that, by Student's t (Korn and Graubard 1998). It is never below the number of prompts, which it is
    with one sample per prompt: then the interval is plain Wilson. Unlike mean ± 1.96 standard errors, it keeps its
    coverage and its width near 0 and 1.

    Args:
        correct: (prompts,) or (prompts, samples), right or wrong.

    Raises:
        ValueError: there are no answers, or an entry is neither 0 nor 1.
    """
    right = _as_shares(correct, "correct")
    if not np.isin(right, (0.0, 1.0)).all():
        raise ValueError("correct must hold only right (1) and wrong (0)")
    prompts, samples = right.shape
    share = float(right.mean())
    within, between = share * (1 - share), float(right.mean(axis=1).var())
    if between == 0:
        return share, wilson_interval(share, prompts)
    effective = prompts * within / between * (Z / t_quantile(0.975, prompts - 1)) ** 2
    return share, wilson_interval(share, min(max(effective, prompts), prompts * samples))


def paired_difference(a: ArrayLike, b: ArrayLike, seed: int = 0) -> PairedDifference:
    """Return the mean of `a` minus that of `b` on the same prompts, with a 95% interval by a bootstrap over prompts.

    Args:
        a, b: (prompts,) or (prompts, samples), right or wrong, or each prompt's probability of winning. Row i of both
            belongs to the same prompt. The numbers of samples may differ.
        seed: seed of the bootstrap.

    Raises:
        ValueError: the prompts do not match, there are no answers, or an entry is not within [0, 1].
    """
    ours, theirs = _as_shares(a, "a"), _as_shares(b, "b")
    if len(ours) != len(theirs):
        raise ValueError(f"a and b must hold the same prompts; they hold {len(ours)} and {len(theirs)}")
    values = ours.mean(axis=1) - theirs.mean(axis=1)
    single = ours.shape[1] == theirs.shape[1] == 1 and bool(np.isin([ours, theirs], (0.0, 1.0)).all())
    p_value = mcnemar_p_value(int(np.sum(values > 0)), int(np.sum(values < 0))) if single else None
    return PairedDifference(float(values.mean()), mean_interval(values, seed, bounds=(-1.0, 1.0)), p_value)


def mcnemar_p_value(only_a: int, only_b: int) -> float:
    """Return the exact two-sided p-value of McNemar's test.

    Args:
        only_a, only_b: numbers of prompts that only this one of the two models answered right.
    """
    n = only_a + only_b
    tail = term = 1  # sum of the binomial coefficients up to min(only_a, only_b), and the latest of them
    for k in range(min(only_a, only_b)):
        term = term * (n - k) // (k + 1)
        tail += term
    return min(1.0, float(2 * tail / 2**n))


def _as_shares(values: ArrayLike, name: str) -> Array:
    """Return values in [0, 1] as an array (prompts, samples)."""
    shares = np.asarray(values, dtype=np.float64)
    shares = shares[:, None] if shares.ndim == 1 else shares
    if shares.ndim != 2 or shares.size == 0:
        raise ValueError(f"{name} must be a non-empty array (prompts, samples); its shape is {shares.shape}")
    if not np.all((shares >= 0) & (shares <= 1)):
        raise ValueError(f"{name} must hold values from 0 to 1")
    return shares
