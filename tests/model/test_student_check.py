"""Every fault of a student that its files show is one sentence, before anything is paid for; whole students pass."""

import ast
import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_vlm import write_model
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MambaConfig, Qwen3MoeConfig

import purld
from purld.config.schema import Lora, Student
from purld.errors import UserError
from purld.model.load import load_encoder, load_model
from purld.model.student_check import check_stored_weights, check_student
from purld.model.weights import weight_files

WEIGHTS = "model.safetensors"


def edit_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_weights(folder, change):
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def write_shards(folder, keep=2):
    """Split the weights into two files and an index, of which only `keep` are written."""
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(weights)
    files = {f"model-0000{n + 1}-of-00002.safetensors": names[n::2] for n in range(2)}
    for file, held in list(files.items())[:keep]:
        save_file({name: weights[name] for name in held}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, held in files.items() for name in held}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def pickle_weights(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


def add_token(folder):
    """Add a token that has no embedding to the tokenizer."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    last = tokenizer["added_tokens"][-1]
    highest = max([*tokenizer["model"]["vocab"].values(), *(token["id"] for token in tokenizer["added_tokens"])])
    tokenizer["added_tokens"].append(last | {"id": highest + 1, "content": "<|user|>", "special": True})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def needs_code(folder):
    edit_json(folder / "config.json", model_type="mine", auto_map={"AutoConfig": "mine.C", "AutoModel": "mine.M"})
    (folder / "mine.py").write_text(f"open({str(folder / 'executed')!r}, 'w')\n")


def set_nan(weights):
    weights["model.norm.weight"][3] = float("nan")


BROKEN = {
    "weights are missing": (
        lambda f: edit_weights(f, lambda w: (w.pop("model.embed_tokens.weight"), w.pop("model.norm.weight"))),
        "lack 3 weights .such as lm_head.weight",
    ),
    "weights are left over": (
        lambda f: edit_weights(f, lambda w: w.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)})),
        r"hold the weights model\.layers\.0\.self_attn\.q_norm\.weight that a qwen2 model",
    ),
    "another shape": (
        lambda f: edit_weights(f, lambda w: w.update({"model.norm.weight": torch.ones(3)})),
        r"model\.norm\.weight have the shape \[3\] in the files, and \[32\]",
    ),
    "a type without biases": (
        lambda f: edit_json(f / "config.json", model_type="llama"),
        r"a llama model .*model_type",
    ),
    "another family": (lambda f: edit_json(f / "config.json", model_type="gpt2"), "are of different models"),
    "fewer layers": (
        lambda f: edit_json(f / "config.json", num_hidden_layers=1, layer_types=["full_attention"]),
        "the number of layers",
    ),
    "cut off": (lambda f: cut(f / WEIGHTS), r"model\.safetensors is truncated or damaged"),
    "empty": (lambda f: (f / WEIGHTS).write_bytes(b""), r"model\.safetensors is truncated or damaged"),
    "a pointer": (lambda f: (f / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), r"holds no weights"),
    "a shard is gone": (lambda f: write_shards(f, keep=1), "1 of its 2 weight files are missing"),
    "a broken index": (
        lambda f: (write_shards(f), (f / f"{WEIGHTS}.index.json").write_text("{")),
        "not a readable index",
    ),
    "a pickle is cut": (
        lambda f: (pickle_weights(f), cut(f / "pytorch_model.bin")),
        r"pytorch_model\.bin is truncated",
    ),
    "no tokenizer": (lambda f: [file.unlink() for file in f.glob("tokenizer*")], "holds no tokenizer"),
    "neither tokenizer nor template": (
        lambda f: [file.unlink() for file in (*f.glob("tokenizer*"), f / "chat_template.jinja")],
        "holds no tokenizer",
    ),
    "a broken tokenizer": (lambda f: cut(f / "tokenizer.json"), "cannot be loaded"),
    "more tokens than embeddings": (add_token, r"1 beyond them, such as <\|user\|>"),
    "code of its own": (needs_code, "Python code of its own, which purld never runs"),
    "quantized": (
        lambda f: edit_json(
            f / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}
        ),
        "are quantized",
    ),
    "not finite": (lambda f: edit_weights(f, set_nan), r"model\.norm\.weight are not finite"),
}


@pytest.fixture
def folder(random_student, tmp_path):
    return shutil.copytree(random_student, tmp_path / "student")


def check(folder, lora=None):
    student = Student(model=str(folder), lora=lora)
    sizes = check_student(student, load_encoder(student))
    check_stored_weights(student)
    return sizes


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_student_is_one_sentence(fault, folder, monkeypatch):
    break_it, words = BROKEN[fault]
    break_it(folder)
    monkeypatch.setattr("builtins.input", lambda _: "yes")
    with pytest.raises(UserError, match=words) as stopped:
        check(folder)
    assert str(stopped.value).startswith(("student.model: ", str(folder)))
    assert "\n" not in str(stopped.value)
    assert not (folder / "executed").exists()


@pytest.mark.parametrize("fault", ["weights are missing", "a type without biases", "cut off", "not finite"])
def test_loading_refuses_what_the_check_refuses(fault, folder):
    break_it, words = BROKEN[fault]
    break_it(folder)
    with pytest.raises(UserError, match=words):
        load_model(Student(model=str(folder)), folder)


def add_unused(folder):
    """Add tensors that files of published models hold and no forward pass reads."""
    unused = ("model.layers.0.self_attn.rotary_emb.inv_freq", "mtp.layers.0.norm.weight", "v_head.summary.weight")
    edit_weights(folder, lambda w: w.update({name: torch.ones(4) for name in unused}))


def store_tied_head(folder):
    edit_weights(folder, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))


@pytest.mark.parametrize("change", [add_unused, store_tied_head, write_shards, pickle_weights, lambda folder: None])
def test_a_whole_student_passes(change, folder):
    change(folder)
    sizes = check(folder)
    assert sizes.weights == sizes.trained == sum(p.numel() for p in load_model_parameters(folder))


def load_model_parameters(folder):
    return load_model(Student(model=str(folder)), folder).parameters()


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
OTHERS = {
    "llama": lambda n: LlamaConfig(vocab_size=n, **SMALL),
    "gpt2": lambda n: GPT2Config(vocab_size=n, n_embd=32, n_layer=1, n_head=4),
    "mamba": lambda n: MambaConfig(vocab_size=n, hidden_size=32, num_hidden_layers=1, state_size=4),
    "experts": lambda n: Qwen3MoeConfig(
        vocab_size=n, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, head_dim=8, **SMALL
    ),
}


@pytest.fixture(params=OTHERS)
def other(request, tokenizer, tmp_path):
    AutoModelForCausalLM.from_config(OTHERS[request.param](len(tokenizer))).save_pretrained(tmp_path / request.param)
    tokenizer.save_pretrained(tmp_path / request.param)
    return tmp_path / request.param


def test_other_architectures_pass_and_take_the_adapters_they_can(other):
    assert check(other).trained > 0
    if other.name == "mamba":
        with pytest.raises(UserError, match=r"target_modules to \[in_proj, x_proj, dt_proj\]"):
            check(other, Lora(r=2))
        assert check(other, Lora(r=2, target_modules=["in_proj", "x_proj", "dt_proj"])).trained > 0
    else:
        sizes = check(other, Lora(r=2))
        assert 0 < sizes.trained < sizes.weights


@pytest.mark.parametrize(
    ("modules", "words"),
    [
        (["q_proj", "nope"], "no adapter can be made on nope, .*its linear layers are q_proj, k_proj"),
        (["nope"], r"no adapter can be made .*target_modules to \[q_proj, k_proj"),
        ("q_(", r"no adapter can be made .*target_modules to \[q_proj"),
        (["norm"], r"no adapter can be made .*target_modules to \[q_proj"),
    ],
)
def test_modules_that_take_no_adapter_are_told_with_those_that_do(modules, words, random_student):
    with pytest.raises(UserError, match=rf"^student\.lora: {words}"):
        check(random_student, Lora(r=2, target_modules=modules))


def test_trained_weights_are_not_kept_in_bfloat16(folder):
    with pytest.raises(UserError, match=r"^student\.dtype: .* round to nothing; leave it out, or set student\.lora"):
        check_student(Student(model=str(folder), dtype="bfloat16"), load_encoder(Student(model=str(folder))))
    student = Student(model=str(folder), dtype="bfloat16", lora=Lora(r=2))
    assert check_student(student, load_encoder(student)).trained > 0
    begun = Student(model=str(folder), dtype="bfloat16")
    assert check_student(begun, load_encoder(begun), may_change=False).trained > 0


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_on_a_tensor_that_two_modules_share_is_refused(module, tied, tokenizer, tmp_path):
    config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=tied, **SMALL)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    refused = pytest.raises(UserError, match=r"^student\.lora: .* has one tensor for its embeddings and its LM head")
    with refused if tied else nullcontext():
        check(tmp_path, Lora(r=2, target_modules=["q_proj", module]))
    student = Student(model=str(tmp_path), lora=Lora(r=2, target_modules=["q_proj", module]))
    assert check_student(student, load_encoder(student), may_change=False).trained > 0  # it was trained so


def test_an_image_model_whose_text_configuration_says_nothing_of_tying_passes(random_student, tmp_path):
    """So Qwen2.5-VL is published: what ties is the outer configuration."""
    folder = write_model("qwen2_5_vl", random_student, tmp_path / "vlm")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"].pop("tie_word_embeddings", None)
    (folder / "config.json").write_text(json.dumps(config))
    assert check(folder, Lora(r=2)).trained > 0


def test_quantized_weights_are_not_quantized_again(folder, monkeypatch):
    monkeypatch.setattr("purld.model.student_check.check_quantizing", lambda student: None)  # bitsandbytes is there
    BROKEN["quantized"][0](folder)
    student = Student(model=str(folder), lora=Lora(r=2), quantize="nf4")
    with pytest.raises(UserError, match=r"^student\.quantize: .* are quantized already; leave it out"):
        check_student(student, load_encoder(student))


def test_a_custom_generate_function_is_never_run(folder):
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text("raise SystemExit(3)\n")
    check(folder)
    model = load_model(Student(model=str(folder)), folder)
    assert model.generate.__self__ is model


def test_nothing_but_one_function_loads_a_part_of_a_model_directory():
    """`from_pretrained` is called elsewhere for adapters, headers, stop tokens and the shipped students alone."""
    allowed = {
        "model/pretrained.py": 1,
        "model/adapters.py": 1,
        "model/variants.py": 1,
        "model/weights.py": 1,
        "model/processor.py": 1,
        "testbed/students/students.py": 2,
    }
    found: dict[str, int] = {}
    package = Path(purld.__file__).parent
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr == "from_pretrained":
                name = file.relative_to(package).as_posix()
                found[name] = found.get(name, 0) + 1
    assert found == allowed


def test_shards_are_found_by_their_index(folder):
    write_shards(folder)
    assert [file.name for file in weight_files(str(folder))] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
