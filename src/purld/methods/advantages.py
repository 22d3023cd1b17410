"""Turn scores into what the objectives learn from: advantages, ranked pairs, and PPO's credit per token.

A score belongs to a whole answer. Everything here is a pure function of tensors; no model is involved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Pairing = Literal["all", "extremes"]
_SMALL = 1e-4  # TRL's; keeps a group of equal scores finite


def group_advantages(scores: Tensor) -> Tensor:
    """Standardise scores over one group: (s_k - mean) / (std + 1e-4), shape (K,) (Shao et al., 2024, section 4.1.2).

    Args:
        scores: (K,) scores, K >= 2; the standard deviation is the unbiased one.
    """
    return (scores - scores.mean()) / (scores.std() + _SMALL)


def ranked_pairs(scores: Tensor, margin: float, pairing: Pairing) -> Tensor:
    """List the pairs that a group's ranking implies: (P, 2) indices, the better one first; P may be 0.

    Args:
        scores: (K,) scores.
        margin: a pair's scores differ by more than this; 0 leaves out ties alone.
        pairing: `all` such pairs, or the best against the worst (the first of equals).
    """
    if pairing == "extremes":
        pairs = torch.stack([scores.argmax(), scores.argmin()]).unsqueeze(0)  # (1, 2)
        return pairs[scores[pairs[:, 0]] - scores[pairs[:, 1]] > margin]
    return (scores.unsqueeze(1) - scores.unsqueeze(0) > margin).nonzero()


@dataclass(frozen=True)
class TokenCredit:
    """PPO's credit per token: (K, C) advantages for the policy and (K, C) returns for the critic."""

    advantages: Tensor
    returns: Tensor


def token_rewards(scores: Tensor, old: Tensor, reference: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Spread scores over tokens: -beta (log p_old - log p_sft) at every token, plus the score at the last; (K, C).

    Args:
        scores: (K,) scores of whole answers.
        old: (K, C) log-probs under the policy that drew them, in nats.
        reference: (K, C) the same under p_sft.
        mask: (K, C), 1 on an answer's tokens; every answer has one.
        beta: weight of the KL from p_sft.
    """
    last = mask.sum(dim=1).long() - 1  # (K,)
    rewards = -beta * (old - reference) * mask
    return rewards.scatter_add(1, last.unsqueeze(1), scores.unsqueeze(1))


def generalised_advantages(rewards: Tensor, values: Tensor, mask: Tensor, discount: float, trace: float) -> TokenCredit:
    """Estimate generalised advantages (Schulman et al., 2016, Eq. 16), backwards from each answer's end.

    A_t = delta_t + discount * trace * A_{t+1} with delta_t = r_t + discount * V_{t+1} - V_t; after the last token
    there is no value. Returns are A_t + V_t.

    Args:
        rewards: (K, C), 0 where `mask` is.
        values: (K, C), the value before each token.
        mask: (K, C), 1 on an answer's tokens.
        discount: per token.
        trace: lambda; 1 is the Monte Carlo return, 0 one step of bootstrapping.
    """
    values = values * mask
    advantages = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])  # (K,) A_{t+1}
    next_value = torch.zeros_like(following)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + discount * next_value - values[:, t]
        following = (delta + discount * trace * following) * mask[:, t]
        next_value = values[:, t]
        advantages[:, t] = following
    return TokenCredit(advantages, advantages + values)


def whiten_advantages(credits: Sequence[TokenCredit], masks: Sequence[Tensor]) -> list[TokenCredit]:
    """Standardise the advantages of a step: mean 0 and standard deviation 1 over all tokens of its prompts.

    Args:
        credits: one per prompt.
        masks: their (K, C) masks; widths may differ.
    """
    tokens = torch.cat([c.advantages[m > 0] for c, m in zip(credits, masks)])
    spread = tokens.std(unbiased=False) + _SMALL
    return [TokenCredit((c.advantages - tokens.mean()) / spread * m, c.returns) for c, m in zip(credits, masks)]
