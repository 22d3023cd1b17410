"""Compare the methods on real small students: word problems that people wrote, and SVAMP as the test.

    python benchmarks/real.py --student smollm2=DIR --problems PROBLEMS.jsonl --test SVAMP.jsonl
    python benchmarks/real.py ... --tune           # the learning rates, on validation problems; writes chosen.json
    python benchmarks/real.py ... --quick          # a small slice of everything, within 20 minutes on two cores
    python benchmarks/real.py ... --list           # what is done and what is left
    python benchmarks/real.py ... --jobs 16 --dtype bfloat16 --answered 250 --micro-batch 64   # one GPU, 16 cores
    python benchmarks/real.py --table ROWS.jsonl --draw DIR   # the tables of finished rows, and the figures
    python benchmarks/real.py --curves CURVES.jsonl --draw DIR   # the gain of Stage II over its updates

Every cell is an ordinary `purld run`; those of one student and seed share its anchors, its Stage I and its base's and
p_sft's answers. A finished cell is a row of `rows.jsonl` in the folder of `--out` and is not run again; a cell that was
stopped continues. Rows of the problem files have prompt, reference (a number) and, for training, teacher (the anchor).
Gold is read by evaluation alone: settings are chosen by the right answers to validation problems, and the test problems
are answered once by what was chosen. Several cells at a time are for a GPU, which one small student leaves idle.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path

from filelock import FileLock
from real_students.bench import Bench, Machine, Row
from real_students.page import best_on_validation, method_table, on_validation
from real_students.plan import METHODS, QUICK, RATES, SEEDS, Cell, Size, choose_settings, chosen_cells, tuning_cells

from purld.errors import UserError
from purld.runs.files import append_rows, read_json, read_rows, write_json


def main() -> None:
    """Run, list or show tables, as the command line says."""
    options = parse_arguments()
    if options.table or options.curves:
        show_files(options)
        return
    bench = make_bench(options)
    cells = planned_cells(options, bench)
    if options.list:
        print("\n".join(describe_cells(cells, finished_cells(bench))))
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    deadline = time.monotonic() + 60 * options.minutes
    jobs = options.jobs or (os.cpu_count() or 1 if options.quick else 1)
    failed = sum(run_cells(bench, part, jobs, deadline) for part in by_stage(cells))
    rows = list(finished_cells(bench).values())
    if options.tune and not failed:
        write_json(bench.chosen, choose_settings(rows))
    print_tables(rows)
    sys.exit(1 if failed else 0)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", action="append", default=[], metavar="NAME=DIR", help="a student; may come twice")
    parser.add_argument("--problems", type=Path, help="word problems with gold and a teacher's answer")
    parser.add_argument("--test", type=Path, help="test problems with gold")
    parser.add_argument("--out", type=Path, default=Path("runs/real"))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES), help="learning rates that --tune tries")
    parser.add_argument("--steps", type=int, help="updates of Stage II")
    parser.add_argument("--prompts-per-step", type=int, help="prompts of an update")
    parser.add_argument("--pool", choices=("other", "same"), default="other", help="Stage II's problems, by Stage I's")
    parser.add_argument("--jobs", type=int, help="cells at a time; by default one, with --quick one for every core")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no cell after that many")
    parser.add_argument("--dtype", default=Machine.dtype, help="the precision of frozen weights")
    parser.add_argument("--answered", type=int, default=Machine.answered, help="test problems answered at a time")
    parser.add_argument("--micro-batch", type=int, default=Machine.micro_batch, help="candidates of a pass")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--tune", action="store_true", help="the learning rates, on validation problems")
    action.add_argument("--quick", action="store_true", help="a small slice, of the first seed")
    parser.add_argument("--list", action="store_true", help="run nothing, show what is done and what is left")
    parser.add_argument("--table", type=Path, help="run nothing, show the tables of a file of rows")
    parser.add_argument("--curves", type=Path, help="run nothing, draw a file of curves; --draw says where")
    parser.add_argument("--draw", type=Path, metavar="DIR", help="with --table or --curves: write the figures there")
    options = parser.parse_args()
    if options.curves and not options.draw:
        parser.error("--curves needs --draw")
    if not options.table and not options.curves and not (options.student and options.problems and options.test):
        parser.error("--student, --problems and --test are needed")
    if wrong := [entry for entry in options.student if "=" not in entry]:
        parser.error(f"--student {wrong[0]}: write NAME=DIR")
    return options


def make_bench(options: argparse.Namespace) -> Bench:
    """Return the place of the runs that the command line names."""
    students = {name: Path(folder) for name, _, folder in (entry.partition("=") for entry in options.student)}
    out = options.out / "quick" if options.quick else options.out
    named = {"steps": options.steps, "prompts_per_step": options.prompts_per_step}
    size = replace(QUICK if options.quick else Size(), **{key: value for key, value in named.items() if value})
    machine = Machine(options.dtype, options.answered, options.micro_batch)
    return Bench(out, students, options.problems, options.test, size, machine)


def planned_cells(options: argparse.Namespace, bench: Bench) -> list[Cell]:
    """Return the cells that the command line asks for."""
    students = list(bench.students)
    if options.tune:
        cells = tuning_cells(students, options.rates)
    else:
        chosen = read_json(bench.chosen) if bench.chosen.exists() else {}
        cells = chosen_cells(students, chosen, options.seeds[: 1 if options.quick else None])
    return [replace(cell, pool=options.pool) for cell in cells if cell.method in {"SFT", *options.methods}]


def by_stage(cells: Sequence[Cell]) -> tuple[list[Cell], list[Cell]]:
    """Return the cells of Stage I, and those that start from them."""
    return [c for c in cells if c.method == "SFT"], [c for c in cells if c.method != "SFT"]


def run_cells(bench: Bench, cells: Sequence[Cell], jobs: int, deadline: float) -> int:
    """Run the cells without a row, some at a time, and return how many have no row afterwards.

    Args:
        bench: the place of the runs.
        cells: what to run, most important first.
        jobs: cells at a time.
        deadline: no cell starts after it, in seconds of the monotonic clock.
    """
    done = finished_cells(bench)
    left = [cell for cell in cells if cell.id not in done]
    with ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(run_cell, bench, cell, deadline): cell for cell in left}
        for ended in as_completed(running):
            row = ended.result()
            if row is not None:
                with FileLock(f"{bench.rows}.lock"):  # another process may run other cells of the same folder
                    append_rows(bench.rows, [row])
    return len([cell for cell in cells if cell.id not in finished_cells(bench)])


def run_cell(bench: Bench, cell: Cell, deadline: float) -> Row | None:
    """Run a cell and return its row; None, after one sentence, if it failed or the time is over."""
    if time.monotonic() > deadline:
        say(cell, "not started: the time is over")
        return None
    say(cell, "...")
    try:
        row = bench.run_cell(cell)
    except UserError as error:
        say(cell, f"failed: {error}")
        return None
    say(cell, _figures(row))
    return row


def say(cell: Cell, words: str) -> None:
    """Print a line about a cell."""
    print(f"{time.strftime('%H:%M:%S')} {cell.id}: {words}", flush=True)


def finished_cells(bench: Bench) -> dict[str, Row]:
    """Return the rows of finished cells by id.

    Raises:
        UserError: some are of another size; they are not to be compared with these.
    """
    rows = read_rows(bench.rows) if bench.rows.exists() else []
    if any(row["size"] != asdict(bench.size) for row in rows):
        raise UserError(f"{bench.rows} holds cells of another size (steps, prompts or samples); give another --out.")
    return {row["id"]: row for row in rows}


def describe_cells(cells: Sequence[Cell], done: Mapping[str, Row]) -> Iterator[str]:
    """Yield one line per cell: its figures, or that it is left."""
    for cell in cells:
        yield f"{cell.id}: {_figures(done[cell.id]) if cell.id in done else 'left'}"


def show_files(options: argparse.Namespace) -> None:
    """Print the tables of a file of rows, and write the figures of it and of a file of curves."""
    from real_students.figures import draw_figures, draw_gains

    if options.curves:
        draw_gains(read_rows(options.curves), options.draw / "results-real-gain.png")
        print(options.draw / "results-real-gain.png")
    if options.table:
        rows = read_rows(options.table)
        print_tables(rows)
        for student in dict.fromkeys(row["student"] for row in rows) if options.draw else ():
            print(*draw_figures(rows, student, options.draw), sep="\n")


def print_tables(rows: Sequence[Row]) -> None:
    """Print a table for every student and split that has rows, and one of the settings that do best on validation."""
    for student, split in dict.fromkeys((row["student"], row["split"]) for row in rows):
        print(f"\n{student}, {split} problems\n\n{method_table(rows, student, split)}")
        if split == "test":
            tested = [row for row in rows if (row["student"], row["split"]) == (student, split)]
            validated = on_validation(tested)
            if validated:
                told = f"{student}, validation problems, by the cells of the test"
                print(f"\n{told}\n\n{method_table(validated, student, split)}")
            best = best_on_validation(tested)
            if len(best) < len(validated):
                told = f"{student}, test problems, each method with the settings that do best on validation problems"
                print(f"\n{told}\n\n{method_table(best, student, split)}")


def _figures(row: Row) -> str:
    sampled, greedy = (sum(row[key]) / len(row[key]) for key in ("right", "greedy"))
    return f"right {sampled:.3f} sampled, {greedy:.3f} greedy, {sum(row['seconds'].values()):.0f} s"


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"benchmarks/real.py: {error}")
