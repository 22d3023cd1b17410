"""Models that sharing does not work with are detected, and get the numbers of full sequences."""

import warnings
from functools import wraps

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicSlidingWindowLayer

from purld.model.log_probs import token_log_probs
from purld.model.prefix import FullSequences
from purld.model.self_check import can_share_prefix
from purld.model.vision import EncodedPrompt

PROMPT = EncodedPrompt(list(range(3, 20)))
ROWS = [[5, 6, 7, 8], [9, 8], [7, 6, 5]]


def llama():
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def detached_cache(model):
    """Right numbers, wrong gradients."""
    own = model.model.forward

    @wraps(own)
    def forward(*args, **kwargs):
        output = own(*args, **kwargs)
        for layer in output.past_key_values.layers if output.past_key_values else []:
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
        return output

    model.model.forward = forward


def restarted_positions(model):
    """Positions of continuations start at 0 again."""
    own = model.model.forward

    @wraps(own)
    def forward(**kwargs):
        return own(**{**kwargs, "position_ids": torch.arange(kwargs["input_ids"].shape[1]).unsqueeze(0)})

    model.model.forward = forward


def forgetful_cache(model):
    """Only the last tokens of the prompt are kept."""
    own = model.model.forward

    @wraps(own)
    def forward(*args, **kwargs):
        output = own(*args, **kwargs)
        for layer in output.past_key_values.layers if output.past_key_values else []:
            layer.keys, layer.values = layer.keys[:, :, -4:], layer.values[:, :, -4:]
        return output

    model.model.forward = forward


def scaled_outside(model):
    """Logits are scaled by a number that neither the body nor the LM head holds."""
    own = model.model.forward
    scale = {}

    @wraps(own)
    def forward(*args, **kwargs):
        output = own(*args, **kwargs)
        scale["by"] = output.last_hidden_state.shape[1]
        return output

    model.model.forward = forward
    model.lm_head.register_forward_hook(lambda _, __, logits: logits * scale["by"] / 20)


@pytest.mark.parametrize("break_it", [detached_cache, restarted_positions, forgetful_cache, scaled_outside])
def test_a_model_that_disagrees_warns_once_and_gets_plain_numbers(break_it):
    model = llama()
    break_it(model)
    with pytest.warns(UserWarning, match=r"^LlamaForCausalLM: .* does not work with this model: its .*\.$") as warned:
        actual, _ = token_log_probs(model, PROMPT, ROWS, pad=0)
    assert len(warned) == 1
    assert torch.equal(actual, FullSequences(model, [PROMPT], 0).token_log_probs(ROWS)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        token_log_probs(model, PROMPT, ROWS, pad=0)


def test_a_recurrent_model_is_refused():
    sizes = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **sizes)).eval()
    with pytest.warns(UserWarning, match="MambaForCausalLM"):
        assert not can_share_prefix(model, PROMPT, ROWS, pad=0)


def test_an_exceeded_window_is_checked_separately(monkeypatch):
    """A window that fails only once it is full passes on short groups and is detected on the first long one."""
    torch.manual_seed(1)
    sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    head_sizes = {"num_attention_heads": 4, "num_key_value_heads": 4, "initializer_range": 0.2}
    config = AutoConfig.for_model("mistral", **sizes, **head_sizes, sliding_window=10)
    model = AutoModelForCausalLM.from_config(config).eval()
    own = DynamicSlidingWindowLayer.update

    def shortened(self, *args, **kwargs):
        result = own(self, *args, **kwargs)
        if self.cumulative_length > 10:
            self.keys, self.values = self.keys.roll(1, dims=2), self.values.roll(1, dims=2)
        return result

    monkeypatch.setattr(DynamicSlidingWindowLayer, "update", shortened)
    assert can_share_prefix(model, EncodedPrompt(PROMPT.ids[:4]), ROWS, pad=0)
    with pytest.warns(UserWarning, match="MistralForCausalLM"):
        assert not can_share_prefix(model, PROMPT, ROWS, pad=0)
    assert can_share_prefix(model, EncodedPrompt(PROMPT.ids[:4]), ROWS, pad=0)


def test_a_sound_model_is_silent_and_its_state_untouched():
    model = llama()
    state = torch.random.get_rng_state()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        assert can_share_prefix(model, PROMPT, ROWS, pad=0)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert not model.model.embed_tokens._forward_hooks
    assert "forward" not in vars(model.model)
