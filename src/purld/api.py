"""The Python API: whole runs and single stages, as the command line runs them.

`purld` exports these functions; docs/api.md shows how to use them. Every function takes a configuration or the path of
its YAML file, and a run directory that it continues if it exists.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from purld import ranks
from purld.config.load import load_config
from purld.config.schema import Config
from purld.display.progress import Reporter
from purld.pipeline.pipeline import STAGES, Pipeline
from purld.pipeline.plan import make_plan
from purld.pipeline.plan_sheet import Plan
from purld.report.page import report_runs
from purld.runs.results import RunResults, load_results
from purld.runs.run_dir import RunDir


def check(config: Config | str | Path, run_dir: str | Path | None = None) -> Plan:
    """Plan a run without starting it: requests, worst-case cost, memory, steps. Uses no network.

    Args:
        config: a configuration or the path of one.
        run_dir: the run directory; what its ledger already holds is not planned again.

    Raises:
        UserError: the configuration, a file or the model cannot be used.
    """
    loaded, run = _open(config, run_dir)
    return make_plan(loaded, run)


def run(
    config: Config | str | Path,
    run_dir: str | Path | None = None,
    *,
    resend_unknown: bool = False,
    reporter: Reporter | None = None,
) -> RunResults:
    """Run every stage that is not finished and return the results.

    Args:
        config: a configuration or the path of one.
        run_dir: the run directory; `runs/<name of the file>` by default, `runs/run` for a configuration object.
        resend_unknown: ask again where an answer may have been billed but never arrived.
        reporter: prints progress; to stderr by default.

    Raises:
        UserError: the configuration, the input or an answer cannot be used; the message is one sentence.
    """
    loaded, directory = _open(config, run_dir)
    with ranks.together():
        Pipeline(loaded, directory, reporter or Reporter(), resend_unknown).execute(STAGES)
    return load_results(directory.path)


def anchors(
    config: Config | str | Path,
    run_dir: str | Path | None = None,
    *,
    resend_unknown: bool = False,
    reporter: Reporter | None = None,
) -> Mapping[str, Any]:
    """Ask the teacher once for each prompt; return the stage's facts. See `run` for arguments and errors."""
    return _run_stage("anchors", config, run_dir, reporter, resend_unknown)


def sft(
    config: Config | str | Path, run_dir: str | Path | None = None, *, reporter: Reporter | None = None
) -> Mapping[str, Any]:
    """Fine-tune on the anchors (Stage I); return the stage's facts. See `run` for arguments and errors."""
    return _run_stage("sft", config, run_dir, reporter)


def align(
    config: Config | str | Path, run_dir: str | Path | None = None, *, reporter: Reporter | None = None
) -> Mapping[str, Any]:
    """Align by `align.method` (Stage II); return the stage's facts. See `run` for arguments and errors."""
    return _run_stage("align", config, run_dir, reporter)


def evaluate(
    config: Config | str | Path,
    run_dir: str | Path | None = None,
    *,
    resend_unknown: bool = False,
    reporter: Reporter | None = None,
) -> RunResults:
    """Answer the held-out prompts, judge the answers, and return the results. See `run` for arguments and errors."""
    _run_stage("evaluate", config, run_dir, reporter, resend_unknown)
    return load_results(_open(config, run_dir)[1].path)


def write_report(run_dirs: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write one report page about one run or several, and return its path.

    Raises:
        UserError: a path is not a run directory, or a file of a run is damaged.
    """
    return report_runs([Path(path) for path in run_dirs], None if out is None else Path(out))


def _run_stage(
    stage: str,
    config: Config | str | Path,
    run_dir: str | Path | None,
    reporter: Reporter | None,
    resend_unknown: bool = False,
) -> Mapping[str, Any]:
    loaded, directory = _open(config, run_dir)
    with ranks.together():
        Pipeline(loaded, directory, reporter or Reporter(), resend_unknown).execute([stage])
    return directory.finished_stages().get(stage, {})


def _open(config: Config | str | Path, run_dir: str | Path | None) -> tuple[Config, RunDir]:
    if isinstance(config, Config):
        return config, RunDir(run_dir or Path("runs") / "run")
    return load_config(config), RunDir(run_dir or Path("runs") / Path(config).stem)
