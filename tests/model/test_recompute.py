"""Layers that are computed again in the backward pass give the same gradient and keep far less."""

from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from saved_bytes import counting_saved_bytes
from test_architectures import FULL, SHARED, build

from purld.model.prefix import FullSequences, SharedPrefixes
from purld.model.recompute import can_recompute
from purld.model.vision import EncodedPrompt

PROMPT = EncodedPrompt([int(n) for n in torch.randint(3, 120, (17,), generator=torch.Generator().manual_seed(3))])
LENGTHS = (1, 5, 9, 9, 3)
COMPLETIONS = [[3 + (7 * i + 5 * n) % 117 for i in range(n)] for n in LENGTHS]
WEIGHTS = torch.linspace(-1, 1, 45).view(5, 9)


QUICK = ("llama", "qwen2", "qwen3", "gemma3_text", "mistral", "gpt2", "qwen3_moe", "phi3")


def gradient(model, prefix, parts):
    """Return the gradient that backward passes in parts leave, and the bytes that were kept for them."""
    model.zero_grad()
    with counting_saved_bytes(*model.parameters()) as kept:
        held = prefix()
        log_probs = [held.token_log_probs(COMPLETIONS[rows])[0] for rows in parts]
        bytes_kept = kept()
    for rows, values in zip(parts, log_probs):
        (WEIGHTS[rows, : values.shape[1]] * values).sum().backward()
    held.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), bytes_kept


def assert_same_with_less(model, make, parts=(slice(0, 2), slice(2, 5))):
    (whole, more), (again, less) = (gradient(model, partial(make, again), parts) for again in (False, True))
    assert can_recompute(model)
    assert (again - whole).norm() <= 1e-6 * whole.norm()
    assert less < 0.3 * more


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in SHARED])
def test_behind_a_shared_prompt(name):
    """In two parts; the prompt's layers are computed again as well, and its keys and values stay."""
    model = build(name, SHARED[name])
    assert_same_with_less(model, lambda recompute: SharedPrefixes(model, [PROMPT], 0, cut=True, recompute=recompute))


@pytest.mark.parametrize("name", FULL)
def test_on_full_sequences(name):
    model = build(name, FULL[name][0])
    assert_same_with_less(model, lambda recompute: FullSequences(model, [PROMPT], 0, recompute))


def test_under_an_adapter_and_without_a_cut():
    model = get_peft_model(build("qwen2", {}), LoraConfig(target_modules="all-linear", init_lora_weights=False))
    assert_same_with_less(model, lambda recompute: SharedPrefixes(model, [PROMPT], 0, True, recompute))
    assert_same_with_less(model, lambda recompute: SharedPrefixes(model, [PROMPT], 0, False, recompute), [slice(0, 5)])


def test_layers_are_themselves_again_afterwards_and_without_a_graph_nothing_is_replaced():
    model = build("llama", {})
    layer = model.model.layers[0]
    layer.forward = marked = layer.forward  # as a library that wraps layers leaves it
    SharedPrefixes(model, [PROMPT], 0, recompute=True).token_log_probs(COMPLETIONS)
    assert layer.__dict__["forward"] is marked
    assert "forward" not in model.model.layers[1].__dict__
    with torch.no_grad():
        values = SharedPrefixes(model, [PROMPT], 0, recompute=True).token_log_probs(COMPLETIONS)[0]
        assert torch.equal(values, SharedPrefixes(model, [PROMPT], 0).token_log_probs(COMPLETIONS)[0])
