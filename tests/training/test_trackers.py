"""Trackers are told what metrics.jsonl is told, a run per stage; without them nothing is."""

import importlib.util
import os
import sys
from types import SimpleNamespace
from typing import ClassVar

import pytest
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from purld.cli import main
from purld.runs.files import read_rows
from purld.runs.run_dir import RunDir
from purld.training import trackers
from purld.training.trackers import check_trackers, stage_tracking, tracker_arguments


class Recorder(TrainerCallback):
    """In the place of a tracker's callback."""

    heard: ClassVar = []

    def on_log(self, args, state, control, logs=None, **_):
        self.heard.append((args.run_name, state.global_step, dict(logs)))


def test_both_stages_report_under_their_own_names(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "trackio", Recorder)
    monkeypatch.setattr(trackers, "_PACKAGES", {"trackio": ("json",)})
    monkeypatch.setattr(Recorder, "heard", [])
    run = RunDir(tmp_path / "clinic")
    for stage in ("anchors", "sft", "align"):
        arguments = ["purld", stage, str(tiny_config), "report_to=[trackio]", "--run-dir", str(run.path)]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as stopped:
            main()
        assert not stopped.value.code
    assert {name for name, *_ in Recorder.heard} == {"clinic-sft", "clinic-align"}
    assert any("loss" in logs for name, _, logs in Recorder.heard if name == "clinic-sft")
    told = [(step, logs["objective"]) for _, step, logs in Recorder.heard if "objective" in logs]
    logged = [row for row in read_rows(run.metrics) if row["stage"] == "align"]
    assert told == [(row["step"], row["objective"]) for row in logged]


def test_wandb_is_closed_after_a_stage_also_when_it_fails(tmp_path, monkeypatch):
    closed = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(finish=lambda: closed.append(1)))
    with stage_tracking(["wandb"], RunDir(tmp_path), "sft"):
        assert closed == []
    with pytest.raises(RuntimeError), stage_tracking(["wandb"], RunDir(tmp_path), "align"):
        raise RuntimeError
    assert closed == [1, 1]


def test_a_tracker_that_is_not_there_is_said_before_anything_starts(tiny_config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    arguments = ["run", str(tiny_config), "report_to=[mlflow]", "--run-dir", str(tmp_path / "r")]
    monkeypatch.setattr(sys, "argv", ["purld", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "report_to: mlflow is not installed" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_none_are_needed_where_none_are_named(tmp_path):
    check_trackers([])
    assert tracker_arguments([], RunDir(tmp_path), "sft")["report_to"] == "none"


def test_tensorboard_writes_below_the_run_and_where_the_user_says(tmp_path, monkeypatch):
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    with stage_tracking(["tensorboard"], RunDir(tmp_path), "sft"):
        assert os.environ["TENSORBOARD_LOGGING_DIR"] == str(tmp_path / "tensorboard" / "sft")
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "/elsewhere")
    with stage_tracking(["tensorboard"], RunDir(tmp_path), "sft"):
        assert os.environ["TENSORBOARD_LOGGING_DIR"] == "/elsewhere"
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == "/elsewhere"
