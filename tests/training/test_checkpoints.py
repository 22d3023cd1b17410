"""Checkpoints: which one a stage resumes from when some are incomplete or damaged."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState

from purld.runs.files import append_rows
from purld.runs.run_dir import RunDir
from purld.training.checkpoints import (
    RunCallback,
    find_log_damage,
    last_checkpoint,
    mark_complete,
    remove_older,
    unmark_checkpoint,
)


@pytest.fixture
def run(tmp_path):
    """A run in Stage II with checkpoints of steps 2, 4 and 6 and logs; the best model is that of step 2."""
    run = RunDir(tmp_path / "run")
    for step in (2, 4, 6):
        run.log_metrics("align", step, {"objective": 1.0})
        append_rows(run.groups, [{"step": step}])
        folder = run.checkpoints("align") / f"checkpoint-{step}"
        (folder / "adapter").mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"w" * 1000)
        (folder / "adapter" / "optimizer.pt").write_bytes(b"o" * 1000)
        state = {"best_global_step": 2 if step == 6 else None, "global_step": step}
        (folder / "trainer_state.json").write_text(json.dumps(state))
        mark_complete(run, folder)
    return run


def newest(run):
    return last_checkpoint(run, run.checkpoints("align"))


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def test_the_newest_is_taken_and_incomplete_ones_are_removed(run):
    torn = run.checkpoints("align") / "checkpoint-8"
    shutil.copytree(run.checkpoints("align") / "checkpoint-6", torn)
    (torn / "complete").unlink()
    found = newest(run)
    assert (found.path.name, found.step, found.set_aside) == ("checkpoint-6", 6, None)
    assert not torn.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "adapter/optimizer.pt", "trainer_state.json", "complete"])
@pytest.mark.parametrize("harm", [flip, lambda path: os.truncate(path, path.stat().st_size // 2), os.unlink])
def test_a_damaged_one_is_named_and_the_next_older_one_is_taken(run, name, harm):
    newest_folder = run.checkpoints("align") / "checkpoint-6"
    harm(newest_folder / name)
    found = newest(run)
    assert found.step == 4
    if harm is os.unlink and name == "complete":  # as after a kill
        return
    assert str(newest_folder) in found.set_aside
    assert found.set_aside.endswith("the checkpoint of step 4 is used.")
    assert not newest_folder.exists()


def test_one_whose_best_model_is_damaged_cannot_be_used(run):
    flip(run.checkpoints("align") / "checkpoint-2" / "model.safetensors")
    assert newest(run).step == 4


def test_one_that_is_ahead_of_a_damaged_log_is_not_used(run):
    lines = run.groups.read_text().splitlines(keepends=True)
    run.groups.write_text("".join(lines[:2]))
    assert newest(run).step == 4
    run.groups.write_text("")
    found = newest(run)
    assert (found.path, found.step) == (None, 0)
    assert "groups.jsonl: is damaged" in found.set_aside
    assert found.set_aside.endswith("the stage starts again.")


def test_an_empty_marker_of_an_older_version_counts(run):
    (run.checkpoints("align") / "checkpoint-6" / "complete").write_text("")
    found = newest(run)
    assert (found.step, found.logs) == (6, None)
    run.begin("align")  # which records when, as those versions did not
    assert newest(run).step == 4


def test_a_log_of_a_stage_under_way_is_compared_with_the_newest_checkpoint(run):
    run.begin("align")
    append_rows(run.groups, [{"step": 7}])
    assert find_log_damage(run) is None
    flip(run.metrics)
    assert "metrics.jsonl: is damaged" in find_log_damage(run)
    run.finish("align", 1.0)  # from here on the manifest knows the logs
    assert find_log_damage(run) is None


def test_every_file_is_on_disk_before_the_marker(run, monkeypatch):
    synced, sync = [], os.fsync
    monkeypatch.setattr(
        "os.fsync", lambda number: (synced.append(os.readlink(f"/proc/self/fd/{number}")), sync(number))
    )
    folder = run.checkpoints("align") / "checkpoint-6"
    (folder / "complete").unlink()
    mark_complete(run, folder)
    marker = next(n for n, path in enumerate(synced) if ".complete" in path)
    before = {os.path.relpath(path, folder) for path in synced[:marker]}
    assert {".", "..", "adapter", "model.safetensors", "adapter/optimizer.pt", "trainer_state.json"} <= before


def save_with_best(run, **best_steps):
    """Let Stage II save checkpoints, each with the best step of its time; `_4=2` is step 4, with 2 as the best."""
    for name, best in best_steps.items():
        step = int(name[1:])
        folder = run.checkpoints("align") / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"w" * 1000)
        (folder / "trainer_state.json").write_text(json.dumps({"best_global_step": best}))
        state = TrainerState(global_step=step, best_global_step=best)
        arguments = SimpleNamespace(output_dir=folder.parent)
        RunCallback(run, "align", lambda key: True, lambda *_: None).on_save(arguments, state, TrainerControl())


@pytest.mark.parametrize(
    ("saved", "left"),
    [
        ({"_2": None, "_4": None, "_6": None}, [4, 6]),
        ({"_2": 2, "_4": 2, "_6": 2, "_8": 2}, [2, 6, 8]),
        ({"_2": 2, "_4": 2, "_6": 6}, [2, 4, 6]),  # 2 is the best of 4
        ({"_2": 2, "_4": 2, "_6": 6, "_8": 6}, [6, 8]),
    ],
)
def test_the_newest_two_are_kept_with_the_best_models_that_they_name(saved, left, tmp_path):
    run = RunDir(tmp_path / "run")
    save_with_best(run, **saved)
    assert sorted(path.name for path in run.checkpoints("align").iterdir()) == [f"checkpoint-{step}" for step in left]


@pytest.mark.parametrize("best", [50, 150])
def test_whatever_the_newest_has_lost_the_one_before_it_can_be_used(best, tmp_path):
    run = RunDir(tmp_path / "run")
    save_with_best(run, _50=50, _100=50, _150=best)
    unmark_checkpoint(run.checkpoints("align"), 150)
    assert (newest(run).step, newest(run).set_aside) == (100, None)


def test_where_a_trainer_state_cannot_be_read_the_newest_two_are_left(run):
    folder = run.checkpoints("align")
    (folder / "checkpoint-4" / "trainer_state.json").write_text("[")
    (folder / "checkpoint-6" / "trainer_state.json").unlink()
    remove_older(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-4", "checkpoint-6"]


def test_no_checkpoint(tmp_path):
    run = RunDir(tmp_path)
    found = newest(run)
    assert (found.path, found.step, found.set_aside) == (None, 0, None)


def test_a_checkpoint_keeps_the_time_spent_so_far(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("purld.runs.run_dir.time", SimpleNamespace(time=lambda: now[0], monotonic=lambda: now[0]))
    run = RunDir(tmp_path / "run")
    run.begin("align")
    now[0] += 60
    folder = run.checkpoints("align")
    (folder / "checkpoint-2").mkdir(parents=True)
    callback = RunCallback(run, "align", lambda key: True, lambda *_: None)
    callback.on_save(SimpleNamespace(output_dir=folder), TrainerState(global_step=2), TrainerControl())
    assert RunDir(run.path).begin_facts("align")["seconds"] == 60
