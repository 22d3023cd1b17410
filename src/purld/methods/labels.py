"""Turn scores into the positive-unlabeled label distribution of a group (section 3.3, Eq. 2).

Everything is computed in log space, in the dtype of the scores, so that extreme margins, large gammas and low
temperatures neither overflow nor round a label to zero early. Sampling and scoring happen elsewhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

REFERENCE_SPREAD = 0.3
"""The spread of scores in [0, 1] that the default gamma and tau are meant for; the demo's `expected` scores have it."""


@dataclass(frozen=True)
class PuLabels:
    """The labels of one group: log D_x of Eq. 2 and the confidences u_k in it, each (K,)."""

    log_distribution: Tensor
    confidences: Tensor

    @property
    def positives(self) -> Tensor:
        """Return the mean confidence in units of the anchor's, 1/2: the group's soft share of positives, () in [0, 2].

        It is m/K where m of K members, the anchor among them if it is one, score as the anchor does and the others far
        below it. Where the anchor's own score lies far above every candidate's, it is about 0 and says nothing.
        """
        return self.confidences.mean() / 0.5


def pu_labels(scores: Tensor, anchor_score: float, gamma: float, tau: float, scale: float = 1.0) -> PuLabels:
    """Make the labels of Eq. 2 from (K,) scores s_k and the anchor's score s*; see `log_label_distribution`.

    Margins are multiplied by `scale` first: 1 is the paper's literal form, `margin_scale` makes gamma and tau mean the
    same for every scorer. Theorems 3.1 and 3.2 hold for any positive scale, which keeps the order of the margins.

    Raises:
        ValueError: the scale is not a positive number.
    """
    if not 0 < scale < math.inf:
        raise ValueError(f"the scale of margins must be a positive number, not {scale}")
    margin = scale * anchor_margins(scores, anchor_score)
    return PuLabels(log_label_distribution(margin, gamma, tau), positive_confidences(margin, gamma))


def margin_scale(spread: float) -> float:
    """Return the factor that brings a scorer's spread to `REFERENCE_SPREAD`.

    Args:
        spread: the pooled standard deviation of the scorer's scores within groups; 0 gives 1, as there is nothing to
            scale.
    """
    return REFERENCE_SPREAD / spread if spread > 0 else 1.0


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
