"""Logits of given hidden states: what is around a model (hooks, compilation, sharding) stays in force and in place."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import distributed
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM

from purld.model.body_and_head import BodyAndHead
from purld.model.prefix import FullSequences, SharedPrefixes
from purld.model.self_check import can_share_prefix
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
    "tie_word_embeddings": False,
}
PROMPT = EncodedPrompt(list(range(3, 20)))
COMPLETIONS = [[5, 6, 7, 8], [9, 8], [7, 6, 5]]


@pytest.fixture
def model():
    torch.manual_seed(1)
    config = AutoConfig.for_model("gemma2", **SIZES, sliding_window=8, final_logit_softcapping=2.0)
    return AutoModelForCausalLM.from_config(config).eval()


def shared_log_probs(model):
    return SharedPrefixes(model, [PROMPT], 0).token_log_probs(COMPLETIONS)[0]


def plain_log_probs(model):
    return FullSequences(model, [PROMPT], 0).token_log_probs(COMPLETIONS)[0]


def gradient(model, log_probs):
    model.zero_grad()
    log_probs.sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.cat([getattr(g, "full_tensor", lambda g=g: g)().flatten() for g in grads])


def assert_alike(model):
    plain, shared = plain_log_probs(model), shared_log_probs(model)
    assert torch.allclose(shared, plain, atol=1e-4)
    expected, actual = gradient(model, plain), gradient(model, shared)
    assert (actual - expected).norm() / expected.norm() < 1e-5


def test_hooks_on_the_body_run_once_per_pass_and_hooks_on_the_model_with_the_logits(model):
    lengths, widths = [], []
    model.model.register_forward_hook(lambda _, __, output: lengths.append(output.last_hidden_state.shape[1]))
    model.register_forward_pre_hook(lambda *_: widths.append("before"))
    model.register_forward_hook(lambda _, __, output: widths.append(output.logits.shape[-1]))
    with torch.no_grad():
        shared_log_probs(model)
    assert lengths == [len(PROMPT), 3]
    assert widths == ["before", 120]


def test_hooks_that_change_what_the_body_and_the_model_return_are_applied_once(model):
    """As when hidden states are steered and logits are biased."""
    plain = plain_log_probs(model).detach()

    def steer(_, __, output):
        output.last_hidden_state = output.last_hidden_state + torch.linspace(-1, 1, 32)
        return output

    def bias(_, __, output):
        output.logits = output.logits + torch.linspace(-1, 1, 120)
        return output

    model.model.register_forward_hook(steer)
    model.register_forward_hook(bias)
    assert_alike(model)
    assert not torch.allclose(plain_log_probs(model), plain, atol=1e-2)


def test_the_body_is_in_its_place_after_an_exception(model):
    parts, body = BodyAndHead(model), model.model
    output = parts.hidden_states(torch.tensor([PROMPT.ids]))
    handle = model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        parts.logits(output, output.last_hidden_state[0])
    handle.remove()
    assert model.model is body
    assert list(model._modules) == ["model", "lm_head"]
    assert_alike(model)


def test_a_forward_that_a_wrapper_has_replaced_is_used_and_stays(model):
    """As mixed precision and device maps do it."""
    calls = []
    for name, module in (("body", model.model), ("model", model)):
        module.forward = lambda *args, own=module.forward, name=name, **kwargs: (
            calls.append(name) or own(*args, **kwargs)
        )
    replaced = model.model.forward, model.forward
    with torch.no_grad():
        shared_log_probs(model)
    assert calls == ["body", "body", "model"]
    assert (model.model.forward, model.forward) == replaced


@pytest.mark.parametrize("where", ["around the model", "around adapters", "in the model", "in a layer"])
def test_a_compiled_model_gives_the_same_numbers(model, where):
    plain = plain_log_probs(model)
    expected = gradient(model, plain)
    if where == "around adapters":
        compiled = torch.compile(get_peft_model(model, LoraConfig()), backend="eager")
    elif where == "around the model":
        compiled = torch.compile(model, backend="eager")
    else:
        (model if where == "in the model" else model.model.layers[1]).compile(backend="eager")
        compiled = model
    shared = shared_log_probs(compiled)
    assert torch.allclose(shared, plain, atol=1e-4)
    if where != "around adapters":
        actual = gradient(compiled, shared)
        assert (actual - expected).norm() / expected.norm() < 1e-5


def test_logits_do_not_compile_a_compiled_model_again(model):
    compiled_frames = []
    model.compile(backend=lambda graph, _: compiled_frames.append(graph) or graph.forward)
    parts, ids = BodyAndHead(model), torch.tensor([PROMPT.ids])
    with torch.no_grad():
        model(input_ids=ids)
        assert compiled_frames
        compiled_frames.clear()
        output = parts.hidden_states(ids)
        parts.logits(output, output.last_hidden_state[0])
    assert not compiled_frames


@pytest.fixture
def process_group(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("adapters", [False, True])
def test_hooks_that_gather_sharded_weights_gather_those_of_the_body_and_of_the_head(model, adapters, process_group):
    plain = plain_log_probs(model).detach()
    if adapters:
        model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    inner = model.get_base_model() if adapters else model
    for module in (*inner.model.layers, inner.model, inner):
        fully_shard(module)
    assert can_share_prefix(model, PROMPT, COMPLETIONS, 0)
    assert torch.allclose(shared_log_probs(model), plain, atol=1e-4)
    assert_alike(model)
