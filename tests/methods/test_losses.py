"""Every objective: values derived by hand, gradients against autograd, and the KLs' gradients against the exact one."""

import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from purld.methods.advantages import TokenCredit
from purld.methods.labels import pu_labels
from purld.methods.losses import (
    WEIGHT_CAP,
    GroupTokens,
    dpo_loss,
    engine_weights,
    grpo_loss,
    kl_coefficients,
    labels_kl,
    ldl_loss,
    log_policy_distribution,
    loss_coefficients,
    nll_loss,
    ppo_loss,
    reverse_kl_loss,
    sampling_gaps,
)

FORMS = ("ratio", "likelihood", "mean")


def members(policy, reference=None, old=None, mask=None, **values):
    """Tokens from nested lists; what is not given is as the policy, and unpadded."""
    policy = torch.as_tensor(policy)
    reference, old = (policy if x is None else torch.as_tensor(x) for x in (reference, old))
    mask = torch.ones_like(policy) if mask is None else torch.as_tensor(mask)
    return GroupTokens(policy, reference, old, mask, **{name: torch.as_tensor(v) for name, v in values.items()})


# --- LDL-GRPO ------------------------------------------------------------------------------------------------


def test_hand_derived_ldl():
    """Two one-token candidates, D = (3/4, 1/4), log p = (log 0.2, log 0.2), log p_sft = (log 0.1, log 0.2), beta 0.5.

    likelihood: q = (1/2, 1/2)
        KL(D||q) = 3/4 log(3/2) + 1/4 log(1/2) = 0.304099 - 0.173287 = 0.130812
    KL(p||p_sft) is estimated by the mean log-ratio: (log 2 + 0) / 2 = 0.346574
        value = 0.130812 + 0.5 * 0.346574 = 0.304099
    coefficients: q - D = (-1/4, 1/4); the KL's: (log 2 - 0)/2 and (0 - log 2)/2 = (0.346574, -0.346574)
        (-0.25 + 0.173287, 0.25 - 0.173287) = (-0.076713, 0.076713)
    ratio: q = (2, 1)/3; KL = 3/4 log(9/8) + 1/4 log(3/4) = 0.088337 - 0.071921 = 0.016417
    """
    log_labels = torch.tensor([0.75, 0.25]).log()
    group = members(torch.tensor([[0.2], [0.2]]).log(), torch.tensor([[0.1], [0.2]]).log())
    loss, coefficients, _ = loss_coefficients(lambda t: ldl_loss(t, log_labels, form="likelihood", beta=0.5), group)
    assert loss.metrics["ldl"].item() == pytest.approx(0.130812, abs=1e-6)
    assert loss.value.item() == pytest.approx(0.304099, abs=1e-6)
    assert coefficients.flatten().tolist() == pytest.approx([-0.076713, 0.076713], abs=1e-6)
    ratio = ldl_loss(group, log_labels, form="ratio", beta=0.5)
    assert ratio.members["policy_before"].tolist() == pytest.approx([2 / 3, 1 / 3], abs=1e-6)
    assert ratio.metrics["ldl"].item() == pytest.approx(0.016417, abs=1e-6)


@pytest.mark.parametrize(("labels", "share"), [([0.2] * 5, 1.0), ([0.75, 0.25], 0.811278), ([1.0], None)])
def test_uniformity_is_the_labels_entropy_over_that_of_as_many_equal_ones(labels, share):
    log_labels = torch.tensor(labels).log()
    log_probs = torch.full((len(labels), 1), -1.0)
    found = ldl_loss(members(log_probs, log_probs), log_labels, form="ratio", beta=0.0).metrics.get("label_uniformity")
    assert (found is None) if share is None else found.item() == pytest.approx(share, abs=1e-6)


def test_mean_form_divides_by_length():
    log_q = log_policy_distribution(torch.tensor([-4.0, -9.0]), torch.zeros(2), torch.tensor([2.0, 3.0]), "mean")
    assert log_q.exp().tolist() == pytest.approx(torch.softmax(torch.tensor([-2.0, -3.0]), 0).tolist())


@pytest.mark.parametrize("form", FORMS)
@given(data=st.data())
def test_gradient_of_the_divergence_is_q_minus_d(form, data):
    """In the form's logits; on tokens it is the same for every token of a member, and none after its end."""
    k = data.draw(st.integers(2, 16))
    numbers = st.lists(st.floats(-40, 0), min_size=k, max_size=k)
    lengths = torch.tensor(data.draw(st.lists(st.integers(1, 5), min_size=k, max_size=k)))
    mask = (torch.arange(5) < lengths.unsqueeze(1)).double()  # (K, 5)
    policy = torch.tensor(data.draw(numbers), dtype=torch.float64).unsqueeze(1) / lengths.unsqueeze(1) * mask
    reference = torch.tensor(data.draw(numbers), dtype=torch.float64).unsqueeze(1) / lengths.unsqueeze(1) * mask
    log_labels = torch.log_softmax(torch.tensor(data.draw(numbers), dtype=torch.float64), dim=0)
    group = GroupTokens(policy, reference, policy, mask)
    loss, coefficients, _ = loss_coefficients(lambda t: ldl_loss(t, log_labels, form=form, beta=0.0), group)
    expected = loss.members["policy_before"] - log_labels.exp()
    if form == "mean":
        expected = expected / lengths
    assert torch.allclose(coefficients, expected.unsqueeze(1) * mask, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("right", [1, 3, 7])
def test_at_p_sft_a_group_weighs_as_much_as_it_has_few_right_members(right):
    """With D equal on m right members and 0 elsewhere, m times the gradient is that of REINFORCE against the mean."""
    scores = (torch.arange(8) < right).double()
    log_labels = torch.log_softmax(torch.where(scores > 0, 0.0, -60.0), dim=0)
    group = members(torch.full((8, 1), -3.0, dtype=torch.float64))
    _, coefficients, _ = loss_coefficients(lambda t: ldl_loss(t, log_labels, form="ratio", beta=0.0), group)
    assert torch.allclose(right * coefficients.flatten(), scores.mean() - scores, atol=1e-12)


@pytest.mark.parametrize("right", [1, 3, 7])
def test_weighed_by_its_positives_a_group_has_the_gradient_of_reinforce(right):
    """At p_sft, with scores of 0 and 1 and sharp labels: the score less the group's mean, over K."""
    scores = (torch.arange(8) < right).double()
    labels = pu_labels(scores, 1.0, gamma=60.0, tau=1.2)
    group = members(torch.full((8, 1), -3.0, dtype=torch.float64))
    _, coefficients, _ = loss_coefficients(
        lambda t: ldl_loss(t, labels.log_distribution, form="ratio", beta=0.0, weight=labels.positives), group
    )
    assert torch.allclose(coefficients.flatten(), (scores.mean() - scores) / 8, atol=1e-9)


@pytest.mark.parametrize("right", [0, 3])
def test_an_anchor_in_the_group_counts_as_one_of_its_positives(right):
    """The anchor and the m right ones of K candidates are m + 1 positives of K + 1 members, all pulled up alike."""
    scores = (torch.arange(9) <= right).double()  # the anchor's first
    labels = pu_labels(scores, 1.0, gamma=60.0, tau=1.2)
    assert labels.positives == pytest.approx((right + 1) / 9)
    group = members(torch.full((9, 1), -3.0, dtype=torch.float64))
    _, coefficients, _ = loss_coefficients(
        lambda t: ldl_loss(t, labels.log_distribution, form="ratio", beta=0.0, drawn=8, weight=labels.positives), group
    )
    assert torch.allclose(coefficients.flatten(), (scores.mean() - scores) / 9, atol=1e-9)


def test_extreme_log_likelihoods_stay_finite():
    log_probs = torch.tensor([[-5.0], [-5000.0], [-900.0]])
    log_labels = torch.tensor([-2000.0, 0.0, -1500.0])
    group = members(log_probs, log_probs - 1)
    loss, coefficients, _ = loss_coefficients(lambda t: ldl_loss(t, log_labels, form="likelihood", beta=0.01), group)
    assert torch.isfinite(coefficients).all()
    assert math.isfinite(loss.value.item())
    assert loss.metrics["ldl"].item() == pytest.approx(4995.0)
    assert labels_kl(log_labels, log_labels).item() == 0


def exact_kl_gradient(logits, reference_logits):
    """d KL(p || ref) / d logits of two categoricals, by autograd."""
    logits = logits.clone().requires_grad_()
    log_p = torch.log_softmax(logits, 0)
    (log_p.exp() * (log_p - torch.log_softmax(reference_logits, 0))).sum().backward()
    return logits.grad


def mean_estimated_gradient(logits, reference_logits, k, old_logits=None):
    """The estimator's exact expectation: every group of k draws from the old policy, weighted by its probability."""
    log_p = torch.log_softmax(logits, 0)
    log_old = log_p if old_logits is None else torch.log_softmax(old_logits, 0)
    log_reference = torch.log_softmax(reference_logits, 0)
    total = torch.zeros_like(logits)
    scores = torch.eye(len(logits), dtype=logits.dtype) - log_p.exp()  # row y: d log p(y) / d logits
    for group in torch.cartesian_prod(*[torch.arange(len(logits))] * k).reshape(-1, k):
        weight = log_old[group].sum().exp()
        total += weight * (kl_coefficients(log_p[group], log_reference[group], log_old[group]) @ scores[group])
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


@pytest.mark.parametrize("k", [1, 2, 3])
def test_kl_estimator_of_candidates_of_an_earlier_policy(k):
    """Exact in expectation while no importance weight is above the cap; one that is counts as the cap."""
    logits = torch.tensor([0.3, -1.2, 0.9, 0.0], dtype=torch.float64)
    old = torch.tensor([0.5, -1.0, 0.4, 0.2], dtype=torch.float64)
    reference = torch.tensor([-0.5, 0.4, 0.1, 1.3], dtype=torch.float64)
    found = mean_estimated_gradient(logits, reference, k, old)
    assert torch.allclose(found, exact_kl_gradient(logits, reference), atol=1e-12)
    far = kl_coefficients(torch.tensor([-1.0]), torch.tensor([-3.0]), torch.tensor([-9.0]))
    assert far.tolist() == [2.0 * WEIGHT_CAP]


def test_the_anchor_in_the_group_has_a_part_in_q_and_none_in_the_kl():
    """The anchor was not drawn, so the KL of p from p_sft is estimated on the candidates alone."""
    tokens = members([[-0.1, -0.4], [-1.0, -0.2], [-2.0, -0.7]], reference=[[-0.3, -0.4], [-1.5, -0.2], [-1.0, -0.7]])
    log_labels = torch.log(torch.tensor([0.5, 0.4, 0.1]))
    loss = ldl_loss(tokens, log_labels, form="ratio", beta=0.5, drawn=2)
    log_q = torch.log_softmax(torch.tensor([0.2, 0.5, -1.0]), 0)
    kl = (0.5 - 1.0) / 2
    assert loss.value.item() == pytest.approx(labels_kl(log_labels, log_q).item() + 0.5 * kl, abs=1e-6)


def test_kl_pulls_back_towards_the_reference():
    coefficients = kl_coefficients(torch.tensor([-1.0, -3.0]), torch.tensor([-2.0, -2.0]))
    assert coefficients.tolist() == pytest.approx([1.0, -1.0])


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_the_kl_of_grpo_has_the_gradient_of_kl_policy_to_reference(beta):
    """In expectation over draws, exactly: one token, no advantage, so that the KL is all there is.

    At theta = theta_old the ratio's gradient times k3 plus k3's own is (k3 + 1 - r) grad log p with r = p_sft / p, and
    k3 + 1 - r = r - log r - 1 + 1 - r = log p - log p_sft: the score-function estimator of KL(p || p_sft).
    """
    logits = torch.tensor([0.3, -1.2, 0.9, 0.0], dtype=torch.float64)
    reference = torch.tensor([-0.5, 0.4, 0.1, 1.3], dtype=torch.float64)
    log_p, log_reference = torch.log_softmax(logits, 0), torch.log_softmax(reference, 0)
    found = torch.zeros_like(logits)
    for y in range(4):
        group = members(log_p[y].reshape(1, 1), log_reference[y].reshape(1, 1))
        _, coefficient, _ = loss_coefficients(
            lambda t: grpo_loss(t, torch.zeros(1, dtype=torch.float64), clip=0.2, beta=beta), group
        )
        found += log_p[y].exp() * coefficient.item() * (torch.eye(4, dtype=torch.float64)[y] - log_p.exp())
    assert torch.allclose(found, beta * exact_kl_gradient(logits, reference), atol=1e-12)


# --- DPO -----------------------------------------------------------------------------------------------------


def test_hand_derived_dpo_over_two_pairs():
    """Three members of two tokens, log-ratios to the reference (1, 0, -2), beta 0.5, pairs (0, 1) and (0, 2).

    gaps 1 and 3: -log sigmoid(0.5) = log(1 + e^-0.5) = 0.474077, -log sigmoid(1.5) = log(1 + e^-1.5) = 0.201413
        value = 0.337745
    d value / d gap = -beta sigmoid(-beta gap) / 2: -0.25 * 0.377541 = -0.094385, -0.25 * 0.182426 = -0.045606
        member 0: -0.139992, member 1: 0.094385, member 2: 0.045606, the same on every token
    """
    group = members([[-1.0, -1.0], [-2.0, -1.0], [-3.0, -3.0]], [[-1.5, -1.5], [-1.0, -2.0], [-2.0, -2.0]])
    pairs = torch.tensor([[0, 1], [0, 2]])
    loss, coefficients, _ = loss_coefficients(lambda t: dpo_loss(t, pairs, beta=0.5), group)
    assert loss.value.item() == pytest.approx(0.337745, abs=1e-6)
    assert coefficients[:, 0].tolist() == pytest.approx([-0.139992, 0.094385, 0.045606], abs=1e-6)
    assert torch.equal(coefficients[:, 0], coefficients[:, 1])
    assert loss.metrics["pair_accuracy"].item() == 1.0


# --- policy gradients ----------------------------------------------------------------------------------------


def test_hand_derived_grpo_with_clipping():
    """Two members, ratios (1.5, 1) and (0.5), advantages 1 and -1, clip 0.2, no KL.

    member 0: min(1.5, 1.2) = 1.2, and 1; member 1: min(-0.5, -0.8) = -0.8 (clipped: it has been pushed far enough)
        per token -1.2, -1, 0.8; means -1.1 and 0.8; value = (-1.1 + 0.8) / 2 = -0.15
    gradients: clipped tokens none; member 0's second token -A ratio / 2 tokens / 2 members = -0.25
    """
    old = torch.zeros(2, 2)
    group = members(torch.tensor([[1.5, 1.0], [0.5, 1.0]]).log(), old=old, mask=[[1.0, 1.0], [1.0, 0.0]])
    loss, coefficients, _ = loss_coefficients(
        lambda t: grpo_loss(t, torch.tensor([1.0, -1.0]), clip=0.2, beta=0.0), group
    )
    assert loss.value.item() == pytest.approx(-0.15, abs=1e-6)
    assert coefficients.flatten().tolist() == pytest.approx([0.0, -0.25, 0.0, 0.0], abs=1e-6)
    assert loss.metrics["clipped"].item() == pytest.approx(2 / 3)


def test_hand_derived_ppo():
    """One member, two tokens, ratios (1, 1.5), advantages (2, 1), clip 0.2; values (0.5, 1.0), before (0.1, 1.0),
    returns (1, 0), value clip 0.2.

    policy: -2, -min(1.5, 1.2) = -1.2; mean -1.6
    critic: the first value may move to 0.3: max(0.25, 0.49) = 0.49; the second has not moved: 1; half the mean 0.3725
        value = -1.2275
    gradients in the policy: -2 * 1 / 2 = -1, clipped 0; in the values: the clipped branch has none, 1.0 / 2 = 0.5
    """
    group = members(
        torch.tensor([[1.0, 1.5]]).log(), old=torch.zeros(1, 2), values=[[0.5, 1.0]], old_values=[[0.1, 1.0]]
    )
    credit = TokenCredit(torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 0.0]]))
    loss, in_policy, in_values = loss_coefficients(lambda t: ppo_loss(t, credit, clip=0.2, value_clip=0.2), group)
    assert loss.value.item() == pytest.approx(-1.2275, abs=1e-6)
    assert in_policy.flatten().tolist() == pytest.approx([-1.0, 0.0], abs=1e-6)
    assert in_values.flatten().tolist() == pytest.approx([0.0, 0.5], abs=1e-6)


def test_ppo_without_a_critic_is_refused():
    credit = TokenCredit(torch.zeros(1, 1), torch.zeros(1, 1))
    with pytest.raises(ValueError, match="critic"):
        ppo_loss(members([[0.0]]), credit, clip=0.2, value_clip=0.2)


def test_hand_derived_reverse_kl():
    """Two members; log-ratios (-1 + 2, -3 + 2.5) = (1, -0.5) and -4 + 1 = -3, padding left out.

    value: ((1 * -1 + -0.5 * -3) / 2 + -3 * -4) / 2 = (0.25 + 12) / 2 = 6.125; gradients are the log-ratios over the
    member's tokens and the members: 1 / 4, -0.5 / 4, -3 / 2. The KL is the mean of 0.5 and -3 nats per answer.
    """
    group = members([[-1.0, -3.0], [-4.0, -7.0]], [[-2.0, -2.5], [-1.0, -9.0]], mask=[[1.0, 1.0], [1.0, 0.0]])
    loss, coefficients, _ = loss_coefficients(reverse_kl_loss, group)
    assert loss.value.item() == pytest.approx(6.125)
    assert coefficients.tolist() == [[0.25, -0.125], [-1.5, 0.0]]
    assert loss.metrics["kl_anchored"].item() == pytest.approx(-1.25)


def test_reverse_kl_has_the_exact_gradient_in_expectation():
    """Over one token of a categorical with four outcomes."""
    generator = torch.Generator().manual_seed(6)
    logits, reference = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    log_p, log_reference = logits.log_softmax(0), reference.log_softmax(0)
    _, coefficients, _ = loss_coefficients(reverse_kl_loss, members(log_p.unsqueeze(1), log_reference.unsqueeze(1)))
    scores = torch.eye(4, dtype=logits.dtype) - log_p.exp()  # row y: d log p(y) / d logits
    mean = 4 * (log_p.exp() * coefficients[:, 0]) @ scores  # a group's mean divides by its four members
    assert torch.allclose(mean, exact_kl_gradient(logits, reference), atol=1e-12)


def test_likelihood_is_the_mean_over_a_members_own_tokens():
    loss, coefficients, _ = loss_coefficients(
        nll_loss, members([[-1.0, -3.0], [-4.0, 0.0]], mask=[[1.0, 1.0], [1.0, 0.0]])
    )
    assert loss.value.item() == pytest.approx((2 + 4) / 2)
    assert coefficients.tolist() == [[-0.25, -0.25], [-0.5, 0.0]]


# --- draws of an engine with other numbers -------------------------------------------------------------------


def test_hand_derived_engine_weights():
    """An anchor, and candidates with log p_old - log p_engine = (0.1, 0.2), (0.5, 0.4), (-0.3,) and one of padding.

    Weights 1, e^0.3 = 1.349859, e^0.9 = 2.459603 cut at 2, e^-0.3 = 0.740818; gaps 0.1, 0.2, 0.5, 0.4, 0.3.
    """
    old = torch.tensor([[-1.0, -1], [-1, -2], [-1, -2], [-3, 0]])
    sampled = old - torch.tensor([[math.nan, math.nan], [0.1, 0.2], [0.5, 0.4], [-0.3, math.nan]])
    mask = torch.tensor([[1.0, 1], [1, 1], [1, 1], [1, 0]])
    group = members(old, mask=mask, sampled=sampled)
    assert engine_weights(group, 2.0).tolist() == pytest.approx([1, 1.349859, 2, 0.740818], abs=1e-6)
    assert sampling_gaps(group).tolist() == pytest.approx([0.1, 0.2, 0.5, 0.4, 0.3], abs=1e-6)
    loss, coefficients, _ = loss_coefficients(nll_loss, group, importance_cap=2.0)
    assert coefficients[:, 0].tolist() == pytest.approx([-1 / 8, -1.349859 / 8, -2 / 8, -0.740818 / 4], abs=1e-6)
    assert loss.metrics["importance"].item() == pytest.approx(5.090677 / 4, abs=1e-6)
    assert loss.metrics["importance_capped"].item() == 0.25
    assert torch.equal(loss_coefficients(nll_loss, group)[1], loss_coefficients(nll_loss, members(old, mask=mask))[1])
    assert engine_weights(members(old), 2.0) is None


@pytest.mark.parametrize(
    "objective",
    [
        lambda tokens, reward: grpo_loss(tokens, reward, clip=0.2, beta=0.3),
        lambda tokens, reward: ldl_loss(tokens, torch.zeros_like(reward), form="ratio", beta=1.0),
        lambda tokens, reward: reverse_kl_loss(tokens),
    ],
    ids=["grpo", "kl of ldl", "reverse kl"],
)
@pytest.mark.parametrize("cap", [100.0, 1.1])
def test_engine_weights_give_the_policys_own_gradient_in_expectation(objective, cap):
    """Exactly, over all answers of two tokens out of three; the engine's distribution is another in both tokens.

    With the cap, answers that the engine draws too seldom count for less than they should: mu min(p / mu, cap).
    """
    generator = torch.Generator().manual_seed(0)
    policy, reference, noise = (torch.randn(12, dtype=torch.float64, generator=generator) for _ in range(3))
    engine, rewards = policy + 0.3 * noise, torch.randn(9, dtype=torch.float64, generator=generator)

    def token_log_probs(logits):  # (9, 2): the first token, and the second one after it
        first, second = logits[:3].log_softmax(0), logits[3:].view(3, 3).log_softmax(1)
        return torch.stack([first.repeat_interleave(3), second.flatten()], dim=1)

    p, mu, log_reference = token_log_probs(policy), token_log_probs(engine), token_log_probs(reference)

    def expected_gradient(shares, sampled, importance_cap):
        total = torch.zeros(9, 2, dtype=torch.float64)
        for y in range(9):
            group = members(p[y : y + 1], log_reference[y : y + 1], sampled=sampled[y : y + 1])
            fixed = functools.partial(objective, reward=rewards[y : y + 1])
            total[y] = shares[y] * loss_coefficients(fixed, group, importance_cap)[1][0]
        return torch.func.vjp(token_log_probs, policy)[1](total)[0]

    weighted = expected_gradient(mu.sum(dim=1).exp(), mu, cap)
    shares = torch.minimum(p.sum(dim=1).exp(), cap * mu.sum(dim=1).exp())
    assert torch.allclose(weighted, expected_gradient(shares, mu, None), atol=1e-12)
    exact = expected_gradient(p.sum(dim=1).exp(), mu, None)
    assert torch.allclose(weighted, exact, atol=1e-12) == (cap == 100.0)
    assert not torch.allclose(expected_gradient(mu.sum(dim=1).exp(), mu, None), exact, atol=1e-3)


@pytest.mark.parametrize("cap", [100.0, 1.1])
def test_engine_weights_are_right_in_both_halves_of_a_pair(cap):
    """The anchor against one draw, exactly over all answers of one token out of four: the anchor's half as well.

    Below the cap the weighted gradient is sum_y p(y) grad loss(anchor, y), where y comes from another mu(y).
    """
    generator = torch.Generator().manual_seed(1)
    policy, reference, noise = (torch.randn(4, dtype=torch.float64, generator=generator) for _ in range(3))
    anchor, p, mu = 2, policy.log_softmax(0), (policy + 0.4 * noise).log_softmax(0)

    def expected_gradient(shares, importance_cap):
        total = torch.zeros(4, dtype=torch.float64)
        for y in range(4):
            rows = torch.tensor([anchor, y])
            drawn = torch.tensor([[math.nan], [mu[y]]], dtype=torch.float64)
            group = members(p[rows].unsqueeze(1), reference.log_softmax(0)[rows].unsqueeze(1), sampled=drawn)
            pair = functools.partial(dpo_loss, pairs=torch.tensor([[0, 1]]), beta=2.0)
            total.index_add_(0, rows, shares[y] * loss_coefficients(pair, group, importance_cap)[1][:, 0])
        return torch.func.vjp(lambda logits: logits.log_softmax(0), policy)[1](total)[0]

    shares = torch.minimum(p.exp(), cap * mu.exp())
    assert torch.allclose(expected_gradient(mu.exp(), cap), expected_gradient(shares, None), atol=1e-12)
    exact = expected_gradient(p.exp(), None)
    assert torch.allclose(expected_gradient(mu.exp(), cap), exact, atol=1e-12) == (cap == 100.0)
    assert not torch.allclose(expected_gradient(mu.exp(), None), exact, atol=1e-3)
