"""Work for the miniature's runner that leaves a trace; as a script it runs six cells."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from mini.cells import Cell, stage_two_cell
from miniature import run_cells

from purld.runs.files import read_rows

CELLS = [
    cell
    for seed in (0, 1)
    for cell in (
        stage_two_cell("writing", seed, "test", "ldl_grpo", {}),
        Cell("writing", seed, "test", "sft"),
        stage_two_cell("writing", seed, "test", "sft_sft", {}),
    )
]


def record_start(cell: Cell, folder: Path) -> dict[str, Any]:
    """Record that the cell began; wait while `hold` exists, once there are two rows (a third may slip through)."""
    with (folder / "begun").open("a") as handle:
        handle.write(cell.title + "\n")
    if cell.title == (folder / "fails").read_text():
        raise RuntimeError("as asked")
    while (folder / "hold").exists() and len(read_rows(folder / "results.jsonl")) >= 2:
        time.sleep(0.01)
    return {"id": cell.id, "seconds": 1.0, "measured": {"seconds": 1.0, "right": [1.0, 0.0], "wins": [0.5, 0.5]}}


if __name__ == "__main__":
    out = Path(sys.argv[1])
    done = {row["id"]: row for row in read_rows(out / "results.jsonl")}
    sys.exit(run_cells(lambda: CELLS, done, out, 2, run_one=record_start))
