"""The paper in miniature: its tables, its findings and its sensitivity figures on the testbed, on a laptop's CPU.

    .venv/bin/python benchmarks/miniature.py                # everything; goes on where it stopped
    .venv/bin/python benchmarks/miniature.py --quick        # one seed of the main table, ten minutes on two cores
    .venv/bin/python benchmarks/miniature.py --page         # only make docs/miniature.md and its figures again

Methods x tasks x seeds, with shared anchors and Stage I per seed and the same prompts, decoding and number of updates.
Results are rows of `results.jsonl` in the folder of `--out`, one for each finished cell. One process works per core.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from mini import plan
from mini.cells import Cell

from purld.rundir import append_rows, read_rows

Rows = dict[str, dict[str, Any]]


def main() -> None:
    """Run what is missing, then write the page."""
    options = arguments()
    results = options.out / "results.jsonl"
    rows = {row["id"]: row for row in read_rows(results)}
    if not options.page:
        run(lambda: wanted(options, rows), rows, options.out, options.jobs)
    if options.write or options.page:
        from mini.page import write_page

        write_page(rows, options.docs)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/miniature"), help="folder of the rows and the weights")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where miniature.md lies")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true", help="one seed of the main table, with the settings on file")
    parser.add_argument("--page", action="store_true", help="run nothing, write the page from what is there")
    parser.add_argument("--write", action="store_true", help="write the page when all is done")
    parser.add_argument("--list", action="store_true", help="show what is done and what is left, and stop")
    return parser.parse_args()


def wanted(options: argparse.Namespace, rows: Rows) -> list[Cell]:
    """The cells of this call, most important first."""
    return plan.all_cells(rows)


def run(cells: Callable[[], Sequence[Cell]], rows: Rows, folder: Path, jobs: int) -> None:
    """Run the cells that have no row yet, `jobs` at a time; each row is on disk before the next cell starts.

    Args:
        cells: what is needed, asked again whenever a cell is done.
        rows: finished cells by id; added to.
        folder: of `results.jsonl` and of what the cells need.
        jobs: processes, of one thread each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"  # before a worker imports torch
    running: dict[Future[dict[str, Any]], Cell] = {}
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=start_worker, initargs=(os.getpid(),))
    try:
        while True:
            busy = set(running.values())
            while len(running) < jobs and (cell := next_cell(cells(), rows, busy)):
                busy.add(cell)
                running[pool.submit(work, cell, folder)] = cell
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                cell = running.pop(future)
                row = future.result()
                append_rows(folder / "results.jsonl", [row])
                rows[cell.id] = row
                tell(cell, row, len(rows), sum(c.id not in rows for c in cells()))
    except KeyboardInterrupt:
        print("\nStopped; the same command goes on from here.", file=sys.stderr)
        sys.exit(130)
    finally:
        for process in list(pool._processes.values()):
            process.terminate()
        pool.shutdown(wait=True, cancel_futures=True)


def next_cell(cells: Sequence[Cell], rows: Mapping[str, Any], busy: set[Cell]) -> Cell | None:
    """The first cell that can start: one that starts from a p_sft waits for it, and is preceded by it."""
    training = {cell.family for cell in busy if cell.method == "sft"}
    for cell in cells:
        if cell.id in rows or cell in busy:
            continue
        first = cell.stage_one
        if cell.method != "sft" and first.id not in rows:
            if first not in busy:
                return first
        elif cell.method != "sft" or cell.family not in training:
            return cell
    return None


def work(cell: Cell, folder: Path) -> dict[str, Any]:
    """In a worker: run one cell."""
    from mini.work import run_cell

    return run_cell(cell, folder)


def start_worker(parent: int) -> None:
    """In a worker: leave Ctrl-C to the parent, and end when it is gone, however it went."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TQDM_DISABLE"] = "1"

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    import warnings

    import transformers

    warnings.simplefilter("ignore", FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def tell(cell: Cell, row: Mapping[str, Any], done: int, left: int) -> None:
    """One line for each finished cell."""
    measured = row["measured"]
    right, wins = (sum(measured[key]) / len(measured[key]) for key in ("right", "wins"))
    seconds = row["seconds"] + measured["seconds"]
    clock = time.strftime("%H:%M:%S")
    print(
        f"{clock} {cell.title}: right {right:.3f}, wins {wins:.3f}, {seconds:.0f} s ({done} done, {left} left)",
        flush=True,
    )


if __name__ == "__main__":
    main()
