"""Run a grid of variants of one configuration that share anchors and Stage I.

Runs whose configuration agrees up to Stage I form a family. The first run of a family, its leader, collects the anchors
and trains Stage I; the other runs get copies of both, so that no anchor is bought and no Stage I is trained twice.
Families collect their anchors one after the other, each starting from a copy of the previous family's ledger. All work
is done by the ordinary `purld` commands in separate processes, so a sweep resumes where it stopped, as runs do.
What a run paid its judge, or a teacher that scores candidates, is not copied: these caps hold for each run.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from purld.clients.ledger import LedgerView
from purld.config.load import load_config
from purld.config.read_yaml import parse_yaml, read_yaml
from purld.config.schema import Config
from purld.display.progress import Reporter
from purld.display.results import format_signed_difference
from purld.display.titles import ANSWER_TITLES, METRIC_TITLES, model_title
from purld.errors import UserError
from purld.pipeline.chosen_score import with_chosen_score
from purld.records import content_hash
from purld.report.page import write_report
from purld.runs.files import read_json, read_rows, sync_folder, write_json, write_rows
from purld.runs.open import final_model
from purld.runs.run_dir import RunDir
from purld.runs.shortfalls import stage_shortfalls
from purld.signals import Stopped

_PURLD = (sys.executable, "-c", "from purld.cli import main; main()")
_LOG = "sweep.log"
_POLL_SECONDS = 0.2
_LONGEST_NAME = 200  # bytes of a folder's name; file systems allow 255


@dataclass(frozen=True)
class SweepCell:
    """One run of the grid.

    Attributes:
        values: the swept keys with this run's values.
        overrides: the same in the syntax of the command line.
        config: the whole configuration.
        run: the run directory.
    """

    values: Mapping[str, Any]
    overrides: tuple[str, ...]
    config: Config
    run: RunDir

    @property
    def name(self) -> str:
        """The name of the run's folder, unique in the sweep."""
        return self.run.path.name

    @property
    def family(self) -> str:
        """A hash that is equal for runs with the same anchors and the same Stage I."""
        values = self.config.model_dump(mode="json")
        sections = [values[key] for key in ("student", "data", "teacher", "anchors", "sft", "seed")]
        return content_hash([*sections, values["evaluate"]["opponent"]])

    @property
    def finished(self) -> bool:
        """Return whether every stage is finished under exactly this configuration."""
        if "report" not in self.run.finished_stages() or not self.run.config.exists():
            return False
        if self.run.damaged_files(self.run.config):
            return False
        return bool(read_yaml(self.run.config) == self.config.model_dump(mode="json"))


def plan_sweep(config: Path, grid: Sequence[str], folder: Path) -> list[SweepCell]:
    """Return the runs of a grid in order; the last key varies fastest.

    Args:
        config: the configuration file that the runs vary.
        grid: entries `key.path=value,value,…`, one per key.
        folder: the parent folder of the runs.

    Raises:
        UserError: the configuration, a key or a value is wrong, or a key or value comes twice.
    """
    axes = dict(_parse_axis(entry) for entry in grid)
    if len(axes) < len(grid):
        raise UserError("a key of the sweep is given twice; give each key once, with all its values.")
    cells = []
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        overrides = tuple(f"{key}={json.dumps(value)}" for key, value in chosen.items())
        cell_config = with_chosen_score(load_config(config, overrides))  # as the run's config.yaml will have it
        cells.append(SweepCell(chosen, overrides, cell_config, RunDir(folder / _folder_name(chosen))))
    names = [cell.name for cell in cells]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"the sweep holds {repeated[0]} twice; give each value once.")
    return cells


def run_sweep(config: Path, cells: Sequence[SweepCell], jobs: int, reporter: Reporter) -> None:
    """Run all unfinished runs, `jobs` at a time, and show all runs in one table and one page.

    The folder of the runs gets `sweep.json` and `report.html`; each run's output is in its `sweep.log`.

    Raises:
        UserError: a run failed; the others are finished and shown first.
    """
    failed: dict[str, str] = {}
    leaders = list({cell.family: cell for cell in reversed(cells)}.values())[::-1]
    open_families = [leader for leader in leaders if "sft" not in leader.run.finished_stages()]
    reporter.headline(f"runs: {len(cells)}, different Stage I: {len(leaders)}")
    _collect_in_turn(config, open_families, reporter, failed)
    _run_each(config, "sft", [c for c in open_families if c.name not in failed], jobs, reporter, failed)
    shared = _share_with_families(cells, {leader.family: leader for leader in leaders}, failed)
    if shared:
        reporter.say(f"runs that were given the anchors and Stage I of another: {shared}")
    ready = [cell for cell in cells if "sft" in cell.run.finished_stages() and not cell.finished]
    _run_each(config, "run", ready, jobs, reporter, failed)
    _show_results(cells, failed)


def share_stage_one(source: RunDir, target: RunDir) -> None:
    """Copy the finished anchors and Stage I of `source` to `target`: weights as hard links, the manifest last.

    Raises:
        UserError: another process works on one of the two runs, or a file of `source` is damaged.
    """
    with source.lock(), target.lock():
        source.check_files(source.anchors, source.opponent, source.sft, source.metrics)
        shutil.rmtree(target.sft, ignore_errors=True)
        without_checkpoints = shutil.ignore_patterns("checkpoints")
        shutil.copytree(source.sft, target.sft, ignore=without_checkpoints, copy_function=_link_or_copy)
        sync_folder(target.sft)
        for ours, theirs in ((source.anchors, target.anchors), (source.opponent, target.opponent)):
            if ours.exists():
                write_rows(theirs, read_rows(ours))
        write_rows(target.metrics, [row for row in read_rows(source.metrics) if row["stage"] == "sft"])
        _copy_ledger(source, target)
        finished = source.finished_stages()
        for stage in ("anchors", "sft"):
            target.begin(stage)
            target.finish(stage, **finished[stage] | {"shared_from": source.path.name})


def _parse_axis(entry: str) -> tuple[str, list[Any]]:
    """Return the key and the values of one entry of the grid."""
    key, equals, text = entry.partition("=")
    try:
        values = parse_yaml(f"[{text}]")
    except yaml.YAMLError:
        values = None
    if not equals or not key.strip() or not values:
        raise UserError(f"sweep {entry!r}: write key.path=value,value, for example align.tau=0.6,0.9.")
    return key.strip(), values


def _folder_name(values: Mapping[str, Any]) -> str:
    """Return a folder name of all values: each key by its last part, or in full if two keys end in the same part."""
    leaves = [key.rpartition(".")[2] for key in values]
    parts = [
        f"{key if leaves.count(leaf) > 1 else leaf}={value if isinstance(value, str) else json.dumps(value)}"
        for (key, value), leaf in zip(values.items(), leaves, strict=True)
    ]
    name = re.sub(r"[^\w.=,+-]+", "_", ",".join(parts))
    if len(name.encode()) <= _LONGEST_NAME:
        return name
    kept = name.encode()[: _LONGEST_NAME - 17].decode(errors="ignore")
    return f"{kept}-{content_hash(dict(values))}"


def _collect_in_turn(config: Path, leaders: Sequence[SweepCell], reporter: Reporter, failed: dict[str, str]) -> None:
    """Collect the anchors of every family, each starting with the ledger of the family before it."""
    previous: SweepCell | None = None
    for leader in leaders:
        if previous is not None and not leader.run.ledger.exists():
            leader.run.path.mkdir(parents=True, exist_ok=True)
            _copy_ledger(previous.run, leader.run)
        _run_each(config, "anchors", [leader], 1, reporter, failed)
        previous = leader


def _copy_ledger(source: RunDir, target: RunDir) -> None:
    """Copy the calls for anchors, which count towards the caps of both runs, to a run without a ledger.

    What `source` paid its judge and for scores of candidates is its own. `target` finds these answers in its folder.
    """
    if source.ledger.exists() and not target.ledger.exists():
        with LedgerView(source.ledger) as ledger:
            ledger.copy(target.ledger, roles=("teacher", "opponent"))


def _share_with_families(cells: Sequence[SweepCell], leaders: Mapping[str, SweepCell], failed: dict[str, str]) -> int:
    """Copy anchors and Stage I to every run that lacks them; return the number of runs that got them."""
    count = 0
    for cell in cells:
        leader = leaders[cell.family]
        if "sft" in cell.run.finished_stages():
            continue
        if "sft" in leader.run.finished_stages():
            share_stage_one(leader.run, cell.run)
            count += 1
        else:
            failed.setdefault(cell.name, f"it needs Stage I of {leader.name}, which failed")
    return count


def _link_or_copy(source: str, target: str) -> None:
    """Hard-link a file that no finished stage changes, or copy it where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _run_each(
    config: Path, command: str, cells: Sequence[SweepCell], jobs: int, reporter: Reporter, failed: dict[str, str]
) -> None:
    """Run a command for every cell, `jobs` at a time; add the error of each failed run to `failed`."""
    waiting, running, finished = deque(cells), dict[subprocess.Popen[bytes], SweepCell](), 0
    with reporter.progress(f"purld {command}: runs") as progress:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    cell = waiting.popleft()
                    running[_start_process(config, command, cell, jobs)] = cell
                ended = [process for process in running if process.poll() is not None]
                for process in ended:
                    finished += 1
                    cell = running.pop(process)
                    if process.returncode:
                        failed[cell.name] = _failure_text(cell, process.returncode)
                    progress(finished, len(cells), f"{len(failed)} failed" if failed else "")
                if not ended:
                    time.sleep(_POLL_SECONDS)
        finally:
            _stop_processes(list(running))


def _stop_processes(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask the processes to stop, which keeps the answers in flight, and wait; a second Ctrl-C ends them at once."""
    for process in processes:
        process.send_signal(signal.SIGTERM)
    try:
        for process in processes:
            process.wait()
    except (Stopped, KeyboardInterrupt):
        for process in processes:
            process.send_signal(signal.SIGINT)
        raise


def _start_process(config: Path, command: str, cell: SweepCell, jobs: int) -> subprocess.Popen[bytes]:
    cell.run.path.mkdir(parents=True, exist_ok=True)
    threads = {} if jobs == 1 else {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    # In its own session, so that Ctrl-C reaches it once, through this process, and not also from the terminal.
    with (cell.run.path / _LOG).open("ab") as log:
        return subprocess.Popen(
            [*_PURLD, command, str(config), *cell.overrides, "--run-dir", str(cell.run.path)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=threads | os.environ,
            start_new_session=True,
        )


def _failure_text(cell: SweepCell, status: int) -> str:
    log = cell.run.path / _LOG
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line.removeprefix("purld: ").rstrip(".") for line in lines if line.startswith("purld: ")]
    return errors[-1] if errors and status in (1, 2) else f"it ended with status {status}, see {log}"


def _show_results(cells: Sequence[SweepCell], failed: Mapping[str, str]) -> None:
    """Write sweep.json, the table and the page about the finished runs.

    Raises:
        UserError: a run failed.
    """
    folder = cells[0].run.path.parent
    done = [cell for cell in cells if "evaluate" in cell.run.finished_stages()]
    rows = [_result_row(cell) for cell in done]
    write_json(folder / "sweep.json", {"keys": list(cells[0].values), "runs": rows, "failed": dict(failed)})
    if done:
        _print_table(rows)
        page = folder / "report.html"
        write_report([cell.run for cell in done], page)
        print(f"Report: {page}")
    for cell in done:
        shortfalls = [*stage_shortfalls(cell.run, "anchors"), *stage_shortfalls(cell.run, "evaluate")]
        for sentence in shortfalls:
            print(f"{cell.name}: {sentence}.")
    if failed:
        first = next(cell.name for cell in cells if cell.name in failed)
        raise UserError(f"{len(failed)} of {len(cells)} runs failed; {first}: {failed[first]}.")


def _result_row(cell: SweepCell) -> dict[str, Any]:
    results = read_json(cell.run.results)
    final = final_model(results["method"])
    pair = f"{final.name} - {final.parent}"
    return {
        "run": cell.name,
        "values": dict(cell.values),
        "model": final.name,
        "metrics": results["models"][final.name],
        "difference": {"to": final.parent, **results.get("difference", {}).get(pair, {})},
        "own_score": results.get("self_comparison", {}).get("pairs", {}).get(pair, {}),
    }


def _print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print one row per run: the swept keys, the final model's metrics, and how it compares with the parent model.

    Without gold and without a judge these are measures of the answers, and p_sft's own scores.
    """
    measured = [key for key in METRIC_TITLES if any(key in row["metrics"] for row in rows)]
    shown = measured or [key for key in ANSWER_TITLES if any(key in row["metrics"] for row in rows)]
    titles = METRIC_TITLES | ANSWER_TITLES
    parents = [model_title(row["difference"]["to"]) for row in rows]
    mixed = len(set(parents)) > 1  # of methods with and without a Stage II
    parent = "the model before it" if mixed else parents[0]
    compared = f"minus {parent}" if measured else f"own score above {parent}"
    headings = [*rows[0]["values"], *(titles[key] for key in shown), compared]
    table = Table(*headings, box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for row, before in zip(rows, parents, strict=True):
        cells = [str(value) for value in row["values"].values()]
        cells += [f"{row['metrics'][key]:.3f}" if key in row["metrics"] else "-" for key in shown]
        table.add_row(*cells, _compared_cell(row, measured) + (f" ({before})" if mixed else ""))
    Console(highlight=False, soft_wrap=True).print(table)


def _compared_cell(row: Mapping[str, Any], measured: Sequence[str]) -> str:
    """Return how a run's final model compares with its parent: by the first metric measured or p_sft's own score."""
    if measured:
        return format_signed_difference(row["difference"], measured[0]) if measured[0] in row["difference"] else "-"
    own = row["own_score"]
    return f"{own['preferred']:.0%} [{own['preferred_ci'][0]:.0%}, {own['preferred_ci'][1]:.0%}]" if own else "-"
