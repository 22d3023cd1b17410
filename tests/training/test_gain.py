"""What Stage II says of its own gain."""

import math

import pytest
import torch

from purld.methods.losses import GroupTokens
from purld.methods.score_gain import score_gain
from purld.model.self_evaluation import GroupScores
from purld.training.gain import METRIC, final_gain
from purld.training.metrics import StepMetrics
from purld.training.rollout import Rollout


def rows(*gains):
    return [{"step": step, "gain": gain} for step, gain in enumerate(gains, start=1)]


def rollout(scores, members=()):
    return Rollout(question=None, completions=(), texts=(), scores=GroupScores(1.0, scores), member_candidates=members)


def test_a_step_measures_the_scored_candidates_and_not_the_anchor_before_them():
    log_ratios = torch.tensor([9.0, 0.5, -0.5])  # the anchor's first
    old = torch.stack([log_ratios, torch.full((3,), 5.0)], dim=1)
    tokens = GroupTokens(old, torch.zeros(3, 2), old, torch.tensor([[1.0, 0.0]] * 3))  # the second token is padding
    metrics = StepMetrics()
    metrics.add_gain(rollout([0.9, None, 0.2], members=(0, 2)), tokens)
    assert metrics.drain() == {METRIC: pytest.approx(score_gain(torch.tensor([0.9, 0.2]), log_ratios[1:]).item())}


def test_a_group_that_is_left_out_counts_as_zero_where_its_scores_are_equal_and_else_not():
    metrics = StepMetrics()
    for scores in ([1.0, 1.0, None], [1.0, 0.0], [None, 1.0], []):
        metrics.add_gain(rollout(scores), None)
    assert metrics._values[METRIC] == [0.0]


def test_the_last_quarter_counts_with_the_interval_of_its_mean():
    facts = final_gain(rows(*[-1.0] * 30, *[0.04, 0.06] * 5))
    error = 2.2622 * math.sqrt(10 * 0.01**2 / 9) / math.sqrt(10)  # Student's t, 9 degrees of freedom
    assert (facts.gain, facts.low, facts.high) == pytest.approx((0.05, 0.05 - error, 0.05 + error), rel=1e-5)
    assert facts.warning is None and facts.describe() == (
        "Gain in score over the SFT model, by its own estimate: +0.050 [+0.042, +0.058]."
    )


def test_eight_steps_have_the_interval_of_students_t():
    facts = final_gain(rows(*[0.04, 0.06] * 4))
    assert facts.high - facts.gain == pytest.approx(2.3646 * math.sqrt(8 * 0.01**2 / 7) / math.sqrt(8), rel=1e-4)


def test_a_loss_is_a_warning_with_a_remedy_and_what_is_not_told_apart_from_zero_says_so():
    assert "lower align.learning_rate" in final_gain(rows(*[-0.2, -0.1] * 8)).warning
    unsure = final_gain(rows(*[-0.2, 0.3] * 8))
    assert unsure.warning is None and "not told apart from zero" in unsure.describe()


def test_too_few_steps_say_nothing():
    assert final_gain(rows(*[0.1] * 7)) is None and final_gain([{"step": 1, "objective": 0.3}] * 20) is None
