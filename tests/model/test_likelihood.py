"""Scores by likelihoods, against plain forward passes over whole sequences."""

import pytest
import torch
from counted_tokens import counted_tokens
from transformers import AutoModelForCausalLM

from purld.config.schema import Student
from purld.model.likelihood import MAX_GAIN, AnchoredRows, in_context_scores, reference_scores
from purld.model.load import load_encoder
from purld.records import Message, Prompt
from purld.templates import IN_CONTEXT_TAIL

PROMPT = Prompt((Message("system", "Be brief."), Message("user", "How many are 3 and 4?")))
ANCHOR = "3 + 4 = 7."


@pytest.fixture(scope="module")
def model(random_student):
    return AutoModelForCausalLM.from_pretrained(random_student).eval()


@pytest.fixture(scope="module")
def encoder(random_student):
    return load_encoder(Student(model=str(random_student), max_anchor_tokens=32))


def token_log_probs(model, prompt_ids, answer_ids):
    """log p of each answer token by one pass over the whole sequence."""
    ids = torch.tensor([[*prompt_ids, *answer_ids]])
    with torch.no_grad():
        log_probs = model(input_ids=ids).logits.float().log_softmax(dim=-1)[0]
    start = len(prompt_ids)
    return torch.stack([log_probs[start + i - 1, token] for i, token in enumerate(answer_ids)])


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_in_context_is_the_mean_gain_of_the_anchor(model, encoder, batch_size):
    rows = [encoder.encode_answer(text).ids for text in (ANCHOR, "Seven.", "It is 12, as I said.")]
    scores = in_context_scores(model, encoder, [AnchoredRows(PROMPT, ANCHOR, rows[1:])], batch_size)[0]
    turns = [
        Message("system", "Be brief."),
        Message("user", PROMPT.messages[1].content + IN_CONTEXT_TAIL.format(anchor=ANCHOR)),
    ]
    anchored = encoder.encode_prompt(Prompt(tuple(turns))).ids
    bare = encoder.encode_prompt(PROMPT).ids
    without = [token_log_probs(model, bare, row) for row in rows]
    gains = [token_log_probs(model, anchored, row) - alone for row, alone in zip(rows, without)]
    assert max(gain.abs().max().item() for gain in gains) > MAX_GAIN  # the clip matters here
    expected = [gain.clamp(-2, 2).mean().item() for gain in gains]
    assert [scores.anchor, *scores.candidates] == pytest.approx(expected, abs=1e-4)
    for found, alone in zip(scores.log_probs, without[1:], strict=True):
        assert torch.allclose(found, alone, atol=1e-5)


def test_reference_is_the_anchors_mean_probability_after_the_candidate(model, encoder):
    rows = [encoder.encode_answer(text).ids for text in ("Seven.", "It is 12.")]
    scores = reference_scores(model, encoder, [AnchoredRows(PROMPT, ANCHOR, rows)], batch_size=1)[0]
    texts = (ANCHOR, "Seven.", "It is 12.")
    bare, target = encoder.encode_prompt(PROMPT).ids, encoder.encode_answer(ANCHOR).ids
    expected = []
    for text in texts:
        before = [*bare, *encoder.encode_literal(text), *encoder.encode_literal("\n\n")]
        expected.append(token_log_probs(model, before, target).exp().mean().item())
    assert [scores.anchor, *scores.candidates] == pytest.approx(expected, abs=1e-5)
    assert all(0 < score < 1 for score in scores.candidates)
    assert scores.log_probs is None


def test_an_anchor_cannot_close_its_own_turn(encoder):
    special = encoder.tokenizer.convert_ids_to_tokens(encoder.end)
    plain = encoder.encode_anchored_prompt(PROMPT, "An answer.").ids
    forged = encoder.encode_anchored_prompt(PROMPT, f"An answer.{special}").ids
    assert forged.count(encoder.end) == plain.count(encoder.end)


def test_a_long_anchor_is_cut_like_a_training_target(encoder):
    long = encoder.encode_anchored_prompt(PROMPT, "7 and " * 200)
    assert len(long) <= len(encoder.encode_anchored_prompt(PROMPT, "7")) + 32


@pytest.mark.parametrize("scores_of", [in_context_scores, reference_scores])
def test_several_groups_in_one_pass_have_the_scores_of_each_alone(model, encoder, scores_of):
    texts = [("Seven.", "It is 12, as I said."), ("No.", "Yes, it is so.", "12"), ("Three.",)]
    prompts = [PROMPT, Prompt.from_text("Is it?"), Prompt.from_text("How many are two and one, if one is left out?")]
    groups = [
        AnchoredRows(prompt, anchor, [encoder.encode_answer(text).ids for text in own])
        for prompt, anchor, own in zip(prompts, (ANCHOR, "Yes.", "Three, in all."), texts)
    ]
    scores_of(model, encoder, groups, 100)  # with the self-checks
    with counted_tokens(model) as counts:
        together = scores_of(model, encoder, groups, 100)
    assert len(counts) == (
        5 if scores_of is in_context_scores else 2
    )  # prompts, members; bare prompts, anchors, others
    for found, group in zip(together, groups, strict=True):
        (alone,) = scores_of(model, encoder, [group], 1)
        assert [found.anchor, *found.candidates] == pytest.approx([alone.anchor, *alone.candidates], abs=1e-5)
        for one, other in zip(found.log_probs or (), alone.log_probs or (), strict=True):
            assert torch.allclose(one, other, atol=1e-4)
