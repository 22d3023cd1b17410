"""Eq. 2 and the two theorems of section 3.4, over the whole range of what a run can meet."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from purld.methods.labels import (
    REFERENCE_SPREAD,
    anchor_margins,
    distribution_entropy,
    log_label_distribution,
    margin_scale,
    positive_confidences,
    pu_labels,
)

GAMMA = st.floats(1e-3, 1e3)
TAU = st.floats(1e-3, 1e3)
# Scores of an evaluator, with ties and the ends of the scale drawn often.
SCORE = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.1, 0.5, 0.95, 1.0]))
SCORES = st.lists(SCORE, min_size=1, max_size=32)


def test_hand_computed_distribution():
    """gamma = 2, tau = 1, s* = 0.9, scores 0.9 and 0.4: margins 0 and -0.5.

    w = (1/2 * 1, 1/(1 + e^1) * e^-0.5) = (0.5, 0.268941 * 0.606531) = (0.5, 0.163121)
    D = (0.5, 0.163121) / 0.663121 = (0.754010, 0.245990)
    """
    margin = anchor_margins(torch.tensor([0.9, 0.4]), 0.9)
    assert margin.tolist() == pytest.approx([0.0, -0.5])
    assert positive_confidences(margin, 2.0).tolist() == pytest.approx([0.5, 0.268941], abs=1e-6)
    assert log_label_distribution(margin, 2.0, 1.0).exp().tolist() == pytest.approx([0.754010, 0.245990], abs=1e-6)


@given(SCORES, SCORE, GAMMA, TAU)
def test_is_a_distribution(scores, anchor, gamma, tau):
    log_labels = log_label_distribution(anchor_margins(torch.tensor(scores), anchor), gamma, tau)
    assert torch.isfinite(log_labels).all()
    assert log_labels.exp().sum().item() == pytest.approx(1.0, abs=1e-5)


@given(SCORES, SCORE, GAMMA, TAU)
def test_theorem_3_1_labels_keep_the_order_of_margins(scores, anchor, gamma, tau):
    """In float64 and in log space the order is strict wherever f(r) itself tells two margins apart."""
    margin = anchor_margins(torch.tensor(scores, dtype=torch.float64), anchor)
    log_labels = log_label_distribution(margin, gamma, tau)
    for i in range(len(scores)):
        for j in range(len(scores)):
            difference = (margin[i] - margin[j]).item()
            if difference > 0:
                assert log_labels[i] >= log_labels[j]
            if difference > 1e-9:  # f' > 1 / tau >= 1e-3, so log D differs by 1e-12 or more
                assert log_labels[i] > log_labels[j]
            if difference == 0:
                assert log_labels[i] == log_labels[j]


@given(SCORES, SCORE, GAMMA, TAU)
def test_theorem_3_2_expected_margin_is_near_the_best(scores, anchor, gamma, tau):
    margin = anchor_margins(torch.tensor(scores, dtype=torch.float64), anchor)
    expected = (log_label_distribution(margin, gamma, tau).exp() * margin).sum()
    assert (margin.max() - expected).item() <= tau * math.log(len(scores)) + 1e-9


@given(SCORES, SCORE, GAMMA, TAU)
def test_remark_2_the_pu_factor_only_concentrates(scores, anchor, gamma, tau):
    margin = anchor_margins(torch.tensor(scores, dtype=torch.float64), anchor)
    softmax = torch.softmax(margin / tau, dim=0)
    assert (log_label_distribution(margin, gamma, tau).exp() * margin).sum() >= (softmax * margin).sum() - 1e-9


def test_extreme_values_neither_overflow_nor_vanish():
    margin = torch.tensor([0.0, -1e3, 1e3, -1.0])
    log_labels = log_label_distribution(margin, gamma=1e3, tau=1e-2)
    assert torch.isfinite(log_labels).all()
    assert log_labels.argmax().item() == 2
    assert log_labels[0] > log_labels[3] > log_labels[1]


def test_a_group_of_equals_is_uniform():
    log_labels = log_label_distribution(torch.full((8,), -0.3), gamma=10.0, tau=1.2)
    assert log_labels.tolist() == pytest.approx([-math.log(8)] * 8)
    assert distribution_entropy(log_labels).item() == pytest.approx(math.log(8))


@pytest.mark.parametrize(
    ("margin", "gamma", "tau", "word"),
    [
        (torch.tensor([]), 1.0, 1.0, "shape"),
        (torch.tensor([[0.0]]), 1.0, 1.0, "shape"),
        (torch.tensor([0.0, math.nan]), 1.0, 1.0, "finite"),
        (torch.tensor([0.0]), 0.0, 1.0, "positive"),
        (torch.tensor([0.0]), 1.0, -1.0, "positive"),
    ],
)
def test_bad_input_is_refused(margin, gamma, tau, word):
    with pytest.raises(ValueError, match=word):
        log_label_distribution(margin, gamma, tau)


@given(st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=8), st.floats(0.1, 20), st.floats(0.2, 5))
def test_theorems_hold_for_scaled_margins(scores, scale, gamma):
    """3.1, labels keep the order of the scores; 3.2, they prefer larger margins to the uniform distribution."""
    values = torch.tensor(scores, dtype=torch.float64)
    labels = pu_labels(values, 0.9, gamma, 1.2, scale).log_distribution
    gaps, label_gaps = values[:, None] - values[None], labels[:, None] - labels[None]
    assert (label_gaps[gaps > 1e-6] > 0).all()
    assert (labels.exp() * values).sum() >= values.mean() - 1e-9


def test_a_scale_changes_the_unit_and_nothing_else():
    """Scores in another unit with the scale that undoes it give the same labels; 1 is the literal form."""
    scores = torch.tensor([0.2, 0.9, 0.4], dtype=torch.float64)
    literal = pu_labels(scores, 0.95, 5.0, 1.2)
    other_unit = pu_labels(100 * scores, 95.0, 5.0, 1.2, scale=0.01)
    torch.testing.assert_close(other_unit.log_distribution, literal.log_distribution)
    torch.testing.assert_close(other_unit.confidences, literal.confidences)
    assert margin_scale(REFERENCE_SPREAD) == 1.0 and margin_scale(0.03) == pytest.approx(10.0)
    assert margin_scale(0.0) == 1.0
    with pytest.raises(ValueError, match="positive"):
        pu_labels(scores, 0.95, 5.0, 1.2, scale=0.0)
