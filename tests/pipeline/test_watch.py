"""`purld watch` and `--live`: the page follows the run, and neither it nor a failure of it touches the run."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from synthetic import synthetic_run

from purld.cli import main
from purld.display.progress import Reporter
from purld.pipeline import watch as module
from purld.pipeline.watch import RunWatcher, live_page, watch_run
from purld.ranks.launch import read_place
from purld.records import Prompt
from purld.report.page import LIVE_MARK
from purld.runs.files import append_rows, write_rows
from purld.runs.run_dir import RunDir


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run that is in Stage II."""
    run = synthetic_run(tmp_path / "run", held_out=0, groups=4, words=5, logged=False)
    run.results.unlink()
    for stage in ("anchors", "sft"):
        run.begin(stage)
        run.finish(stage, 1.0)
    run.begin("align")
    run.note_facts("align", steps=120)
    grow(run, 1)
    return run


def grow(run: RunDir, step: int) -> None:
    """Log a step, of which there is nothing to draw: figures are most of what a page takes."""
    append_rows(run.metrics, [{"stage": "align", "step": step, "dropped_groups": 0.0}])


def contents(run: RunDir) -> dict[str, str]:
    files = (path for path in run.path.rglob("*") if path.is_file() and path != run.report)
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def watcher(run: RunDir, said: list[str]) -> RunWatcher:
    return RunWatcher(run, run.report, 15.0, said.append)


def page(run: RunDir) -> str:
    return run.report.read_text(encoding="utf-8")


def test_the_page_follows_the_run_and_is_written_only_for_news(run: RunDir) -> None:
    said: list[str] = []
    watching = watcher(run, said)
    watching.write(15.0)
    assert "Step 1 of 120" in page(run) and 'data-every="15"' in page(run)
    run.report.write_text("as it was")
    watching.write(15.0)
    assert page(run) == "as it was", "nothing new, so nothing is written"
    grow(run, 2)
    watching.write(15.0)
    assert "Step 2 of 120" in page(run)
    assert said == [] and watching.cost > 0


def test_a_run_that_is_locked_is_watched_and_stays_as_it_is(run: RunDir) -> None:
    with run.lock():
        before = contents(run)
        watcher(run, []).write(15.0)
        assert contents(run) == before
        assert '<li class="now">Stage II</li>' in page(run)
    with run.lock():
        pass  # the watcher holds no lock either


@pytest.mark.parametrize("problem", [OSError(errno.ENOSPC, "No space left on device"), ValueError("odd")])
def test_a_page_that_cannot_be_written_is_said_once_and_tried_again(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, problem: Exception
) -> None:
    said: list[str] = []
    watching = watcher(run, said)
    real = module.write_live_page
    monkeypatch.setattr(module, "write_live_page", lambda *_: (_ for _ in ()).throw(problem))
    rounds = iter([False, False, True])
    watching.watch(lambda seconds: next(rounds))
    assert len(said) == 1 and "the run is not touched" in said[0] and str(problem.args[-1]) in said[0]
    assert not run.report.exists()
    monkeypatch.setattr(module, "write_live_page", real)
    watching.attempt(lambda: watching.write(15.0))
    assert LIVE_MARK in page(run)


def test_pages_take_a_small_share_of_a_core(run: RunDir) -> None:
    watching = watcher(run, [])
    waits: list[float] = []
    watching.cost = 3.0
    watching.watch(lambda seconds: waits.append(seconds) is None)
    assert waits == [pytest.approx(60.0)]


def test_the_last_page_does_not_load_itself_again_and_a_finished_run_has_its_report(run: RunDir) -> None:
    watching = watcher(run, [])
    watching.write(15.0)
    watching.watch(lambda seconds: True)
    assert 'http-equiv="refresh"' not in page(run) and LIVE_MARK in page(run)
    for stage in ("align", "evaluate", "report"):
        run.begin(stage)
        run.finish(stage, 1.0)
    watching.watch(lambda seconds: True)
    assert LIVE_MARK not in page(run), "the report"
    run.report.write_text("a report that the run has written itself")
    watching.watch(lambda seconds: True)
    assert page(run) == "a report that the run has written itself"


def test_the_time_that_a_resumed_stage_needs_comes_from_what_was_seen(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    grow(run, 60)
    with run.lock():
        later = time.time() + 10
        os.utime(run.path / ".lock", (later, later))  # younger than the stage, so the stage was resumed
        watching = watcher(run, [])
        watching.write(15.0)
        assert " left" not in page(run).partition("<header>")[2].partition("</header>")[0]
        now[0] += 600
        grow(run, 80)
        watching.write(15.0)
        assert "About 20 min left" in page(run)


def test_a_folder_that_is_no_run_yet_stays_as_it_is(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "later")
    watcher(run, []).write(15.0)
    assert not run.path.exists()


def test_where_there_is_gold_the_newest_scores_are_checked_against_it(run: RunDir, tmp_path: Path) -> None:
    data = tmp_path / "gold.jsonl"
    prompts = [Prompt.from_text(f"Question {n}") for n in range(6)]
    write_rows(data, [{"prompt": p.question, "reference": "yes"} for p in prompts])
    config = yaml.safe_load(run.config.read_text()) | {"data": {"prompts": str(data), "check": "exact"}}
    config["teacher"] |= {"input_price": 1.0, "output_price": 1.0}
    run.config.write_text(yaml.safe_dump(config))
    group = {"anchor": "yes", "anchor_score": 0.9, "lengths": [1, 1], "step": 1, "candidates": ["yes", "no"]}
    write_rows(run.groups, [group | {"prompt_id": p.id, "prompt": p.question, "scores": [0.9, 0.2]} for p in prompts])
    run.revisited.unlink()
    watcher(run, []).write(15.0)
    assert "AUC against gold" in page(run) and "1.00 [" in page(run)
    data.unlink()
    watcher(run, []).write(15.0)
    assert "AUC against gold" not in page(run), "a page without it"


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["purld", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_the_command_watches_until_the_run_is_finished(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("purld.pipeline.watch.lower_priority", lambda: None)

    def finish(seconds: float) -> None:
        for stage in ("align", "evaluate", "report"):
            run.begin(stage)
            run.finish(stage, 1.0)

    monkeypatch.setattr(module.time, "sleep", finish)
    out = tmp_path / "elsewhere.html"
    assert run_command(monkeypatch, "watch", run.path, "--out", out, "--every", "2") == 0
    shown = capsys.readouterr()
    assert shown.out.strip() == str(out)
    assert "loads itself again" in shown.err
    assert out.exists() and not run.report.exists()


def test_what_is_no_run_or_cannot_be_written_is_one_sentence(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run_command(monkeypatch, "watch", tmp_path / "nothing") == 2
    assert "is not a run directory" in capsys.readouterr().err
    assert run_command(monkeypatch, "watch", run.path, "--out", tmp_path) == 2
    assert "is a folder" in capsys.readouterr().err


def test_ending_the_watch_leaves_a_page_that_says_so(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        watch_run(run, None, 5.0, Reporter(Console(file=io.StringIO())))
    assert 'data-every="0"' in page(run)


def test_a_watcher_that_cannot_start_does_not_stop_the_run(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", fail)
    shown = io.StringIO()
    with live_page(run, Reporter(Console(file=shown))):
        grow(run, 2)
    assert "the run goes on without it" in " ".join(shown.getvalue().split())


def test_a_watcher_is_no_part_of_the_job_that_a_launcher_started(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert read_place() is not None
    assert read_place(module._environment_of_watcher()) is None


@pytest.mark.slow
def test_a_watcher_beside_a_run_ends_with_it(run: RunDir) -> None:
    with live_page(run, Reporter(Console(file=io.StringIO()))):
        give_up = time.monotonic() + 120
        while not run.report.exists() and time.monotonic() < give_up:
            time.sleep(0.5)
        assert LIVE_MARK in page(run)
    while 'data-every="0"' not in page(run) and time.monotonic() < give_up:
        time.sleep(0.5)
    assert 'data-every="0"' in page(run), "the run was not finished, and nobody writes its page any more"
