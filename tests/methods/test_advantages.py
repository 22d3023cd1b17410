"""Signals from scores: numbers by hand, and a two-armed bandit whose optimum is known."""

import pytest
import torch

from purld.methods.advantages import (
    TokenCredit,
    generalised_advantages,
    group_advantages,
    ranked_pairs,
    token_rewards,
    whiten_advantages,
)
from purld.methods.losses import GroupTokens, ppo_loss


def test_advantages_are_standardised_in_the_group():
    """Scores 0, 0.5, 1: mean 0.5, unbiased standard deviation 0.5."""
    assert group_advantages(torch.tensor([0.0, 0.5, 1.0])).tolist() == pytest.approx([-0.9998, 0.0, 0.9998], abs=1e-5)
    assert group_advantages(torch.tensor([0.3, 0.3])).tolist() == [0.0, 0.0]


def test_pairs_are_those_that_differ_by_more_than_the_margin():
    scores = torch.tensor([0.25, 1.0, 0.25, 0.5])
    every = {(1, 0), (1, 2), (1, 3), (3, 0), (3, 2)}
    assert set(map(tuple, ranked_pairs(scores, 0.0, "all").tolist())) == every
    assert set(map(tuple, ranked_pairs(scores, 0.25, "all").tolist())) == {(1, 0), (1, 2), (1, 3)}
    assert ranked_pairs(scores, 0.0, "extremes").tolist() == [[1, 0]]
    assert ranked_pairs(scores, 0.75, "extremes").shape == (0, 2)
    assert ranked_pairs(torch.tensor([0.5, 0.5]), 0.0, "all").shape == (0, 2)


def test_the_score_comes_at_the_end_and_the_kl_at_every_token():
    """Two answers of two and three tokens, beta 0.1: -0.1 times the log-ratio, and the score on the last token."""
    old = torch.tensor([[-1.0, -1.0, 0.0], [-2.0, -1.0, -3.0]])
    reference = torch.tensor([[-2.0, -1.0, 0.0], [-2.0, -4.0, -2.0]])
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    rewards = token_rewards(torch.tensor([0.7, 0.2]), old, reference, mask, beta=0.1)
    assert rewards.tolist() == [pytest.approx([-0.1, 0.7, 0.0]), pytest.approx([0.0, -0.3, 0.3])]


def test_hand_derived_gae():
    """Three tokens, rewards (0, 0, 1), values (0.2, 0.4, 0.5), discount 0.9, lambda 0.5.

    t=2: delta = 1 - 0.5 = 0.5;                   A = 0.5
    t=1: delta = 0.9 * 0.5 - 0.4 = 0.05;          A = 0.05 + 0.45 * 0.5 = 0.275
    t=0: delta = 0.9 * 0.4 - 0.2 = 0.16;          A = 0.16 + 0.45 * 0.275 = 0.28375
    returns A + V: 0.48375, 0.675, 1.0
    The second answer ends after one token, whatever the value beyond: delta = 1 - 0.2 = 0.8.
    """
    rewards = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    values = torch.tensor([[0.2, 0.4, 0.5], [0.2, 9.0, 9.0]])
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    credit = generalised_advantages(rewards, values, mask, discount=0.9, trace=0.5)
    assert credit.advantages.tolist() == [pytest.approx([0.28375, 0.275, 0.5]), pytest.approx([0.8, 0.0, 0.0])]
    assert credit.returns.tolist() == [pytest.approx([0.48375, 0.675, 1.0]), pytest.approx([1.0, 0.0, 0.0])]


def test_lambda_one_is_the_monte_carlo_return_and_lambda_zero_one_step():
    rewards, values, mask = torch.tensor([[0.1, 0.2, 0.4]]), torch.tensor([[0.5, 0.6, 0.7]]), torch.ones(1, 3)
    whole = generalised_advantages(rewards, values, mask, discount=1.0, trace=1.0)
    assert whole.returns.flatten().tolist() == pytest.approx([0.7, 0.6, 0.4])
    step = generalised_advantages(rewards, values, mask, discount=1.0, trace=0.0)
    assert step.returns.flatten().tolist() == pytest.approx([0.1 + 0.6, 0.2 + 0.7, 0.4])


def test_whitening_is_over_the_tokens_of_all_prompts_and_padding_is_inert():
    """Advantages 1, 3 and 5: mean 3, standard deviation sqrt(8/3)."""
    credits = [
        TokenCredit(torch.tensor([[1.0, 3.0]]), torch.ones(1, 2)),
        TokenCredit(torch.tensor([[5.0, 7.0]]), torch.zeros(1, 2)),
    ]
    first, second = whiten_advantages(credits, [torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 0.0]])])
    z = 2 / (8 / 3) ** 0.5
    assert first.advantages.flatten().tolist() == pytest.approx([-z, 0.0], abs=1e-3)
    assert second.advantages.flatten().tolist() == pytest.approx([z, 0.0], abs=1e-3)
    assert second.returns is credits[1].returns


BETA, REWARDS = 0.5, (0.9, 0.4)


@pytest.mark.parametrize("updates", [1, 4])
def test_ppo_finds_the_optimum_of_a_two_armed_bandit(updates):
    """One token, two arms that pay 0.9 and 0.4, p_sft = (1/4, 3/4), beta 0.5.

    max E[r] - beta KL(p || p_sft) is at p proportional to p_sft exp(r / beta): odds 1/3 e^{0.5 / 0.5} = 0.90609, so
    p = (0.47537, 0.52463). The critic's value there: log(1/4 e^1.8 + 3/4 e^0.8) * 0.5 = 0.57869.
    """
    generator = torch.Generator().manual_seed(0)
    reference = torch.tensor([0.25, 0.75]).log()
    logits, value = reference.clone().requires_grad_(), torch.zeros((), requires_grad=True)
    optimiser = torch.optim.Adam([logits, value], lr=0.02)
    for step in range(300):
        arms = torch.multinomial(logits.detach().softmax(0), 256, replacement=True, generator=generator)
        old, old_value = logits.detach().log_softmax(0)[arms].unsqueeze(1), value.detach().expand(256, 1)
        mask = torch.ones(256, 1)
        rewards = token_rewards(torch.tensor(REWARDS)[arms], old, reference[arms].unsqueeze(1), mask, BETA)
        [credit] = whiten_advantages([generalised_advantages(rewards, old_value, mask, 1.0, 0.95)], [mask])
        for group in optimiser.param_groups:
            group["lr"] = 0.02 * (1 - step / 300)
        for _ in range(updates):
            policy = logits.log_softmax(0)[arms].unsqueeze(1)
            tokens = GroupTokens(policy, reference[arms].unsqueeze(1), old, mask, value.expand(256, 1), old_value)
            optimiser.zero_grad()
            ppo_loss(tokens, credit, clip=0.2, value_clip=0.2).value.backward()
            optimiser.step()
    assert logits.softmax(0)[0].item() == pytest.approx(0.47537, abs=0.02)
    assert value.item() == pytest.approx(0.57869, abs=0.02)
