"""Turn scores into the positive-unlabeled label distribution of a group (section 3.3, Eq. 2).

Everything is computed in log space, in the dtype of the scores, so that extreme margins, large gammas and low
temperatures neither overflow nor round a label to zero early. Sampling and scoring happen elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True)
class PuLabels:
    """The labels of one group: log D_x of Eq. 2 and the confidences u_k in it, each (K,)."""

    log_distribution: Tensor
    confidences: Tensor


def pu_labels(scores: Tensor, anchor_score: float, gamma: float, tau: float) -> PuLabels:
    """Make the labels of Eq. 2 from (K,) scores s_k and the anchor's score s*; see `log_label_distribution`."""
    margin = anchor_margins(scores, anchor_score)
    return PuLabels(log_label_distribution(margin, gamma, tau), positive_confidences(margin, gamma))


def anchor_margins(scores: Tensor, anchor_score: Tensor | float) -> Tensor:
    """Return the anchor-referenced margins r_k = s_k - s* of a group, shape (K,).

    Args:
        scores: (K,) scores s_k of the candidates.
        anchor_score: s* = g(x, a, a), the evaluator's score of the anchor against itself.
    """
    return scores - anchor_score


def positive_confidences(margin: Tensor, gamma: float) -> Tensor:
    """Return the soft positivity u_k = sigmoid(gamma r_k) of the candidates, shape (K,)."""
    return torch.sigmoid(gamma * margin)


def log_label_distribution(margin: Tensor, gamma: float, tau: float) -> Tensor:
    """Return log D_x of Eq. 2, shape (K,): the log-softmax of log sigmoid(gamma r_k) + r_k / tau.

    Args:
        margin: (K,) margins r_k, all finite.
        gamma: the sharpness of the PU confidence, > 0.
        tau: the temperature, > 0.

    Raises:
        ValueError: the group is empty, a margin is not finite, or gamma or tau is not positive.
    """
    if margin.ndim != 1 or margin.numel() == 0:
        raise ValueError(f"margins of one group have shape (K,) with K >= 1, not {tuple(margin.shape)}")
    if not torch.isfinite(margin).all():
        raise ValueError("a margin is not finite; leave unscored candidates out of the group")
    if gamma <= 0 or tau <= 0:
        raise ValueError(f"gamma and tau must be positive, not {gamma} and {tau}")
    return torch.log_softmax(logsigmoid(gamma * margin) + margin / tau, dim=0)


def distribution_entropy(log_distribution: Tensor) -> Tensor:
    """Return the Shannon entropy in nats of a (K,) distribution given by its logarithm, shape ()."""
    return -(log_distribution.exp() * log_distribution.clamp(min=torch.finfo(log_distribution.dtype).min)).sum()
