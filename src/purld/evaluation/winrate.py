"""Compute win rates with intervals: raw, length-controlled and on pairs of matched length.

The length model is that of AlpacaEval 2 (Dubois et al. 2024) without the fitted difficulty of each instruction, which
needs other models' results: logit P(model wins) = θ + φ·tanh((len_ref − len_model) / std), with a weak ridge on φ. The
length-controlled rate is P at equal lengths. Works on numbers alone: no models, no I/O. The caller averages over the
samples and orders of a prompt first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from purld.evaluation.intervals import (
    Array,
    Interval,
    bca_interval,
    bootstrap_values,
    constant_interval,
    mean_interval,
    widen_to_include,
)

# RIDGE·φ² is added to the *mean* cross-entropy, so the estimate does not depend on n. Without the ridge, φ also
# absorbs that prompts with short reference answers are easier, and the controlled rate of a weak model comes out far
# too high. docs/decisions.md has the numbers.
RIDGE = 0.01

LENGTH_BAND = 1.25  # largest ratio of "comparable" lengths (section 4.1)

_MAX_NEWTON_STEPS = 50
_MAX_HALVINGS = 30
_TOLERANCE = 1e-9


@dataclass(frozen=True)
class MatchedRate:
    """The raw win rate on the n pairs of comparable length (`LENGTH_BAND`)."""

    n: int
    win_rate: float
    win_rate_ci: Interval


@dataclass(frozen=True)
class WinRates:
    """The win rates of a model against one opponent: rates in [0, 1] with 95% intervals.

    Attributes:
        n: number of judged prompts.
        unjudged: number of unjudged prompts; they enter no other number.
        win_rate: mean probability of winning.
        lc_win_rate: the same at equal lengths, by the length model.
        length_ratio: mean model length / mean reference length; None if every reference is empty.
        overlap: balance of the pairs around equal length, where `lc_win_rate` is evaluated: twice the share of the
            rarer side (model shorter or model longer; equal lengths count half on each). 1 is balanced; at 0 all pairs
            lie on one side, and `lc_win_rate` is an extrapolation.
        matched: the rate on pairs of comparable length; None if there is no such pair.
    """

    n: int
    unjudged: int
    win_rate: float
    win_rate_ci: Interval
    lc_win_rate: float
    lc_win_rate_ci: Interval
    length_ratio: float | None
    overlap: float
    matched: MatchedRate | None


def summarize(
    p_model_wins: ArrayLike,
    reference_lengths: ArrayLike,
    model_lengths: ArrayLike,
    seed: int = 0,
) -> WinRates:
    """Return the win rates of a model against a reference, from one entry per prompt.

    Args:
        p_model_wins: (n,) probability that the model's answer wins; 0.5 for a tie, NaN where unjudged.
        reference_lengths: (n,) lengths of the opponent's answers, in any unit.
        model_lengths: (n,) lengths of the model's answers, in the same unit.
        seed: seed of the bootstrap.

    Raises:
        ValueError: nothing was judged, the shapes differ, or a value is out of range.
    """
    wins, reference, model = _checked_arrays(p_model_wins, reference_lengths, model_lengths)
    judged = ~np.isnan(wins)
    unjudged = int(np.sum(~judged))
    wins, reference, model = wins[judged], reference[judged], model[judged]
    delta = reference - model
    lc_win_rate, lc_interval = _length_controlled(wins, delta, seed)
    return WinRates(
        n=len(wins),
        unjudged=unjudged,
        win_rate=float(wins.mean()),
        win_rate_ci=mean_interval(wins, seed),
        lc_win_rate=lc_win_rate,
        lc_win_rate_ci=lc_interval,
        length_ratio=float(model.mean() / reference.mean()) if reference.any() else None,
        overlap=_length_overlap(delta),
        matched=_matched_rate(wins, reference, model, seed),
    )


def length_controlled_rate(p_model_wins: ArrayLike, reference_lengths: ArrayLike, model_lengths: ArrayLike) -> float:
    """Return `WinRates.lc_win_rate` without its interval; arguments and errors as in `summarize`."""
    wins, reference, model = _checked_arrays(p_model_wins, reference_lengths, model_lengths)
    judged = ~np.isnan(wins)
    return _controlled_rate(wins[judged], (reference - model)[judged])


def length_controlled_difference(
    p_ours_wins: ArrayLike,
    p_theirs_wins: ArrayLike,
    reference_lengths: ArrayLike,
    our_lengths: ArrayLike,
    their_lengths: ArrayLike,
    seed: int = 0,
) -> tuple[float, Interval]:
    """Return one model's length-controlled win rate minus another's against the same reference, with its 95% interval.

    Both length models are refitted on the same resampled prompts, so effects common to both models cancel.

    Args:
        p_ours_wins, p_theirs_wins: (n,) probabilities that each model's answer wins, without NaN.
        reference_lengths: (n,) lengths of the opponent's answers.
        our_lengths, their_lengths: (n,) lengths of the two models' answers.
        seed: seed of the bootstrap.

    Raises:
        ValueError: as in `summarize`, or a pair was unjudged for one of the models.
    """
    ours, reference, our_model = _checked_arrays(p_ours_wins, reference_lengths, our_lengths)
    theirs, _, their_model = _checked_arrays(p_theirs_wins, reference_lengths, their_lengths)
    if np.isnan(ours).any() or np.isnan(theirs).any():
        raise ValueError("a paired difference needs prompts that were judged on both sides; leave the others out")
    deltas = reference - our_model, reference - their_model
    difference = _controlled_rate(ours, deltas[0]) - _controlled_rate(theirs, deltas[1])
    if np.ptp(ours) == 0 and np.ptp(theirs) == 0:
        return difference, constant_interval(difference, len(ours), (-1.0, 1.0))
    # Two pseudo-prompts with answers of equal length, one won by either side alone: see `intervals`.
    a, b = (np.append(ours, [1.0, 0.0]), np.append(theirs, [0.0, 1.0]))
    delta_a, delta_b = (np.append(delta, [0.0, 0.0]) for delta in deltas)
    resampled = bootstrap_values(
        lambda index: _controlled_rates(a[index], delta_a[index]) - _controlled_rates(b[index], delta_b[index]),
        len(a),
        seed,
    )
    padded_difference = _controlled_rate(a, delta_a) - _controlled_rate(b, delta_b)
    influence = _influence(a, delta_a) - _influence(b, delta_b)
    return difference, widen_to_include(difference, bca_interval(padded_difference, resampled, influence))


def _checked_arrays(p_model_wins: ArrayLike, reference: ArrayLike, model: ArrayLike) -> tuple[Array, Array, Array]:
    names = ("p_model_wins", "reference_lengths", "model_lengths")
    wins, *lengths = [np.asarray(a, dtype=np.float64) for a in (p_model_wins, reference, model)]
    if wins.ndim != 1 or any(array.shape != wins.shape for array in lengths):
        shapes = ", ".join(f"{n} {a.shape}" for n, a in zip(names, (wins, *lengths), strict=True))
        raise ValueError(f"the three arrays must have one entry per prompt; their shapes are {shapes}")
    judged = ~np.isnan(wins)
    if not judged.any():
        raise ValueError(f"p_model_wins holds no judged pair ({len(wins)} entries, all of them NaN)")
    if np.any((wins < 0) | (wins > 1)):
        raise ValueError("p_model_wins must lie in [0, 1], or be NaN where a pair was not judged")
    for name, array in zip(names[1:], lengths, strict=True):
        if not np.all(np.isfinite(array[judged]) & (array[judged] >= 0)):
            raise ValueError(f"{name} must be finite and not negative wherever a pair was judged")
    return wins, lengths[0], lengths[1]


def _length_overlap(delta: Array) -> float:
    half_of_equal = np.mean(delta == 0) / 2
    return float(2 * min(np.mean(delta > 0) + half_of_equal, np.mean(delta < 0) + half_of_equal))


def _matched_rate(wins: Array, reference: Array, model: Array, seed: int) -> MatchedRate | None:
    close = np.maximum(reference, model) <= LENGTH_BAND * np.minimum(reference, model)
    kept = wins[close]
    if not len(kept):
        return None
    return MatchedRate(len(kept), float(kept.mean()), mean_interval(kept, seed))


def _length_controlled(wins: Array, delta: Array, seed: int) -> tuple[float, Interval]:
    """Return P(model wins) at equal lengths and its interval, refitting the length model on every resample."""
    rate = _controlled_rate(wins, delta)
    if np.ptp(wins) == 0:  # all pairs have the same outcome
        return rate, constant_interval(rate, len(wins), (0.0, 1.0))
    resampled = bootstrap_values(lambda index: _controlled_rates(wins[index], delta[index]), len(wins), seed)
    return rate, bca_interval(rate, resampled, _influence(wins, delta))


def _controlled_rate(wins: Array, delta: Array) -> float:
    """Return P(model wins) at equal lengths, from pairs (n,)."""
    if np.ptp(wins) == 0:  # φ = 0 fits perfectly
        return float(wins[0])
    return float(_controlled_rates(wins[None], delta[None])[0])


def _controlled_rates(wins: Array, delta: Array) -> Array:
    """Return P(model wins) at equal lengths for many data sets at once, from (sets, n) to (sets,)."""
    return _sigmoid(_fit(wins, delta)[0])


def _influence(wins: Array, delta: Array) -> Array:
    """Return the influence of each pair on the length-controlled rate, (n,): dP/dθ · (first row of H⁻¹) · score."""
    if np.ptp(wins) == 0:
        return np.zeros_like(wins)
    theta, phi, terms = (part[0] for part in _fit(wins[None], delta[None]))
    p, rate, ridge = _sigmoid(theta + phi * terms), _sigmoid(theta), 2 * RIDGE
    weight, error = p * (1 - p), wins - p
    theta_theta, theta_phi, phi_phi = weight.mean(), np.mean(weight * terms), np.mean(weight * terms**2) + ridge
    theta_change: Array = phi_phi * error - theta_phi * (error * terms - ridge * phi)
    influence: Array = theta_change * rate * (1 - rate) / (theta_theta * phi_phi - theta_phi**2)
    return influence


def _fit(wins: Array, delta: Array) -> tuple[Array, Array, Array]:
    """Minimise mean cross-entropy + RIDGE·φ² for many data sets at once, by Newton's method.

    The objective is strictly convex, and halving a step until the loss does not rise makes Newton's method converge
    from any start. A data set with only wins or only losses has its minimum at θ = ±∞, and that is returned.

    Args:
        wins: (sets, n) targets in [0, 1].
        delta: (sets, n) reference length − model length.

    Returns:
        θ (sets,), φ (sets,) and the length terms tanh(delta / std) (sets, n).
    """
    std = delta.std(axis=1, keepdims=True)
    terms = np.tanh(np.divide(delta, std, out=np.zeros_like(delta), where=std > 0))
    mean = wins.mean(axis=1)
    decided = (mean <= 0) | (mean >= 1)
    start = np.where(decided, 0.5, mean)
    theta, phi = np.log(start / (1 - start)), np.zeros_like(start)
    for _ in range(_MAX_NEWTON_STEPS):
        step_theta, step_phi = _newton_step(theta, phi, wins, terms)
        scale = np.where(decided, 0.0, _step_scale(theta, phi, step_theta, step_phi, wins, terms))
        theta, phi = theta + scale * step_theta, phi + scale * step_phi
        if np.all(scale * np.maximum(np.abs(step_theta), np.abs(step_phi)) < _TOLERANCE):
            break
    return np.where(decided, np.where(mean > 0.5, np.inf, -np.inf), theta), phi, terms


def _step_scale(theta: Array, phi: Array, step_theta: Array, step_phi: Array, wins: Array, terms: Array) -> Array:
    """Return the largest of 1, 1/2, 1/4, … that does not raise the loss of each data set, (sets,)."""
    start = _loss(theta, phi, wins, terms)
    scale = np.ones_like(theta)
    for _ in range(_MAX_HALVINGS):
        worse = _loss(theta + scale * step_theta, phi + scale * step_phi, wins, terms) > start + 1e-12
        if not worse.any():
            break
        scale = np.where(worse, scale / 2, scale)
    return scale


def _newton_step(theta: Array, phi: Array, wins: Array, terms: Array) -> tuple[Array, Array]:
    p = _sigmoid(theta[:, None] + phi[:, None] * terms)
    weight = np.maximum(p * (1 - p), 1e-12)
    error = wins - p
    g_theta, g_phi = error.mean(axis=1), (error * terms).mean(axis=1) - 2 * RIDGE * phi
    a, b = weight.mean(axis=1), (weight * terms).mean(axis=1)
    c = (weight * terms**2).mean(axis=1) + 2 * RIDGE
    determinant = a * c - b**2
    return (c * g_theta - b * g_phi) / determinant, (a * g_phi - b * g_theta) / determinant


def _loss(theta: Array, phi: Array, wins: Array, terms: Array) -> Array:
    logit = theta[:, None] + phi[:, None] * terms
    cross_entropy = np.logaddexp(0.0, logit) - wins * logit
    mean: Array = cross_entropy.mean(axis=1) + RIDGE * phi**2
    return mean


def _sigmoid(x: Array) -> Array:
    value: Array = 0.5 * (1 + np.tanh(x / 2))
    return value
