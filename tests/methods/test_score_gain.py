"""The gain over p_sft: exact in expectation, by enumeration of every group that could be drawn."""

import itertools

import pytest
import torch

from purld.methods.score_gain import LARGEST_WEIGHT, score_gain

SCORES = torch.tensor([1.0, 0.3, 0.0], dtype=torch.float64)
POLICY = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
P_SFT = torch.tensor([0.2, 0.1, 0.7], dtype=torch.float64)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_expectation_over_all_groups_is_the_difference_of_the_mean_scores(size):
    expected = torch.zeros((), dtype=torch.float64)
    for group in itertools.product(range(3), repeat=size):
        drawn = torch.tensor(group)
        log_ratios = (POLICY[drawn] / P_SFT[drawn]).log()
        expected += POLICY[drawn].prod() * score_gain(SCORES[drawn], log_ratios)
    assert expected.item() == pytest.approx(((POLICY - P_SFT) * SCORES).sum().item(), abs=1e-12)


def test_it_is_zero_where_the_policy_is_p_sft_or_all_scores_are_equal():
    assert score_gain(torch.tensor([1.0, 0.0, 0.4]), torch.zeros(3)) == 0
    assert score_gain(torch.full((3,), 0.7), torch.tensor([0.5, -2.0, 1.0])).abs() < 1e-7


def test_a_candidate_that_the_policy_gave_up_weighs_no_more_than_the_cap():
    scores = torch.tensor([1.0, 0.0])
    assert score_gain(scores, torch.tensor([-1e4, 0.0])).item() == pytest.approx(-(LARGEST_WEIGHT - 1) / 2)
