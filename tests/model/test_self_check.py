"""Models that sharing does not work with are detected, and get the numbers of full sequences."""

import warnings
from functools import wraps

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicSlidingWindowLayer

from purld.model import self_check
from purld.model.log_probs import token_log_probs
from purld.model.prefix import FullSequences
from purld.model.self_check import can_join, can_share_prefix
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


@pytest.mark.parametrize(("kind", "longest"), [("longrope", 24), ("dynamic", 24)])
def test_positions_that_turn_otherwise_in_long_passes_are_checked_separately(kind, longest):
    """The prompt alone is short and has the short passes' frequencies; with its continuations it is not."""
    torch.manual_seed(1)
    sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    rope = {"rope_type": kind, "rope_theta": 100.0, "factor": 8.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [9.0] * 4, "original_max_position_embeddings": longest}
        sizes["original_max_position_embeddings"] = longest
    name, limit = ("phi3", 8 * longest) if kind == "longrope" else ("llama", longest)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "initializer_range": 0.5, "pad_token_id": 0}
    config = AutoConfig.for_model(name, **sizes, **heads, max_position_embeddings=limit, rope_parameters=rope)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert can_share_prefix(model, PROMPT, ROWS, pad=0)
    long = EncodedPrompt(list(range(3, 3 + longest - 1)))
    with pytest.warns(UserWarning, match="its log-probabilities are off"):
        assert not can_share_prefix(model, long, ROWS, pad=0)
    actual, _ = token_log_probs(model, long, ROWS[:1], pad=0)
    assert torch.equal(actual, FullSequences(model, [long], 0).token_log_probs(ROWS[:1])[0])


@pytest.mark.parametrize("groups", [1, 2])
def test_a_check_that_does_not_fit_is_made_with_recomputed_layers(groups, monkeypatch):
    """The update recomputes them where memory is short, and must not be refused for the check's sake."""
    model, tried = llama(), []

    def out_of_memory_unless_recomputed(own):
        @wraps(own)
        def make(*args, **kwargs):
            tried.append(kwargs.get("recompute") or args[3:] == (True,))
            if not tried[-1]:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB")
            return own(*args, **kwargs)

        return make

    for name in ("FullSequences", "SharedPrefixes"):
        monkeypatch.setattr(self_check, name, out_of_memory_unless_recomputed(getattr(self_check, name)))
    some = [(PROMPT, ROWS), (EncodedPrompt(PROMPT.ids[:9]), ROWS)][:groups]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert can_join(model, some, pad=0) if groups > 1 else can_share_prefix(model, PROMPT, ROWS, pad=0)
    assert tried.count(False) == groups and tried.count(True) >= 2


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
