"""Test `purld compare` on runs whose answers are written by hand."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import pytest
import yaml

from purld.cli import main
from purld.display.progress import Reporter
from purld.errors import UserError
from purld.evaluation.recorded import read_recorded_answers
from purld.pipeline.compare import compare_runs
from purld.records import Generation, Prompt, Verdict
from purld.runs.files import read_rows, write_rows
from purld.runs.run_dir import RunDir

PROMPTS = [Prompt.from_text(f"Question {i}?", reference=str(i)) for i in range(20)]
OPPONENT = {"kind": "file", "path": "opponent.jsonl"}


@pytest.fixture
def evaluated(tmp_path, tiny_config):
    """Return a function that writes an evaluated run: which prompts are right, and which are won."""

    def write(name, right, prompts=PROMPTS, wins=None, opponent="them", judge="verdicts.jsonl", **evaluate):
        run = RunDir(tmp_path / name)
        values = yaml.safe_load(tiny_config.read_text())
        values["data"] = {"prompts": str(tmp_path / "pool.jsonl"), "eval_prompts": str(tmp_path / "held.jsonl")}
        if wins is not None:
            evaluate |= {"judge": {"kind": "file", "path": str(tmp_path / judge)}, "opponent": OPPONENT}
        values["evaluate"] = evaluate
        run.path.mkdir()
        run.config.write_text(yaml.safe_dump(values))
        rows = [
            asdict(Generation(p.id, 0, f"{name} says {n}", 4, True)) | {"prompt": p.question, "correct": n in right}
            for n, p in enumerate(prompts)
        ]
        write_rows(run.generations("ldl_grpo"), rows)
        if wins is not None:
            outcomes = ["win" if n in wins else "loss" for n in range(len(prompts))]
            verdicts = [Verdict(p.id, 0, outcome, "", True) for p, outcome in zip(prompts, outcomes, strict=True)]
            write_rows(run.verdicts("ldl_grpo"), map(asdict, verdicts))
            write_rows(run.opponent, [{"prompt_id": p.id, "text": opponent} for p in prompts])
        run.finish("evaluate", 1.0)
        return run.path

    pool = [{"prompt": "Another?", "reference": "1"}]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pool))
    held = [{"prompt": p.question, "reference": p.reference} for p in PROMPTS]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held))
    return write


def run_command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["purld", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code or 0


def test_the_accuracy_of_both_and_their_paired_difference(evaluated, monkeypatch, capsys):
    """A is right on 0-15, B on 0-9: +0.3, and McNemar's p for 6 against 0 is 2/64 = 0.03125."""
    a, b = evaluated("better", range(16)), evaluated("worse", range(10))
    assert run_command(monkeypatch, "compare", a, b) == 0
    shown = capsys.readouterr().out
    assert "A: better (LDL-GRPO)" in shown
    assert "0.800" in shown and "0.500" in shown and "+0.300" in shown and "0.0312" in shown
    assert "A is better than B, sampled and greedy: sampled, 80.0% right answers against 50.0%, a difference" in shown
    comparison = compare_runs(a, b, judge=False, reporter=Reporter())
    assert comparison.difference["accuracy"] == pytest.approx(0.3)
    assert comparison.difference["accuracy_p"] == pytest.approx(2 / 64, rel=1e-3)
    back = compare_runs(b, a, judge=False, reporter=Reporter())
    assert back.difference["accuracy"] == -comparison.difference["accuracy"]


def test_prompts_pair_by_content_and_not_by_position(evaluated):
    a = evaluated("a", {0, 1, 2})
    b = evaluated("b", {19, 18, 17}, prompts=PROMPTS[::-1])  # the same prompts in reverse order
    comparison = compare_runs(a, b, judge=False, reporter=Reporter())
    assert comparison.difference["accuracy"] == 0
    assert comparison.difference["accuracy_ci"] != [0, 0]
    assert comparison.difference["accuracy_p"] == 1.0


def test_other_prompts_are_refused_in_one_sentence(evaluated, monkeypatch, capsys):
    a, b = evaluated("a", {0}), evaluated("b", {0}, prompts=PROMPTS[:18])
    assert run_command(monkeypatch, "compare", a, b) == 2
    said = capsys.readouterr().err
    assert "its held-out prompts are not those of" in said and "(2 are missing, 0 are others)" in said
    assert said.count("\n") == 1


def test_a_run_that_was_not_evaluated_is_refused(evaluated, tmp_path):
    a, b = evaluated("a", {0}), evaluated("b", {0})
    RunDir(b).manifest.unlink()
    with pytest.raises(UserError, match="evaluate is not finished"):
        compare_runs(a, b, judge=False, reporter=Reporter())
    with pytest.raises(UserError, match="not a run directory"):
        compare_runs(a, tmp_path / "none", judge=False, reporter=Reporter())


def test_win_rates_are_compared_before_the_same_judge_and_opponent_alone(evaluated):
    a, b = evaluated("a", {0}, wins=range(15)), evaluated("b", {0}, wins=range(5))
    comparison = compare_runs(a, b, judge=False, reporter=Reporter())
    assert comparison.difference["win_rate"] == 0.5
    assert comparison.difference["judged_both"] == 20
    assert comparison.notes == ()
    other = evaluated("other", {0}, wins=range(5), opponent="somebody else")
    comparison = compare_runs(a, other, judge=False, reporter=Reporter())
    assert "win_rate" not in comparison.difference
    assert "different opponents" in comparison.notes[0]
    strict = evaluated("strict", {0}, wins=range(5), both_orders=False)
    assert "different judges" in compare_runs(a, strict, judge=False, reporter=Reporter()).notes[0]


def test_judges_of_one_name_at_two_addresses_are_noted(evaluated):
    """They may be two models; a judge that moved is one, so the win rates stay."""
    a, b = evaluated("a", {0}, wins=range(15)), evaluated("b", {0}, wins=range(5))
    for path, host in ((a, "one"), (b, "two")):
        values = yaml.safe_load(RunDir(path).config.read_text())
        values["evaluate"]["judge"] = {"kind": "openai", "base_url": f"https://{host}.example/v1", "model": "judge"}
        RunDir(path).config.write_text(yaml.safe_dump(values))
    comparison = compare_runs(a, b, judge=False, reporter=Reporter())
    assert comparison.difference["win_rate"] == 0.5
    assert "at different addresses: https://one.example/v1 and https://two.example/v1" in comparison.notes[0]


def test_the_thinking_of_an_opponent_is_no_part_of_its_length(evaluated):
    found = []
    for text in ("them", "<think>I wonder what is wanted here.</think>them"):
        wins = {"a": range(15), "b": range(5)}
        a, b = (evaluated(f"{name}{len(found)}", {0}, wins=wins[name], opponent=text) for name in wins)
        found.append(compare_runs(a, b, judge=False, reporter=Reporter()).difference)
    first, second = found
    assert first == second and "lc_win_rate" in first


def test_answers_drawn_differently_are_noted(evaluated):
    a, b = evaluated("a", {0}), evaluated("b", {0}, temperature=0.5)
    assert "evaluate.temperature 1.0 and 0.5" in compare_runs(a, b, judge=False, reporter=Reporter()).notes[0]


def test_head_to_head_before_the_judge_of_a(evaluated, tmp_path, monkeypatch, capsys):
    """The judge is a file of verdicts; A's answer is better on the first 15 prompts."""
    a, b = evaluated("a", {0}, wins=[]), evaluated("b", {0}, wins=[])
    assert run_command(monkeypatch, "compare", a, b, "--judge") == 2
    assert "has no verdict on 40 of 40 pairs" in capsys.readouterr().err
    asked = read_rows(RunDir(a).to_judge)
    filled = []
    for index, row in enumerate(asked):
        first = row["question"].index("a says") < row["question"].index("b says")
        filled.append(row | {"answer": "A" if first == (index // 2 < 15) else "B"})
    (tmp_path / "verdicts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in filled))
    assert run_command(monkeypatch, "compare", a, b, "--judge") == 0
    assert "Head to head A wins 0.750" in capsys.readouterr().out


def test_without_a_judge_there_is_none_to_ask(evaluated):
    a, b = evaluated("a", {0}), evaluated("b", {0})
    with pytest.raises(UserError, match="names no judge"):
        compare_runs(a, b, judge=True, reporter=Reporter())


def test_several_samples_and_greedy_answers_are_read_as_they_were_written(tmp_path):
    run = RunDir(tmp_path)
    rows = [
        asdict(Generation(p, s, "x", 1, True)) | {"correct": (p, s) == ("q", 1)} for p in ("p", "q") for s in (0, 1)
    ]
    write_rows(run.generations("sft"), rows)
    write_rows(run.generations("sft.greedy"), [row | {"correct": True} for row in rows if row["sample"] == 0])
    model = read_recorded_answers(run, "sft").to_evaluated_model()
    assert model.correct.tolist() == [[False, False], [False, True]]
    assert model.greedy_correct.tolist() == [[True], [True]]
    assert [(g.prompt_id, g.sample) for g in model.generations] == [(r["prompt_id"], r["sample"]) for r in rows]
