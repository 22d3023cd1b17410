"""Test sweeps: what runs share, what they buy, and what a failure leaves."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from command_line import purld
from forked import NO_FIGURES, ForkedPopen

from purld.clients.folder import FolderLedgers
from purld.clients.ledger import CallResult, Caps, Ledger, Request, Usage, WorstCase
from purld.config.load import load_config
from purld.display.progress import Reporter
from purld.errors import UserError
from purld.pipeline import sweep
from purld.pipeline.pipeline import Pipeline
from purld.pipeline.sweep import plan_sweep, share_stage_one
from purld.runs.files import read_json, read_rows, write_rows
from purld.runs.run_dir import RunDir


def test_a_grid_is_every_combination_in_order(tiny_config, tmp_path):
    cells = plan_sweep(tiny_config, ["align.tau=0.6,1.2", "student.lora=null,{r: 2}", "seed=3"], tmp_path / "grid")
    assert [cell.name for cell in cells] == [
        "tau=0.6,lora=null,seed=3",
        "tau=0.6,lora=_r_2_,seed=3",
        "tau=1.2,lora=null,seed=3",
        "tau=1.2,lora=_r_2_,seed=3",
    ]
    assert cells[1].config.student.lora.r == 2
    assert cells[2].config.align.tau == 1.2
    assert cells[0].family == cells[2].family != cells[1].family
    assert not (tmp_path / "grid").exists()


def test_a_finished_run_is_known_by_the_configuration_that_it_wrote(tiny_config, tmp_path):
    (cell,) = plan_sweep(tiny_config, ["align.score=auto"], tmp_path)
    assert not cell.finished
    Pipeline(load_config(tiny_config, cell.overrides), cell.run, Reporter()).execute(["anchors"])
    cell.run.finish("report", 0.0)
    assert cell.finished


@pytest.mark.parametrize(
    ("key", "same"),
    [
        ("align.beta=0.1", True),
        ("evaluate.samples=3", True),
        ("sft.epochs=1", False),
        ("seed=5", False),
        ("data.max_prompts=3", False),
    ],
)
def test_a_family_shares_all_that_comes_before_stage_two(tiny_config, tmp_path, key, same):
    (plain,), (other,) = (plan_sweep(tiny_config, [grid], tmp_path) for grid in ("align.beta=0.01", key))
    assert (plain.family == other.family) == same


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        (["align.tau"], "write key.path=value,value"),
        (["align.tau="], "write key.path=value,value"),
        (["align.tau=0.6,[1"], "write key.path=value,value"),
        (["align.tau=0.6,0.6"], "twice"),
        (["align.tau=0.6", "align.tau=0.9"], "twice"),
        (["align.taus=0.6"], "did you mean tau?"),
        (["align.tau=0.6,-1"], "greater than 0"),
    ],
)
def test_a_wrong_grid_is_one_sentence_before_anything_runs(tiny_config, tmp_path, grid, words):
    with pytest.raises(UserError, match=words):
        plan_sweep(tiny_config, grid, tmp_path)


def test_sharing_links_weights_and_ends_with_the_manifest(tmp_path):
    source, target = RunDir(tmp_path / "a"), RunDir(tmp_path / "b")
    source.sft.mkdir(parents=True)
    (source.sft / "model.safetensors").write_bytes(b"weights")
    write_rows(source.anchors, [{"prompt_id": "p", "text": "t"}])
    write_rows(source.metrics, [{"stage": "sft", "step": 1}, {"stage": "align", "step": 1}])
    with Ledger(source.ledger) as ledger:
        request = Request("http://x", "m", "{}", "p")
        call = ledger.reserve(request, "teacher", 1, 0.0, Caps())
        ledger.mark_sent(call)
        ledger.settle(call, CallResult("answered", "t"))
    source.finish("anchors", 2.0, teacher={"calls": 1})
    source.finish("sft", 3.0)
    target.sft.mkdir(parents=True)
    (target.sft / "torn").touch()  # left by a copy that was killed
    share_stage_one(source, target)
    assert target.finished_stages() == {
        "anchors": {"seconds": 2.0, "teacher": {"calls": 1}, "shared_from": "a"},
        "sft": {"seconds": 3.0, "shared_from": "a"},
    }
    assert target.begun_stages() == {"anchors", "sft"}
    assert [path.name for path in target.sft.iterdir()] == ["model.safetensors"]
    assert (target.sft / "model.safetensors").samefile(source.sft / "model.safetensors")
    assert read_rows(target.metrics) == [{"stage": "sft", "step": 1}]
    with Ledger(target.ledger) as ledger:
        assert ledger.find_result(request.key).text == "t"
        assert ledger.booked_spend("teacher").calls == 1  # it counts towards the caps of the copy too


def test_what_the_leader_paid_for_verdicts_and_scores_is_not_charged_to_a_new_run(tmp_path):
    source, target = RunDir(tmp_path / "a"), RunDir(tmp_path / "b")
    asked = {role: Request("http://x", "m", f'"{role}"', role) for role in ("teacher", "opponent", "scorer", "judge")}
    source.sft.mkdir(parents=True)
    with Ledger(source.ledger) as ledger:
        for role, request in asked.items():
            call = ledger.reserve(request, role, 9, 0.0, Caps())
            ledger.mark_sent(call)
            ledger.settle(call, CallResult("answered", f"to the {role}", usage=Usage(5, 1, 0.5)))
        waiting = WorstCase(Request("http://x", "m", '"waiting"', "p"), 9, 0.0)
        batch = ledger.reserve_batch([waiting], "judge", "http://x", Caps(), lambda result: True)
        ledger.mark_batch_sent(batch.batch, "file")
    source.finish("anchors", 2.0)
    source.finish("sft", 3.0)
    share_stage_one(source, target)
    assert b"to the judge" not in target.ledger.read_bytes()
    with Ledger(target.ledger, FolderLedgers(target.ledger)) as ledger:
        assert ledger.open_batches() == []
        assert ledger.booked_spend("judge").calls == 0
        assert ledger.booked_spend("teacher").calls == 2  # for the anchors, held-out ones included
        assert {role: ledger.totals(role)["cost"] for role in asked} == {
            "teacher": 0.5,
            "opponent": 0.5,
            "scorer": 0.0,
            "judge": 0.0,
        }
        for role in ("scorer", "judge"):  # paid for already, so no call is needed, and no cap keeps it from being used
            assert ledger.claim(asked[role], role, 9, 0.0, Caps(max_calls=0)) is None
            assert ledger.find_result(asked[role].key).text == f"to the {role}"
            assert ledger.totals(role)["calls"] == 0
    with Ledger(source.ledger) as ledger:
        assert ledger.booked_spend("judge").calls == 2  # the leader's own ledger stays as it is


@pytest.fixture
def testbed_config(tiny_config, monkeypatch):
    """The tiny run with a teacher behind a real endpoint, capped at the 16 calls that it needs."""
    from purld.testbed.server import TestbedServer

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("KEY", "testbed")
    with TestbedServer(api_key="testbed", port=0) as server:
        values = yaml.safe_load(tiny_config.read_text())
        endpoint = {"kind": "openai", "base_url": server.base_url, "model": "testbed-teacher", "api_key_env": "KEY"}
        values["teacher"] = endpoint | {"max_calls": 16}
        values["align"] |= {"steps": 2}
        values["sft"] |= {"epochs": 1}
        values["evaluate"] |= {"samples": 1}
        tiny_config.write_text(yaml.safe_dump(values))
        yield tiny_config


def calls(run: RunDir) -> int:
    with sqlite3.connect(run.ledger) as db:
        return db.execute("SELECT COUNT(*) FROM calls").fetchone()[0]


def test_a_sweep_buys_each_anchor_once_trains_stage_one_once_and_goes_on(testbed_config, tmp_path, monkeypatch, capsys):
    """A sweep over two values of tau; the same command again changes nothing."""
    forks = SimpleNamespace(Popen=ForkedPopen, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT)
    monkeypatch.setattr(sweep, "subprocess", forks)
    monkeypatch.setattr(sweep, "_PURLD", (*sweep._PURLD[:2], NO_FIGURES + sweep._PURLD[2]))
    folder = tmp_path / "sweep"
    arguments = ["sweep", testbed_config, "align.tau=0.6,1.2", "--jobs", 2, "--run-dir", folder]
    assert purld(monkeypatch, *arguments) == 0
    shown = capsys.readouterr().out
    assert "align.tau" in shown and "1.2" in shown and "report.html" in shown
    first, second = (RunDir(folder / f"tau={tau}") for tau in (0.6, 1.2))
    assert second.finished_stages()["sft"]["shared_from"] == "tau=0.6"
    assert (second.sft / "model.safetensors").samefile(first.sft / "model.safetensors")
    assert calls(first) == calls(second) == 16  # the cap: one more call would have been refused
    summary = read_json(folder / "sweep.json")
    assert [row["values"] for row in summary["runs"]] == [{"align.tau": 0.6}, {"align.tau": 1.2}]
    assert {"accuracy", "accuracy_ci"} <= summary["runs"][0]["metrics"].keys()
    assert read_json(second.results)["score_quality"]["n"] == 12  # two steps of two prompts with three candidates
    assert "Accuracy against align.tau" in (folder / "report.html").read_text()

    before = {path: path.stat().st_mtime_ns for path in folder.rglob("manifest.json")}
    assert purld(monkeypatch, *arguments) == 0
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("manifest.json")}


def test_each_run_names_the_model_that_it_is_compared_with(capsys):
    """A sweep over methods has runs whose final model is Stage I's; their difference is to the base model."""
    rows = [
        {"values": {"align.method": method}, "model": method, "metrics": {"accuracy": 0.5}, "own_score": {},
         "difference": {"to": parent, "accuracy": gain, "accuracy_ci": [gain, gain]}}
        for method, parent, gain in (("sft", "base", 0.2), ("ldl_grpo", "sft", 0.04))
    ]  # fmt: skip
    sweep._print_table(rows)
    mixed = capsys.readouterr().out
    assert "minus the model before it" in mixed
    assert "+0.200 [+0.200, +0.200] (Base)" in mixed and "+0.040 [+0.040, +0.040] (SFT)" in mixed
    sweep._print_table(rows[1:])
    alike = capsys.readouterr().out
    assert "minus SFT" in alike and "(SFT)" not in alike


def test_what_failed_is_one_sentence_about_the_first_of_the_grid(tiny_config, tmp_path, monkeypatch, capsys):
    """The second run fails at once and the first one later, each with its own message.

    A process that fails in this way stands in for purld itself.
    """
    folder = tmp_path / "sweep"
    for tau in (0.6, 1.2):
        RunDir(folder / f"tau={tau}").finish("sft", 1.0)
    fails = (
        "import sys, time; slow = 'align.tau=0.6' in sys.argv; time.sleep(slow); print('purld: slow', slow); exit(2)"
    )
    monkeypatch.setattr(sweep, "_PURLD", (sys.executable, "-c", fails))
    arguments = ["sweep", tiny_config, "align.tau=0.6,1.2", "--jobs", 2, "--run-dir", folder]
    assert purld(monkeypatch, *arguments) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("purld: ")]
    assert said == ["purld: 2 of 2 runs failed; tau=0.6: slow True."]
    assert read_json(folder / "sweep.json")["failed"] == {"tau=0.6": "slow True", "tau=1.2": "slow False"}


@pytest.mark.slow
def test_other_seeds_ask_for_no_anchor_that_is_there(testbed_config, tmp_path, monkeypatch):
    folder = tmp_path / "sweep"
    testbed_config.write_text(yaml.safe_dump(yaml.safe_load(testbed_config.read_text()) | {"align": {"method": "sft"}}))
    assert purld(monkeypatch, "sweep", testbed_config, "seed=0,1", "--run-dir", folder) == 0
    runs = [RunDir(path) for path in sorted(Path(folder).glob("seed=*"))]
    assert len(runs) == 2
    assert "shared_from" not in runs[1].finished_stages()["sft"]  # another seed is another Stage I
    assert [calls(run) for run in runs] == [16, 16]
    assert [len(read_rows(run.anchors)) for run in runs] == [16, 16]
    assert json.loads((folder / "sweep.json").read_text())["runs"][0]["model"] == "sft"
