"""Accuracy and paired differences against hand-made numbers and simulated truth."""

from __future__ import annotations

import numpy as np
import pytest

from purld.evaluation.accuracy import accuracy_with_interval, mcnemar_p_value, paired_difference
from purld.evaluation.intervals import wilson_interval
from purld.records import Prompt
from purld.tasks.checks import exact_match


def test_one_sample_per_prompt_is_plain_wilson() -> None:
    correct = np.array([1] * 7 + [0] * 3)
    share, interval = accuracy_with_interval(correct)
    assert share == 0.7
    assert interval == pytest.approx(wilson_interval(0.7, 10))
    assert accuracy_with_interval(correct[:, None])[1] == pytest.approx(interval)


def test_repeating_the_same_sample_adds_no_certainty() -> None:
    once = np.array([1, 1, 1, 0, 0, 1, 0, 1])
    assert accuracy_with_interval(np.repeat(once[:, None], 4, axis=1))[1] == pytest.approx(
        accuracy_with_interval(once)[1]
    )


def test_independent_samples_add_certainty_up_to_their_number() -> None:
    """Every prompt is right in one sample of two: the means do not vary, but 8 answers are not more than 8 trials."""
    share, interval = accuracy_with_interval(np.tile([1, 0], (4, 1)))
    assert share == 0.5
    assert interval == pytest.approx(wilson_interval(0.5, 4))


def test_all_right_is_not_certainty() -> None:
    share, (low, high) = accuracy_with_interval(np.ones((12, 3)))
    assert (share, high) == (1.0, 1.0)
    assert low == pytest.approx(wilson_interval(1.0, 12)[0])


def test_clustered_intervals_cover_the_truth() -> None:
    """40 prompts of very different difficulty with 4 samples each; as 160 independent answers, coverage is ~80%."""
    rng = np.random.default_rng(0)
    hits = []
    for _ in range(400):
        difficulty = rng.beta(0.7, 0.3, size=(40, 1))
        low, high = accuracy_with_interval(rng.random((40, 4)) < difficulty)[1]
        hits.append(low <= 0.7 <= high)
    assert 0.92 <= np.mean(hits) <= 0.98


@pytest.mark.parametrize("prompts", [2, 3, 5, 10])
def test_intervals_of_few_prompts_cover_the_truth(prompts: int) -> None:
    """With eight samples each; by the variance between so few prompts alone, they cover 78% to 94% of the time."""
    rng = np.random.default_rng(prompts)
    hits = []
    for _ in range(1000):
        difficulty = rng.beta(2, 2, size=(prompts, 1))
        low, high = accuracy_with_interval(rng.random((prompts, 8)) < difficulty)[1]
        hits.append(low <= 0.5 <= high)
    assert np.mean(hits) >= 0.93


@pytest.mark.parametrize(
    ("correct", "words"),
    [([], "non-empty"), (np.ones((2, 2, 2)), "samples"), ([0.5], "only right"), ([np.nan], "from 0 to 1")],
)
def test_what_is_not_right_or_wrong_is_refused(correct: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        accuracy_with_interval(correct)


def test_mcnemar_by_hand() -> None:
    """1 against 5 of 6 discordant: 2·(C(6,0) + C(6,1)) / 2^6 = 14/64."""
    assert mcnemar_p_value(1, 5) == mcnemar_p_value(5, 1) == pytest.approx(14 / 64)
    assert mcnemar_p_value(0, 0) == 1.0
    assert mcnemar_p_value(3, 3) == 1.0
    assert 0 < mcnemar_p_value(1000, 1200) < 1e-4
    assert mcnemar_p_value(20_000, 20_000) == 1.0


def test_difference_of_two_models() -> None:
    a = np.array([1] * 60 + [0] * 40)
    b = np.array([1] * 45 + [0] * 55)
    difference = paired_difference(a, b)
    assert difference.mean == pytest.approx(0.15)
    assert 0.07 < difference.interval[0] < 0.11 < 0.20 < difference.interval[1] < 0.25
    assert difference.p_value == pytest.approx(mcnemar_p_value(15, 0))


def test_a_few_prompts_that_differ_by_chance_are_no_difference() -> None:
    """Three prompts of 200, all for one model: chance alone does that one time in four (McNemar's p)."""
    a, b = np.array([1] * 3 + [0] * 197), np.zeros(200)
    difference = paired_difference(a, b)
    assert difference.interval[0] <= 0
    assert difference.p_value == 0.25


@pytest.mark.parametrize(("n", "share"), [(200, 0.01), (50, 0.05), (30, 0.2)])
def test_equal_models_are_told_apart_no_more_often_than_allowed(n: int, share: float) -> None:
    """Each model wins alone on the same share of prompts. Of 200 studies at 5%, 19 or more have probability 0.5%."""
    rng = np.random.default_rng(n)
    wrong = 0
    for seed in range(200):
        alone = rng.choice([1.0, -1.0, 0.0], n, p=[share, share, 1 - 2 * share])
        low, high = paired_difference(alone > 0, alone < 0, seed).interval
        wrong += low > 0 or high < 0
    assert wrong < 19


def test_difference_changes_sign_with_the_sides() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.random((80, 3)) < 0.6, rng.random((80, 5)) < 0.5
    ours, theirs = paired_difference(a, b), paired_difference(b, a)
    assert ours.mean == pytest.approx(-theirs.mean)
    assert ours.interval == pytest.approx((-theirs.interval[1], -theirs.interval[0]), abs=0.01)
    assert ours.p_value is None


def test_no_discordant_prompt_is_not_proof_of_equality() -> None:
    """10 of 10 agree: up to 1 − 0.025^(1/10) = 31% of all prompts may still differ, either way."""
    difference = paired_difference(np.ones(10), np.ones(10))
    assert (difference.mean, difference.p_value) == (0.0, 1.0)
    assert difference.interval == pytest.approx((-0.3085, 0.3085), abs=1e-4)


def test_win_probabilities_have_a_difference_and_no_mcnemar() -> None:
    difference = paired_difference([1.0, 0.5, 0.5, 0.0, 1.0], [0.5, 0.5, 0.0, 0.0, 0.5])
    assert difference.mean == pytest.approx(0.3)
    assert difference.p_value is None


def test_pairing_sees_what_two_intervals_hide() -> None:
    """Two models that are right on nearly the same half of the prompts, one of them on a few more."""
    rng = np.random.default_rng(1)
    b = rng.random(300) < 0.5
    a = b | (rng.random(300) < 0.1)
    assert accuracy_with_interval(a)[1][0] < accuracy_with_interval(b)[1][1]
    assert paired_difference(a, b).interval[0] > 0


def test_difference_of_other_prompts_is_refused() -> None:
    with pytest.raises(ValueError, match="same prompts; they hold 3 and 2"):
        paired_difference([1, 0, 1], [1, 0])


@pytest.mark.parametrize(
    ("reference", "text", "same"),
    [
        ("Paris", "  paris.\n", True),
        ("Paris", "**Paris**", True),
        ("x  =  3", "x = 3", True),
        ("½", "½", True),
        ("42", "４２", True),  # full-width digits
        ("-3", "3", False),
        ("3.5", "35", False),
        ("Paris", "It is Paris", False),
        ("", "", True),
    ],
)
def test_exact_match(reference: str, text: str, same: bool) -> None:
    assert exact_match(Prompt.from_text("?", reference=reference), text) is same


def test_exact_match_needs_a_reference() -> None:
    with pytest.raises(ValueError, match="has no reference"):
        exact_match(Prompt.from_text("?"), "yes")
