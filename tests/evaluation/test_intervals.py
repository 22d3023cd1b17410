"""Test intervals against their closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from purld.evaluation import intervals
from purld.evaluation.intervals import (
    bca_interval,
    bootstrap_values,
    constant_interval,
    mean_interval,
    wilson_interval,
)


def test_wilson_by_hand() -> None:
    """8 of 10: (0.8 + 1.92/10 ± 1.96·√(0.016 + 0.0096)) / 1.384 = (0.490, 0.943)."""
    assert wilson_interval(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)


def test_wilson_stays_within_bounds_and_has_width_at_the_ends() -> None:
    low, high = wilson_interval(1.0, 5)
    assert high == 1.0
    assert low == pytest.approx(5 / (5 + 1.96**2), abs=1e-4)


def test_bca_without_bias_or_skew_is_the_percentile_interval() -> None:
    resampled = np.linspace(-1, 1, 2001)
    low, high = bca_interval(0.0, resampled, np.array([-1.0, 0.0, 1.0]))
    assert (low, high) == pytest.approx((-0.95, 0.95), abs=1e-3)


def test_bca_leans_towards_the_long_tail() -> None:
    """Right-skewed values: the mean's own distribution is right-skewed, and both ends move up."""
    values = np.array([0.0] * 27 + [1.0] * 3)
    resampled = bootstrap_values(lambda index: values[index].mean(axis=1), 30, seed=0)
    percentile = np.quantile(resampled, [0.025, 0.975])
    low, high = mean_interval(values, seed=0)
    assert low > percentile[0]
    assert high > percentile[1]


def test_a_mean_of_many_values_has_the_normal_interval() -> None:
    values = np.random.default_rng(0).normal(size=4000)
    half = 1.96 * values.std() / np.sqrt(4000)
    expected = (values.mean() - half, values.mean() + half)
    assert mean_interval(values, seed=1, bounds=(-10, 10)) == pytest.approx(expected, abs=0.1 * half)


def test_resampling_does_not_depend_on_how_much_is_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).random(50)
    whole = bootstrap_values(lambda index: values[index].mean(axis=1), 50, seed=3)
    monkeypatch.setattr(intervals, "_MAX_VALUES", 130)
    assert np.array_equal(whole, bootstrap_values(lambda index: values[index].mean(axis=1), 50, seed=3))
    assert len(whole) == intervals.RESAMPLES


def test_a_constant_leaves_open_what_was_not_seen() -> None:
    """Three ties of three: at least 0.025^(1/3) = 0.292 of all prompts tie; the others may all win or lose."""
    assert constant_interval(0.5, 3, (0.0, 1.0)) == pytest.approx((0.1462, 0.8538), abs=1e-4)
