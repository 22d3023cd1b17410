"""How far bfloat16 weights take sequence log-probabilities from float32's: the bound that docs/methods.md states."""

import contextlib

import pytest
import torch
from log_prob_sums import sequence_log_probs
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from purld.model.encode import Encoder
from purld.model.rounding import rounded_otherwise
from purld.records import Prompt
from purld.testbed.world.world import generate_problems, teacher_answer


@pytest.fixture(scope="module")
def answers(tokenizer):
    """Twenty prompts with two answers each, as token ids."""
    encoder = Encoder(tokenizer, 128)
    problems = generate_problems("counting", "heldout", 21, 3)
    texts = [teacher_answer(p) for p in problems]
    return [
        (encoder.encode_prompt(Prompt.from_text(p.question)), [encoder.encode_answer(t).ids for t in pair])
        for p, *pair in zip(problems, texts, texts[1:])
    ]


def log_probs(model, answers):
    with torch.no_grad():
        return torch.cat([sequence_log_probs(model, encoded, ids, pad=0) for encoded, ids in answers])


def test_the_error_grows_with_the_root_of_the_length_and_stays_within_its_bound(shipped_student, answers):
    full, half = (
        log_probs(AutoModelForCausalLM.from_pretrained(shipped_student, dtype=dtype).eval(), answers)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert half.dtype == torch.float32
    lengths = torch.tensor([float(len(c)) for _, ids in answers for c in ids])
    error = (half - full) / lengths.sqrt()
    assert 0 < error.pow(2).mean().sqrt() < 0.03
    assert (half - full).abs().max() < 0.5


def test_at_the_first_step_the_ratio_is_exactly_zero_whatever_the_weights_are(shipped_student, answers):
    model = AutoModelForCausalLM.from_pretrained(shipped_student, dtype=torch.bfloat16).eval()
    policy = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    with policy.disable_adapter():
        reference = log_probs(policy, answers)
    assert torch.equal(log_probs(policy, answers), reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "autocast"])
def test_rounding_otherwise_changes_log_probs_by_as_much_as_rounding_does(dtype, shipped_student, answers):
    full = AutoModelForCausalLM.from_pretrained(shipped_student).eval()
    model, context = full, contextlib.nullcontext()
    if dtype == "autocast":
        context = torch.autocast("cpu", dtype=torch.bfloat16)
    elif dtype == torch.bfloat16:
        model = AutoModelForCausalLM.from_pretrained(shipped_student, dtype=dtype).eval()
    with context:
        plain = log_probs(model, answers)
        moved = []
        for _ in range(2):
            with rounded_otherwise(model):
                moved.append(log_probs(model, answers))
        assert torch.equal(log_probs(model, answers), plain)
    assert torch.equal(*moved)
    change = (moved[0] - plain).square().mean().sqrt()
    if dtype == torch.float32:
        assert 0 < change < 1e-4
    else:
        error = (plain - log_probs(full, answers)).square().mean().sqrt()
        assert error / 3 < change < 3 * error
