"""A GGUF file becomes a directory with the same weights, tokens and end of turn; errors are one sentence."""

import json
import os
import stat
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from purld.cli import main
from purld.config.schema import Student
from purld.errors import PlainWarning, UserError
from purld.model.load import load_encoder, load_model
from purld.model.sample import Decoding, GenerateSampler
from purld.pipeline.import_gguf import import_gguf
from purld.records import Prompt

gguf = pytest.importorskip("gguf")

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = "On day 2024 the teacher's answer was 1234567 plus 89, naïve but right.\n\n  Ünïcode  too: 東京 ½ ²"
Q8 = gguf.GGMLQuantizationType.Q8_0
BLOCK_TENSORS = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip


@pytest.fixture(scope="module")
def original_tokenizer():
    """A byte-level BPE tokenizer that splits off single digits."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT, "user assistant question 12 123 1234 12 123 1234"] * 4, trainer)
    return tokenizer


def make_model(tokenizer, tied=True, **rope):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0} | rope,
    )
    return LlamaForCausalLM(config).eval()


def gguf_tensors(model):
    """Yield a model's weights by their names in a GGUF file, with the rows of queries and keys in llama.cpp's order."""
    weights, heads = model.state_dict(), {"attn_q": 4, "attn_k": 2}
    yield "token_embd.weight", weights["model.embed_tokens.weight"]
    yield "output_norm.weight", weights["model.norm.weight"]
    if not model.config.tie_word_embeddings:
        yield "output.weight", weights["lm_head.weight"]
    for layer in range(2):
        for name, original in BLOCK_TENSORS.items():
            weight = weights[f"model.layers.{layer}.{original}.weight"]
            if name in heads:
                weight = weight.view(heads[name], 2, -1, 32).swapaxes(1, 2).reshape(weight.shape)
            yield f"blk.{layer}.{name}.weight", weight


def write_gguf(
    path, model, tokenizer, *, architecture="llama", quantize=False, without=(), eos=0, extra=None, **strings
):
    writer = gguf.GGUFWriter(path, architecture)
    config = model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(2)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(strings.pop("pre", "smollm"))
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]])
    writer.add_eos_token_id(eos)
    writer.add_chat_template(TEMPLATE)
    for key, value in strings.items():
        writer.add_string(key.replace("__", "."), value)
    for name, weight in [*gguf_tensors(model), *(extra or {}).items()]:
        if name in without:
            continue
        if quantize and weight.ndim == 2:
            writer.add_tensor(name, gguf.quantize(weight.numpy(), Q8), raw_dtype=Q8)
        else:
            writer.add_tensor(name, weight.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def write(original_tokenizer, tmp_path):
    def write_file(model=None, name="tiny.gguf", **options):
        return write_gguf(tmp_path / name, model or make_model(original_tokenizer), original_tokenizer, **options)

    return write_file


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_equal_and_embeddings_stay_tied(original_tokenizer, write, tmp_path, tied):
    original = make_model(original_tokenizer, tied)
    out = import_gguf(write(original), tmp_path / "new" / "model")
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    for name, weight in original.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


def test_quantized_weights_are_dequantized(original_tokenizer, write, tmp_path):
    original = make_model(original_tokenizer)
    out = import_gguf(write(original, quantize=True), tmp_path / "model")
    weights = AutoModelForCausalLM.from_pretrained(out).state_dict()
    for name, weight in original.state_dict().items():
        expected = weight
        if weight.ndim == 2:
            expected = torch.tensor(gguf.dequantize(gguf.quantize(weight.numpy(), Q8), Q8))
        assert torch.equal(weights[name], expected), name


def test_bfloat16_is_what_the_directory_then_holds(write, tmp_path):
    out = import_gguf(write(), tmp_path / "model", "bfloat16")
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


def test_tokenizer_encodes_the_same(original_tokenizer, write, tmp_path):
    loaded = AutoTokenizer.from_pretrained(import_gguf(write(), tmp_path / "model"))
    for text in (TEXT, "<|im_start|>user\n7 days<|im_end|>\n", " 1000000"):
        ids = original_tokenizer.encode(text).ids
        assert loaded.encode(text, add_special_tokens=False) == ids
        assert loaded.decode(ids) == original_tokenizer.decode(ids, skip_special_tokens=False)
    assert len(loaded) == original_tokenizer.get_vocab_size()


@pytest.mark.parametrize(("eos", "ends"), [(0, [2, 0]), (2, 2)])
def test_end_of_turn_is_what_the_template_ends_an_answer_with(write, tmp_path, eos, ends):
    out = import_gguf(write(eos=eos), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.chat_template == TEMPLATE
    generation, config = (json.loads((out / f"{name}.json").read_text()) for name in ("generation_config", "config"))
    assert generation["eos_token_id"] == config["eos_token_id"] == ends
    assert "_from_model_config" not in generation
    assert "quantization_config" not in config


def test_directory_loads_as_a_student_and_generates(write, tmp_path):
    student = Student(model=str(import_gguf(write(quantize=True), tmp_path / "model")))
    encoder, model = load_encoder(student), load_model(student, student.model)
    assert encoder.end == 2
    prompt = encoder.encode_prompt(Prompt.from_text("question 12"))
    completions = GenerateSampler(encoder, Decoding(temperature=1.0, max_new_tokens=4))(model, [prompt], 3, seeds=[0])
    assert [len(group) for group in completions] == [3]


def test_every_file_is_synced_before_the_directory_has_its_name(write, tmp_path, monkeypatch):
    file, steps = write(), []
    sync, rename = os.fsync, os.replace

    def noted_sync(descriptor):
        steps.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        sync(descriptor)

    def noted_rename(source, target):
        steps.append((Path(source).name, Path(target).name))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "replace", noted_rename)
    out = import_gguf(file, tmp_path / "model")
    renamed = next(n for n, step in enumerate(steps) if step[1] == "model")
    partial = tmp_path / steps[renamed][0]
    assert {*steps[:renamed]} == {str(partial), *(str(partial / path.name) for path in out.iterdir())}
    assert steps[renamed + 1 :] == [str(tmp_path)]


def test_files_are_readable_and_nothing_else_is_left(write, tmp_path):
    file, out = write(), tmp_path / "model"
    out.mkdir()
    import_gguf(file, out)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()}
    assert modes == {stat.S_IMODE((out / "config.json").stat().st_mode)}
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.gguf", "model"}


def test_files_next_to_the_gguf_file_change_nothing(write, tmp_path):
    file = write(name="tiny.bin")
    (tmp_path / "chat_template.jinja").write_text("{{ 'other' }}")
    (tmp_path / "adapter_config.json").write_text("{}")
    out = import_gguf(file, tmp_path / "model")
    assert AutoTokenizer.from_pretrained(out).chat_template == TEMPLATE


def llama3_factors(tokenizer):
    rope = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    original = make_model(tokenizer, original_max_position_embeddings=8192, **rope)
    plain = make_model(tokenizer).model.rotary_emb.inv_freq
    return original, plain / original.model.rotary_emb.inv_freq


def test_rope_scaling_of_llama_3_is_restored(original_tokenizer, write, tmp_path):
    original, factors = llama3_factors(original_tokenizer)
    assert factors.max() > 1.5
    out = import_gguf(write(original, extra={"rope_freqs.weight": factors}), tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(out)
    ids = torch.arange(300)[None] % 300
    assert torch.allclose(loaded(ids).logits, original(ids).logits, atol=1e-4)


@pytest.mark.parametrize("kind", ["factors", "stated"])
def test_other_rope_scaling_is_refused(write, tmp_path, kind):
    other = {"extra": {"rope_freqs.weight": torch.tensor([1.0, 3.0, 2.0, 5.0])}}
    options = other if kind == "factors" else {"llama__rope__scaling__type": "yarn"}
    with pytest.raises(UserError, match="RoPE scaling"):
        import_gguf(write(**options), tmp_path / "model")


def test_unknown_way_to_split_text_is_a_warning(write, tmp_path):
    with pytest.warns(PlainWarning, match=r"tokenizer\.ggml\.pre is poro"):
        import_gguf(write(pre="poro"), tmp_path / "model")


def test_tokenizer_that_loads_as_another_one_is_a_warning(write, tmp_path):
    biases = {f"blk.{b}.attn_{k}.bias": torch.zeros(32 if k == "q" else 16) for b in range(2) for k in "qkv"}
    with pytest.warns(PlainWarning, match="in another way than the file"):
        import_gguf(write(architecture="qwen2", pre="gpt-2", extra=biases), tmp_path / "model")


@pytest.mark.filterwarnings("error::purld.errors.PlainWarning")
@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe"])
def test_known_ways_to_split_text_are_no_warning(write, tmp_path, pre):
    import_gguf(write(pre=pre), tmp_path / "model")


def cut(file):
    file.write_bytes(file.read_bytes()[:-2000])
    return file


def cut_header(file):
    file.write_bytes(file.read_bytes()[:60])
    return file


def text(file):
    file.write_text("No model.")
    return file


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda write: write().with_name("absent.gguf"), "there is no such file"),
        (lambda write: text(write()), "is not a GGUF file"),
        (lambda write: cut(write()), "is truncated or damaged"),
        (lambda write: cut_header(write()), "is truncated or damaged"),
        (lambda write: write(architecture="rwkv9"), "architecture rwkv9 is not supported"),
        (lambda write: write(architecture="t5"), "is not a causal LM"),
        (
            lambda write: write(without=["blk.1.ffn_up.weight"]),
            "weights are missing (1, the first is model.layers.1.mlp.up",
        ),
    ],
)
def test_what_cannot_be_read_is_one_sentence(write, tmp_path, monkeypatch, capsys, make, message):
    file = make(write)
    error = run_command(monkeypatch, capsys, file, tmp_path / "model")
    assert error.startswith(f"purld: {file}: ")
    assert message in error
    assert not [path for path in tmp_path.iterdir() if path != file and path.name != "tiny.gguf"]


def test_directory_that_is_not_empty_is_left_alone(write, tmp_path, monkeypatch, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").write_text("mine")
    error = run_command(monkeypatch, capsys, write(), tmp_path / "model")
    assert "exists and is not an empty directory" in error
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["mine"]


def test_missing_package_is_named(write, tmp_path, monkeypatch, capsys):
    file = write()
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "install purld[gguf]" in run_command(monkeypatch, capsys, file, tmp_path / "model")


def test_unknown_dtype_is_refused(write, tmp_path, monkeypatch, capsys):
    assert "float32 or bfloat16" in run_command(monkeypatch, capsys, write(), tmp_path / "model", "--dtype", "int8")


def test_the_command_prints_the_directory(write, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["purld", "import-gguf", str(write()), str(tmp_path / "model")])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    assert capsys.readouterr().out == f"{tmp_path / 'model'}\n"


def run_command(monkeypatch, capsys, *arguments):
    """Return the only line on stderr of a command that fails."""
    monkeypatch.setattr(sys, "argv", ["purld", "import-gguf", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]
