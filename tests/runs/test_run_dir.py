"""Run directories: atomic files, incomplete rows, the manifest and the lock."""

import json
import os
from types import SimpleNamespace

import pytest

from purld.errors import UserError
from purld.runs.files import (
    append_rows,
    atomic_folder,
    atomic_write,
    cut_rows,
    read_intact_rows,
    read_json,
    read_rows,
    remove_stale_partials,
    write_rows,
)
from purld.runs.run_dir import RunDir


def test_rows_round_trip_with_any_text(tmp_path):
    rows = [{"text": "a\u2028b\ud800\x00 é"}, {"text": ""}]
    append_rows(tmp_path / "rows.jsonl", rows)
    assert read_rows(tmp_path / "rows.jsonl") == rows


@pytest.mark.parametrize("torn", [b'{"a": 3', b"x" * 10_000])
def test_a_torn_last_row_is_dropped_and_cut_off_before_the_next_append(tmp_path, torn):
    path = tmp_path / "rows.jsonl"
    append_rows(path, [{"a": 1}, {"a": 2}])
    with path.open("ab") as handle:
        handle.write(torn)
    assert read_rows(path) == [{"a": 1}, {"a": 2}]
    append_rows(path, [{"a": 4}])
    assert read_rows(path) == [{"a": 1}, {"a": 2}, {"a": 4}]


def test_a_file_of_nothing_but_a_torn_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a"')
    append_rows(path, [{"a": 1}])
    assert read_rows(path) == [{"a": 1}]


def test_a_broken_row_in_the_middle_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\nnot json\n{"a": 2}\n')
    with pytest.raises(UserError, match=r"rows.jsonl, line 2"):
        read_rows(path)


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.json"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as handle:
        handle.write("new")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_stages_are_begun_then_finished(tmp_path):
    run = RunDir(tmp_path / "run")
    assert run.finished_stages() == {}
    run.begin("anchors")
    assert run.begun_stages() == {"anchors"}
    assert run.finished_stages() == {}
    run.finish("anchors", 1.23456, pool="abc")
    assert run.finished_stages() == {"anchors": {"seconds": 1.235, "pool": "abc"}}


def test_a_stage_keeps_the_facts_that_it_began_with_until_it_is_finished_and_begun_again(tmp_path):
    run = RunDir(tmp_path / "run")
    for told, expected in ((["a"], ["a"]), (["b"], ["a"])):
        run.begin("align", kept_out=told)
        assert run.begin_facts("align")["kept_out"] == expected
    run.finish("align", 1.0)
    assert run.begin_facts("align")["kept_out"] == ["a"]
    run.begin("align", kept_out=["b"])
    assert run.begin_facts("align")["kept_out"] == ["b"]


@pytest.fixture
def clock(monkeypatch):
    """A clock of the run directory that tests move: `clock[0]` is the time in seconds."""
    now = [100.0]
    monkeypatch.setattr("purld.runs.run_dir.time", SimpleNamespace(time=lambda: now[0], monotonic=lambda: now[0]))
    return now


def test_the_time_of_a_stage_is_that_of_all_processes_that_worked_on_it(tmp_path, clock):
    for worked, noted in ((60, True), (30, True), (7, False)):  # the last one is killed before it notes its time
        run = RunDir(tmp_path / "run")
        run.begin("align")
        clock[0] += worked
        if noted:
            run.note_seconds("align")
        clock[0] += 1000  # between two processes
    run = RunDir(tmp_path / "run")
    assert run.seconds_spent("align") == 90
    run.begin("align")
    clock[0] += 5
    run.note_seconds("align")
    clock[0] += 2
    assert run.seconds_spent("align") == 97


@pytest.mark.parametrize(("stage", "expected"), [("anchors", 12), ("evaluate", 12), ("sft", 2), ("align", 2)])
def test_only_a_stage_that_goes_on_with_what_it_has_adds_to_its_time(tmp_path, clock, stage, expected):
    run = RunDir(tmp_path / "run")
    run.begin(stage)
    run.finish(stage, 10.0)
    run.begin(stage)
    clock[0] += 1
    run = RunDir(run.path)  # which a kill before the first note costs one second
    run.begin(stage)
    clock[0] += 2
    assert run.seconds_spent(stage) == expected


def test_rewinding_drops_what_a_resumed_stage_will_log_again(tmp_path):
    run = RunDir(tmp_path)
    for step in (1, 2, 3):
        run.log_metrics("sft", step, {"loss": 1.0})
        run.log_metrics("align", step, {"objective": 1.0})
    write_rows(run.groups, [{"step": s} for s in (1, 2, 3)])
    run.rewind_log("align", 2)
    assert [(r["stage"], r["step"]) for r in read_rows(run.metrics)] == [
        ("sft", 1),
        ("align", 1),
        ("sft", 2),
        ("align", 2),
        ("sft", 3),
    ]
    assert [r["step"] for r in read_rows(run.groups)] == [1, 2]


def test_what_was_measured_at_the_end_goes_when_its_stage_is_resumed(tmp_path):
    run = RunDir(tmp_path)
    write_rows(run.revisited, [{"step": 1}])
    run.rewind_log("sft", 0)
    assert run.revisited.exists()
    run.rewind_log("align", 2)
    assert not run.revisited.exists()


def test_two_processes_do_not_share_a_run(tmp_path):
    with RunDir(tmp_path).lock(), pytest.raises(UserError, match="another purld process"), RunDir(tmp_path).lock():
        pass


def test_a_changed_file_is_named(tmp_path):
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json"):
        RunDir(tmp_path).finished_stages()
    with pytest.raises(UserError, match="is missing"):
        read_json(tmp_path / "none.json")
    assert json.dumps(read_rows(tmp_path / "none.jsonl")) == "[]"


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "deleted":
        path.unlink()
        return
    if how == "flipped":
        data[len(data) // 2] ^= 4
    path.write_bytes(data if how == "flipped" else data[: len(data) // 2 if how == "halved" else 0])


@pytest.fixture
def finished_run(tmp_path):
    run = RunDir(tmp_path)
    run.begin("anchors")
    write_rows(run.anchors, [{"prompt_id": str(n), "text": "four"} for n in range(16)])
    run.finish("anchors", 1.0)
    run.begin("sft")
    run.sft.mkdir()
    (run.sft / "model.safetensors").write_bytes(b"w" * 3_000_000)
    run.log_metrics("sft", 1, {"loss": 1.0})
    run.finish("sft", 1.0)
    return RunDir(tmp_path)


@pytest.mark.parametrize("how", ["halved", "emptied", "deleted", "flipped"])
@pytest.mark.parametrize("name", ["anchors.jsonl", "sft/model.safetensors", "metrics.jsonl"])
def test_a_file_that_is_not_what_its_stage_wrote_is_named_with_what_to_do(finished_run, name, how):
    run, path = finished_run, finished_run.path / name
    run.check_files(run.path)
    damage(path, how)
    run = RunDir(run.path)
    with pytest.raises(UserError) as error:
        run.check_files(path)
    assert str(error.value).startswith(f"{path}: is {'missing' if how == 'deleted' else 'damaged'}")
    assert "\n" not in str(error.value)
    remedy = {"anchors.jsonl": "purld anchors", "sft/model.safetensors": "purld sft", "metrics.jsonl": "--run-dir"}
    assert remedy[name] in str(error.value)
    if (name, how) == ("anchors.jsonl", "halved"):
        assert "it has 8 rows, and 16 were recorded" in str(error.value)


def test_a_log_may_grow_after_its_stage_but_not_change(finished_run):
    finished_run.log_metrics("align", 1, {"objective": 1.0})
    RunDir(finished_run.path).check_files(finished_run.metrics)
    text = finished_run.metrics.read_text()
    finished_run.metrics.write_text(text.replace("loss", "lose"))
    with pytest.raises(UserError, match="content"):
        RunDir(finished_run.path).check_files(finished_run.metrics)


def test_weights_that_stage_two_has_used_cannot_be_trained_again_unnoticed(finished_run):
    finished_run.begin("align")
    damage(finished_run.sft / "model.safetensors", "flipped")
    with pytest.raises(UserError, match=r"restore it from a backup, or start again with another --run-dir"):
        RunDir(finished_run.path).check_files(finished_run.sft)


def test_a_manifest_without_hashes_still_works(finished_run):
    values = read_json(finished_run.manifest)
    (finished_run.manifest).write_text(json.dumps({key: values[key] for key in ("finished", "begun")}))
    damage(finished_run.anchors, "halved")
    run = RunDir(finished_run.path)
    run.check_files(run.path)
    assert set(run.finished_stages()) == {"anchors", "sft"}


@pytest.mark.parametrize("how", ["halved", "emptied", "flipped"])
def test_a_damaged_manifest_is_no_manifest(finished_run, how):
    damage(finished_run.manifest, how)
    with pytest.raises(UserError, match=r"manifest\.json: is damaged"):
        RunDir(finished_run.path).finished_stages()


@pytest.mark.parametrize("text", ["[1]", "{}", "7", '{"finished": {}}', '{"finished": {}, "begun": 3}', "\0" * 100])
def test_other_json_is_no_manifest(finished_run, text):
    finished_run.manifest.write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json: is damaged"):
        RunDir(finished_run.path).finished_stages()


def test_a_stage_that_begins_again_is_not_finished_and_has_no_files(finished_run):
    finished_run.begin("anchors")
    assert finished_run.finished_stages() == {}
    assert finished_run.begun_stages() == {"anchors"}
    assert finished_run.recorded(finished_run.anchors) is None


def test_a_flipped_bit_in_a_row_of_a_growing_file_is_found(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_rows(path, [{"text": "aaa", "x": 1}, {"text": "bbb", "x": 2}, {"text": "ccc", "x": 3}])
    path.write_text(path.read_text().replace("bbb", "bcb"))
    with pytest.raises(UserError, match=r"rows.jsonl, line 2: is damaged"):
        read_rows(path)
    assert read_intact_rows(path) == [{"text": "aaa", "x": 1}]
    cut_rows(path, 1)
    assert read_rows(path) == [{"text": "aaa", "x": 1}]


def test_rewinding_with_records_of_the_logs_cuts_them_where_they_were(tmp_path):
    run = RunDir(tmp_path)
    run.log_metrics("align", 1, {"objective": 1.0})
    append_rows(run.groups, [{"step": 1}])
    records = run.log_records()
    run.log_metrics("align", 2, {"objective": 1.0})
    append_rows(run.groups, [{"step": 2}])
    with run.groups.open("ab") as handle:
        handle.write(b"not json\n")
    assert run.find_log_damage(records) is None
    run.rewind_log("align", 1, records)
    assert run.log_records() == records
    run.rewind_log("align", 0)
    assert read_rows(run.metrics) == [] and not run.groups.exists()


def test_what_a_killed_process_was_writing_is_removed_by_the_next_that_writes_it(tmp_path):
    killed = [tmp_path / f".{name}.999999999.partial" for name in ("export", "page.html")]
    for partial in killed:
        partial.mkdir()
    other = tmp_path / f".other.{os.getpid()}.partial"
    other.touch()
    with atomic_folder(tmp_path / "export") as folder:
        (folder / "file").touch()
    with atomic_write(tmp_path / "page.html") as handle:
        handle.write("page")
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, "export", "page.html"]


def test_what_safetensors_was_writing_is_removed_with_the_other_partial_files(tmp_path):
    for name in ("sft/.tmpqkXBx1", "sft/model.safetensors", ".tmpfile"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    remove_stale_partials(tmp_path)
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"sft/model.safetensors", ".tmpfile"}
