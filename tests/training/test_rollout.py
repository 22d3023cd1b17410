"""Groups as they are made for the update: the members' log-probs under p_sft, what they cost, and RLPR's reward."""

import contextlib
from dataclasses import replace

import pytest
import torch
from counted_tokens import counted_tokens
from transformers import AutoModelForCausalLM

from purld.config.methods import AnchorGrpo, LdlGrpo, SelfDistillation
from purld.config.schema import Student
from purld.methods.labels import pu_labels
from purld.methods.table import METHODS
from purld.model.load import Roles, load_encoder
from purld.model.log_probs import token_log_probs
from purld.model.sample import Completion
from purld.model.self_evaluation import GroupScores
from purld.records import Prompt
from purld.training.group_update import GroupUpdate
from purld.training.rollout import AnchoredPrompt, RolloutMaker, candidates_to_score
from purld.training.scoring import SCORERS, GroupToScore, ScorerContext, score_nothing

PROMPT, ANCHOR = Prompt.from_text("How many are 3 and 4?"), "3 + 4 = 7."
IDS = [[21, 35, 40, 22], [50, 51], [33]]


@pytest.fixture(scope="module")
def encoder(random_student):
    return load_encoder(Student(model=str(random_student), max_anchor_tokens=32))


@pytest.fixture(scope="module")
def roles(random_student):
    policy, frozen = (AutoModelForCausalLM.from_pretrained(random_student).eval() for _ in range(2))
    return Roles(policy, frozen.requires_grad_(False))


def make_rollout(method, settings, roles, encoder, scorer, anchor_cut=False):
    """One group of the candidates above."""
    update = GroupUpdate(roles, 8, encoder.pad, torch.Tensor.backward, contextlib.nullcontext)
    sampler = lambda policy, prompts, count, seeds: [[Completion(ids, True) for ids in IDS]]  # noqa: E731
    maker = RolloutMaker(METHODS[method].stage_two, settings, encoder, sampler, scorer, update)
    question = AnchoredPrompt(PROMPT, ANCHOR, encoder.encode_prompt(PROMPT), anchor_cut)
    (rollout,) = maker(roles.policy, [question], seed=0)
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


def test_the_anchor_joins_the_group_with_the_label_of_its_own_score(roles, encoder):
    settings = LdlGrpo(candidates=3, anchor_in_group=True)
    scores = GroupScores(0.9, [0.2, None, 0.8])
    rollout = make_rollout("ldl_grpo", settings, roles, encoder, lambda groups: [scores for _ in groups])
    assert rollout.member_candidates == (0, 2)
    assert rollout.members.ids == [encoder.encode_target(ANCHOR).ids, IDS[0], IDS[2]]
    labels = pu_labels(torch.tensor([0.9, 0.2, 0.8]), 0.9, settings.gamma, settings.tau)
    assert torch.equal(rollout.signal.log_distribution, labels.log_distribution)


@pytest.mark.parametrize("score", ["in_context", "reference"])
def test_a_cut_anchor_has_no_end_of_turn_as_a_member_and_in_its_own_score(score, roles, encoder):
    settings = LdlGrpo(score=score, candidates=3, anchor_in_group=True)
    rollout = make_rollout("ldl_grpo", settings, roles, encoder, scorer_of(settings, roles, encoder), anchor_cut=True)
    ids = encoder.encode_literal(ANCHOR)
    assert rollout.members.ids[0] == ids
    prompts = [encoder.encode_prompt(PROMPT)]
    rows = [ids, ids]
    if score == "in_context":
        prompts.append(encoder.encode_anchored_prompt(PROMPT, ANCHOR))
    else:
        rows = [ids + encoder.encode_literal("\n\n") + ids]
    with torch.no_grad(), roles.frozen() as frozen:
        found = [token_log_probs(frozen, prompt, rows, encoder.pad)[0][0][-len(ids) :] for prompt in prompts]
    expected = (found[1] - found[0]).clamp(-2, 2).mean() if score == "in_context" else found[0].exp().mean()
    assert rollout.scores.anchor == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize(
    ("joins", "scores", "used"),
    [(False, [1.0, 1.0, 1.0], False), (False, [1.0, 0.0, 1.0], True), (True, [0.0, 0.0, 0.0], True)],
)
def test_a_group_of_equal_scores_is_left_out_where_the_settings_say_so(joins, scores, used, roles, encoder):
    def score(groups):
        return [GroupScores(1.0, scores) for _ in groups]

    settings = LdlGrpo(candidates=3, anchor_in_group=joins, skip_equal_scores=True)
    assert make_rollout("ldl_grpo", settings, roles, encoder, score).usable is used
    kept = settings.model_copy(update={"skip_equal_scores": False})
    assert make_rollout("ldl_grpo", kept, roles, encoder, score).usable


def scorer_of(settings, roles, encoder):
    context = ScorerContext(encoder, roles, settings, True, contextlib.nullcontext)
    return SCORERS[settings.score].make(context)


def test_in_context_hands_its_bare_log_probs_to_the_update(roles, encoder):
    """One pass of p_sft over the prompt and the candidates is saved, and the values are the same to the bit."""
    settings = LdlGrpo(score="in_context", candidates=3)
    scorer = scorer_of(settings, roles, encoder)

    def forgetful(groups):
        return [replace(scores, log_probs=None) for scores in scorer(groups)]

    make_rollout("ldl_grpo", settings, roles, encoder, scorer)  # the self-check of sharing is over after this
    with roles.frozen() as frozen:
        with counted_tokens(frozen) as before:
            measured = make_rollout("ldl_grpo", settings, roles, encoder, forgetful).members
        with counted_tokens(frozen) as after:
            handed = make_rollout("ldl_grpo", settings, roles, encoder, scorer).members
    width = max(map(len, IDS)) - 1  # the last token predicts nothing
    assert sum(before) - sum(after) == len(encoder.encode_prompt(PROMPT)) + len(IDS) * width
    assert torch.equal(handed.reference, measured.reference) and torch.equal(handed.mask, measured.mask)
    assert handed.reference.dtype == handed.mask.dtype == torch.float32
    for size in (1, 2):  # in other batches than the update's, to rounding
        small = scorer_of(settings.model_copy(update={"score_batch_size": size}), roles, encoder)
        found = make_rollout("ldl_grpo", settings, roles, encoder, small).members.reference
        assert torch.allclose(found, measured.reference, atol=1e-5)


def test_log_probs_of_other_ids_than_those_drawn_are_not_handed_on(roles, encoder):
    scorer = scorer_of(LdlGrpo(score="in_context", candidates=3), roles, encoder)
    texts = [encoder.decode_text(ids) for ids in IDS]
    (from_texts,) = scorer([GroupToScore(PROMPT, ANCHOR, texts)])
    (from_ids,) = scorer([GroupToScore(PROMPT, ANCHOR, texts, IDS)])
    assert from_texts.log_probs is None and len(from_ids.log_probs) == 3


def test_a_candidate_that_thought_is_scored_as_its_answer_which_ends_only_if_it_did(encoder):
    answer = encoder.encode_literal("12 " * 40 + "it is.")  # longer than an anchor may be
    thought = [*encoder.encode_literal("<think>\nHm.\n</think>\n\n"), *answer]
    drawn = [
        Completion([*thought, encoder.end], True),
        Completion(thought, False),
        Completion(encoder.encode_literal("<think>\nHm."), False),
        Completion(answer, False),
    ]
    group = candidates_to_score(encoder, AnchoredPrompt(PROMPT, ANCHOR, encoder.encode_prompt(PROMPT)), drawn)
    assert [list(ids) for ids in group.ids] == [[*answer, encoder.end], answer, [encoder.end], answer]
    assert group.thinking == 3


def test_the_reference_score_is_the_reward_of_rlpr_in_grpo(roles, encoder):
    """By hand: one whole sequence per candidate, the mean probability of the anchor's tokens, the group's advantages
    (r - mean) / (std + 1e-4)."""
    settings = AnchorGrpo(method="anchor_grpo", score="reference", candidates=3)
    rollout = make_rollout("anchor_grpo", settings, roles, encoder, scorer_of(settings, roles, encoder))
    head, target = encoder.encode_prompt(PROMPT).ids, [*encoder.encode_literal(ANCHOR), encoder.end]
    rewards = []
    for ids in IDS:
        row = [*head, *ids, *encoder.encode_literal("\n\n"), *target]
        with torch.no_grad(), roles.frozen() as frozen:
            probabilities = frozen(input_ids=torch.tensor([row])).logits[0].softmax(dim=-1)
        places = range(len(row) - len(target), len(row))
        rewards.append(sum(probabilities[i - 1, row[i]].item() for i in places) / len(target))
    assert rollout.scores.candidates == pytest.approx(rewards, abs=1e-6)
    mean = sum(rewards) / 3
    deviation = (sum((r - mean) ** 2 for r in rewards) / 2) ** 0.5
    expected = [(r - mean) / (deviation + 1e-4) for r in rewards]
    assert rollout.signal.tolist() == pytest.approx(expected, abs=1e-3)
    assert max(expected) - min(expected) > 1
