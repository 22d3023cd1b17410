"""Get results out of runs: the merged model, a report page about several runs, the totals of the ledger."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from purld.clients.ledger import BUDGETS, LedgerView
from purld.errors import UserError
from purld.model.load import load_encoder, load_model, save_model
from purld.runs.files import atomic_folder, check_new_file, check_new_folder
from purld.runs.open import final_model, open_run


def export_model(run_path: Path, out: Path | None, stage: str | None = None) -> Path:
    """Write a run's model as one directory that any server loads, with adapters merged; return the directory.

    The directory is there once it is complete.

    Args:
        run_path: a run directory.
        out: where to write, a new or empty folder; None for `export` in the run directory, which is replaced.
        stage: `align` for the model of Stage II, `sft` for that of Stage I; None for the run's final model.

    Raises:
        UserError: `run_path` is not a run directory, the stage is unknown or not finished, its files are damaged, or
            `out` holds something else.
    """
    run, config = open_run(run_path)
    stage = stage or final_model(config.align.method).stage
    if stage not in ("sft", "align"):
        raise UserError(f"--stage {stage}: give align or sft.")
    if stage not in run.finished_stages():
        raise UserError(f"{run_path}: stage {stage} is not finished, so there is no model of it to export.")
    if out is not None:
        check_new_folder(out)
    source = run.sft if stage == "sft" else run.align
    run.check_files(source)
    target = out or run.path / "export"
    with atomic_folder(target) as partial:
        save_model(config.student, load_model(config.student, source), load_encoder(config.student), partial)
    return target


def report_runs(run_paths: Sequence[Path], out: Path | None) -> Path:
    """Write one report page about the given runs; return its path.

    Args:
        run_paths: run directories.
        out: where to write; None for the directory of a single run, or the working directory for several.

    Raises:
        UserError: a path is not a run directory, a file of a run is damaged, or `out` is a folder.
    """
    from purld.report.page import write_report

    runs = [open_run(path)[0] for path in run_paths]
    if out is not None:
        check_new_file(out)
    target = out or (runs[0].report if len(runs) == 1 else Path(runs[0].report.name))
    write_report(runs, target)
    return target


def ledger_totals(run_path: Path, export_to: Path | None) -> list[dict[str, Any]]:
    """Return the totals of the ledger, one row per role. With `export_to`, write every request and answer as JSONL.

    The ledger is opened read-only, so the run may be in progress.

    Raises:
        UserError: `run_path` holds no ledger.
    """
    run, _ = open_run(run_path)
    if not run.ledger.exists():
        raise UserError(f"{run_path}: has no ledger; the run sent no request over a network.")
    with LedgerView(run.ledger) as ledger:
        if export_to:
            ledger.export(export_to)
        totals = [{"role": role} | ledger.totals(role) for role in BUDGETS]
    return [row for row in totals if row["role"] != "scorer" or row["prompts"]]
