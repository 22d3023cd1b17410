"""Prompts with pictures through the pipeline, for both architectures: every method, every stage, what is saved."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from faulty_server import completion, running_server
from PIL import Image as Pil
from tiny_vlm import ARCHITECTURES, write_model
from transformers import AutoModelForImageTextToText

from purld.config.load import load_config
from purld.display.progress import Reporter
from purld.methods.table import METHODS
from purld.model.encode import training_batch
from purld.model.load import load_encoder, load_model
from purld.model.vision import vision_modules
from purld.pipeline.export import ExportOptions, export_model
from purld.pipeline.pipeline import Pipeline
from purld.pipeline.prompt_pools import load_prompt_pools
from purld.runs.files import read_json, read_rows
from purld.runs.run_dir import RunDir

pytestmark = pytest.mark.usefixtures("short_probe")

SECOND_STAGE = [name for name, method in METHODS.items() if method.stage_two]
COLOURS = ("red", "green", "blue", "yellow", "white", "black")


def answer(handler):
    """A teacher that counts characters, and likes long candidates."""
    _, _, candidate = handler.prompt.partition("Candidate Answer:\n")
    score = f"{min(1.0, len(candidate) / 100):.2f}"
    handler.reply(completion(score if candidate else f"It is {len(handler.prompt)}."))


@pytest.fixture(scope="module")
def teacher():
    with running_server() as server:
        server.default = answer
        yield server


@pytest.fixture(scope="module", params=ARCHITECTURES)
def write_config(request, teacher, shipped_student, tmp_path_factory):
    """A configuration of eight prompts, most of them about one picture or two."""
    folder = tmp_path_factory.mktemp("images")
    model = write_model(request.param, shipped_student, folder / "model")
    for number, colour in enumerate(COLOURS):
        Pil.new("RGB", (24 + 8 * number, 32), colour).save(folder / f"{colour}.png")
    rows = [{"prompt": f"What colour is it, {n}?", "images": f"{colour}.png"} for n, colour in enumerate(COLOURS)]
    rows[2] = {"prompt": "Is <image> like <image>?", "images": ["red.png", "green.png"]}
    rows[3] = {"prompt": "How many colours are there?"}
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "prompts.jsonl").write_text(text)
    (folder / "held_out.jsonl").write_text(text.replace("colour", "tint").replace("Is <", "Was <"))
    values = {
        "student": {"model": str(model), "max_prompt_tokens": 256, "max_anchor_tokens": 32},
        "data": {"prompts": str(folder / "prompts.jsonl"), "eval_prompts": str(folder / "held_out.jsonl")},
        "teacher": {"kind": "openai", "base_url": teacher.url, "model": "m", "max_calls": 200},
        "sft": {"epochs": 2, "learning_rate": 1e-3, "batch_size": 4, "validation_fraction": 0.2},
        "align": {"steps": 2, "candidates": 3, "prompts_per_step": 2, "learning_rate": 1e-3, "max_new_tokens": 6}
        | {"score": "expected", "weak_signal": "continue"},
        "evaluate": {"max_new_tokens": 6, "batch_size": 4, "judge": None, "opponent": None},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def after_stage_one(write_config, tmp_path_factory):
    base = RunDir(tmp_path_factory.mktemp("runs") / "base")
    Pipeline(load_config(write_config), base, Reporter()).execute(["anchors", "sft"])
    return base


# Methods differ in what they make of numbers, architectures in how they see; both meet in ldl_grpo.
EVERY_METHOD = pytest.mark.parametrize(
    ("write_config", "method"),
    [
        pytest.param(
            architecture, method, marks=pytest.mark.slow if architecture == "llava" and method != "ldl_grpo" else ()
        )
        for architecture in ARCHITECTURES
        for method in SECOND_STAGE
    ],
    indirect=["write_config"],
    scope="module",
)


BOTH_KILLED = pytest.mark.parametrize(
    "write_config", ["qwen2_5_vl", pytest.param("llava", marks=pytest.mark.slow)], indirect=True, scope="module"
)


@EVERY_METHOD
def test_every_method_trains_on_pictures(method, write_config, after_stage_one):
    run = RunDir(after_stage_one.path.with_name(method))
    shutil.copytree(after_stage_one.path, run.path)
    config = load_config(write_config, [f"align.method={method}"])
    Pipeline(config, run, Reporter()).execute(["align"])
    before, after = (load_model(config.student, place).state_dict() for place in (run.sft, run.align))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    vision = tuple(f"model.{part}." for part in vision_modules(load_model(config.student, run.sft)))
    assert any(name.startswith(vision) for name in moved)  # all weights train, the vision's too
    assert any("language_model" in name for name in moved)
    if METHODS[method].stage_two.scorer is not None:
        assert len(read_rows(run.groups)) >= 2


@pytest.mark.usefixtures("no_figures")
def test_a_whole_run_with_an_adapter_ends_as_an_ordinary_directory(write_config, tmp_path):
    run = RunDir(tmp_path / "run")
    config = load_config(write_config, ["student.lora.r=2"])
    Pipeline(config, run, Reporter()).execute()
    assert read_json(run.results)["models"]["ldl_grpo"]["n"] == 6
    assert run.report.exists()
    base, aligned = load_model(config.student, config.student.model), load_model(config.student, run.align)
    for name, module in vision_modules(base).items():
        for key, value in module.state_dict().items():
            assert torch.equal(value, vision_modules(aligned)[name].state_dict()[key])
    export = export_model(run.path, None, ExportOptions(stage="align"))
    served = AutoModelForImageTextToText.from_pretrained(export, dtype=torch.float32).eval()
    encoder = load_encoder(config.student.model_copy(update={"model": str(export), "lora": None}))
    prompts = [prompt for prompt in load_prompt_pools(config, encoder, print).train if prompt.images]
    batch = training_batch([(encoder.encode_prompt(prompt), [5, 6]) for prompt in prompts], encoder.pad)
    with torch.no_grad():
        assert torch.allclose(served(**batch).logits, aligned(**batch).logits, atol=1e-5)


@BOTH_KILLED
def test_killed_in_stage_two_a_run_with_pictures_ends_with_the_same_bits(write_config, after_stage_one, monkeypatch):
    class KilledError(BaseException):
        """In the place of a SIGKILL."""

    log = RunDir.log_metrics

    def kill(self, stage, at, values):
        log(self, stage, at, values)
        if stage == "align" and at == 3:
            raise KilledError

    weights = []
    for name in ("calm", "killed"):
        run = RunDir(after_stage_one.path.with_name(name))
        shutil.copytree(after_stage_one.path, run.path)
        config = load_config(write_config, ["align.steps=3", "align.checkpoint_steps=1"])
        if name == "killed":
            with monkeypatch.context() as patch, pytest.raises(KilledError):
                patch.setattr(RunDir, "log_metrics", kill)
                Pipeline(config, run, Reporter()).execute(["align"])
        Pipeline(config, run, Reporter()).execute(["align"])
        weights.append((run.align / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
