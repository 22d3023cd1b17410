"""Test win rates against published figures, known limits and simulated truth."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from purld.evaluation import intervals
from purld.evaluation.winrate import length_controlled_difference, summarize

SHARED = Path(os.environ.get("PURLD_SHARED_DATA") or Path(__file__).parents[3] / "shared" / "data")
JUDGED = SHARED / "judged_pairs.json"


def logistic_pairs(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return pairs whose longer answer tends to win: verdicts of 0 or 1, lengths on one scale."""
    reference, model = np.exp(rng.normal(5.0, 0.5, n)), np.exp(rng.normal(4.8, 0.5, n))
    logit = -0.4 - 1.0 * np.tanh((reference - model) / 120)
    return (rng.random(n) < 1 / (1 + np.exp(-logit))).astype(float), reference, model


@pytest.mark.skipif(not JUDGED.exists(), reason=f"{JUDGED} is absent")
def test_published_win_rates_are_met() -> None:
    for name, model in json.loads(JUDGED.read_text()).items():
        rates = summarize(*zip(*model["rows"], strict=True))
        published = model["published"]
        assert rates.n == published["n"]
        assert rates.win_rate == pytest.approx(published["win_rate"] / 100, abs=1e-6), name
        assert rates.lc_win_rate == pytest.approx(published["lc_win_rate"] / 100, abs=0.04), name
        assert rates.win_rate_ci[0] < rates.win_rate < rates.win_rate_ci[1]
        assert rates.lc_win_rate_ci[0] < rates.lc_win_rate < rates.lc_win_rate_ci[1]


def test_equal_lengths_need_no_control() -> None:
    """If all lengths are equal, there is no length term, and θ alone fits the mean."""
    rates = summarize([1, 0.5, 0, 0], [50] * 4, [50] * 4)
    assert rates.win_rate == 0.375
    assert rates.lc_win_rate == pytest.approx(0.375)
    assert (rates.overlap, rates.length_ratio) == (1.0, 1.0)
    assert rates.matched is not None
    assert rates.matched.win_rate == 0.375


def test_control_moves_towards_the_rate_at_equal_length() -> None:
    """The model wins exactly where it is longer, in three of four pairs: at equal lengths, the rate is a half."""
    wins = np.array([1.0, 1.0, 1.0, 0.0] * 25)
    delta = np.array([-100.0, -100.0, -100.0, 100.0] * 25)
    rates = summarize(wins, 200 + delta, np.full(100, 200.0))
    assert rates.win_rate == 0.75
    assert 0.4 < rates.lc_win_rate < 0.65
    assert rates.overlap == 0.5


def test_every_win_leaves_room_for_the_next_prompt() -> None:
    """20 wins of 20: a true share below 0.025^(1/20) = 0.83 is ruled out, and nothing above it."""
    rates = summarize(np.ones(20), np.arange(1, 21), np.arange(3, 23))
    assert rates.win_rate == rates.lc_win_rate == 1.0
    assert rates.win_rate_ci == rates.lc_win_rate_ci == pytest.approx((0.025 ** (1 / 20), 1.0))


def test_one_pair_says_next_to_nothing() -> None:
    rates = summarize([1.0], [10], [20])
    assert rates.win_rate_ci == pytest.approx((0.025, 1.0))
    assert rates.overlap == 0.0
    assert rates.matched is None


def test_unjudged_pairs_are_counted_and_left_out() -> None:
    with_gaps = summarize([1, np.nan, 0, 0.5, np.nan], [10, np.nan, 12, 9, 1], [11, 5, 10, 20, 7])
    without = summarize([1, 0, 0.5], [10, 12, 9], [11, 10, 20])
    assert with_gaps.unjudged == 2
    assert with_gaps.n == 3
    assert with_gaps.win_rate_ci == without.win_rate_ci
    assert with_gaps.lc_win_rate == without.lc_win_rate
    assert with_gaps.length_ratio == pytest.approx(41 / 31)


def test_matched_keeps_pairs_of_comparable_length() -> None:
    """Ratios 1.2 and 1/1.2 are within 1.25, ratios 1.3 and 10 are not."""
    rates = summarize([1, 1, 0, 0], [100, 120, 100, 10], [120, 100, 130, 100])
    assert rates.matched is not None
    assert (rates.matched.n, rates.matched.win_rate) == (2, 1.0)


def test_the_ridge_means_the_same_at_every_n() -> None:
    wins, reference, model = logistic_pairs(np.random.default_rng(3), 60)
    once = summarize(wins, reference, model)
    thrice = summarize(np.tile(wins, 3), np.tile(reference, 3), np.tile(model, 3))
    assert thrice.lc_win_rate == pytest.approx(once.lc_win_rate, abs=1e-7)
    width = np.diff(once.lc_win_rate_ci)[0] / np.diff(thrice.lc_win_rate_ci)[0]
    assert width == pytest.approx(np.sqrt(3), rel=0.15)


def test_a_seed_fixes_the_intervals() -> None:
    pairs = logistic_pairs(np.random.default_rng(4), 40)
    assert summarize(*pairs, seed=7) == summarize(*pairs, seed=7)
    assert summarize(*pairs, seed=7).lc_win_rate_ci != summarize(*pairs, seed=8).lc_win_rate_ci


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([], [], []), "no judged pair"),
        (([np.nan], [1], [1]), "no judged pair"),
        (([1, 0], [1], [1, 2]), "one entry per prompt"),
        (([[1.0]], [[1]], [[1]]), "one entry per prompt"),
        (([1.5], [1], [1]), r"\[0, 1\]"),
        (([np.inf], [1], [1]), r"\[0, 1\]"),
        (([1.0], [-1], [1]), "reference_lengths"),
        (([1.0], [1], [np.nan]), "model_lengths"),
    ],
)
def test_input_that_has_no_answer_is_refused(arguments: tuple[list, list, list], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        summarize(*arguments)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([0.0, 1e-7, 0.3, 0.5, 1.0]),
            st.integers(0, 10**9) | st.integers(0, 3),
            st.integers(0, 10**9) | st.integers(0, 3),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_any_judged_pairs_give_ordered_finite_numbers(pairs: list[tuple[float, int, int]]) -> None:
    rates = summarize(*zip(*pairs, strict=True))
    for rate, (low, high) in ((rates.win_rate, rates.win_rate_ci), (rates.lc_win_rate, rates.lc_win_rate_ci)):
        assert -1e-12 <= low <= rate + 1e-12 <= high + 2e-12 <= 1 + 1e-9
    assert 0 <= rates.overlap <= 1


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_swapping_the_sides_mirrors_both_rates(seed: int) -> None:
    wins, reference, model = logistic_pairs(np.random.default_rng(seed), 25)
    ours, theirs = summarize(wins, reference, model), summarize(1 - wins, model, reference)
    assert ours.win_rate == pytest.approx(1 - theirs.win_rate)
    assert ours.lc_win_rate == pytest.approx(1 - theirs.lc_win_rate, abs=1e-6)


def coverage(monkeypatch: pytest.MonkeyPatch, simulations: int, n: int) -> tuple[float, float]:
    """Return the share of simulated studies whose intervals hold the rates of 200,000 pairs from the same source."""
    rng = np.random.default_rng(0)
    monkeypatch.setattr(intervals, "RESAMPLES", 2)
    truth = summarize(*logistic_pairs(rng, 200_000))
    monkeypatch.setattr(intervals, "RESAMPLES", 400)
    studies = [summarize(*logistic_pairs(rng, n), seed=i) for i in range(simulations)]
    raw = [s.win_rate_ci[0] <= truth.win_rate <= s.win_rate_ci[1] for s in studies]
    controlled = [s.lc_win_rate_ci[0] <= truth.lc_win_rate <= s.lc_win_rate_ci[1] for s in studies]
    return float(np.mean(raw)), float(np.mean(controlled))


def test_intervals_cover_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """A correct 95% interval covers fewer than 133 or all of 150 studies once in a few hundred times."""
    for share in coverage(monkeypatch, simulations=150, n=60):
        assert 133 / 150 <= share < 1.0


@pytest.mark.slow
def test_intervals_cover_the_truth_closely(monkeypatch: pytest.MonkeyPatch) -> None:
    for share in coverage(monkeypatch, simulations=2000, n=60):
        assert 0.93 <= share <= 0.97


def test_the_controlled_difference_cancels_what_is_common() -> None:
    """Two models that differ only in length: the raw difference is large, the length-controlled one is not."""
    rng = np.random.default_rng(0)
    reference = rng.uniform(200, 400, 400)
    short, long = reference * rng.uniform(0.4, 1.3, 400), reference * rng.uniform(0.7, 1.6, 400)

    def wins(lengths: np.ndarray) -> np.ndarray:
        logit = np.tanh((lengths - reference) / (lengths - reference).std())
        return (1 / (1 + np.exp(-logit)) > rng.uniform(size=400)).astype(float)

    a, b = wins(long), wins(short)
    raw = a.mean() - b.mean()
    assert raw > 0.1
    estimate, (low, high) = length_controlled_difference(a, b, reference, long, short)
    assert low < 0 < high
    assert abs(estimate) < raw / 2


def test_the_controlled_difference_is_the_difference_of_the_controlled_rates() -> None:
    rng = np.random.default_rng(1)
    reference, ours, theirs = (rng.integers(50, 500, 200) for _ in range(3))
    a, b = rng.choice([0, 0.5, 1], 200, p=[0.2, 0.1, 0.7]), rng.choice([0, 0.5, 1], 200, p=[0.5, 0.1, 0.4])
    estimate, (low, high) = length_controlled_difference(a, b, reference, ours, theirs)
    rates = [summarize(w, reference, lengths).lc_win_rate for w, lengths in ((a, ours), (b, theirs))]
    assert estimate == pytest.approx(rates[0] - rates[1])
    assert 0 < low < estimate < high < 1


@pytest.mark.parametrize(("a", "b", "expected"), [([1, 1, 1], [0, 0, 0], 1.0), ([1, 1, 1], [1, 1, 1], 0.0)])
def test_a_controlled_difference_of_extremes_has_an_interval(a: list[int], b: list[int], expected: float) -> None:
    estimate, (low, high) = length_controlled_difference(a, b, [10] * 3, [10] * 3, [10] * 3)
    assert estimate == expected
    assert low <= estimate <= high
    assert high > low


def test_a_difference_needs_both_sides() -> None:
    with pytest.raises(ValueError, match="both sides"):
        length_controlled_difference([1, math.nan], [1, 0], [10, 10], [10, 10], [10, 10])
