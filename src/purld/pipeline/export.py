"""What can be had of finished runs: the model to serve, one page about several, what the ledger says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from purld.clients.ledger import BUDGETS, LedgerView
from purld.errors import UserError
from purld.model.load import load_encoder, load_model, save_model
from purld.runs.open import open_run


def export_model(run_path: Path, out: Path | None, stage: str) -> Path:
    """Write the model of `align` or `sft` as one directory that any server loads, adapters merged.

    Raises:
        UserError: `run_path` holds no run, or the stage is not finished.
    """
    run, config = open_run(run_path)
    if stage not in ("sft", "align"):
        raise UserError(f"--stage {stage}: it can be align or sft.")
    if stage not in run.finished():
        raise UserError(f"{run_path}: stage {stage} is not finished, so there is no model of it to export.")
    source = run.sft if stage == "sft" else run.align
    target = out or run.path / "export"
    save_model(config.student, load_model(config.student, source), load_encoder(config.student), target)
    return target


def report_runs(run_paths: Sequence[Path], out: Path | None) -> Path:
    """Write one page about the given runs: to `out`, or beside a single run, or here.

    Raises:
        UserError: a path is no run directory, or a file of a run is damaged.
    """
    from purld.report.page import write_report

    runs = [open_run(path)[0] for path in run_paths]
    target = out or (runs[0].report if len(runs) == 1 else Path(runs[0].report.name))
    write_report(runs, target)
    return target


def ledger_totals(run_path: Path, export_to: Path | None) -> list[dict[str, Any]]:
    """What each role has cost, one row a role; with `export_to`, every request and answer as JSONL.

    A run that is under way is only looked at.

    Raises:
        UserError: `run_path` holds no ledger.
    """
    run, _ = open_run(run_path)
    if not run.ledger.exists():
        raise UserError(f"{run_path}: there is no ledger; nothing was asked of a model over a network.")
    with LedgerView(run.ledger) as ledger:
        if export_to:
            ledger.export(export_to)
        totals = [{"role": role} | ledger.totals(role) for role in BUDGETS]
    return [row for row in totals if row["role"] != "scorer" or row["prompts"]]
