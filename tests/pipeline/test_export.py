"""What an export holds: weights that load anywhere, the card, the licence, Ollama's file, a GGUF file on request."""

import json
import os
import shutil
import stat
import sys

import pytest
import torch
import yaml
from log_prob_sums import sequence_log_probs
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from purld.config.load import load_config
from purld.errors import UserError
from purld.model.load import load_encoder, load_model, make_trainable, save_model
from purld.model.vision import EncodedPrompt
from purld.pipeline import export
from purld.pipeline.base_licence import read_licence
from purld.pipeline.export import ExportOptions, export_model
from purld.pipeline.gguf_converter import find_converter
from purld.runs.files import write_json
from purld.runs.run_dir import RunDir

PROMPT, COMPLETIONS = EncodedPrompt(list(range(5, 20))), [[7, 8, 9], [30, 31]]
METRICS = {"n": 8, "accuracy": 0.5, "accuracy_ci": [0.25, 0.75], "win_rate": 0.4, "win_rate_ci": [0.3, 0.5]}
RESULTS = {
    "models": {"base": METRICS, "sft": METRICS | {"accuracy": 0.625}, "ldl_grpo": METRICS | {"accuracy": 0.875}},
    "difference": {"ldl_grpo - sft": {"accuracy": 0.25, "accuracy_ci": [0.125, 0.375]}},
    "probe": {"verdict": "expected tells candidates apart."},
}


def finish_run(module_config, folder, *overrides, evaluated=True):
    """Make a finished run of the random student, moved a little in place of training."""
    config = load_config(module_config, overrides)
    run = RunDir(folder)
    run.path.mkdir()
    run.config.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    run.begin("anchors")
    run.finish("anchors", 1.0, teacher={"prompts": 16, "answered": 15})
    for stage in ("sft", "align"):
        run.begin(stage)
        model = make_trainable(config.student, load_model(config.student, config.student.model))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05)
        save_model(config.student, model, load_encoder(config.student), run.path / stage)
        run.finish(stage, 1.0, trained_on=13, validated_on=3, prompts=16)
    if evaluated:
        run.begin("evaluate")
        write_json(run.results, RESULTS)
        run.finish("evaluate", 1.0)
    return run


@pytest.fixture(scope="module")
def base(random_student, tmp_path_factory):
    """The random student in a folder that states its licence."""
    folder = tmp_path_factory.mktemp("models") / "My Base"
    shutil.copytree(random_student, folder)
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: my-licence\n---\n# A model\n")
    (folder / "LICENSE.txt").write_text("The text.")
    return folder


@pytest.fixture(scope="module")
def run(module_config, base, tmp_path_factory):
    return finish_run(module_config, tmp_path_factory.mktemp("runs") / "run", f"student.model={base}")


@pytest.fixture
def converter(tmp_path):
    """A stand-in for llama.cpp's converter, which writes down what it was asked for and what it found."""
    script = tmp_path / "llama.cpp" / "convert_hf_to_gguf.py"
    script.parent.mkdir()
    script.write_text(
        "import json, pathlib, sys\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "if 'refuse' in sys.argv[0]: sys.exit('Traceback\\nNotImplementedError: BPE was not recognized\\n')\n"
        "found = {'arguments': sys.argv[2:], 'files': sorted(file.name for file in folder.iterdir()),\n"
        "         'eos': json.loads((folder / 'tokenizer_config.json').read_text())['eos_token']}\n"
        "out = pathlib.Path(sys.argv[sys.argv.index('--outfile') + 1])\n"
        "out.write_bytes(b'GGUF' + json.dumps(found).encode())\n"
    )
    return script


def log_probs(model):
    with torch.no_grad():
        return sequence_log_probs(model.eval(), PROMPT, COMPLETIONS, pad=0)


def test_an_export_is_complete_readable_as_the_umask_says_and_loads_in_plain_transformers(run, tmp_path):
    before = os.umask(0o027)
    try:
        folder = export_model(run.path, tmp_path / "out")
    finally:
        os.umask(before)
    assert {"README.md", "Modelfile", "LICENSE.txt", "model.safetensors", "chat_template.jinja"} <= {
        file.name for file in folder.iterdir()
    }
    for file in folder.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o640, file
    served, student = AutoModelForCausalLM.from_pretrained(folder), load_config(run.config).student
    assert torch.equal(log_probs(served), log_probs(load_model(student, run.align)))
    encoder = load_encoder(student)
    ends = served.generation_config.eos_token_id
    assert set(ends if isinstance(ends, list) else [ends]) == encoder.ends
    assert AutoTokenizer.from_pretrained(folder).chat_template == encoder.tokenizer.chat_template
    assert "FROM .\n" in (folder / "Modelfile").read_text()


def test_the_card_has_figures_with_intervals_data_and_licence_and_no_path(run, base, tmp_path):
    card = (export_model(run.path, tmp_path / "out") / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "license": "my-licence",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["purld", "ldl_grpo"],
    }
    for words in (
        "# My Base, aligned with purld",
        "On 8 held-out prompts, with 95% intervals, seed 0.",
        "| LDL-GRPO | 0.875 [0.250, 0.750] | 0.400 [0.300, 0.500] |",
        "| LDL-GRPO minus SFT | +0.250 [+0.125, +0.375] | - |",
        "Prompts: `prompts.jsonl`",
        "15 usable of 16 prompts, one each, of the file `answers.jsonl`",
        "trained on 13, validated on 3",
        "ldl_grpo, 6 steps",
        "expected tells candidates apart.",
        "my-licence (see LICENSE.txt)",
        "AutoModelForCausalLM.from_pretrained(folder)",
    ):
        assert words in body
    assert str(base.parent) not in card
    assert str(run.path.parent) not in card


def test_stage_one_can_be_exported_in_half_the_size_with_a_card_of_its_own(run, tmp_path):
    folder = export_model(run.path, tmp_path / "out", ExportOptions(stage="sft", dtype="bfloat16"))
    card = (folder / "README.md").read_text()
    assert "# My Base, fine-tuned with purld" in card
    assert "| SFT | 0.625" in card
    assert "LDL-GRPO" not in card
    assert "Stage II" not in card
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_adapter_alone_is_the_merged_model_on_its_base(module_config, base, tmp_path):
    overrides = (f"student.model={base}", "student.lora.r=2")
    run = finish_run(module_config, tmp_path / "run", *overrides, evaluated=False)
    adapter = export_model(run.path, tmp_path / "adapter", ExportOptions(adapter=True))
    merged = export_model(run.path, None)
    assert merged == run.path / "export"
    assert not list(adapter.glob("model*.safetensors"))
    assert not (adapter / "Modelfile").exists()
    card = (adapter / "README.md").read_text()
    assert "--max-lora-rank 8" in card
    assert "The model was not evaluated." in card
    expected = log_probs(AutoModelForCausalLM.from_pretrained(merged))
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    assert torch.allclose(log_probs(adapted), expected, atol=1e-4)
    with pytest.raises(UserError, match="leave out --gguf and --dtype"):
        export_model(run.path, tmp_path / "both", ExportOptions(adapter=True, dtype="float32"))


def test_a_gguf_file_ends_turns_where_training_did(run, converter, tmp_path, monkeypatch):
    encoder = load_encoder(load_config(run.config).student)
    encoder.end = 7  # another token than the tokenizer's eos
    monkeypatch.setattr(export, "load_encoder", lambda student: encoder)
    options = ExportOptions(converter=find_converter(converter.parent), gguf_type="q8_0")
    folder = export_model(run.path, tmp_path / "out", options)
    found = json.loads((folder / "model.gguf").read_bytes().removeprefix(b"GGUF"))
    assert found["eos"] == encoder.tokenizer.convert_ids_to_tokens(7) != encoder.tokenizer.eos_token
    assert json.loads((folder / "tokenizer_config.json").read_text())["eos_token"] == encoder.tokenizer.eos_token
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(found["files"])
    assert found["arguments"][2:] == ["--outtype", "q8_0", "--model-name", "My Base"]
    assert (folder / "Modelfile").read_text().startswith("FROM ./model.gguf\n")
    assert "llama-server --model model.gguf" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (ExportOptions(stage="report"), "give align or sft"),
        (ExportOptions(dtype="int3"), "--dtype int3: give float32, bfloat16, float16"),
        (ExportOptions(adapter=True), "trained all weights"),
        (ExportOptions(converter=("refuse",)), "NotImplementedError: BPE was not recognized; export it without --gguf"),
        (ExportOptions(converter=("true",)), "wrote no GGUF file"),
        (ExportOptions(converter=("/nowhere/to/be/found",)), "cannot be started"),
    ],
)
def test_what_cannot_be_exported_is_one_sentence_and_leaves_nothing(run, converter, tmp_path, options, words):
    if options.converter == ("refuse",):
        refusing = converter.with_name("refuse.py")
        shutil.copyfile(converter, refusing)
        options = ExportOptions(converter=(sys.executable, str(refusing)))
    with pytest.raises(UserError, match=words):
        export_model(run.path, tmp_path / "out", options)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_the_converter_is_found_where_it_usually_is(converter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "llama.cpp")
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"git clone .*--converter"):
        find_converter(None)
    with pytest.raises(UserError, match=r"holds no convert_hf_to_gguf\.py"):
        find_converter(tmp_path)
    assert find_converter(converter) == find_converter(converter.parent) == [sys.executable, str(converter)]
    monkeypatch.chdir(tmp_path)
    assert find_converter(None) == [sys.executable, "llama.cpp/convert_hf_to_gguf.py"]
    converter.chmod(0o755)
    monkeypatch.setenv("PATH", str(converter.parent))
    assert find_converter(None) == [str(converter)]


@pytest.mark.parametrize(
    ("files", "stated"),
    [
        ({}, "not stated"),
        ({"README.md": "# No front matter"}, "not stated"),
        ({"README.md": "---\nlicense: [broken\n---\n"}, "not stated"),
        ({"README.md": "---\r\nlicense: mit\r\n---\r\nA model"}, "mit"),
        ({"LICENSE": "text", "NOTICE": "text"}, "see LICENSE, NOTICE"),
        ({"README.md": "---\nlicense: apache-2.0\n---\n", "LICENSE.md": "text", "licensed.txt": ""}, "apache-2.0 (see"),
    ],
)
def test_a_licence_is_what_the_folder_states(files, stated, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode())
    assert str(read_licence(str(tmp_path))).startswith(stated)
    assert str(read_licence("nobody/nothing")) == "not stated"
