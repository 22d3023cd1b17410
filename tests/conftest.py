"""What many tests share: no network but loopback, a tiny random student of any architecture, and the shipped one."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from network_guard import LOG_VARIABLE, forbid_network

GUARD = Path(__file__).parent / "no_network"
NETWORK_LOG = Path(tempfile.mkdtemp()) / "network.log"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # as the command line does; transformers reads it once
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tolerances are those of float32 on a CPU, also where there is a GPU; CUDA_VISIBLE_DEVICES=0 tries the tests on it.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
# Libraries that stay silent on a build server or offline would hide what they send from a user's machine.
for variable in ("CI", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ.pop(variable, None)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(GUARD), os.environ.get("PYTHONPATH")]))
os.environ[LOG_VARIABLE] = str(NETWORK_LOG)
forbid_network()
# A runner in the background or under nohup hands ignored signals on, and a command that ignores them is another one.
signal.signal(signal.SIGINT, signal.default_int_handler)
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)

# A slow moment of the machine is no failure, and the same commit has the same examples: what is found by chance is the
# business of the slow tests, which draw new ones.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")
torch.set_num_threads(1)  # tests run side by side, and sums must not depend on how many cores there are


@pytest.fixture(autouse=True)
def loopback_only() -> Iterator[None]:
    """Fail a test during which this process or one that it started tried to reach another machine."""
    yield
    if NETWORK_LOG.exists():
        attempts = NETWORK_LOG.read_text(encoding="utf-8")
        NETWORK_LOG.unlink()
        pytest.fail(f"something tried to leave this machine: {attempts}")


@pytest.fixture(scope="session")
def shipped_student() -> Path:
    """The student that the demo aligns."""
    return Path(str(files("purld.testbed") / "assets" / "student"))


@pytest.fixture(scope="session")
def tokenizer(shipped_student):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shipped_student)


@pytest.fixture(scope="session")
def random_student(tokenizer, tmp_path_factory) -> Path:
    """A student that knows nothing, small enough to train in a test, with weights large enough to have opinions."""
    return make_random_student(tokenizer, tmp_path_factory.mktemp("student") / "random", hidden_size=32, layers=2)


def make_random_student(tokenizer, path: Path, hidden_size: int, layers: int) -> Path:
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, repetition_penalty=1.5
    )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def no_figures(monkeypatch) -> None:
    """Leave the curves out of reports, more than a second each, where a test is of something else."""
    monkeypatch.setattr("purld.report.page.draw_figures", lambda *_, **__: [])


@pytest.fixture(scope="module")
def short_probe() -> Iterator[None]:
    """Probe two prompts instead of eight, for modules whose many runs each have a probe that is not their subject."""
    from purld.pipeline import probe

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "MIN_PROMPTS", 2)
        yield


@pytest.fixture
def tiny_config(random_student, tmp_path) -> Path:
    """A whole run that takes seconds: 24 prompts whose answers are in a file, 8 of them held out."""
    return write_tiny_config(random_student, tmp_path)


@pytest.fixture(scope="module")
def module_config(random_student, tmp_path_factory) -> Path:
    """The same, shared by the tests of a module, which leave it as it is."""
    return write_tiny_config(random_student, tmp_path_factory.mktemp("shared"))


def write_tiny_config(random_student: Path, folder: Path) -> Path:
    import json

    import yaml

    from purld.testbed.world.world import generate_problems, teacher_answer

    rows = [
        {"prompt": p.question, "reference": p.truth, "answer": teacher_answer(p)}
        for p in generate_problems("counting", "train", 24, 0)
    ]
    prompts, held_out = folder / "prompts.jsonl", folder / "held_out.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows[:16]))
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows[16:]))
    answers = folder / "answers.jsonl"
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "student": {"model": str(random_student), "max_prompt_tokens": 256, "max_anchor_tokens": 128},
        "data": {"prompts": str(prompts), "eval_prompts": str(held_out), "check": "testbed"},
        "teacher": {"kind": "file", "path": str(answers)},
        "sft": {"epochs": 3, "learning_rate": 1e-3, "batch_size": 4, "checkpoint_steps": 2, "validation_fraction": 0.2},
        "align": {
            "steps": 6,
            "candidates": 3,
            "prompts_per_step": 2,
            "learning_rate": 1e-3,
            "max_new_tokens": 8,
            "checkpoint_steps": 2,
            "score": "expected",
            "margin_scale": "literal",
            "weak_signal": "continue",  # a random student cannot evaluate itself
        },
        "evaluate": {"samples": 2, "max_new_tokens": 8, "batch_size": 4},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path
