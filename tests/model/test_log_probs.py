"""Sharing a group's prompt gives the numbers and gradients of plain forward passes."""

import pytest
import torch
from log_prob_sums import sequence_log_probs
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from purld.model import log_probs
from purld.model.log_probs import RowGroup, make_prefixes, micro_batches, plan_passes, token_log_probs
from purld.model.vision import EncodedPrompt

LENGTHS = (1, 5, 9, 9, 3)


@pytest.fixture(scope="module", params=["qwen2", "llama"])
def model(request, random_student):
    if request.param == "qwen2":
        return AutoModelForCausalLM.from_pretrained(random_student).eval()
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=120, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def group():
    generator = torch.Generator().manual_seed(3)
    prompt = EncodedPrompt(torch.randint(0, 120, (17,), generator=generator).tolist())
    return prompt, [torch.randint(0, 120, (n,), generator=generator).tolist() for n in LENGTHS]


def plain_log_probs(model, prompt, completions):
    """One unpadded forward pass per completion."""
    sums = []
    for completion in completions:
        log_probs = model(input_ids=torch.tensor([prompt.ids + completion])).logits[0].float().log_softmax(-1)
        sums.append(sum(log_probs[len(prompt) - 1 + i, token] for i, token in enumerate(completion)))
    return torch.stack(sums)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_log_probs_and_gradients_equal_the_plain_ones(model, group):
    prompt, completions = group
    weights = torch.tensor([0.5, -1.0, 2.0, 0.3, -0.7])
    plain = plain_log_probs(model, prompt, completions)
    shared = sequence_log_probs(model, prompt, completions, pad=0)
    assert torch.allclose(shared, plain, rtol=1e-5, atol=1e-4)
    expected = gradients(model, (weights * plain).sum())
    actual = gradients(model, (weights * shared).sum())
    assert (actual - expected).norm() / expected.norm() < 1e-5


def test_padding_counts_nothing(model, group):
    prompt, completions = group
    with torch.no_grad():
        log_probs, mask = token_log_probs(model, prompt, completions, pad=0)
    assert mask.sum(dim=1).tolist() == list(LENGTHS)
    assert log_probs.dtype == torch.float32
    assert (log_probs[mask == 1] < 0).all()
    assert (log_probs[mask == 0] == 0).all()


def test_padding_is_inert(model, group):
    prompt, completions = group
    with torch.no_grad():
        one_by_one = torch.cat([sequence_log_probs(model, prompt, [c], pad=0) for c in completions])
        together = sequence_log_probs(model, prompt, completions, pad=7)
    assert torch.allclose(one_by_one, together, rtol=1e-5, atol=1e-4)


def test_closing_logits_equal_the_plain_ones(model, group):
    prompt, completions = group
    tails = [c for c in completions if len(c) >= 3]
    with torch.no_grad():
        actual = make_prefixes(model, [RowGroup(prompt, tails)], pad=0).closing_logits(tails, count=3)
        for tail, logits in zip(tails, actual):
            plain = model(input_ids=torch.tensor([prompt.ids + tail])).logits[0, -3:]
            assert torch.allclose(logits, plain, atol=1e-4)


def test_micro_batches_cover_everything_once():
    assert [list(range(10))[rows] for rows in micro_batches(10, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


@pytest.mark.parametrize(("size", "expected"), [(100, [2, 1, 2]), (4, [2, 1, 2]), (3, [1, 1, 1, 1, 1]), (1, [1] * 5)])
def test_consecutive_groups_share_a_pass_up_to_its_rows_and_tokens(size, expected, monkeypatch):
    """The third prompt would pad the others to 300 tokens; without its neighbours it is still a pass of its own."""
    monkeypatch.setattr(log_probs, "PASS_TOKENS", 250)
    monkeypatch.setattr(log_probs, "can_join", lambda *_: True)
    monkeypatch.setattr(log_probs, "windows_count_padding", lambda *_: False)
    groups = [RowGroup(EncodedPrompt([1] * length), [[1] * 5] * 2) for length in (10, 20, 300, 10, 10)]
    passes = list(plan_passes(None, groups, 0, size))
    assert [len(together) for together in passes] == expected
    assert [group for together in passes for group in together] == groups


def test_groups_with_images_and_those_that_may_not_be_joined_take_a_pass_each(monkeypatch):
    plain = [RowGroup(EncodedPrompt([1, 2]), [[1]])] * 2
    with_image = RowGroup(EncodedPrompt([1, 2], images=(object(),)), [[1]])
    monkeypatch.setattr(log_probs, "windows_count_padding", lambda *_: False)
    mixed = [*plain, with_image, with_image, *plain]
    for joined, groups, expected in ((True, plain, 1), (False, plain, 2), (True, mixed, 4)):
        monkeypatch.setattr(log_probs, "can_join", lambda *_, joined=joined: joined)
        assert len(list(plan_passes(None, groups, 0, 100))) == expected
