"""Eq. 3 to 5: values derived by hand, gradients against autograd, and the KL's gradient against the exact one."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from purld.method.losses import group_objective, kl_coefficients, label_divergence, log_policy_distribution

FORMS = ("ratio", "likelihood", "mean")


def test_hand_derived_objective():
    """Two candidates, D = (3/4, 1/4), log p = (log 0.2, log 0.2), log p_sft = (log 0.1, log 0.2), beta = 0.5.

    likelihood: q = (1/2, 1/2)
        KL(D||q) = 3/4 log(3/2) + 1/4 log(1/2) = 0.304099 - 0.173287 = 0.130812
    KL(p||p_sft) is estimated by the mean log-ratio: (log 2 + 0) / 2 = 0.346574
        value = 0.130812 + 0.5 * 0.346574 = 0.304099
    coefficients: q - D = (-1/4, 1/4); the KL's: (log 2 - 0)/2 and (0 - log 2)/2 = (0.346574, -0.346574)
        (-0.25 + 0.173287, 0.25 - 0.173287) = (-0.076713, 0.076713)
    ratio: q = (2, 1)/3; KL = 3/4 log(9/8) + 1/4 log(3/4) = 0.088337 - 0.071921 = 0.016417
    """
    arguments = (
        torch.tensor([0.75, 0.25]).log(),
        torch.tensor([0.2, 0.2]).log(),
        torch.tensor([0.1, 0.2]).log(),
        torch.tensor([3.0, 3.0]),
    )
    plain = group_objective(*arguments, form="likelihood", beta=0.5)
    assert plain.divergence.item() == pytest.approx(0.130812, abs=1e-6)
    assert plain.kl.item() == pytest.approx(0.346574, abs=1e-6)
    assert plain.value.item() == pytest.approx(0.304099, abs=1e-6)
    assert plain.coefficients.tolist() == pytest.approx([-0.076713, 0.076713], abs=1e-6)
    ratio = group_objective(*arguments, form="ratio", beta=0.5)
    assert ratio.log_q.exp().tolist() == pytest.approx([2 / 3, 1 / 3], abs=1e-6)
    assert ratio.divergence.item() == pytest.approx(0.016417, abs=1e-6)


def test_mean_form_divides_by_length():
    log_q = log_policy_distribution(torch.tensor([-4.0, -9.0]), torch.zeros(2), torch.tensor([2.0, 3.0]), "mean")
    assert log_q.exp().tolist() == pytest.approx(torch.softmax(torch.tensor([-2.0, -3.0]), 0).tolist())


@pytest.mark.parametrize("form", FORMS)
@given(data=st.data())
def test_coefficients_are_autograds_gradient_of_the_divergence(form, data):
    k = data.draw(st.integers(2, 16))
    numbers = st.lists(st.floats(-40, 0), min_size=k, max_size=k)
    log_probs = torch.tensor(data.draw(numbers), dtype=torch.float64, requires_grad=True)
    reference = torch.tensor(data.draw(numbers), dtype=torch.float64)
    lengths = torch.tensor(data.draw(st.lists(st.integers(1, 50), min_size=k, max_size=k)), dtype=torch.float64)
    log_labels = torch.log_softmax(torch.tensor(data.draw(numbers), dtype=torch.float64), dim=0)
    label_divergence(log_labels, log_policy_distribution(log_probs, reference, lengths, form)).backward()
    found = group_objective(log_labels, log_probs, reference, lengths, form=form, beta=0.0).coefficients
    assert torch.allclose(found, log_probs.grad, atol=1e-9, rtol=1e-6)


def test_extreme_log_likelihoods_stay_finite():
    log_probs = torch.tensor([-5.0, -5000.0, -900.0])
    log_labels = torch.tensor([-2000.0, 0.0, -1500.0])
    found = group_objective(log_labels, log_probs, log_probs - 1, torch.ones(3), form="likelihood", beta=0.01)
    assert torch.isfinite(found.coefficients).all()
    assert math.isfinite(found.value.item())
    assert found.divergence.item() == pytest.approx(4995.0)


def exact_kl_gradient(logits, reference_logits):
    """d KL(p || ref) / d logits of two categoricals, by autograd."""
    logits = logits.clone().requires_grad_()
    log_p = torch.log_softmax(logits, 0)
    (log_p.exp() * (log_p - torch.log_softmax(reference_logits, 0))).sum().backward()
    return logits.grad


def mean_estimated_gradient(logits, reference_logits, k):
    """The estimator's exact expectation: every group of k draws, weighted by its probability."""
    log_p = torch.log_softmax(logits, 0)
    log_reference = torch.log_softmax(reference_logits, 0)
    total = torch.zeros_like(logits)
    scores = torch.eye(len(logits), dtype=logits.dtype) - log_p.exp()  # row y: d log p(y) / d logits
    for group in torch.cartesian_prod(*[torch.arange(len(logits))] * k).reshape(-1, k):
        weight = log_p[group].sum().exp()
        total += weight * (kl_coefficients(log_p[group], log_reference[group]) @ scores[group])
    return total


@pytest.mark.parametrize("k", [1, 2, 3])
def test_kl_estimator_has_the_gradient_of_kl_policy_to_reference(k):
    """In expectation over groups, exactly; and that of the reverse divergence is another one."""
    logits = torch.tensor([0.3, -1.2, 0.9, 0.0], dtype=torch.float64)
    reference = torch.tensor([-0.5, 0.4, 0.1, 1.3], dtype=torch.float64)
    found = mean_estimated_gradient(logits, reference, k)
    assert torch.allclose(found, exact_kl_gradient(logits, reference), atol=1e-12)
    reverse = torch.softmax(logits, 0) - torch.softmax(reference, 0)  # d KL(ref || p) / d logits
    assert (found - reverse).abs().max() > 0.05


def test_kl_pulls_back_towards_the_reference():
    coefficients = kl_coefficients(torch.tensor([-1.0, -3.0]), torch.tensor([-2.0, -2.0]))
    assert coefficients.tolist() == pytest.approx([1.0, -1.0])
