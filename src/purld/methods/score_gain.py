"""Estimate what a policy gained over p_sft on one prompt, from the candidates of its group alone."""

from __future__ import annotations

import math

from torch import Tensor

LARGEST_WEIGHT = 5.0
"""Of p_sft / p; one candidate that the policy had all but given up would outweigh the rest of a stage."""


def score_gain(scores: Tensor, log_ratios: Tensor) -> Tensor:
    """Estimate E_p[s] - E_sft[s], the mean score of the policy's answers less that of p_sft's; shape ().

    Minus the sample covariance of s_k and the importance weights w_k = p_sft(y_k) / p(y_k). With y_k ~ p the expected
    weight is 1 and the expected weighted score is p_sft's, so the estimate is unbiased, for any K and without a draw of
    p_sft. Weights beyond `LARGEST_WEIGHT` are cut, and it is biased by what is cut. It is 0 where all scores are equal,
    or where the policy is p_sft.

    Args:
        scores: (K,) scores of candidates that the policy drew at temperature 1; K >= 2.
        log_ratios: (K,) log p(y_k) - log p_sft(y_k), in nats.
    """
    weights = (-log_ratios).clamp(max=math.log(LARGEST_WEIGHT)).exp()
    return -((scores - scores.mean()) * (weights - weights.mean())).sum() / (len(scores) - 1)
