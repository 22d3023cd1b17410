"""A run from prompts to report through the real command line, killed and not."""

import json
import signal
import time
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import yaml
from command_line import purld
from forked import NO_FIGURES, PURLD, ForkedPython

from purld.config.load import load_config
from purld.display.progress import Reporter
from purld.errors import UserError
from purld.pipeline.pipeline import _RUNNERS, Pipeline
from purld.runs.files import read_json, read_rows
from purld.runs.open import open_run
from purld.runs.run_dir import RunDir
from purld.signals import Stopped


def sentence(capsys):
    """What the user was told on stderr, which must be one line without a traceback."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("purld: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("error", [Stopped(signal.SIGTERM), UserError("no disk"), RuntimeError("a bug")])
def test_what_stops_a_stage_leaves_the_time_that_it_took(error, tiny_config, tmp_path, monkeypatch):
    run, now = RunDir(tmp_path / "run"), [0.0]
    monkeypatch.setattr("purld.runs.run_dir.time", SimpleNamespace(time=lambda: now[0], monotonic=lambda: now[0]))

    def run_stage(context, fails):
        now[0] += 60
        if fails:
            raise error
        return {}

    for fails in (True, True, False):
        monkeypatch.setitem(_RUNNERS, "anchors", partial(run_stage, fails=fails))
        pipeline = Pipeline(load_config(tiny_config), RunDir(run.path), Reporter())
        with pytest.raises(type(error)) if fails else nullcontext():
            pipeline.execute(["anchors"])
    assert run.finished_stages()["anchors"]["seconds"] == 180


def test_a_run_goes_from_prompts_to_report_and_then_has_nothing_left_to_do(tiny_config, tmp_path, monkeypatch, capsys):
    run = RunDir(tmp_path / "run")
    assert purld(monkeypatch, "run", tiny_config, "--run-dir", run.path) == 0
    shown = capsys.readouterr().out
    assert "LDL-GRPO minus SFT" in shown
    results = read_json(run.results)
    assert list(results["models"]) == ["base", "sft", "ldl_grpo"]
    assert results["models"]["sft"]["n"] == 8
    assert "win_rate" not in results["models"]["sft"]  # no judge: absent, not zero
    assert results["teacher"]["prompts"] == 16
    assert {"accuracy", "accuracy_ci"} <= results["difference"]["ldl_grpo - sft"].keys()
    assert set(run.finished_stages()) == {"anchors", "sft", "probe", "align", "evaluate", "report"}
    assert [r["step"] for r in read_rows(run.metrics) if r["stage"] == "align"] == list(range(1, 7))
    assert len(read_rows(run.groups)) == 12
    assert run.report.stat().st_size > 10_000
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*.safetensors")}
    assert purld(monkeypatch, "run", tiny_config, "--run-dir", run.path) == 0
    assert before == {path: path.stat().st_mtime_ns for path in run.path.rglob("*.safetensors")}
    assert purld(monkeypatch, "export", run.path) == 0
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(run.path / "export")
    AutoTokenizer.from_pretrained(run.path / "export")


def test_stages_run_one_by_one_and_in_order(tiny_config, tmp_path, monkeypatch, capsys):
    there = ["--run-dir", tmp_path / "run"]
    assert purld(monkeypatch, "sft", tiny_config, *there) == 2
    assert "stage anchors is not finished" in sentence(capsys)
    for stage in ("anchors", "sft"):
        assert purld(monkeypatch, stage, tiny_config, *there) == 0
    assert purld(monkeypatch, "evaluate", tiny_config, *there) == 2
    assert "stage align is not finished" in sentence(capsys)
    assert purld(monkeypatch, "export", tmp_path / "run") == 2
    assert "finish the run, or give --stage sft for Stage I's" in sentence(capsys)


@pytest.mark.usefixtures("no_figures")
def test_method_sft_stops_after_stage_one(tiny_config, tmp_path, monkeypatch):
    values = yaml.safe_load(tiny_config.read_text()) | {"align": {"method": "sft"}}
    tiny_config.write_text(yaml.safe_dump(values))
    run = RunDir(tmp_path / "run")
    assert purld(monkeypatch, "run", tiny_config, "--run-dir", run.path) == 0
    assert list(read_json(run.results)["models"]) == ["base", "sft"]
    assert not run.align.exists()


@pytest.mark.usefixtures("no_figures")
def test_lora_and_verbal_scores_go_the_same_way(tiny_config, tmp_path, monkeypatch, shipped_student):
    run = RunDir(tmp_path / "run")
    overrides = ["student.lora={r: 2}", "align.score=verbal", "align.steps=2", f"student.model={shipped_student}"]
    overrides += ["sft.epochs=1", "evaluate.samples=1"]
    assert purld(monkeypatch, "run", tiny_config, *overrides, "--run-dir", run.path) == 0
    assert (run.sft / "adapter_config.json").exists()
    assert (run.align / "adapter_config.json").exists()
    assert purld(monkeypatch, "export", run.path) == 0
    assert not (run.path / "export" / "adapter_config.json").exists()


def results_of(run):
    """Everything a run ends with that two equal runs must share."""
    results = read_json(run.results)
    results.pop("seconds")
    weights = [(folder / "model.safetensors").read_bytes() for folder in (run.sft, run.align)]
    files = {path.name: path.read_text() for path in sorted((run.path / "generations").glob("*.jsonl"))}
    return results, weights, files, read_rows(run.metrics)


def start(config, run):
    short = ("evaluate.samples=1", "align.steps=4", "--run-dir", run.path)
    return ForkedPython(NO_FIGURES + PURLD, "run", config, *short, said=run.path.with_name("said"))


def kill_when(process, condition, number=signal.SIGKILL):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.said.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(number)
    return process.wait(timeout=60)


def logged(run, stage):
    return max((r["step"] for r in read_rows(run.metrics) if r["stage"] == stage), default=0)


def test_killed_in_every_stage_it_ends_with_the_same_bits(tiny_config, tmp_path):
    calm, killed = RunDir(tmp_path / "calm"), RunDir(tmp_path / "killed")
    assert start(tiny_config, calm).wait() == 0
    assert kill_when(start(tiny_config, killed), lambda: logged(killed, "sft") >= 5, signal.SIGHUP) == 129
    assert "sft" not in killed.finished_stages()
    assert kill_when(start(tiny_config, killed), lambda: logged(killed, "align") >= 3, signal.SIGTERM) == 143
    assert "align" not in killed.finished_stages()
    answers = killed.generations("ldl_grpo")
    assert kill_when(start(tiny_config, killed), lambda: answers.exists()) == -signal.SIGKILL
    assert "evaluate" not in killed.finished_stages()
    assert start(tiny_config, killed).wait() == 0
    assert results_of(killed) == results_of(calm)


def test_two_runs_with_an_adapter_and_a_critic_are_equal_to_the_bit(tiny_config, tmp_path):
    """Whatever drew random numbers in the process before."""
    overrides = ["student.lora={r: 2, dropout: 0.1}", "sft.epochs=1", "align.method=self_ppo", "align.steps=2"]
    config, seen = load_config(tiny_config, overrides), []
    for disturbance in (1, 2):
        torch.manual_seed(disturbance)
        run = RunDir(tmp_path / str(disturbance))
        Pipeline(config, run, Reporter()).execute(["anchors", "sft", "align"])
        adapters = [(folder / "adapter_model.safetensors").read_bytes() for folder in (run.sft, run.align)]
        seen.append((adapters, read_rows(run.groups), read_rows(run.metrics)))
    assert any("value_loss" in row for row in seen[0][2]) and seen[0] == seen[1]


def test_ctrl_c_is_status_130_and_says_how_to_go_on(tiny_config, tmp_path):
    run = RunDir(tmp_path / "run")
    process = start(tiny_config, run)
    assert kill_when(process, lambda: logged(run, "align") >= 1, signal.SIGINT) == 130
    said = process.said.read_text()
    assert "run the same command again to continue" in said
    assert "Traceback" not in said
    assert start(tiny_config, run).wait() == 0


def test_a_contradicting_configuration_is_refused_and_names_the_key(tiny_config, tmp_path, monkeypatch, capsys):
    there = ["--run-dir", tmp_path / "run"]
    assert purld(monkeypatch, "anchors", tiny_config, *there) == 0
    assert purld(monkeypatch, "anchors", tiny_config, "align.tau=0.9", *there) == 0  # Stage II has not begun
    assert purld(monkeypatch, "anchors", tiny_config, "student.max_anchor_tokens=100", *there) == 2
    assert "student.max_anchor_tokens: 128, and now it is 100" in sentence(capsys)


def test_changed_prompts_are_noticed(tiny_config, tmp_path, monkeypatch, capsys):
    there = ["--run-dir", tmp_path / "run"]
    assert purld(monkeypatch, "anchors", tiny_config, *there) == 0
    with (tmp_path / "prompts.jsonl").open("a") as handle:
        handle.write(json.dumps({"prompt": "One more?", "reference": "1"}) + "\n")
    assert purld(monkeypatch, "sft", tiny_config, *there) == 2
    assert "have changed" in sentence(capsys)


def test_a_run_from_before_the_search_for_near_copies_goes_on_with_its_own_split(
    tiny_config, tmp_path, monkeypatch, capsys
):
    run = RunDir(tmp_path / "run")
    prompts = tmp_path / "prompts.jsonl"
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    prompts.write_text(
        "".join(json.dumps(r) + "\n" for row in rows for r in (row, row | {"prompt": row["prompt"].upper()}))
    )
    there = ["data.eval_prompts=null", "data.eval_fraction=0.5", "--run-dir", run.path]
    assert purld(monkeypatch, "anchors", tiny_config, *there, "data.near_duplicates=ignore") == 0
    values = yaml.safe_load(run.config.read_text())
    del values["data"]["near_duplicates"]
    run.config.write_text(yaml.safe_dump(values))
    run.record_file("config", run.config)
    assert open_run(run.path)[1].data.near_duplicates == "ignore"
    before = run.config.read_bytes()
    assert purld(monkeypatch, "anchors", tiny_config, *there) == 2
    assert "data.near_duplicates=ignore goes on so" in sentence(capsys)
    assert run.config.read_bytes() == before
    assert purld(monkeypatch, "anchors", tiny_config, *there, "data.near_duplicates=ignore") == 0
    assert purld(monkeypatch, "anchors", tiny_config, *there) == 2  # now the key is recorded
    assert "data.near_duplicates: ignore, and now it is apart" in sentence(capsys)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("prompts.jsonl", "", "prompts.jsonl"),
        ("prompts.jsonl", '{"question": "How many?"}\n', "prompts.jsonl, line 1"),
        ("prompts.jsonl", '{"prompt": "a?"}\n{"prompt": \n', "prompts.jsonl, line 2"),
        ("answers.jsonl", None, "answers.jsonl"),
        ("prompts.jsonl", None, "prompts.jsonl: no such file"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing_half_done(
    tiny_config, tmp_path, monkeypatch, capsys, file, content, words
):
    path = tmp_path / file
    path.unlink() if content is None else path.write_text(content)
    assert purld(monkeypatch, "run", tiny_config, "--run-dir", tmp_path / "run") == 2
    assert words in sentence(capsys)
    assert RunDir(tmp_path / "run").finished_stages() == {}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "none.yaml"], "none.yaml: no such configuration file"),
        (["run", "CONFIG", "student.model=./nowhere"], "./nowhere does not exist"),
        (["check", "CONFIG", "student.model=owner/name"], "purld downloads nothing; fetch it before with `hf download"),
        (["run", "CONFIG", "teacher={kind: local, model: owner/name}"], "teacher.model: owner/name is neither"),
        (["run", "CONFIG", "align.temprature=1"], "did you mean temperature?"),
        (["run", "CONFIG", "student.max_anchor_tokens=4000"], "lower one of them"),
        (["run", "CONFIG", "student.max_prompt_tokens=4"], "no prompts are left"),
        (["export", "nowhere"], "not a run directory"),
        (["ledger", "nowhere"], "not a run directory"),
        (["demo", "--task", "poetry"], "counting, writing, scenes"),
        (["demo", "seed=x"], "a seed is a whole number"),
    ],
)
def test_wrong_commands_are_one_sentence(tiny_config, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert purld(monkeypatch, *[tiny_config if a == "CONFIG" else a for a in arguments]) == 2
    assert words in sentence(capsys)
    assert not (tmp_path / "runs").exists()


def test_check_shows_the_plan_and_writes_nothing(tiny_config, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    assert purld(monkeypatch, "check", tiny_config, "--run-dir", run) == 0
    shown = capsys.readouterr().out
    for words in ("16 for training, 8 held out", "Stage II: 6 steps of 2 prompts × 3 candidates", "answers come from"):
        assert words in shown
    assert not run.exists()


def test_what_is_left_out_or_cut_is_counted_and_said(tiny_config, tmp_path, monkeypatch, capsys):
    rows = (tmp_path / "prompts.jsonl").read_text().splitlines()
    (tmp_path / "prompts.jsonl").write_text(
        "\n".join([*rows, rows[0], json.dumps({"prompt": "many words " * 300})]) + "\n"
    )
    assert purld(monkeypatch, "anchors", tiny_config, "--run-dir", tmp_path / "run") == 0
    said = capsys.readouterr().err
    assert "1 rows repeat a prompt" in said
    assert "1 of 17 training prompts have more than 256 tokens" in said
    cut = ["student.max_anchor_tokens=4", "--run-dir", tmp_path / "other"]
    assert purld(monkeypatch, "anchors", tiny_config, *cut) == 0
    assert purld(monkeypatch, "sft", tiny_config, *cut) == 0
    assert "16 anchors were cut at 4 tokens" in capsys.readouterr().err
