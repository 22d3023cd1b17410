"""Test the requests that the plan and the dry run announce against those that are sent."""

import json
import re

import pytest
import yaml
from faulty_server import hang_up, running_server
from typer.testing import CliRunner

from purld.cli import app
from purld.runs.run_dir import RunDir

HELD_OUT = ["evaluate.opponent={kind: teacher}"]


@pytest.fixture
def server():
    with running_server() as server:
        yield server


@pytest.fixture
def config(tiny_config, server):
    """The tiny run with a priced teacher behind HTTP, which is also the judge and the opponent."""
    values = yaml.safe_load(tiny_config.read_text())
    endpoint = {"kind": "openai", "base_url": server.url, "model": "m", "max_tokens_per_answer": 100}
    values["teacher"] = endpoint | {"input_price": 1.0, "output_price": 10.0, "max_cost": 9.0, "concurrency": 4}
    values["evaluate"] |= {"judge": endpoint | {"max_tokens_per_answer": 4}, "opponent": {"kind": "teacher"}}
    tiny_config.write_text(yaml.safe_dump(values))
    return tiny_config


def purld(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result


def test_the_dry_run_is_what_leaves_byte_for_byte(config, server, tmp_path):
    there = ["--run-dir", tmp_path / "run"]
    dry = purld("anchors", config, "--dry-run", *there)
    assert server.bodies == []
    assert not (tmp_path / "run").exists()
    lines = dry.stdout.splitlines()
    assert "24 requests of" in dry.stderr and "would be sent; nothing was" in dry.stderr
    purld("anchors", config, *there)
    bodies = [line[line.index('"body": ') + 8 : -1].encode() for line in lines]
    assert sorted(bodies) == sorted(server.bodies)
    rows = [json.loads(line) for line in lines]
    assert {row["url"] for row in rows} == {f"{server.url}/chat/completions"}
    assert [row["role"] for row in rows] == ["teacher"] * 16 + ["opponent"] * 8
    again = purld("anchors", config, "--dry-run", *there)
    assert again.stdout == "" and "0 requests" in again.stderr, "what the ledger can answer does not leave"
    edited = purld("anchors", config, "teacher.temperature=0.5", "--dry-run", *there)
    assert len(edited.stdout.splitlines()) == 24


def test_the_plan_bounds_what_is_then_reported(config, server, tmp_path):
    there = ["--run-dir", tmp_path / "run"]
    shown = purld("check", config, *there).stdout
    assert "teacher: 24 calls to m at" in shown and "8 of them about held-out prompts" in shown
    [bound] = [line for line in shown.splitlines() if "tokens in and 2,400 out" in line]
    read, cost = (float(number.replace(",", "")) for number in re.findall(r"at most ([\d,.]+)", bound))
    assert cost == round((read + 10 * 2400) / 1e6, 2)
    assert "judge: at most 48 calls" in shown
    assert "hard caps: max_cost 9.0" in shown and "may leave the last" not in shown
    assert "may leave the last" in purld("check", config, "teacher.max_calls=23", *there).stdout
    purld("anchors", config, *there)
    assert "teacher: 0 calls" in purld("check", config, *there).stdout


def test_the_bound_of_the_plan_is_what_the_ledger_books(config, server, tmp_path):
    """A cap equal to the plan's bound lets every call through, in any order."""
    shown = purld("check", config, "--run-dir", tmp_path / "run").stdout
    words = next(line for line in shown.splitlines() if "tokens in and" in line).replace(",", "").split()
    tokens = int(words[2]) + int(words[6])
    purld("anchors", config, f"teacher.max_tokens={tokens}", "--run-dir", tmp_path / "run")
    assert len(server.bodies) == 24


def test_one_cap_for_teacher_and_opponent(config, server, tmp_path):
    purld("anchors", config, "teacher.max_calls=18", "--run-dir", tmp_path / "run")
    assert len(server.bodies) == 18
    [answered] = [line for line in purld("ledger", tmp_path / "run").stdout.splitlines() if "answered" in line]
    assert answered.split() == ["answered", "16", "2", "0"]


def test_what_was_lost_is_sent_again_only_when_asked_and_until_it_is_trained_on(config, server, tmp_path):
    there = ["--run-dir", tmp_path / "run"]
    first = json.loads((tmp_path / "prompts.jsonl").read_text().splitlines()[0])["prompt"]
    server.script = {first: [hang_up]}
    purld("anchors", config, *there)
    assert len(server.bodies) == 24
    purld("anchors", config, *there)
    assert len(server.bodies) == 24
    assert purld("anchors", config, "--dry-run", *there).stdout == ""
    assert len(purld("anchors", config, "--dry-run", "--resend-unknown", *there).stdout.splitlines()) == 1
    purld("anchors", config, "--resend-unknown", *there)
    assert server.arrived.count(first) == 2 and len(server.bodies) == 25
    run = RunDir(tmp_path / "run")
    assert run.finished_stages()["anchors"]["teacher"]["answered"] == 16
    run.begin("sft")
    assert "done before" in purld("anchors", config, "--resend-unknown", *there).stderr


def test_a_sibling_run_has_paid(config, server, tmp_path):
    purld("anchors", config, "--run-dir", tmp_path / "runs" / "one")
    there = ["--run-dir", tmp_path / "runs" / "two"]
    assert "teacher: 0 calls" in purld("check", config, *there).stdout
    assert purld("anchors", config, "--dry-run", *there).stdout == ""
    purld("anchors", config, "sft.epochs=2", *there)
    assert len(server.bodies) == 24
    assert RunDir(tmp_path / "runs" / "two").finished_stages()["anchors"]["teacher"] == {
        "prompts": 16, "answered": 16, "calls": 0, "input_tokens": 0, "output_tokens": 0, "cost": 0.0,
    }  # fmt: skip


def test_answers_from_a_file_send_nothing_and_their_gaps_are_told(tiny_config, tmp_path):
    rows = (tmp_path / "answers.jsonl").read_text().splitlines()
    (tmp_path / "answers.jsonl").write_text("\n".join(rows[:10]))
    shown = purld("check", tiny_config, "student.max_anchor_tokens=4", "--run-dir", tmp_path / "run").stdout
    assert "answers.jsonl answers 10 of 16 prompts" in shown
    assert "10 anchors will be cut at 4 tokens (student.max_anchor_tokens)" in shown
    assert "6 × no row of the answer file matches" in shown
    assert purld("anchors", tiny_config, "--dry-run", "--run-dir", tmp_path / "run").stdout == ""
    assert not RunDir(tmp_path / "run").path.exists()


def test_a_teacher_that_judges_is_asked_about_every_candidate(config, server, tmp_path):
    judged = ["align.method=teacher_judge_grpo", "--run-dir", tmp_path / "run"]
    shown = purld("check", config, *judged).stdout
    assert "Stage II: at most 36 calls to m at" in shown and "at most 576 out" in shown
    refused = CliRunner().invoke(app, ["check", str(config), "teacher.max_calls=59", *map(str, judged)])
    assert "24 prompts and about 36 candidates, and teacher.max_calls is 59" in str(refused.exception)
    assert "Stage I and Stage II: nothing" in purld("check", config, "--run-dir", tmp_path / "run").stdout
