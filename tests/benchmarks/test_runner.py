"""The miniature's runner: what is done is not done again, however the run ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import counted_work
import miniature
import pytest
from mini import plan
from mini.cells import Cell, stage_two_cell
from miniature import next_cell

from purld.runs.files import read_rows
from purld.runs.run_dir import RunDir

SFT = Cell("writing", 0, "test", "sft")
LDL = stage_two_cell("writing", 0, "test", "ldl_grpo", {})
OTHER = stage_two_cell("writing", 1, "test", "ldl_grpo", {})


def test_what_starts_from_a_p_sft_waits_for_it_while_others_go_on():
    cells = [LDL, OTHER]
    assert next_cell(cells, {}, set()) == SFT
    assert next_cell(cells, {}, {SFT}) == OTHER.stage_one
    assert next_cell(cells, {SFT.id: {}}, set()) == LDL
    assert next_cell(cells, {SFT.id: {}, LDL.id: {}}, {OTHER.stage_one}) is None


def test_what_failed_is_left_and_so_is_what_needs_it():
    assert next_cell([LDL, OTHER], {}, set(), {SFT.id}) == OTHER.stage_one
    assert next_cell([LDL], {}, set(), {SFT.id}) is None


def test_one_stage_one_is_not_trained_twice_at_a_time():
    """Validation and test problems are answered by the same weights."""
    validation = Cell("writing", 0, "validation", "sft")
    assert next_cell([validation], {}, {SFT}) is None


def test_the_quick_slice_has_a_setting_for_every_row_whichever_were_tuned(tmp_path):
    (tmp_path / "chosen.json").write_text(json.dumps({"writing": {"ldl_grpo": {"learning_rate": 7e-5}}}))
    tuned, untuned = (miniature.settings_on_file(tmp_path / name) for name in ("chosen.json", "none.json"))
    assert untuned == plan.middle_settings()
    assert tuned["writing"]["ldl_grpo"] == {"learning_rate": 7e-5} and tuned["counting"] == untuned["counting"]
    assert plan.main_cells(tuned, [0]) != plan.main_cells(untuned, [0])


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "fails").write_text("")
    return tmp_path


def start(out: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, counted_work.__file__, str(out)],
        env={"PYTHONPATH": ":".join(filter(None, sys.path)), "PATH": "/usr/bin:/bin"},
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell has it ignored
    )


def begun(out: Path) -> Counter[str]:
    path = out / "begun"
    return Counter(path.read_text().splitlines() if path.exists() else [])


def wait_until(true, seconds=60.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_was_stopped_goes_on_and_repeats_nothing_that_was_done(out, how):
    (out / "hold").touch()
    process = start(out)
    wait_until(lambda: len(read_rows(out / "results.jsonl")) >= 2)
    wait_until(lambda: begun(out).total() == len(read_rows(out / "results.jsonl")) + 2)
    process.send_signal(how)
    _, said = process.communicate(timeout=30)
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert said.decode().strip() == "Stopped; the same command continues from here."
    with (out / "results.jsonl").open("a") as handle:
        handle.write('{"id": "torn')
    done = {row["id"] for row in read_rows(out / "results.jsonl")}
    (out / "hold").unlink()
    time.sleep(1.5)  # the killed parent's workers notice that it is gone
    before = begun(out)
    assert start(out).wait(60) == 0
    rows = read_rows(out / "results.jsonl")
    assert sorted(row["id"] for row in rows) == sorted(cell.id for cell in counted_work.CELLS)
    again = begun(out) - before
    assert set(again) == {cell.title for cell in counted_work.CELLS if cell.id not in done}
    assert set(again.values()) == {1}


def test_a_cell_that_fails_takes_no_other_with_it(out):
    (out / "fails").write_text(counted_work.CELLS[2].title)
    process = start(out)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert said.decode().strip() == f"failed: {counted_work.CELLS[2].title}: RuntimeError: as asked"
    assert len(read_rows(out / "results.jsonl")) == 5


def test_two_do_not_work_in_one_folder(out):
    with RunDir(out).lock():
        command = [sys.executable, miniature.__file__, "--quick", "--out", out]
        found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 2 and found.stdout == ""
    assert found.stderr == f"{out}: another purld process ({os.getpid()}) is working on this run.\n"
