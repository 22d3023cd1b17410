"""Read the ledger of a run for `purld ledger`: totals, every request, and the batches under way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from purld.clients.ledger import BUDGETS, Ledger, LedgerView, Role, is_blank
from purld.config.clients import OpenAIEndpoint
from purld.errors import UserError
from purld.runs.open import open_run
from purld.runs.run_dir import RunDir


def ledger_totals(run_path: Path, export_to: Path | None) -> list[dict[str, Any]]:
    """Return the totals of the ledger, one row per role. With `export_to`, write every request and answer as JSONL.

    The ledger is opened read-only, so the run may be in progress.

    Raises:
        UserError: `run_path` holds no ledger.
    """
    run = RunDir(run_path)
    if not run.ledger.exists():
        raise UserError(f"{run_path}: has no ledger; the run sent no request over a network.")
    with LedgerView(run.ledger) as ledger:
        if export_to:
            ledger.export(export_to)
        totals = [{"role": role} | ledger.totals(role) for role in BUDGETS]
    return [row for row in totals if row["role"] != "scorer" or row["prompts"]]


def may_have_bought(run: RunDir) -> bool:
    """Return whether a request of a run was answered, may have been billed, or is under way."""
    if is_blank(run.ledger):
        return False
    with LedgerView(run.ledger) as ledger:
        totals = [ledger.totals(role) for role in BUDGETS]
    return any(total[state] for total in totals for state in ("answered", "unknown", "under_way"))


def list_open_batches(run_path: Path) -> list[str]:
    """Return a line about each batch of a run whose results have not been collected."""
    with LedgerView(RunDir(run_path).ledger) as ledger:
        return [
            f"{batch.name} ({batch.role}, {batch.calls:,} requests): {batch.status or batch.state}"
            for batch in ledger.open_batches()
        ]


def cancel_batches(run_path: Path) -> list[str]:
    """Cancel the batches of a run at their endpoints, and return a line about each.

    Raises:
        UserError: `run_path` holds no ledger, a process is using it, or an endpoint cannot be asked.
    """
    from purld.clients.batch import BatchClient

    run, config = open_run(run_path)
    if not run.ledger.exists():
        raise UserError(f"{run_path}: has no ledger; the run sent no request over a network.")
    askers: list[tuple[Role, Any]] = [("teacher", config.teacher), ("judge", config.evaluate.judge)]
    lines = []
    with Ledger(run.ledger) as ledger:
        for role, endpoint in askers:
            if isinstance(endpoint, OpenAIEndpoint) and ledger.open_batches():
                lines += BatchClient(endpoint, ledger, role).cancel()
    return lines
