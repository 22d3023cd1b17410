"""The paper in miniature: its tables, its findings and its sensitivity figures on the testbed, on a laptop's CPU.

    .venv/bin/python benchmarks/miniature.py                # everything; goes on where it stopped
    .venv/bin/python benchmarks/miniature.py --quick        # one seed of Table 1, five minutes on two cores
    .venv/bin/python benchmarks/miniature.py --list         # what is done and what is left
    .venv/bin/python benchmarks/miniature.py --page         # make docs/miniature.md's tables and figures again

Methods x tasks x seeds, with shared anchors and Stage I per seed and the same prompts, decoding and number of updates.
Results are rows of `results.jsonl` in the folder of `--out`, one for each finished cell. One process works per core.
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
"""What the full run's tuning chose, so that the quick slice needs none."""


def main() -> None:
    """Run what is missing, then say or write what came of it."""
    options = arguments()
    results = options.out / "results.jsonl"
    rows = {row["id"]: row for row in read_rows(results)}

    def cells() -> list[Cell]:
        if options.quick:
            chosen = json.loads(CHOSEN.read_text(encoding="utf-8")) if CHOSEN.exists() else plan.middle()
            return plan.main_cells(chosen, seeds=plan.SEEDS[:1])
        return plan.all_cells(rows)

    if options.list:
        for cell in cells():
            print("done" if cell.id in rows else "left", cell.title)
        return
    failed = 0 if options.page else run_alone(cells, rows, options.out, options.jobs)
    if options.quick:
        from mini.page import quick_table

        print(quick_table(rows, cells()))
    elif not failed:
        from mini.page import write_page

        write_page(rows, options.docs, None if options.page else CHOSEN)
    sys.exit(1 if failed else 0)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/miniature"), help="folder of the rows and the weights")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where miniature.md lies")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--quick", action="store_true", help="one seed of Table 1, with the settings on file")
    what.add_argument("--page", action="store_true", help="run nothing, write the page from what is there")
    what.add_argument("--list", action="store_true", help="run nothing, show what is done and what is left")
    return parser.parse_args()


def work(cell: Cell, folder: Path) -> dict[str, Any]:
    """In a worker: run one cell."""
    from mini.work import run_cell

    return run_cell(cell, folder)


def run_alone(cells: Callable[[], Sequence[Cell]], rows: Rows, folder: Path, jobs: int) -> int:
    """Run what is missing while no other process does so in the same folder; returns how many cells failed."""
    try:
        with RunDir(folder).lock():
            rows.update((row["id"], row) for row in read_rows(folder / "results.jsonl"))
            return run(cells, rows, folder, jobs)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def run(
    cells: Callable[[], Sequence[Cell]],
    rows: Rows,
    folder: Path,
    jobs: int,
    do: Callable[[Cell, Path], dict[str, Any]] = work,
) -> int:
    """Run the cells that have no row yet, `jobs` at a time; each row is on disk before the next cell starts.

    Args:
        cells: what is needed, asked again whenever a cell is done.
        rows: finished cells by id; added to.
        folder: of `results.jsonl` and of what the cells need.
        jobs: processes, of one thread each.
        do: the work on a cell, in a worker; returns its row.

    Returns:
        How many cells failed; what needs one of them is left, the others are done.
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
                running[pool.submit(do, cell, folder)] = cell
            if not running:
                return len(failed)
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell = running.pop(future)
                if settle(cell, future, rows, folder):
                    tell(cell, rows[cell.id], len(rows), sum(c.id not in rows for c in cells()))
                else:
                    failed.add(cell.id)
    except KeyboardInterrupt:
        print("\nStopped; the same command goes on from here.", file=sys.stderr)
        sys.exit(130)
    finally:
        for process in multiprocessing.active_children():
            process.terminate()
        pool.shutdown(wait=True, cancel_futures=True)


def settle(cell: Cell, future: Future[dict[str, Any]], rows: Rows, folder: Path) -> bool:
    """Keep the row of a cell that ended; returns False, and says why, if it failed.

    Raises:
        BrokenProcessPool: a worker died, of want of memory perhaps; the same command goes on.
    """
    try:
        row = future.result()
    except BrokenProcessPool:
        raise
    except Exception as error:  # whatever a cell fails of, the others are worth having
        print(f"failed: {cell.title}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return False
    append_rows(folder / "results.jsonl", [row])
    rows[cell.id] = row
    return True


def next_cell(
    cells: Sequence[Cell], rows: Mapping[str, Any], busy: Collection[Cell], failed: Collection[str] = ()
) -> Cell | None:
    """The first cell that can start: what starts from a p_sft waits for it, and is preceded by it."""
    training = {cell.family for cell in busy if cell.method == "sft"}
    for cell in cells:
        if cell.id in rows or cell in busy or cell.id in failed:
            continue
        first = cell.stage_one
        if cell.method == "sft":
            if cell.family not in training:
                return cell
        elif first.id in rows:
            return cell
        elif first not in busy and first.id not in failed and first.family not in training:
            return first
    return None


def start_worker(parent: int) -> None:
    """In a worker: leave Ctrl-C to the parent, and end when it is gone, however it went."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def tell(cell: Cell, row: Mapping[str, Any], done: int, left: int) -> None:
    """One line for each finished cell."""
    measured = row["measured"]
    right, wins = (sum(measured[key]) / len(measured[key]) for key in ("right", "wins"))
    seconds = row["seconds"] + measured["seconds"]
    figures = f"right {right:.3f}, wins {wins:.3f}, {seconds:.0f} s"
    print(f"{time.strftime('%H:%M:%S')} {cell.title}: {figures} ({done} done, {left} left)", flush=True)


if __name__ == "__main__":
    main()
