"""Test score quality against values computed by hand and simulated truth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from purld.config.schema import Data
from purld.evaluation.score_quality import (
    CheckedGroup,
    accuracy_by_step,
    check_groups,
    pairwise_auc,
    quality_as_results,
    score_quality,
)
from purld.records import Prompt
from purld.tasks.checks import find_check


def test_by_hand() -> None:
    """Group p: right .9, .4 against wrong .4: won 1 + half = 1.5 of 2. Group q: right .1 against wrong .8, .2: 0 of 2.

    Within: 1.5 of 4. Overall, right {.9, .4, .1} against wrong {.4, .8, .2}: .9 wins 3, .4 wins 1.5, .1 none: 4.5 of 9.
    Bins: .1 (right), .2 (wrong), .4 .4 (one right), .8 (wrong), .9 (right): ECE = (.9 + .2 + 2·.1 + .8 + .1)/6.
    """
    quality = score_quality(
        [
            CheckedGroup("p", 1, [0.9, 0.4, 0.4], [True, True, False]),
            CheckedGroup("q", 1, [0.1, 0.8, 0.2], [True, False, False]),
        ]
    )
    assert (quality.n, quality.prompts, quality.right) == (6, 2, 0.5)
    assert quality.auc == pytest.approx(4.5 / 9)
    assert quality.auc_within == pytest.approx(1.5 / 4)
    assert quality.ece == pytest.approx(2.2 / 6)
    assert [(b.n, b.right) for b in quality.bins] == [(1, 1.0), (1, 0.0), (2, 0.5), (1, 0.0), (1, 1.0)]


def test_knowing_which_prompts_are_hard_is_not_knowing_which_answers_are_right() -> None:
    easy = CheckedGroup("easy", 1, [0.8] * 10, [True] * 9 + [False])
    hard = CheckedGroup("hard", 1, [0.2] * 10, [False] * 9 + [True])
    quality = score_quality([easy, hard])
    assert quality.auc == pytest.approx(0.9)
    assert quality.auc_within == 0.5


def test_a_score_that_is_the_probability_is_calibrated_and_the_interval_holds_the_truth() -> None:
    """Within a group scores are uniform and right with probability s: P(right outscores wrong) is 5/6."""
    rng = np.random.default_rng(0)
    groups = []
    for prompt in range(300):
        scores = rng.uniform(size=8)
        groups.append(CheckedGroup(str(prompt), 1, scores.tolist(), (rng.uniform(size=8) < scores).tolist()))
    quality = score_quality(groups)
    assert quality.ece < 0.03
    assert len(quality.bins) == 10
    assert quality.auc_within is not None and quality.auc_within_ci is not None
    assert quality.auc_within_ci[0] < 5 / 6 < quality.auc_within_ci[1]
    assert quality.auc_within_ci[1] - quality.auc_within_ci[0] < 0.06


def random_groups(rng: np.random.Generator, prompts: int, gap: float = 0.0) -> list[CheckedGroup]:
    """Eight candidates of each prompt, right and wrong ones among them; right ones score higher by `gap`."""
    groups: list[CheckedGroup] = []
    while len(groups) < prompts:
        right = rng.uniform(size=8) < 0.4
        if right.any() and not right.all():
            scores = rng.normal(size=8) + gap * right
            groups.append(CheckedGroup(str(len(groups)), 1, scores.tolist(), right.tolist()))
    return groups


def share_told_apart(prompts: int, gap: float = 0.0) -> tuple[float, float]:
    """The shares of 400 intervals that lie below and above chance."""
    rng = np.random.default_rng(prompts)
    intervals = np.array([score_quality(random_groups(rng, prompts, gap)).auc_within_ci for _ in range(400)])
    return float((intervals[:, 1] < 0.5).mean()), float((intervals[:, 0] > 0.5).mean())


@pytest.mark.parametrize("prompts", [2, 3, 4, 8])
def test_random_scores_of_a_few_prompts_seldom_seem_worse_or_better_than_chance(prompts: int) -> None:
    """2.5% on either side is meant; of a plain bootstrap's intervals 20% of two prompts and 9% of four lie there."""
    below, above = share_told_apart(prompts)
    assert below < 0.05 and above < 0.05


def test_scores_that_rank_wrong_answers_first_are_still_found_with_few_prompts() -> None:
    """Right answers score lower by 1.2 standard deviations: an AUC of 0.2."""
    assert share_told_apart(8, gap=-1.2)[0] > 0.7


def test_several_groups_of_one_prompt_are_one_unit() -> None:
    rng = np.random.default_rng(1)
    drawn = [(rng.uniform(size=6), rng.uniform(size=6) < 0.5) for _ in range(40)]
    groups = [CheckedGroup(str(p), 1, scores.tolist(), right.tolist()) for p, (scores, right) in enumerate(drawn)]
    once, thrice = score_quality(groups), score_quality(groups * 3)
    assert thrice.auc_within == pytest.approx(once.auc_within)
    assert thrice.auc_within_ci == pytest.approx(once.auc_within_ci)


def test_without_pairs_there_is_no_auc() -> None:
    quality = score_quality([CheckedGroup("p", 1, [0.0, 1.0], [True, True])])
    assert (quality.auc, quality.auc_within, quality.auc_within_ci) == (None, None, None)
    assert quality.ece == 0.5


def test_a_perfect_score_still_has_an_interval() -> None:
    quality = score_quality([CheckedGroup(str(p), 1, [1.0, 0.0], [True, False]) for p in range(20)])
    assert quality.auc_within == 1.0
    assert quality.auc_within_ci is not None and 0.8 < quality.auc_within_ci[0] < 1.0


@pytest.mark.parametrize("groups", [[], [CheckedGroup("p", 1, [], [])], [CheckedGroup("p", 1, [float("nan")], [True])]])
def test_nothing_to_measure_is_an_error(groups: list[CheckedGroup]) -> None:
    with pytest.raises(ValueError, match="scored candidate"):
        score_quality(groups)


def test_scores_outside_0_and_1_are_ranked_and_not_calibrated() -> None:
    quality = score_quality([CheckedGroup("p", 1, [-1.5, 0.4], [False, True])])
    assert (quality.auc_within, quality.ece, quality.bins) == (1.0, None, ())
    assert "ece" not in quality_as_results(quality)


def test_a_group_whose_gold_is_none_of_the_options_is_left_out() -> None:
    prompts = [
        Prompt.from_text(f"{gold}?", reference=gold, metadata={"choices": ["Rome", "Oslo"]})
        for gold in ("Oslo", "Bonn")
    ]
    rows = [{"prompt_id": p.id, "candidates": ["A", "B"], "scores": [0.1, 0.2], "step": 1} for p in prompts]
    choice = find_check(Data(prompts="unused", check="choice"))
    assert choice is not None
    assert check_groups(rows, prompts, choice) == [CheckedGroup(prompts[0].id, 1, [0.1, 0.2], [False, True])]


def test_groups_as_logged_are_checked_and_what_cannot_be_is_left_out() -> None:
    known, unknown = Prompt.from_text("2 + 2?", reference="4"), Prompt.from_text("A poem?")
    rows = [
        {"prompt_id": known.id, "candidates": ["4", "5", "?"], "scores": [0.9, 0.3, None]},
        {"prompt_id": unknown.id, "candidates": ["Roses"], "scores": [0.5]},
        {"prompt_id": "of another run", "candidates": ["x"], "scores": [0.5]},
        {"prompt_id": known.id, "candidates": ["4"], "scores": [None]},
    ]
    rows = [row | {"step": step} for step, row in enumerate(rows, 1)]
    groups = check_groups(rows, [known, unknown], lambda prompt, text: text == prompt.reference)
    assert groups == [
        CheckedGroup(known.id, 1, [0.9, 0.3, None], [True, False, False]),
        CheckedGroup(known.id, 4, [None], [True]),
    ]
    quality = score_quality(groups)
    assert (quality.n, quality.prompts, quality.right) == (2, 1, 0.5)
    results = quality_as_results(quality)
    assert results["bins"] == [{"n": 1, "score": 0.3, "right": 0.0}, {"n": 1, "score": 0.9, "right": 1.0}]
    assert results["auc_within"] == 1.0
    assert "auc" not in quality_as_results(score_quality([CheckedGroup("p", 1, [0.5], [True])]))


def test_the_accuracy_of_training_counts_every_candidate_scored_or_not() -> None:
    groups = [
        CheckedGroup("p", 2, [0.5, None], [True, True]),
        CheckedGroup("q", 1, [0.5, 0.1], [False, True]),
        CheckedGroup("q", 2, [0.5, 0.1], [False, False]),
    ]
    assert accuracy_by_step(groups) == [{"step": 1, "n": 2, "right": 0.5}, {"step": 2, "n": 4, "right": 0.5}]


def test_auc_by_hand() -> None:
    """Right 0.9, 0.5; wrong 0.5, 0.1: three of four comparisons won, one tied."""
    assert pairwise_auc([0.9, 0.5, 0.5, 0.1], [True, True, False, False]) == pytest.approx(3.5 / 4)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=30))
def test_auc_is_the_mean_of_all_comparisons(rows: list[tuple[int, bool]]) -> None:
    right = [s for s, y in rows if y]
    wrong = [s for s, y in rows if not y]
    scores, positive = zip(*rows, strict=True)
    if not right or not wrong:
        with pytest.raises(ValueError, match="one right and one wrong"):
            pairwise_auc(scores, positive)
        return
    expected = np.mean([(r > w) + (r == w) / 2 for r in right for w in wrong])
    assert pairwise_auc(scores, positive) == pytest.approx(expected)


@pytest.mark.parametrize(("scores", "words"), [([0.1, np.nan], "NaN"), ([0.1], "same length")])
def test_auc_refuses_unscored(scores: list[float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pairwise_auc(scores, [True, False])
