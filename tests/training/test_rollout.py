"""Groups as they are made for the update: what p_sft reads before the members."""

import contextlib

import pytest
import torch
from transformers import AutoModelForCausalLM

from purld.config.methods import SelfDistillation
from purld.config.schema import Student
from purld.methods.table import METHODS
from purld.model.load import Roles, load_encoder
from purld.model.log_probs import token_log_probs
from purld.model.sample import Completion
from purld.records import Prompt
from purld.training.group_update import GroupUpdate
from purld.training.rollout import AnchoredPrompt, RolloutMaker
from purld.training.scoring import score_nothing

PROMPT, ANCHOR = Prompt.from_text("How many are 3 and 4?"), "3 + 4 = 7."
IDS = [[21, 35, 40, 22], [50, 51], [33]]


@pytest.fixture(scope="module")
def encoder(random_student):
    return load_encoder(Student(model=str(random_student), max_anchor_tokens=32))


@pytest.fixture(scope="module")
def roles(random_student):
    policy, frozen = (AutoModelForCausalLM.from_pretrained(random_student).eval() for _ in range(2))
    return Roles(policy, frozen.requires_grad_(False))


def make_rollout(method, settings, roles, encoder, scorer):
    """One group of the candidates above."""
    update = GroupUpdate(roles, 8, encoder.pad, torch.Tensor.backward, contextlib.nullcontext)
    sampler = lambda policy, prompts, count, seed: [[Completion(ids, True) for ids in IDS]]  # noqa: E731
    maker = RolloutMaker(METHODS[method].stage_two, settings, encoder, sampler, scorer, update)
    (rollout,) = maker(roles.policy, [AnchoredPrompt(PROMPT, ANCHOR, encoder.encode_prompt(PROMPT))], seed=0)
    return rollout


def test_self_distillation_compares_with_p_sft_that_has_read_the_anchor(roles, encoder):
    settings = SelfDistillation(method="self_distillation", candidates=3)
    rollout = make_rollout("self_distillation", settings, roles, encoder, score_nothing)
    anchored, bare = encoder.encode_anchored_prompt(PROMPT, ANCHOR), encoder.encode_prompt(PROMPT)
    with torch.no_grad(), roles.frozen() as frozen:
        expected, plain = (token_log_probs(frozen, prompt, IDS, encoder.pad)[0] for prompt in (anchored, bare))
    assert rollout.usable and rollout.member_candidates == (0, 1, 2)
    assert torch.equal(rollout.members.reference, expected)
    assert (expected - plain).abs().max() > 0.1
    assert rollout.members.prompt.ids == bare.ids  # what the policy reads
