"""Adapters that are merged while a model draws: the same numbers from fewer layers, and weights that come back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from purld.errors import PlainWarning
from purld.model.encode import Encoder
from purld.model.memory import FIT
from purld.model.merged_layers import merged_layers
from purld.model.sample import Decoding, GenerateSampler
from purld.records import Prompt

IDS = torch.tensor([[5, 9, 2, 7], [1, 1, 8, 3]])


def make_policy(
    targets: list[str], dtype: torch.dtype = torch.float32, vocabulary: int = 40, **settings: Any
) -> PeftModel:
    """Return a small Llama, LM head and embeddings shared, with an adapter that changes what it says."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    policy = get_peft_model(
        LlamaForCausalLM(config).to(dtype).eval(), LoraConfig(r=4, target_modules=targets, **settings)
    )
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=2.0)
    return policy


@torch.no_grad()
def logits_of(policy: PeftModel) -> Tensor:
    return policy(input_ids=IDS).logits


def calls_of_adapters(policy: PeftModel, work: Callable[[], object]) -> int:
    """Return how often `work` runs the first factor of an adapter."""
    calls: list[nn.Module] = []
    factors = [a for m in policy.modules() if isinstance(m, Linear) for a in m.lora_A.values()]
    handles = [a.register_forward_hook(lambda module, *_: calls.append(module)) for a in factors]
    work()
    for handle in handles:
        handle.remove()
    return len(calls)


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["lm_head", "v_proj"]])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_a_merged_model_says_the_same_without_its_adapters(targets: list[str], dtype: torch.dtype, tolerance: float):
    policy = make_policy(targets, dtype)
    own = {name: (weight, weight.detach().clone()) for name, weight in policy.named_parameters(remove_duplicate=False)}
    before = logits_of(policy)
    with policy.disable_adapter():
        effect = (logits_of(policy) - before).abs().max()
    assert calls_of_adapters(policy, lambda: logits_of(policy)) > 0
    with merged_layers(policy):
        assert (logits_of(policy) - before).abs().max() < tolerance * effect
        assert calls_of_adapters(policy, lambda: logits_of(policy)) == 0
    for name, weight in policy.named_parameters(remove_duplicate=False):
        assert weight is own[name][0] and torch.equal(weight, own[name][1])
    assert torch.equal(logits_of(policy), before)


def test_weights_come_back_after_an_error():
    policy = make_policy(["q_proj"])
    before = logits_of(policy)
    with pytest.raises(KeyError), merged_layers(policy):
        raise KeyError
    assert torch.equal(logits_of(policy), before) and calls_of_adapters(policy, lambda: logits_of(policy)) == 2


def test_adapters_that_are_off_stay_off():
    policy = make_policy(["q_proj", "up_proj"])
    with policy.disable_adapter():
        p_sft = logits_of(policy)
        with merged_layers(policy):
            assert torch.equal(logits_of(policy), p_sft)


def test_other_forms_of_adapters_are_left_beside_their_layers():
    policy = make_policy(["q_proj"], use_dora=True)
    before = logits_of(policy)
    with merged_layers(policy):
        assert torch.equal(logits_of(policy), before) and calls_of_adapters(policy, lambda: logits_of(policy)) > 0


@pytest.mark.parametrize("copies", [2.0, 1.9], ids=["room", "none"])
def test_a_sampler_on_a_gpu_with_room_draws_the_same_without_the_adapters(
    monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerBase, copies: float
):
    policy, encoder = make_policy(["q_proj", "up_proj"], vocabulary=len(tokenizer)), Encoder(tokenizer, 64)
    sampler = GenerateSampler(encoder, Decoding(1.0, 6))
    prompts = [encoder.encode_prompt(Prompt.from_text(text)) for text in ("How many?", "Tell me about the fox.")]
    drawn: list[object] = []

    def draw() -> None:
        drawn.append(sampler(policy, prompts, 3, seeds=[1, 2]))

    draw()  # checks whether the prompts can be shared, which runs the adapters too
    beside = calls_of_adapters(policy, draw)
    copied = sum(layer.base_layer.weight.nbytes for layer in policy.modules() if isinstance(layer, Linear))
    monkeypatch.setattr("purld.model.merged_layers.model_device", lambda _: torch.device("cuda"))
    held = sum(weight.nbytes for weight in policy.parameters())
    monkeypatch.setattr("purld.model.merged_layers.device_memory", lambda: (held + copies * copied) / FIT)
    assert beside > 0 and calls_of_adapters(policy, draw) == (0 if copies == 2 else beside)
    assert drawn[0] == drawn[1] == drawn[2]
    assert sampler(policy, [], 3, seeds=[]) == []  # as a process without a prompt of its own draws


@pytest.mark.filterwarnings("default::purld.errors.PlainWarning")
@pytest.mark.parametrize("where", ["merging", "drawing"])
def test_without_memory_for_the_copy_it_goes_first_and_for_good(
    monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerBase, where: str
):
    policy, encoder = make_policy(["q_proj", "k_proj"], vocabulary=len(tokenizer)), Encoder(tokenizer, 64)
    prompts = [encoder.encode_prompt(Prompt.from_text(text)) for text in ("How many?", "Tell me about the fox.")]
    expected = GenerateSampler(encoder, Decoding(1.0, 6))(policy, prompts, 3, seeds=[1, 2])
    layers = [layer for layer in policy.modules() if isinstance(layer, Linear)]
    merge, generate, tried = Linear.get_delta_weight, type(policy).generate, []

    def merge_two(layer: Linear, name: str) -> Tensor:
        tried.append(layer)
        if where == "merging" and len(tried) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return merge(layer, name)

    def draw_unmerged(model: PeftModel, *arguments: Any, **named: Any) -> Any:
        if where == "drawing" and any(layer.merged for layer in layers):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return generate(model, *arguments, **named)

    monkeypatch.setattr(Linear, "get_delta_weight", merge_two)
    monkeypatch.setattr(type(policy), "generate", draw_unmerged)
    monkeypatch.setattr("purld.model.sample.has_room_to_merge", lambda _: True)
    sampler = GenerateSampler(encoder, Decoding(1.0, 6))
    with pytest.warns(PlainWarning, match="drawn with the adapters beside the weights"):
        assert sampler(policy, prompts, 3, seeds=[1, 2]) == expected
    attempts = len(tried)
    assert attempts > 2 and sampler(policy, prompts, 3, seeds=[1, 2]) == expected and len(tried) == attempts


def test_all_active_adapters_are_merged_and_other_layers_keep_theirs():
    """As Stage II's beside Stage I's; an embedding's adapter stays beside it."""
    policy = make_policy(["q_proj", "embed_tokens"])
    policy.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    policy.base_model.set_adapter(["default", "second"])
    for name, weight in policy.named_parameters():
        if "lora_B.second" in name or "lora_embedding_B" in name:
            nn.init.normal_(weight, std=2.0)
    before = logits_of(policy)
    with merged_layers(policy):
        torch.testing.assert_close(logits_of(policy), before, rtol=1e-3, atol=1e-4)
        assert calls_of_adapters(policy, lambda: logits_of(policy)) == 0
    assert torch.equal(logits_of(policy), before)
