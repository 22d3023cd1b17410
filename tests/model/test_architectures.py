"""Every family of language models gives the log-probs of its plain forward pass, with a shared prompt where it can.

The models are random, of two layers, with windows and chunks of 8 tokens that prompts and completions outgrow, and
with the scales and soft caps that an architecture has.
"""

import warnings

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from purld.model.log_probs import GroupPass, RowGroup, make_prefixes, plan_passes, token_log_probs
from purld.model.prefix import SharedPrefixes
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
    "gpt_neo": {"window_size": 8, "attention_types": [[["global", "local"], 1]]},
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
    "mamba": ({"state_size": 4}, "(has no attribute 'past_key_values'|its cache is not a plain one)"),
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
        assert isinstance(make_prefixes(model, [RowGroup(*group)], pad=0), SharedPrefixes)
    assert_plain_numbers(model, *group)


def draw_groups(lengths):
    generator = torch.Generator().manual_seed(4)
    draw = lambda n: torch.randint(3, 120, (n,), generator=generator).tolist()  # noqa: E731
    return [RowGroup(EncodedPrompt(draw(of_prompt)), [draw(n) for n in rows]) for of_prompt, rows in lengths]


def log_probs_and_gradient(model, groups, size):
    """Those of a weighted sum over all tokens, in passes of at most `size` rows; and how many passes prompts took."""
    model.zero_grad()
    found, passes = [], 0
    for together in plan_passes(model, groups, 0, size):
        whole, passes = GroupPass(model, together, 0, size, cut=True), passes + 1
        for part in whole.parts:
            rows = whole.row_log_probs(part)
            sum((row * torch.linspace(-1, 1.5, len(row))).sum() for row in rows).backward()
            found += [row.detach() for row in rows]
        whole.backward()
    return torch.cat(found), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), passes


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.filterwarnings("ignore:MptForCausalLM")
def test_groups_in_one_pass_get_the_numbers_of_each_alone(name):
    """Prompts of other lengths, within a window and beyond it."""
    model = build(name, SHARED[name])
    for lengths in ([(3, (1, 4)), (2, (2, 3, 1)), (1, (2,))], [(17, (1, 5)), (11, (4,))]):
        groups = draw_groups(lengths)
        log_probs, gradient, passes = log_probs_and_gradient(model, groups, 100)
        expected, of_each, _ = log_probs_and_gradient(model, groups, 1)
        assert torch.allclose(log_probs, expected, atol=1e-4)
        assert (gradient - of_each).norm() / of_each.norm() < 1e-5
        beyond = {"sliding_window", "window_size"} & {*SHARED[name]} and lengths[0][0] > 8
        assert passes == (len(groups) if name == "mpt" or beyond else 1)


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([(3, (1, 4)), (2, (2,)), (17, (1, 5)), (3, (2,)), (1, (3,))], [2, 1, 2]),
        ([(6, (1,)), (2, (5,)), (3, (2,))], [1, 2]),  # each fits into the window, but not the first beside the second
        ([(17, (1, 5)), (17, (4,)), (3, (2,))], [2, 1]),  # of one length, without padding
    ],
)
def test_a_group_that_outgrows_a_window_leaves_the_others_together(lengths, expected):
    model, groups = build("mistral", SHARED["mistral"]), draw_groups(lengths)
    assert model.config.sliding_window == 8
    assert [len(together) for together in plan_passes(model, groups, 0, 100)] == expected
    found, of_each = (log_probs_and_gradient(model, groups, size) for size in (100, 1))
    assert torch.allclose(found[0], of_each[0], atol=1e-4)
    assert (found[1] - of_each[1]).norm() / of_each[1].norm() < 1e-5


def test_a_model_that_mixes_groups_up_runs_each_in_a_pass_of_its_own_and_says_so_once():
    """MPT's positions are the columns of its cache, where padding counts."""
    model = build("mpt", SHARED["mpt"])
    with pytest.warns(UserWarning, match="every group takes a pass of its own, because several in one do") as warned:
        assert log_probs_and_gradient(model, draw_groups([(5, (2,)), (3, (2,))]), 9)[-1] == 2
        assert log_probs_and_gradient(model, draw_groups([(5, (2,)), (4, (2,))]), 9)[-1] == 2
    assert len(warned) == 1
    assert log_probs_and_gradient(model, draw_groups([(5, (2,)), (5, (2,))]), 9)[-1] == 1  # without padding


@pytest.mark.parametrize("name", FULL)
def test_what_cannot_be_shared_warns_once_and_gives_the_plain_log_probs(name, group):
    settings, reason = FULL[name]
    model = build(name, settings)
    with pytest.warns(UserWarning, match=f"sharing it does not work with this model: .*{reason}") as warned:
        assert_plain_numbers(model, *group)
        together, expected = (
            log_probs_and_gradient(model, draw_groups([(9, (1, 5)), (5, (4,))]), size) for size in (9, 1)
        )
    assert len(warned) == 1
    assert torch.allclose(together[0], expected[0], atol=1e-4) and together[-1] == 1
    assert (together[1] - expected[1]).norm() / expected[1].norm() < 1e-5
