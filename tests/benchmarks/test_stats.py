"""Intervals and tests over a few seeds."""

import pytest
from mini.stats import adjust_by_holm, over_seeds

from purld.t_distribution import two_sided_p


def test_the_interval_of_five_seeds():
    """1..5: mean 3, standard deviation sqrt(2.5), standard error sqrt(0.5), half-width 2.7764 * 0.70711 = 1.9632."""
    found = over_seeds([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (found.mean, found.low, found.high) == pytest.approx((3.0, 1.0368, 4.9632), abs=1e-4)
    assert found.p == pytest.approx(two_sided_p(3.0 / 0.5**0.5, 4))
    assert (found.n, found.above) == (5, 5)


def test_one_seed_has_no_interval_and_no_test():
    found = over_seeds([0.25])
    assert (found.mean, found.low, found.high, found.p) == (0.25, None, None, None)


def test_no_seed_has_no_mean():
    with pytest.raises(ValueError, match="no seed"):
        over_seeds([])


def test_seeds_that_agree_in_nothing_at_all_prove_nothing():
    assert over_seeds([0.0, 0.0, 0.0]).p == 1.0


def test_holm_by_hand():
    """Sorted: 0.01 * 3, then max(0.03, 0.02 * 2), then max(0.04, 0.03 * 1)."""
    three = {"c": 0.03, "a": 0.01, "b": 0.02}
    assert adjust_by_holm(three, 3) == pytest.approx({"c": 0.04, "a": 0.03, "b": 0.04})
    assert adjust_by_holm({"a": 0.9, "b": 0.8}, 2) == {"a": 1.0, "b": 1.0}


def test_holm_counts_the_tests_that_have_no_p_value_yet():
    assert adjust_by_holm({"a": 0.01, "b": 0.02}, 4) == pytest.approx({"a": 0.04, "b": 0.06})
