"""The arithmetic of memory, against what autograd keeps for an update on the CPU."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from saved_bytes import counting_saved_bytes
from transformers import AutoConfig, AutoModelForCausalLM

from purld.model.memory import FIT, DecoderShape, UpdateSizes, estimate_memory, largest_micro_batch
from purld.model.prefix import SharedPrefixes
from purld.model.quantize import NF4_BYTES
from purld.model.vision import EncodedPrompt

SIZES = {
    "vocab_size": 120,
    "hidden_size": 96,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
P, C, K = 70, 50, 4


def estimate(shape, recompute, micro_batch=K, **changes):
    sizes = UpdateSizes(**({"prompt": P, "answer": C, "members": K, "drawn": 2 * K} | changes))
    return estimate_memory(shape, sizes, 10_000, 1_000, micro_batch, recompute, width=4)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("family", "lora"), [("llama", 0), ("llama", 8), ("qwen2", 0), ("qwen3", 0), ("mistral", 8)])
def test_what_is_kept_is_what_was_calculated(family, lora, recompute):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES)).eval()
    shape = DecoderShape.of(model.config)
    if lora:
        model = get_peft_model(model, LoraConfig(r=lora, target_modules="all-linear"))
    assert (shape.queries, shape.keys, shape.layers) == (96, 32, 3)
    with counting_saved_bytes(*model.parameters()) as kept:
        prefix = SharedPrefixes(model, [EncodedPrompt([3] * P)], 0, cut=True, recompute=recompute)
        of_prompt = kept()
    cache = [t for layer in prefix._layers for t in (layer.keys, layer.values)]
    with counting_saved_bytes(*model.parameters(), *cache) as kept:
        prefix.token_log_probs([[3] * C] * K)
        of_answers = kept()
    need, whole = estimate(shape, recompute), estimate(shape, False)
    held = sum(tensor.nbytes for tensor in cache)  # with a cut their gradients come later, as many bytes again
    answers, prompt = need.activations, need.cache - 2 * held
    if recompute:  # the contents of one layer at a time are in the estimate, and not kept
        answers -= (whole.activations - shape.ends_bytes(K * C, 4)) // shape.layers
        prompt -= shape.layer_bytes(P, 4)
    assert 0.8 * answers <= of_answers <= 1.1 * answers
    assert 0.65 * prompt <= of_prompt <= 1.1 * prompt  # three layers: what is beside them counts much here


def test_in_half_precision_a_copy_of_the_trained_weights_is_kept():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES)).eval()
    trained, shape = sum(p.numel() for p in model.parameters()), DecoderShape.of(model.config)
    with counting_saved_bytes(*model.parameters()) as kept, torch.autocast("cpu", torch.bfloat16):
        prefix = SharedPrefixes(model, [EncodedPrompt([3, 3])], 0, cut=True)  # whose activations are next to nothing
        of_prompt = kept()
    held = sum(tensor.nbytes for layer in prefix._layers for tensor in (layer.keys, layer.values))
    sizes = UpdateSizes(prompt=2, answer=C, members=K, drawn=0)
    half, single = (estimate_memory(shape, sizes, 0, trained, K, False, width) for width in (2, 4))
    copies = half.training - single.training
    assert 0.8 * copies <= of_prompt - (half.cache - 2 * held) <= 1.1 * copies


def test_seven_billion_weights_with_an_adapter():
    """Qwen2.5-7B in bfloat16, LoRA r=16, prompts of 512 and answers of 1,024 tokens, in GiB."""
    shape = DecoderShape(28, 3584, 28 * 128, 4 * 128, 18944, 152064)
    weights, trained = 7_615_616_512, 40_370_176

    def need(micro_batch, recompute):
        sizes = UpdateSizes(512, 1024, 8, 64)
        return estimate_memory(shape, sizes, 2 * weights + 4 * trained, trained, micro_batch, recompute, width=2)

    gib = {(m, r): need(m, r).total / 2**30 for m in (1, 4, 8) for r in (False, True)}
    assert [round(gib[m, False]) for m in (1, 4, 8)] == pytest.approx([25, 46, 74], rel=0.08)  # as measured by hand
    assert all(gib[m, True] < 24 for m in (1, 4, 8))
    assert largest_micro_batch(lambda m: need(m, True), 24 * 2**30, 8) == 8
    assert largest_micro_batch(lambda m: need(m, False), 48 * 2**30, 8) == 2
    assert largest_micro_batch(lambda m: need(m, True), 16 * 2**30, 8) is None


def test_of_several_experts_a_token_runs_through_a_few():
    config = AutoConfig.for_model("qwen3_moe", **(SIZES | EXPERTS))
    assert DecoderShape.of(config).intermediate == 2 * 64


def test_sampling_may_need_more_than_the_update():
    shape = DecoderShape(2, 32, 32, 32, 64, 100)
    need = estimate(shape, True, drawn=1000)
    assert need.total == need.weights + need.training + need.sampling
    assert need.sampling == 1000 * (P + C) * 2 * 2 * 32 * 4


def test_a_model_without_attention_and_one_whose_layers_differ_have_a_shape_too():
    state_space = DecoderShape.of(AutoConfig.for_model("mamba", hidden_size=64, num_hidden_layers=2, vocab_size=100))
    assert (state_space.queries, state_space.keys, state_space.intermediate) == (64, 64, 128)
    layers = SimpleNamespace(**SIZES | {"intermediate_size": [128, 256]})
    layers.get_text_config = lambda: layers
    assert DecoderShape.of(layers).intermediate == 256


DECODERS = (  # family, vocabulary, hidden, intermediate, layers, heads, key heads, whether the embeddings are tied
    ("llama", 128256, 2048, 8192, 16, 32, 8, True),
    ("qwen2", 151936, 2048, 11008, 36, 16, 2, True),
    ("qwen2", 152064, 3584, 18944, 28, 28, 4, False),
)


def test_the_table_of_cards_in_the_docs_is_this_arithmetic():
    page = Path(__file__).parents[2].joinpath("docs/scaling.md").read_text(encoding="utf-8")
    rows = iter(re.findall(r"(?m)^\| .*\| (?:all weights|LoRA .*) \| ([\d.]+ \| [\d.]+ / .*) \|$", page))
    for family, vocabulary, hidden, inner, layers, heads, key_heads, tied in DECODERS:
        width, embeddings = hidden // heads, vocabulary * hidden * (1 if tied else 2)
        shapes = [(hidden, heads * width), (heads * width, hidden), *[(hidden, key_heads * width)] * 2]
        shapes += [(hidden, inner), (hidden, inner), (inner, hidden)]
        linear = layers * sum(ins * outs for ins, outs in shapes)
        biases = layers * (heads + 2 * key_heads) * width if family == "qwen2" else 0
        count = linear + embeddings + biases + (2 * layers + 1) * hidden
        adapter = layers * 16 * sum(map(sum, shapes))
        shape = DecoderShape(layers, hidden, heads * width, key_heads * width, inner, vocabulary)
        quantized = int(NF4_BYTES * linear) + 2 * (count - linear)
        for frozen, trained in ((4 * count, count), (2 * count, adapter), (quantized, adapter)):
            assert next(rows).split(" | ") == card_row(shape, frozen + 4 * trained, trained)
    assert next(rows, None) is None


def card_row(shape, weights, trained):
    """Weights and optimiser, then for either length of answers the two peaks, and what each card does."""
    cells = []
    for answer in (256, 1024):
        sizes = UpdateSizes(prompt=512, answer=answer, members=8, drawn=64, groups=8)
        kept, again = (estimate_memory(shape, sizes, weights, trained, 8, recompute, 2) for recompute in (False, True))
        cells += [] if cells else [f"{(kept.weights + kept.training) / 2**30:.1f}"]
        cells.append(f"{kept.total / 2**30:.1f} / {again.total / 2**30:.1f}")
        for card in (24, 48, 80):
            room = FIT * card * 2**30
            cells.append("kept" if kept.total <= room else "again" if again.total <= room else "no")
    return cells
