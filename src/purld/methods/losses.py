"""The objectives of Stage II, each a pure function of one group's per-token log-probs.

Every objective takes `GroupTokens` and its signal and returns a `GroupLoss`. It sees the model only through (K, C)
log-probs (PPO's also through (K, C) values), so its gradient in the parameters is sum_kt c_kt grad log p(y_kt|x, y_k<t)
with one number c_kt per token. `loss_coefficients` computes these numbers from log-probs without a graph. The trainer
then sends members backward in micro-batches, and the sum is the exact gradient for every objective and batch size.
`labels` and `advantages` make the signals; sampling and scoring happen elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from purld.methods.advantages import TokenCredit
from purld.methods.labels import distribution_entropy

QForm = Literal["ratio", "likelihood", "mean"]
WEIGHT_CAP = 2.0
"""The greatest importance weight of a sequence; a rare one with a large weight would drown the others."""


@dataclass(frozen=True)
class GroupTokens:
    """The members of one group as an objective sees them; every tensor is (K, C), float32, padded on the right.

    Attributes:
        policy: log p_theta of each token, in nats; the objective is differentiated in it.
        reference: the same under the frozen p_sft, which reads the anchor too if the method's row says so.
        old: the same under the policy that drew the members.
        mask: 1 on a member's tokens, 0 on padding.
        values: the critic's value before each token; differentiated too. None without a critic.
        old_values: the critic's values when the members were drawn.
        sampled: as `old`, by the numbers of the engine that drew the members; NaN on a member that was not drawn.
            None where the policy itself drew them.
    """

    policy: Tensor
    reference: Tensor
    old: Tensor
    mask: Tensor
    values: Tensor | None = None
    old_values: Tensor | None = None
    sampled: Tensor | None = None

    @property
    def lengths(self) -> Tensor:
        """Return the (K,) numbers of tokens, as floats."""
        return self.mask.sum(dim=1)

    def sequences(self, log_probs: Tensor) -> Tensor:
        """Sum (K, C) log-probs over each member's tokens, (K,)."""
        return (log_probs * self.mask).sum(dim=1)


@dataclass(frozen=True)
class GroupLoss:
    """An objective's value on one group, with what to log.

    Attributes:
        value: shape (); its gradient is the objective's, or an unbiased estimate of it.
        metrics: () tensors by name; the trainer logs their means.
        members: (K,) tensors by name, kept in the record of the group.
    """

    value: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    members: Mapping[str, Tensor] = field(default_factory=dict)


def loss_coefficients(
    objective: Callable[[GroupTokens], GroupLoss], tokens: GroupTokens, importance_cap: float | None = None
) -> tuple[GroupLoss, Tensor, Tensor | None]:
    """Return the objective and its (K, C) gradients in `tokens.policy` and `tokens.values`, without keeping a graph.

    Args:
        objective: the objective.
        tokens: the members.
        importance_cap: multiply each member's gradients by its `engine_weights`; None leaves them.
    """
    policy = tokens.policy.detach().requires_grad_()
    values = None if tokens.values is None else tokens.values.detach().requires_grad_()
    with torch.enable_grad():
        loss = objective(replace(tokens, policy=policy, values=values))
        loss.value.backward()
    gradients = [None if x is None else torch.zeros_like(x) if x.grad is None else x.grad for x in (policy, values)]
    metrics = {name: metric.detach() for name, metric in loss.metrics.items()}
    if importance_cap is not None and (weights := engine_weights(tokens, importance_cap)) is not None:
        gradients = [None if gradient is None else weights.unsqueeze(1) * gradient for gradient in gradients]
        metrics |= {"importance": weights.mean(), "importance_capped": (weights >= importance_cap).float().mean()}
    members = {name: column.detach() for name, column in loss.members.items()}
    detached = GroupLoss(loss.value.detach(), metrics, members)
    assert gradients[0] is not None
    return detached, gradients[0], gradients[1]


def engine_weights(tokens: GroupTokens, cap: float) -> Tensor | None:
    """Return p_old(y) / p_engine(y) of each member, at most `cap`, shape (K,); None where the policy drew them itself.

    An engine that computes in other numbers draws from a slightly other distribution. With these weights, a mean over
    its draws of what depends on one draw alone has the policy's own expectation, as long as the cap is not met
    (truncated importance sampling: Ionides, 2008, here of whole answers). A member that was not drawn has weight 1,
    unless only one was: what the objective makes of the group then depends on that draw, and all members have its
    weight.
    """
    if tokens.sampled is None:
        return None
    drawn = tokens.sampled[:, 0].isfinite()
    log_ratios = tokens.sequences((tokens.old - tokens.sampled).nan_to_num(nan=0.0)).detach()
    if drawn.sum() == 1:
        log_ratios = log_ratios[drawn].expand(len(drawn))
    return log_ratios.exp().clamp(max=cap)


def sampling_gaps(tokens: GroupTokens) -> Tensor | None:
    """Return |log p_old - log p_engine| of every drawn token of a group, in nats, (T,); None without an engine."""
    if tokens.sampled is None:
        return None
    gaps = (tokens.old - tokens.sampled).abs()
    return gaps[(tokens.mask > 0) & ~gaps.isnan()]


# --- LDL-GRPO ------------------------------------------------------------------------------------------------


def ldl_loss(
    tokens: GroupTokens,
    log_labels: Tensor,
    *,
    form: QForm,
    beta: float,
    drawn: int | None = None,
    weight: Tensor | float = 1.0,
) -> GroupLoss:
    """Compute weight KL(D || q_theta) + beta KL(p_theta || p_sft) of one group (Eq. 4).

    Args:
        tokens: K members: candidates drawn from the policy `tokens.old`, before them the anchor if it is a member.
        log_labels: (K,) log D_x.
        form: how q is made of the policy, see `log_policy_distribution`.
        beta: weight of the KL from p_sft.
        drawn: how many of the last members were drawn, which the KL is estimated on; all unless given.
        weight: what the group counts among those of an update; 1 in Eq. 4.
    """
    log_probs, reference = tokens.sequences(tokens.policy), tokens.sequences(tokens.reference)
    log_q = log_policy_distribution(log_probs, reference, tokens.lengths, form)
    divergence = labels_kl(log_labels, log_q)
    entropy_labels, entropy_policy = distribution_entropy(log_labels), distribution_entropy(log_q.detach())
    metrics = {
        "ldl": divergence,
        "entropy_labels": entropy_labels,
        "entropy_policy": entropy_policy,
        "sharper_than_labels": (entropy_policy < entropy_labels).float(),
    }
    if log_labels.numel() > 1:
        metrics["label_uniformity"] = entropy_labels / math.log(log_labels.numel())
    q = log_q.exp()
    if (correlation := _correlation(q.detach(), tokens.lengths)) is not None:
        metrics["length_correlation"] = correlation
    rows = slice(len(q) - (len(q) if drawn is None else drawn), None)
    old = tokens.sequences(tokens.old)
    value = weight * divergence + beta * kl_from_reference(log_probs[rows], reference[rows], old[rows])
    return GroupLoss(value, metrics, {"labels": log_labels.exp(), "policy_before": q})


def log_policy_distribution(log_probs: Tensor, reference_log_probs: Tensor, lengths: Tensor, form: QForm) -> Tensor:
    """Return log q_theta over one group, shape (K,): the log-softmax of one number per candidate.

    `likelihood` is Eq. 3, log p_theta(y_k|x). `mean` divides it by the number of tokens. `ratio` is
    log p_theta(y_k|x) - log p_sft(y_k|x): candidates are drawn from the policy already, so Eq. 3 weighs them
    by it twice; against p_sft the fixed point of KL(D || q) is p_sft * D, the optimum of KL-regularised RL.

    Args:
        log_probs: (K,) sequence log-likelihoods under the policy, in nats.
        reference_log_probs: (K,) the same under p_sft.
        lengths: (K,) number of completion tokens.
        form: one of the three.
    """
    if form == "likelihood":
        logits = log_probs
    elif form == "mean":
        logits = log_probs / lengths
    else:
        logits = log_probs - reference_log_probs
    return torch.log_softmax(logits, dim=0)


def labels_kl(log_labels: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(D || q) of one group in nats, shape (), from two (K,) log-distributions (Eq. 4, first term)."""
    labels = log_labels.exp()
    # 0 * (-inf - x) would be nan: a label that underflowed contributes nothing.
    return torch.where(labels > 0, labels * (log_labels - log_q), torch.zeros_like(labels)).sum()


def kl_coefficients(log_probs: Tensor, reference_log_probs: Tensor, old_log_probs: Tensor | None = None) -> Tensor:
    """Return (K,) coefficients of grad log p_theta(y_k|x) that estimate the gradient of KL(p_theta || p_sft).

    With y ~ p_theta the gradient is E[(log p_theta(y) - log p_sft(y)) grad log p_theta(y)]; the mean of the
    other candidates' log-ratios is subtracted, which leaves the expectation as it is because it does not
    depend on y_k, and lowers the variance. (Differentiating the k3 estimator instead would give the
    gradient of KL(p_sft || p_theta).) A group of one has no others and goes without.

    If `old_log_probs`, (K,), says that an earlier policy drew the sequences, each has its importance weight
    p_theta / p_old, at most `WEIGHT_CAP`; below the cap the expectation stays exact.
    """
    log_ratios = (log_probs - reference_log_probs).detach()
    weights = importance_weights(log_probs, old_log_probs)
    k = log_ratios.numel()
    if k == 1:
        return weights * log_ratios
    weighted = weights * log_ratios
    # The baseline of a draw is made of the others, so that it is independent of it.
    others = (weighted.sum() - weighted) / (k - 1)
    return weights * (log_ratios - others) / k


def importance_weights(log_probs: Tensor, old_log_probs: Tensor | None) -> Tensor:
    """Return p_theta / p_old of whole sequences, at most `WEIGHT_CAP`, (K,), detached; 1 without `old_log_probs`."""
    if old_log_probs is None:
        return torch.ones_like(log_probs)
    return (log_probs - old_log_probs).detach().exp().clamp(max=WEIGHT_CAP)


def kl_from_reference(log_probs: Tensor, reference_log_probs: Tensor, old_log_probs: Tensor | None = None) -> Tensor:
    """Estimate KL(p_theta || p_sft) in nats per sequence, shape (), from (K,) log-likelihoods of draws.

    Its value is the mean log-ratio; its gradient is that of `kl_coefficients`, which the mean's own gradient is not.
    If an earlier policy drew the sequences, both are weighted as there.
    """
    weights = importance_weights(log_probs, old_log_probs)
    value = (weights * (log_probs - reference_log_probs).detach()).mean()
    coefficients = kl_coefficients(log_probs, reference_log_probs, old_log_probs)
    return value + (coefficients * (log_probs - log_probs.detach())).sum()


def _correlation(x: Tensor, y: Tensor) -> Tensor | None:
    """Return Pearson's correlation of two (K,) tensors, shape (); None where one is constant."""
    if x.numel() < 2 or x.std() < 1e-8 or y.std() < 1e-8:
        return None
    return torch.corrcoef(torch.stack([x, y]))[0, 1]


# --- DPO -----------------------------------------------------------------------------------------------------


def dpo_loss(tokens: GroupTokens, pairs: Tensor, *, beta: float) -> GroupLoss:
    """Compute -log sigmoid(beta (log-ratio of the chosen - that of the rejected)), the mean over a group's pairs.

    Rafailov et al., 2023, Eq. 7; log-ratios are log p_theta - log p_sft of whole sequences. A member may be in
    several pairs.

    Args:
        tokens: the members.
        pairs: (P, 2) indices of members, the chosen one first; P >= 1.
        beta: the strength of the implied KL from p_sft.
    """
    log_ratios = tokens.sequences(tokens.policy - tokens.reference)
    gaps = log_ratios[pairs[:, 0]] - log_ratios[pairs[:, 1]]  # (P,)
    metrics = {"pair_accuracy": (gaps > 0).float().mean(), "pairs": torch.tensor(float(len(pairs)))}
    return GroupLoss(-logsigmoid(beta * gaps).mean(), metrics)


# --- policy gradients ----------------------------------------------------------------------------------------


def grpo_loss(tokens: GroupTokens, advantages: Tensor, *, clip: float, beta: float) -> GroupLoss:
    """Compute the clipped surrogate of GRPO plus beta KL(p_theta || p_sft) (Shao et al., 2024, Eq. 3).

    The mean over a member's tokens, then over members. The KL is the k3 estimate times the importance ratio: so the
    expectation over draws, and hence the gradient, is KL(p_theta || p_sft)'s; k3's alone is KL(p_sft || p_theta)'s.

    Args:
        tokens: K candidates drawn from the policy `tokens.old`.
        advantages: (K,).
        clip: the ratio to the old policy is clipped to [1 - clip, 1 + clip].
        beta: weight of the KL; 0 leaves it out.
    """
    per_token, clipped = _clipped_surrogate(tokens, advantages.unsqueeze(1), clip)
    if beta:
        to_reference = tokens.reference - tokens.policy
        per_token = per_token + beta * _ratios(tokens) * (to_reference.exp() - to_reference - 1)
    value = mean_over_tokens(per_token, tokens.mask).mean()
    return GroupLoss(value, {"clipped": clipped}, {"advantages": advantages})


def ppo_loss(tokens: GroupTokens, credit: TokenCredit, *, clip: float, value_clip: float) -> GroupLoss:
    """Compute PPO's clipped surrogate plus half the clipped squared error of the critic.

    Schulman et al., 2017, Eq. 7 and 9, the value clipped as in its published implementation. The critic's part has no
    weight because policy and critic share no parameters. The mean over a member's tokens, then over members.

    Args:
        tokens: members drawn from the policy `tokens.old`, with the critic's current and old values.
        credit: advantages and returns.
        clip: the ratio to the old policy is clipped to [1 - clip, 1 + clip].
        value_clip: values are clipped to within this of the old ones.
    """
    if tokens.values is None or tokens.old_values is None:
        raise ValueError("PPO needs the critic's values")
    per_token, clipped = _clipped_surrogate(tokens, credit.advantages, clip)
    near = tokens.old_values + (tokens.values - tokens.old_values).clamp(-value_clip, value_clip)
    errors = torch.max((tokens.values - credit.returns) ** 2, (near - credit.returns) ** 2) / 2
    value_loss = mean_over_tokens(errors, tokens.mask).mean()
    value = mean_over_tokens(per_token, tokens.mask).mean() + value_loss
    mean_advantages = mean_over_tokens(credit.advantages, tokens.mask)
    return GroupLoss(value, {"clipped": clipped, "value_loss": value_loss}, {"advantages": mean_advantages})


def _clipped_surrogate(tokens: GroupTokens, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Return -min(ratio A, clipped ratio A) per token, (K, C), and the share of tokens that are clipped, ()."""
    ratios = _ratios(tokens)
    free, bound = ratios * advantages, ratios.clamp(1 - clip, 1 + clip) * advantages
    cut = (bound < free).float() * tokens.mask
    return -torch.min(free, bound), cut.sum() / tokens.mask.sum()


def _ratios(tokens: GroupTokens) -> Tensor:
    """Return p_theta / p_old of each token, (K, C)."""
    return (tokens.policy - tokens.old).exp()


# --- distillation --------------------------------------------------------------------------------------------


def reverse_kl_loss(tokens: GroupTokens) -> GroupLoss:
    """Compute the reverse KL of the policy to the reference at each token that was drawn, as a surrogate.

    With y_t ~ p_theta, E[(log p_theta - log p_ref) grad log p_theta] is the gradient of KL(p_theta || p_ref) at that
    position. So the value is the mean of (log p_theta - log p_ref) log p_theta with the first factor held fixed, over a
    member's tokens and then over members. Its gradient is the one to follow; its size means nothing, and `kl_anchored`
    has the estimate of the KL in nats per answer. It is the sampled-token objective of self-distillation (Shenfeld et
    al., 2026), where the reference reads the anchor and the policy does not.

    Args:
        tokens: candidates drawn from the policy.
    """
    log_ratios = (tokens.policy - tokens.reference).detach()
    value = mean_over_tokens(log_ratios * tokens.policy, tokens.mask).mean()
    return GroupLoss(value, {"kl_anchored": tokens.sequences(log_ratios).mean()})


# --- imitation -----------------------------------------------------------------------------------------------


def nll_loss(tokens: GroupTokens) -> GroupLoss:
    """Compute -log p_theta(y|x) per token (Eq. 1): the mean over a member's tokens, then over members."""
    return GroupLoss(-mean_over_tokens(tokens.policy, tokens.mask).mean())


def mean_over_tokens(x: Tensor, mask: Tensor) -> Tensor:
    """Average (K, C) over each member's tokens, (K,)."""
    return (x * mask).sum(dim=1) / mask.sum(dim=1)
