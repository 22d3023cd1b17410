"""Test the results that a run prints at its end."""

from __future__ import annotations

import io

from rich.console import Console

from purld.display.results import print_results
from purld.runs.files import write_json
from purld.runs.run_dir import RunDir


def shown(run: RunDir, **changes) -> str:
    models = {
        "base": {"n": 30, "accuracy": 0.1, "accuracy_ci": [0.05, 0.2], "unjudged": 0},
        "ldl_grpo": {"n": 30, "accuracy": 0.3, "accuracy_ci": [0.2, 0.4], "unjudged": 7},
    }
    difference = {"ldl_grpo - base": {"accuracy": 0.2, "accuracy_ci": [0.1, 0.31]}}
    teacher = {"prompts": 5, "answered": 4, "calls": 6, "input_tokens": 70, "output_tokens": 30, "cost": 0.0}
    write_json(run.results, {"models": models, "difference": difference, "teacher": teacher} | changes)
    out = io.StringIO()
    print_results(run, Console(file=out, width=100, highlight=False))
    return out.getvalue()


def test_rates_differences_and_spend_are_said(tmp_path):
    said = shown(RunDir(tmp_path))
    assert "0.300 [0.20, 0.40]" in said
    assert "LDL-GRPO minus Base: accuracy +0.200 [+0.100, +0.310]." in said
    assert "Teacher: 6 calls for 5 prompts, 4 usable answers, 100 tokens." in said
    assert "win rate" not in said


def test_what_a_judge_left_open_is_not_silent(tmp_path):
    assert "no verdict (left out of the rates, text kept): LDL-GRPO 7." in shown(RunDir(tmp_path))
    models = {"base": {"n": 30, "unjudged": 0}}
    assert "no verdict" not in shown(RunDir(tmp_path), models=models, difference={})


def test_only_a_reply_of_the_judge_is_called_no_verdict(tmp_path):
    reasons = {"no_opponent": 4, "max_calls": 3, "no_reply": 2}
    models = {"base": {"n": 9, "unjudged": 9, "unjudged_reasons": reasons}, "sft": {"n": 9, "unjudged": 0}}
    said = shown(RunDir(tmp_path), models=models, difference={})
    assert "no verdict" not in said and "SFT 0" not in said
    assert "as the opponent has no answer (left out of the rates): Base 4." in said
    assert "Questions that evaluate.judge.max_calls left unasked (left out of the rates): Base 3." in said
    assert "Calls to the judge that failed or were lost (left out of the rates): Base 2." in said
