"""`purld status`: where a run stands."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from purld.cli.common import app, existing_run


@app.command("status")
def show_status(
    run_path: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.", show_default=False)],
) -> None:
    """Show where a run stands.

    What is done, how far the running stage is, what was spent, batches under way, the last figures, warnings, and the
    command that goes on. Works while the run is in progress, and does not disturb it.
    """
    existing_run(run_path)
    from purld.errors import printable
    from purld.pipeline.status import read_status
    from purld.runs.run_dir import RunDir

    status = read_status(RunDir(run_path), time.time())
    print(printable(status.headline))
    for stage in status.stages:
        rest = "  ".join(part for part in (printable(stage.detail), stage.time) if part)
        print(f"  {stage.name:<9} {stage.state:<8} {rest}".rstrip())
    for title, lines in {
        "Spent": status.spending,
        "Batches under way": status.batches,
        "Results": status.figures,
        "Warnings": status.warnings,
        "Next": status.commands,
    }.items():
        if lines:
            print(title, *(printable(line) for line in lines), sep="\n  ")
