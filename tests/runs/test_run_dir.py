"""Run directories: atomic files, incomplete rows, the manifest and the lock."""

import json

import pytest

from purld.errors import UserError
from purld.runs.files import append_rows, atomic_write, read_json, read_rows, write_rows
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
