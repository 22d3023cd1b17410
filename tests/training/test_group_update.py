"""The micro-batched gradient of every objective equals autograd's on the whole group."""

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from counted_tokens import counted_tokens
from log_prob_sums import sequence_log_probs
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from purld.methods.table import METHODS, GroupEvidence
from purld.model.critic import ValueHead, states_before_tokens
from purld.model.load import Roles
from purld.model.log_probs import token_log_probs
from purld.model.vision import EncodedPrompt
from purld.training.group_update import GroupUpdate, UnmeasuredGroup

LENGTHS = (3, 11, 1, 7, 7)
SETTINGS = SimpleNamespace(
    beta=0.3,
    gamma=5.0,
    tau=1.2,
    clip=0.2,
    value_clip=0.2,
    discount=1.0,
    trace=0.95,
    margin=0.0,
    pairs="all",
    anchor_joins=False,
    skip_equal_scores=False,
    group_weight="equal",
)
FORMS = [f"ldl_grpo:{form}" for form in ("ratio", "likelihood", "mean")]
OTHERS = [name for name, method in METHODS.items() if method.stage_two and name != "ldl_grpo"]
SCORES = torch.tensor([0.2, 0.9, 0.4, 0.7, 0.1])


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
    head = EncodedPrompt(torch.randint(0, 200, (23,), generator=generator).tolist())
    return head, [torch.randint(0, 200, (n,), generator=generator).tolist() for n in LENGTHS]


@pytest.fixture(scope="module")
def critic(roles):
    torch.manual_seed(5)
    head = ValueHead(roles.policy.config.hidden_size)
    torch.nn.init.normal_(head.linear.weight)
    return head


def updating(roles, micro_batch_size, critic=None):
    return GroupUpdate(roles, micro_batch_size, 0, torch.Tensor.backward, contextlib.nullcontext, critic)


def objective_of(name, tokens):
    """The method's objective on a group with the scores above, drawn by the policy of `tokens`."""
    name, _, form = name.partition(":")
    row, settings = METHODS[name].stage_two, SimpleNamespace(**vars(SETTINGS), q=form)
    signal = row.signal(GroupEvidence(SCORES, 0.95, tokens), settings)
    return lambda tokens: row.loss(tokens, signal, settings)


def gradients(roles, critic):
    models = [roles.policy] if critic is None else [roles.policy, critic]
    return torch.cat([p.grad.flatten() for m in models for p in m.parameters() if p.grad is not None])


@pytest.mark.parametrize("method", [*FORMS, *OTHERS])
def test_gradient_does_not_depend_on_the_micro_batch(roles, group, critic, method):
    """And is autograd's through one graph over the whole group, the policy having moved since it drew the group."""
    head, ids = group
    critic = critic if METHODS[method.partition(":")[0]].stage_two.critic else None
    (members,) = updating(roles, 8, critic).members(roles.policy, [UnmeasuredGroup(head, ids)], keep_old=True)
    members.old.add_(0.05 * torch.randn(members.old.shape, generator=torch.Generator().manual_seed(1)) * members.mask)
    objective = objective_of(method, members.tokens(members.old))
    roles.policy.zero_grad()
    values = None
    if critic is not None:
        critic.zero_grad()
        values = critic(members.states)
    log_probs, _ = token_log_probs(roles.policy, head, ids, pad=0)
    objective(members.tokens(log_probs, values)).value.backward()
    expected = gradients(roles, critic)
    assert expected.norm() > 0
    for micro_batch_size in range(1, len(LENGTHS) + 1):
        roles.policy.zero_grad()
        if critic is not None:
            critic.zero_grad()
        updating(roles, micro_batch_size, critic)(roles.policy, [members], [objective], share=0.5)
        assert (2 * gradients(roles, critic) - expected).norm() / expected.norm() < 1e-5


def several(policy, update, importance=False):
    """Three groups of other sizes, drawn by a policy that has moved since."""
    generator = torch.Generator().manual_seed(6)
    draw = lambda n: torch.randint(0, 200, (n,), generator=generator).tolist()  # noqa: E731
    sizes = [(23, LENGTHS), (9, (4, 2, 6, 1, 3)), (31, (5, 5, 2, 8, 1))]
    groups = [UnmeasuredGroup(EncodedPrompt(draw(p)), [draw(n) for n in lengths]) for p, lengths in sizes]
    measured = update.members(policy, groups, keep_old=True)
    for members in measured:
        members.old.add_(0.05 * torch.randn(members.old.shape, generator=generator) * members.mask)
    return [replace(m, sampled=m.old + 0.1 * m.mask) for m in measured] if importance else measured


@pytest.mark.parametrize("method", [*FORMS, *OTHERS, "lora", "importance", "recompute"])
def test_several_groups_in_one_pass_have_the_gradient_of_each_alone(roles, critic, random_student, method):
    extra = {"importance": {"importance_cap": 1.2}, "recompute": {"recompute": True}}.get(method, {})
    if method == "lora":
        config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        base = AutoModelForCausalLM.from_pretrained(random_student)
        roles = Roles(get_peft_model(base, config).eval(), None)
    name = method if method in [*FORMS, *OTHERS] else "ldl_grpo:ratio"
    critic = critic if METHODS[name.partition(":")[0]].stage_two.critic else None
    groups = several(roles.policy, updating(roles, 8, critic), method == "importance")
    objectives = [objective_of(name, members.tokens(members.old)) for members in groups]

    def update(size):
        for model in (roles.policy, critic):
            if model is not None:
                model.zero_grad()
        found = replace(updating(roles, size, critic), **extra)(roles.policy, groups, objectives, share=0.25)
        return [loss.value for loss, _ in found], gradients(roles, critic)

    with counted_tokens(roles.policy) as counts:
        values, together = update(16)
    # After the self-checks the three prompts in one pass, padded to the longest, then all 15 members in another.
    assert counts[-2:] == [3 * 31, 15 * 10]
    expected_values, alone = update(5)
    assert torch.allclose(torch.stack(values), torch.stack(expected_values), rtol=1e-5)
    assert (together - alone).norm() / alone.norm() < 1e-5
    values, mixed = update(10)  # two share a pass, the third has its own
    assert (mixed - alone).norm() / alone.norm() < 1e-5


def test_several_groups_are_measured_as_each_alone(roles, critic):
    together, alone = (several(roles.policy, updating(roles, size, critic)) for size in (100, 2))
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one.mask, other.mask)
        for name in ("reference", "old", "states", "old_values"):
            assert torch.allclose(getattr(one, name), getattr(other, name), atol=1e-4)
        tokens, known = (updating(roles, size, critic).tokens(roles.policy, [one])[0] for size in (100, 2))
        assert torch.allclose(tokens.policy, known.policy, atol=1e-4)


def test_members_are_measured_the_same_in_any_micro_batch(roles, group):
    head, ids = group
    (whole,), (small,) = (
        updating(roles, size).members(roles.policy, [UnmeasuredGroup(head, ids)], keep_old=True) for size in (5, 2)
    )
    assert torch.equal(whole.mask, small.mask)
    assert whole.mask.sum(dim=1).tolist() == list(LENGTHS)
    assert torch.allclose(whole.old, small.old, atol=1e-5)
    assert torch.allclose(whole.reference, small.reference, atol=1e-5)
    (fresh,) = updating(roles, 2).members(roles.policy, [UnmeasuredGroup(head, ids)], keep_old=False)
    assert torch.equal(fresh.tokens(small.old).old, small.old)


def test_the_critic_reads_the_state_before_each_token(roles, group):
    """Of p_sft: the state after the head predicts the first token, and the last token's own state is not read."""
    head, ids = group
    with roles.frozen() as model:
        states = states_before_tokens(model, [head] * len(ids), ids, pad=0)
        for row, completion in zip(states, ids):
            alone = model.get_decoder()(input_ids=torch.tensor([head.ids + completion])).last_hidden_state[0]
            assert torch.allclose(row[: len(completion)], alone[len(head) - 1 : -1], atol=1e-4)


def test_values_are_float32_under_autocast_as_without(roles, group, critic):
    """Those of the draw are computed within the trainer's autocast and those of the update outside of it."""
    head, ids = group
    (members,) = updating(roles, 8, critic).members(roles.policy, [UnmeasuredGroup(head, ids)], keep_old=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = critic(members.states)
        assert torch.equal(critic(members.states.bfloat16()), critic(members.states.bfloat16().float()))
    assert values.dtype == torch.float32 and torch.equal(values, critic(members.states))


def test_lora_switched_off_is_the_reference_bit_for_bit(random_student, group):
    """One copy of the weights: the policy moves, and without its adapter it is still p_sft."""
    head, ids = group
    model = AutoModelForCausalLM.from_pretrained(random_student).eval()
    with torch.no_grad():
        before = sequence_log_probs(model, head, ids, pad=0)
    policy = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    roles = Roles(policy, None)
    update = updating(roles, 8)
    (members,) = update.members(policy, [UnmeasuredGroup(head, ids)], keep_old=False)
    update(policy, [members], [objective_of("ldl_grpo:ratio", None)], share=1.0)
    torch.optim.SGD(policy.parameters(), lr=0.1).step()
    with torch.no_grad():
        moved = sequence_log_probs(policy, head, ids, pad=0)
    with roles.frozen() as reference:
        after = sequence_log_probs(reference, head, ids, pad=0)
    assert torch.equal(after, before)
    assert not torch.allclose(moved, before)
