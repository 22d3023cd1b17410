"""Compare the methods on real small students: word problems that people wrote, and SVAMP as the test.

    python benchmarks/real.py --student smollm2=DIR --problems PROBLEMS.jsonl --test SVAMP.jsonl
    python benchmarks/real.py ... --tune           # the learning rates, on validation problems
    python benchmarks/real.py ... --quick          # a small slice of everything, within 15 minutes on two cores
    python benchmarks/real.py ... --list           # what is done and what is left
    python benchmarks/real.py --table ROWS.jsonl   # the tables of finished rows

Every cell is an ordinary `purld run`; those of one student and seed share its anchors, its Stage I and its base's and
p_sft's answers. A finished cell is a row of `rows.jsonl` in the folder of `--out` and is not run again; a cell that was
stopped continues. Rows of the problem files have prompt, reference (a number) and, for training, teacher (the anchor).
Gold is read by evaluation alone: settings are chosen on validation problems by people who read the table, and the test
problems are answered once by what was chosen.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from real_students.bench import Bench, Row
from real_students.page import method_table
from real_students.plan import CHOSEN, METHODS, QUICK, SEEDS, Cell, Size, chosen_cells, tuning_cells

from purld.errors import UserError
from purld.runs.files import append_rows, read_rows


def main() -> None:
    """Run, list or show tables, as the command line says."""
    options = parse_arguments()
    if options.table:
        print_tables(read_rows(options.table))
        return
    bench = make_bench(options)
    cells = planned_cells(options, list(bench.students))
    if options.list:
        print("\n".join(describe_cells(cells, finished_cells(bench.rows))))
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    failed = run_cells(bench, cells)
    print_tables(list(finished_cells(bench.rows).values()))
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
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--tune", action="store_true", help="the learning rates, on validation problems")
    action.add_argument("--quick", action="store_true", help="a small slice")
    parser.add_argument("--list", action="store_true", help="run nothing, show what is done and what is left")
    parser.add_argument("--table", type=Path, help="run nothing, show the tables of a file of rows")
    options = parser.parse_args()
    if not options.table and not (options.student and options.problems and options.test):
        parser.error("--student, --problems and --test are needed")
    if wrong := [entry for entry in options.student if "=" not in entry]:
        parser.error(f"--student {wrong[0]}: write NAME=DIR")
    return options


def make_bench(options: argparse.Namespace) -> Bench:
    """Return the place of the runs that the command line names."""
    students = {name: Path(folder) for name, _, folder in (entry.partition("=") for entry in options.student)}
    out = options.out / "quick" if options.quick else options.out
    return Bench(out, students, options.problems, options.test, QUICK if options.quick else Size())


def planned_cells(options: argparse.Namespace, students: Sequence[str]) -> list[Cell]:
    """Return the cells that the command line asks for; Stage I comes first."""
    cells = tuning_cells(students) if options.tune else chosen_cells(students, CHOSEN, options.seeds)
    return [cell for cell in cells if cell.method in {"SFT", *options.methods}]


def run_cells(bench: Bench, cells: Sequence[Cell]) -> int:
    """Run the cells without a row and return how many failed."""
    failed = 0
    for cell in cells:
        if cell.id in finished_cells(bench.rows):
            continue
        print(f"{time.strftime('%H:%M:%S')} {cell.id} ...", flush=True)
        try:
            row = bench.run_cell(cell)
        except UserError as error:
            print(f"failed: {error}", file=sys.stderr, flush=True)
            failed += 1
            continue
        append_rows(bench.rows, [row])
        print(f"{time.strftime('%H:%M:%S')} {cell.id}: {_figures(row)}", flush=True)
    return failed


def finished_cells(rows: Path) -> dict[str, Row]:
    """Return the rows of finished cells by id."""
    return {row["id"]: row for row in read_rows(rows)} if rows.exists() else {}


def describe_cells(cells: Sequence[Cell], done: Mapping[str, Row]) -> Iterator[str]:
    """Yield one line per cell: its figures, or that it is left."""
    for cell in cells:
        yield f"{cell.id}: {_figures(done[cell.id]) if cell.id in done else 'left'}"


def print_tables(rows: Sequence[Row]) -> None:
    """Print a table for every student and split that has rows."""
    for student, split in dict.fromkeys((row["student"], row["split"]) for row in rows):
        print(f"\n{student}, {split} problems\n\n{method_table(rows, student, split)}")


def _figures(row: Row) -> str:
    sampled, greedy = (sum(row[key]) / len(row[key]) for key in ("right", "greedy"))
    return f"right {sampled:.3f} sampled, {greedy:.3f} greedy, {sum(row['seconds'].values()):.0f} s"


if __name__ == "__main__":
    main()
