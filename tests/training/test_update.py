"""The micro-batched gradient of Eq. 4 equals autograd's on the whole group."""

import contextlib

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from purld.method.losses import label_divergence, log_policy_distribution
from purld.student.group import sequence_log_probs
from purld.student.load import Roles
from purld.training.update import GroupUpdate

LENGTHS = (3, 11, 1, 7, 7)
BETA = 0.3


@pytest.fixture(scope="module")
def roles(random_student):
    """A policy that has moved away from its reference."""
    frozen = AutoModelForCausalLM.from_pretrained(random_student).eval()
    policy = AutoModelForCausalLM.from_pretrained(random_student).eval()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return Roles(policy, frozen.requires_grad_(False))


@pytest.fixture(scope="module")
def group():
    generator = torch.Generator().manual_seed(2)
    head = torch.randint(0, 200, (23,), generator=generator).tolist()
    completions = [torch.randint(0, 200, (n,), generator=generator).tolist() for n in LENGTHS]
    log_labels = torch.log_softmax(torch.randn(len(LENGTHS), generator=generator), 0)
    return head, completions, log_labels


def autograd_gradient(roles, head, completions, log_labels, form):
    """One graph over the whole group: KL(D||q), and the KL term by its score-function surrogate."""
    policy = roles.policy
    policy.zero_grad()
    log_probs = sequence_log_probs(policy, head, completions, pad=0)
    with roles.frozen() as reference:
        reference_log_probs = sequence_log_probs(reference, head, completions, pad=0)
    lengths = torch.tensor([float(n) for n in LENGTHS])
    log_q = log_policy_distribution(log_probs, reference_log_probs, lengths, form)
    ratio = (log_probs - reference_log_probs).detach()
    k = len(LENGTHS)
    baseline = (ratio.sum() - ratio) / (k - 1)
    loss = label_divergence(log_labels, log_q) + BETA * ((ratio - baseline) * log_probs).mean()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters()])


@pytest.mark.parametrize("form", ["ratio", "likelihood", "mean"])
@pytest.mark.parametrize("micro_batch_size", range(1, len(LENGTHS) + 1))
def test_gradient_does_not_depend_on_the_micro_batch(roles, group, form, micro_batch_size):
    head, completions, log_labels = group
    expected = autograd_gradient(roles, head, completions, log_labels, form)
    roles.policy.zero_grad()
    update = GroupUpdate(
        roles, form, BETA, micro_batch_size, 0, backward=torch.Tensor.backward, autocast=contextlib.nullcontext
    )
    update(roles.policy, head, completions, log_labels, share=0.5)
    found = torch.cat([p.grad.flatten() for p in roles.policy.parameters()])
    assert (2 * found - expected).norm() / expected.norm() < 1e-5


def test_lora_switched_off_is_the_reference_bit_for_bit(random_student, group):
    """One copy of the weights: the policy moves, and without its adapter it is still p_sft."""
    head, completions, log_labels = group
    model = AutoModelForCausalLM.from_pretrained(random_student).eval()
    with torch.no_grad():
        before = sequence_log_probs(model, head, completions, pad=0)
    policy = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    roles = Roles(policy, None)
    update = GroupUpdate(roles, "ratio", BETA, 8, 0, torch.Tensor.backward, contextlib.nullcontext)
    update(policy, head, completions, log_labels, share=1.0)
    torch.optim.SGD(policy.parameters(), lr=0.1).step()
    with torch.no_grad():
        moved = sequence_log_probs(policy, head, completions, pad=0)
    with roles.frozen() as reference:
        after = sequence_log_probs(reference, head, completions, pad=0)
    assert torch.equal(after, before)
    assert not torch.allclose(moved, before)
