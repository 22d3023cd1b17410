"""Test verdicts from a file: missing questions are written out, and the same command resumes once they are answered."""

import json
import sys

import pytest
import yaml

from purld.cli import main
from purld.evaluation.judge import ASKED_AGAIN
from purld.runs.files import read_json, read_rows
from purld.runs.run_dir import RunDir


def purld(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["purld", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code or 0


@pytest.fixture
def judged_config(tiny_config, tmp_path):
    """An SFT-only run against the answer file, judged by a file of verdicts that does not exist yet."""
    values = yaml.safe_load(tiny_config.read_text())
    values["align"] = {"method": "sft"}
    values["evaluate"] |= {
        "judge": {"kind": "file", "path": str(tmp_path / "verdicts.jsonl")},
        "opponent": {"kind": "file", "path": str(tmp_path / "answers.jsonl")},
    }
    tiny_config.write_text(yaml.safe_dump(values))
    return tiny_config


@pytest.mark.usefixtures("no_figures")
def test_a_file_of_verdicts_from_first_questions_to_win_rates(judged_config, tmp_path, monkeypatch, capsys):
    run = RunDir(tmp_path / "run")
    assert purld(monkeypatch, "run", judged_config, "--run-dir", run.path) == 2
    asked = read_rows(run.to_judge)
    assert 16 < len(asked) <= 32  # two models, eight prompts, both orders; where the models agree, only once
    assert f"has no verdict on {len(asked)} of {len(asked)} pairs" in capsys.readouterr().err
    assert "=== Response B ===" in asked[0]["question"]
    assert "evaluate" not in run.finished_stages()

    verdicts = tmp_path / "verdicts.jsonl"
    letters = ["A", "B", "T", "no idea"] * 4 + ["T"] * (len(asked) - 16)
    filled = [row | {"answer": letter} for row, letter in zip(asked, letters, strict=True)]
    verdicts.write_text("".join(json.dumps(row) + "\n" for row in filled[:-2]))
    assert purld(monkeypatch, "run", judged_config, "--run-dir", run.path) == 2
    assert f"has no verdict on 2 of {len(asked)} pairs" in capsys.readouterr().err
    assert read_rows(run.to_judge) == asked[-2:]

    verdicts.write_text("".join(json.dumps(row) + "\n" for row in filled))
    assert purld(monkeypatch, "run", judged_config, "--run-dir", run.path) == 0
    assert not run.to_judge.exists()
    rows = read_rows(run.verdicts("base"))
    # A with the model first is a win, and B in the other order; then a tie and a text that is no verdict.
    assert [row["outcome"] for row in rows[:4]] == ["win", "win", "tie", "unjudged"]
    assert rows[3]["raw"] == "no idea"
    assert ASKED_AGAIN not in rows[3]["raw"]  # a file is not asked again
    metrics = read_json(run.results)["models"]["base"]
    assert (metrics["judged"], metrics["unjudged"], metrics["asked_again"]) == (8, 4, 0)
    assert metrics["win_rate"] == pytest.approx((4 * 1.0 + 4 * 0.5) / 8)
    assert read_json(run.results)["difference"]["sft - base"]["judged_both"] == 8
