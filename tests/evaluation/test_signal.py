"""Measures of a signal, against numbers worked out by hand, and the verdicts that follow from them."""

import re
from dataclasses import replace

import numpy as np
import pytest

from purld.evaluation.intervals import wilson_interval
from purld.evaluation.signal import (
    PairRate,
    ScorerMeasures,
    mean_length_correlation,
    measures_as_results,
    pair_rate,
    pool_rates,
    pooled_spread,
    weakness,
)

GOOD = ScorerMeasures(
    name="good",
    pairs={"anchor/number": PairRate(0.9, 0.8, 0.96, 40), "other/candidate": PairRate(0.8, 0.7, 0.9, 40)},
    spread=0.2,
    noise=1e-6,
    label_entropy=0.8,
    length_correlation=0.1,
    unscored=0.0,
    seconds=0.5,
)


def test_a_pair_rate_counts_ties_half_and_leaves_out_what_has_no_score() -> None:
    rate = pair_rate([0.9, 0.5, 0.1, None], [0.1, 0.5, 0.3, 0.2])
    assert rate is not None
    assert (rate.rate, rate.n) == (0.5, 3)
    assert (rate.low, rate.high) == wilson_interval(0.5, 3)
    assert pair_rate([None], [0.3]) is None


def test_kinds_weigh_the_same_and_a_rare_one_widens_the_interval() -> None:
    few, many = PairRate(1.0, 0.3, 1.0, 2), PairRate(0.8, 0.75, 0.85, 200)
    pooled = pool_rates([few, many])
    assert pooled.rate == pytest.approx(0.9)
    below = ((0.7**2 + 0.05**2) ** 0.5) / 2
    assert (pooled.low, pooled.high) == pytest.approx((0.9 - below, 0.9 + 0.025))
    alone = pool_rates([few])
    assert (alone.rate, alone.low, alone.high, alone.n) == pytest.approx((1.0, 0.3, 1.0, 2))


def test_the_spread_is_within_groups() -> None:
    """Deviations of (1, 3) and (10, 10, 13): squares 2 and 6, degrees of freedom 1 and 2."""
    assert pooled_spread([[1, 3], [10, 10, 13], [5], [None, 7]]) == pytest.approx((8 / 3) ** 0.5)
    assert pooled_spread([[1.0], [2.0]]) == 0.0


def test_the_length_correlation_is_the_mean_over_groups_with_spread() -> None:
    correlation = mean_length_correlation([[1, 2, 3], [3, 2, 1], [5, 5, 5]], [[1, 2, 3], [1, 2, 4], [1, 2, 3]])
    expected = (1 + np.corrcoef([3, 2, 1], [1, 2, 4])[0, 1]) / 2
    assert correlation == pytest.approx(expected)
    assert mean_length_correlation([[1, 1, 1]], [[1, 2, 3]]) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"unscored": 0.6}, "60% of the answers got no score"),
        ({"spread": 2e-6}, "rounding"),
        ({"spread": 0.0, "noise": 0.0}, "all have the same score"),
        ({"label_entropy": 0.99999}, "uniform"),
        ({"anchor_auc": (0.39, 0.29, 0.49)}, r"below the others of their prompt \(AUC 0.39 \[0.29, 0.49\]\)"),
    ],
)
def test_each_weakness_is_named(changes: dict[str, object], words: str) -> None:
    assert weakness(GOOD) is None
    found = weakness(replace(GOOD, **changes))  # type: ignore[arg-type]
    assert found is not None
    assert re.search(words, found)


def test_known_pairs_and_gold_do_not_decide() -> None:
    """On a real student neither a high nor a low rate of known pairs went with the AUC against gold."""
    assert weakness(replace(GOOD, pairs={"anchor/number": PairRate(0.1, 0.05, 0.2, 50)})) is None
    assert weakness(replace(GOOD, gold_auc=(0.3, 0.2, 0.4))) is None
    assert weakness(replace(GOOD, anchor_auc=(0.45, 0.38, 0.52))) is None  # may be chance


def test_results_hold_what_was_measured_and_nothing_else() -> None:
    row = measures_as_results(replace(GOOD, length_correlation=None))
    assert "weakness" not in row and "length_correlation" not in row and "gold_auc" not in row
    assert row["agreement"]["rate"] == 0.85
    assert measures_as_results(replace(GOOD, gold_auc=(0.75, 0.6, 0.9)))["gold_auc"] == [0.75, 0.6, 0.9]
