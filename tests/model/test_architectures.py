"""Every family of language models gives the log-probs of its plain forward pass, with a shared prompt where it can.

The models are random, of two layers, with windows and chunks of 8 tokens that prompts and completions outgrow, and
with the scales and soft caps that an architecture has.
"""

import warnings

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from purld.model.log_probs import make_prefix, token_log_probs
from purld.model.prefix import SharedPrefix
from purld.model.vision import EncodedPrompt

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
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
WINDOW = {"sliding_window": 8}
MIXED_LAYERS = {"layer_types": ["sliding_attention", "full_attention"]}
SHARED = {
    "bloom": {"n_layer": 2, "n_head": 4},
    "codegen": GPT2_SIZES | {"rotary_dim": 4},
    "cohere": {"logit_scale": 0.3},
    "cohere2": WINDOW | {"logit_scale": 0.3},
    "exaone4": {},
    "falcon": {"head_dim": None},  # it has no setting of that name
    "gemma": {},
    "gemma2": WINDOW | {"final_logit_softcapping": 2.0},
    "gemma3_text": WINDOW | MIXED_LAYERS,
    "glm": {},
    "glm4": {},
    "gpt2": GPT2_SIZES,
    "gpt_bigcode": GPT2_SIZES,
    "gpt_neox": {},
    "gpt_oss": WINDOW | EXPERTS,
    "gptj": GPT2_SIZES | {"rotary_dim": 4},
    "granite": {"logits_scaling": 3.0},
    "granitemoe": EXPERTS | {"logits_scaling": 3.0},
    "llama": {},
    "mistral": WINDOW,
    "mixtral": EXPERTS,
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": WINDOW,
    "phi": {},
    "phi3": {},
    "qwen2": {},
    "qwen2_moe": EXPERTS,
    "qwen3": {},
    "qwen3_moe": EXPERTS,
    "smollm3": {},
    "stablelm": {},
    "starcoder2": WINDOW,
}
# Settings, and why the prompt is not shared. Each of them works on full sequences after one warning.
FULL = {
    # Its `forward` calls the decoder inside the body, so the body cannot be left out.
    "opt": ({"ffn_dim": 64, "word_embed_proj_dim": 32}, "the forward of OPTForCausalLM does not call its body"),
    # Its `base_model_prefix` names no child of it.
    "llama4_text": (
        EXPERTS | {"intermediate_size_mlp": 64, "attention_chunk_size": 8},
        "Llama4ForCausalLM does not keep its body apart from its head",
    ),
    # It is recurrent: it has a state where others have keys and values.
    "mamba": ({"state_size": 4}, "has no attribute 'past_key_values'"),
}


def build(name, settings):
    torch.manual_seed(1)
    sizes = {key: value for key, value in (SIZES | settings).items() if value is not None}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes)).eval()


@pytest.fixture(scope="module")
def group():
    generator = torch.Generator().manual_seed(3)
    prompt = EncodedPrompt(torch.randint(3, 120, (17,), generator=generator).tolist())
    return prompt, [torch.randint(3, 120, (n,), generator=generator).tolist() for n in (1, 5, 9, 9, 3)]


@torch.no_grad()
def assert_plain_numbers(model, prompt, completions):
    log_probs, _ = token_log_probs(model, prompt, completions, pad=0)
    for completion, row in zip(completions, log_probs):
        predicted = model(input_ids=torch.tensor([prompt.ids + completion])).logits[0].float().log_softmax(-1)
        expected = predicted[len(prompt) - 1 : -1].gather(-1, torch.tensor(completion).unsqueeze(-1)).squeeze(-1)
        assert torch.allclose(row[: len(completion)], expected, atol=1e-4)


@pytest.mark.parametrize("name", SHARED)
def test_the_prompt_is_shared_and_gives_the_plain_log_probs(name, group):
    model = build(name, SHARED[name])
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        assert isinstance(make_prefix(model, *group, pad=0), SharedPrefix)
    assert_plain_numbers(model, *group)


@pytest.mark.parametrize("name", FULL)
def test_what_cannot_be_shared_warns_once_and_gives_the_plain_log_probs(name, group):
    settings, reason = FULL[name]
    model = build(name, settings)
    with pytest.warns(UserWarning, match=f"sharing it does not work with this model: .*{reason}") as warned:
        assert_plain_numbers(model, *group)
    assert len(warned) == 1
