"""Accuracy against gold: a rate with its interval, and the difference of two models on the same prompts.

Pure numpy but for `exact_match`, which compares texts. How answers were drawn, and which task-specific check
decides that one is right, is the business of the caller.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from purld.evaluation.intervals import Array, Interval, mean_interval, wilson_interval


@dataclass(frozen=True)
class PairedDifference:
    """One model minus another on the same prompts.

    `p_value` is McNemar's exact two-sided one; None where it does not apply, which is with several samples per
    prompt or with anything but right and wrong.
    """

    mean: float
    interval: Interval
    p_value: float | None


def accuracy_with_interval(correct: ArrayLike) -> tuple[float, Interval]:
    """The share of right answers and its 95% interval, clustered by prompt.

    Samples of one prompt are not independent, so Wilson's interval is taken at the effective number of trials:
    the one at which independent answers would spread as much as the prompts' means do (Korn and Graubard
    1998). With one sample per prompt that is the number of prompts, and the interval is plain Wilson, which
    unlike mean ± 1.96 standard errors keeps its coverage, and its width, near 0 and 1.

    Args:
        correct: (prompts,) or (prompts, samples), right or wrong.

    Raises:
        ValueError: there are no answers, or an entry is neither 0 nor 1.
    """
    right = _shares(correct, "correct")
    if not np.isin(right, (0.0, 1.0)).all():
        raise ValueError("correct must hold only right (1) and wrong (0)")
    prompts, samples = right.shape
    share = float(right.mean())
    spread, between = share * (1 - share), float(right.mean(axis=1).var())
    trials = min(prompts * spread / between, prompts * samples) if between > 0 else prompts
    return share, wilson_interval(share, trials)


def paired_difference(a: ArrayLike, b: ArrayLike, seed: int = 0) -> PairedDifference:
    """How much better `a` does than `b` on the same prompts, with a 95% interval by a bootstrap over prompts.

    Args:
        a, b: (prompts,) or (prompts, samples), right or wrong, or each prompt's probability of winning; row by
            row the same prompts. The numbers of samples may differ.
        seed: of the bootstrap.

    Raises:
        ValueError: the prompts do not match, there are no answers, or an entry is not within [0, 1].
    """
    ours, theirs = _shares(a, "a"), _shares(b, "b")
    if len(ours) != len(theirs):
        raise ValueError(f"a and b must hold the same prompts; they hold {len(ours)} and {len(theirs)}")
    values = ours.mean(axis=1) - theirs.mean(axis=1)
    single = ours.shape[1] == theirs.shape[1] == 1 and bool(np.isin([ours, theirs], (0.0, 1.0)).all())
    p_value = mcnemar_p_value(int(np.sum(values > 0)), int(np.sum(values < 0))) if single else None
    return PairedDifference(float(values.mean()), mean_interval(values, seed, bounds=(-1.0, 1.0)), p_value)


def mcnemar_p_value(only_a: int, only_b: int) -> float:
    """The exact two-sided p of McNemar's test, from the prompts that only one of two models got right."""
    n = only_a + only_b
    tail = term = 1  # of the binomial coefficients up to min(only_a, only_b), each from the one before it
    for k in range(min(only_a, only_b)):
        term = term * (n - k) // (k + 1)
        tail += term
    return min(1.0, float(2 * tail / 2**n))


def _shares(values: ArrayLike, name: str) -> Array:
    """Values in [0, 1] as (prompts, samples)."""
    shares = np.asarray(values, dtype=np.float64)
    shares = shares[:, None] if shares.ndim == 1 else shares
    if shares.ndim != 2 or shares.size == 0:
        raise ValueError(f"{name} must hold (prompts, samples) answers and at least one; it is {shares.shape}")
    if not np.all((shares >= 0) & (shares <= 1)):
        raise ValueError(f"{name} must hold values from 0 to 1")
    return shares
