"""A shared prefix gives the numbers and gradients of full sequences, whatever an architecture does to its logits."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from purld.model import body_and_head
from purld.model.prefix import FullSequences, SharedPrefixes
from purld.model.vision import EncodedPrompt

LENGTHS = (1, 5, 9, 9, 3)
SIZES = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
# Soft-capped, scaled and divided logits; windows of 8 that prompts and completions exceed; learned positions.
ARCHITECTURES = {
    "gemma2": {"sliding_window": 8, "final_logit_softcapping": 2.0},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 3.0},
    "mistral": {"sliding_window": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
}


def build(name, **settings):
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SIZES, **settings)).eval()


def group(prompt_length=17):
    generator = torch.Generator().manual_seed(3)
    prompt = EncodedPrompt(torch.randint(1, 120, (prompt_length,), generator=generator).tolist())
    return prompt, [torch.randint(1, 120, (n,), generator=generator).tolist() for n in LENGTHS]


def gradient(model, backward):
    model.zero_grad()
    backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def weighted(log_probs):
    return (torch.linspace(-1, 1, log_probs.numel()).view_as(log_probs) * log_probs).sum()


def assert_alike(model, prompt, completions):
    plain = FullSequences(model, [prompt], 0).token_log_probs(completions)[0]
    shared = SharedPrefixes(model, [prompt], 0).token_log_probs(completions)[0]
    assert torch.allclose(shared, plain, atol=1e-4)
    expected, actual = (gradient(model, weighted(x).backward) for x in (plain, shared))
    assert (actual - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("prompt_length", [3, 17])
def test_log_probs_and_gradients_equal_full_sequences(name, prompt_length):
    assert_alike(build(name, **ARCHITECTURES[name]), *group(prompt_length))


def test_adapters_on_and_off():
    model = get_peft_model(build("llama"), LoraConfig(target_modules="all-linear", init_lora_weights=False))
    prompt, completions = group()
    assert_alike(model, prompt, completions)
    with torch.no_grad():
        on = SharedPrefixes(model, [prompt], 0).token_log_probs(completions)[0]
        with model.disable_adapter():
            off = SharedPrefixes(model, [prompt], 0).token_log_probs(completions)[0]
            plain = FullSequences(model, [prompt], 0).token_log_probs(completions)[0]
    assert torch.allclose(off, plain, atol=1e-4)
    assert not torch.allclose(on, off, atol=1e-2)


@pytest.mark.parametrize("name", ["gemma2", "cohere"])
def test_closing_logits_equal_full_sequences(name):
    model = build(name, **ARCHITECTURES[name])
    prompt, completions = group()
    tails = [c for c in completions if len(c) >= 3]
    with torch.no_grad():
        plain = FullSequences(model, [prompt], 0).closing_logits(tails, 3)
        shared = SharedPrefixes(model, [prompt], 0).closing_logits(tails, 3)
    assert shared.shape == (len(tails), 3, 120)
    assert torch.allclose(shared, plain, atol=1e-4)


def test_a_cut_prefix_is_run_once_and_differentiated_once():
    """Three micro-batches leave their gradients at the prefix, which propagates them in one backward pass."""
    model = build("llama")
    prompt, completions = group()
    expected = gradient(model, weighted(FullSequences(model, [prompt], 0).token_log_probs(completions)[0]).backward)
    runs = []
    handle = model.model.register_forward_hook(lambda _, __, output: runs.append(output.last_hidden_state.shape))

    def in_parts():
        prefix = SharedPrefixes(model, [prompt], 0, cut=True)
        weights = torch.linspace(-1, 1, len(LENGTHS) * max(LENGTHS)).view(len(LENGTHS), -1)
        for rows in (slice(0, 2), slice(2, 4), slice(4, 5)):
            log_probs, _ = prefix.token_log_probs(completions[rows])
            (weights[rows, : log_probs.shape[1]] * log_probs).sum().backward()
        prefix.backward()

    actual = gradient(model, in_parts)
    handle.remove()
    assert [shape[:2] for shape in runs if shape[1] == len(prompt)] == [(1, len(prompt))]
    assert (actual - expected).norm() / expected.norm() < 1e-5


def test_few_tokens_logits_at_a_time_and_only_the_completions(monkeypatch):
    monkeypatch.setattr(body_and_head, "CHUNK_TOKENS", 4)
    model = build("llama")
    prompt, completions = group()
    widths = []
    model.lm_head.register_forward_hook(lambda _, __, logits: widths.append(logits.shape[-2]))
    weighted(SharedPrefixes(model, [prompt], 0).token_log_probs(completions)[0]).backward()
    assert max(widths) == 4
    assert sum(widths) == 2 * sum(LENGTHS)  # once in the forward and once in the backward pass


def test_a_half_precision_models_log_probs_are_float32():
    model = build("llama").to(torch.bfloat16)
    prompt, completions = group()
    with torch.no_grad():
        actual = SharedPrefixes(model, [prompt], 0).token_log_probs(completions)[0]
        plain = FullSequences(model, [prompt], 0).token_log_probs(completions)[0]
    assert actual.dtype == torch.float32
    assert (actual - plain).norm() / plain.norm() < 0.02
