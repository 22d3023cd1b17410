"""The example configurations, through the real command line: with stand-ins for what they name, and on real answers."""

import re
from pathlib import Path

import pytest
from command_line import purld

from purld.runs.files import read_json, read_rows, write_rows
from purld.runs.run_dir import RunDir
from purld.testbed.world.world import generate_problems, teacher_answer, write_prompts

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
REAL = Path(__file__).parents[3] / "shared" / "data" / "instructions_gpt4o.jsonl"

each_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


@pytest.fixture
def workplace(tmp_path, monkeypatch, shipped_student) -> Path:
    """A folder with everything that the examples name: a model directory, prompts, answers, a key."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "my-3b-instruct").symlink_to(shipped_student)
    write_prompts(tmp_path / "prompts.jsonl", generate_problems("counting", "train", 40, 0))
    problems = generate_problems("writing", "train", 40, 0)
    answered = [{"prompt": p.question, "reference": p.truth, "teacher": teacher_answer(p)} for p in problems]
    write_rows(tmp_path / "instructions.jsonl", answered)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TEACHER_API_KEY", "a-key-that-is-never-shown")
    return tmp_path


@each_config
def test_an_example_passes_its_check_once_its_files_exist(path, workplace, monkeypatch, capsys):
    assert purld(monkeypatch, "check", path) == 0
    shown = capsys.readouterr()
    assert "What leaves this machine" in shown.out
    assert "a-key-that-is-never-shown" not in shown.out + shown.err
    assert not (workplace / "runs").exists()


@each_config
def test_without_the_model_an_example_says_so_in_one_sentence(path, workplace, monkeypatch, capsys):
    (workplace / "models" / "my-3b-instruct").unlink()
    assert purld(monkeypatch, "check", path) == 2
    assert "student.model: ./models/my-3b-instruct does not exist" in capsys.readouterr().err


@pytest.mark.skipif(not REAL.exists(), reason="the real instructions are not at hand")
def test_real_instructions_and_answers_go_from_start_to_report(workplace, monkeypatch, capsys):
    """Real answers are up to several thousand characters of any script: what is left out or cut is counted."""
    (workplace / "instructions.jsonl").unlink()
    (workplace / "instructions.jsonl").symlink_to(REAL)
    config = next(path for path in CONFIGS if path.stem == "answers-file")
    small = ["data.max_prompts=24", "student.max_prompt_tokens=128", "student.max_anchor_tokens=128"]
    short = ["sft.epochs=1", "align.steps=1", "align.prompts_per_step=1", "align.candidates=2"]
    short += ["align.max_new_tokens=8"]
    # The tiny student cannot evaluate itself on real instructions, and the probe says so.
    short += ["align.score=in_context", "align.weak_signal=continue"]
    brief = ["data.max_eval_prompts=2", "evaluate.max_new_tokens=8"]
    assert purld(monkeypatch, "run", config, *small, *short, *brief, "--run-dir", "run") == 0
    told = capsys.readouterr().err
    run = RunDir(workplace / "run")
    assert re.search(r"[1-9]\d* of \d+ training prompts have more than 128 tokens", told)
    assert len(read_rows(run.anchors)) == 24
    cut = run.finished_stages()["sft"]["anchors_cut"]
    assert cut and f"{cut} anchors were cut at 128 tokens (student.max_anchor_tokens)" in told
    assert list(read_json(run.results)["models"]) == ["base", "sft", "ldl_grpo"]
    assert run.report.stat().st_size > 10_000
