"""Draws: from the policy and nothing else, seeded by content, cut at the turn's end."""

import warnings

import pytest
import torch
from log_prob_sums import sequence_log_probs
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from purld.errors import PlainWarning
from purld.model import sample
from purld.model.encode import Encoder
from purld.model.sample import Decoding, GenerateSampler, generate_completions, seed_from_content
from purld.model.vision import EncodedPrompt
from purld.records import Prompt

real = sample._prefill_cache


@pytest.fixture(scope="module")
def model(random_student):
    return AutoModelForCausalLM.from_pretrained(random_student).eval()


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return Encoder(tokenizer, max_anchor_tokens=64)


@pytest.fixture(scope="module")
def encoded_prompts(encoder):
    return [
        encoder.encode_prompt(Prompt.from_text(t)) for t in ("How many?", "Tell me about the fox. Use the word drum.")
    ]


def test_same_seed_same_draws_whatever_came_before(model, encoder, encoded_prompts):
    sampler = GenerateSampler(encoder, Decoding(1.0, 12))
    first = sampler(model, encoded_prompts, 3, seeds=[5, 5])
    state = torch.random.get_rng_state()
    torch.rand(7)
    assert sampler(model, encoded_prompts, 3, seeds=[5, 5]) == first
    assert sampler(model, encoded_prompts, 3, seeds=[6, 6]) != first
    torch.random.set_rng_state(state)
    sampler(model, encoded_prompts, 3, seeds=[7, 7])
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_prompts_draws_depend_on_its_own_seed_alone(model, encoder, encoded_prompts):
    """Whatever is drawn beside them, however many, up to whatever length: so they are the same on every process."""
    sampler = GenerateSampler(encoder, Decoding(1.0, 12, top_p=0.9))
    both = sampler(model, encoded_prompts, 3, seeds=[5, 6])
    assert sampler(model, encoded_prompts[::-1], 3, seeds=[6, 5]) == both[::-1]
    assert [*sampler(model, encoded_prompts[:1], 4, seeds=[5])[0][:3]] == both[0]
    (shorter,) = GenerateSampler(encoder, Decoding(1.0, 5, top_p=0.9))(model, encoded_prompts[1:], 2, seeds=[6])
    assert [c.ids for c in shorter] == [c.ids[:5] for c in both[1][:2]]
    with pytest.raises(ValueError, match="2 prompts need as many seeds, not 1"):
        sampler(model, encoded_prompts, 3, seeds=[5])


def test_shape_and_limit(model, encoder, encoded_prompts):
    groups = GenerateSampler(encoder, Decoding(1.0, 12))(model, encoded_prompts, 3, seeds=[0, 0])
    assert [len(group) for group in groups] == [3, 3]
    for completion in groups[0] + groups[1]:
        assert 1 <= len(completion.ids) <= 12
        assert completion.finished == (completion.ids[-1] == encoder.end)
        assert encoder.end not in completion.ids[:-1]


def test_greedy_takes_the_likeliest_token_despite_the_models_own_defaults(model, encoder, encoded_prompts):
    """The random student's generation_config asks for a repetition penalty; draws must not see it."""
    (greedy,), _ = GenerateSampler(encoder, Decoding(0.0, 12))(model, encoded_prompts, 1, seeds=[0, 0])
    ids = list(encoded_prompts[0].ids)
    for token in greedy.ids:
        with torch.no_grad():
            assert model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item() == token
        ids.append(token)
    assert model.generation_config.repetition_penalty == 1.5


@pytest.fixture(params=["full attention", "sliding window"])
def sharing_model(request, model, encoder):
    if request.param == "full attention":
        return model
    torch.manual_seed(2)
    return MistralForCausalLM(
        MistralConfig(
            vocab_size=len(encoder.tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            sliding_window=8,
            initializer_range=0.2,
        )
    ).eval()


def test_a_shared_prefill_draws_what_a_repeated_one_draws(sharing_model, encoder, encoded_prompts, monkeypatch):
    sampler = GenerateSampler(encoder, Decoding(1.0, 12))
    prefilled = []
    monkeypatch.setattr(sample, "_prefill_cache", lambda *a: prefilled.append(a[3].shape) or real(*a))
    shared = sampler(sharing_model, encoded_prompts, 3, seeds=[5, 5])
    assert prefilled == [(2, max(map(len, encoded_prompts)) - 1)]
    monkeypatch.setattr(sample, "can_share_prefix", lambda *_: False)
    assert sampler(sharing_model, encoded_prompts, 3, seeds=[5, 5]) == shared


def test_a_common_prefix_is_prefilled_once_for_replies_of_any_length(
    sharing_model, encoder, encoded_prompts, monkeypatch
):
    greedy = Decoding(0.0, 10)
    first, encoded = encoded_prompts
    tails = [first, EncodedPrompt(first.ids[:3]), EncodedPrompt(encoded.ids[:7])]
    shared = generate_completions(sharing_model, encoder, tails, 1, greedy, encoded)
    assert shared == generate_completions(
        sharing_model, encoder, [encoded.followed_by(tail.ids) for tail in tails], 1, greedy
    )
    monkeypatch.setattr(sample, "can_share_prefix", lambda *_: False)
    assert generate_completions(sharing_model, encoder, tails, 1, greedy, encoded) == shared


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.0, 0.5)])
def test_frequencies_are_the_policys_probabilities(temperature, top_p, model, encoder, encoded_prompts):
    """2,000 one-token draws against exact probabilities: within four standard errors for the five likeliest."""
    decoding = Decoding(temperature, 1, top_p)
    groups = GenerateSampler(encoder, decoding)(model, encoded_prompts[:1], 2000, seeds=[1])
    drawn = [c.ids[0] for c in groups[0]]
    with torch.no_grad():
        log_probs = sequence_log_probs(model, encoded_prompts[0], [[t] for t in range(len(encoder.tokenizer))], pad=0)
    ranked, tokens = (log_probs / temperature).softmax(-1).sort(descending=True)
    ranked[ranked.cumsum(-1) - ranked >= top_p] = 0.0  # the smallest set of likeliest tokens that reaches top_p
    for token, p in zip(tokens[:5].tolist(), (ranked / ranked.sum())[:5].tolist()):
        assert abs(drawn.count(token) / 2000 - p) < 4 * (p * (1 - p) / 2000) ** 0.5 or drawn.count(token) == p == 0
    assert not set(drawn) & set(tokens[ranked == 0].tolist())


def test_seed_from_content():
    assert seed_from_content("a", 1) == seed_from_content("a", 1)
    assert seed_from_content("a", 1) != seed_from_content("a", 2)


def test_a_cache_that_cannot_be_repeated_is_told_once_and_done_without(random_student, encoder, monkeypatch):
    """Another version of transformers may keep keys and values in another way."""
    model = AutoModelForCausalLM.from_pretrained(random_student).eval()  # a new one: the refusal is kept with it
    prompts = [EncodedPrompt(encoder.encode_literal("How many legs has a spider?"))]
    sampler = GenerateSampler(encoder, Decoding(1.0, 4))
    expected = sampler(model, prompts, 2, seeds=[1])

    def fails(*_):
        raise AttributeError("no attribute 'keys'")

    monkeypatch.setattr("purld.model.sample.repeat_with_capacity", fails)
    with pytest.warns(PlainWarning, match="does not work with this model: no attribute 'keys'"):
        assert sampler(model, prompts, 2, seeds=[1]) == expected
    with warnings.catch_warnings():
        warnings.simplefilter("error", PlainWarning)
        assert sampler(model, prompts, 2, seeds=[1]) == expected
