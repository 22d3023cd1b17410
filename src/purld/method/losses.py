"""The LDL-GRPO objective of one group, as a function of its K sequence log-likelihoods (Eq. 3 to 5).

The objective sees the model only through log p_theta(y_k|x), so its gradient in the parameters is
sum_k c_k * grad log p_theta(y_k|x) with one number c_k per candidate. `group_objective` gives the value and
these coefficients from log-likelihoods computed without a graph; the trainer then sends candidates backward
in micro-batches of any size and the sum is the exact gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

QForm = Literal["ratio", "likelihood", "mean"]


@dataclass(frozen=True)
class GroupObjective:
    """The value of Eq. 4 on one group, its parts, and the gradient's coefficients.

    Attributes:
        value: KL(D || q) + beta * KL(p_theta || p_sft), shape ().
        divergence: KL(D || q), shape ().
        kl: Monte Carlo estimate of KL(p_theta || p_sft) in nats per sequence, shape ().
        log_q: (K,) log q_theta.
        coefficients: (K,) d value / d log p_theta(y_k|x), the KL's part an unbiased estimate.
    """

    value: Tensor
    divergence: Tensor
    kl: Tensor
    log_q: Tensor
    coefficients: Tensor


def log_policy_distribution(log_probs: Tensor, reference_log_probs: Tensor, lengths: Tensor, form: QForm) -> Tensor:
    """log q_theta over one group, shape (K,): the log-softmax of one number per candidate.

    `likelihood` is Eq. 3, log p_theta(y_k|x). `mean` divides it by the number of tokens. `ratio` is
    log p_theta(y_k|x) - log p_sft(y_k|x): candidates are drawn from the policy already, so Eq. 3 weighs them
    by it twice; against p_sft the fixed point of KL(D || q) is p_sft * D, the optimum of KL-regularised RL.

    Args:
        log_probs: (K,) sequence log-likelihoods under the policy, in nats.
        reference_log_probs: (K,) the same under p_sft.
        lengths: (K,) number of completion tokens.
        form: which of the three.
    """
    if form == "likelihood":
        logits = log_probs
    elif form == "mean":
        logits = log_probs / lengths
    else:
        logits = log_probs - reference_log_probs
    return torch.log_softmax(logits, dim=0)


def label_divergence(log_labels: Tensor, log_q: Tensor) -> Tensor:
    """KL(D || q) of one group in nats, shape () from two (K,) log-distributions (Eq. 4, first term)."""
    labels = log_labels.exp()
    # 0 * (-inf - x) would be nan: a label that underflowed contributes nothing.
    return torch.where(labels > 0, labels * (log_labels - log_q), torch.zeros_like(labels)).sum()


def kl_coefficients(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """Coefficients (K,) of grad log p_theta(y_k|x) that estimate the gradient of KL(p_theta || p_sft).

    With y ~ p_theta the gradient is E[(log p_theta(y) - log p_sft(y)) grad log p_theta(y)]; the mean of the
    other candidates' log-ratios is subtracted, which leaves the expectation as it is because it does not
    depend on y_k, and lowers the variance. (Differentiating the k3 estimator instead would give the
    gradient of KL(p_sft || p_theta).) A group of one has no others and goes without.
    """
    log_ratios = (log_probs - reference_log_probs).detach()
    k = log_ratios.numel()
    if k == 1:
        return log_ratios
    others = (log_ratios.sum() - log_ratios) / (k - 1)
    return (log_ratios - others) / k


def group_objective(
    log_labels: Tensor,
    log_probs: Tensor,
    reference_log_probs: Tensor,
    lengths: Tensor,
    *,
    form: QForm,
    beta: float,
) -> GroupObjective:
    """Eq. 4 on one group with the coefficients of its gradient.

    The gradient of KL(D || q) in q's logits is q_k - D_k. All arguments are (K,); no graph is needed or kept.

    Args:
        log_labels: log D_x of the scored candidates.
        log_probs: sequence log-likelihoods under the policy that is being updated.
        reference_log_probs: the same under the frozen p_sft.
        lengths: number of completion tokens, as floats or integers.
        form: how the policy is mapped onto the group, see `log_policy_distribution`.
        beta: weight of KL(p_theta || p_sft).
    """
    log_probs, reference_log_probs = log_probs.detach(), reference_log_probs.detach()
    log_q = log_policy_distribution(log_probs, reference_log_probs, lengths, form)
    divergence = label_divergence(log_labels, log_q)
    kl = (log_probs - reference_log_probs).mean()
    towards_labels = log_q.exp() - log_labels.exp()
    if form == "mean":
        towards_labels = towards_labels / lengths
    coefficients = towards_labels + beta * kl_coefficients(log_probs, reference_log_probs)
    return GroupObjective(divergence + beta * kl, divergence, kl, log_q, coefficients)
