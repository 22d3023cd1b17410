"""A run whose ledger was lost is refused before anything is bought again, and leftovers of a kill are removed."""

from __future__ import annotations

import io
import sys

import pytest
from faulty_server import running_server
from rich.console import Console

from purld.cli import main
from purld.display.progress import Reporter
from purld.pipeline.context import open_ledger
from purld.runs.run_dir import RunDir


def purld(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["purld", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_a_run_that_lost_its_ledger_is_refused_by_every_command_that_could_buy(
    tiny_config, tmp_path, monkeypatch, capsys
):
    run = RunDir(tmp_path / "run")
    mark = run.path / ".ledger.sqlite.calls"
    partial = run.path / ".ledger.sqlite.999999999.partial"
    with running_server() as server:
        teacher = f"teacher={{kind: openai, base_url: '{server.url}', model: m}}"
        there = [tiny_config, teacher, "--run-dir", run.path]
        assert purld(monkeypatch, "anchors", *there) == 0
        partial.write_text("what a killed process was writing")
        content, bought = run.ledger.read_bytes(), len(server.arrived)
        manifest = run.manifest.read_text()
        run.ledger.unlink()
        for command in ("check", "anchors", "run"):
            assert purld(monkeypatch, command, *there) == 2
            assert "is missing, but this run has made 16 calls" in capsys.readouterr().err.splitlines()[-1]
        assert purld(monkeypatch, "anchors", *there, "--dry-run") == 2
        assert not partial.exists()
        mark.unlink()  # as by `rm run/*ledger*`: the manifest still knows
        run.ledger.write_bytes(b"")
        assert purld(monkeypatch, "evaluate", *there) == 2
        assert "holds 0 of the 16 calls" in capsys.readouterr().err.splitlines()[-1]
        run.ledger.unlink()
        run._write_manifest({}, {"anchors": {}}, {})  # killed before the stage was recorded as finished
        assert purld(monkeypatch, "anchors", *there) == 2
        assert "this run has made 16 calls" in capsys.readouterr().err.splitlines()[-1]
        run.ledger.write_bytes(content)
        run.manifest.write_text(manifest)
        assert purld(monkeypatch, "anchors", *there) == 0
        assert len(server.arrived) == bought == 16


def test_every_stage_warns_of_a_ledger_beside_it_that_cannot_be_read(tmp_path):
    damaged = tmp_path / "other" / "ledger.sqlite"
    damaged.parent.mkdir()
    damaged.write_bytes(b"no ledger" * 100)
    said = io.StringIO()
    with open_ledger(RunDir(tmp_path / "run"), Reporter(Console(file=said, width=300))) as ledger:
        ledger.import_results(["key"], "judge")
    assert f"{damaged}: cannot be read" in said.getvalue()
