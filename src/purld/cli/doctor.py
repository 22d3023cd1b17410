"""`purld doctor`: whether this machine can run a configuration."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from purld.cli.common import Overrides, RunDirOption, app
from purld.errors import UserError, printable


@app.command("doctor")
def examine(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="A YAML configuration file.", show_default=False)
    ] = None,
    overrides: Overrides = None,
    run_dir: RunDirOption = None,
) -> None:
    """Say what keeps this machine, or CONFIG, from working.

    Versions, devices, memory, disk, clock and locale; the student, the data, keys and endpoints. An endpoint is asked
    for its list of models, which bills nothing. Exit status 2 if something is wrong.
    """
    from purld.runs.run_dir import RunDir
    from purld.setup.doctor import examine_config, examine_machine
    from purld.setup.finding import Finding

    path = run_dir or Path("runs") / (config.stem if config else "run")
    verdicts: Counter[str] = Counter()

    def show(finding: Finding) -> None:
        verdicts[finding.verdict] += 1
        print(f"{finding.verdict:<8} {finding.subject:<12} {printable(finding.text)}", flush=True)
        if finding.remedy:
            print(f"{'':<8} {'':<12} → {printable(finding.remedy)}", flush=True)

    for finding in examine_machine(path):
        show(finding)
    if config is not None:
        from purld.config.load import load_config

        try:
            settings = load_config(config, overrides or [])
        except UserError as problem:
            show(Finding("wrong", "config", str(problem).rstrip("."), f"mend {config}"))
        else:
            for finding in examine_config(settings, RunDir(path)):
                show(finding)
    print(f"{verdicts['wrong']} wrong, {verdicts['warning']} to look at, {verdicts['ok']} in order")
    if verdicts["wrong"]:
        raise typer.Exit(2)
