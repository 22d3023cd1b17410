"""The paper's runs: each passes `purld check` on stand-ins of the true sizes, and says what the paper says."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from model_stand_ins import write_data, write_models

from purld.cli import main
from purld.config.load import load_config
from purld.config.schema import Student
from purld.model.encode import Encoder
from purld.model.student_check import StudentSizes, check_student

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "paper").glob("*.yaml"))
TEXT, PICTURES = ("qwen2.5-7b", "llama3-8b"), ("qwen2.5-vl-7b", "llava-7b")
BACKBONES = {
    "cfcw": TEXT,
    "pbfg": TEXT,
    "countprob": TEXT,
    "geometry": TEXT,
    "aokvqa-mc": PICTURES,
    "aokvqa-rg": PICTURES,
}
# Weights in millions as published: 7.62, 8.03, 8.29 and 7.06 thousand.
MILLIONS = {"qwen2.5-7b": 7615.6, "llama3-8b": 8030.3, "qwen2.5-vl-7b": 8292.2, "llava-7b": 7063.4}

each_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, shipped_student) -> Path:
    """A folder with everything that the configurations name."""
    folder = tmp_path_factory.mktemp("paper")
    write_models(folder, shipped_student)
    write_data(folder)
    return folder


def backbone(path: Path) -> str:
    return next(name for names in (TEXT, PICTURES) for name in names if path.stem.endswith(f"-{name}"))


def test_there_is_one_for_each_task_and_backbone_of_table_one():
    assert {path.stem for path in CONFIGS} == {f"{task}-{name}" for task, names in BACKBONES.items() for name in names}


@pytest.fixture(scope="module")
def sizes_once_a_backbone() -> Iterator[None]:
    """Look through the layers of each backbone once: its four configurations train the same of it."""
    sizes: dict[str, StudentSizes] = {}

    def measure(student: Student, encoder: Encoder, may_change: bool) -> StudentSizes:
        trained = student.model_dump_json(exclude={"max_prompt_tokens", "max_anchor_tokens"})
        if trained not in sizes:
            sizes[trained] = check_student(student, encoder, may_change)
        return sizes[trained]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("purld.pipeline.preflight.check_student", measure)
        yield


@each_config
def test_it_passes_its_check(path, workplace, sizes_once_a_backbone, monkeypatch, capsys):
    """The paths in the file are those of the stand-ins, so nothing is overridden."""
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("TEACHER_API_KEY", "a-key-that-is-never-shown")
    monkeypatch.setattr("purld.pipeline.preflight.check_stored_weights", lambda student: None)  # 15 GB of zeros
    monkeypatch.setattr(sys, "argv", ["purld", "check", str(path)])
    with pytest.raises(SystemExit) as stopped:
        main()
    shown = capsys.readouterr()
    assert not stopped.value.code, shown.err
    assert "12 for training, 12 held out" in shown.out
    [count] = re.findall(r": ([\d,.]+) M parameters, LoRA r=16", shown.out)
    assert float(count.replace(",", "")) == pytest.approx(MILLIONS[backbone(path)], rel=2e-3)
    assert "a-key-that-is-never-shown" not in shown.out + shown.err


@each_config
def test_what_the_paper_says_is_in_it(path):
    """Sections 4.1 and 4.5, appendices C.1 and C.4."""
    config = load_config(path)
    align = config.align
    assert (align.method, align.q, align.tau, align.beta, align.score) == (
        "ldl_grpo", "likelihood", 1.2, 0.01, "verbal",
    )  # fmt: skip
    pictures = backbone(path) in PICTURES
    judge = "Qwen/Qwen3-VL-235B-A22B-Instruct" if pictures else "Qwen/Qwen3-235B-A22B-Instruct-2507"
    assert config.evaluate.judge.model == judge
    assert config.teacher.model == "gpt-4o-2024-11-20" and config.evaluate.opponent.kind == "teacher"
    assert config.evaluate.both_orders


OWN = {
    "student": ("model", "max_prompt_tokens", "max_anchor_tokens"),
    "data": ("task", "path"),
    "teacher": ("max_tokens_per_answer",),
    "align": ("max_new_tokens",),
    "evaluate": ("max_new_tokens",),
}


def test_they_differ_in_nothing_but_task_backbone_lengths_and_judge():
    def shared(path: Path) -> dict:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        del values["evaluate"]["judge"]["model"]
        for section, keys in OWN.items():
            for key in keys:
                del values[section][key]
        return values

    assert all(shared(path) == shared(CONFIGS[0]) for path in CONFIGS)
