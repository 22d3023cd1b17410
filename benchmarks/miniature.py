"""Reproduce the paper in miniature: its tables, findings and sensitivity figures on the testbed, on a laptop's CPU.

    .venv/bin/python benchmarks/miniature.py                # everything; continues where it was stopped
    .venv/bin/python benchmarks/miniature.py --quick        # one seed of Table 1, ten minutes on two cores
    .venv/bin/python benchmarks/miniature.py --list         # what is done and what is left
    .venv/bin/python benchmarks/miniature.py --page         # make docs/miniature.md's tables and figures again

Methods x tasks x seeds, with shared anchors and Stage I per seed and the same prompts, decoding and number of updates.
Results are rows of `results.jsonl` in the folder of `--out`, one per finished cell. One process works per core.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from mini import plan
from mini.cells import Cell

from purld.errors import UserError
from purld.runs.files import append_rows, read_rows
from purld.runs.run_dir import RunDir

Rows = dict[str, dict[str, Any]]

CHOSEN = Path(__file__).with_name("mini") / "chosen.json"
"""The settings that the full run's tuning chose, so that the quick slice needs no tuning."""


def main() -> None:
    """Run the missing cells, then print the quick table or write the page."""
    options = parse_arguments()
    results = options.out / "results.jsonl"
    rows = {row["id"]: row for row in read_rows(results)}

    def cells() -> list[Cell]:
        if options.quick:
            return plan.main_cells(settings_on_file(CHOSEN), seeds=plan.SEEDS[:1])
        return plan.all_cells(rows)

    if options.list:
        for cell in cells():
            print("done" if cell.id in rows else "left", cell.title)
        return
    failed = 0 if options.page else run_cells_alone(cells, rows, options.out, options.jobs)
    if options.quick:
        from mini.page import quick_table

        print(quick_table(rows, cells()))
    elif not failed:
        from mini.page import write_page

        write_page(rows, options.docs, None if options.page else CHOSEN)
    sys.exit(1 if failed else 0)


def settings_on_file(path: Path) -> plan.Chosen:
    """Return the settings that a full run chose; a row that it did not tune has the middle of its grid."""
    chosen = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {task: settings | chosen.get(task, {}) for task, settings in plan.middle_settings().items()}


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/miniature"), help="folder of the rows and the weights")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of miniature.md")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--quick", action="store_true", help="one seed of Table 1, with the settings on file")
    action.add_argument("--page", action="store_true", help="run nothing, write the page from what is there")
    action.add_argument("--list", action="store_true", help="run nothing, show what is done and what is left")
    return parser.parse_args()


def run_cell_in_worker(cell: Cell, folder: Path) -> dict[str, Any]:
    """Run one cell in a worker process."""
    from mini.work import run_cell

    return run_cell(cell, folder)


def run_cells_alone(cells: Callable[[], Sequence[Cell]], rows: Rows, folder: Path, jobs: int) -> int:
    """Lock the folder, run the missing cells and return how many failed."""
    try:
        with RunDir(folder).lock():
            rows.update((row["id"], row) for row in read_rows(folder / "results.jsonl"))
            return run_cells(cells, rows, folder, jobs)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def run_cells(
    cells: Callable[[], Sequence[Cell]],
    rows: Rows,
    folder: Path,
    jobs: int,
    run_one: Callable[[Cell, Path], dict[str, Any]] = run_cell_in_worker,
) -> int:
    """Run the cells without a row, `jobs` at a time; each row is on disk before the next cell starts.

    Args:
        cells: returns the cells that are needed; called again whenever a cell is done.
        rows: finished cells by id; new rows are added.
        folder: holds `results.jsonl` and the files that cells need.
        jobs: number of processes, each with one thread.
        run_one: runs a cell in a worker and returns its row.

    Returns:
        The number of failed cells. Cells that start from a failed one are left out, all others are run.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # before a worker imports torch
    running: dict[Future[dict[str, Any]], Cell] = {}
    failed: set[str] = set()
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=start_worker, initargs=(os.getpid(),))
    try:
        while True:
            busy = set(running.values())
            while len(running) < jobs and (cell := next_cell(cells(), rows, busy, failed)):
                busy.add(cell)
                running[pool.submit(run_one, cell, folder)] = cell
            if not running:
                return len(failed)
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell = running.pop(future)
                if record_result(cell, future, rows, folder):
                    print_finished_cell(cell, rows[cell.id], len(rows), sum(c.id not in rows for c in cells()))
                else:
                    failed.add(cell.id)
    except KeyboardInterrupt:
        print("\nStopped; the same command continues from here.", file=sys.stderr)
        sys.exit(130)
    finally:
        for process in multiprocessing.active_children():
            process.terminate()
        pool.shutdown(wait=True, cancel_futures=True)


def record_result(cell: Cell, future: Future[dict[str, Any]], rows: Rows, folder: Path) -> bool:
    """Save the row of an ended cell; if it failed, print why and return False.

    Raises:
        BrokenProcessPool: a worker died, perhaps for lack of memory; the same command continues.
    """
    try:
        row = future.result()
    except BrokenProcessPool:
        raise
    except Exception as error:  # one failed cell must not stop the others
        print(f"failed: {cell.title}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return False
    append_rows(folder / "results.jsonl", [row])
    rows[cell.id] = row
    return True


def next_cell(
    cells: Sequence[Cell], rows: Mapping[str, Any], busy: Collection[Cell], failed: Collection[str] = ()
) -> Cell | None:
    """Return the first cell that can start, or the Stage I that it needs first; None if all must wait."""
    training = {cell.stage_one_key for cell in busy if cell.method == "sft"}
    for cell in cells:
        if cell.id in rows or cell in busy or cell.id in failed:
            continue
        first = cell.stage_one
        if cell.method == "sft":
            if cell.stage_one_key not in training:
                return cell
        elif first.id in rows:
            return cell
        elif first not in busy and first.id not in failed and first.stage_one_key not in training:
            return first
    return None


def start_worker(parent: int) -> None:
    """Set up a worker: leave Ctrl-C to the parent, and exit when the parent is gone for any reason."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def print_finished_cell(cell: Cell, row: Mapping[str, Any], done: int, left: int) -> None:
    """Print one line about a finished cell."""
    measured = row["measured"]
    right, wins = (sum(measured[key]) / len(measured[key]) for key in ("right", "wins"))
    seconds = row["seconds"] + measured["seconds"]
    figures = f"right {right:.3f}, wins {wins:.3f}, {seconds:.0f} s"
    print(f"{time.strftime('%H:%M:%S')} {cell.title}: {figures} ({done} done, {left} left)", flush=True)


if __name__ == "__main__":
    main()
