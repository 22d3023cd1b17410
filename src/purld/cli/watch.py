"""`purld watch`: a page about a run that is kept up to date while it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from purld.cli.common import app, existing_run, make_reporter


@app.command("watch")
def watch(
    run_path: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", help="The page to write; RUN/report.html by default.", show_default=False)
    ] = None,
    every: Annotated[float, typer.Option(min=1, help="Seconds from page to page.")] = 15.0,
    for_parent: Annotated[bool, typer.Option("--for-parent", hidden=True)] = False,
) -> None:
    """Keep a page about a run up to date while it trains.

    From another terminal: the curves of both stages, the time left, the newest candidates with their scores, and the
    health of Stage II. The page loads itself again in any browser. Only reads the run, and takes no lock.
    """
    if not for_parent:
        existing_run(run_path)
    from purld.runs.files import check_new_file

    if out is not None:
        check_new_file(out)
    from purld.pipeline.watch import lower_priority, watch_for_parent, watch_run
    from purld.runs.run_dir import RunDir

    lower_priority()
    if for_parent:
        watch_for_parent(RunDir(run_path), every, make_reporter())
    else:
        print(watch_run(RunDir(run_path), out, every, make_reporter()))
