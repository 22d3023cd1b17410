"""Groups measured again: the q of a policy that has moved, on the members that the scores leave."""

import contextlib

import pytest
import torch
from log_prob_sums import sequence_log_probs
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from purld.config.methods import LdlGrpo
from purld.methods.table import METHODS
from purld.model.load import Roles
from purld.model.vision import EncodedPrompt
from purld.records import Prompt
from purld.training import remeasure
from purld.training.group_update import GroupUpdate
from purld.training.remeasure import remeasure_groups
from purld.training.rollout import AnchoredPrompt, RolloutMaker

SETTINGS = LdlGrpo(gamma=5.0, tau=1.2, beta=0.01, q="ratio")
QUESTION = AnchoredPrompt(Prompt.from_text("How many?"), "Three.", EncodedPrompt(list(range(20, 43))))
IDS = [[5, 9, 3], [7, 7, 7, 7, 7], [11], [2, 4]]


def moved(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module", params=["full", "lora"])
def roles(request, random_student):
    policy, frozen = (AutoModelForCausalLM.from_pretrained(random_student).eval() for _ in range(2))
    if request.param == "full":
        return Roles(moved(policy), frozen.requires_grad_(False))
    return Roles(moved(get_peft_model(policy, LoraConfig(r=4, task_type="CAUSAL_LM")).eval()), None)


def rollout_maker(roles):
    update = GroupUpdate(roles, 2, 0, torch.Tensor.backward, contextlib.nullcontext)
    return RolloutMaker(METHODS["ldl_grpo"].stage_two, SETTINGS, None, None, None, update)


def record(step, scores):
    return {
        "step": step,
        "prompt_id": QUESTION.prompt.id,
        "candidates": ["a", "b", "c", "d"],
        "scores": scores,
        "anchor_score": 0.9,
        "completions": [{"ids": ids, "finished": True} for ids in IDS],
    }


def test_q_is_that_of_the_policy_over_the_scored_candidates(roles):
    """D by hand: log D = log sigmoid(5 r) + r / 1.2 - const with r = s - 0.9; q = softmax(log p - log p_sft)."""
    (row,) = remeasure_groups(roles.policy, rollout_maker(roles), [QUESTION], [record(1, [0.2, None, 0.8, 0.5])])
    scored = [IDS[0], IDS[2], IDS[3]]
    with torch.no_grad():
        ours = sequence_log_probs(roles.policy, QUESTION.encoded, scored, 0)
        with roles.frozen() as frozen:
            q = (ours - sequence_log_probs(frozen, QUESTION.encoded, scored, 0)).softmax(0)
    margins = torch.tensor([0.2, 0.8, 0.5]) - 0.9
    labels = (torch.sigmoid(5 * margins).log() + margins / 1.2).softmax(0)
    first, unscored, *others = row["policy_after"]
    assert unscored is None
    assert [first, *others] == pytest.approx(q.tolist(), abs=1e-5)
    assert max(q) - min(q) > 0.01
    assert row["label_divergence"] == pytest.approx((labels * (labels / q).log()).sum().item(), abs=1e-4)
    assert (row["step"], row["prompt_id"]) == (1, QUESTION.prompt.id)


def test_only_the_first_groups_and_those_whose_ids_were_kept(roles, monkeypatch):
    monkeypatch.setattr(remeasure, "REMEASURED_GROUPS", 5)
    plain = record(1, [0.2, 0.3, 0.8, 0.5]) | {"completions": None}
    groups = [plain, *(record(step, [0.2, 0.3, 0.8, 0.5]) for step in range(2, 9))]
    before = [p.clone() for p in roles.policy.parameters()]
    found = list(remeasure_groups(roles.policy, rollout_maker(roles), [QUESTION], groups))
    assert [row["step"] for row in found] == [2, 3, 4, 5, 6]
    assert all(torch.equal(a, b) for a, b in zip(before, roles.policy.parameters()))
