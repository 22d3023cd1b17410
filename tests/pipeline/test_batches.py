"""Batches through the command line: the plan, the dry run, anchors, verdicts, a wait that is broken off, cancelling."""

from __future__ import annotations

import json
import re
import time

import pytest
import yaml
from batch_server import SECRET, running_batch_server
from faulty_server import error
from typer.testing import CliRunner

from purld.cli import app
from purld.clients import batch
from purld.clients.ledger import Caps, Ledger, Request, WorstCase
from purld.pipeline.status import read_status
from purld.runs.files import read_rows
from purld.runs.run_dir import RunDir


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(batch, "FIRST_POLL", 0.01)
    monkeypatch.setattr(batch, "LONGEST_POLL", 0.05)
    monkeypatch.setenv("TEST_KEY", SECRET)
    with running_batch_server() as server:
        yield server


@pytest.fixture
def config(tiny_config, server):
    values = yaml.safe_load(tiny_config.read_text())
    endpoint = {"kind": "openai", "base_url": server.url, "model": "m", "api_key_env": "TEST_KEY", "batch": True}
    values["teacher"] = endpoint | {"max_tokens_per_answer": 100, "input_price": 1.0, "output_price": 10.0}
    values["evaluate"] |= {"judge": endpoint | {"max_tokens_per_answer": 4}, "opponent": {"kind": "teacher"}}
    tiny_config.write_text(yaml.safe_dump(values))
    return tiny_config


def purld(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def status_of(run):
    """Return what `purld status` says of batches, sorted."""
    shown = purld("status", run).stdout
    _, _, section = shown.partition("Batches under way\n")
    return sorted(line.strip() for line in section.split("\nNext")[0].splitlines() if ": batch_" in line)


def test_from_the_plan_to_the_anchors(config, server, tmp_path):
    there = ["--run-dir", tmp_path / "run"]
    plan = purld("check", config, *there).stdout
    assert "8 of them about held-out prompts" in plan and "in batches at 50% off, answered within a day" in plan
    batched, single = re.search(r"at most ([\d.]+) in cost in batches \(([\d.]+) without\)", plan).groups()
    assert 0 < float(batched) < float(single)
    dry = [json.loads(line) for line in purld("anchors", config, "--dry-run", *there).stdout.splitlines()]
    assert {row["url"] for row in dry} == {f"{server.url}/files"} and server.routes == []

    server.store.held = True
    server.faults["retrieve"] = [error(401)]  # as if the wait were broken off
    stopped = purld("anchors", config, *there)
    assert "HTTP 401" in str(stopped.exception) and "2 batches go on" in str(stopped.exception)
    sent = [
        json.loads(line) for _, _, body in server.sent for line in body.splitlines() if line.startswith(b'{"custom')
    ]
    assert sorted(json.dumps(line["body"]) for line in sent) == sorted(json.dumps(row["body"]) for row in dry)
    assert "(teacher, 16 requests): validating" in purld("ledger", tmp_path / "run").stdout
    since, state = r"submitted 20\d\d-\d\d-\d\d \d\d:\d\d UTC \(\d+ s ago\)", "(validating|in_progress)"
    opponent, teacher = status_of(tmp_path / "run")
    assert re.fullmatch(rf"opponent: batch_\w+, 8 prompts, {since}: {state}", opponent)
    assert re.fullmatch(rf"teacher: batch_\w+, 16 prompts, {since}: {state}", teacher)
    plan = purld("check", config, *there).stdout
    assert "teacher: 0 calls" in plan and "of 8 requests (opponent) was submitted before and is collected" in plan

    server.store.held = False
    done = purld("anchors", config, *there)
    assert status_of(tmp_path / "run") == []
    assert done.exit_code == 0 and "16 answered; 0 dropped" in done.stderr
    run = RunDir(tmp_path / "run")
    assert len(read_rows(run.anchors)) == 16 and len(read_rows(run.opponent)) == 8
    assert server.routes.count("create") == 2 and set(server.executed.values()) == {1}
    assert run.finished_stages()["anchors"]["teacher"]["cost"] == pytest.approx(16 * (10 + 50) / 1e6 / 2)
    assert SECRET not in (tmp_path / "run" / "ledger.sqlite").read_bytes().decode("latin1")


def test_cancelled_by_the_command(config, server, tmp_path):
    there = ["--run-dir", tmp_path / "run"]
    server.faults["retrieve"] = [error(401)]
    purld("anchors", config, *there)
    cancelled = purld("ledger", tmp_path / "run", "--cancel-batches")
    assert len(re.findall(r"batch_\w+: cancelling", cancelled.stdout)) == 2 and cancelled.exit_code == 0
    assert purld("anchors", config, *there).exit_code == 0
    assert server.routes.count("create") == 4
    assert purld("ledger", tmp_path / "run", "--cancel-batches").stdout == "No batch is under way.\n"


@pytest.mark.slow
def test_a_whole_run_with_a_judge_in_batches(config, server, tmp_path):
    assert purld("run", config, "--run-dir", tmp_path / "run").exit_code == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["models"]["sft"]["win_rate"] is not None
    assert server.bodies == [], "not one single call"
    assert server.routes.count("create") == 3, "anchors, the opponent's answers, and all verdicts"


def test_a_judges_batch_is_named_where_the_teacher_is_a_file(tiny_config, config, server, tmp_path):
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    run.config.write_text(config.read_text())
    with Ledger(run.ledger) as ledger:
        cases = [WorstCase(Request(server.url, "m", f'{{"n": {n}}}', prompt_id=str(n)), 9, 0.5) for n in range(3)]
        reserved = ledger.reserve_batch(cases, "judge", server.url, Caps(), lambda result: True)
        assert status_of(run.path) == [], "it is not submitted yet"
        ledger.mark_batch_sent(reserved.batch, "file-1")
    (line,) = read_status(run, time.time() + 7300).batches
    assert line.startswith("judge: a batch of input file file-1, 3 verdicts, submitted ")
    assert line.endswith("(2 h 2 min ago): not known yet whether it was created")
    given = [f"teacher={{kind: file, path: {tmp_path / 'answers.jsonl'}}}", "evaluate.opponent.kind=teacher"]
    plan = purld("check", config, *given, "--run-dir", run.path).stdout
    assert "a batch of input file file-1 of 3 requests (judge) was submitted before and is collected" in plan
