"""`purld status`: where a run stands, from its files alone, while it runs and after it was stopped."""

import io
import json
import os
import shlex
import sys

import pytest
import yaml
from rich.console import Console

from purld.cli import main
from purld.clients.ledger import CallResult, Caps, Ledger, Request, Usage
from purld.config.load import load_config, parse_config
from purld.display.progress import Reporter
from purld.errors import UserError
from purld.methods.table import METHODS
from purld.pipeline import pipeline
from purld.pipeline.pipeline import Pipeline
from purld.pipeline.probe import takes_probe
from purld.pipeline.stage_progress import describe_seconds
from purld.pipeline.status import read_status, takes_part
from purld.runs.files import write_json, write_rows
from purld.runs.lock_holder import find_lock_holder
from purld.runs.open import final_model
from purld.runs.run_dir import STAGES, RunDir

CONFIG = {
    "student": {"model": "m"},
    "data": {"prompts": "p.jsonl"},
    "teacher": {
        "kind": "openai", "base_url": "http://127.0.0.1:9/v1", "model": "t", "max_calls": 40, "max_cost": 2.0,
        "input_price": 1.0,
    },
    "evaluate": {"samples": 2},
}  # fmt: skip


@pytest.fixture
def run(tmp_path) -> RunDir:
    """A run of 30 prompts whose anchors are bought."""
    run = RunDir(tmp_path / "my run")
    run.path.mkdir()
    run.config.write_text(yaml.safe_dump(parse_config(CONFIG, "c").model_dump(mode="json")))
    run.begin("anchors", prompts=30, held_out=10)
    with Ledger(run.ledger) as ledger:
        for text in "abc":
            request = Request("http://a/v1", "t", json.dumps({"messages": text}), prompt_id=text)
            call = ledger.reserve(request, "teacher", 9, 0.5, Caps())
            if text != "c":
                ledger.mark_sent(call)
                ledger.settle(call, CallResult("answered", "yes", usage=Usage(1000, 200, 0.25)))
    return run


def finish_anchors(run):
    run.finish("anchors", 3.2, pool="x", teacher={"prompts": 30, "answered": 29, "calls": 3, "cost": 0.5})


def stage_of(run, name, now=0.0):
    return next(stage for stage in read_status(run, now).stages if stage.name == name)


def shown(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["purld", "status", str(run.path)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_a_collection_that_was_stopped(run, monkeypatch, capsys):
    said = shown(run, monkeypatch, capsys)
    assert "my run: not running, last wrote" in said.splitlines()[0]
    assert "  anchors   stopped  2 of 30 prompts answered, 1 under way\n  sft       to do\n" in said
    assert (
        "  teacher: 2 calls of at most 40 (5%), 2,400 tokens, cost 0.5000 of at most 2.0 (25%), at most 0.5000" in said
    )
    assert f"purld run {shlex.quote(str(run.config))} --run-dir {shlex.quote(str(run.path))}" in said


def test_a_stage_that_is_running_while_its_process_holds_the_lock(run):
    finish_anchors(run)
    with run.lock():
        run.begin("sft", prompts=30, held_out=10)
        assert stage_of(run, "sft").detail == "no step logged yet"
        run.note_facts("sft", steps=8)
        run.log_metrics("sft", 1, {"eval_loss": 2.5})
        run.log_metrics("sft", 2, {"loss": 1.25, "learning_rate": 1e-4})
        started = run.begin_facts("sft")["started"]
        stage = stage_of(run, "sft", started + 60)
        assert (stage.state, stage.detail) == ("running", "step 2 of 8, eval loss 2.5, loss 1.25")
        assert stage.time == "began 1 min ago, about 3 min left"
        status = read_status(run, started + 60)
        assert "my run: running (process " in status.headline and status.commands == [
            f"purld watch {shlex.quote(str(run.path))}"
        ]
    assert (stage := stage_of(run, "sft", started + 60)).state == "stopped" and stage.time == ""


def test_a_run_that_its_probe_stopped_is_not_sent_into_the_same_end(run):
    finish_anchors(run)
    run.finish("sft", 1.0)
    rows = [{"name": "expected", "weakness": "the labels are uniform"}, {"name": "in_context"}]
    run.finish("probe", 1.0, chosen="expected", verdict="expected carries no signal.", scorers=rows)
    measure, go_on = read_status(run, 0.0).commands
    assert measure.startswith("purld probe ") and go_on.endswith(
        "align.score=NAME, with one that tells candidates apart"
    )
    run.finish("probe", 1.0, chosen="in_context", verdict="in_context tells candidates apart.", scorers=rows)
    (command,) = read_status(run, 0.0).commands
    assert command.startswith("purld run ")


def test_a_resumed_stage_has_no_pace(run):
    finish_anchors(run)
    run.begin("sft", prompts=30, held_out=10)
    run.note_facts("sft", steps=8)
    run.log_metrics("sft", 2, {"loss": 1.25})
    started = run.begin_facts("sft")["started"]
    with run.lock():
        os.utime(run.path / ".lock", (started + 30, started + 30))
        assert stage_of(run, "sft", started + 60).time == "began 1 min ago"


def test_an_evaluation_under_way_counts_answers(run):
    for stage in ("anchors", "sft", "probe", "align"):
        run.begin(stage)
        run.finish(stage, 1.0)
    run.begin("evaluate", prompts=30, held_out=10)
    write_rows(run.generations("base"), [{"n": n} for n in range(20)])
    write_rows(run.generations("base.greedy"), [{"n": n} for n in range(4)])
    write_rows(run.groups, [{"step": 1}])
    assert stage_of(run, "evaluate").detail == "answers: Base 20 of 20, Base greedy 4 of 10"


def test_a_finished_run_shows_its_figures_and_warnings(run, monkeypatch, capsys):
    finish_anchors(run)
    for stage in STAGES[1:]:
        run.begin(stage)
        if stage == "evaluate":
            models = {"sft": {"n": 9, "accuracy": 0.5}, "ldl_grpo": {"n": 9, "accuracy": 0.625}}
            write_json(run.results, {"models": models, "warnings": ["the judge tosses a coin."]})
        run.finish(stage, 75.0)
    (run.path / "purld-error-1.log").touch()
    said = shown(run, monkeypatch, capsys)
    assert said.splitlines()[0] == f"{run.path}: finished"
    assert "anchors   done     29 of 30 prompts answered  3 s" in said and "align     done     1 min" in said
    assert "Results\n  SFT → LDL-GRPO, on 9 held-out prompts\n  accuracy: 0.500 → 0.625\n" in said
    assert "Warnings\n  the judge tosses a coin.\n  an error ended a command; its traceback is in" in said
    assert f"purld export {shlex.quote(str(run.path))}" in said


def test_runs_of_other_versions_and_damaged_ones(run):
    run.config.write_text("student: {model: m}\nnew_section: {}\n")
    status = read_status(run, 0.0)
    assert [stage.name for stage in status.stages] == ["anchors"] and "new_section" in status.warnings[0]
    write_json(run.manifest, {"finished": {}, "begun": {"anchors": {}}})  # as older versions wrote it
    assert read_status(run, 0.0).stages[0].detail == "2 prompts answered, 1 under way"
    run.manifest.write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json: is damaged"):
        read_status(run, 0.0)


def test_the_stages_are_those_of_the_pipeline(tmp_path):
    assert pipeline.STAGES == STAGES
    for method in METHODS:
        config = parse_config(CONFIG | {"align": {"method": method}}, "c")
        run = RunDir(tmp_path / "none")
        assert takes_part("probe", config, run) == takes_probe(config.align), method
        assert takes_part("align", config, run) == (final_model(method).stage == "align"), method


def test_the_command_that_goes_on_takes_the_run_as_its_own(tiny_config, tmp_path, monkeypatch, capsys):
    run = RunDir(tmp_path / "run")
    Pipeline(load_config(tiny_config), run, Reporter(Console(file=io.StringIO()))).execute(["anchors"])
    (command,) = read_status(run, 0.0).commands
    words = shlex.split(command)
    assert words[:2] == ["purld", "run"]
    monkeypatch.setattr(sys, "argv", ["purld", "anchors", *words[2:]])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0 and "done before" in capsys.readouterr().err


def test_the_holder_of_a_lock_is_found_without_taking_it(tmp_path):
    run = RunDir(tmp_path)
    assert find_lock_holder(tmp_path / ".lock") == 0
    with run.lock():
        assert find_lock_holder(tmp_path / ".lock") in (os.getpid(), None)
    assert find_lock_holder(tmp_path / ".lock") in (0, None)
    (tmp_path / ".lock").write_text("7 another-machine\n")
    assert find_lock_holder(tmp_path / ".lock") is None


@pytest.mark.parametrize(("seconds", "words"), [(-1, "0 s"), (59.4, "59 s"), (61, "1 min"), (3900, "1 h 5 min")])
def test_times(seconds, words):
    assert describe_seconds(seconds) == words
